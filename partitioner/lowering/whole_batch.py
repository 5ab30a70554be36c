"""Values of the whole batch in one stage: those known before the forward, and the loss that needs all forwards.

`totals` runs once per microbatch and adds up, `known` once per step and finishes over the replicas (`totals2` and
`known2` follow where a value needs such values first). `loss` runs when
all forwards have ended: it sums over replicas, makes the loss of the sums and what each part's backward starts with.
"""

from collections.abc import Collection, Mapping, Sequence
from itertools import count, takewhile
from math import prod

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from partitioner.capture.captured_graph import TORCH, Graph, Known, Side, ancestors
from partitioner.capture.pure_graph import trace_values
from partitioner.layout.parallel_plan import Plan
from partitioner.lowering.pieces import clean, make_op
from partitioner.lowering.role_builder import SCALAR, RoleBuilder
from partitioner.program.program import (
    Accumulate,
    CollectiveOp,
    Group,
    Operation,
    Reduction,
    TensorKind,
    TensorSpec,
)

REPLICAS = Group(("dp",))


def bodies_of(turn: int) -> tuple[str, str]:
    """The body that makes a turn's sources, once per microbatch, and the one that makes values of them."""
    return (f"totals{turn + 1}", f"known{turn + 1}") if turn else ("totals", "known")


def turns_in(bodies: Collection[str]) -> list[tuple[str, str]]:
    """The bodies that run before the first forward, in order."""
    return list(takewhile(lambda names: any(name in bodies for name in names), map(bodies_of, count())))


def emit_known(
    role: RoleBuilder, graph: Graph, plan: Plan, wanted: Sequence[Known], sources: Mapping[str, int]
) -> None:
    """Make the values `wanted`, of one turn, of their `sources` (tensors of one microbatch, by name)."""
    for known in wanted:
        totals, body = bodies_of(known.turn)
        spec, source = graph.specs[known.name], sources[known.source]
        target = role.tensor(known.name, TensorKind.SCALAR, spec)
        if known.gathered is not None:
            _emit_gathered(role, body, known, source, target)
            continue
        added = role.tensor(f"{known.name}.parts", TensorKind.SCALAR, spec)
        role.emit(totals, Accumulate(0, (source,), (added,)))
        _emit_sum(role, body, plan, added, target)


def emit_updates(role: RoleBuilder, plan: Plan, kept: Mapping[str, int]) -> dict[str, int]:
    """Totals over all parts of what each made for buffers, by name, at the end of the step."""
    totals: dict[str, int] = {}
    for name, made in kept.items():
        if (found := role.by_name.get(f"{name}.kept_total")) is not None:  # another buffer needs it too
            totals[name] = found
            continue
        spec = role.spec(made)
        added = role.tensor(f"{name}.kept", TensorKind.SCALAR, spec)
        role.emit("forward", Accumulate(0, (made,), (added,)))
        totals[name] = role.tensor(f"{name}.kept_total", TensorKind.SCALAR, spec)
        _emit_sum(role, "commit", plan, added, totals[name])
    return totals


def keep(role: RoleBuilder, value: int) -> int:
    """A value that is the same in every microbatch, as one that is there when all of them have ended."""
    if not role.tensors[value].is_per_microbatch:
        return value
    if (found := role.by_name.get(f"kept.{value}")) is not None:
        return found
    kept = role.tensor(f"kept.{value}", TensorKind.SCALAR, role.spec(value))
    return role.simple("forward", "keep", "aten.clone.default(v0)", [value], kept)


def _emit_sum(role: RoleBuilder, body: str, plan: Plan, added: int, target: int) -> None:
    """The sum over replicas of what each has added up."""
    if plan.dp > 1:
        role.collective(body, CollectiveOp.ALL_REDUCE, Reduction.SUM, REPLICAS, added, target)
        role.wait(body, target)
    else:
        role.simple(body, "copy", "aten.clone.default(v0)", [added], target)


