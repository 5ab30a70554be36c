"""Grouped products of matrices, as experts use them: what they cost, and their shapes in every dtype.

torch counts no FLOPs of them, and knows their shapes in bfloat16 only, though its kernels compute more.
"""

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch._subclasses.fake_impls import register_op_impl

GROUPED = torch.ops.aten._grouped_mm
MATRIX = 2  # dims of an operand whose rows or columns are cut into groups by offsets


def grouped_flops(a: Sequence[int], b: Sequence[int], *_: Any, **__: Any) -> int:
    """Of operands of these shapes: every row is in one group, whichever that is; a multiply-add is 2."""
    return 2 * (prod(b) * a[-2] if len(a) > MATRIX == len(b) else prod(a) * b[-1])


@register_op_impl(lambda op: op is GROUPED.default)
def _shape(
    mode: Any, _op: Any, a: torch.Tensor, b: torch.Tensor, offs: torch.Tensor | None = None,
    bias: torch.Tensor | None = None, out_dtype: torch.dtype | None = None,
) -> Any:  # fmt: skip
    if a.dtype == torch.bfloat16:
        return NotImplemented
    del bias
    groups = [len(offs)] if a.dim() == b.dim() == MATRIX and offs is not None else []
    groups = [a.shape[0]] if a.dim() == b.dim() > MATRIX else groups
    with mode:
        return torch.empty(*groups, a.shape[-2], b.shape[-1], dtype=out_dtype or a.dtype, device=a.device)
