"""Loss as (sum, count): sum / count is the model's own loss, and both add up over pieces of a batch."""

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from comms.errors import CaptureError
from partitioner.capture import loss
from partitioner.capture.tracing import trace_module

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
GENERATOR = torch.Generator().manual_seed(3)
X = torch.randn(6, 4, generator=GENERATOR, dtype=torch.float64)
CLASSES = torch.tensor([0, 1, -100, 2, -100, 1])
NUMBERS = torch.rand(6, 3, generator=GENERATOR, dtype=torch.float64)


def rewritten(
    function: Loss, target: torch.Tensor, part: slice = slice(None)
) -> tuple[float, float, str, float]:
    """(sum, count, rule, the module's own loss) on a part of the samples."""
    torch.manual_seed(0)
    module = nn.Linear(4, 3).double()
    batch = {"x": X[part], "target": target[part]}

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = module

        def forward(self, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
            return function(self.inner(x), target)

    captured = trace_module(Model(), batch, None)
    _, _, rule = loss.rewrite(captured.graph_module.graph, len(batch["x"]))
    captured.graph_module.recompile()
    sources = {"params:inner.weight": module.weight, "params:inner.bias": module.bias}
    sources |= {f"batch:{k}": v for k, v in batch.items()}
    total, count = captured.graph_module(*(sources[name] for name in captured.names.values()))
    return total.item(), count.item(), rule, function(module(batch["x"]), batch["target"]).item()


def nll(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(x, y)


def nll_ignoring_one(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(x, y.clamp(min=0), ignore_index=1)


def reshaped(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(x, y).view(1).to(torch.float64).reshape(())


def penalised(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return F.mse_loss(x, y) + 0.1 * x.square().mean()


KNOWN = [
    (nll, CLASSES, 4, "sum over valid targets"),
    (nll_ignoring_one, CLASSES, 4, "sum over valid targets"),
    (reshaped, CLASSES, 4, "sum over valid targets"),
    (F.mse_loss, NUMBERS, 18, "sum over elements"),
    (F.l1_loss, NUMBERS, 18, "sum over elements"),
    (F.smooth_l1_loss, NUMBERS, 18, "sum over elements"),
    (F.huber_loss, NUMBERS, 18, "sum over elements"),
    (F.binary_cross_entropy_with_logits, NUMBERS, 18, "sum over elements"),
    (penalised, NUMBERS, 6, "mean over samples of equal weight"),
]
each_loss = pytest.mark.parametrize(
    ("function", "target", "count", "rule"), KNOWN, ids=lambda v: getattr(v, "__name__", "")
)


@each_loss
def test_sum_over_count_is_the_models_own_loss(
    function: Loss, target: torch.Tensor, count: int, rule: str
) -> None:
    total, counted, used, own = rewritten(function, target)
    assert (counted, used) == (count, rule)
    assert total / counted == pytest.approx(own, rel=1e-12)


@each_loss
def test_sums_and_counts_add_up_over_unequal_pieces(
    function: Loss, target: torch.Tensor, count: int, rule: str
) -> None:
    whole, number = rewritten(function, target)[:2]
    pieces = [rewritten(function, target, part) for part in (slice(0, 2), slice(2, 6))]
    assert sum(p[1] for p in pieces) == number
    assert sum(p[0] for p in pieces) == pytest.approx(whole, rel=1e-12)


def test_a_batch_without_any_valid_target_has_sum_and_count_zero() -> None:
    total, count, _, own = rewritten(nll, torch.full((6,), -100))
    assert (total, count) == (0.0, 0.0)
    assert own != own


def cross_entropy_sum(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(x, y, reduction="sum")


@pytest.mark.parametrize(
    ("function", "target"),
    [
        (lambda x, y: F.mse_loss(x, y, reduction="sum"), NUMBERS),
        (lambda x, y: (x - y).abs().sum(), NUMBERS),
        (cross_entropy_sum, CLASSES),
    ],
)
def test_a_sum_is_refused_because_it_grows_with_the_batch(function: Loss, target: torch.Tensor) -> None:
    with pytest.raises(CaptureError, match="grows with the batch"):
        rewritten(function, target)


def smoothed(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(x, y, label_smoothing=0.2)


def log_softmax_nll(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return F.nll_loss(F.log_softmax(x, -1), y)


@pytest.mark.parametrize("function", [smoothed, log_softmax_nll])
def test_other_forms_of_cross_entropy_count_valid_targets_too(function: Loss) -> None:
    total, count, rule, own = rewritten(function, CLASSES)
    assert (count, rule) == (4, "sum over valid targets")
    assert total / count == pytest.approx(own, rel=1e-12)


def test_class_weights_and_probabilities_are_refused() -> None:
    with pytest.raises(CaptureError, match="class weights"):
        rewritten(lambda x, y: F.cross_entropy(x, y, weight=x[0].detach()), CLASSES)
    with pytest.raises(CaptureError, match="probabilities"):
        rewritten(lambda x, y: F.cross_entropy(x, y), NUMBERS)