def _emit_gathered(role: RoleBuilder, body: str, known: Known, source: int, target: int) -> None:
    """The replicas' samples side by side (there is one microbatch)."""
    assert known.gathered is not None
    dim, outer, parts = known.gathered
    spec = role.spec(source)
    before, length, after = prod(spec.shape[:dim]), spec.shape[dim], prod(spec.shape[dim + 1 :])
    rows = TensorSpec((length // outer, before, outer, after), spec.dtype)
    all_rows = TensorSpec((rows.shape[0] * parts, *rows.shape[1:]), spec.dtype)
    whole = role.spec(target)

    def made(name: str, code: str, source: int, spec: TensorSpec) -> int:
        tensor = role.tensor(f"{known.name}.{name}", TensorKind.SCALAR, spec)
        return role.simple(body, name, code, [source], tensor)

    cut = made("cut", f"aten.reshape.default(v0, {[before, outer, rows.shape[0], after]})", source,
               TensorSpec((before, outer, rows.shape[0], after), spec.dtype))  # fmt: skip
    turned = made("turned", "aten.permute.default(v0, [2, 0, 1, 3])", cut, rows)
    mine = made("rows", "aten.clone.default(v0, memory_format=torch.contiguous_format)", turned, rows)
    gathered = role.tensor(f"{known.name}.all_rows", TensorKind.SCALAR, all_rows)
    role.collective(body, CollectiveOp.ALL_GATHER, Reduction.NONE, REPLICAS, mine, gathered)
    role.wait(body, gathered)
    back = made("back", "aten.permute.default(v0, [1, 2, 0, 3])", gathered,
                TensorSpec((before, outer, all_rows.shape[0], after), spec.dtype))  # fmt: skip
    role.simple(body, "whole", f"aten.reshape.default(v0, {list(whole.shape)})", [back], target)


def emit_tail(role: RoleBuilder, graph: Graph, plan: Plan, values: Mapping[str, int]) -> tuple[int, int]:
    """Sum up what the parts made, and make the loss of it; returns the tensors of (loss, count)."""
    assert graph.tail is not None
    sums: dict[str, int] = {}
    for name in graph.summed:
        spec = graph.specs[name]
        added = role.tensor(f"{name}.parts", TensorKind.SCALAR, spec)
        role.emit("forward", Accumulate(0, (values[name],), (added,)))
        sums[name] = role.tensor(f"{name}.total", TensorKind.SCALAR, spec)
        _emit_sum(role, "loss", plan, added, sums[name])
    reads = [
        *(sums[name] for name in graph.summed),
        *(keep(role, values[n]) for n in graph.tail.inputs[len(graph.summed) :]),
    ]
    ops, outputs = _tail_ops(graph.tail, graph, plan)
    loss = role.tensor("tail.loss", TensorKind.SCALAR, graph.specs[graph.loss])
    seeds = [role.tensor(f"seed.{name}", TensorKind.SCALAR, graph.specs[name]) for name in graph.summed]
    segment = role.pool.add("loss", [role.spec(r) for r in reads], ops, outputs)
    role.compute("loss", segment, reads, [loss, *seeds])
    total, count = (role.tensor(f"step.{name}", TensorKind.SCALAR, SCALAR) for name in ("loss", "count"))
    role.emit("loss", Accumulate(0, (loss, keep(role, values[graph.count])), (total, count)))
    return total, count


def _tail_ops(tail: Side, graph: Graph, plan: Plan) -> tuple[list[Operation], list[int]]:
    """The loss (a replica's share of it) and its gradients by the sums, as one segment's operations."""
    number = len(graph.summed)
    inputs = [graph.specs[name] for name in tail.inputs]

    def joint(*values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        leaves = [
            v.detach().requires_grad_(i < number and v.is_floating_point()) for i, v in enumerate(values)
        ]
        with torch.enable_grad():
            (loss,) = tail.graph(*leaves)
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        grads = iter(torch.autograd.grad(loss, wanted, allow_unused=True))
        found = [next(grads) if leaf.requires_grad else None for leaf in leaves[:number]]
        filled = [torch.zeros_like(v) if g is None else g for g, v in zip(found, values, strict=False)]
        return loss.detach() / plan.dp, *filled

    with FakeTensorMode(allow_non_fake_inputs=True):
        values = [torch.empty(spec.shape, dtype=TORCH[spec.dtype]) for spec in inputs]
    traced = trace_values(joint, values)
    clean(traced.graph)
    nodes = list(traced.graph.nodes)
    results = nodes[-1].args[0]
    needed = ancestors(results)
    places = [n for n in nodes if n.op == "placeholder"]
    calls = [n for n in nodes if n in needed and n.op == "call_function"]
    numbers = {n: i for i, n in enumerate([*places, *calls])}
    return [make_op(n, numbers) for n in calls], [numbers[r] for r in results]
