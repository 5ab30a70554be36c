"""Fused projections: one weight for query, key and value (or gate and up), seen with the dims that the model gives it.

A matmul whose output features are at once seen as several dims ([3, heads, width], [heads, 3 * width], ...) or split
into equal parts becomes one of a weight with those dims: W[.., d1, d2, .., ..]. Tensor parallelism may then cut any of
them: the first that the model does not take apart, which for attention is the heads, wherever they stand. Every chip
gets its share of each part (Megatron stores such weights interleaved for the same end). The parameter's memory layout
does not change, only its view. Parts of unequal size (fewer key than query heads in one weight) stay as they are:
correct, but gathered.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from math import prod
from typing import Any

import torch
from torch.fx import Node

from partitioner.capture.captured_graph import Graph, Template, op_name, operand
from partitioner.capture.tp_styles import FUSED, MATMULS, REPLICATE
from partitioner.program.program import TensorSpec

aten = torch.ops.aten
VIEWS = {"view", "reshape", "unflatten", "_unsafe_view"}
SPLITS = {"split", "split_with_sizes", "chunk"}
TAKING_APART = {*SPLITS, "unbind", "select", "slice", "narrow", "getitem"}
SAME_PLACE = {"contiguous", "clone", "to", "_to_copy", "alias"}


def project(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, is_out_first: bool
) -> torch.Tensor:
    """x[.., in] times a weight with several dims of features: [.., d1, d2, ..]."""
    features = weight.shape[:-1] if is_out_first else weight.shape[1:]
    flat = weight.reshape(prod(features), -1) if is_out_first else weight.reshape(weight.shape[0], -1).t()
    made = torch.nn.functional.linear(x, flat, None if bias is None else bias.reshape(-1))
    return made.view(*x.shape[:-1], *features)


def unfuse(graph: Graph, tp: int) -> Graph:
    """The graph with every fused projection seen by its dims; the same object if there is none."""
    homes: dict[str, set[tuple[int, int]]] = {}
    for unit in graph.units:
        for position, name in enumerate(unit.params):
            homes.setdefault(name, set()).add((unit.template, position))
    specs, templates, changed = dict(graph.specs), list(graph.templates), False
    for index, template in enumerate(graph.templates):
        shared = {p for name, places in homes.items() if len(places) > 1 for t, p in places if t == index}
        made = _unfuse_template(template, shared, tp)
        if made is template:
            continue
        templates[index], changed = made, True
        for unit in graph.units:
            if unit.template == index:
                specs |= dict(zip(unit.params, made.inputs, strict=False))
    return replace(graph, templates=tuple(templates), specs=specs) if changed else graph


def _unfuse_template(template: Template, shared: set[int], tp: int) -> Template:
    module = torch.fx.GraphModule(template.graph, torch.fx.Graph())
    output = module.graph.graph_copy(template.graph.graph, {})
    module.graph.output(output)
    placeholders = [n for n in module.graph.nodes if n.op == "placeholder"]
    params = {n: i for i, n in enumerate(placeholders[: template.num_params]) if i not in shared}
    inputs, styles = list(template.inputs), list(template.tp_styles)
    for node in list(module.graph.nodes):
        user = _only_user(node)
        if user is not None and _is_fusable(node, params, template):
            _unfuse_node(node, user, params, inputs, styles, tp)
    if inputs == list(template.inputs):
        return template
    module.graph.eliminate_dead_code()
    return replace(template, graph=module, inputs=tuple(inputs), tp_styles=tuple(styles))


def _only_user(node: Node) -> Node | None:
    return next(iter(node.users)) if node.target in MATMULS and len(node.users) == 1 else None


def _is_fusable(node: Node, params: dict[Node, int], template: Template) -> bool:
    """Whether weight and bias belong to this matmul alone, and the weight is to be cut."""
    weight, bias = _weight_and_bias(node)
    if weight in params and template.tp_styles[params[weight]] == REPLICATE:
        return False
    return all(p in params and len(p.users) == 1 for p in (weight, bias) if p is not None)


def _weight_and_bias(node: Node) -> tuple[Node, Node | None]:
    weight_at, bias_at = MATMULS[node.target]
    bias = node.args[bias_at] if bias_at is not None and len(node.args) > bias_at else None
    assert bias is None or isinstance(bias, Node)
    return operand(node, weight_at), bias


def _unfuse_node(
    node: Node, user: Node, params: dict[Node, int], inputs: list[TensorSpec], styles: list[str], tp: int
) -> None:
    dims = _features(node, user)
    cut = _dim_to_cut(user, dims, tp)
    if cut is None:
        return
    weight, bias = _weight_and_bias(node)
    is_out_first = node.target is aten.linear.default
    x = operand(node, 1 if node.target is aten.addmm.default else 0)
    width = weight.meta["val"].shape[1 if is_out_first else 0]
    shape = (*dims, width) if is_out_first else (width, *dims)
    _see_as(weight, shape, cut if is_out_first else cut + 1, params, inputs, styles)
    if bias is not None:
        _see_as(bias, dims, cut, params, inputs, styles)
    graph = node.graph
    with graph.inserting_before(user):
        made = graph.call_function(project, (x, weight, bias, is_out_first))
        made.meta = dict(node.meta)
        with node.meta["val"].fake_mode:
            made.meta["val"] = node.meta["val"].view(*node.meta["val"].shape[:-1], *dims)
    if op_name(user.target) in SPLITS:
        for part in list(user.users):
            with graph.inserting_before(part):
                chosen = graph.call_function(aten.select.int, (made, -2, part.args[1]))
                chosen.meta = dict(part.meta)
            part.replace_all_uses_with(chosen)
            graph.erase_node(part)
        graph.erase_node(user)
    elif made.meta["val"].shape == user.meta["val"].shape:
        user.replace_all_uses_with(made)
    else:
        user.args = (made, list(user.meta["val"].shape))
        user.target = aten.reshape.default


def _features(node: Node, user: Node) -> tuple[int, ...]:
    """The dims that output features are seen as; one if they stay together."""
    shape, name = tuple(node.meta["val"].shape), op_name(user.target)
    if name in VIEWS:
        seen = tuple(user.meta["val"].shape)
        for count in range(2, len(seen) + 1):
            if prod(seen[-count:]) == shape[-1]:
                return seen[-count:]
    if name in SPLITS:
        widths = {int(v.shape[-1]) for v in user.meta["val"]}
        dim = user.args[2] if len(user.args) > 2 else 0
        if len(widths) == 1 and dim in (-1, len(shape) - 1) and _is_all(user):
            return len(user.meta["val"]), widths.pop()
    return (shape[-1],)


def _is_all(split: Node) -> bool:
    return all(op_name(user.target) == "getitem" for user in split.users)


def _dim_to_cut(user: Node, dims: Sequence[int], tp: int) -> int | None:
    """The first of several feature dims that the model keeps whole and that divides."""
    if len(dims) < 2:
        return None
    apart = {0} if op_name(user.target) in SPLITS else set(_taken_apart(user, len(dims)))
    return next((d for d, size in enumerate(dims) if d not in apart and size % tp == 0), None)


def _taken_apart(view: Node, number: int) -> Iterator[int]:
    """Which of the last `number` dims of a view are selected from or split, followed through moves of dims."""
    rank = view.meta["val"].dim()
    open_ = [(view, {rank - number + d: d for d in range(number)})]
    while open_:
        node, places = open_.pop()
        for user in node.users:
            name = op_name(user.target)
            if name in TAKING_APART and name != "getitem":
                dim = _dim_of(user, node)
                if dim in places and not _takes_all(user, node):
                    yield places[dim]
                elif name == "slice":
                    open_.append((user, places))
            moved = _followed(user, node, places)
            if moved is not None:
                open_.append((user, moved))


def _dim_of(user: Node, source: Node) -> int:
    at = 1 if op_name(user.target) in ("select", "unbind", "slice", "narrow") else 2
    dim: Any = user.args[at] if len(user.args) > at else 0
    return int(dim % source.meta["val"].dim())


def _takes_all(user: Node, source: Node) -> bool:
    value = user.meta["val"]
    return isinstance(value, torch.Tensor) and value.shape == source.meta["val"].shape


def _followed(user: Node, source: Node, places: dict[int, int]) -> dict[int, int] | None:
    """Where dims are after an operation that only moves them; None if it does something else."""
    name, rank = op_name(user.target), source.meta["val"].dim()
    args: Any = user.args
    if name in SAME_PLACE:
        return places
    order: list[Any] = list(range(rank))
    if name == "permute":
        order = [d % rank for d in args[1]]
    elif name == "transpose":
        first, second = args[1] % rank, args[2] % rank
        order[first], order[second] = order[second], order[first]
    elif name == "unsqueeze":
        order.insert(args[1] % (rank + 1), None)
    elif name == "squeeze" and len(args) > 1 and isinstance(args[1], int):
        del order[args[1] % rank]
    else:
        return None
    return {after: places[before] for after, before in enumerate(order) if before in places}


def _see_as(
    param: Node,
    shape: Sequence[int],
    cut: int,
    params: dict[Node, int],
    inputs: list[TensorSpec],
    styles: list[str],
) -> None:
    """Declare the parameter with these dims, cut at one of them."""
    index = params[param]
    inputs[index] = TensorSpec(tuple(shape), inputs[index].dtype)
    styles[index] = f"{FUSED}:{cut}"
    with param.meta["val"].fake_mode:
        param.meta["val"] = param.meta["val"].view(inputs[index].shape)
