"""Losses of split batches: parts add up what counts, and the loss is the one of the whole batch, to the last digit."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from comms.errors import CaptureError

Check = Callable[..., Any]
Batch = dict[str, torch.Tensor]
Loss = Callable[..., torch.Tensor]
CLASS_WEIGHTS = torch.tensor([0.5, 2.0, 1.0, 3.0], dtype=torch.float64)


@pytest.fixture
def labelled(doubles: Callable[..., torch.Tensor]) -> Batch:
    """Eight samples of three vectors x with labels y, of which every part has another number that counts."""
    y = torch.randint(0, 4, (8, 3), generator=torch.Generator().manual_seed(4))
    y[0], y[2, 1:], y[5, 0] = -100, -100, -100
    return {"x": doubles(8, 3, 4), "y": y}


def flat(h: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return h.flatten(0, 1), y.flatten()


def masked(value: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return (value * mask).sum() / mask.sum()


# losses that are a sum over samples, divided by what the batch alone decides
QUOTIENTS: dict[str, Loss] = {
    "cross entropy": lambda h, y: F.cross_entropy(*flat(h, y)),
    "cross entropy of positions": lambda h, y: F.cross_entropy(h.transpose(1, 2), y),
    "cross entropy, shifted": lambda h, y: F.cross_entropy(h[:, :-1].flatten(0, 1), y[:, 1:].flatten()),
    "class weights": lambda h, y: F.cross_entropy(*flat(h, y), weight=CLASS_WEIGHTS),
    "smoothed": lambda h, y: F.cross_entropy(*flat(h, y), label_smoothing=0.1),
    "ignoring another": lambda h, y: F.cross_entropy(*flat(h, y.clamp(min=0)), ignore_index=1),
    "mask by hand": lambda h, y: masked(h.square().sum(-1), (y >= 0).double()),
    "mask of booleans": lambda h, y: masked(h.tanh().mean(-1), y >= 0),
    "cross entropy and a mask": lambda h, y: masked(
        F.cross_entropy(h.flatten(0, 1), y.flatten().clamp(min=0), reduction="none"), (y.flatten() >= 0).double()),
    "weighted mean": lambda h, y: (h.square() * (y + 101).unsqueeze(-1)).sum() / (y + 101).sum(),
    "clamped count": lambda h, y: (h.square().sum(-1) * (y >= 0)).sum() / (y >= 0).sum().clamp(min=1),
    "count with a margin": lambda h, y: (h.square().sum(-1) * (y >= 0)).sum() / ((y >= 0).sum() + 1e-3),
    "half of it": lambda h, y: 0.5 * F.cross_entropy(*flat(h, y)),
}  # fmt: skip


@pytest.mark.parametrize("dp", [2, 4])
@pytest.mark.parametrize("name", QUOTIENTS)
def test_what_counts_is_counted_in_the_whole_batch(name: str, dp: int, check: Check, labelled: Batch) -> None:
    parted = check(lambda m, x, y: QUOTIENTS[name](m.lin(x), y), labelled, dp=dp, microbatches=4 // dp)
    assert not [t for t in parted.targets() if "gather" in t or "sum_parts" in t or "final" in t]


SAID = {
    "cross entropy": "a sum over samples / a sum known from the batch",
    "sum": "a sum over samples",
    "mean": "a sum over samples",
    "root": "a function of sums over samples, which are added up first",
}


def test_the_rule_is_told(check: Check, labelled: Batch) -> None:
    losses: dict[str, Loss] = {
        "cross entropy": QUOTIENTS["cross entropy"], "sum": lambda h, y: h.sum(), "mean": lambda h, y: h.mean(),
        "root": lambda h, y: h.square().mean().sqrt(),
    }  # fmt: skip
    for name, loss in losses.items():
        batch = labelled if name == "cross entropy" else {"x": labelled["x"]}
        form = check(lambda m, x, y=None, loss=loss: loss(m.lin(x), y), batch).form
        assert form.rule == SAID[name]
        assert form.is_counted is (name == "cross entropy")


# several terms, with counts of their own
COMPOSED: dict[str, Loss] = {
    "two counts": lambda h, y: F.cross_entropy(*flat(h, y)) + masked(h.square().sum(-1), (y == 2).double()),
    "z-loss": lambda h, y: F.cross_entropy(*flat(h, y)) + 1e-2 * h.logsumexp(-1).square().mean(),
    "z-loss of what counts": lambda h, y: F.cross_entropy(*flat(h, y)) + masked(
        h.logsumexp(-1).square(), (y >= 0).double()),
    "by a weight of the batch": lambda h, y: F.cross_entropy(*flat(h, y)) * (y >= 0).double().mean(),
    "weights normalised before": lambda h, y: (
        h.square().sum(-1) * ((y >= 0) / (y >= 0).sum())).sum(),
    "weights centred before": lambda h, y: (
        h.square().sum(-1) * (y - y.double().mean()).abs()).mean(),
    "class frequencies": lambda h, y: F.cross_entropy(
        *flat(h, y), weight=1.0 / (1.0 + torch.stack([(y == c).sum() for c in range(4)]).double())),
    "positive weight": lambda h, y: F.binary_cross_entropy_with_logits(
        h[..., 0], (y > 1).double(), pos_weight=(y <= 1).sum() / (y > 1).sum().double()),
    "focal": lambda h, y: masked((1 - h.softmax(-1).amax(-1)) ** 2 * h.logsumexp(-1), (y >= 0).double()),
    "balance against the batch": lambda h, y: 4 * (
        h.softmax(-1).mean((0, 1)) * F.one_hot(y.clamp(min=0), 4).double().mean((0, 1))).sum(),
    "minus entropy": lambda h, y: F.cross_entropy(*flat(h, y)) + (h.softmax(-1) * h.log_softmax(-1)).mean(),
}  # fmt: skip


@pytest.mark.parametrize("name", COMPOSED)
def test_terms_may_have_counts_of_their_own(name: str, check: Check, labelled: Batch) -> None:
    parted = check(lambda m, x, y: COMPOSED[name](m.lin(x), y), labelled)
    assert not [t for t in parted.targets() if "gather" in t or "sum_parts" in t or "final" in t]


# losses of torch between two tensors, with each reduction that adds up
PAIRS: dict[str, Loss] = {
    "mse": F.mse_loss, "l1": F.l1_loss, "smooth l1": F.smooth_l1_loss, "huber": F.huber_loss,
    "bce with logits": lambda a, b, **r: F.binary_cross_entropy_with_logits(a, b.sigmoid(), **r),
    "bce": lambda a, b, **r: F.binary_cross_entropy(a.sigmoid(), b.sigmoid(), **r),
    "kl": lambda a, b, **r: F.kl_div(a.log_softmax(-1), b.softmax(-1), **r),
    "kl of logarithms": lambda a, b, **r: F.kl_div(a.log_softmax(-1), b.log_softmax(-1), log_target=True, **r),
    "soft margin": lambda a, b, **r: F.soft_margin_loss(a, b.sign(), **r),
    "poisson nll": lambda a, b, **r: F.poisson_nll_loss(a, b.abs(), **r),
    "margin ranking": lambda a, b, **r: F.margin_ranking_loss(a, b, b.sign(), margin=0.1, **r),
    "hinge embedding": lambda a, b, **r: F.hinge_embedding_loss(a, b.sign(), **r),
    "cosine embedding": lambda a, b, **r: F.cosine_embedding_loss(a[:, 0], b[:, 0], b[:, 0, 0].sign(), **r),
    "triplet": lambda a, b, **r: F.triplet_margin_loss(a, b, a.sin(), **r),
    "multilabel": lambda a, b, **r: F.multilabel_soft_margin_loss(a[:, 0], b[:, 0].sign().clamp(min=0), **r),
    "cross entropy of shares": lambda a, b, **r: F.cross_entropy(a[:, 0], b[:, 0].softmax(-1), **r),
    "smoothed shares": lambda a, b, **r: F.cross_entropy(a[:, 0], b[:, 0].softmax(-1), label_smoothing=0.2, **r),
}  # fmt: skip


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("name", PAIRS)
def test_torchs_losses_add_up(name: str, reduction: str, check: Check, doubles: Any) -> None:
    batch = {"x": doubles(8, 3, 4), "z": doubles(8, 3, 4, seed=9)}
    parted = check(lambda m, x, z: PAIRS[name](m.lin(x), z, reduction=reduction), batch)
    assert not [target for target in parted.targets() if target.startswith("orchestrate")]


def test_kl_divided_by_samples_is_that_of_the_whole_batch(check: Check, doubles: Any) -> None:
    batch = {"x": doubles(8, 4), "z": doubles(8, 4, seed=9)}
    check(lambda m, x, z: F.kl_div(m.lin(x).log_softmax(-1), z.softmax(-1), reduction="batchmean"), batch)


# sizes of the batch as numbers in the loss
SIZES: dict[str, Loss] = {
    "shape": lambda h: h.square().sum() / h.shape[0],
    "length": lambda h: h.square().sum() / len(h),
    "numel": lambda h: h.square().sum() / h.numel(),
    "root of the length": lambda h: h.sum() / math.sqrt(len(h)),
    "each entry": lambda h: (h / len(h)).square().sum() * len(h),
    "power": lambda h: (h * len(h) ** -0.5).square().sum(),
    "subtracted": lambda h: (h - 1.0 / len(h)).square().mean() + 1.0 / len(h),
    "ones": lambda h: (h.square().sum((1, 2)) * torch.ones(len(h), dtype=h.dtype) / len(h)).sum(),
    "full": lambda h: (h.square().sum((1, 2)) * torch.full((len(h),), 1.0 / len(h), dtype=h.dtype)).sum(),
    "count of ones": lambda h: h.square().sum() / torch.ones(len(h), dtype=h.dtype).sum(),
    "two sizes": lambda h: h.square().sum() / (h.shape[0] * h.shape[1]) + h.sum() / h.size(0),
    "unbiased": lambda h: h.square().sum() / (len(h) - 1),
}  # fmt: skip


@pytest.mark.parametrize("name", SIZES)
def test_sizes_of_the_batch_in_a_loss_are_those_of_the_whole(
    name: str, check: Check, sequences: Batch
) -> None:
    parted = check(lambda m, x: SIZES[name](m.lin(x)), sequences)
    assert not [t for t in parted.targets() if "gather" in t or "sum_parts" in t]


# functions of sums that are not linear: sums first, then the loss, then every part's backward
TAILS: dict[str, Loss] = {
    "root": lambda h, z: (h - z).square().mean().sqrt(),
    "norm of sums": lambda h, z: (h - z).sum((0, 1)).norm(),
    "perplexity": lambda h, z: h.log_softmax(-1)[..., 0].neg().mean().exp(),
    "product of sums": lambda h, z: h.sum() * z.mul(h).mean(),
    "square of a mean": lambda h, z: h.mean() ** 2 + h.square().mean(),
    "quotient of sums": lambda h, z: h.exp().sum() / (1 + h.square().sum()),
    "dice": lambda h, z: 1 - 2 * (h.sigmoid() * z.sigmoid()).sum() / (h.sigmoid().sum() + z.sigmoid().sum()),
    "correlation": lambda h, z: correlation(h[..., 0], z[..., 0]),
    "logarithm": lambda h, z: h.square().mean().log() + 0.1 * h.abs().mean(),
    "largest of two": lambda h, z: torch.maximum(h.mean(), h.square().mean()),
    "balance of the model": lambda h, z: 4 * h.softmax(-1).mean((0, 1)).square().sum() + h.square().mean(),
    "entropy of the mean": lambda h, z: -(h.softmax(-1).mean((0, 1)) * h.softmax(-1).mean((0, 1)).log()).sum(),
    "variance by moments": lambda h, z: (h.square().mean((0, 1)) - h.mean((0, 1)) ** 2).sum(),
    "gram": lambda h, z: torch.einsum("bsd,bse->de", h, h).div(24).square().sum(),
    "with a penalty": lambda h, z: (h - z).square().mean().sqrt() + 0.5 * h.abs().mean(),
}  # fmt: skip


def correlation(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """By moments."""
    covariance = (a * b).mean() - a.mean() * b.mean()
    return covariance / ((a.square().mean() - a.mean() ** 2) * (b.square().mean() - b.mean() ** 2)).sqrt()


@pytest.mark.parametrize(("dp", "microbatches"), [(2, 2), (4, 1)])
@pytest.mark.parametrize("name", TAILS)
def test_functions_of_sums_are_of_the_whole_batchs_sums(
    name: str, dp: int, microbatches: int, check: Check, doubles: Any
) -> None:
    batch = {"x": doubles(8, 3, 4), "z": doubles(8, 3, 4, seed=9)}
    parted = check(lambda m, x, z: TAILS[name](m.lin(x), z), batch, dp=dp, microbatches=microbatches)
    assert not [target for target in parted.targets() if "gather" in target]
    assert bool(parted.form.tail) is (microbatches > 1)


def test_a_penalty_of_parameters_counts_once(check: Check, sequences: Batch) -> None:
    check(lambda m, x: m.lin(x).square().mean() + 0.1 * m.lin.weight.square().sum().sqrt(), sequences)
    check(lambda m, x: (m.lin(x).square().mean() + m.lin.weight.square().sum()).sqrt(), sequences)
    check(lambda m, x: m.lin(x).square().mean() * m.lin.weight.square().sum(), sequences)


def test_a_loss_of_parameters_alone_is_shared_out(check: Check, sequences: Batch) -> None:
    check(lambda m, x: m.lin.weight.square().sum() + 0 * m.lin(x).sum(), sequences)


def test_a_sum_back_in_the_model_needs_one_microbatch(
    check: Check, parts_of: Check, sequences: Batch
) -> None:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        h = m.lin(x)
        return (h / h.square().mean().sqrt()).tanh().mean()

    check(forward, sequences, dp=4, microbatches=1)
    with pytest.raises(CaptureError, match="mixes samples"):
        parts_of(forward, sequences, dp=2, microbatches=2)
