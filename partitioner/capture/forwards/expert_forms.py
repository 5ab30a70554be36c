"""Mixtures of experts, looped over or grouped, as products of rows with their experts' matrices (`expert_mm`).

A loop over the experts that have tokens, or a sort of tokens by expert, depends on values and mixes samples. Written as
one product, row by row, it can be captured and split. The classes of experts in transformers are known by the interface
through which they choose their implementation; all of its implementations compute the same.
"""

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch.nn import functional

import kernels.expert_products  # noqa: F401  (registers orchestrate::expert_mm)
from partitioner.capture.forwards.replaced import replaced

TRANSFORMERS = "transformers.integrations.moe"
LOOPED_OR_GROUPED = (None, "eager", "grouped_mm")
ROWS, MATRICES = 2, 3  # dims of operands that `expert_mm` covers


def expert_forms() -> AbstractContextManager[None]:
    """Inside the block experts are computed by `expert_mm`."""
    changed: list[tuple[Any, str, object]] = [
        (owner, name, partial(_grouped_mm, getattr(owner, name)))
        for owner, name in ((functional, "grouped_mm"), (torch, "_grouped_mm"))
    ]
    if (interface := getattr(sys.modules.get(TRANSFORMERS), "ExpertsInterface", None)) is not None:
        chosen = partial(_implementation, interface.get_interface)
        changed.append((interface, "get_interface", lambda self, *names: chosen(self, *names)))
    return replaced(changed)


def _grouped_mm(
    original: Callable[..., torch.Tensor], x: torch.Tensor, weights: torch.Tensor, *rest: Any, **given: Any
) -> torch.Tensor:
    offsets = given.get("offs", rest[0] if rest else None)
    others = [*rest[1:], *(v for name, v in given.items() if name != "offs")]
    if offsets is None or x.dim() != ROWS or weights.dim() != MATRICES or any(v is not None for v in others):
        return original(x, weights, *rest, **given)
    rows = torch.arange(x.shape[0], device=x.device, dtype=offsets.dtype)
    expert = torch.searchsorted(offsets, rows, right=True)
    product: torch.Tensor = torch.ops.orchestrate.expert_mm(x, weights, expert)
    return product


def _implementation(original: Callable[..., Any], interface: object, name: str | None, default: Any) -> Any:
    found = original(interface, name, default)
    return partial(_experts, found) if name in LOOPED_OR_GROUPED else found


def _experts(
    original: Callable[..., torch.Tensor], module: Any, hidden: torch.Tensor, top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """Each token [tokens, features] by the experts that it chose [tokens, k], weighted and added up."""
    if module._is_expert_parallel:
        return original(module, hidden, top_k_index, top_k_weights)
    expert = top_k_index.reshape(-1)

    def product(x: torch.Tensor, name: str) -> torch.Tensor:
        weights = getattr(module, name)
        matrices = weights if module.is_transposed else weights.transpose(-2, -1)
        out: torch.Tensor = torch.ops.orchestrate.expert_mm(x.to(weights.dtype), matrices, expert)
        return out + functional.embedding(expert, getattr(module, f"{name}_bias")) if module.has_bias else out

    rows = hidden.repeat_interleave(top_k_index.shape[-1], dim=0)
    inner = module._apply_gate(product(rows, "gate_up_proj")) if module.has_gate else (
        module.act_fn(product(rows, "up_proj")))  # fmt: skip
    out = product(inner, "down_proj")
    out = module.post_expert_norm(out) if module.has_post_expert_norm else out
    weighted = out * top_k_weights.reshape(-1, 1)
    return weighted.view(*top_k_index.shape, -1).sum(1).to(hidden.dtype)
