"""Tensor-parallel styles: whether a weight is to be cut along what its product makes, or along what it sums over.

The model's own plan decides where it has one (`tp_plan`, Hugging Face's `_tp_plan`). Elsewhere weights are coloured
along the data flow: a weight whose every upstream weight is column-wise becomes row-wise, all others column-wise,
which gives Megatron's pairing (Shoeybi et al. 2019) for attention, MLP blocks and convolutions. Any choice is right;
the colouring only decides how much is communicated. Which dim that is, and whether it divides: `layout/param_cuts`.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

from torch import nn
from torch.fx import Node

from comms.errors import CaptureError
from partitioner.capture.captured_graph import op_name
from partitioner.capture.products.param_uses import bias_of, lookups, product_uses

NodeTest: TypeAlias = Callable[[Node], bool]
COLUMN, ROW, VOCAB, REPLICATE = "colwise", "rowwise", "vocab", "replicate"
STYLES = (COLUMN, ROW, VOCAB, "fused_qkv", REPLICATE)
# these need all features of an entry: what comes before is made whole, so that nothing after it can stay cut
WHOLE_FEATURES = frozenset(("layer_norm", "rms_norm"))


def param_styles(
    names: Sequence[str],
    params: Sequence[Node],
    inside: set[Node],
    plan: Mapping[str, str],
    is_model: NodeTest,
    depends_on_batch: NodeTest,
) -> tuple[str, ...]:
    """One style per parameter, in the order given."""
    places = {param: i for i, param in enumerate(params)}
    nodes = sorted(inside, key=lambda n: n.meta["index"])
    found: dict[Node, str] = {}
    for table, _ in lookups(nodes, places):
        users = [n for n in table.users if n in inside and n.args[0] is table]
        is_by_batch = any(depends_on_batch(i) for n in users for i in n.all_input_nodes[1:])
        is_whole = not is_by_batch or _planned(names[places[table]], plan) == REPLICATE
        found[table] = REPLICATE if is_whole else VOCAB
    colours: dict[Node, str] = {}
    for use in product_uses(nodes, places):
        style = _planned(names[places[use.param]], plan) or (
            ROW if not use.shared and _is_column(use.other, colours, inside, is_model) else COLUMN
        )
        colours.setdefault(use.node, style)
        found.setdefault(use.param, style)
        bias = bias_of(use.node, places)
        if bias is not None:
            found.setdefault(bias, style if style == COLUMN else REPLICATE)
    return tuple(found.get(param, REPLICATE) for param in params)


def own_plan(module: nn.Module) -> Mapping[str, str]:
    """What a module says of itself: `_tp_plan` (Hugging Face's) or `tp_plan`. Raises CaptureError for unknown names."""
    if isinstance(plan := getattr(module, "_tp_plan", None), Mapping) and plan:
        return dict(plan)
    plan = getattr(module, "tp_plan", None)
    where, hint = (
        f"{type(module).__name__}.tp_plan",
        f"map names of modules (* for a part) to {', '.join(STYLES)}",
    )
    if plan is not None and not isinstance(plan, Mapping):
        raise CaptureError(f"tp_plan is a {type(plan).__name__}", where, hint)
    paths = [path for path, _ in module.named_modules()]
    for style in (plan or {}).values():
        if not isinstance(style, str) or _known(style) is None:
            raise CaptureError(f"{style!r} is no tensor-parallel style", where, hint)
    if plan and not any(_fits(str(pattern), path) for pattern in plan for path in paths):
        raise CaptureError(f"no module is called {', '.join(map(str, plan))}", where, hint)
    return dict(plan or {})


def _fits(pattern: str, path: str) -> bool:
    return re.fullmatch(re.escape(pattern).replace(r"\*", r"[^.]+"), path) is not None


def _planned(name: str, plan: Mapping[str, str]) -> str | None:
    module = name.rsplit(".", 1)[0]
    for pattern, style in plan.items():
        if _fits(pattern, module):
            return _known(style)
    return None


def _known(style: str) -> str | None:
    if style.startswith("colwise"):
        return COLUMN
    if style.startswith("rowwise"):
        return ROW
    return {"vocab": VOCAB, "fused_qkv": COLUMN, "replicate": REPLICATE, "replicated": REPLICATE}.get(style)


def _is_column(value: Node, colours: Mapping[Node, str], inside: set[Node], is_model: NodeTest) -> bool:
    """True when every path back from a value meets a column-wise weight before it leaves the unit."""
    stack, seen, columns = [value], set(), 0
    while stack:
        current = stack.pop()
        if current in seen:
            continue
        seen.add(current)
        if current in colours:
            if colours[current] != COLUMN:
                return False
            columns += 1
        elif current in inside and op_name(current.target) not in WHOLE_FEATURES:
            stack.extend(current.all_input_nodes)
        elif is_model(current) and current.op != "placeholder":
            return False
    return columns > 0
