"""Simulated: how long a step takes, on a clock that is moved over the machines of chips.

One loop for all fidelities. Every chip is driven by the same machine that drives chips with real tensors; runs of
instructions that need no other chip are timed as segments (`timed_segments`), and reused. What fidelities differ in
is when a communication ends: `Communications` says it.

Folded, as here: the chips of a role differ in their coordinates only, so the mesh is folded to one chip per stage
before it is driven; costs see the whole mesh. Collectives inside a role belong to its segments; sends, receives and
collectives across stages start when the last of their ends has posted and their lanes are free, and take what
`StepCosts` say. The time taken does not depend on the number of chips, and hardly on that of microbatches. Every chip
and every message: `every_chip`.

Integer nanoseconds, ties broken by chip, no clock and no randomness: same inputs, same result.

A stream's time is split by what holds it: compute (device), optimizer, host (launches slower than the
device), exposed communication by axis (waiting while bytes move or queue; pp is sends and receives), bubble
(waiting for a chip that has not come yet, and for the others at the end of the step). The parts sum to the
step time for every role.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from heapq import heappop, heappush
from typing import NamedTuple, Protocol

from comms.errors import ProgramError
from orchestrator.runners.runner import StepSpans
from orchestrator.runners.timing.step_costs import StepCosts
from orchestrator.runners.timing.timed_segments import (
    NOTHING,
    InFlight,
    Piece,
    Tally,
    TimedSegment,
    axis_name,
    time_segment,
)
from orchestrator.runs.timeline import Flow, Lane, Origin, Recorder, Timeline, lane_of
from partitioner.program.machine import Key, Machine, Post, Run
from partitioner.program.program import Collective, Instruction, Program, Recv, Role, Send

FIDELITY = "folded"
LEFT_OUT = (
    "contention between communications that share a link",
    "slow-down of compute by communication beside it",
    "stragglers, failures and jitter",
    "fusion of operations, and efficiency by operand size",
    "data loading, logging and checkpoints",
)
SMALL = 64  # chips up to which a timeline shows all of them, not only the representatives


class Ran(NamedTuple):
    """One execution of a timed segment: pieces of body `body` that start at `start_ns`."""

    start_ns: int
    microbatch: int
    body: str
    pieces: tuple[Piece, ...]


@dataclass(frozen=True, slots=True)
class TimedCommunication:
    """A transfer or a collective: all its chips had posted it at `ready_ns`, bytes moved from start to end."""

    key: Key
    posts: Mapping[int, Post]  # by what was timed: stages, or chips
    ready_ns: int
    start_ns: int
    end_ns: int


@dataclass(frozen=True)
class SimulatedStep:
    """One timed schedule. `tallies` say per stage where the step's time goes."""

    program: Program
    step_ns: int
    tallies: tuple[Tally, ...]
    ran: tuple[tuple[Ran, ...], ...] = field(repr=False)
    communications: tuple[TimedCommunication, ...] = field(repr=False)
    fidelity: str = FIDELITY
    left_out: tuple[str, ...] = LEFT_OUT
    stats: None = None  # there are no tensors
    of_chips: tuple[Tally, ...] = field(
        default=(), repr=False
    )  # of what was driven, chips or representatives
    every_chip: bool = False  # `ran` and `communications` are of chips, not of one representative per stage

    @cached_property
    def overall(self) -> Tally:
        """All stages together; its parts sum to the step time times the number of stages."""
        total = Tally()
        for tally in self.tallies:
            total.add(tally)
        return total

    def timeline(self, step: int = 0, *, all_chips: bool | None = None) -> Timeline:
        """Spans of the representatives, or of every chip (None: of every chip where there are few)."""
        every = self.program.num_chips <= SMALL if all_chips is None else all_chips
        return predicted_timeline(self.program, self.ran, self.communications, step, self._shown(every))

    def _shown(self, every: bool) -> tuple[tuple[int, ...], ...]:
        """For each that was timed, the chips that get its spans."""
        per_stage = self.program.num_chips // self.program.size("pp")
        if self.every_chip:
            shown = range(self.program.num_chips)
            return tuple((chip,) if every or chip % per_stage == 0 else () for chip in shown)
        firsts = range(0, self.program.num_chips, per_stage)
        return tuple(tuple(range(first, first + (per_stage if every else 1))) for first in firsts)


