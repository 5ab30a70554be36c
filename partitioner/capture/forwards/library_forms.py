"""What models of libraries do by values or by the host's draws, in operators that can be captured.

Mixtures of experts, looped over or grouped, are products of rows with their experts' matrices (`expert_mm`): a loop
over the experts that have tokens, or a sort of tokens by expert, depends on values and mixes samples. The classes of
experts in transformers are known by the interface through which they choose their implementation; all of its
implementations compute the same. Its networks for sound mask spans of time (SpecAugment) that numpy draws: here they
are drawn as dropout is, by the same rules. A layer that is dropped with probability 0 is not dropped. That labels of
`ctc_loss` are below the number of classes, which transformers asks in the forward, the operator asks where it runs.
"""

import re
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.nn import functional

import kernels.expert_products  # noqa: F401  (registers orchestrate::expert_mm)
from comms.errors import CaptureError
from partitioner.capture.forwards.keyed_random import keyed_random
from partitioner.capture.forwards.replaced import replaced
from partitioner.capture.source_lines import running_line

TRANSFORMERS = "transformers.integrations.moe"
MASKING = "_compute_mask_indices"
OF_MODELS = re.compile(r"transformers\.models\..*\.modeling_")
UNIFORM = "_is_uniform"  # marks a number drawn from [0, 1)
CHANCE = "_is_chance"  # marks whether it is below another
LOOPED_OR_GROUPED = (None, "eager", "grouped_mm")
ROWS, MATRICES = 2, 3  # dims of operands that `expert_mm` covers


def library_forms() -> AbstractContextManager[None]:
    """Inside the block experts are computed by `expert_mm`, and what is asked of chance and of labels is answered."""
    changed: list[tuple[Any, str, object]] = [
        (owner, name, partial(_grouped_mm, getattr(owner, name)))
        for owner, name in ((functional, "grouped_mm"), (torch, "_grouped_mm"))
    ]
    if (interface := getattr(sys.modules.get(TRANSFORMERS), "ExpertsInterface", None)) is not None:
        chosen = partial(_implementation, interface.get_interface)
        changed.append((interface, "get_interface", lambda self, *names: chosen(self, *names)))
    changed += [
        (torch, "rand", partial(_drawn, torch.rand)),
        (torch.Tensor, "__lt__", _method(_below, torch.Tensor.__lt__)),
        *((kind, "__bool__", _method(_truth, kind.__bool__)) for kind in (torch.Tensor, FunctionalTensor)),
    ]  # fmt: skip
    return replaced(changed)


@contextmanager
def keyed_draws(key: torch.Tensor, first_sample: torch.Tensor) -> Iterator[None]:
    """Inside the block torch draws by keys (see `keyed_random`), and so does what masks spans of time of numpy's."""
    models = [m for name, m in list(sys.modules.items()) if OF_MODELS.match(name) and MASKING in vars(m)]
    masking = [
        (torch, "tensor", partial(_copied, torch.tensor)),
        *((m, MASKING, masked_spans) for m in models),
    ]
    with keyed_random(key, first_sample), replaced(masking):
        yield


def _method(form: Callable[..., Any], original: Callable[..., Any]) -> Callable[..., Any]:
    return lambda value, *rest: form(original, value, *rest)


def _drawn(original: Callable[..., torch.Tensor], *shape: Any, **said: Any) -> torch.Tensor:
    value = original(*shape, **said)
    if not value.dim():
        setattr(value, UNIFORM, True)
    return value


def _below(original: Callable[..., Any], value: torch.Tensor, other: Any) -> Any:
    if isinstance(other, int | float) and other <= 0 and getattr(value, UNIFORM, False):
        return torch.zeros((), dtype=torch.bool)
    found = original(value, other)
    if getattr(value, UNIFORM, False):
        setattr(found, CHANCE, True)
    return found


def _truth(original: Callable[..., bool], value: torch.Tensor) -> bool:
    frame = sys._getframe(2)
    asks_labels = frame.f_code.co_qualname.endswith("ForCTC.forward")
    if getattr(value, CHANCE, False):
        problem = "the forward goes by chance one way or another, as where whole layers are dropped"
        hint = "set layerdrop to 0; where both ways can be computed, choose with torch.where"
        raise CaptureError(problem, running_line(), hint)
    return not (asks_labels and OF_MODELS.match(str(frame.f_globals.get("__name__")))) and original(value)


def _copied(original: Callable[..., torch.Tensor], data: Any, **said: Any) -> torch.Tensor:
    if not isinstance(data, torch.Tensor):
        return original(data, **said)
    made = data.detach().clone().to(said.get("device") or data.device, said.get("dtype") or data.dtype)
    return made.requires_grad_() if said.get("requires_grad") else made


def masked_spans(
    shape: tuple[int, int], mask_prob: float, mask_length: int, attention_mask: torch.Tensor | None = None,
    min_masks: int = 0,
) -> torch.Tensor:  # fmt: skip
    """Which steps [samples, steps] are in spans that SpecAugment masks (Park et al. 2019), chosen as by transformers.

    A share of `mask_prob`, in spans of `mask_length` whose starts differ; a sample too short for one loses its last
    step where others have any.
    """
    samples, steps = shape
    if not 1 <= mask_length <= steps:
        raise ValueError(
            f"`mask_length` has to be between 1 and the sequence's length {steps}, is {mask_length}"
        )
    rounding = torch.rand((), dtype=torch.float64)

    def number_of(length: torch.Tensor) -> torch.Tensor:
        spans = (mask_prob * length / mask_length + rounding).long().clamp(min=min_masks)
        fitting = spans.clamp(max=steps // mask_length)
        return torch.minimum(fitting, (length - (mask_length - 1)).clamp(min=0))

    whole = torch.full((samples,), steps)
    length = whole if attention_mask is None else attention_mask.detach().sum(-1)
    spans, places = number_of(length), torch.arange(steps)
    drawn = torch.rand((samples, steps), dtype=torch.float64)
    order = drawn.masked_fill(places > (length - mask_length).unsqueeze(1), 2.0).argsort(1).argsort(1)
    started = (order < spans.unsqueeze(1)).long().cumsum(1)
    masked = started > functional.pad(started, (mask_length, 0))[:, :steps]
    is_short = (spans == 0) & (number_of(whole) > 0)
    return masked | (is_short.unsqueeze(1) & (places == steps - 1))


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
