"""Options: what the command line asked for, as one frozen value that every verb receives.

None means not given: the verb takes the value from the job file, the cluster file or its own default. Files are not
opened here, and whether an option makes sense for a verb was settled by the command line.
"""

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path


class RunnerKind(StrEnum):
    """Who executes the Program: nobody (it is timed), one process, or Ray actors."""

    SIMULATED = "simulated"
    INLINE = "inline"
    RAY = "ray"


class Subject(StrEnum):
    """What is calibrated."""

    LINKS = "links"


@dataclass(frozen=True, slots=True)
class Options:
    """The flags of one command."""

    file: Path | None = None  # check only
    subject: Subject | None = None  # calibrate only, and so are tables
    tables: tuple[Path, ...] = ()
    cluster: Path | None = None
    job: Path | None = None
    model: str | None = None
    data: str | None = None
    plan: Path | None = None
    chips: int | None = None
    global_batch: int | None = None
    seq: int | None = None
    steps: int | None = None
    runner: RunnerKind | None = None
    run_dir: Path | None = None
    resume: Path | None = None
    overrides: tuple[str, ...] = ()  # `a.b=c` each, in the order given
    op: str | None = None
    size: str | None = None
    algorithm: str | None = None  # a name, or a file with a schedule
    fidelity: str | None = None
    sweep: str | None = None  # LOW..HIGH
    tiers: bool = False
    plot: Path | None = None
    as_json: bool = False
    dry_run: bool = False
    verbose: bool = False