class Communications(Protocol):
    """When communications end."""

    def posted(self, key: Key, posts: Mapping[int, Post], at_ns: int) -> None:
        """The last of the chips of `key` has posted it at `at_ns`."""

    def next_end(self, until_ns: int | None) -> TimedCommunication | None:
        """The next that ends, unless that is after `until_ns`; None also where nothing is under way."""


def simulate_step(program: Program, costs: StepCosts, *, schedule: str = "step") -> SimulatedStep:
    """Time one execution of `schedule`, folded. Raises ProgramError if the chips wait for each other for ever."""
    folded = fold_mesh(program)
    chips = [
        DrivenChip(stage, Machine(folded, stage, schedule, _is_inside_role))
        for stage in range(folded.num_chips)
    ]
    loop = StepLoop(chips, costs, PricedCommunications(folded, costs))
    loop.run()
    return loop.result(program)


def fold_mesh(program: Program) -> Program:
    """The same Program on a mesh of one chip per stage, so that chip s is the representative of stage s."""
    return replace(program, axes=tuple((axis, size if axis == "pp" else 1) for axis, size in program.axes))


def _is_inside_role(instruction: Instruction) -> bool:
    kind = type(instruction)
    if kind is Collective:
        return "pp" not in instruction.group.axes  # type: ignore[union-attr]
    return kind is not Send and kind is not Recv


def lanes_of(key: Key, posts: Mapping[int, Post]) -> list[tuple[int, Lane]]:
    """The (chip, lane) that a communication holds while it is under way."""
    if key.kind == "p2p":
        return list(zip(key.chips, (Lane.SEND, Lane.RECV), strict=True))
    instruction = posts[key.chips[0]].instruction
    assert isinstance(instruction, Collective)
    lane = lane_of(instruction.group.axes)
    return [(chip, lane) for chip in key.chips]


class PricedCommunications:
    """Each takes what `StepCosts` say, from when all its chips have posted it and its lanes are free."""

    def __init__(self, program: Program, costs: StepCosts) -> None:
        self.roles, self.costs = program.roles, costs
        self.free_ns: dict[tuple[int, Lane], int] = {}
        self.ends: list[tuple[int, int, TimedCommunication]] = []
        self.number = 0  # of two that end together, the one posted first is first

    def posted(self, key: Key, posts: Mapping[int, Post], at_ns: int) -> None:
        """See `Communications`."""
        lanes = lanes_of(key, posts)
        start = max(at_ns, *(self.free_ns.get(lane, 0) for lane in lanes))
        end = start + self._duration_ns(key, posts)
        self.free_ns.update(dict.fromkeys(lanes, end))
        self.number += 1
        heappush(self.ends, (end, self.number, TimedCommunication(key, posts, at_ns, start, end)))

    def next_end(self, until_ns: int | None) -> TimedCommunication | None:
        """See `Communications`."""
        if not self.ends or (until_ns is not None and self.ends[0][0] > until_ns):
            return None
        return heappop(self.ends)[2]

    def _duration_ns(self, key: Key, posts: Mapping[int, Post]) -> int:
        first = key.chips[0]
        instruction, role = posts[first].instruction, self.roles[first]
        if isinstance(instruction, Collective):
            return self.costs.collective_ns(role, instruction)
        assert isinstance(instruction, Send)
        return self.costs.transfer_ns(role, instruction)


