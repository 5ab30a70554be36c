"""Where dims are after an operation that only moves entries: views by their strides, reshapes by their sizes."""

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from torch.fx import Node
from torch.utils._python_dispatch import _disable_current_modes

from partitioner.capture.captured_graph import op_name

RESHAPES = frozenset(["view", "reshape", "_unsafe_view", "flatten", "unflatten", "view_as", "reshape_as"])
STRIDED = frozenset(
    ("transpose", "permute", "t", "movedim", "swapaxes", "swapdims", "numpy_T", "mT", "unsqueeze", "squeeze",
     "expand", "select", "slice", "narrow", "unbind", "split", "split_with_sizes", "chunk")
)  # fmt: skip
SAME_PLACE = frozenset(("contiguous", "clone", "to", "_to_copy", "alias", "detach"))
POINTWISE = SAME_PLACE.union(
    ("type_as", "dropout", "where", "masked_fill", "relu6", "selu", "celu", "hardswish", "hardsigmoid", "hardtanh",
     "silu", "mish", "softplus", "logsigmoid", "clamp", "clip", "square", "pow", "rsub", "addcmul", "addcdiv",
     "nan_to_num", "zeros_like", "ones_like", "full_like")
)  # fmt: skip


def strided_views(run: Callable[[torch.Tensor], Any], shape: Sequence[int]) -> tuple[Any, list[torch.Tensor]]:
    """What a viewing operation makes of a tensor whose dim d has the stride 2**d: as it is, and as a list."""
    with _disable_current_modes():
        seen = run(torch.empty_strided(tuple(shape), [2**d for d in range(len(shape))], device="meta"))
    return seen, list(seen) if isinstance(seen, tuple | list) else [seen]


def place_in(view: torch.Tensor, dim: int, size: int) -> int | None:
    """Where a dim of the source of a strided view is, if all of it is there."""
    found = [d for d, stride in enumerate(view.stride()) if stride == 2**dim and view.shape[d] == size]
    return found[0] if len(found) == 1 else None


def reshaped_place(before: Sequence[int], dim: int, after: Sequence[int]) -> int | None:
    """Where a dim (or its outermost part) begins after a reshape."""
    outer = prod(before[:dim])
    return next((d for d, size in enumerate(after) if size > 1 and prod(after[:d]) == outer), None)


def followed(node: Node, source: Node, dim: int) -> int | None:
    """Where a dim of `source` is in the result of `node`, which only moves entries, or treats each by itself."""
    name, before = op_name(node.target), tuple(source.meta["val"].shape)
    value: Any = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return None
    if name in SAME_PLACE or is_pointwise(node.target):
        place = dim + value.dim() - len(before)
        return place if value.shape[place] == before[dim] else None
    if name in RESHAPES:
        return reshaped_place(before, dim, tuple(value.shape))
    if name in STRIDED:
        _, views = strided_views(lambda x: node.target(x, *node.args[1:], **node.kwargs), before)  # type: ignore[operator]
        return place_in(views[0], dim, before[dim])
    if name == "index" and node.args[0] is source:
        return indexed_place(node.args[1], dim)
    if name in ("batch_norm", "_weight_norm"):
        return (
            dim if node.args[0] is source and dim == (1 if name == "batch_norm" else node.args[2]) else None
        )
    if name == "index_select":
        return dim if node.args[0] is source and dim != int(node.args[1]) % len(before) else None  # type: ignore[arg-type]
    return None


def indexed_place(indices: Any, dim: int) -> int | None:
    """Where a dim is after `x[indices]`: whole-number indices of neighbouring dims, None for the others."""
    used = [d for d, index in enumerate(indices) if index is not None]
    values = [indices[d].meta["val"] if isinstance(indices[d], Node) else indices[d] for d in used]
    if (
        dim in used
        or used != list(range(used[0], used[-1] + 1))
        or any(v.dtype is torch.bool for v in values)
    ):
        return None
    return dim if dim < used[0] else dim - len(used) + max(v.dim() for v in values)


def is_pointwise(target: object) -> bool:
    """Whether an operator treats every entry by itself."""
    tagged = isinstance(target, torch._ops.OpOverload) and torch.Tag.pointwise in target.tags
    return tagged or op_name(target) in POINTWISE
