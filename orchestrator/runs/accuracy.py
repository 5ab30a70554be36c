"""Accuracy: predicted against measured, instruction by instruction.

The two timelines name the same Program, so they join on (step, chip, instr) and, where the instruction runs
once per microbatch, on the microbatch. The time of an instruction is the sum of its spans (recompute, or copy
out, host, copy back). Relative error = (predicted - measured) / measured. Where in time a span lies does not
enter: that is the business of step time.
"""

from dataclasses import dataclass

import numpy as np

from orchestrator.runs.timeline import NONE, Ints, Timeline, group_ids


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
class Accuracy:
    """Errors by kind, sorted by kind, and what had no partner."""

    kinds: tuple[KindError, ...]
    only_predicted: int
    only_measured: int


@dataclass(frozen=True, slots=True)
class _Instructions:
    """Total time per distinct (step, chip, instr, microbatch)."""

    step: Ints
    chip: Ints
    instr: Ints
    microbatch: Ints
    total_ns: Ints
    kind: Ints


def join(predicted: Timeline, measured: Timeline, *, every_step: bool = False) -> Accuracy:
    """Compare two timelines of one Program; a matched instruction counts under its predicted kind.

    With `every_step` the one predicted step stands for every measured step. Spans of no instruction are left
    out.
    """
    if every_step and len(predicted.steps) > 1:
        raise ValueError(f"every_step needs a prediction of one step, not {len(predicted.steps)}")
    ours, theirs = _instructions(predicted), _instructions(measured)
    steps = (np.zeros_like(ours.step), np.zeros_like(theirs.step)) if every_step else (ours.step, theirs.step)
    ids = group_ids(
        np.concatenate(steps),
        np.concatenate([ours.chip, theirs.chip]),
        np.concatenate([ours.instr, theirs.instr]),
        np.concatenate([ours.microbatch, theirs.microbatch]),
    )
    our_ids, their_ids = np.split(ids, [len(ours.step)])
    partner = np.full(len(ids), NONE, dtype=np.int64)
    partner[our_ids] = np.arange(len(our_ids))
    matched = np.flatnonzero(partner[their_ids] != NONE)
    mates = partner[their_ids[matched]]
    kinds, want, got = ours.kind[mates], ours.total_ns[mates], theirs.total_ns[matched]
    rows = [
        _kind_error(predicted.texts[code], want[kinds == code], got[kinds == code])
        for code in np.unique(kinds)
    ]
    unused = len(our_ids) - len(np.unique(mates))
    return Accuracy(tuple(rows), only_predicted=unused, only_measured=len(their_ids) - len(matched))


def _kind_error(kind: str, predicted: Ints, measured: Ints) -> KindError:
    relative = np.abs(predicted - measured) / np.maximum(measured, 1)
    return KindError(
        kind, len(measured), int(predicted.sum()), int(measured.sum()), float(np.median(relative))
    )


def _instructions(timeline: Timeline) -> _Instructions:
    rows = timeline.span_rows[timeline.span_rows["instr"] != NONE]
    ids = group_ids(rows["step"], rows["chip"], rows["instr"], rows["microbatch"])
    _, first = np.unique(ids, return_index=True)
    total = np.zeros(len(first), dtype=np.int64)
    np.add.at(total, ids, rows["end_ns"] - rows["start_ns"])
    names = ("step", "chip", "instr", "microbatch")
    step, chip, instr, microbatch = (rows[name][first].astype(np.int64) for name in names)
    return _Instructions(step, chip, instr, microbatch, total, rows["kind"][first].astype(np.int64))
