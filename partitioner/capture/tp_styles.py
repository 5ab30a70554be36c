"""Tensor-parallel styles: how each parameter of a unit is cut along the tp axis, fused projections among them.

The model's own plan decides where it has one (`tp_plan`, Hugging Face's `_tp_plan`). Elsewhere weights are coloured
along the data flow: a weight whose every upstream weight is column-wise becomes row-wise, all others column-wise,
which gives Megatron's pairing (Shoeybi et al. 2019) for attention and MLP blocks. DTensor keeps any choice correct;
the colouring only decides how much is communicated. Projections that hold several in one weight: `fused_projections`.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch.fx import Node

aten = torch.ops.aten
NodeTest: TypeAlias = Callable[[Node], bool]
COLUMN, ROW, VOCAB, REPLICATE, FUSED = "colwise", "rowwise", "vocab", "replicate", "fused"
# weight position and bias position among the arguments
MATMULS: dict[Any, tuple[int, int | None]] = {
    aten.linear.default: (1, 2), aten.addmm.default: (2, 0), aten.mm.default: (1, None), aten.matmul.default: (1, None),
}  # fmt: skip


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
    if style.startswith(FUSED):  # followed by the dim, see `fused_projections`
        return int(style.partition(":")[2])
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
