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

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from heapq import heappop, heappush

from orchestrator.cluster import Cluster
from orchestrator.runners.base import StepResult
from orchestrator.runners.predicted import Meeting, Ran, predicted_timeline
from orchestrator.runners.step_costs import ClusterCosts, Costs
from orchestrator.runners.stretch import NOTHING, InFlight, Stretch, Tally, axis_name, time_stretch
from orchestrator.timeline import Lane, Timeline
from partitioner.errors import ProgramError
from partitioner.machine import Key, Machine, Post, Run
from partitioner.program import Collective, Instruction, Program, Recv, Send

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


class _Stage:
    """The representative of one stage: its machine, its lanes towards other stages, its account."""

    def __init__(self, program: Program, stage: int, schedule: str) -> None:
        self.stage = stage
        self.machine = Machine(program, stage, schedule, _is_inside_role)
        self.role = self.machine.role
        self.per_microbatch = frozenset(t.id for t in self.role.tensors if t.is_per_microbatch)
        self.lanes = {Lane.SEND: 0, Lane.RECV: 0, Lane.COLLECTIVE: 0}
        self.in_flight: InFlight = NOTHING
        self.as_of = (0, 0)  # time and microbatch from which `in_flight` is seen
        self.blocked_since: int | None = None
        self.end_ns = 0
        self.tally = Tally()
        self.ran: list[Ran] = []


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
        self._check_finished()

    def result(self) -> SimulatedStep:
        step_ns = max(
            *(stage.end_ns for stage in self.stages),
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
        """Issue everything that this stage can issue at `at`."""
        machine = stage.machine
        while True:
            item = machine.ready()
            if item is None:
                self._pause(stage, at)
                return
            if stage.blocked_since is not None:
                assert woken_by is not None
                post = woken_by.posts[stage.stage]
                charge_wait(stage.tally, stage.blocked_since, at, woken_by.ready_ns, post)
                stage.blocked_since = None
            machine.complete(item)
            if isinstance(item, Post):
                self._meet(stage.stage, item, at)
                continue
            duration = self._run(stage, item, at)
            if duration:
                heappush(self.events, (at + duration, _WAKE, stage.stage, None))
                return

    def _pause(self, stage: _Stage, at: int) -> None:
        if stage.machine.call < len(stage.machine.calls):
            stage.blocked_since = at if stage.blocked_since is None else stage.blocked_since
        else:
            elapsed = at - stage.as_of[0]
            stage.end_ns = max(at, at + stage.in_flight.end_ns - elapsed)

    def _run(self, stage: _Stage, run: Run, at: int) -> int:
        """Time a stretch or recall it; returns how long the stream is held."""
        before = NOTHING
        if stage.in_flight is not NOTHING:
            elapsed, shift = at - stage.as_of[0], run.microbatch - stage.as_of[1]
            before = stage.in_flight.later(elapsed, shift, stage.per_microbatch)
        key = (stage.stage, run.body.name, run.start, run.stop, before)
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

    def _meet(self, chip: int, post: Post, at: int) -> None:
        """Note a post; the one that completes a meeting starts it as soon as the lanes of all its ends are free."""
        posts = self.gathering.setdefault(post.key, {})
        posts[chip] = post
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

    def _check_finished(self) -> None:
        stuck = [stage.machine for stage in self.stages if not stage.machine.done]
        if stuck:
            raise stuck_error(stuck)


def stuck_error(stuck: Sequence[Machine]) -> ProgramError:
    """What to say of machines that wait for ever."""
    others = f" (and {len(stuck) - 1} more)" if len(stuck) > 1 else ""
    return ProgramError(
        f"the chips wait for each other for ever{others}",
        where=stuck[0].position(),
        hint="every send needs a receive, and every member of a group must reach its collectives",
    )


def charge_wait(tally: Tally, blocked_since: int, at: int, ready_ns: int, post: Post) -> None:
    """A stream waited until `at`: for the last end of the meeting to come (bubble), then for the bytes."""
    came = min(at, max(blocked_since, ready_ns))
    tally.bubble_ns += came - blocked_since
    instruction = post.instruction
    axis = axis_name(instruction.group) if isinstance(instruction, Collective) else "pp"
    tally.expose(axis, at - came)
