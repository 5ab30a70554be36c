"""Step costs: nanoseconds of every instruction of a Program on a cluster.

Compute by the roofline of the chip that runs the role, accumulation and the optimizer by memory traffic,
collectives as `choice` chooses and prices them, transfers as messages by themselves over the tier that
joins the stages, all chips of a stage sending at once. The simulator asks through the `StepCosts` protocol, so another
model of time (measured, calibrated) takes this one's place without a change to it.

Assumes that a role is as slow as its slowest chip type (by peak), that chip 0 of the mesh is chip 0 of the
cluster, and that a transfer between stages is as slow as between the first chips of both. Not modelled: the
host's time to start a communication, and the optimizer's arithmetic.
"""

from dataclasses import dataclass, field
from math import prod
from typing import Protocol, TypeAlias, assert_never

from comms.collectives.schedule import Op
from comms.networks.groups import Members, mesh_group
from comms.networks.links import Link
from comms.selection.choice import Choice, choose
from kernels.chips import Chip
from kernels.roofline import SegmentTime, memory_seconds, segment_time
from orchestrator.config.hardware.cluster import Cluster
from partitioner.program.instructions import accumulated_nbytes, collective_nbytes
from partitioner.program.program import (
    Accumulate,
    Collective,
    Compute,
    Group,
    Program,
    Role,
    Send,
    TensorKind,
    Update,
)

NS_PER_S = 1_000_000_000
DEFAULT_DTYPE = "fp32"
Working: TypeAlias = Compute | Accumulate | Update


@dataclass(frozen=True, slots=True)
class WorkTime:
    """One instruction on the chip itself: its device and its host lane, which run side by side."""

    device_ns: int
    host_ns: int = 0

    @property
    def duration_ns(self) -> int:
        """The longer lane."""
        return max(self.device_ns, self.host_ns)


class StepCosts(Protocol):
    """What the simulator asks; `role` is the role of the chip that carries the instruction out."""

    def work(self, role: Role, instruction: Working) -> WorkTime:
        """Time on the chip."""
        ...

    def collective_ns(self, role: Role, instruction: Collective) -> int:
        """Time from the last member's arrival to the result."""
        ...

    def transfer_ns(self, role: Role, instruction: Send) -> int:
        """Time from the moment both ends are ready until the last byte has arrived."""
        ...

    def issue_ns(self, role: Role, instruction: Send) -> int:
        """The part of `transfer_ns` in which nothing moves yet."""
        ...


