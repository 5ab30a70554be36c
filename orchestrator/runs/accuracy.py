"""Accuracy: predicted against measured, instruction by instruction.

The two timelines name the same Program, so they join on (step, chip, instr) and, where the instruction runs
once per microbatch, on the microbatch. The time of an instruction is the sum of its spans (recompute, or copy
out, host, copy back); a launch that lasts longer than the work beside it counts instead of the work. Relative
error = (predicted - measured) / measured. Where in time a span lies does not enter: that is the business of step
time.

Seconds are compared where the chips that were described are those that executed. Simulated chips are executed by
another machine: there only shares of time mean something, and what does not depend on speed: the order of the
instructions of every chip's stream, the bytes and FLOPs of what ran, and the bytes that chips held.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum

import numpy as np

from orchestrator.runs.timeline import LANES, NONE, Ints, Lane, Rows, Timeline, group_ids

HOST = LANES.index(Lane.HOST)
STREAM = (LANES.index(Lane.COMPUTE), LANES.index(Lane.OPTIMIZER))


class Basis(StrEnum):
    """What of the two times is compared."""

    SECONDS = "seconds"
    SHARES = "shares"


@dataclass(frozen=True, slots=True)
class KindError:
    """One kind of work: total times of the matched instructions, and how wrong the typical one is."""

    kind: str
    num_matched: int
    predicted_ns: int
    measured_ns: int
    median_error: float  # median over instructions of |predicted - measured| / measured

    @property
    def error(self) -> float:
        """Signed relative error of the total: below 0 means predicted too fast."""
        return (self.predicted_ns - self.measured_ns) / max(self.measured_ns, 1)


@dataclass(frozen=True, slots=True)
class Pair:
    """One number, predicted and measured."""

    predicted: int
    measured: int


@dataclass(frozen=True, slots=True)
class Accuracy:
    """Errors by kind, sorted by kind, and what had no partner; then what does not depend on speed.

    Times, bytes and FLOPs are of all chips together, the last two in one step; `memory_bytes` are per stage, of the
    fullest chip, without what is inside an instruction.
    """

    kinds: tuple[KindError, ...]
    only_predicted: int
    only_measured: int
    basis: Basis
    num_steps: int
    num_chips: int
    chips_in_order: int
    nbytes: Pair
    flops: Pair
    memory_bytes: tuple[Pair, ...]

    def shares(self, kind: KindError) -> tuple[float, float]:
        """The part of all matched time that this kind takes: predicted, measured."""
        predicted, measured = (
            max(sum(getattr(each, name) for each in self.kinds), 1)
            for name in ("predicted_ns", "measured_ns")
        )
        return kind.predicted_ns / predicted, kind.measured_ns / measured

    def document(self) -> dict[str, object]:
        """As JSON values; errors in time only where seconds are compared."""
        in_seconds = self.basis is Basis.SECONDS
        kinds = {
            each.kind: {
                "instructions": each.num_matched // self.num_steps,
                "predicted_s": each.predicted_ns / self.num_steps / 1e9,
                "measured_s": each.measured_ns / self.num_steps / 1e9,
                "predicted_share": self.shares(each)[0],
                "measured_share": self.shares(each)[1],
                "error": each.error if in_seconds else None,
                "median_error": each.median_error if in_seconds else None,
            }
            for each in self.kinds
        }
        return {
            "basis": str(self.basis),
            "kinds": kinds,
            "steps": self.num_steps,
            "only_predicted": self.only_predicted,
            "only_measured": self.only_measured,
            "chips": self.num_chips,
            "chips_in_order": self.chips_in_order,
            "bytes": asdict(self.nbytes),
            "flops": asdict(self.flops),
            "memory_bytes": [asdict(pair) for pair in self.memory_bytes],
        }


@dataclass(frozen=True, slots=True)
class _Instructions:
    """Total time per distinct (step, chip, instr, microbatch)."""

    place: tuple[Ints, Ints, Ints]  # chip, instr, microbatch
    total_ns: Ints
    kind: Ints


def compare(
    predicted: Timeline, measured: Timeline, basis: Basis, memory_bytes: tuple[Pair, ...] = ()
) -> Accuracy:
    """One predicted step, of every chip, against every measured one.

    A matched instruction counts under its predicted kind. Spans of no instruction are left out.
    """
    (at,), steps = predicted.steps, measured.steps
    ours, theirs = (
        timeline.span_rows[timeline.span_rows["lane"] != HOST] for timeline in (predicted, measured)
    )
    nbytes, flops = (
        Pair(int(ours[name].sum()), int(theirs[name].sum()) // len(steps)) for name in ("nbytes", "flops")
    )
    want, got = _orders(ours), _orders(theirs)
    chips = {chip for _, chip in got}
    in_order = sum(all(want.get((at, chip)) == got.get((step, chip)) for step in steps) for chip in chips)
    kinds, only_predicted, only_measured = _joined(predicted, measured)
    return Accuracy(
        kinds, only_predicted, only_measured, basis=basis, num_steps=len(steps), num_chips=len(chips),
        chips_in_order=in_order, nbytes=nbytes, flops=flops, memory_bytes=memory_bytes,
    )  # fmt: skip


def _joined(predicted: Timeline, measured: Timeline) -> tuple[tuple[KindError, ...], int, int]:
    """Errors by kind, and how many predicted and measured instructions have no partner."""
    ours, theirs = _instructions(predicted), _instructions(measured)
    ids = group_ids(*(np.concatenate(pair) for pair in zip(ours.place, theirs.place, strict=True)))
    our_ids, their_ids = np.split(ids, [len(ours.kind)])
    partner = np.full(len(ids), NONE, dtype=np.int64)
    partner[our_ids] = np.arange(len(our_ids))
    matched = np.flatnonzero(partner[their_ids] != NONE)
    mates = partner[their_ids[matched]]
    kinds, want, got = ours.kind[mates], ours.total_ns[mates], theirs.total_ns[matched]
    rows = [
        _kind_error(predicted.texts[code], want[kinds == code], got[kinds == code])
        for code in np.unique(kinds)
    ]
    return tuple(rows), len(our_ids) - len(np.unique(mates)), len(their_ids) - len(matched)


def _kind_error(kind: str, predicted: Ints, measured: Ints) -> KindError:
    relative = np.abs(predicted - measured) / np.maximum(measured, 1)
    return KindError(
        kind, len(measured), int(predicted.sum()), int(measured.sum()), float(np.median(relative))
    )


def _instructions(timeline: Timeline) -> _Instructions:
    rows = timeline.span_rows[timeline.span_rows["instr"] != NONE]
    rows = rows[
        np.argsort(rows["lane"] == HOST, kind="stable")
    ]  # the kind is that of the work, if there is some
    ids = group_ids(rows["step"], rows["chip"], rows["instr"], rows["microbatch"])
    _, first = np.unique(ids, return_index=True)
    is_host, taken = rows["lane"] == HOST, rows["end_ns"] - rows["start_ns"]
    work, host = (np.zeros(len(first), dtype=np.int64) for _ in range(2))
    np.add.at(work, ids[~is_host], taken[~is_host])
    np.add.at(host, ids[is_host], taken[is_host])
    chip, instr, microbatch, kind = (
        rows[name][first].astype(np.int64) for name in ("chip", "instr", "microbatch", "kind")
    )
    return _Instructions((chip, instr, microbatch), np.maximum(work, host), kind)


def _orders(rows: Rows) -> Mapping[tuple[int, int], list[tuple[int, int]]]:
    """(instr, microbatch) in order of time on the stream of every (step, chip)."""
    rows = rows[np.isin(rows["lane"], STREAM)]
    rows = rows[np.lexsort((rows["instr"], rows["end_ns"], rows["start_ns"]))]
    found: dict[tuple[int, int], list[tuple[int, int]]] = {}
    columns = (rows[name].tolist() for name in ("step", "chip", "instr", "microbatch"))
    for step, chip, instr, microbatch in zip(*columns, strict=True):
        found.setdefault((step, chip), []).append((instr, microbatch))
    return found
