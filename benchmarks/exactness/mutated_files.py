"""Files of every kind that a user can hand over, mutated: read, or refused in three parts, in little time and memory.

Who reads a file here: `check`; what `plan` and `simulate` read before they make a Program; `comms --tiers`, and one
collective, on the clusters that are valid; schedules, measured tables and tables of parts as `comms` and `calibrate`
read them. Cases run in a process of their own, which is ended where one takes too long.

    cd benchmarks; python -m exactness.mutated_files [--cases 20000] [--first 0] [--only 17] [--write FOLDER]
"""

import argparse
import io
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path

from support.file_mutations import FileKind, Seed, mutated, seeds
from support.harness import report

from comms.calibration.measured_tables import read_table
from comms.collectives.schedule_text import load_schedule
from comms.errors import UserError
from orchestrator.verbs import comms as comms_verb
from orchestrator.verbs.check import check
from orchestrator.verbs.inputs.comms_inputs import read_parts
from orchestrator.verbs.inputs.options import CommsOptions, PlannedOptions
from orchestrator.verbs.inputs.planned_inputs import read_plan, resolve
from orchestrator.views.console import Console

MOST_CPU_S = 2.0
LAST_CPU_S, LAST_WALL_S = 20.0, 300  # before a case is ended
MOST_GROWTH = 200e6  # bytes
MOST_MEMORY = 2e9  # bytes above what the libraries take
LONGEST = 7000  # characters of a message
FEW_CHIPS = 64  # on which a collective is timed too, message by message


class Outcome(StrEnum):
    """How a case ended; all but the first two are bugs."""

    READ = "read"
    REFUSED = "refused"
    VAGUE = "refused without place or remedy"
    TRACEBACK = "traceback"
    SLOW = "over 2 s"
    GREW = "over 200 MB"
    HUNG = "hung"
    DIED = "died"


@dataclass(frozen=True, slots=True)
class Ended:
    """One case."""

    number: int
    outcome: str
    said: str
    cpu_s: float
    grown: int  # bytes


def read(kind: FileKind, path: Path) -> None:
    """What the product does with such a file. Raises UserError."""
    match kind:
        case FileKind.CHECKED:
            _read_checked(path)
        case FileKind.PLAN:
            read_plan(path)
        case FileKind.SCHEDULE:
            load_schedule(path)
        case FileKind.TABLE:
            read_table(_text(path), str(path))
        case FileKind.PARTS:
            read_parts(str(path), 2)


def _read_checked(path: Path) -> None:
    kind = check(path).kind
    if kind == "job":
        resolve(PlannedOptions(job=path))
    if kind == "cluster":
        inputs, console = resolve(PlannedOptions(cluster=path)), Console(out=io.StringIO(), err=io.StringIO())
        comms_verb.main(CommsOptions(cluster=path, tiers=True), console)
        if inputs.cluster.num_chips <= FEW_CHIPS:
            comms_verb.main(CommsOptions(cluster=path, algorithm="direct", fidelity="full"), console)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError("not UTF-8", str(path), "give text") from error


def tried(kind: FileKind, path: Path) -> tuple[Outcome, str]:
    """How reading a file ends, and with which words."""
    try:
        read(kind, path)
    except UserError as error:
        is_whole = all(
            each.problem and each.where and each.hint and len(each.text) < LONGEST for each in error.findings
        )
        return (Outcome.REFUSED if is_whole else Outcome.VAGUE), error.text.replace(str(path), "FILE")
    except BaseException as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        inner = [f for f in traceback.extract_tb(error.__traceback__) if "/site-packages/" not in f.filename][
            -1
        ]
        said = f"{type(error).__name__}: {str(error)[:100]} in {inner.filename}:{inner.lineno} ({place.name})"
        return Outcome.TRACEBACK, said
    return Outcome.READ, ""


def case(number: int, known: list[Seed], folder: Path) -> Ended:
    """Make the file of that number and read it, in this process."""
    seed, _, data = mutated(number, known)
    path = folder / "file.yaml"
    path.write_bytes(data)
    before, started = _most_memory(), time.process_time()
    outcome, said = tried(seed.kind, path)
    cpu_s, grown = time.process_time() - started, _most_memory() - before
    if outcome in (Outcome.READ, Outcome.REFUSED):
        outcome = Outcome.SLOW if cpu_s > MOST_CPU_S else Outcome.GREW if grown > MOST_GROWTH else outcome
    return Ended(number, outcome, said, cpu_s, grown)


