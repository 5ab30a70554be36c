"""Every chip: how long a step takes when each chip is driven and each message moves (fidelity "full").

Work takes what `StepCosts` say, for slow chips a multiple of it. Communication goes over the network of `comms`: a
collective or a transfer starts when the last of its chips has posted it and those before it on the same lanes have
ended, and takes what its messages take beside all others that are under way. Its end is that of its last message,
for all its chips.

Every distinct collective and transfer of the program becomes one job, with all groups of chips that carry it out;
each is started as often as the program does. Collectives are carried out as `choice` chooses, which is what
the other fidelities time too.

Integer nanoseconds; what the network says is rounded up. Time and memory grow with chips and messages: for some
thousand chips. `simulated` times one chip per role and needs no more for symmetric work. Not modelled: the host's
time to start a collective beyond the tier's setup, and a transfer at all (`StepCosts.issue_ns` says it).
"""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from heapq import heappop, heappush
from math import ceil, inf
from typing import NamedTuple

import numpy as np

from comms.collectives.schedule import Channel, Op, Pattern, Round, Schedule
from comms.networks.groups import Members, mesh_group
from comms.networks.network import Network
from comms.networks.tiered import TieredTopology
from comms.networks.topology import UNDISTURBED, Conditions, IntArray, Topology
from comms.selection.choice import choose
from comms.simulation.compiled import CollectiveJob
from comms.simulation.incremental import IncrementalSimulation
from orchestrator.runners.timing.simulated import (
    DrivenChip,
    SimulatedStep,
    StepLoop,
    TimedCommunication,
    lanes_of,
)
from orchestrator.runners.timing.step_costs import NS_PER_S, StepCosts
from orchestrator.runs.timeline import Lane
from partitioner.program.instructions import collective_nbytes
from partitioner.program.machine import Key, Machine, Post
from partitioner.program.program import Collective, Group, Program, Recv, Role, Send

FIDELITY = "full"
TRANSFER = "transfer"
PICOSECOND = 1e-3  # in ns; a float of seconds is that exact up to an hour
LEFT_OUT = (
    "slow-down of compute by communication beside it",
    "fusion of operations, and efficiency by operand size",
    "data loading, logging and checkpoints",
)


def simulate_every_chip(
    program: Program,
    costs: StepCosts,
    traffic: "ProgramTraffic",
    *,
    schedule: str = "step",
    slow: Mapping[int, float] | None = None,
    own_costs: Sequence[StepCosts] | None = None,
) -> SimulatedStep:
    """Time one execution of `schedule`. Raises ProgramError where it hangs.

    `slow` gives factors of chips' work, `own_costs` each chip's, where they are of several kinds.
    """
    factors, own = slow or {}, own_costs or [costs] * program.num_chips
    chips = [
        DrivenChip(number, Machine(program, number, schedule), factors.get(number, 1.0), own[number])
        for number in range(program.num_chips)
    ]
    loop = StepLoop(chips, costs, _MovedCommunications(program, costs, traffic))
    loop.run()
    return replace(loop.result(program), fidelity=FIDELITY, left_out=LEFT_OUT, every_chip=True)


@dataclass(slots=True)
class _Posted:
    """A communication that waits for its lanes, or is under way."""

    posts: Mapping[int, Post]
    lanes: list[tuple[int, Lane]]
    ready_ns: int
    start_ns: int = 0


class _MovedCommunications:
    """Each ends with its last message on the network; those that share a lane of a chip follow each other."""

    def __init__(self, program: Program, costs: StepCosts, traffic: "ProgramTraffic") -> None:
        self.program, self.costs, self.traffic = program, costs, traffic
        self.open: dict[Key, _Posted] = {}
        self.queues: dict[tuple[int, Lane], deque[Key]] = {}
        self.under_way: dict[tuple[int, int], Key] = {}
        self.known_ends: list[tuple[int, Key]] = []
        self.just_ended: deque[tuple[int, Key]] = deque()

    def posted(self, key: Key, posts: Mapping[int, Post], at_ns: int) -> None:
        """See `Communications`: it lines up on the lanes of all its chips."""
        self.open[key] = posted = _Posted(posts, lanes_of(key, posts), at_ns)
        for lane in posted.lanes:
            self.queues.setdefault(lane, deque()).append(key)
        self._start_if_next(key, at_ns)

    def next_end(self, until_ns: int | None) -> TimedCommunication | None:
        """See `Communications`. What the network ends at one instant is handed out before it moves on."""
        if not self.just_ended and self.under_way:
            known = self.known_ends[0][0] if self.known_ends else None
            limits = [at for at in (until_ns, known) if at is not None]
            for each in self.traffic.simulation.advance(min(limits) / NS_PER_S if limits else inf):
                self.just_ended.append((_ns_up(each.at_s), self.under_way.pop((each.job, each.group))))
        if self.just_ended:
            return self._ended(*self.just_ended.popleft())
        if self.known_ends and (until_ns is None or self.known_ends[0][0] <= until_ns):
            return self._ended(*heappop(self.known_ends))
        return None

    def _ended(self, at_ns: int, key: Key) -> TimedCommunication:
        """Its lanes are free: what is next on them starts."""
        posted = self.open.pop(key)
        following = []
        for lane in posted.lanes:
            queue = self.queues[lane]
            queue.popleft()
            if queue:
                following.append(queue[0])
        for other in dict.fromkeys(following):
            self._start_if_next(other, at_ns)
        return TimedCommunication(key, posted.posts, posted.ready_ns, posted.start_ns, at_ns)

    def _start_if_next(self, key: Key, at_ns: int) -> None:
        posted = self.open[key]
        if any(self.queues[lane][0] != key for lane in posted.lanes):
            return
        posted.start_ns = at_ns
        post = posted.posts[key.chips[0]]
        spot = self.traffic.spot(post)
        start_s = at_ns / NS_PER_S + spot.setup_s
        if isinstance(post.instruction, Send):
            start_s += self.costs.issue_ns(self.program.role_of(key.chips[0]), post.instruction) / NS_PER_S
        end_s = self.traffic.simulation.start(spot.job, spot.group, start_s)
        if end_s is None:
            self.under_way[spot.job, spot.group] = key
        else:
            heappush(self.known_ends, (_ns_up(end_s), key))


