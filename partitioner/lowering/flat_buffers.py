"""Flat buffers: a role's parameters end to end, and the end of a step that reduces, measures and updates them.

Parameters are grouped by what must be done to them, see `buckets`. Each group gets one parameter buffer, one gradient
buffer and, with ZeRO-1 (Rajbhandari et al. 2020), this chip's 1/dp of both. Low-precision parameters may get a
full-precision master copy that the optimizer updates; their gradients are added up in full precision in any case.

Where the optimizer looks at whole parameters, a group is one of them, or with ZeRO-1 one for each of the dp shards.
What tp cuts of them is gathered for the step, which all chips of the tp group take alike.

One all-reduce of three numbers over every chip carries (sum of squared gradients, loss sum, count), each weighted by
1 / replication, so that clipping and the loss are right across every shard. Gradients are of the loss *sum* divided
by a nominal count; the optimizer step multiplies by nominal / count.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from partitioner.layout.parallel_plan import Plan
from partitioner.lowering.buckets import Param, buckets
from partitioner.lowering.role_builder import SCALAR, RoleBuilder
from partitioner.lowering.stage import Losses
from partitioner.program.program import (
    CollectiveOp,
    Free,
    Group,
    Reduction,
    TensorKind,
    TensorSpec,
    Update,
)

LOW_PRECISION = ("bf16", "f16")
STATS = TensorSpec((3,), "f64")
ALL = Group(("pp", "dp", "tp"))

Terms: TypeAlias = Sequence[tuple[int, float]]  # scalars and their weights in a sum


@dataclass(frozen=True, slots=True)
class FlatGroup:
    """Tensor ids of one flat group. `update` is what the optimizer steps on, `param_shard` what it is cast to."""

    params: tuple[Param, ...]
    group: int
    tied: tuple[int, ...]
    replicated: bool
    ready: int  # the group's gradients are complete when this unit's backward ends
    flat: int
    grad: int
    grad_shard: int
    param_shard: int
    update: int
    gathered: tuple[int, ...]  # `update` and `grad_shard` of the whole tp group, where they must be whole


@dataclass(frozen=True, slots=True)
class Kept:
    """What the optimizer has for each parameter: states, float32 masters where that has less, and a step of its own."""

    states: int
    masters: bool
    whole: bool


def make_groups(role: RoleBuilder, params: Iterable[Param], plan: Plan, kept: Kept) -> tuple[FlatGroup, ...]:
    """Declare buffers for `params` and the parameter tensors as views into them; frozen ones get no gradient."""
    shards = plan.dp if plan.zero else 1
    filled = enumerate(buckets(params, plan.bucket_bytes, shards if kept.whole else None))
    tp = plan.tp if kept.whole else 1
    return tuple(_declare(role, f"flat{index}", members, shards, tp, kept) for index, members in filled)


def _declare(
    role: RoleBuilder, name: str, members: list[Param], shards: int, tp: int, kept: Kept
) -> FlatGroup:
    def buffer(suffix: str, kind: TensorKind, length: int, dtype: str, **more: Any) -> int:
        return role.tensor(f"{name}.{suffix}", kind, TensorSpec((length,), dtype), **more)

    frozen, dtype = members[0].is_frozen, members[0].spec.dtype
    wide = "f32" if dtype in LOW_PRECISION else dtype
    shard = -(-sum(p.spec.numel for p in members) // shards)  # rounded up: the last one may be padded
    if kept.whole:
        shard = max(p.spec.numel for p in members)
        shard += shard % 2 if len(members) > 1 else 0  # pairs of entries may be seen as complex numbers
    flat = buffer("params", TensorKind.FLAT, shard * shards, dtype)
    grad = flat if frozen else buffer("grads", TensorKind.GRAD, shard * shards, wide)
    _declare_views(role, members, flat, grad, wide, shard if kept.whole else None)
    grad_shard, param_shard, update = grad, flat, flat
    gathered: tuple[int, ...] = ()
    if not frozen:
        if shards > 1:
            grad_shard = buffer("grad_shard", TensorKind.GRAD, shard, wide)
            param_shard = buffer("param_shard", TensorKind.FLAT, shard, dtype, shards=((0, "dp"),), base=flat)
        update = param_shard
        if kept.masters and wide != dtype:
            update = buffer("master", TensorKind.MASTER, shard, wide, source=role.tensors[param_shard].name)
        parts = 1 if members[0].cut is None else tp
        if kept.states:
            states = TensorSpec((kept.states, shard * parts), role.tensors[update].spec.dtype)
            role.tensor(f"{name}.states", TensorKind.STATE, states)
        if parts > 1:
            gathered = (
                buffer("whole_params", TensorKind.ACTIVATION, shard * parts, role.spec(update).dtype),
                buffer("whole_grads", TensorKind.ACTIVATION, shard * parts, wide),
            )
    return FlatGroup(
        params=tuple(members), group=members[0].group, tied=members[0].tied, replicated=members[0].cut is None,
        ready=min(p.unit for p in members), flat=flat, grad=grad, grad_shard=grad_shard, param_shard=param_shard,
        update=update, gathered=gathered,
    )  # fmt: skip


def _declare_views(
    role: RoleBuilder, members: list[Param], flat: int, grad: int, wide: str, apart: int | None
) -> None:
    """Parameters and their gradients in their buffers, end to end or each at its multiple of `apart` entries.

    End to end those of an odd length come last: pairs of numbers are only seen as complex ones from an even place on.
    """
    offset = 0
    for p in members if apart else sorted(members, key=lambda p: p.spec.numel % 2):
        shards = ((p.cut.dim, "tp"),) if p.cut is not None else ()
        role.tensor(p.name, TensorKind.PARAM, p.spec, shards=shards, base=flat, offset=offset, source=p.name,
                    sections=p.sections)  # fmt: skip
        if not p.is_frozen:
            spec = TensorSpec(p.spec.shape, wide)
            role.tensor(f"{p.name}.grad", TensorKind.GRAD, spec, base=grad, offset=offset, source=p.name)
        offset += apart or p.spec.numel


def reduce_gradients(role: RoleBuilder, body: str, group: FlatGroup, plan: Plan) -> None:
    """Start reducing one flat group over dp (tied groups first over their stages)."""
    if group.tied:
        tie = Group(("pp",), group.tied)
        role.collective(body, CollectiveOp.ALL_REDUCE, Reduction.SUM, tie, group.grad, group.grad)
        role.wait(body, group.grad)
    if plan.dp == 1:
        return
    op = CollectiveOp.REDUCE_SCATTER if plan.zero else CollectiveOp.ALL_REDUCE
    role.collective(body, op, Reduction.SUM, Group(("dp",)), group.grad, group.grad_shard)


def emit_update(
    role: RoleBuilder,
    groups: Sequence[FlatGroup],
    plan: Plan,
    losses: Losses,
    started: set[int],
) -> None:
    """The `update` body; groups in `started` (by index) are already being reduced."""
    body = "update"
    role.body(body)
    for index, group in enumerate(groups):
        if index not in started:
            reduce_gradients(role, body, group, plan)
    if plan.dp > 1:
        role.wait(body, *(g.grad_shard for g in groups))
    squares = [(_square(role, body, index, g), _weight(g, plan)) for index, g in enumerate(groups)]
    stats = emit_stats(role, body, squares, losses, plan)
    for group in groups:
        _step(role, body, group, stats)
    if plan.zero and plan.dp > 1:
        for group in groups:
            role.collective(
                body, CollectiveOp.ALL_GATHER, Reduction.NONE, Group(("dp",)), group.param_shard, group.flat
            )
        role.wait(body, *(g.flat for g in groups))


def _step(role: RoleBuilder, body: str, group: FlatGroup, stats: int) -> None:
    for own, gathered in zip((group.update, group.grad_shard), group.gathered, strict=False):
        role.collective(body, CollectiveOp.ALL_GATHER, Reduction.NONE, Group(("tp",)), own, gathered)
    role.wait(body, *group.gathered)
    role.emit(
        body,
        Update(0, group.update, group.grad_shard, stats, group.param_shard, group.group, group.gathered),
    )
    if group.gathered:
        role.emit(body, Free(0, group.gathered))


def emit_stats(role: RoleBuilder, body: str, squares: Terms, losses: Losses, plan: Plan) -> int:
    """Sum (gradient square, loss, count) over all chips; returns the tensor."""
    total = _weighted_sum(role, body, f"{body}.square", squares)
    zero = _weighted_sum(role, body, f"{body}.zero", [])
    loss, count = losses or (zero, zero)
    mine = role.tensor(f"{body}.local_stats", TensorKind.SCALAR, STATS)
    stats = role.tensor(f"{body}.stats", TensorKind.SCALAR, STATS)
    weight = 1.0 / plan.tp  # every chip of a tp group holds the same loss
    loss = _weighted_sum(role, body, f"{body}.loss", [(loss, weight)])
    count = _weighted_sum(role, body, f"{body}.count", [(count, weight)])
    role.simple(body, "stack", "aten.stack.default([v0, v1, v2])", [total, loss, count], mine)
    role.collective(body, CollectiveOp.ALL_REDUCE, Reduction.SUM, ALL, mine, stats)
    role.wait(body, stats)
    return stats


def _scalar(role: RoleBuilder, name: str) -> int:
    return role.tensor(name, TensorKind.SCALAR, SCALAR)


def _square(role: RoleBuilder, body: str, index: int, group: FlatGroup) -> int:
    code = "orchestrate.precise_norm.default(v0)"
    norm = role.simple(body, "norm", code, [group.grad_shard], _scalar(role, f"{body}.norm{index}"))
    square = _scalar(role, f"{body}.square{index}")
    return role.simple(body, "square", "aten.mul.Tensor(v0, v0)", [norm], square)


def _weight(group: FlatGroup, plan: Plan) -> float:
    """1 / number of chips that hold the same gradient entries."""
    copies = (plan.tp if group.replicated else 1) * max(1, len(group.tied)) * (1 if plan.zero else plan.dp)
    return 1.0 / copies


def _weighted_sum(role: RoleBuilder, body: str, name: str, terms: Terms) -> int:
    zero = "aten.zeros.default([], dtype=dtype.f64, device=device)"
    total = role.simple(body, "zero", zero, [], _scalar(role, f"{name}.0"))
    for index, (term, weight) in enumerate(terms, 1):
        add = f"aten.add.Tensor(v0, v1, alpha={weight!r})"
        total = role.simple(body, "add", add, [total, term], _scalar(role, f"{name}.{index}"))
    return total
