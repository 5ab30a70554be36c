"""Timed segments: the time of a run of instructions that needs no other role.

Instructions issue in order on one stream. Compute, accumulation and the optimizer hold the stream; a
collective inside the role takes its axis' lane and finishes later; `Wait` holds the stream until what it
names has finished. The outcome depends on when the segment starts only through what is still in flight then,
so a segment timed once serves every later run of the same instructions that finds the same things in flight
at the same distance.

Assumes that all chips of a role reach a collective together. Not modelled: contention between lanes, and the
slow-down of compute by communication beside it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from orchestrator.runners.timing.step_costs import StepCosts, Working, WorkTime
from orchestrator.runs.timeline import Lane, lane_of
from partitioner.program.program import (
    Collective,
    Free,
    Group,
    Instruction,
    Recv,
    Role,
    Send,
    Update,
    Wait,
)


class PendingTensor(NamedTuple):
    """A tensor instance that a collective is still writing.

    `shift` counts microbatches from the segment's own; it is 0 for tensors that live longer than one.
    """

    tensor: int
    shift: int
    end_ns: int
    axis: str


class InFlight(NamedTuple):
    """What outlives a segment: lanes taken until `end_ns`, and pending tensors; the times are distances."""

    lanes: tuple[tuple[Lane, int], ...] = ()
    pending: tuple[PendingTensor, ...] = ()

    @property
    def end_ns(self) -> int:
        return max((end for _, end in self.lanes), default=0)

    def later(self, elapsed_ns: int, shift: int, role: Role) -> "InFlight":
        """The same, seen `elapsed_ns` and `shift` microbatches further on; what has finished is gone."""
        if not self.lanes:
            return self
        lanes = tuple((lane, end - elapsed_ns) for lane, end in self.lanes if end > elapsed_ns)
        pending = tuple(
            PendingTensor(
                tensor, at - shift if role.tensors[tensor].is_per_microbatch else 0, end - elapsed_ns, axis
            )
            for tensor, at, end, axis in self.pending
            if end > elapsed_ns
        )
        return InFlight(lanes, pending)


NOTHING = InFlight()


class Piece(NamedTuple):
    """One span of a segment: instruction number `at` of the body, on this lane, from the segment's start."""

    lane: Lane
    at: int
    start_ns: int
    end_ns: int


@dataclass(slots=True)
class Tally:
    """What a stream spent its time on; the parts sum to its time."""

    compute_ns: int = 0
    optimizer_ns: int = 0
    host_ns: int = 0
    bubble_ns: int = 0
    exposed_ns: dict[str, int] = field(default_factory=dict)

    @property
    def total_ns(self) -> int:
        working_ns = self.compute_ns + self.optimizer_ns + self.host_ns
        return working_ns + self.bubble_ns + sum(self.exposed_ns.values())

    def expose(self, axis: str, duration_ns: int) -> None:
        """The stream waited for communication along `axis`."""
        self.exposed_ns[axis] = self.exposed_ns.get(axis, 0) + duration_ns

    def add(self, other: "Tally") -> None:
        """Add the parts of another stream's tally, or of another time."""
        self.compute_ns += other.compute_ns
        self.optimizer_ns += other.optimizer_ns
        self.host_ns += other.host_ns
        self.bubble_ns += other.bubble_ns
        for axis, duration in other.exposed_ns.items():
            self.expose(axis, duration)

    def times(self, factor: float) -> "Tally":
        """Every part multiplied."""
        return Tally(
            round(self.compute_ns * factor),
            round(self.optimizer_ns * factor),
            round(self.host_ns * factor),
            round(self.bubble_ns * factor),
            {axis: round(duration * factor) for axis, duration in self.exposed_ns.items()},
        )