@dataclass(slots=True)
class DrivenChip:
    """A chip that is driven: its machine, since when it waits, what its work left in flight, its account.

    `factor` multiplies the time of its work, which is priced by `costs` where the chip has its own. `in_flight` is seen
    from `as_of`, a time and a microbatch.
    """

    number: int
    machine: Machine
    factor: float = 1.0
    costs: StepCosts | None = None
    blocked_since: int | None = None
    end_ns: int = 0
    in_flight: InFlight = NOTHING
    as_of: tuple[int, int] = (0, 0)
    tally: Tally = field(default_factory=Tally)
    ran: list[Ran] = field(default_factory=list)

    @property
    def all_end_ns(self) -> int:
        """When its stream and what that left in flight have ended."""
        return max(self.end_ns, self.as_of[0] + self.in_flight.end_ns)

    def end_wait(self, since: int, until: int, waited_for: TimedCommunication) -> None:
        """First it waited for the last chip of the communication to come (bubble), then for the bytes."""
        came = min(until, max(since, waited_for.ready_ns))
        self.tally.bubble_ns += came - since
        instruction = waited_for.posts[self.number].instruction
        axis = axis_name(instruction.group) if isinstance(instruction, Collective) else "pp"
        self.tally.expose(axis, until - came)
        self.blocked_since = None


class StepLoop:
    """Chips that go on at their times and communications that end at theirs, until nothing is left to happen."""

    def __init__(self, chips: Sequence[DrivenChip], costs: StepCosts, communications: Communications) -> None:
        self.chips, self.costs, self.communications = chips, costs, communications
        self.wakes: list[tuple[int, int]] = []
        self.posts: dict[Key, dict[int, Post]] = {}
        self.ended: list[TimedCommunication] = []
        self.timed: dict[tuple[int, str, int, int, InFlight, float, int], TimedSegment] = {}

    def run(self) -> None:
        """Drive all chips to their ends. Raises ProgramError where they wait for each other for ever."""
        for chip in self.chips:
            self._advance(chip, 0, None)
        wakes, next_end = self.wakes, self.communications.next_end
        while True:
            # At one instant, what has arrived is known before streams go on.
            ended = next_end(wakes[0][0] if wakes else None)
            if ended is not None:
                self._end(ended)
            elif wakes:
                at, number = heappop(wakes)
                self._advance(self.chips[number], at, None)
            else:
                break
        self._require_finished()

    def _end(self, communication: TimedCommunication) -> None:
        self.ended.append(communication)
        key = communication.key
        for number in key.chips:
            self.chips[number].machine.arrive(key)
        for number in key.chips:
            if self.chips[number].blocked_since is not None:
                self._advance(self.chips[number], communication.end_ns, communication)

    def _advance(self, chip: DrivenChip, at: int, woken_by: TimedCommunication | None) -> None:
        """Issue everything that can be issued at `at`, until work holds the stream or it waits."""
        machine = chip.machine
        while (item := machine.ready()) is not None:
            if chip.blocked_since is not None:
                assert woken_by is not None
                chip.end_wait(chip.blocked_since, at, woken_by)
            machine.complete(item)
            if isinstance(item, Post):
                self._post(chip, at, item)
            elif held_ns := self._work(chip, at, item):
                heappush(self.wakes, (at + held_ns, chip.number))
                return
        if machine.call == len(machine.calls):
            chip.end_ns = at
        elif chip.blocked_since is None:
            chip.blocked_since = at

    def _post(self, chip: DrivenChip, at: int, post: Post) -> None:
        posts = self.posts.setdefault(post.key, {})
        posts[chip.number] = post
        if len(posts) == len(post.key.chips):
            self.communications.posted(post.key, self.posts.pop(post.key), at)

    def _work(self, chip: DrivenChip, at: int, run: Run) -> int:
        """Time a run of instructions or recall it; returns how long the stream is held."""
        role, before = chip.machine.role, chip.in_flight
        if before is not NOTHING:
            elapsed, shift = at - chip.as_of[0], run.microbatch - chip.as_of[1]
            before = before.later(elapsed, shift, role)
        costs = chip.costs or self.costs
        key = (role.stage, run.body.name, run.start, run.stop, before, chip.factor, id(costs))
        segment = self.timed.get(key)
        if segment is None:
            segment = time_segment(run.instructions, run.start, before, role, costs).slowed(chip.factor)
            self.timed[key] = segment
        chip.in_flight, chip.as_of = segment.after, (at + segment.duration_ns, run.microbatch)
        chip.tally.add(segment.tally)
        if segment.pieces:
            chip.ran.append(Ran(at, run.microbatch, run.body.name, segment.pieces))
        return segment.duration_ns

    def _require_finished(self) -> None:
        stuck = [chip.machine for chip in self.chips if not chip.machine.done]
        if stuck:
            others = f" (and {len(stuck) - 1} more)" if len(stuck) > 1 else ""
            raise ProgramError(
                f"the chips wait for each other for ever{others}",
                where=stuck[0].position(),
                hint="every send needs a receive, and every member of a group must reach its collectives",
            )

    def result(self, program: Program) -> SimulatedStep:
        """What was timed of `program`: per stage, the mean over the chips that were driven."""
        step_ns = max(*(chip.all_end_ns for chip in self.chips), *(each.end_ns for each in self.ended), 0)
        num_stages = program.size("pp")
        per_stage = len(self.chips) // num_stages
        tallies = [Tally() for _ in range(num_stages)]
        for chip in self.chips:
            chip.tally.bubble_ns += step_ns - chip.tally.total_ns
            tallies[chip.machine.role.stage].add(chip.tally)
        return SimulatedStep(
            program=program,
            step_ns=step_ns,
            tallies=tuple(tally.times(1 / per_stage) for tally in tallies),
            ran=tuple(tuple(chip.ran) for chip in self.chips),
            communications=tuple(self.ended),
            of_chips=tuple(chip.tally for chip in self.chips),
        )


