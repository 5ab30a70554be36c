"""Shared memory: tensors that lie where a trained parameter or a changing buffer lies follow it in plain PyTorch.

On chips every tensor has memory of its own, so those are refused. The same object under several names is one tensor.
"""

from collections.abc import Collection, Iterator

import torch
from torch import nn

from comms.errors import CaptureError


def require_own_memory(module: nn.Module, traced: torch.fx.GraphModule, updated: Collection[str]) -> None:
    """Refuse what training would change unseen. `updated`: buffers that the forward changes. Raises CaptureError."""
    named: list[tuple[str, torch.Tensor]] = [*module.named_parameters(), *module.named_buffers()]
    moving = [(n, t) for n, t in named if t.requires_grad or n in updated]
    read = [*named, *((n, t) for n, t in _constants(traced))]
    spans = [(name, value, span) for name, value in read if (span := _span(value)) is not None]
    for name, value in moving:
        span = _span(value)
        for other, held, theirs in spans:
            if span is not None and held is not value and span[0] < theirs[1] and theirs[0] < span[1]:
                unnamed = f"a tensor of shape {tuple(held.shape)} that the forward reads"
                problem = f"{unnamed if _is_constant(other) else other} lies in the memory of {name}"
                raise CaptureError(f"{problem}, which training changes", type(module).__name__,
                                   f"use {name} itself in the forward, or a clone")  # fmt: skip


def _constants(traced: torch.fx.GraphModule) -> Iterator[tuple[str, torch.Tensor]]:
    for node in traced.graph.nodes:
        value = getattr(traced, str(node.target), None) if node.op == "get_attr" else None
        if isinstance(value, torch.Tensor):
            yield f"<{node.target}>", value


def _is_constant(name: str) -> bool:
    return name.startswith("<")


def _span(value: torch.Tensor) -> tuple[int, int] | None:
    """First byte, and the one after the last; None for tensors without memory."""
    if value.is_meta or value.layout is not torch.strided or not value.numel():
        return None
    if isinstance(value, torch._subclasses.FakeTensor):
        return None
    length = sum((size - 1) * stride for size, stride in zip(value.shape, value.stride(), strict=True)) + 1
    return value.data_ptr(), value.data_ptr() + length * value.element_size()
