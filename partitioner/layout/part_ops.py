"""Communication between the parts of a batch inside a unit, with its gradients.

A sum over replicas passes to every replica's loss, so its gradient is the sum of theirs; what was gathered goes back
as the sum of what all replicas have for it.
"""

from collections.abc import Callable, Mapping
from math import prod
from typing import Any

import torch

import kernels.ops  # noqa: F401  (registers the operators below)

own = torch.ops.orchestrate


class _SumParts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return own.sum_parts(x)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        return own.sum_parts(grads[0])


class _AllGatherParts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, parts: int) -> torch.Tensor:
        ctx.parts = parts
        return own.all_gather_parts(x, parts)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return own.reduce_scatter_parts(grads[0].contiguous(), ctx.parts), None


def sum_parts(x: torch.Tensor) -> torch.Tensor:
    """The sum over replicas."""
    return _SumParts.apply(x)


def gather_parts(x: torch.Tensor, dim: int, outer: int, parts: int) -> torch.Tensor:
    """The replicas' samples side by side in `dim`, which is [outer, samples ...]."""
    before, after = x.shape[:dim], x.shape[dim + 1 :]
    rows = x.reshape(prod(before), outer, x.shape[dim] // outer, prod(after)).permute(2, 0, 1, 3).contiguous()
    gathered = _AllGatherParts.apply(rows, parts)
    return gathered.permute(1, 2, 0, 3).reshape(*before, x.shape[dim] * parts, *after)


BETWEEN_PARTS: Mapping[Any, Callable[..., torch.Tensor]] = {
    own.sum_parts.default: sum_parts,
    own.gather_parts.default: gather_parts,
}
