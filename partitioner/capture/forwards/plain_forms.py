"""Functions of torch that look at values on the way, or take their input apart, in operators that can be captured.

Each computes what torch's own does, except for its complaints about values (a negative variance).
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy
import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.nn import functional
from torch.utils import _pytree as trees

import kernels.ctc  # noqa: F401  (registers orchestrate::ctc_losses)
from partitioner.capture.forwards.replaced import replaced

BATCHED = 2  # dims of indices that are bags of one length each
ROWS = 2  # dims of targets, a row for each sample
SAMPLES_SECOND = 3  # dims of log-probabilities of several samples
REDUCTIONS = ("none", "mean", "sum")
FORMS = ("cross_entropy", "gaussian_nll_loss", "embedding_bag", "instance_norm")
originals: Mapping[str, Callable[..., Any]] = {name: getattr(functional, name) for name in FORMS} | {
    "cov": torch.cov, "stft": torch.stft, "istft": torch.istft, "repeat_interleave": torch.repeat_interleave,
    "masked_select": torch.masked_select, "__getitem__": torch.Tensor.__getitem__,
    "__setitem__": torch.Tensor.__setitem__, "ctc_loss": torch.ctc_loss,
}  # fmt: skip


def _reduced(value: torch.Tensor, reduction: str) -> torch.Tensor:
    return value.mean() if reduction == "mean" else value.sum() if reduction == "sum" else value


def gaussian_nll_loss(
    input: torch.Tensor,  # noqa: A002  (torch's own name)
    target: torch.Tensor,
    var: Any,
    full: bool = False,
    eps: float = 1e-6,
    reduction: str = "mean",
) -> torch.Tensor:
    """See torch; no gradient passes through the clamping of the variance."""
    variance = var if isinstance(var, torch.Tensor) else torch.full_like(input, var)
    if variance.shape == input.shape[:-1] != input.shape:
        variance = variance.unsqueeze(-1)
    other = [own for size, own in zip(input.shape, variance.shape, strict=False) if size != own]
    if variance.dim() != input.dim() or other not in ([], [1]):
        raise ValueError("var is of incorrect size")
    if reduction not in REDUCTIONS:
        raise ValueError(f"{reduction} is not valid")
    variance = variance + (variance.detach().clamp(min=eps) - variance.detach())
    loss = 0.5 * (torch.log(variance) + (input - target) ** 2 / variance)
    return _reduced(loss + 0.5 * math.log(2 * math.pi) if full else loss, reduction)


def cross_entropy(
    input: torch.Tensor,  # noqa: A002  (torch's own name)
    target: torch.Tensor, weight: torch.Tensor | None = None, size_average: Any = None,
    ignore_index: int = -100, reduce: Any = None, reduction: str = "mean", label_smoothing: float = 0.0,
) -> torch.Tensor:  # fmt: skip
    """See torch; classes with weights and smoothing are written out, all else is torch's."""
    if weight is None or not label_smoothing or target.is_floating_point():
        return originals["cross_entropy"](
            input, target, weight, size_average, ignore_index, reduce, reduction, label_smoothing
        )
    classes = 0 if input.dim() == 1 else 1
    logs = torch.log_softmax(input, classes)
    valid = target != ignore_index
    chosen = torch.where(valid, target, 0)
    shape = [-1 if d == classes else 1 for d in range(input.dim())]
    mass = torch.where(valid, functional.embedding(chosen, weight.unsqueeze(-1)).squeeze(-1), 0.0)
    picked = -logs.gather(classes, chosen.unsqueeze(classes)).squeeze(classes) * mass
    spread = torch.where(valid, -(logs * weight.view(shape)).sum(classes), 0.0)
    each = picked * (1 - label_smoothing) + spread * (label_smoothing / input.shape[classes])
    return each.sum() / mass.sum() if reduction == "mean" else _reduced(each, reduction)