def _most_memory() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def cases(numbers: range, known: list[Seed], folder: Path) -> Iterator[Ended]:
    """All of them, in processes that are replaced where one does not come back."""
    while numbers:
        done = 0
        for ended in _in_child(numbers, known, folder):
            done += 1
            yield ended
        numbers = numbers[done:]


def _in_child(numbers: range, known: list[Seed], folder: Path) -> Iterator[Ended]:
    """Those until one does not come back, that one last."""
    back, there = os.pipe()
    child = os.fork()
    if not child:
        os.close(back)
        _limit_memory()
        with suppress(BaseException), os.fdopen(there, "w") as lines:
            for number in numbers:
                signal.setitimer(signal.ITIMER_PROF, LAST_CPU_S)  # which ends the process
                signal.alarm(LAST_WALL_S)
                lines.write(json.dumps(asdict(case(number, known, folder))) + "\n")
                lines.flush()
        os._exit(0)
    os.close(there)
    with os.fdopen(back) as lines:
        came = 0
        for line in lines:
            came += 1
            yield Ended(**json.loads(line))
    _, status = os.waitpid(child, 0)
    if came < len(numbers):
        by_clock = os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGPROF, signal.SIGALRM)
        yield Ended(numbers[came], Outcome.HUNG if by_clock else Outcome.DIED, "", LAST_CPU_S, 0)


def _limit_memory() -> None:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    most = pages * resource.getpagesize() + int(MOST_MEMORY)
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


def main() -> None:
    """Run the cases, and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=20_000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--only", type=int, help="the number of one: its words, and its file")
    parser.add_argument("--write", type=Path, help="a folder for the files of what is wrong")
    options = parser.parse_args()
    known, folder = list(seeds()), Path(tempfile.mkdtemp())
    for number, seed in enumerate(known):
        path = folder / f"seed{number}.yaml"
        path.write_text(seed.text, encoding="utf-8")
        outcome, said = tried(seed.kind, path)
        assert outcome is Outcome.READ, f"{seed.name}: {said}"
    try:
        if options.only is not None:
            _show(options.only, known, folder)
        else:
            _run(range(options.first, options.first + options.cases), known, folder, options.write)
    finally:
        shutil.rmtree(folder)


def _show(number: int, known: list[Seed], folder: Path) -> None:
    seed, ways, data = mutated(number, known)
    print(
        data.decode(errors="replace")[:4000],
        f"\n-- {seed.kind} {seed.name}: {ways}\n{case(number, known, folder)}",
    )
    read(seed.kind, folder / "file.yaml")


def _run(numbers: range, known: list[Seed], folder: Path, kept: Path | None) -> None:
    taken: dict[str, Counter[str]] = {}
    slowest, grown = 0.0, 0
    for ended in cases(numbers, known, folder):
        seed, ways, data = mutated(ended.number, known)
        for row in (
            "all",
            f"file: {seed.kind}",
            *(f"way: {way}" for way in dict.fromkeys(ways.split(" + "))),
        ):
            taken.setdefault(row, Counter())[ended.outcome] += 1
        if not (ended.number + 1) % 1000:
            print(f"{ended.number + 1 - numbers.start} of {len(numbers)}", file=sys.stderr, flush=True)
        slowest, grown = max(slowest, ended.cpu_s), max(grown, ended.grown)
        if ended.outcome not in (Outcome.READ, Outcome.REFUSED):
            print(
                f"{ended.number} {ended.outcome} {seed.name}: {ways}, {ended.cpu_s:.1f} s: {ended.said}",
                flush=True,
            )
            if kept is not None:
                (kept / f"{ended.number}.yaml").write_bytes(data)
    rows: list[Mapping[str, object]] = [
        {"what": row, "files": sum(counts.values()), **{str(o): counts[o] for o in Outcome}}
        for row, counts in sorted(taken.items())
    ]
    report("mutated_files", [*rows, {"what": "most of one file", "CPU s": slowest, "grown MB": grown / 1e6}])


if __name__ == "__main__":
    main()
