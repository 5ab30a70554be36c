"""Simulated: how long a step takes, from one representative chip per role (fidelity "folded").

Every role's first chip is driven by the same machine that drives chips with real tensors. Work and
collectives inside a role are timed in stretches (`stretch.py`); sends, receives and collectives across stages
are meetings: they start when the last of their ends has posted and their lanes are free, in order of time.
Integer nanoseconds, ties broken by stage, no clock and no randomness: same inputs, same result.

The chips of a role differ in their coordinates only, so the mesh is folded to one chip per stage before it is
driven; costs see the whole mesh. The time taken does not depend on the number of chips, and hardly on that of
microbatches: a stretch is timed once per role and reused (`fold_bodies=False` times every one anew, as a
check).

A stream's time is split by what holds it: compute (device), optimizer, host (launches slower than the
device), exposed communication by axis (waiting while bytes move or queue; pp is sends and receives), bubble
(waiting for a chip that has not come yet, and for the others at the end of the step). The parts sum to the
step time for every role.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from heapq import heappop, heappush

from comms.errors import ProgramError
from orchestrator.config.hardware.cluster import Cluster
from orchestrator.runners.base import StepResult
from orchestrator.runners.timing.predicted import Meeting, Ran, predicted_timeline
from orchestrator.runners.timing.step_costs import ClusterCosts, Costs
from orchestrator.runners.timing.timed_segments import (
    NOTHING,
    InFlight,
    Stretch,
    Tally,
    axis_name,
    time_stretch,
)
from orchestrator.runs.timeline import Lane, Timeline
from partitioner.program.machine import Key, Machine, Post, Run
from partitioner.program.program import Collective, Instruction, Program, Recv, Send

FIDELITY = "folded"
LEFT_OUT = (
    "contention between communications that share a link",
    "slow-down of compute by communication beside it",
    "stragglers, failures and jitter",
    "fusion of operations, and efficiency by operand size",
    "data loading, logging and checkpoints",
)
SMALL = 64  # chips up to which a timeline shows all of them, not only the representatives
_ARRIVAL, _WAKE = 0, 1  # at one instant, what has arrived is known before streams go on


@dataclass(frozen=True)
class SimulatedStep:
    """One timed schedule. `tallies` say per stage where the step's time goes."""

    program: Program
    step_ns: int
    tallies: tuple[Tally, ...]
    ran: tuple[tuple[Ran, ...], ...] = field(repr=False)
    meetings: tuple[Meeting, ...] = field(repr=False)
    num_timed: int  # stretches that were timed, not reused
    fidelity: str = FIDELITY
    left_out: tuple[str, ...] = LEFT_OUT
    every_chip: bool = False  # `ran` and `meetings` are of chips, not of one representative per stage

    @property
    def busiest(self) -> int:
        """The stage with the most compute, optimizer and host time: the one that sets the pace."""
        return max(range(len(self.tallies)), key=lambda stage: (self._worked_ns(stage), -stage))

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
        return predicted_timeline(self.program, self.ran, self.meetings, step, self._shown(every))

    def _shown(self, every: bool) -> tuple[tuple[int, ...], ...]:
        """For each that was timed, the chips that get its spans."""
        per_stage = self.program.num_chips // self.program.size("pp")
        if self.every_chip:
            shown = range(self.program.num_chips)
            return tuple((chip,) if every or chip % per_stage == 0 else () for chip in shown)
        firsts = range(0, self.program.num_chips, per_stage)
        return tuple(tuple(range(first, first + (per_stage if every else 1))) for first in firsts)

    def _worked_ns(self, stage: int) -> int:
        tally = self.tallies[stage]
        return tally.compute_ns + tally.optimizer_ns + tally.host_ns


@dataclass(frozen=True)
class SimulatedRunner:
    """The runner that only tells the time: every step takes what the simulated one takes."""

    program: Program
    cluster: Cluster

    @cached_property
    def simulated(self) -> SimulatedStep:
        """The one step that all steps are like."""
        return simulate_step(self.program, ClusterCosts(self.program, self.cluster))

    def step(self, number: int) -> StepResult:
        """The predicted step; no tensors, so no loss."""
        timeline = self.simulated.timeline(number)
        return StepResult(number, self.simulated.step_ns, None, None, timeline)

    def close(self) -> None:
        """Nothing to give back."""


