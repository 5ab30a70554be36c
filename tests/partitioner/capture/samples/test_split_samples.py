"""Operations across samples: exchanged between replicas, known from the batch alone, or refused by name and line."""

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from comms.errors import CaptureError
from partitioner.capture.graph_units import capture_graph

Check = Callable[..., Any]
Batch = dict[str, torch.Tensor]
Function = Callable[[torch.Tensor], torch.Tensor]


def pairs(h: torch.Tensor) -> torch.Tensor:
    """All samples against all, of [samples, 4]."""
    return h @ h.t()


def contrastive(h: torch.Tensor) -> torch.Tensor:
    left, right = F.normalize(h[:, 0], dim=-1), F.normalize(h[:, 1], dim=-1)
    scores, labels = left @ right.t() / 0.2, torch.arange(len(h))
    return (F.cross_entropy(scores, labels) + F.cross_entropy(scores.t(), labels)) / 2


def two_views(h: torch.Tensor) -> torch.Tensor:
    """SimCLR: both views of a sample in one batch, a sample is not its own partner."""
    both = F.normalize(torch.cat([h[:, 0], h[:, 1]]), dim=-1)
    number = len(h)
    scores = (both @ both.t()).masked_fill(torch.eye(2 * number, dtype=torch.bool), -1e9)
    return F.cross_entropy(scores, torch.cat([torch.arange(number, 2 * number), torch.arange(number)]))


def decorrelated(h: torch.Tensor) -> torch.Tensor:
    centred = h[:, 0] - h[:, 0].mean(0)
    covariance = centred.t() @ centred / (len(h) - 1)
    return (covariance - torch.diag(torch.diag(covariance))).square().sum()


def mixed_up(h: torch.Tensor) -> torch.Tensor:
    return (0.3 * h + 0.7 * h.flip(0)).tanh().mean()


def halves(h: torch.Tensor) -> torch.Tensor:
    chosen, rejected = h.sum((1, 2)).chunk(2)
    return -F.logsigmoid(chosen - rejected).mean()


def halves_by_view(h: torch.Tensor) -> torch.Tensor:
    first, second = h.view(2, -1, 3, 4)
    return F.mse_loss(first, second)


def neighbours_by_view(h: torch.Tensor) -> torch.Tensor:
    first, second = h.view(-1, 2, 3, 4).unbind(1)
    return F.mse_loss(first, second)


def over_samples_as_time(h: torch.Tensor) -> torch.Tensor:
    return F.conv1d(h[:, 0].t().unsqueeze(0), h.new_ones(1, 4, 2)).square().mean()


