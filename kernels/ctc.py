"""Connectionist temporal classification (Graves et al. 2006) sample by sample, registered under `orchestrate::`.

`ctc_losses(log_probs [steps, samples, classes], targets [samples, longest], chosen, input_lengths [samples],
target_lengths [samples], blank, zero_infinity)`: the losses, [samples]. `chosen`, if given, says which targets count;
else the first ones do. Torch's own operator does it, whose tables are as long as the longest target: their size depends
on values. `ctc_gradients(grad [samples], ...)`: the gradient by log_probs, by the same tables made once more.
"""

import math
from typing import Any

import torch

_LIBRARY = torch.library.Library("orchestrate", "FRAGMENT")
GIVEN = (
    "Tensor log_probs, Tensor targets, Tensor? chosen, Tensor input_lengths, Tensor target_lengths, int blank, "
    "bool zero_infinity"
)
_LIBRARY.define(f"ctc_losses({GIVEN}) -> Tensor")
_LIBRARY.define(f"ctc_gradients(Tensor grad, {GIVEN}) -> Tensor")


def _counted(
    log_probs: torch.Tensor, targets: torch.Tensor, chosen: torch.Tensor | None, lengths: torch.Tensor
) -> torch.Tensor:
    """The targets that count, one sample's after the other's, or rows of them; torch reads beyond its tables for others
    than classes."""
    numbers = lengths.to(targets.device, torch.int64)
    first = torch.arange(targets.shape[1], device=targets.device) < numbers.unsqueeze(1)
    if chosen is not None and not torch.equal(chosen.sum(1), numbers):
        raise ValueError("target_lengths are not the numbers of targets that the mask selects of each sample")
    counted = targets.masked_select(first if chosen is None else chosen)
    if counted.numel() and not 0 <= int(counted.min()) <= int(counted.max()) < log_probs.shape[2]:
        raise ValueError(f"a target is no class of 0 to {log_probs.shape[2] - 1}")
    return targets if chosen is None else counted


def _ctc_losses(
    log_probs: torch.Tensor, targets: torch.Tensor, chosen: torch.Tensor | None, input_lengths: torch.Tensor,
    target_lengths: torch.Tensor, blank: int, zero_infinity: bool,
) -> torch.Tensor:  # fmt: skip
    counted = _counted(log_probs, targets, chosen, target_lengths)
    losses, _ = torch._ctc_loss(log_probs, counted, input_lengths, target_lengths, blank, zero_infinity)
    return losses.masked_fill(losses == math.inf, 0.0) if zero_infinity else losses


def _ctc_gradients(
    grad: torch.Tensor, log_probs: torch.Tensor, targets: torch.Tensor, chosen: torch.Tensor | None,
    input_lengths: torch.Tensor, target_lengths: torch.Tensor, blank: int, zero_infinity: bool,
) -> torch.Tensor:  # fmt: skip
    counted = _counted(log_probs, targets, chosen, target_lengths)
    given = (log_probs, counted, input_lengths, target_lengths)
    losses, tables = torch._ctc_loss(*given, blank, zero_infinity)
    made = torch.ops.aten._ctc_loss_backward(grad.contiguous(), *given, losses, tables, blank, zero_infinity)
    return made.contiguous()


def _save(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    del output
    *tensors, ctx.blank, ctx.zero_infinity = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    made = torch.ops.orchestrate.ctc_gradients(grad, *ctx.saved_tensors, ctx.blank, ctx.zero_infinity)
    return made, *[None] * 6


_LIBRARY.impl("ctc_losses", _ctc_losses, "CompositeExplicitAutograd")
_LIBRARY.impl("ctc_gradients", _ctc_gradients, "CompositeExplicitAutograd")
torch.library.register_fake(
    "orchestrate::ctc_losses", lambda log_probs, *_: log_probs.new_empty(log_probs.shape[1]), lib=_LIBRARY
)
torch.library.register_fake(
    "orchestrate::ctc_gradients", lambda _, log_probs, *__: log_probs.new_empty(log_probs.shape), lib=_LIBRARY
)
torch.library.register_autograd("orchestrate::ctc_losses", _backward, setup_context=_save, lib=_LIBRARY)
