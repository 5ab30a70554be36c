"""Options: what each verb can be asked on the command line, as one frozen value per verb.

The command line follows from these classes: a class is a verb, its first line the question that the verb answers, a
field a flag with its type and its help. None means not given: the verb takes the value from the job file, the cluster
file or its own default. Files are not opened here. A field of the same name means the same at every verb.

Every command makes all of these classes, so they have only what is needed (a third of the time).
"""

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Literal

from typer import Argument, Option


class RunnerKind(StrEnum):
    """Who executes the Program: nobody (it is timed), one process, or Ray actors."""

    SIMULATED = "simulated"
    INLINE = "inline"
    RAY = "ray"


class Subject(StrEnum):
    """What is calibrated."""

    LINKS = "links"


class CheckpointAction(StrEnum):
    """What is done with checkpoints."""

    LS = "ls"
    VERIFY = "verify"
    CONVERT = "convert"


class CheckpointTarget(StrEnum):
    """What one is turned into."""

    CHECKPOINT = "checkpoint"
    SAFETENSORS = "safetensors"
    HF = "hf"
    DCP = "dcp"


# Flags of several verbs.
ClusterFlag = Annotated[
    Path | None,
    Option(metavar="FILE|NAME", help="Cluster file, or a shipped one by its bare name; default: laptop."),
]
ChipsFlag = Annotated[int | None, Option(min=1, help="Take this many chips of the cluster; default: all.")]
RunDirFlag = Annotated[Path | None, Option(metavar="FOLDER", help="Write results here; must not exist yet.")]
PlotFlag = Annotated[Path | None, Option(metavar="FILE.png", help="Draw a picture into this file.")]
JobFlag = Annotated[
    Path | None, Option(metavar="FILE", help="Job file: model, data, loss, optimizer, plan, steps.")
]
ModelFlag = Annotated[
    str | None,
    Option(
        metavar="MODEL",
        help="builtin:NAME (default: gpt-mini), hf:NAME[:HEAD], hf:FOLDER, file.py:name or pkg.module:name.",
    ),
]
DataFlag = Annotated[
    str | None,
    Option(
        metavar="DATA",
        help="A text file, a folder of them, or file.py:name of a dataset or loader; default: text.",
    ),
]
BatchFlag = Annotated[int | None, Option(min=1, help="Samples per step, over all chips; default: 32.")]
SeqFlag = Annotated[int | None, Option(min=1, help="Tokens per sequence; default: 128.")]
SetFlag = Annotated[
    tuple[str, ...],
    Option("--set", metavar="A.B=C", help="Override a key of the job, as in loss=file.py:name."),
]
INTERRUPTED = 130  # exit code
# Flags that every help text has at its end, in this order.
LAST = ("overrides", "dry_run", "as_json", "verbose")


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Options:
    """What every verb can be asked."""

    as_json: Annotated[bool, Option("--json", help="Print the result as JSON on stdout.")] = False
    verbose: Annotated[bool, Option("--verbose", "-v", help="Say more, with tracebacks.")] = False


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class PlannedOptions(Options):
    """What every verb can be asked that is about a model on a cluster."""

    cluster: ClusterFlag = None
    job: JobFlag = None
    model: ModelFlag = None
    data: DataFlag = None
    plan: Annotated[
        Path | None,
        Option(metavar="auto|FILE", help="A saved plan, or auto (the default): the fastest that fits."),
    ] = None
    chips: ChipsFlag = None
    global_batch: BatchFlag = None
    seq: SeqFlag = None
    overrides: SetFlag = ()  # in the order given


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class CheckOptions(Options):
    """Is this file valid, and what does it describe?"""

    file: Annotated[Path, Argument(metavar="FILE", help="A cluster, job, chip or sweep file.")]


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class PlanOptions(PlannedOptions):
    """How is the model split, does it fit, how long is a step?"""

    run_dir: RunDirFlag = None


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class SimulateOptions(PlannedOptions):
    """How long is a step at any scale, where does the time go, what does it cost?"""

    run_dir: Annotated[
        Path | None,
        Option(
            "--out",
            "--run-dir",
            metavar="FOLDER",
            help="Write result, picture and trace; must not exist yet.",
        ),
    ] = None
    fidelity: Annotated[
        Literal["folded", "full"] | None, Option(help="One chip per stage, or every chip and every message.")
    ] = None


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class TrainOptions(PlannedOptions):
    """Train with real tensors, prediction beside measurement."""

    run_dir: RunDirFlag = None
    steps: Annotated[int | None, Option(min=1, help="Optimizer steps; default: 200.")] = None
    runner: Annotated[RunnerKind | None, Option(help="Who executes the plan; default: ray.")] = None
    address: Annotated[
        str | None,
        Option(
            metavar="ADDRESS",
            help="Ray to train on: auto, host:port or ray://host:port; default: RAY_ADDRESS, else one of its own.",
        ),
    ] = None
    resume: Annotated[Path | None, Option(metavar="RUN_DIR", help="Continue the run in this folder.")] = None
    verify_first: Annotated[
        bool, Option("--verify-first", help="End at once if the first step differs from one chip's.")
    ] = False
    dry_run: Annotated[bool, Option("--dry-run", help="Plan and simulate; start nothing.")] = False


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class VerifyOptions(PlannedOptions):
    """Is the split run the same training run as on one chip?"""


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class ScaleOptions(Options):
    """How does it scale: time, efficiency and cost over numbers of chips, where is the knee and what moves it?"""

    file: Annotated[Path | None, Argument(metavar="[SWEEP]", help="A sweep file, which says it all.")] = None
    cluster: ClusterFlag = None
    job: JobFlag = None
    model: ModelFlag = None
    data: DataFlag = None
    chips: Annotated[str | None, Option(metavar="N,N,...", help="Numbers of chips: 8,64,512.")] = None
    mode: Annotated[
        Literal["weak", "strong", "both"] | None,
        Option(help="Batch in proportion to the chips (weak, the default) or the same for all (strong)."),
    ] = None
    global_batch: Annotated[
        int | None,
        Option(min=1, help="Samples per step: of all chips (strong), of the fewest (weak); default: 32."),
    ] = None
    seq: SeqFlag = None
    vary: Annotated[
        tuple[str, ...],
        Option(
            metavar="WHAT=A,B,...",
            help="Try each: model, batch, seq, bandwidth or latency (factors), plan (auto, tp8-pp2), actors.",
        ),
    ] = ()
    measure: Annotated[
        Literal["inline", "ray"] | None,
        Option(help="Train a few real steps here, too, where there are few chips."),
    ] = None
    address: Annotated[
        str | None,
        Option(
            metavar="ADDRESS", help="Work the points out on this Ray: auto, host:port or ray://host:port."
        ),
    ] = None
    out: Annotated[
        Path | None, Option(metavar="FOLDER", help="Write JSON, CSV, PNG, SVG, HTML and MLLOG files here.")
    ] = None
    overrides: SetFlag = ()


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class CommsOptions(Options):
    """What does moving bytes between chips take, by which algorithm, over which links?"""

    cluster: ClusterFlag = None
    op: Annotated[
        str | None,
        Option(metavar="OP", help="all_reduce (the default), all_gather, all_to_all, barrier, ..."),
    ] = None
    size: Annotated[
        str | None, Option(metavar="SIZE", help="Bytes of the collective, with a unit: 64MiB.")
    ] = None
    chips: ChipsFlag = None
    algorithm: Annotated[
        str | None, Option(metavar="NAME|FILE", help="auto, a name, synthesized, or a file with a schedule.")
    ] = None
    fidelity: Annotated[
        Literal["closed", "folded", "full"] | None,
        Option(help="How closely it is timed; full moves every message."),
    ] = None
    sweep: Annotated[
        str | None, Option(metavar="LOW..HIGH", help="Sizes from LOW to HIGH, doubling: 1KiB..1GiB.")
    ] = None
    tiers: Annotated[
        bool, Option("--tiers", help="Latency and rate of every tier, from core to core outwards.")
    ] = False
    plot: PlotFlag = None


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class CalibrateOptions(Options):
    """Which latency and bandwidth do measurements show, and how well do they fit?"""

    subject: Annotated[Subject, Argument(metavar="links", help="What the tables are measurements of.")]
    tables: Annotated[
        tuple[Path, ...], Argument(metavar="TABLE", help="nccl-tests output or CSV, one run each.")
    ]
    cluster: Annotated[
        Path | None, Option(metavar="FILE|NAME", help="Cluster that the tables were measured on.")
    ] = None
    op: Annotated[
        str | None, Option(metavar="OP", help="Operation of tables that do not say it: all_reduce, ...")
    ] = None
    chips: Annotated[int | None, Option(min=2, help="Number of chips of tables that do not say it.")] = None
    plot: PlotFlag = None


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class JobsOptions(Options):
    """Run commands on a Ray cluster as its jobs, or write them as manifests of KubeRay or Slurm."""

    action: Annotated[
        Literal["submit", "list", "status", "logs", "stop", "emit"],
        Argument(metavar="ACTION", help="submit, list, status, logs, stop or emit."),
    ]
    words: Annotated[
        tuple[str, ...],
        Argument(
            metavar="[JOB | kuberay | slurm] [-- COMMAND ...]",
            help="A job's name; what to emit; and after two dashes the command, as in -- train --cluster FILE.",
        ),
    ] = ()
    address: Annotated[
        str | None,
        Option(
            metavar="ADDRESS",
            help="The cluster's dashboard, http://HOST:8265, or its Ray; default: RAY_ADDRESS.",
        ),
    ] = None
    working_dir: Annotated[
        Path | None, Option(metavar="FOLDER", help="Folder that goes with the job; default: this one.")
    ] = None
    follow: Annotated[bool, Option("--follow", help="Show what the job prints until it is over.")] = False
    overrides: Annotated[
        tuple[str, ...],
        Option("--set", metavar="A=B", help="Override a setting of a manifest, as in image=NAME."),
    ] = ()  # in the order given


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class CheckpointOptions(Options):
    """Which checkpoints has a run, are they whole, and how do other programs read them?"""

    action: Annotated[CheckpointAction, Argument(metavar="ls|verify|convert", help="What to do.")]
    source: Annotated[
        Path, Argument(metavar="RUN_DIR|CHECKPOINT", help="Or, to convert, safetensors or a DCP folder.")
    ]
    target: Annotated[
        Path | None, Argument(metavar="TARGET", help="Where convert writes; must not exist.")
    ] = None
    to: Annotated[
        CheckpointTarget | None,
        Option("--to", help="What convert writes: a model for others, or a checkpoint."),
    ] = None


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class DoctorOptions(Options):
    """Is this machine ready? Versions, cores, memory, chips, Ray."""


# By verb; its `main(options, console)` is in the module of `verbs` that is named after it.
VERBS: dict[str, type[Options]] = {
    "check": CheckOptions,
    "plan": PlanOptions,
    "simulate": SimulateOptions,
    "train": TrainOptions,
    "verify": VerifyOptions,
    "scale": ScaleOptions,
    "comms": CommsOptions,
    "calibrate": CalibrateOptions,
    "jobs": JobsOptions,
    "checkpoint": CheckpointOptions,
    "doctor": DoctorOptions,
}