# by the operator that is refused
MIXING: dict[str, tuple[str, Function]] = {
    "centring": ("sub", lambda h: (h - h.mean(0)).tanh().mean()),
    "scaling": ("div", lambda h: (h / h.square().mean(0).sqrt()).tanh().mean()),
    "deviation": ("std", lambda h: h.std(0).mean()),
    "standardizing": ("var|sub", lambda h: ((h - h.mean(0)) / (h.var(0) + 1e-5).sqrt()).tanh().mean()),
    "running sum": ("cumsum", lambda h: h.cumsum(0).sin().mean()),
    "softmax": ("softmax", lambda h: (h.softmax(0) * h).mean()),
    "sorting": ("sort", lambda h: (h.sort(0).values * torch.arange(len(h)).view(-1, 1, 1)).mean()),
    "extreme": ("max", lambda h: h.max() * h.mean()),
    "extreme of each entry": ("amax", lambda h: h.amax(0).sin().sum()),
    "median": ("median", lambda h: h.median()),
    "product": ("prod", lambda h: h.sum((1, 2)).prod()),
    "logsumexp": ("logsumexp", lambda h: h.logsumexp(0).sum()),
    "best sample": ("argmax", lambda h: h.mean() * h.sum((1, 2)).argmax()),
    "norm of all": ("linalg_vector_norm|norm", lambda h: h.norm()),
    "normalizing over samples": ("linalg_vector_norm|norm", lambda h: F.normalize(h, dim=0).sin().mean()),
    "layer norm of all": ("layer_norm|reshape|view", lambda h: F.layer_norm(h.flatten(), (h.numel(),)).sin().mean()),
    "contrastive": ("t|transpose|matmul", contrastive),
    "two views": ("t|transpose|matmul|cat", two_views),
    "decorrelated": ("sub", decorrelated),
    "distances": ("sub", lambda h: (h[:, None, 0] - h[None, :, 0]).square().sum(-1).add(1e-6).sqrt().sum()),
    "einsum of pairs": ("einsum", lambda h: torch.einsum("bd,cd->bc", h[:, 0], h[:, 1]).tanh().mean()),
    "mixup": ("flip", mixed_up),
    "rolled": ("roll", lambda h: (h * h.roll(1, 0)).mean()),
    "halves": ("chunk", halves),
    "halves by view": ("view", halves_by_view),
    "neighbours by view": ("view", neighbours_by_view),
    "first sample": ("select", lambda h: (h * h[0]).mean()),
    "some samples": ("slice", lambda h: h[:5].sin().mean()),
    "every other sample": ("slice", lambda h: (h[::2] * h[1::2]).mean()),
    "differences": ("slice", lambda h: (h[1:] - h[:-1]).square().mean()),
    "closing the circle": ("slice", lambda h: torch.cat([h, h[:1]]).diff(dim=0).square().mean()),
    "a triangle of samples": ("t|transpose|matmul", lambda h: pairs(h[:, 0]).triu(1).sin().mean()),
    "attention among samples": ("scaled_dot_product_attention", lambda h: F.scaled_dot_product_attention(
        h[None, :, 0], h[None, :, 1], h[None, :, 2]).sin().mean()),
    "samples as time": ("conv1d|convolution", over_samples_as_time),
    "detached centre": ("sub", lambda h: (h - h.detach().mean(0)).tanh().mean()),
    "samples as channels": ("view|reshape|cumsum", lambda h: h.flatten(0, 1).cumsum(0).sin().mean()),
    "padded": ("constant_pad_nd|pad", lambda h: F.pad(h[:, 0], (0, 0, 1, 0)).cumsum(1).sin().mean()),
    "a sum within": ("mul", lambda h: (h * h.sum()).tanh().mean()),
    "numbers of samples": ("mul", lambda h: (h.sum((1, 2)) * torch.arange(len(h))).sin().mean()),
    "random partner": ("argsort", lambda h: (h * h[torch.randperm(len(h))]).mean()),
}  # fmt: skip


@pytest.mark.parametrize("name", MIXING)
def test_what_mixes_samples_is_exchanged_or_refused_by_name(
    name: str, check: Check, parts_of: Check, sequences: Batch
) -> None:
    operator, function = MIXING[name]

    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        return function(m.lin(x))

    for dp in (2, 4):
        parted = check(forward, sequences, dp=dp, microbatches=1, keyed="random" in name)
        assert [t for t in parted.targets() if "gather_parts" in t or "sum_parts" in t]
    with pytest.raises(
        CaptureError, match=f"^({operator}) mixes samples.*4 parts \\(dp 2 x 2 microbatches\\)"
    ):
        parts_of(forward, sequences, dp=2, microbatches=2)