def embedding_bag(
    input: torch.Tensor,  # noqa: A002  (torch's own name)
    weight: torch.Tensor,
    offsets: torch.Tensor | None = None,
    *rest: Any,
    **given: Any,
) -> torch.Tensor:
    """See torch; bags of one length are lookups, of which those that are no padding are reduced."""
    names = ("max_norm", "norm_type", "scale_grad_by_freq", "mode", "sparse", "per_sample_weights",
             "include_last_offset", "padding_idx")  # fmt: skip
    said = {**dict(zip(names, rest, strict=False)), **given}
    mode, weights, padding = (said.get(name) for name in ("mode", "per_sample_weights", "padding_idx"))
    unusual = ("max_norm", "scale_grad_by_freq", "sparse")
    if input.dim() != BATCHED or not input.shape[1] or any(said.get(n) not in (None, False) for n in unusual):
        return originals["embedding_bag"](input, weight, offsets, **said)
    rows = functional.embedding(input.long(), weight)
    rows = rows if weights is None else rows * weights.unsqueeze(-1)
    if padding is None:
        return rows.sum(1) if mode == "sum" else rows.max(1).values if mode == "max" else rows.mean(1)
    counts = (input != padding % weight.shape[0]).unsqueeze(-1)
    if mode == "max":  # of nothing but padding it is zero
        largest = rows.masked_fill(~counts, -math.inf).max(1).values
        return torch.where(counts.any(1), largest, torch.zeros((), dtype=rows.dtype))
    total = torch.where(counts, rows, 0.0).sum(1)
    return total if mode == "sum" else total / counts.sum(1).clamp(min=1)


def instance_norm(
    input: torch.Tensor,  # noqa: A002  (torch's own name)
    running_mean: torch.Tensor | None = None, running_var: torch.Tensor | None = None,
    weight: torch.Tensor | None = None, bias: torch.Tensor | None = None,
    use_input_stats: bool = True, momentum: float = 0.1, eps: float = 1e-5,
) -> torch.Tensor:  # fmt: skip
    """See torch; running statistics move towards the means of those of all samples."""
    if running_mean is None or running_var is None or not use_input_stats:
        return originals["instance_norm"](
            input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps
        )
    with torch.no_grad():
        dims = list(range(2, input.dim()))
        for running, found in ((running_mean, input.mean(dims)), (running_var, input.var(dims))):
            running.mul_(1 - momentum).add_(found.mean(0), alpha=momentum)
    return originals["instance_norm"](input, None, None, weight, bias, True, momentum, eps)


