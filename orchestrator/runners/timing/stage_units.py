"""Stage units: the stages of a plan as rows of units with the buffers that lowering gives them, from a unit table.

What a stage holds and sends does not depend on the batch, and hardly on the number of chips, so a book of stages
serves all plans of a model. Stages that are alike are one object, so that what is worked out for one is known of all.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from math import ceil

from partitioner.layout.parallel_plan import Plan, balance
from partitioner.lowering.buckets import buckets
from partitioner.program.program import DTYPE_BYTES
from partitioner.program.unit_table import UnitParam, UnitTable

LOW_PRECISION = ("bf16", "f16")
DIGITS = 12  # to which weights of units are compared, however many samples they are of
Tables = Callable[[int, int], UnitTable]  # from tp and samples; raises PartitionError


@dataclass(frozen=True, slots=True)
class KeptStates:
    """What the optimizer keeps: states of each parameter, and full-precision copies of those that have less."""

    states: int
    masters: bool


@dataclass(frozen=True, slots=True)
class FlatBytes:
    """A group of parameters in one buffer, as one chip has it."""

    numel: int
    dtype: str
    tied: tuple[int, ...]
    ready: int  # the unit of the stage whose backward completes its gradients
    is_frozen: bool

    @property
    def narrow(self) -> int:
        """Bytes of an entry of a parameter."""
        return DTYPE_BYTES[self.dtype]

    @property
    def wide(self) -> int:
        """Bytes of an entry of its gradient."""
        return 4 if self.dtype in LOW_PRECISION else self.narrow

    def held_bytes(self, shards: int, kept: KeptStates) -> int:
        """What parameters, gradients and optimizer states take."""
        if self.is_frozen:
            return self.numel * self.narrow
        shard, own = ceil(self.numel / shards), self._own(kept)
        scattered = shard * self.wide if shards > 1 else 0
        master = shard * own if own != self.narrow else 0
        return self.numel * (self.narrow + self.wide) + scattered + master + shard * own * kept.states

    def update_bytes(self, shards: int, kept: KeptStates) -> int:
        """What a step moves, as `ClusterCosts` has it: itself and states to and fro, the gradient in, a copy out."""
        own = self._own(kept)
        copied = self.narrow if own != self.narrow else 0
        return ceil(self.numel / shards) * (2 * own * (1 + kept.states) + self.wide + copied)

    def _own(self, kept: KeptStates) -> int:
        return self.wide if kept.masters else self.narrow


@dataclass(frozen=True, eq=False)
class StageUnits:
    """A stage: its units by role, and its groups of parameters. Equal only to itself."""

    roles: tuple[int, ...]
    groups: tuple[FlatBytes, ...]


@dataclass
class StageBook:
    """The stages of the plans of one model."""

    tables: Tables
    _stages: dict[tuple[object, ...], tuple[StageUnits, ...]] = field(default_factory=dict)
    _sizes: dict[tuple[tuple[float, ...], int], tuple[int, ...]] = field(default_factory=dict)

    def stages(self, plan: Plan, samples: int) -> tuple[StageUnits, ...]:
        """Of a plan whose parts are of so many samples. Raises PartitionError for more stages than units."""
        table = self.tables(plan.tp, samples)
        shards = plan.dp if plan.zero else 1
        most = shards if table.whole else None
        sizes = plan.stages or self._balanced(table, plan.pp)
        key = (plan.tp, sizes, plan.bucket_bytes, most)
        if key not in self._stages:
            self._stages[key] = _stages(table, sizes, plan.bucket_bytes, most)
        return self._stages[key]

    def kept(self, plan: Plan, samples: int) -> KeptStates:
        """What the optimizer keeps."""
        table = self.tables(plan.tp, samples)
        return KeptStates(table.states, table.masters)

    def _balanced(self, table: UnitTable, pp: int) -> tuple[int, ...]:
        total = sum(table.weights) or 1.0
        key = (tuple(round(weight / total, DIGITS) for weight in table.weights), pp)
        if key not in self._sizes:
            self._sizes[key] = balance(table.weights, pp)
        return self._sizes[key]


def _stages(
    table: UnitTable, sizes: Sequence[int], bucket_bytes: int, most: int | None
) -> tuple[StageUnits, ...]:
    """The units of each stage and the groups of their parameters, as lowering makes them; equal ones made once."""
    bounds = [0, *accumulate(sizes)]
    homes: dict[str, list[int]] = {}
    for stage, size in enumerate(sizes):
        names = {param.name for unit in table.params[bounds[stage] : bounds[stage] + size] for param in unit}
        for name in names:
            homes.setdefault(name, []).append(stage)
    tied = {name: tuple(stages) for name, stages in homes.items() if len(stages) > 1}
    made: dict[object, StageUnits] = {}
    stages = []
    for stage, size in enumerate(sizes):
        units = slice(bounds[stage], bounds[stage] + size)
        roles = table.role_of[units]
        shared = tuple(p.name for unit in table.params[units] for p in unit if p.name in tied)
        if (roles, shared) not in made:
            params = list(_params(table.params[units], tied).values())
            groups = tuple(_flat(members, bool(most)) for members in buckets(params, bucket_bytes, most))
            made[roles, shared] = StageUnits(roles, groups)
        stages.append(made[roles, shared])
    return tuple(stages)


def _params(units: Sequence[Sequence[UnitParam]], tied: dict[str, tuple[int, ...]]) -> dict[str, UnitParam]:
    """Those of a stage, each in its earliest unit there."""
    held: dict[str, UnitParam] = {}
    for place, unit in enumerate(units):
        for param in unit:
            if param.name not in held:
                held[param.name] = replace(param, unit=place, tied=tied.get(param.name, ()))
    return held


def _flat(members: Sequence[UnitParam], is_whole: bool) -> FlatBytes:
    first, numels = members[0], [p.spec.numel for p in members]
    numel = max(numels) * len(numels) if is_whole else sum(numels)
    return FlatBytes(numel, first.spec.dtype, first.tied, min(p.unit for p in members), first.is_frozen)
