"""Every chip: how long a step takes when each chip is driven and each message moves (fidelity "full").

The same machine as everywhere drives each chip. Work takes what `Costs` say, for slow chips a multiple of it.
Communication goes over the network of `comms`: a collective or a transfer starts when the last of its chips has
posted it and those before it on the same lanes have ended, and takes what its messages take beside all others
that are under way. Its end is that of its last message, for all its chips.

Integer nanoseconds; what the network says is rounded up. Time and memory grow with chips and messages: for some
thousand chips. `simulated` times one chip per role and needs no more for symmetric work.
"""

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from heapq import heappop, heappush
from math import ceil, inf

from orchestrator.runners.base import lane_of
from orchestrator.runners.timing.predicted import Meeting, Ran
from orchestrator.runners.timing.simulated import Driven, SimulatedStep, check_finished
from orchestrator.runners.timing.step_costs import NS_PER_S, Costs
from orchestrator.runners.timing.timed_segments import NOTHING, Stretch, Tally, time_stretch
from orchestrator.runners.timing.traffic import ProgramTraffic
from orchestrator.runs.timeline import Lane
from partitioner.program.machine import Key, Machine, Post, Run
from partitioner.program.program import Collective, Program, Send

FIDELITY = "full"
PICOSECOND = 1e-3  # in ns; a float of seconds is that exact up to an hour
LEFT_OUT = (
    "slow-down of compute by communication beside it",
    "fusion of operations, and efficiency by operand size",
    "data loading, logging and checkpoints",
)


@dataclass
class _Chip(Driven):
    """One chip, and the communications that wait for its lanes."""

    factor: float = 1.0  # of its work's time
    lanes: dict[Lane, deque[Key]] = field(default_factory=dict)


@dataclass
class _Gathering:
    """A communication whose ends are posting it, or that waits for its lanes, or is under way."""

    posts: dict[int, Post] = field(default_factory=dict)
    ready_ns: int = 0
    start_ns: int = 0


def simulate_every_chip(
    program: Program,
    costs: Costs,
    traffic: ProgramTraffic,
    *,
    schedule: str = "step",
    slow: Mapping[int, float] | None = None,
) -> SimulatedStep:
    """Time one execution of `schedule`; `slow` gives factors of chips' work. Raises ProgramError where it hangs."""
    simulation = _Simulation(program, costs, traffic, schedule, slow or {})
    simulation.run()
    return simulation.result()