@dataclass(frozen=True, slots=True)
class TimedSegment:
    """A timed run: how long the stream was held, by what, and what is in flight at its end."""

    duration_ns: int
    pieces: tuple[Piece, ...]
    tally: Tally
    after: InFlight

    def slowed(self, factor: float) -> "TimedSegment":
        """The same on a chip that takes `factor` times as long. Nothing may be in flight after it."""
        if factor == 1.0:
            return self
        assert self.after is NOTHING, "a collective was timed with the work"
        pieces = tuple(
            piece._replace(start_ns=round(piece.start_ns * factor), end_ns=round(piece.end_ns * factor))
            for piece in self.pieces
        )
        return TimedSegment(round(self.duration_ns * factor), pieces, self.tally.times(factor), NOTHING)


def axis_name(group: Group) -> str:
    """The name under which exposed communication of a group is counted: its axis, or `all` for several."""
    return group.axes[0] if len(group.axes) == 1 else "all"


def time_segment(
    instructions: Sequence[Instruction], first_index: int, before: InFlight, role: Role, costs: StepCosts
) -> TimedSegment:
    """Time `instructions`, the first of which is number `first_index` of its body."""
    stream = _Stream(before)
    for index, instruction in enumerate(instructions, start=first_index):
        match instruction:
            case Collective():
                stream.start(index, instruction, costs.collective_ns(role, instruction))
            case Wait():
                stream.wait(instruction.tensors)
            case Free() | Send() | Recv():
                pass  # a Free takes no time; the others are not between chips of one role
            case _:
                stream.work(index, instruction, costs.work(role, instruction))
    return stream.finished()


class _Stream:
    """The state of one segment while it is timed; the clock starts at 0."""

    def __init__(self, before: InFlight) -> None:
        self.now = 0
        self.lanes: dict[Lane, int] = dict(before.lanes)
        self.pending: dict[tuple[int, int], PendingTensor] = {(p.tensor, p.shift): p for p in before.pending}
        self.pieces: list[Piece] = []
        self.tally = Tally()

    def work(self, index: int, instruction: Working, work: WorkTime) -> None:
        """The device lane first; where the host is slower, the rest of its lane holds the stream as well."""
        is_optimizer = isinstance(instruction, Update)
        lane = Lane.OPTIMIZER if is_optimizer else Lane.COMPUTE
        self.pieces.append(Piece(lane, index, self.now, self.now + work.device_ns))
        if work.host_ns:
            self.pieces.append(Piece(Lane.HOST, index, self.now, self.now + work.host_ns))
        if is_optimizer:
            self.tally.optimizer_ns += work.device_ns
        else:
            self.tally.compute_ns += work.device_ns
        self.tally.host_ns += work.duration_ns - work.device_ns
        self.now += work.duration_ns

    def start(self, index: int, collective: Collective, duration_ns: int) -> None:
        """Collectives of one axis follow each other on its lane."""
        lane = lane_of(collective.group.axes)
        begin = max(self.now, self.lanes.get(lane, 0))
        self.lanes[lane] = end = begin + duration_ns
        self.pieces.append(Piece(lane, index, begin, end))
        for tensor in collective.writes:
            self.pending[tensor, 0] = PendingTensor(tensor, 0, end, axis_name(collective.group))

    def wait(self, tensors: Sequence[int]) -> None:
        """Each wanted tensor in order of its end: the time up to it is charged to its axis."""
        found = [self.pending.pop((tensor, 0)) for tensor in tensors if (tensor, 0) in self.pending]
        for pending in sorted(found, key=lambda p: (p.end_ns, p.tensor)):
            if pending.end_ns > self.now:
                self.tally.expose(pending.axis, pending.end_ns - self.now)
                self.now = pending.end_ns

    def finished(self) -> TimedSegment:
        lanes = tuple((lane, end - self.now) for lane, end in sorted(self.lanes.items()) if end > self.now)
        pending = tuple(
            p._replace(end_ns=p.end_ns - self.now)
            for p in sorted(self.pending.values())
            if p.end_ns > self.now
        )
        after = InFlight(lanes, pending) if lanes else NOTHING
        return TimedSegment(self.now, tuple(self.pieces), self.tally, after)
