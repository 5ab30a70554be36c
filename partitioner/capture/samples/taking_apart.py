"""Operators that no rule covers, as torch expresses them by others: what they consist of tells how they spread."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch._decomp import decomposition_table
from torch._subclasses.functional_tensor import FunctionalTensorMode, dispatch_functionalize
from torch.fx import Node
from torch.fx.experimental.proxy_tensor import make_fx

from partitioner.capture.forwards.user_functions import AppliedFunction
from partitioner.capture.pure_graph import inline_numbers, trace_values

# What these consist of has no backward where no gradient is asked for, as in traces of them.
WITHOUT_BACKWARD = {torch.ops.aten.embedding_bag.default, torch.ops.aten.embedding_bag.padding_idx}


def consists_of_others(node: Node) -> bool:
    """Whether torch can say what an operator consists of."""
    target = node.target
    if isinstance(target, AppliedFunction):
        return True
    if target in WITHOUT_BACKWARD:
        return False
    return isinstance(target, torch._ops.OpOverload) and (
        target._can_decompose() or target in decomposition_table
    )


def put_apart(node: Node) -> tuple[list[Node], Any]:
    """What a node consists of, put before it: (the new nodes, the result: a node or several)."""
    operands = node.all_input_nodes

    def run(*given: torch.Tensor) -> Any:
        known = dict(zip(operands, given, strict=True))
        args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), lambda n: known[n])
        return node.target(*args, **kwargs)  # type: ignore[operator]

    inner = _traced(run, node, [n.meta["val"] for n in operands])
    return _copied(inner, node, operands)


@dataclass(frozen=True)
class Backward:
    """The backward of a node, put before it: stand-ins for its results' gradients, the steps, gradients of operands."""

    tangents: list[Node]
    steps: list[Node]
    grads: list[Node | None]


def put_backward_apart(node: Node) -> Backward:
    """What the backward of a function of the user's own consists of."""
    operands = node.all_input_nodes
    value = node.meta["val"]
    results = list(value) if isinstance(value, tuple | list) else [value]
    tangents = []
    for result in results:
        tangents.append(node.graph.call_function(torch.ops.aten.empty.memory_format, (list(result.shape),)))
        tangents[-1].meta = dict(node.meta) | {"val": result.detach()}

    def run(*given: torch.Tensor) -> Any:
        leaves = [g.detach().requires_grad_(g.is_floating_point()) for g in given[: len(operands)]]
        with torch.enable_grad():
            made = node.target(*leaves)  # type: ignore[operator]
        outs = [o for o in (made if isinstance(made, tuple | list) else [made]) if o.requires_grad]
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        seeds = [s for s, o in zip(given[len(operands) :], outs, strict=False)]
        found = iter(torch.autograd.grad(outs, wanted, seeds, allow_unused=True) if outs and wanted else ())
        return tuple(next(found, None) if leaf.requires_grad else None for leaf in leaves)

    places = [*operands, *tangents]
    traced = trace_values(run, [n.meta["val"].detach() for n in places])
    inline_numbers(traced)
    traced.graph.eliminate_dead_code(is_impure_node=lambda n: n.op in ("placeholder", "output"))
    steps, grads = _copied(traced, node, places)
    return Backward(tangents, steps, list(grads))


def _traced(run: Callable[..., Any], node: Node, values: list[torch.Tensor]) -> torch.fx.GraphModule:
    table: Any = {op: how for op, how in decomposition_table.items() if op is node.target}
    with torch.no_grad():
        traced = make_fx(
            dispatch_functionalize(run, FunctionalTensorMode(pre_dispatch=False)), tracing_mode="real",
            decomposition_table=table, _allow_non_fake_inputs=True,
        )(*(v.detach() for v in values))  # fmt: skip
    inline_numbers(traced)
    return traced


def _copied(inner: torch.fx.GraphModule, node: Node, operands: list[Node]) -> tuple[list[Node], Any]:
    steps = list(inner.graph.nodes)
    places = [n for n in steps if n.op == "placeholder"]
    known: dict[Node, Node] = dict(zip(places, operands, strict=True))
    with node.graph.inserting_before(node):
        for step in steps[len(places) : -1]:
            known[step] = node.graph.node_copy(step, lambda n: known[n])
            known[step].meta = dict(node.meta) | {"val": step.meta.get("val")}
    made = [known[step] for step in steps[len(places) : -1]]
    return made, torch.fx.node.map_arg(steps[-1].args[0], lambda n: known[n])


def replace_by(node: Node, result: Any) -> None:
    """Put what a node consists of in its place."""
    if isinstance(result, Node):
        node.replace_all_uses_with(result)
    else:
        for user in list(node.users):
            user.replace_all_uses_with(result[user.args[1]])
            node.graph.erase_node(user)
    node.graph.erase_node(node)
