"""The end of a step: reduce gradients, measure them, step the optimizer, gather shards.

One all-reduce of three numbers over every chip carries (sum of squared gradients, loss sum, count), each weighted by
1 / replication, so that clipping and the loss are right across every shard. Gradients are of the loss *sum* divided
by a nominal count; the optimizer step multiplies by nominal / count.
"""

from collections.abc import Sequence

from partitioner.layout.parallel_plan import Plan
from partitioner.lowering.flat_buffers import FlatGroup
from partitioner.lowering.role_builder import RoleBuilder
from partitioner.program.program import CollectiveOp, Group, Reduction, TensorKind, TensorSpec, Update

SCALAR = TensorSpec((), "f64")
STATS = TensorSpec((3,), "f64")
ALL = Group(("pp", "dp", "tp"))


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
    losses: tuple[int, int] | None,
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
        role.emit(body, Update(0, group.update, group.grad_shard, stats, group.param_shard, group.decay))
    if plan.zero and plan.dp > 1:
        for group in groups:
            role.collective(
                body, CollectiveOp.ALL_GATHER, Reduction.NONE, Group(("dp",)), group.param_shard, group.flat
            )
        role.wait(body, *(g.flat for g in groups))


def emit_stats(
    role: RoleBuilder,
    body: str,
    squares: Sequence[tuple[int, float]],
    losses: tuple[int, int] | None,
    plan: Plan,
) -> int:
    """Sum (gradient square, loss, count) over all chips; returns the tensor."""
    total = _weighted_sum(role, body, f"{body}.square", squares)
    zero = _weighted_sum(role, body, f"{body}.zero", [])
    loss, count = losses or (zero, zero)
    mine = role.tensor(f"{body}.local_stats", TensorKind.SCALAR, STATS)
    stats = role.tensor(f"{body}.stats", TensorKind.SCALAR, STATS)
    once = [
        _weighted_sum(role, body, f"{body}.{name}", [(tensor, 1.0 / plan.tp)])
        for name, tensor in (("loss", loss), ("count", count))
    ]  # every chip of a tp group holds the same loss
    role.simple(body, "stack", "aten.stack.default([v0, v1, v2])", [total, *once], mine)
    role.collective(body, CollectiveOp.ALL_REDUCE, Reduction.SUM, ALL, mine, stats)
    role.wait(body, stats)
    return stats


def _square(role: RoleBuilder, body: str, index: int, group: FlatGroup) -> int:
    norm = role.tensor(f"{body}.norm{index}", TensorKind.SCALAR, SCALAR)
    square = role.tensor(f"{body}.square{index}", TensorKind.SCALAR, SCALAR)
    code = "aten.linalg_vector_norm.default(v0, 2.0, None, False, dtype=dtype.f64)"
    role.simple(body, "norm", code, [group.grad_shard], norm)
    role.simple(body, "square", "aten.mul.Tensor(v0, v0)", [norm], square)
    return square


def _weight(group: FlatGroup, plan: Plan) -> float:
    """1 / number of chips that hold the same gradient entries."""
    copies = (plan.tp if group.replicated else 1) * max(1, len(group.tied)) * (1 if plan.zero else plan.dp)
    return 1.0 / copies


def _weighted_sum(role: RoleBuilder, body: str, name: str, terms: Sequence[tuple[int, float]]) -> int:
    total = role.tensor(f"{name}.0", TensorKind.SCALAR, SCALAR)
    role.simple(body, "zero", "aten.zeros.default([], dtype=dtype.f64, device=device)", [], total)
    for index, (term, weight) in enumerate(terms):
        after = role.tensor(f"{name}.{index + 1}", TensorKind.SCALAR, SCALAR)
        role.simple(body, "add", f"aten.add.Tensor(v0, v1, alpha={weight!r})", [total, term], after)
        total = after
    return total