def cov(
    input: torch.Tensor,  # noqa: A002  (torch's own name)
    *, correction: int = 1, fweights: torch.Tensor | None = None, aweights: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """See torch, whose own compares values; with weights it is torch's."""
    if fweights is not None or aweights is not None:
        return originals["cov"](input, correction=correction, fweights=fweights, aweights=aweights)
    rows = input if input.dim() > 1 else input.reshape(1, -1)
    centred = rows - rows.mean(1, keepdim=True)
    return (centred @ centred.t().conj() / max(rows.shape[1] - correction, 0)).squeeze()


def corrcoef(input: torch.Tensor) -> torch.Tensor:  # noqa: A002  (torch's own name)
    """See torch."""
    covariances = cov(input)
    if covariances.dim() == 0:
        return covariances / covariances
    spread = covariances.diagonal().real.sqrt()
    found = covariances / spread.unsqueeze(1) / spread
    if found.is_complex():
        return torch.complex(found.real.clamp(-1, 1), found.imag.clamp(-1, 1))
    return found.clamp(-1, 1)


def stft(
    input: torch.Tensor,  # noqa: A002  (torch's own name)
    n_fft: int, hop_length: int | None = None, win_length: int | None = None, window: torch.Tensor | None = None,
    center: bool = True, pad_mode: str = "reflect", normalized: bool = False, onesided: bool | None = None,
    return_complex: bool | None = None, align_to_window: bool | None = None,
) -> torch.Tensor:  # fmt: skip
    """See torch, whose own takes frames by their place in memory."""
    if return_complex is None or align_to_window is not None:
        return originals["stft"](
            input, n_fft, hop_length, win_length, window, center, pad_mode, normalized, onesided, return_complex,
            align_to_window,
        )  # fmt: skip
    signal = input.reshape(1, -1, input.shape[-1])
    if center:
        signal = functional.pad(signal, [n_fft // 2] * 2, pad_mode)
    frames = signal.reshape(*input.shape[:-1], signal.shape[-1]).unfold(-1, n_fft, hop_length or n_fft // 4)
    frames = frames * _filled(window, win_length or n_fft, n_fft, input)
    is_half = onesided is not False and not frames.is_complex()
    made = (torch.fft.rfft if is_half else torch.fft.fft)(frames, norm="ortho" if normalized else None)
    made = made.transpose(-1, -2)
    return made if return_complex else torch.view_as_real(made)


def istft(
    input: torch.Tensor,  # noqa: A002  (torch's own name)
    n_fft: int, hop_length: int | None = None, win_length: int | None = None, window: torch.Tensor | None = None,
    center: bool = True, normalized: bool = False, onesided: bool | None = None, length: int | None = None,
    return_complex: bool = False,
) -> torch.Tensor:  # fmt: skip
    """See torch, whose own looks whether the windows leave gaps."""
    if return_complex or onesided is False or (onesided is None and input.shape[-2] == n_fft):
        return originals["istft"](
            input, n_fft, hop_length, win_length, window, center, normalized, onesided, length, return_complex
        )
    hop, count = hop_length or n_fft // 4, input.shape[-1]
    frames = torch.fft.irfft(input.transpose(-1, -2), n_fft, norm="ortho" if normalized else None)
    shape = _filled(window, win_length or n_fft, n_fft, frames)

    def overlapped(parts: torch.Tensor) -> torch.Tensor:
        columns = parts.reshape(-1, count, n_fft).transpose(1, 2)
        return functional.fold(columns, (1, n_fft + hop * (count - 1)), (1, n_fft), stride=(1, hop)).flatten(
            1
        )

    start = n_fft // 2 if center else 0
    end = n_fft + hop * (count - 1) - start if length is None else start + length
    weights = overlapped((shape**2).expand(count, n_fft))[:, start:end]
    found = overlapped(frames * shape)[:, start:end] / weights
    found = functional.pad(found, [0, end - start - found.shape[1]])
    return found.reshape(*input.shape[:-2], end - start)


def _filled(window: torch.Tensor | None, length: int, n_fft: int, like: torch.Tensor) -> torch.Tensor:
    """A window of `length` amid `n_fft` places."""
    made = like.real.new_ones(length) if window is None else window
    left = (n_fft - length) // 2
    return functional.pad(made, [left, n_fft - length - left])


def repeat_interleave(
    input: torch.Tensor,  # noqa: A002  (torch's own name)
    repeats: Any = None, dim: int | None = None, *, output_size: int | None = None,
) -> torch.Tensor:  # fmt: skip
    """See torch; constant repeats tell how long the result is."""
    held = _constant(repeats)
    if held is not None and output_size is None:
        of_each = input.numel() if dim is None else input.shape[dim]
        output_size = int(held.sum()) * (of_each if held.numel() == 1 else 1)
    given = (input,) if repeats is None else (input, repeats, dim)
    return originals["repeat_interleave"](*given, output_size=output_size)


def masked_select(
    input: torch.Tensor,  # noqa: A002  (torch's own name)
    mask: torch.Tensor, *, out: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """See torch; a constant mask tells how much it selects."""
    if _constant(mask) is None or out is not None:
        if out is None and Selected.may_be(input, mask):
            return Selected(input, mask)  # type: ignore[return-value]
        return originals["masked_select"](input, mask, out=out)
    shape = torch.broadcast_shapes(input.shape, mask.shape)
    return _indexed(input.expand(shape), mask.expand(shape))


def _indexed(value: torch.Tensor, index: Any) -> torch.Tensor:
    """See torch; constant masks become the places that they name."""
    if isinstance(index, torch.Tensor) and Selected.may_be(value, index) and _constant(index) is None:
        return Selected(value, index)  # type: ignore[return-value]
    return originals["__getitem__"](value, _places(index))


def _written(value: torch.Tensor, index: Any, new: Any) -> None:
    """See torch; constant masks become the places that they name, unless one number is written to all. What any other
    mask gets everywhere is written where it holds."""
    is_one = not isinstance(new, torch.Tensor) or new.dim() == 0
    if not is_one and _is_for_all(value, index, new) and _constant(index) is None:
        holds = index.reshape(*index.shape, *[1] * (value.dim() - index.dim()))
        value.copy_(torch.where(holds, new, value))
        return
    originals["__setitem__"](value, index if is_one else _places(index), new)


def _is_for_all(value: torch.Tensor, mask: Any, new: torch.Tensor) -> bool:
    """Whether a mask gives the same to all entries that it selects."""
    if not isinstance(mask, torch.Tensor) or mask.dtype != torch.bool or not mask.dim():
        return False
    is_own = mask.shape == value.shape[: mask.dim()] and new.dtype == value.dtype
    return is_own and new.dim() <= value.dim() - mask.dim()


def _places(index: Any) -> Any:
    found: list[Any] = []
    for each in index if isinstance(index, tuple) else (index,):
        is_list = isinstance(each, list) and each and all(isinstance(e, bool) for e in each)
        mask = torch.as_tensor(each) if is_list or isinstance(each, numpy.ndarray) else each
        held = _constant(mask)
        is_mask = held is not None and held.dtype in (torch.bool, torch.uint8) and held.dim()
        found += mask.nonzero(as_tuple=True) if is_mask else [each]
    return tuple(found) if isinstance(index, tuple) or len(found) > 1 else found[0]


def _constant(value: object) -> torch.Tensor | None:
    """The numbers of a tensor that holds some in a capture: it was made of numbers alone."""
    inner = value.from_functional() if isinstance(value, FunctionalTensor) else value
    return inner if isinstance(inner, torch.Tensor) and not isinstance(inner, FakeTensor) else None


class Selected:
    """Targets that a mask selects: `ctc_loss` takes them, anything else has to know how many there are."""

    def __init__(self, rows: torch.Tensor, chosen: torch.Tensor) -> None:
        self.rows, self.chosen = rows, chosen

    @staticmethod
    def may_be(value: torch.Tensor, mask: torch.Tensor) -> bool:
        """Whether a mask selects numbers of targets, [samples, longest]."""
        is_whole = value.dtype in (torch.int64, torch.int32) and mask.dtype == torch.bool
        return is_whole and value.dim() == ROWS and value.shape == mask.shape

    def unknown(self, *_: Any, **__: Any) -> Any:
        """Raises what torch does where the number of selected values matters."""
        return originals["masked_select"](self.rows, self.chosen)

    @classmethod
    def __torch_function__(cls, _: object, __: object, args: tuple[Any, ...] = (), given: Any = None) -> Any:
        values = trees.tree_leaves((args, given), is_leaf=lambda v: isinstance(v, cls))
        return next(v for v in values if isinstance(v, cls)).unknown()

    def __getattr__(self, name: str) -> Any:
        return self.unknown()


OPERATORS = {n for n in dir(torch.Tensor) if n[:2] == "__"} - {
    *dir(type),
    *dir(Selected),
    "__array_priority__",
}
for _name in OPERATORS | {
    *["__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__", "__str__", "__repr__", "__format__"]
}:
    setattr(Selected, _name, Selected.unknown)


def ctc_loss(
    log_probs: torch.Tensor, targets: torch.Tensor, input_lengths: Any, target_lengths: Any, blank: int = 0,
    reduction: Any = "mean", zero_infinity: bool = False,
) -> torch.Tensor:  # fmt: skip
    """See torch; of several samples, each with a row of targets or with those that a mask selects of it."""
    said = REDUCTIONS[reduction] if isinstance(reduction, int) else reduction
    if said not in REDUCTIONS:
        raise ValueError(f"{said} is not a valid value for reduction")
    rows, chosen = (targets.rows, targets.chosen) if isinstance(targets, Selected) else (targets, None)
    if log_probs.dim() != SAMPLES_SECOND or rows.dim() != ROWS:
        number = REDUCTIONS.index(said)
        return originals["ctc_loss"](
            log_probs, targets, input_lengths, target_lengths, blank, number, zero_infinity
        )
    taken, counted = _lengths(input_lengths), _lengths(target_lengths)
    for name, value in (("input_lengths", taken), ("target_lengths", counted), ("targets", rows)):
        if value.shape[:1] != log_probs.shape[1:2]:
            raise RuntimeError(f"{name} must be of size batch_size")
    losses = torch.ops.orchestrate.ctc_losses(log_probs, rows, chosen, taken, counted, blank, zero_infinity)
    return _reduced(losses / counted.clamp(min=1) if said == "mean" else losses, said)


def _lengths(given: Any) -> torch.Tensor:
    if isinstance(given, torch.Tensor):
        return given
    is_one = len(set(given)) == 1  # the length of all samples, of however many a part has
    return torch.full((len(given),), given[0]) if is_one else torch.tensor(given, dtype=torch.int64)


@contextmanager
def plain_forms() -> Iterator[None]:
    """Inside the block torch's functions are these."""
    forms: tuple[tuple[Any, Callable[..., torch.Tensor]], ...] = (
        *((functional, form) for form in (gaussian_nll_loss, cross_entropy, embedding_bag, instance_norm, ctc_loss)),
        *((owner, form) for owner in (torch, torch.Tensor)
          for form in (cov, corrcoef, repeat_interleave, masked_select)),
        (torch, ctc_loss), (torch, stft), (torch, istft),  # which the methods of tensors ask for
    )  # fmt: skip
    others = (
        (torch.Tensor, "__getitem__", _indexed),
        (torch.Tensor, "__setitem__", _written),
        (torch.distributions.Distribution, "_validate_args", False),  # which looks at values
    )
    with replaced([*((owner, form.__name__, form) for owner, form in forms), *others]):
        yield
