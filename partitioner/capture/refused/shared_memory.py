"""Shared memory: tensors that lie where a trained parameter or a changing buffer lies follow it in plain PyTorch.

On chips every tensor has memory of its own, so those are refused. The same object under several names is one tensor.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence

import torch
from torch import nn

from comms.errors import CaptureError
from partitioner.capture.captured_graph import constants_of


def require_own_memory(
    module: nn.Module,
    given: Mapping[str, torch.Tensor],
    traced: torch.fx.GraphModule,
    updated: Collection[str],
) -> None:
    """Refuse what training would change unseen. `given`: the batch; `updated`: buffers that the forward changes.
    Raises CaptureError."""
    named: list[tuple[str, torch.Tensor]] = [*module.named_parameters(), *module.named_buffers()]
    moving = {id(t): place for place, (n, t) in enumerate(named) if t.requires_grad or n in updated}
    named += [(f"the batch's {name}", value.detach()) for name, value in given.items()]
    read = [*named, *(("", value) for _, value in constants_of(traced))]
    found = [(moving[id(read[one][1])], other, one) for one, other in _overlapping([v for _, v in read])
             if id(read[one][1]) in moving]  # fmt: skip
    if found:
        _, other, one = min(found)
        name, (known, held) = read[one][0], read[other]
        what = known or f"a tensor of shape {tuple(held.shape)} that the forward reads"
        raise CaptureError(f"{what} lies in the memory of {name}, which training changes", type(module).__name__,
                           f"use {name} itself in the forward, or a clone")  # fmt: skip


def _overlapping(values: Sequence[torch.Tensor]) -> Iterator[tuple[int, int]]:
    """Places of different tensors that share bytes, each pair both ways; by where they begin, as most share none."""
    spans = sorted((*span, place) for place, value in enumerate(values) if (span := _span(value)) is not None)
    for at, (_, stop, one) in enumerate(spans):
        for later in range(at + 1, len(spans)):
            start, _, other = spans[later]
            if start >= stop:
                break
            if values[one] is not values[other]:
                yield one, other
                yield other, one


def _span(value: torch.Tensor) -> tuple[int, int] | None:
    """First byte, and the one after the last; None for tensors without memory."""
    if value.is_meta or value.layout is not torch.strided or not value.numel():
        return None
    if isinstance(value, torch._subclasses.FakeTensor):
        return None
    length = sum((size - 1) * stride for size, stride in zip(value.shape, value.stride(), strict=True)) + 1
    return value.data_ptr(), value.data_ptr() + length * value.element_size()