def simulate_step(
    program: Program, costs: Costs, *, schedule: str = "step", fold_bodies: bool = True
) -> SimulatedStep:
    """Time one execution of `schedule`. Raises ProgramError if the chips wait for each other for ever."""
    simulation = _Simulation(program, costs, schedule, fold_bodies)
    simulation.run()
    return simulation.result()


def fold_mesh(program: Program) -> Program:
    """The same Program on a mesh of one chip per stage, so that chip s is the representative of stage s."""
    return replace(program, axes=tuple((axis, size if axis == "pp" else 1) for axis, size in program.axes))


def _is_inside_role(instruction: Instruction) -> bool:
    kind = type(instruction)
    if kind is Collective:
        return "pp" not in instruction.group.axes  # type: ignore[union-attr]
    return kind is not Send and kind is not Recv


@dataclass
class Driven:
    """One chip that is driven: its machine, since when it waits, its account."""

    number: int
    machine: Machine
    blocked_since: int | None = None
    end_ns: int = 0
    tally: Tally = field(default_factory=Tally)
    ran: list[Ran] = field(default_factory=list)

    def advance(
        self, at: int, woken_by: Meeting | None, post: Callable[[Post], None], work: Callable[[Run], int]
    ) -> int:
        """Issue everything that can be issued at `at`; for how long work holds the stream then, 0 where it waits."""
        while (item := self.machine.ready()) is not None:
            if self.blocked_since is not None:
                assert woken_by is not None
                self._charge_wait(self.blocked_since, at, woken_by)
                self.blocked_since = None
            self.machine.complete(item)
            if isinstance(item, Post):
                post(item)
            elif held_ns := work(item):
                return held_ns
        if self.machine.call == len(self.machine.calls):
            self.end_ns = at
        elif self.blocked_since is None:
            self.blocked_since = at
        return 0

    def _charge_wait(self, since: int, until: int, meeting: Meeting) -> None:
        """First it waited for the last end of the meeting to come (bubble), then for the bytes."""
        came = min(until, max(since, meeting.ready_ns))
        self.tally.bubble_ns += came - since
        instruction = meeting.posts[self.number].instruction
        axis = axis_name(instruction.group) if isinstance(instruction, Collective) else "pp"
        self.tally.expose(axis, until - came)


class _Stage(Driven):
    """The representative of one stage, its lanes towards other stages, what its work left in flight."""

    def __init__(self, program: Program, stage: int, schedule: str) -> None:
        super().__init__(stage, Machine(program, stage, schedule, _is_inside_role))
        self.role = self.machine.role
        self.per_microbatch = frozenset(t.id for t in self.role.tensors if t.is_per_microbatch)
        self.lanes = {Lane.SEND: 0, Lane.RECV: 0, Lane.COLLECTIVE: 0}
        self.in_flight: InFlight = NOTHING
        self.as_of = (0, 0)  # time and microbatch from which `in_flight` is seen

    @property
    def all_end_ns(self) -> int:
        """When its stream and what that left in flight have ended."""
        return max(self.end_ns, self.as_of[0] + self.in_flight.end_ns)