class Centring(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.lin(x)
        hidden = hidden - hidden.mean(0)
        return hidden.tanh().mean()


def test_a_refusal_names_the_line_and_what_to_do() -> None:
    line = Centring.forward.__code__.co_firstlineno + 2
    for dp, microbatches, hint in ((2, 2, "use 1 microbatch"), (1, 4, "use 1 microbatch")):
        with pytest.raises(CaptureError) as caught:
            capture_graph(Centring(), {"x": torch.ones(8, 4)}, dp=dp, microbatches=microbatches)
        assert caught.value.where == f"{__file__}:{line} (hidden = hidden - hidden.mean(0))"
        assert caught.value.hint.startswith(hint)
        assert f"dp {dp} x {microbatches} microbatches" in caught.value.problem


# what the batch alone decides is had before the forward, however many microbatches there are
KNOWN: dict[str, Callable[..., torch.Tensor]] = {
    "centred inputs": lambda m, x, y: m.lin(x - x.mean(0)).sin().mean(),
    "scaled inputs": lambda m, x, y: m.lin(x / x.square().mean().sqrt()).sin().mean(),
    "both": lambda m, x, y: m.lin((x - x.mean(0)) / (x.square().mean(0) - x.mean(0) ** 2).sqrt()).sin().mean(),
    "class counts": lambda m, x, y: (m.lin(x).sum((1, 2)) / F.one_hot(y, 3).sum(0)[y]).sum(),
    "rarity": lambda m, x, y: (m.lin(x).sum((1, 2)) * (1 - F.one_hot(y, 3).double().mean(0))[y]).mean(),
    "counts": lambda m, x, y: (m.lin(x) * torch.histc(y.double(), 4, 0, 3)).sin().mean(),
    "one needs another": lambda m, x, y: m.lin((x - x.mean(0)) / (x - x.mean(0)).square().mean().sqrt()).sin().mean(),
    "size of the batch": lambda m, x, y: m.lin(x * len(x)).sin().mean() / len(x),
}  # fmt: skip


@pytest.mark.parametrize(("dp", "microbatches"), [(2, 2), (1, 4), (4, 1)])
@pytest.mark.parametrize("name", KNOWN)
def test_what_the_batch_alone_decides_is_known_beforehand(
    name: str, dp: int, microbatches: int, check: Check, sequences: Batch
) -> None:
    batch = {**sequences, "y": torch.tensor([0, 1, 2, 0, 1, 1, 0, 1])}
    parted = check(KNOWN[name], batch, dp=dp, microbatches=microbatches)
    assert not [t for t in parted.targets() if "sum_parts" in t or "final" in t or "gather" in t]


def by_size(m: Any, x: torch.Tensor) -> torch.Tensor:
    h = m.lin(x)
    return h.square().mean() if len(x) > 4 else h.abs().mean()


def by_more_of_it(m: Any, x: torch.Tensor) -> torch.Tensor:
    h = m.lin(x)
    for _ in range(len(x)):
        h = h.sin()
    return h.mean()


@pytest.mark.parametrize("forward", [by_size, by_more_of_it])
def test_a_forward_that_does_something_else_with_fewer_samples_is_refused(
    forward: Any, parts_of: Check, sequences: Batch
) -> None:
    with pytest.raises(CaptureError, match="a part of the batch is computed differently"):
        parts_of(forward, sequences)


SIZES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "half of the samples, always": lambda h: h[: len(h) // 2],
    "windows of samples": lambda h: h.unfold(0, len(h) // 2, 1),
    "rolled by size": lambda h: h.roll(len(h) // 2, 0) * h,
    "exponent": lambda h: h.abs() ** len(h),
    "clamped by size": lambda h: h.clamp(max=len(h) / 4),
    "fill by size": lambda h: torch.full_like(h, len(h)) * h,
    "dropped rate by size": lambda h: F.leaky_relu(h, 1 / len(h)),
    "eye": lambda h: torch.eye(len(h), dtype=h.dtype) @ h[:, 0],
    "linspace": lambda h: h * torch.linspace(0, 1, len(h), dtype=h.dtype).view(-1, 1, 1),
    "arange from one": lambda h: h * torch.arange(1, len(h) + 1).view(-1, 1, 1),
    "arange backwards": lambda h: h * torch.arange(len(h), 0, -1).view(-1, 1, 1),
    "as many columns": lambda h: h[:, 0] @ torch.ones(4, len(h), dtype=h.dtype),
    "a table of size": lambda h: h * torch.zeros(len(h), len(h), dtype=h.dtype).sum(),
}  # fmt: skip


@pytest.mark.parametrize("name", SIZES)
def test_sizes_of_the_batch_are_never_those_of_a_part(name: str, check: Check, sequences: Batch) -> None:
    """Each is right under every plan that takes it, and none is taken with another number."""

    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        return SIZES[name](m.lin(x)).sin().square().mean()

    taken = 0
    for dp, microbatches in ((4, 1), (2, 2)):
        with suppress(CaptureError):
            check(forward, sequences, dp=dp, microbatches=microbatches)
            taken += 1
    assert taken or "windows" in name


def test_gathered_samples_may_be_used_and_summed_again(check: Check, sequences: Batch) -> None:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        h = m.lin(x)
        scores = pairs(h[:, 0]).softmax(-1) @ h[:, 1]
        return (scores * h[:, 2]).square().mean() + (scores.mean(0) * h.mean((0, 1))).sum()

    check(forward, sequences, dp=4, microbatches=1)
    check(forward, sequences, dp=2, microbatches=1)
