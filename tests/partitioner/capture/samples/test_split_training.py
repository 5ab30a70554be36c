"""Split batches through the whole machinery: losses and steps of every plan are those of a plain loop on one chip."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from orchestrator.verbs.distribute import distribute
from partitioner.layout.parallel_plan import Plan

Loss = Callable[[Any, list[torch.Tensor], torch.Tensor], torch.Tensor]
STEPS = 2
CUT = [Plan(dp=2, microbatches=2, zero=1), Plan(pp=2, microbatches=2)]
WHOLE = [Plan(dp=4, zero=1), Plan(dp=2, pp=2)]
WITH_TP = Plan(dp=2, tp=2)


class Layers(nn.Module):
    """Three layers; a loss may look at what each of them makes, and at their weights."""

    def __init__(self, loss: Loss) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            sizes = [(4, 8), (8, 8), (8, 4)]
            self.blocks = nn.ModuleList(nn.Linear(*size) for size in sizes).double()
        self.register_buffer("weights", torch.tensor([0.5, 2.0, 1.0, 3.0], dtype=torch.float64))
        self.loss = loss

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        made = []
        for block in self.blocks:
            x = torch.tanh(block(x)) if made else block(x)
            made.append(x)
        return self.loss(self, made, y)


def batch(step: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    y = torch.randint(0, 4, (8,), generator=generator)
    y[step], y[3] = -100, -100
    return {"x": torch.randn(8, 4, generator=generator, dtype=torch.float64), "y": y}


def one_chip(loss: Loss) -> tuple[list[float], nn.Module]:
    module = Layers(loss)
    optimizer, losses = torch.optim.SGD(module.parameters(), 0.1, momentum=0.5), []
    for step in range(STEPS):
        optimizer.zero_grad()
        value = module(**batch(step))
        value.backward()
        optimizer.step()
        losses.append(value.item())
    return losses, module


def require_same(loss: Loss, plan: Plan, laptop: Any) -> None:
    losses, plain = one_chip(loss)
    module = Layers(loss)
    optimizer = torch.optim.SGD(module.parameters(), 0.1, momentum=0.5)
    step = distribute(module, optimizer, laptop, plan=plan, chips=plan.num_chips)
    assert step.evaluate(batch(0)) == pytest.approx(losses[0], rel=1e-9)
    assert [step(batch(index)) for index in range(STEPS)] == pytest.approx(losses, rel=1e-9)
    step.sync()
    for mine, theirs in zip(module.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-10)


def valid(y: torch.Tensor) -> torch.Tensor:
    return (y >= 0).double()


# with any number of microbatches
LOSSES: dict[str, Loss] = {
    "ignored labels": lambda m, made, y: F.cross_entropy(made[-1], y),
    "class weights": lambda m, made, y: F.cross_entropy(made[-1], y, m.weights),
    "counts and numbers": lambda m, made, y: made[-1].sum() / ((y != 1).sum() + 1).clamp(min=1),
    "counts less one": lambda m, made, y: made[-1].square().sum() / ((y != 1).sum() - 1).clamp(min=1),
    "counts from a number": lambda m, made, y: made[-1].sum() * (3 - (y == 1).sum()) / 7,
    "totals spread out": lambda m, made, y: made[-1].sum(0).expand(len(y), 4).sum() / 9,
    "totals repeated": lambda m, made, y: made[-1].mean(0).repeat(len(y), 1).sum(),
    "totals cut": lambda m, made, y: made[-1].sum(0)[: len(y) // 4].sum(),
    "totals cut elsewhere": lambda m, made, y: made[-1].sum(0)[len(y) // 8 : len(y) // 8 + 2].sum(),
    "totals viewed": lambda m, made, y: made[-1].mean(0).view(len(y) // 4, -1).sum(0)[0],
    "spread at the end": lambda m, made, y: made[-1].square().mean().sqrt().expand(len(y)).sum() / 10,
    "weights and smoothing": lambda m, made, y: F.cross_entropy(made[-1], y, m.weights, label_smoothing=0.1),
    "two counts": lambda m, made, y: F.cross_entropy(made[-1], y) + (
        made[0].square().mean(-1) * (y == 1)).sum() / (y == 1).sum().clamp(min=1),
    "z-loss": lambda m, made, y: F.cross_entropy(made[-1], y) + 0.1 * made[-1].logsumexp(-1).square().mean(),
    "sum": lambda m, made, y: made[-1].square().sum() / 10,
    "divided by size": lambda m, made, y: made[-1].square().sum() / made[-1].shape[0],
    "root": lambda m, made, y: made[-1].square().mean().sqrt(),
    "perplexity": lambda m, made, y: F.cross_entropy(made[-1], y.clamp(min=0)).exp(),
    "perplexity of what counts": lambda m, made, y: F.cross_entropy(made[-1], y).exp(),
    "balance": lambda m, made, y: made[-1].softmax(-1).mean(0).square().sum() + made[-1].square().mean(),
    "correlation": lambda m, made, y: (
        made[-1][:, 0] * made[-1][:, 1]).mean() - made[-1][:, 0].mean() * made[-1][:, 1].mean(),
    "penalty": lambda m, made, y: F.cross_entropy(made[-1], y) + 0.1 * m.blocks[0].weight.square().sum(),
    "root and penalty": lambda m, made, y: (made[-1].square().mean() + m.blocks[2].weight.square().mean()).sqrt(),
    "auxiliary root": lambda m, made, y: made[-1].square().mean().sqrt() + 0.1 * made[0].square().mean(),
    "product of layers": lambda m, made, y: made[-1].mean() * made[0].square().mean(),
    "centred labels": lambda m, made, y: (made[-1][:, 0] * (valid(y) - valid(y).mean())).sum(),
    "detached scale": lambda m, made, y: (made[-1] * made[0].detach().mean(-1, keepdim=True)).square().mean(),
}  # fmt: skip


@pytest.mark.parametrize("plan", CUT, ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_losses_and_steps_are_those_of_one_chip(name: str, plan: Plan, laptop: Any, one_thread: None) -> None:
    require_same(LOSSES[name], plan, laptop)


def contrastive(m: Any, made: list[torch.Tensor], y: torch.Tensor) -> torch.Tensor:
    left, right = F.normalize(made[-1], dim=-1), F.normalize(made[0][:, :4], dim=-1)
    return F.cross_entropy(left @ right.t() / 0.3, torch.arange(len(y)))


def by_class(m: Any, made: list[torch.Tensor], y: torch.Tensor) -> torch.Tensor:
    alike = (y[:, None] == y[None]).double()
    return (torch.log_softmax(made[-1] @ made[-1].t(), -1) * alike).sum(-1).div(alike.sum(-1)).mean().neg()


# with one microbatch
MIXING: dict[str, Loss] = {
    "centring": lambda m, made, y: F.cross_entropy(made[-1] - made[-1].mean(0), y),
    "centring a hidden layer": lambda m, made, y: F.cross_entropy(m.blocks[2](made[0] - made[0].mean(0)), y),
    "running sum": lambda m, made, y: made[-1].cumsum(0).sin().mean(),
    "contrastive": contrastive,
    "by class": by_class,
    "halves": lambda m, made, y: -F.logsigmoid(torch.sub(*made[-1].sum(-1).chunk(2))).mean(),
    "root within": lambda m, made, y: (made[-1] / made[-1].square().mean().sqrt()).tanh().mean(),
    "largest": lambda m, made, y: made[-1].logsumexp(0).sum() + made[-1].amax(),
    "sorted": lambda m, made, y: (made[-1].sort(0).values * torch.arange(len(y)).unsqueeze(1)).mean(),
}  # fmt: skip


@pytest.mark.parametrize("name", ["class weights", "root", "penalty", "balance", "contrastive", "centring"])
def test_chips_that_cut_parameters_share_the_samples(name: str, laptop: Any, one_thread: None) -> None:
    require_same({**LOSSES, **MIXING}[name], WITH_TP, laptop)


@pytest.mark.parametrize("plan", WHOLE, ids=str)
@pytest.mark.parametrize("name", MIXING)
def test_operations_across_samples_are_those_of_one_chip(
    name: str, plan: Plan, laptop: Any, one_thread: None
) -> None:
    require_same(MIXING[name], plan, laptop)


@pytest.mark.parametrize("plan", [Plan(microbatches=4), Plan(dp=2, pp=2, microbatches=2)], ids=str)
@pytest.mark.parametrize("name", MIXING)
def test_several_microbatches_run_as_one_for_operations_across_samples(
    name: str, plan: Plan, laptop: Any, one_thread: None
) -> None:
    said = rf"{plan.microbatches} microbatches run as one, in more memory: .* mixes samples.*{__file__}:"
    with pytest.warns(UserWarning, match=said):
        require_same(MIXING[name], plan, laptop)
