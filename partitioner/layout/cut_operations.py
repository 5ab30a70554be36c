"""Every operation on cut values: which rule it has, and what is done where there is none."""

from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from partitioner.capture.captured_graph import op_name
from partitioner.capture.products.dim_places import RESHAPES, is_pointwise
from partitioner.layout.cut_products import PRODUCT_RULES
from partitioner.layout.cut_rules import RULES, CutCall, pointwise
from partitioner.layout.cut_values import CutTensor, is_any_cut
from partitioner.layout.part_ops import gather_parts, sum_parts
from partitioner.layout.vocabulary import VOCABULARY_RULES

own = torch.ops.orchestrate
ALL_RULES = {**RULES, **PRODUCT_RULES, **VOCABULARY_RULES}
# What may see the entries beyond the end of a padded slice: it does not mix them in, and makes zeros of zeros.
# (Sums of weights may not: they are no weights then, see `pointwise`.)
PADDED = frozenset(
    ("to", "_to_copy", "clone", "contiguous", "alias", "detach", "add", "sub", "mul", "neg", "tanh", "slice", "select",
     "unsqueeze", "transpose", "permute", "embedding", "cross_entropy_loss")
).union(PRODUCT_RULES, RESHAPES)  # fmt: skip


def cut_result(call: CutCall) -> Any:
    """What an operation with cut operands gives on one chip, or None: it is to get whole ones."""
    return _of_dtypes(_by_rule(call), call.out)


def _of_dtypes(result: Any, like: Any) -> Any:
    """Autocast chooses by the operator, and rules compute with others, such as a sum for a bias."""
    if isinstance(result, CutTensor):
        return result.with_local(_of_dtypes(result.local, like))
    if isinstance(result, tuple | list):
        return type(result)(_of_dtypes(r, one) for r, one in zip(result, like, strict=True))
    return result.to(like.dtype) if isinstance(result, torch.Tensor) else result


def _by_rule(call: CutCall) -> Any:
    name = op_name(call.target)
    if call.target is own.keyed_uniform.default:
        return _drawn(call)
    if name not in PADDED and not _is_even(call):
        return None
    if call.target is own.sum_parts.default:
        return call.x.with_local(sum_parts(call.x.local))
    if call.target is own.gather_parts.default:
        return _gathered(call)
    rule = ALL_RULES.get(name)
    if rule is None:
        return pointwise(call) if is_pointwise(call.target) else None
    return rule(call) if name in PRODUCT_RULES or name in VOCABULARY_RULES or _leads(call) else None


def _is_even(call: CutCall) -> bool:
    values = [leaf for leaf in tree_leaves((call.args, dict(call.kwargs))) if isinstance(leaf, CutTensor)]
    return all(call.group.is_even(value.sections) for value in values)


def _leads(call: CutCall) -> bool:
    """Whether the first operand is cut, or one of several first ones."""
    return isinstance(call.x, CutTensor | list | tuple) and is_any_cut(call.x)


def _drawn(call: CutCall) -> Any:
    """Random numbers for a cut value: all of them on every chip, which then takes its own."""
    like, drawn = call.args[2], call.target(*call.args[:2], None, *call.args[3:])
    if not isinstance(like, CutTensor) or tuple(drawn.shape) != tuple(like.shape):
        return drawn
    return CutTensor(call.group.sliced(drawn, like.dim, like.sections), like.dim, like.sections)


def _gathered(call: CutCall) -> Any:
    x, dim, *how = call.args
    return None if dim == x.dim else x.with_local(gather_parts(x.local, dim, *how))
