"""Occupancy: is a timeline sound, how busy is each lane, and where does every nanosecond of a chip go?

All of it is interval arithmetic on sorted columns: no loop over spans. The measure of a union of intervals
[s, e) sorted by s is sum(max(0, e - max(s, largest e before))).

Assumes that a recv span starts when bytes start to move (see timeline.py); a recv that counts its waiting as
communication would turn the bubble into exposed communication.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from orchestrator.timeline import COMMUNICATION, LANES, NONE, Ints, Lane, Rows, Timeline, group_ids


@dataclass(frozen=True, slots=True)
class LaneBusy:
    """How much one lane of one chip did; `share` is of the whole timeline's duration."""

    chip: int
    lane: Lane
    num_spans: int
    busy_ns: int
    share: float


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


def violations(timeline: Timeline, limit: int = 20) -> tuple[str, ...]:
    """What is impossible in this timeline, one sentence each, at most `limit`; none in a sound one.

    Checked: no span ends before it starts, no two spans of one lane of one chip overlap, both ends of a flow
    exist, and no recv ends before its send starts.
    """
    found = [*_backwards(timeline, limit), *_overlaps(timeline, limit), *_broken_flows(timeline, limit)]
    return tuple(found[:limit])


def lane_busy(timeline: Timeline) -> tuple[LaneBusy, ...]:
    """One row per (chip, lane) that has a span, ascending."""
    rows = timeline.span_rows
    if not len(rows):
        return ()
    ids = group_ids(rows["chip"], rows["lane"])
    _, first, counts = np.unique(ids, return_index=True, return_counts=True)
    busy = np.zeros(len(first), dtype=np.int64)
    np.add.at(busy, ids, rows["end_ns"] - rows["start_ns"])
    duration = max(timeline.duration_ns, 1)
    return tuple(
        LaneBusy(int(rows["chip"][row]), LANES[rows["lane"][row]], int(count), int(ns), int(ns) / duration)
        for row, count, ns in zip(first, counts, busy, strict=True)
    )


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


def _backwards(timeline: Timeline, limit: int) -> list[str]:
    rows = timeline.span_rows
    wrong = np.flatnonzero(rows["end_ns"] < rows["start_ns"])[:limit]
    return [f"{_told(timeline, row)} ends before it starts" for row in wrong]


def _overlaps(timeline: Timeline, limit: int) -> list[str]:
    """Sorted by start, two spans of a lane overlap only if two neighbours do (empty spans left out)."""
    rows = timeline.span_rows
    order = np.lexsort((rows["end_ns"], rows["start_ns"], rows["lane"], rows["chip"]))
    order = order[(rows["end_ns"] > rows["start_ns"])[order]]
    before, after = order[:-1], order[1:]
    same = (rows["chip"][before] == rows["chip"][after]) & (rows["lane"][before] == rows["lane"][after])
    wrong = np.flatnonzero(same & (rows["start_ns"][after] < rows["end_ns"][before]))[:limit]
    return [f"{_told(timeline, before[at])} overlaps {_told(timeline, after[at])}" for at in wrong]


def _broken_flows(timeline: Timeline, limit: int) -> list[str]:
    rows, (sources, targets) = timeline.span_rows, flow_ends(timeline)
    dangling = np.flatnonzero((sources == NONE) | (targets == NONE))[:limit]
    both = np.flatnonzero((sources != NONE) & (targets != NONE))
    early = both[rows["end_ns"][targets[both]] < rows["start_ns"][sources[both]]][:limit]
    return [
        *(f"{timeline.flows[int(row)]} has no span at one end" for row in dangling),
        *(
            f"{_told(timeline, targets[row])} ends before its send {_told(timeline, sources[row])} starts"
            for row in early
        ),
    ]


def _told(timeline: Timeline, row: int) -> str:
    span = timeline.spans[int(row)]
    return (
        f"step {span.step} chip {span.chip} {span.lane} {span.name!r} (instr {span.instr}) "
        f"[{span.start_ns}, {span.end_ns}) ns"
    )
