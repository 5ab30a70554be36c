"""Tensor-parallel styles: how each parameter of a unit is cut along the tp axis, fused projections among them.

The model's own plan decides where it has one (`tp_plan`, Hugging Face's `_tp_plan`). Elsewhere weights are coloured
along the data flow: a weight whose every upstream weight is column-wise becomes row-wise, all others column-wise,
which gives Megatron's pairing (Shoeybi et al. 2019) for attention and MLP blocks. DTensor keeps any choice correct;
the colouring only decides how much is communicated.

A matmul whose output is split into k equal parts along its last dim becomes k matmuls on slices of the same
parameter, seen as [.., k, width, ..]; tp then cuts `width`, and every chip gets its share of each part (Megatron
stores such weights interleaved for the same end). The parameter's memory layout does not change, only its view.
Parts of unequal width (grouped heads in one weight) stay fused: correct, but gathered.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import Any, TypeAlias

import torch
from torch.fx import Node

from partitioner.capture.captured_graph import Graph, Template, op_name, operand
from partitioner.program.program import TensorSpec

aten = torch.ops.aten
NodeTest: TypeAlias = Callable[[Node], bool]
COLUMN, ROW, VOCAB, REPLICATE, FUSED = "colwise", "rowwise", "vocab", "replicate", "fused"
# weight position and bias position among the arguments
MATMULS: dict[Any, tuple[int, int | None]] = {
    aten.linear.default: (1, 2), aten.addmm.default: (2, 0), aten.mm.default: (1, None), aten.matmul.default: (1, None),
}  # fmt: skip
SPLITS = {aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default, aten.split.sizes}
VIEWS = {aten.view.default, aten.reshape.default}


def param_styles(
    names: Sequence[str],
    params: Sequence[Node],
    inside: set[Node],
    plan: Mapping[str, str],
    is_model: NodeTest,
    depends_on_batch: NodeTest,
) -> tuple[str, ...]:
    """One style per parameter, in the order given."""
    found: dict[Node, str] = {}
    colours: dict[Node, str] = {}
    for node in sorted(inside, key=lambda n: n.meta["index"]):
        if node.target is aten.embedding.default and node.args[0] in params:
            indexed_by_batch = any(depends_on_batch(n) for n in node.all_input_nodes[1:])
            weight = node.args[0]
            assert isinstance(weight, Node)
            found[weight] = VOCAB if indexed_by_batch else REPLICATE
        weight = _weight(node)
        if weight is None or weight not in params:
            continue
        name = names[list(params).index(weight)]
        style = _planned(name, plan) or (
            ROW if _upstream_is_column(node, colours, inside, is_model) else COLUMN
        )
        colours[node] = style
        found.setdefault(weight, style)
        bias = _bias(node)
        if bias is not None:
            found.setdefault(bias, style if style == COLUMN else REPLICATE)
    return tuple(found.get(param, REPLICATE) for param in params)


def shard_dim(style: str, node: Node, param: Node) -> int | None:
    """The dim of `param` that tp cuts when `node` uses it in `style`; None = replicated."""
    if style == REPLICATE:
        return None
    if style == FUSED:  # [.., parts, width, ..], see `unfuse`: each use selects one part
        if node.target is not aten.select.int:
            return None
        selected = node.args[1]
        assert isinstance(selected, int)
        return selected + 1
    if node.target is aten.embedding.default:
        return 0
    if _bias(node) is param:
        return 0 if style == COLUMN else None
    if _weight(node) is not param:
        return None
    is_out_first = node.target is aten.linear.default
    return (0 if is_out_first else 1) if style in (COLUMN, VOCAB) else (1 if is_out_first else 0)


def _weight(node: Node) -> Node | None:
    return _parameter(node, 0)


def _bias(node: Node) -> Node | None:
    return _parameter(node, 1)


def _parameter(node: Node, which: int) -> Node | None:
    """What stands at the weight's or the bias's place of a matmul, if that is a parameter."""
    place = MATMULS.get(node.target, (None, None))[which]
    found = node.args[place] if place is not None and place < len(node.args) else None
    return found if isinstance(found, Node) and found.op == "placeholder" else None


def _planned(name: str, plan: Mapping[str, str]) -> str | None:
    module = name.rsplit(".", 1)[0]
    for pattern, style in plan.items():
        if re.fullmatch(re.escape(pattern).replace(r"\*", r"[^.]+"), module):
            return _known(style)
    return None


def _known(style: str) -> str | None:
    if style.startswith("colwise"):
        return COLUMN
    if style.startswith("rowwise"):
        return ROW
    return {"vocab": VOCAB, "fused_qkv": COLUMN, "replicate": REPLICATE, "replicated": REPLICATE}.get(style)


def _upstream_is_column(
    node: Node, colours: Mapping[Node, str], inside: set[Node], is_model: NodeTest
) -> bool:
    """True when every path back from `node` meets a column-wise weight before it leaves the unit."""
    first = node.args[1 if node.target is aten.addmm.default else 0]
    stack, seen, columns = [first] if isinstance(first, Node) else [], set(), 0
    while stack:
        current = stack.pop()
        if current in seen:
            continue
        seen.add(current)
        if current in colours:
            if colours[current] != COLUMN:
                return False
            columns += 1
        elif current in inside:
            stack.extend(current.all_input_nodes)
        elif is_model(current) and current.op != "placeholder":
            return False
    return columns > 0


def unfuse(graph: Graph) -> Graph:
    """The graph with every fused projection taken apart; the same object if there is none."""
    homes: dict[str, set[tuple[int, int]]] = {}
    for unit in graph.units:
        for position, name in enumerate(unit.params):
            homes.setdefault(name, set()).add((unit.template, position))
    specs, templates, changed = dict(graph.specs), list(graph.templates), False
    for index, template in enumerate(graph.templates):
        shared = {p for name, places in homes.items() if len(places) > 1 for t, p in places if t == index}
        made = _unfuse_template(template, shared)
        if made is template:
            continue
        templates[index], changed = made, True
        for unit in graph.units:
            if unit.template == index:
                specs |= dict(zip(unit.params, made.inputs, strict=False))
    return replace(graph, templates=tuple(templates), specs=specs) if changed else graph


def _unfuse_template(template: Template, shared: set[int]) -> Template:
    module = torch.fx.GraphModule(template.graph, torch.fx.Graph())
    copies: dict[Node, Node] = {}
    output = module.graph.graph_copy(template.graph.graph, copies)
    module.graph.output(output)
    placeholders = [n for n in module.graph.nodes if n.op == "placeholder"]
    params = {n: i for i, n in enumerate(placeholders[: template.num_params]) if i not in shared}
    inputs, styles = list(template.inputs), list(template.tp_styles)
    for node in list(module.graph.nodes):
        split = _split_of(node)
        if split is None or split.target not in SPLITS:
            continue
        parts = [user for user in split.users if op_name(user.target) == "getitem"]
        if _take_apart(node, split, parts, params, inputs, styles):
            module.graph.eliminate_dead_code()
    if inputs == list(template.inputs):
        return template
    return replace(template, graph=module, inputs=tuple(inputs), tp_styles=tuple(styles))


def _split_of(node: Node) -> Node | None:
    """The split that is the only use of a matmul's output, looking through one view."""
    if node.target not in MATMULS or len(node.users) != 1:
        return None
    user = next(iter(node.users))
    if user.target in VIEWS and len(user.users) == 1:
        user = next(iter(user.users))
    return user