@dataclass
class ClusterCosts:
    """The costs of `program` on the first `program.num_chips` chips of `cluster`.

    `only`: work as that type of chip does it, whatever else a stage has.
    """

    program: Program
    cluster: Cluster
    only: Chip | None = None
    _segments: dict[tuple[int, int], SegmentTime] = field(default_factory=dict)
    _chips: dict[int, Chip] = field(default_factory=dict)
    _collectives: dict[tuple[str, Group, int], Choice] = field(default_factory=dict)
    _between: dict[tuple[int, int], tuple[Link, float]] = field(default_factory=dict)
    _state_share: dict[int, float] = field(default_factory=dict)

    def work(self, role: Role, instruction: Working) -> WorkTime:
        """Time on the chip."""
        chip = self._chip(role.stage)
        match instruction:
            case Compute():
                time = self._segment(role.stage, instruction.segment)
                return WorkTime(_ns(time.device_s), _ns(time.host_s))
            case Accumulate():
                device = memory_seconds(accumulated_nbytes(role, instruction), chip)
                return WorkTime(_ns(device), _ns(len(instruction.reads) * chip.launch_s))
            case Update():
                return WorkTime(
                    _ns(memory_seconds(self._update_nbytes(role, instruction), chip)), _ns(chip.launch_s)
                )
            case _:
                assert_never(instruction)

    def collective_ns(self, role: Role, instruction: Collective) -> int:
        """Time of the fastest algorithm for the group's shape."""
        nbytes = collective_nbytes(role, instruction)
        key = (str(instruction.op), instruction.group, nbytes)
        if key not in self._collectives:
            members = self._members(role, instruction.group)
            self._collectives[key] = choose(Op(key[0]), nbytes, members, self.cluster.network)
        return _ns(self._collectives[key].seconds)

    @property
    def sits_unevenly(self) -> bool:
        """Whether a group had to be priced as if it were even, or as one flat level (`choice`)."""
        return not all(choice.is_folded for choice in self._collectives.values())

    def transfer_ns(self, role: Role, instruction: Send) -> int:
        """Time of one message by itself between the stages' first chips."""
        link, issue_s = self.way(role.stage, instruction.to)
        return _ns(issue_s + link.seconds(role.tensors[instruction.tensor].spec.nbytes))

    def issue_ns(self, role: Role, instruction: Send) -> int:
        """What a message by itself pays in the tier that joins the stages, see `Library`."""
        return _ns(self.way(role.stage, instruction.to)[1])

    def way(self, stage: int, other: int) -> tuple[Link, float]:
        """The link between two stages, and what issuing a message adds to it."""
        stages = (min(stage, other), max(stage, other))
        if stages not in self._between:
            self._between[stages] = self._way_between(*map(self._first_chip, stages))
        return self._between[stages]

    def _way_between(self, first: int, second: int) -> tuple[Link, float]:
        """What each chip of a stage has towards its like in another, all chips of the stage sending at once."""
        network, per_stage = self.cluster.network, self._chips_per_stage
        tier = network.tier_for((first, second))
        chips = [*range(first, first + per_stage), *range(second, second + per_stage)]
        levels = network.levels(chips, aligned=True)
        if not levels:
            return tier.loaded_link, tier.issue_s
        inner = prod(level.fanout for level in levels[:-1])
        return Link(levels[-1].latency_s, levels[-1].rate(min(inner, per_stage))), tier.issue_s

    def _members(self, role: Role, group: Group) -> Members:
        """By arithmetic; groups of a few named stages are small enough to list."""
        if group.stages:
            return self.program.members(group, self._first_chip(role.stage))
        return mesh_group(self.program.axes, group.axes)

    def _first_chip(self, stage: int) -> int:
        return stage * self._chips_per_stage

    @property
    def _chips_per_stage(self) -> int:
        return self.program.num_chips // self.program.size("pp")

    def _chip(self, stage: int) -> Chip:
        """The slowest chip type of a stage. The unit repeats, so its length is as far as one has to look."""
        if self.only is not None:
            return self.only
        if stage not in self._chips:
            first = self._first_chip(stage)
            distinct = min(self._chips_per_stage, self.cluster.chips_per_host * len(self.cluster.unit))
            dtype = str(self.program.facts.get("dtype", DEFAULT_DTYPE))
            chips = (self.cluster.chip(first + offset) for offset in range(distinct))
            self._chips[stage] = min(chips, key=lambda chip: chip.peak(dtype))
        return self._chips[stage]

    def _segment(self, stage: int, segment: int) -> SegmentTime:
        chip = self._chip(stage)
        key = (id(chip), segment)
        if key not in self._segments:
            self._segments[key] = segment_time(self.program.segments[segment].ops, chip)
        return self._segments[key]

    def _update_nbytes(self, role: Role, update: Update) -> float:
        """Parameter and states are read and written, the gradient is read, the copy for `target` is written."""
        param, grad = (role.tensors[t].spec for t in update.whole or (update.param, update.grad))
        copied = role.tensors[update.target].spec.nbytes if update.target != update.param else 0
        return 2 * param.nbytes + grad.nbytes + copied + 2 * param.nbytes * self._states_per_byte(role)

    def _states_per_byte(self, role: Role) -> float:
        """Bytes of optimizer state for each byte of parameters that the role's updates step on."""
        if role.stage not in self._state_share:
            instructions = (ins for body in role.bodies for ins in body.instructions)
            updates = [ins for ins in instructions if isinstance(ins, Update)]
            stepped = sum(role.tensors[(ins.whole or (ins.param,))[0]].spec.nbytes for ins in updates)
            states = sum(tensor.spec.nbytes for tensor in role.tensors if tensor.kind is TensorKind.STATE)
            self._state_share[role.stage] = states / stepped if stepped else 0.0
        return self._state_share[role.stage]


def _ns(seconds: float) -> int:
    return round(seconds * NS_PER_S)
