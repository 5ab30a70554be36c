"""Occupancy: where does every nanosecond of a chip go, and which spans does an arrow join?

All of it is interval arithmetic on sorted columns: no loop over spans. The measure of a union of intervals
[s, e) sorted by s is sum(max(0, e - max(s, largest e before))).

Assumes that a recv span starts when bytes start to move (see timeline.py); a recv that counts its waiting as
communication would turn the bubble into exposed communication.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from orchestrator.runs.timeline import COMMUNICATION, LANES, NONE, Ints, Lane, Rows, Timeline, group_ids


@dataclass(frozen=True, slots=True)
class Breakdown:
    """Chip-nanoseconds of a timeline, each counted once: the parts sum to duration x chips.

    An instant belongs to the first of compute, optimizer, host (with copy), then the communication lanes in
    the order of `COMMUNICATION`, that is busy; what no lane claims is the bubble.
    """

    duration_ns: int
    num_chips: int
    compute_ns: int
    optimizer_ns: int
    host_ns: int
    exposed_ns: tuple[tuple[Lane, int], ...]
    bubble_ns: int

    @property
    def total_ns(self) -> int:
        """Duration x chips."""
        return self.duration_ns * self.num_chips

    @property
    def exposed_communication_ns(self) -> int:
        """Chip-nanoseconds in which a chip communicates and does nothing else."""
        return sum(ns for _, ns in self.exposed_ns)


def breakdown(timeline: Timeline) -> Breakdown:
    """Where the time of all chips that have a span goes, between the first start and the last end."""
    rows = timeline.span_rows
    num_chips = len(np.unique(rows["chip"]))
    claims = [
        (Lane.COMPUTE,),
        (Lane.OPTIMIZER,),
        (Lane.HOST, Lane.COPY),
        *((lane,) for lane in COMMUNICATION),
    ]
    lanes: list[Lane] = []
    covered, parts = 0, []
    for claim in claims:
        lanes.extend(claim)
        union = union_ns(rows, lanes)
        parts.append(union - covered)
        covered = union
    compute, optimizer, host, *exposed = parts
    bubble = timeline.duration_ns * num_chips - covered
    by_lane = tuple((lane, ns) for lane, ns in zip(COMMUNICATION, exposed, strict=True))
    return Breakdown(timeline.duration_ns, num_chips, compute, optimizer, host, by_lane, bubble)


def union_ns(rows: Rows, lanes: Sequence[Lane]) -> int:
    """Nanoseconds, summed over chips, in which at least one of these lanes of the chip is busy."""
    rows = rows[np.isin(rows["lane"], [LANES.index(lane) for lane in lanes])]
    if not len(rows):
        return 0
    rows = rows[np.lexsort((rows["start_ns"], rows["chip"]))]
    start, end, first = rows["start_ns"], rows["end_ns"], np.ones(len(rows), dtype=bool)
    first[1:] = rows["chip"][1:] != rows["chip"][:-1]
    # One running maximum serves all chips: each chip is moved beyond the end of the one before.
    stride = int(end.max() - start.min()) + 1
    moved = (np.cumsum(first) - 1) * stride - int(start.min())
    reach = np.maximum.accumulate(end + moved)
    before = np.concatenate([[np.iinfo(np.int64).min], reach[:-1]])
    return int(np.maximum(0, end + moved - np.maximum(start + moved, before)).sum())


def flow_ends(timeline: Timeline) -> tuple[Ints, Ints]:
    """For each flow the row of its send span and the row of its recv span.

    NONE where there is no such span.
    """
    spans, flows = timeline.span_rows, timeline.flow_rows
    ids = group_ids(
        np.concatenate([spans["step"], flows["step"], flows["step"]]),
        np.concatenate([spans["microbatch"], flows["microbatch"], flows["microbatch"]]),
        np.concatenate([spans["chip"], flows["source_chip"], flows["target_chip"]]),
        np.concatenate([spans["instr"], flows["source_instr"], flows["target_instr"]]),
    )
    row_of = np.full(len(ids), NONE, dtype=np.int64)
    row_of[ids[: len(spans)][::-1]] = np.arange(len(spans))[::-1]  # the earliest span of an instruction wins
    sources, targets = np.split(row_of[ids[len(spans) :]], 2)
    return sources, targets
