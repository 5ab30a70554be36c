"""Means of classification taken apart: sum / weight is torch's own mean, and both add up over pieces of a batch."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from partitioner.capture.samples.loss_form import whole_loss
from partitioner.capture.tracing import trace_module

Loss = Callable[..., torch.Tensor]
GENERATOR = torch.Generator().manual_seed(3)
X = torch.randn(6, 4, generator=GENERATOR, dtype=torch.float64)
CLASSES = torch.tensor([0, 1, -100, 2, -100, 1])
WEIGHTS = torch.tensor([0.5, 2.0, 3.0], dtype=torch.float64)
SHARES = torch.rand(6, 3, generator=GENERATOR, dtype=torch.float64)


class Classifier(nn.Module):
    def __init__(self, function: Loss) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.inner = nn.Linear(4, 3).double()
        self.register_buffer("weights", WEIGHTS)
        self.function = function

    def forward(self, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return self.function(self.inner(x), target, self.weights)


def taken_apart(
    function: Loss, target: torch.Tensor, part: slice = slice(None)
) -> tuple[float, float, float]:
    """(sum, weight, torch's mean) on a part of the samples."""
    module, x, y = Classifier(function), X[part], target[part]
    captured = trace_module(module, {"x": x, "target": y}, None)
    form = whole_loss(captured)
    assert form.count is not None and form.is_counted
    sources = {f"params:{k}": v for k, v in module.named_parameters()}
    sources |= {"buffers:weights": WEIGHTS, "batch:x": x, "batch:target": y}
    given = [sources.get(name, torch.tensor(0)) for name in captured.names.values()]
    total, count = torch.fx.Interpreter(captured.graph_module).run(*given)
    return total.item(), count.item(), module(x, y).item()


def nll(x: torch.Tensor, y: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(x, y)


def ignoring_one(x: torch.Tensor, y: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(x, y.clamp(min=0), ignore_index=1)


def reshaped(x: torch.Tensor, y: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(x, y).view(1).reshape(())


def smoothed(x: torch.Tensor, y: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(x, y, label_smoothing=0.2)


def from_logarithms(x: torch.Tensor, y: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return F.nll_loss(F.log_softmax(x, -1), y)


def weighted(x: torch.Tensor, y: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(x, y, w)


def weighted_and_smoothed(x: torch.Tensor, y: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(x, y, w, label_smoothing=0.3)


def weighted_logarithms(x: torch.Tensor, y: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return F.nll_loss(F.log_softmax(x, -1), y, w)


def of_pixels(x: torch.Tensor, y: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(x[..., None].expand(-1, -1, 2), y[:, None].expand(-1, 2), w)


KNOWN = [
    (nll, 4), (ignoring_one, 4), (reshaped, 4), (smoothed, 4), (from_logarithms, 4), (weighted, 7.5),
    (weighted_and_smoothed, 7.5), (weighted_logarithms, 7.5), (of_pixels, 15),
]  # fmt: skip
each_loss = pytest.mark.parametrize(("function", "weight"), KNOWN, ids=lambda v: getattr(v, "__name__", ""))


@each_loss
def test_sum_over_weight_is_torchs_mean(function: Loss, weight: float) -> None:
    total, counted, own = taken_apart(function, CLASSES)
    assert counted == weight
    assert total / counted == pytest.approx(own, rel=1e-12)


@each_loss
def test_sums_and_weights_add_up_over_unequal_pieces(function: Loss, weight: float) -> None:
    whole = taken_apart(function, CLASSES)
    pieces = [taken_apart(function, CLASSES, part) for part in (slice(0, 2), slice(2, 6))]
    assert sum(p[1] for p in pieces) == pytest.approx(weight, rel=1e-12)
    assert sum(p[0] for p in pieces) == pytest.approx(whole[0], rel=1e-12)


def test_a_batch_without_any_valid_target_has_sum_and_weight_zero() -> None:
    total, weight, own = taken_apart(nll, torch.full((6,), -100))
    assert (total, weight) == (0.0, 0.0)
    assert own != own


def graph_of(function: Loss, target: torch.Tensor) -> Any:
    captured = trace_module(Classifier(function), {"x": X, "target": target}, None)
    whole_loss(captured)
    return captured.graph_module.graph


def test_a_mean_over_probabilities_counts_every_sample() -> None:
    graph = graph_of(nll, SHARES)
    quotients = [n for n in graph.nodes if "div" in str(n.target)]
    assert [n.args[1] for n in quotients] == [6.0]


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_other_reductions_stay(reduction: str) -> None:
    graph = graph_of(lambda x, y, w: F.cross_entropy(x, y, reduction=reduction).sum(), CLASSES)
    assert not [n for n in graph.nodes if "div" in str(n.target)]
