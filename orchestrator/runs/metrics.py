"""Metrics: one formula for each number that is shown, and the file they go to.

Every function states its definition; nothing else in the code computes these numbers. Chips times seconds is
the common denominator: a figure per chip divides by all chips of the job, whatever each of them does.

`metrics.jsonl` gets one JSON object per line, flushed at once; a line that a crash cut short is dropped when
the file is opened again. JSON has no NaN: NaN and infinities are written as the strings "NaN", "Infinity" and
"-Infinity".
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from types import TracebackType
from typing import Self, TypeAlias

from orchestrator.errors import RunError
from orchestrator.runs.disk import explained, write_whole
from orchestrator.runs.occupancy import Breakdown

Value: TypeAlias = float | int | str | bool | None
Record: TypeAlias = Mapping[str, Value]
_NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def tokens_per_s(num_tokens: int, seconds: float) -> float:
    """Tokens of the global batch over the time of the step.

    Every token counts once, whatever the parallelism.
    """
    return num_tokens / seconds


def mfu(model_flops: float, peak_flops_per_s: float, seconds: float, num_chips: int) -> float:
    """Model FLOPs utilisation: model_flops / (peak per chip x seconds x chips).

    `model_flops` is what one step of the model needs, forward and backward, over the global batch, without
    recompute and without what tensor parallelism repeats (Chowdhery et al. 2022, PaLM, appendix B).
    """
    return model_flops / (peak_flops_per_s * seconds * num_chips)


def exposed_communication(parts: Breakdown) -> float:
    """Share of chip time in which a chip communicates and does nothing else (computes, optimizes, hosts)."""
    return _share(parts.exposed_communication_ns, parts)


def cost_usd_per_step(cluster_usd_per_hour: float, seconds: float) -> float:
    """Price of the whole cluster per hour x step time / 3600: idle chips are paid for as well."""
    return cluster_usd_per_hour * seconds / 3600


def energy_j_per_step(chip_watts: float, num_chips: int, seconds: float) -> float:
    """Rated power x chips x step time. An upper bound: a chip that waits draws less than its rated power."""
    return chip_watts * num_chips * seconds


def eta_s(recent_step_seconds: Sequence[float], steps_left: int) -> float | None:
    """Steps left x median of the recent step times; None before the first.

    The median forgives a slow first step.
    """
    return steps_left * median(recent_step_seconds) if recent_step_seconds else None


def _share(part_ns: int, parts: Breakdown) -> float:
    return part_ns / parts.total_ns if parts.total_ns else 0.0


class MetricsWriter:
    """Appends records to a JSONL file, one flushed line each; closes as a context manager."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with explained(path):
            _drop_torn_line(path)
            self._file = path.open("a", encoding="utf-8")

    def write(self, record: Record) -> None:
        """Append one line; it is in the file when this returns. Raises RunError where the disk refuses."""
        with explained(self._path):
            self._file.write(_line(record))
            self._file.flush()

    def close(self) -> None:
        """Close the file; a writer that is closed writes no more."""
        with explained(self._path):
            self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_metrics(path: Path) -> tuple[dict[str, Value], ...]:
    """Every whole line of the file; none if it does not exist.

    Raises RunError for a line that is no object.
    """
    if not path.exists():
        return ()
    whole = path.read_bytes().split(b"\n")[:-1]  # what follows the last newline is empty or torn
    return tuple(_record(line, f"{path}:{number}") for number, line in enumerate(whole, start=1))


def rewind_metrics(path: Path, step: int) -> None:
    """Drop the records of steps after `step`, which a resumed run will write again."""
    kept = [record for record in read_metrics(path) if not _is_after(record, step)]
    if path.exists():
        write_whole(path, "".join(map(_line, kept)).encode())


def _is_after(record: Record, step: int) -> bool:
    at = record.get("step")
    return isinstance(at, int) and at > step


def _line(record: Record) -> str:
    return json.dumps({name: _finite(value) for name, value in record.items()}, allow_nan=False) + "\n"


def _finite(value: Value) -> Value:
    if not isinstance(value, float) or math.isfinite(value):
        return value
    if math.isnan(value):
        return "NaN"
    return "Infinity" if value > 0 else "-Infinity"


def _record(line: bytes, where: str) -> dict[str, Value]:
    try:
        record = dict(json.loads(line))
    except (ValueError, TypeError) as error:
        raise RunError(
            problem=f"not a JSON object: {error}", where=where, hint="remove the line or restore the file"
        ) from error
    return {
        name: _NOT_FINITE.get(value, value) if isinstance(value, str) else value
        for name, value in record.items()
    }


def _drop_torn_line(path: Path) -> None:
    """A crash may leave half a line at the end; appending to it would spoil two records."""
    if not path.exists():
        return
    with path.open("rb+") as file:
        file.truncate(file.read().rfind(b"\n") + 1)