def _ns_up(seconds: float) -> int:
    """The first whole nanosecond not before. What is a picosecond past one is at it: floats blur whole ones so far."""
    return ceil(seconds * NS_PER_S - PICOSECOND)


@dataclass(frozen=True, slots=True)
class _JobKind:
    """What makes two communications the same job."""

    op: str
    nbytes: int
    group: Group | tuple[int, int]  # of a transfer, its stages


class Spot(NamedTuple):
    """One group of one job, and what starting it costs beforehand."""

    job: int
    group: int
    setup_s: float


@dataclass
class ProgramTraffic:
    """The jobs of `program` on a network."""

    program: Program
    network: Network  # as many chips as the program has
    conditions: Conditions = UNDISTURBED
    topology: Topology | None = None  # the network's own, or as conditions leave it
    background: tuple[CollectiveJob, ...] = ()  # of others, again and again
    _spots: dict[tuple[_JobKind, tuple[int, ...]], Spot] = field(default_factory=dict)

    def __post_init__(self) -> None:
        whole = self.network.topology()
        jobs: list[CollectiveJob] = []
        for number, (kind, stages) in enumerate(self._kinds().items()):
            job, groups, setup_s = self._job(kind, stages, whole)
            jobs.append(job)
            for index, chips in enumerate(groups):
                self._spots[kind, tuple(int(chip) for chip in chips)] = Spot(number, index, setup_s)
        self.simulation = IncrementalSimulation(
            self.topology or whole, [*jobs, *self.background], self.conditions
        )

    def _job(
        self, kind: _JobKind, stages: set[int], whole: TieredTopology
    ) -> tuple[CollectiveJob, IntArray, float]:
        """The job, its groups of chips, and what starting one costs."""
        per_stage = self.program.num_chips // self.program.size("pp")
        if isinstance(kind.group, tuple):
            source, target = kind.group
            first = np.arange(per_stage)[:, np.newaxis]
            pairs = first + np.array([source, target]) * per_stage
            return CollectiveJob(ONE_MESSAGE, pairs, kind.nbytes), pairs, 0.0
        if kind.group.stages:
            chips = range(kind.group.stages[0] * per_stage, (kind.group.stages[0] + 1) * per_stage)
            listed = dict.fromkeys(self.program.members(kind.group, chip) for chip in chips)
            members: Members = next(iter(listed))
            groups = np.array(list(listed), dtype=np.int64)
        else:
            members = mesh_group(self.program.axes, kind.group.axes)
            groups = members.copies(self.program.num_chips)
            groups = groups[np.isin(groups[:, 0] // per_stage, list(stages))]
        choice = choose(Op(kind.op), kind.nbytes, members, self.network)
        return choice.job(groups, whole), groups, choice.setup_s

    def spot(self, post: Post) -> Spot:
        """The job and group of what a chip posted."""
        role = self.program.role_of(post.key.chips[0])
        return self._spots[_kind_of(role, post.instruction), post.key.chips]

    def _kinds(self) -> dict[_JobKind, set[int]]:
        """Every distinct communication, with the stages that carry it out."""
        kinds: dict[_JobKind, set[int]] = {}
        for role in self.program.roles:
            for instruction in (ins for body in role.bodies for ins in body.instructions):
                if isinstance(instruction, Collective | Send):
                    kinds.setdefault(_kind_of(role, instruction), set()).add(role.stage)
        return kinds


def _kind_of(role: Role, instruction: Collective | Send | Recv) -> _JobKind:
    if isinstance(instruction, Collective):
        return _JobKind(str(instruction.op), collective_nbytes(role, instruction), instruction.group)
    assert isinstance(instruction, Send)
    nbytes = role.tensors[instruction.tensor].spec.nbytes
    return _JobKind(TRANSFER, nbytes, (role.stage, instruction.to))


def _one_message() -> Schedule:
    zero, one = np.zeros(1, dtype=np.int64), np.ones(1, dtype=np.int64)
    channel = Channel(((Round(Pattern(zero, one), zero, one, reduces=False),),))
    return Schedule(Op.BROADCAST, TRANSFER, 2, 1, 1.0, (channel,))


ONE_MESSAGE = _one_message()
