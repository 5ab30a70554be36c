"""Products of rows with the matrix of each row's expert, registered under `orchestrate::`.

`expert_mm(x [rows, k], weights [experts, k, n], expert [rows])`: row r is x[r] @ weights[expert[r]], [rows, n]; zeros
where there is no such expert. `expert_mm_weights(x [rows, k], grads [rows, n], expert [rows], experts)`: its gradient
by the weights, [experts, k, n]. Rows are sorted by expert, and each expert's are multiplied at once.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

_LIBRARY = torch.library.Library("orchestrate", "FRAGMENT")
_LIBRARY.define("expert_mm(Tensor x, Tensor weights, Tensor expert) -> Tensor")
_LIBRARY.define("expert_mm_weights(Tensor x, Tensor grads, Tensor expert, int experts) -> Tensor")


def _rows_by_expert(expert: torch.Tensor, experts: int) -> Iterator[tuple[int, torch.Tensor]]:
    """Each expert that has rows, and their numbers."""
    order = expert.argsort(stable=True)
    ends = torch.searchsorted(expert[order], torch.arange(experts, device=expert.device), right=True).tolist()
    start = int((expert < 0).sum())
    for number, end in enumerate(ends):
        if end > start:
            yield number, order[start:end]
        start = end


def _expert_mm(x: torch.Tensor, weights: torch.Tensor, expert: torch.Tensor) -> torch.Tensor:
    out = x.new_zeros(x.shape[0], weights.shape[2])
    for number, rows in _rows_by_expert(expert, weights.shape[0]):
        out[rows] = x[rows] @ weights[number]
    return out


def _expert_mm_weights(
    x: torch.Tensor, grads: torch.Tensor, expert: torch.Tensor, experts: int
) -> torch.Tensor:
    out = x.new_zeros(experts, x.shape[1], grads.shape[1])
    for number, rows in _rows_by_expert(expert, experts):
        out[number] = x[rows].T @ grads[rows]
    return out


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
    x, weights, expert = ctx.saved_tensors
    own = torch.ops.orchestrate
    return (
        own.expert_mm(grad, weights.transpose(1, 2), expert),
        own.expert_mm_weights(x, grad, expert, weights.shape[0]),
        None,
    )


def _save(ctx: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
    del output
    ctx.save_for_backward(*inputs)


def _flops(x: Any, other: Any, expert: Any, *rest: Any, **_: Any) -> int:
    """A row meets one matrix [k, n], forward and in the gradient by the weights."""
    del expert
    return int(2 * x[0] * x[1] * other[1 if rest else 2])


_LIBRARY.impl("expert_mm", _expert_mm, "CompositeExplicitAutograd")
_LIBRARY.impl("expert_mm_weights", _expert_mm_weights, "CompositeExplicitAutograd")
torch.library.register_fake(
    "orchestrate::expert_mm", lambda x, weights, _: x.new_empty(x.shape[0], weights.shape[2]), lib=_LIBRARY
)
torch.library.register_fake(
    "orchestrate::expert_mm_weights",
    lambda x, grads, _, experts: x.new_empty(experts, x.shape[1], grads.shape[1]),
    lib=_LIBRARY,
)
torch.library.register_autograd("orchestrate::expert_mm", _backward, setup_context=_save, lib=_LIBRARY)
register_flop_formula([torch.ops.orchestrate.expert_mm, torch.ops.orchestrate.expert_mm_weights])(_flops)
