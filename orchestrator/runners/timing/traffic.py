"""Traffic: the communications of a program as jobs on a network, for full fidelity.

Every distinct collective and transfer of the program becomes one job, with all groups of chips that carry it out;
each is started as often as the program does. Collectives are carried out as `choice` chooses, which is what
the other fidelities time too.

Not modelled: the host's time to start a collective beyond the tier's setup, and a transfer at all (`Costs.issue_ns`
says it).
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from comms.collectives.schedule import Channel, Op, Pattern, Round, Schedule
from comms.networks.conditions import UNDISTURBED, Conditions
from comms.networks.groups import Members, mesh_group
from comms.networks.network import Network
from comms.networks.tiered import TieredTopology
from comms.networks.topology import IntArray, Topology
from comms.selection.choice import choose
from comms.selection.pricing import job_of
from comms.simulation.compiled import CollectiveJob
from comms.simulation.incremental import IncrementalSimulation
from orchestrator.runners.base import collective_nbytes
from partitioner.program.machine import Post
from partitioner.program.program import Collective, Group, Program, Recv, Role, Send

TRANSFER = "transfer"


@dataclass(frozen=True, slots=True)
class _Kind:
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
    _spots: dict[tuple[_Kind, tuple[int, ...]], Spot] = field(default_factory=dict)

    def __post_init__(self) -> None:
        whole = self.network.topology()
        jobs: list[CollectiveJob] = []
        for number, (kind, stages) in enumerate(self._kinds().items()):
            job, groups, setup_s = self._job(kind, stages, whole)
            jobs.append(job)
            for index, chips in enumerate(groups):
                self._spots[kind, tuple(int(chip) for chip in chips)] = Spot(number, index, setup_s)
        self.live = IncrementalSimulation(self.topology or whole, [*jobs, *self.background], self.conditions)

    def _job(
        self, kind: _Kind, stages: set[int], whole: TieredTopology
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
        return job_of(choice, groups, whole), groups, choice.setup_s

    def spot(self, post: Post) -> Spot:
        """The job and group of what a chip posted."""
        role = self.program.role_of(post.key.chips[0])
        return self._spots[_kind_of(role, post.instruction), post.key.chips]

    def _kinds(self) -> dict[_Kind, set[int]]:
        """Every distinct communication, with the stages that carry it out."""
        kinds: dict[_Kind, set[int]] = {}
        for role in self.program.roles:
            for kind in _kinds_of(role):
                kinds.setdefault(kind, set()).add(role.stage)
        return kinds


def _kinds_of(role: Role) -> Iterator[_Kind]:
    for body in role.bodies:
        for instruction in body.instructions:
            if isinstance(instruction, Collective | Send):
                yield _kind_of(role, instruction)


def _kind_of(role: Role, instruction: Collective | Send | Recv) -> _Kind:
    if isinstance(instruction, Collective):
        return _Kind(str(instruction.op), collective_nbytes(role, instruction), instruction.group)
    assert isinstance(instruction, Send)
    nbytes = role.tensors[instruction.tensor].spec.nbytes
    return _Kind(TRANSFER, nbytes, (role.stage, instruction.to))


def _one_message() -> Schedule:
    zero, one = np.zeros(1, dtype=np.int64), np.ones(1, dtype=np.int64)
    channel = Channel(((Round(Pattern(zero, one), zero, one, reduces=False),),))
    return Schedule(Op.BROADCAST, TRANSFER, 2, 1, 1.0, (channel,))


ONE_MESSAGE = _one_message()
