"""Flat buffers: a role's parameters end to end, the unit of gradient reduction, sharding and optimizer steps.

Parameters are grouped by what must be done to them: weight decay or not, replicated over tp or cut, tied across
stages, and the bucket they fall in (filled in the order in which backward finishes them, so that reduction can start
early). Each group gets one parameter buffer, one gradient buffer and, with ZeRO-1 (Rajbhandari et al. 2020), this
chip's 1/dp of both. Low-precision parameters get a full-precision master copy that the optimizer updates.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from partitioner.lowering.role_builder import RoleBuilder
from partitioner.program.program import TensorKind, TensorSpec

LOW_PRECISION = ("bf16", "f16")


@dataclass(frozen=True, slots=True)
class Param:
    """A parameter as one chip of the role holds it."""

    name: str
    spec: TensorSpec
    dim: int | None  # cut by tp, or replicated
    tied: tuple[int, ...]  # the stages that share it, empty if only one has it
    unit: int  # the earliest unit of the role that uses it: its gradient is complete when that unit's backward ends
    is_frozen: bool
    decays: bool


@dataclass(frozen=True, slots=True)
class FlatGroup:
    """Tensor ids of one flat group. `update` is what the optimizer steps on, `target` what it is cast to."""

    params: tuple[Param, ...]
    decay: bool
    tied: tuple[int, ...]
    replicated: bool
    ready: int  # the group's gradients are complete when this unit's backward ends
    flat: int
    grad: int
    grad_shard: int
    param_shard: int
    update: int


def make_groups(
    role: RoleBuilder, params: Iterable[Param], *, dp: int, zero: int, bucket_bytes: int, states: int
) -> tuple[FlatGroup, ...]:
    """Declare buffers for `params` and the parameter tensors as views into them; frozen ones get no gradient."""
    groups = []
    for index, members in enumerate(_buckets(params, bucket_bytes)):
        groups.append(_declare(role, f"flat{index}", members, dp if zero else 1, states))
    return tuple(groups)


def _buckets(params: Iterable[Param], bucket_bytes: int) -> list[list[Param]]:
    """Split by kind, then fill buckets from the last unit to the first.

    Tied parameters come last and in the order of their names: the same in every stage that shares them.
    """
    by_kind: dict[tuple[object, ...], list[Param]] = {}
    for param in sorted(params, key=lambda p: (p.tied, 0 if p.tied else -p.unit, p.name)):
        kind = (param.is_frozen, param.decays, param.tied, param.dim is None, param.spec.dtype)
        by_kind.setdefault(kind, []).append(param)
    buckets: list[list[Param]] = []
    for members in by_kind.values():
        current: list[Param] = []
        for param in members:
            current.append(param)
            if sum(p.spec.nbytes for p in current) >= bucket_bytes:
                buckets.append(current)
                current = []
        if current:
            buckets.append(current)
    return buckets


def _declare(role: RoleBuilder, name: str, members: list[Param], shards: int, states: int) -> FlatGroup:
    numel = sum(p.spec.numel for p in members)
    padded = -(-numel // shards) * shards
    dtype = members[0].spec.dtype
    wide = "f32" if dtype in LOW_PRECISION else dtype
    frozen = members[0].is_frozen
    flat = role.tensor(f"{name}.params", TensorKind.FLAT, TensorSpec((padded,), dtype))
    grad = flat if frozen else role.tensor(f"{name}.grads", TensorKind.GRAD, TensorSpec((padded,), wide))
    offset = 0
    for p in members:
        shards_of = ((p.dim, "tp"),) if p.dim is not None else ()
        role.tensor(
            p.name, TensorKind.PARAM, p.spec, shards=shards_of, base=flat, offset=offset, source=p.name
        )
        if not frozen:
            spec = TensorSpec(p.spec.shape, wide)
            role.tensor(f"{p.name}.grad", TensorKind.GRAD, spec, base=grad, offset=offset, source=p.name)
        offset += p.spec.numel
    grad_shard, param_shard, update = grad, flat, flat
    if not frozen:
        mine = TensorSpec((padded // shards,), wide)
        if shards > 1:
            grad_shard = role.tensor(f"{name}.grad_shard", TensorKind.GRAD, mine)
            param_shard = role.tensor(
                f"{name}.param_shard",
                TensorKind.FLAT,
                TensorSpec(mine.shape, dtype),
                shards=((0, "dp"),),
                base=flat,
            )
        update = param_shard
        if wide != dtype:
            update = role.tensor(
                f"{name}.master", TensorKind.MASTER, mine, source=role.tensors[param_shard].name
            )
        if states:
            role.tensor(f"{name}.states", TensorKind.STATE, TensorSpec((states, *mine.shape), wide))
    return FlatGroup(
        params=tuple(members), decay=members[0].decays, tied=members[0].tied, replicated=members[0].dim is None,
        ready=min(p.unit for p in members), flat=flat, grad=grad, grad_shard=grad_shard, param_shard=param_shard,
        update=update,
    )  # fmt: skip
