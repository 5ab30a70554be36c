"""Metrics: the file that the numbers of every step go to; which these are says `verbs.training.training_loop`.

`metrics.jsonl` gets one JSON object per line, flushed at once; a line that a crash cut short is dropped when
the file is opened again. JSON has no NaN: NaN and infinities are written as the strings "NaN", "Infinity" and
"-Infinity".
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeAlias

from comms.errors import RunError
from orchestrator.runs.disk import explained, write_whole

Value: TypeAlias = float | int | str | bool | None
Record: TypeAlias = Mapping[str, Value]
_NOT_FINITE = ("NaN", "Infinity", "-Infinity")


def eta_s(step_ends_s: Sequence[float], steps_left: int) -> float:
    """Steps left x mean time from one step's end to the next, with all that lies between them.

    The first of `step_ends_s` is the start; a slow first step counts only while there is no other.
    """
    first = min(1, len(step_ends_s) - 2)
    return steps_left * (step_ends_s[-1] - step_ends_s[first]) / (len(step_ends_s) - 1 - first)


@contextmanager
def metrics_writer(path: Path) -> Iterator[Callable[[Record], None]]:
    """What appends a record to a JSONL file: its line is there when it returns. RunError where the disk refuses."""
    with explained(path):
        _drop_torn_line(path)
        file = path.open("a", encoding="utf-8")

    def write(record: Record) -> None:
        with explained(path):
            file.write(_line(record))
            file.flush()

    try:
        yield write
    finally:
        with explained(path):
            file.close()


def read_metrics(path: Path) -> tuple[dict[str, Value], ...]:
    """Every whole line of the file; none if it does not exist.

    Raises RunError for a line that is no object, and where there is no file to read.
    """
    if not path.exists():
        return ()
    try:
        data = path.read_bytes()
    except OSError as error:
        hint = "restore the file, or remove what is in its place"
        raise RunError(f"cannot be read: {error.strerror}", str(path), hint) from error
    whole = data.split(b"\n")[:-1]  # what follows the last newline is empty or torn
    return tuple(_record(line, f"{path}:{number}") for number, line in enumerate(whole, start=1))


def rewind_metrics(path: Path, step: int) -> list[int]:
    """Drop the records of steps after `step`, which a resumed run will write again; which steps up to it have none."""
    kept = [record for record in read_metrics(path) if not _is_after(record, step)]
    if path.exists():
        write_whole(path, "".join(map(_line, kept)).encode())
    found = {record.get("step") for record in kept}
    return [each for each in range(1, step + 1) if each not in found]


def _is_after(record: Record, step: int) -> bool:
    at = record.get("step")
    return isinstance(at, int) and at > step


def _line(record: Record) -> str:
    return json.dumps({name: _finite(value) for name, value in record.items()}, allow_nan=False) + "\n"


def _finite(value: Value) -> Value:
    is_odd = isinstance(value, float) and not math.isfinite(value)
    return json.dumps(value) if is_odd else value  # by the names that Python gives them


def _record(line: bytes, where: str) -> dict[str, Value]:
    try:
        record = dict(json.loads(line))
    except (ValueError, TypeError) as error:
        raise RunError(
            problem=f"not a JSON object: {error}", where=where, hint="remove the line or restore the file"
        ) from error
    return {name: float(value) if value in _NOT_FINITE else value for name, value in record.items()}


def _drop_torn_line(path: Path) -> None:
    """A crash may leave half a line at the end; appending to it would spoil two records."""
    if not path.exists():
        return
    with path.open("rb+") as file:
        file.truncate(file.read().rfind(b"\n") + 1)