def predicted_timeline(
    program: Program,
    ran: Sequence[Sequence[Ran]],
    communications: Sequence[TimedCommunication],
    step: int,
    shown: Sequence[tuple[int, ...]],
) -> Timeline:
    """Every span and arrow of the step; `shown` are the chips that get the spans of each that was timed."""
    roles = [program.roles[program.size("pp") * number // len(shown)] for number in range(len(shown))]
    names = {
        chip: f"chip {chip} (stage {role.stage})"
        for role, chips in zip(roles, shown, strict=True)
        for chip in chips
    }
    spans = StepSpans(Recorder(Origin.PREDICTED, names), program, step)
    for role, chips, rows in zip(roles, shown, ran, strict=True):
        for row in rows:
            _add_segment(spans, chips, role, row)
    for each in communications:
        for number, post in each.posts.items():
            said = spans.label(roles[number], "", post.instruction)
            spans.add(shown[number], said, post.instruction.id, post.microbatch, each.start_ns, each.end_ns)
        if each.key.kind == "p2p":
            _add_flow(spans, each, shown)
    return spans.recorder.timeline()


def _add_segment(spans: StepSpans, chips: tuple[int, ...], role: Role, row: Ran) -> None:
    """The pieces of one execution of a timed segment."""
    instructions = role.body[row.body].instructions
    for piece in row.pieces:
        instruction = instructions[piece.at]
        said = spans.label(role, row.body, instruction)
        if piece.lane is Lane.HOST:
            said = said._replace(lane=Lane.HOST, kind="host", nbytes=0, flops=0)
        start, end = row.start_ns + piece.start_ns, row.start_ns + piece.end_ns
        spans.add(chips, said, instruction.id, row.microbatch, start, end)


def _add_flow(spans: StepSpans, transfer: TimedCommunication, shown: Sequence[tuple[int, ...]]) -> None:
    """The arrows of a transfer, between chips of equal coordinates."""
    source, target = transfer.key.chips
    send, recv = transfer.posts[source], transfer.posts[target]
    for ends in zip(shown[source], shown[target], strict=True):
        at = (ends[0], send.instruction.id, ends[1], recv.instruction.id)
        spans.recorder.flow(Flow(spans.step, send.microbatch, *at))