def _take_apart(
    node: Node,
    split: Node,
    parts: list[Node],
    params: dict[Node, int],
    inputs: list[TensorSpec],
    styles: list[str],
) -> bool:
    """Replace `node` and `split` by one matmul per part; False if the pattern does not hold."""
    weight_at, bias_at = MATMULS[node.target]
    weight = operand(node, weight_at)
    bias = node.args[bias_at] if bias_at is not None and len(node.args) > bias_at else None
    assert bias is None or isinstance(bias, Node)
    fused = [p for p in (weight, bias) if p is not None]
    widths = {int(v.shape[-1]) for v in split.meta["val"]}
    count = len(split.meta["val"])
    last = operand(split, 0).meta["val"].dim() - 1
    is_last = len(split.args) > 2 and split.args[2] in (-1, last)
    if (
        any(p not in params or len(p.users) != 1 for p in fused)
        or len(widths) != 1
        or not is_last
        or count < 2
    ):
        return False
    weight_dim = 0 if node.target is aten.linear.default else 1
    out_dims = {param: weight_dim if param is weight else 0 for param in fused}
    for param in fused:
        _view_param(param, out_dims[param], count, params[param], inputs, styles)
    for part in parts:
        _one_part(node, split, part, fused, out_dims)
    return True


def _view_param(
    param: Node, dim: int, count: int, index: int, inputs: list[TensorSpec], styles: list[str]
) -> None:
    """Declare the parameter as [.., count, width, ..]."""
    shape = inputs[index].shape
    inputs[index] = TensorSpec(
        (*shape[:dim], count, shape[dim] // count, *shape[dim + 1 :]), inputs[index].dtype
    )
    styles[index] = FUSED
    with param.meta["val"].fake_mode:
        param.meta["val"] = param.meta["val"].view(inputs[index].shape)


def _one_part(node: Node, split: Node, part: Node, fused: list[Node], out_dims: dict[Node, int]) -> None:
    assert callable(node.target)
    graph, index = node.graph, part.args[1]
    with graph.inserting_before(part):
        pieces = {p: graph.call_function(aten.select.int, (p, out_dims[p], index)) for p in fused}
        args = tuple(pieces.get(a, a) if isinstance(a, Node) else a for a in node.args)
        made = graph.call_function(node.target, args)
        if split.args[0] is not node:
            made = graph.call_function(aten.view.default, (made, list(part.meta["val"].shape)))
    part.replace_all_uses_with(made)
    assert prod(part.meta["val"].shape) > 0
    graph.erase_node(part)