class _Simulation:
    def __init__(self, program: Program, costs: Costs, schedule: str, fold_bodies: bool) -> None:
        folded = fold_mesh(program)
        self.program, self.costs, self.fold_bodies = program, costs, fold_bodies
        self.stages = [_Stage(folded, stage, schedule) for stage in range(folded.num_chips)]
        self.events: list[tuple[int, int, int, Meeting | None]] = []
        self.gathering: dict[Key, dict[int, Post]] = {}
        self.meetings: list[Meeting] = []
        self.timed: dict[tuple[int, str, int, int, InFlight], Stretch] = {}
        self.num_timed = 0

    def run(self) -> None:
        for stage in self.stages:
            self._advance(stage, 0, None)
        while self.events:
            at, _, number, meeting = heappop(self.events)
            if meeting is None:
                self._advance(self.stages[number], at, None)
                continue
            for chip in meeting.key.chips:
                self.stages[chip].machine.arrive(meeting.key)
            for chip in meeting.key.chips:
                if self.stages[chip].blocked_since is not None:
                    self._advance(self.stages[chip], at, meeting)
        check_finished(self.stages)

    def result(self) -> SimulatedStep:
        step_ns = max(
            *(stage.all_end_ns for stage in self.stages),
            *(meeting.end_ns for meeting in self.meetings),
            0,
        )
        for stage in self.stages:
            stage.tally.bubble_ns += step_ns - stage.tally.total_ns
        return SimulatedStep(
            program=self.program,
            step_ns=step_ns,
            tallies=tuple(stage.tally for stage in self.stages),
            ran=tuple(tuple(stage.ran) for stage in self.stages),
            meetings=tuple(self.meetings),
            num_timed=self.num_timed,
        )

    def _advance(self, stage: _Stage, at: int, woken_by: Meeting | None) -> None:
        held_ns = stage.advance(at, woken_by, partial(self._meet, stage, at), partial(self._work, stage, at))
        if held_ns:
            heappush(self.events, (at + held_ns, _WAKE, stage.number, None))

    def _work(self, stage: _Stage, at: int, run: Run) -> int:
        """Time a stretch or recall it; returns how long the stream is held."""
        before = NOTHING
        if stage.in_flight is not NOTHING:
            elapsed, shift = at - stage.as_of[0], run.microbatch - stage.as_of[1]
            before = stage.in_flight.later(elapsed, shift, stage.per_microbatch)
        key = (stage.number, run.body.name, run.start, run.stop, before)
        stretch = self.timed.get(key) if self.fold_bodies else None
        if stretch is None:
            stretch = time_stretch(run.instructions, run.start, before, stage.role, self.costs)
            self.timed[key] = stretch
            self.num_timed += 1
        end = at + stretch.duration_ns
        stage.in_flight, stage.as_of = stretch.after, (end, run.microbatch)
        stage.tally.add(stretch.tally)
        if stretch.pieces:
            stage.ran.append(Ran(at, run.microbatch, run.body.name, stretch.pieces))
        return stretch.duration_ns

    def _meet(self, stage: _Stage, at: int, post: Post) -> None:
        """Note a post; the one that completes a meeting starts it as soon as the lanes of all its ends are free."""
        posts = self.gathering.setdefault(post.key, {})
        posts[stage.number] = post
        if len(posts) < len(post.key.chips):
            return
        del self.gathering[post.key]
        lanes = self._lanes(post.key)
        start = max(at, *(self.stages[chip].lanes[lane] for chip, lane in lanes))
        end = start + self._duration(post.key, posts)
        for chip, lane in lanes:
            self.stages[chip].lanes[lane] = end
        meeting = Meeting(post.key, posts, at, start, end)
        heappush(self.events, (end, _ARRIVAL, len(self.meetings), meeting))
        self.meetings.append(meeting)

    def _lanes(self, key: Key) -> list[tuple[int, Lane]]:
        if key.kind == "p2p":
            return list(zip(key.chips, (Lane.SEND, Lane.RECV), strict=True))
        return [(chip, Lane.COLLECTIVE) for chip in key.chips]

    def _duration(self, key: Key, posts: Mapping[int, Post]) -> int:
        first = key.chips[0]
        instruction, role = posts[first].instruction, self.stages[first].role
        if isinstance(instruction, Collective):
            return self.costs.collective_ns(role, instruction)
        assert isinstance(instruction, Send)
        return self.costs.transfer_ns(role, instruction)


def check_finished(driven: Sequence[Driven]) -> None:
    """Raises ProgramError where chips wait for each other for ever."""
    stuck = [each.machine for each in driven if not each.machine.done]
    if stuck:
        others = f" (and {len(stuck) - 1} more)" if len(stuck) > 1 else ""
        raise ProgramError(
            f"the chips wait for each other for ever{others}",
            where=stuck[0].position(),
            hint="every send needs a receive, and every member of a group must reach its collectives",
        )