class _Simulation:
    def __init__(
        self,
        program: Program,
        costs: Costs,
        traffic: ProgramTraffic,
        schedule: str,
        slow: Mapping[int, float],
    ) -> None:
        self.program, self.costs, self.traffic = program, costs, traffic
        self.chips = [
            _Chip(number, Machine(program, number, schedule), factor=slow.get(number, 1.0))
            for number in range(program.num_chips)
        ]
        self.wakes: list[tuple[int, int]] = []
        self.open: dict[Key, _Gathering] = {}
        self.under_way: dict[tuple[int, int], Key] = {}
        self.known_ends: list[tuple[int, Key]] = []
        self.meetings: list[Meeting] = []
        self.timed: dict[tuple[int, str, int, int, float], Stretch] = {}

    def run(self) -> None:
        for chip in self.chips:
            self._advance(chip, 0, None)
        while self.wakes or self.known_ends or self.under_way:
            wake = self.wakes[0][0] if self.wakes else None
            known = self.known_ends[0][0] if self.known_ends else None
            limits = [at for at in (wake, known) if at is not None]
            ended = self._ended_by(min(limits) / NS_PER_S if limits else inf) if self.under_way else ()
            if ended:
                for at, key in ended:
                    self._end(key, at)
            elif known is not None and (wake is None or known <= wake):
                at, key = heappop(self.known_ends)
                self._end(key, at)
            elif wake is not None:
                at, number = heappop(self.wakes)
                self._advance(self.chips[number], at, None)
        check_finished(self.chips)

    def _ended_by(self, until_s: float) -> tuple[tuple[int, Key], ...]:
        ended = self.traffic.live.advance(until_s)
        return tuple((_ns_up(each.at_s), self.under_way.pop((each.job, each.group))) for each in ended)

    def _advance(self, chip: _Chip, at: int, woken_by: Meeting | None) -> None:
        held_ns = chip.advance(at, woken_by, partial(self._post, chip, at), partial(self._work, chip, at))
        if held_ns:
            heappush(self.wakes, (at + held_ns, chip.number))

    def _work(self, chip: _Chip, at: int, run: Run) -> int:
        """How long a run holds the chip; runs alike are timed once."""
        role = chip.machine.role
        key = (role.stage, run.body.name, run.start, run.stop, chip.factor)
        if key not in self.timed:
            stretch = time_stretch(run.instructions, run.start, NOTHING, role, self.costs)
            self.timed[key] = stretch.slowed(chip.factor)
        stretch = self.timed[key]
        chip.tally.add(stretch.tally)
        if stretch.pieces:
            chip.ran.append(Ran(at, run.microbatch, run.body.name, stretch.pieces))
        return stretch.duration_ns

    def _post(self, chip: _Chip, at: int, post: Post) -> None:
        """Note a post; the one that completes a meeting lines it up on the lanes of all its ends."""
        gathering = self.open.setdefault(post.key, _Gathering())
        gathering.posts[chip.number] = post
        if len(gathering.posts) < len(post.key.chips):
            return
        gathering.ready_ns = at
        for end, lane in self._lanes(post.key):
            self.chips[end].lanes.setdefault(lane, deque()).append(post.key)
        self._start_if_next(post.key, at)

    def _lanes(self, key: Key) -> list[tuple[int, Lane]]:
        if key.kind == "p2p":
            return list(zip(key.chips, (Lane.SEND, Lane.RECV), strict=True))
        instruction = self.open[key].posts[key.chips[0]].instruction
        assert isinstance(instruction, Collective)
        return [(chip, lane_of(instruction.group)) for chip in key.chips]

    def _start_if_next(self, key: Key, at: int) -> None:
        if any(self.chips[chip].lanes[lane][0] != key for chip, lane in self._lanes(key)):
            return
        gathering = self.open[key]
        gathering.start_ns = at
        post = gathering.posts[key.chips[0]]
        spot = self.traffic.spot(post)
        start_s = at / NS_PER_S + spot.setup_s
        if isinstance(post.instruction, Send):
            role = self.chips[key.chips[0]].machine.role
            start_s += self.costs.issue_ns(role, post.instruction) / NS_PER_S
        end_s = self.traffic.live.start(spot.job, spot.group, start_s)
        if end_s is None:
            self.under_way[spot.job, spot.group] = key
        else:
            heappush(self.known_ends, (_ns_up(end_s), key))

    def _end(self, key: Key, at: int) -> None:
        """The bytes have come: the lanes are free, all ends may go on."""
        lanes = self._lanes(key)
        gathering = self.open.pop(key)
        meeting = Meeting(key, gathering.posts, gathering.ready_ns, gathering.start_ns, at)
        self.meetings.append(meeting)
        following = []
        for chip, lane in lanes:
            queue = self.chips[chip].lanes[lane]
            queue.popleft()
            if queue:
                following.append(queue[0])
        for chip in key.chips:
            self.chips[chip].machine.arrive(key)
        for other in dict.fromkeys(following):
            self._start_if_next(other, at)
        for chip in key.chips:
            waits = self.chips[chip].blocked_since is not None
            if waits:
                self._advance(self.chips[chip], at, meeting)

    def result(self) -> SimulatedStep:
        """Per stage, the mean over its chips; spans of all chips."""
        ends = [chip.end_ns for chip in self.chips] + [meeting.end_ns for meeting in self.meetings]
        step_ns = max(ends, default=0)
        num_stages = self.program.size("pp")
        per_stage = len(self.chips) // num_stages
        tallies = []
        for stage in range(num_stages):
            total = Tally()
            for chip in self.chips[stage * per_stage : (stage + 1) * per_stage]:
                chip.tally.bubble_ns += step_ns - chip.tally.total_ns
                total.add(chip.tally)
            tallies.append(total.times(1 / per_stage))
        return SimulatedStep(
            program=self.program,
            step_ns=step_ns,
            tallies=tuple(tallies),
            ran=tuple(tuple(chip.ran) for chip in self.chips),
            meetings=tuple(self.meetings),
            num_timed=len(self.timed),
            fidelity=FIDELITY,
            left_out=LEFT_OUT,
            every_chip=True,
        )


def _ns_up(seconds: float) -> int:
    """The first whole nanosecond not before. What is a picosecond past one is at it: floats blur whole ones so far."""
    return ceil(seconds * NS_PER_S - PICOSECOND)
