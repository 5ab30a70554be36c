"""Buffers and parameters that several stages read: kept and stepped on as on one chip."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from partitioner.layout.parallel_plan import Plan

PLANS = [Plan(microbatches=2), Plan(pp=2), Plan(pp=3, microbatches=2), Plan(dp=2, pp=2, microbatches=2)]


def buffer_of_a_buffer(m: Any, x: torch.Tensor) -> torch.Tensor:
    m.mean.add_(x.mean(0) * (m.count + 1))
    m.count.add_(1)
    return m.second(m.first(x - m.mean))


def running_mean_of_a_layer(m: Any, x: torch.Tensor) -> torch.Tensor:
    hidden = m.first(x)
    m.mean.mul_(m.count + 1).add_(hidden.detach().mean(0))
    m.count.add_(1)
    return m.second(hidden)


def read_without_a_gradient(m: Any, x: torch.Tensor) -> torch.Tensor:
    return m.second(m.first(x)) + m.first.weight.detach().sum()


def buffers_of_one_total(m: Any, x: torch.Tensor) -> torch.Tensor:
    hidden = m.first(x)
    m.mean.mul_(0.5).add_(hidden.detach().mean(0))
    m.count.copy_(m.mean.exp().sum())
    return m.second(hidden)


def total_beside_what_the_batch_tells(m: Any, x: torch.Tensor) -> torch.Tensor:
    hidden = m.first(x)
    m.mean.copy_(torch.where((x > 0).sum(0) > 3, hidden.detach().sum(0).exp(), m.mean))
    return m.second(hidden)


def total_beside_a_buffer_that_changes(m: Any, x: torch.Tensor) -> torch.Tensor:
    hidden = m.first(x)
    m.mean.copy_(hidden.detach().mean(0).exp() * m.count)
    hidden = m.third(m.second(hidden).tanh())
    m.count.copy_(x.sum(0).exp().sum())
    return hidden


def weight_seen_as_complex(m: Any, x: torch.Tensor) -> torch.Tensor:
    pairs = torch.view_as_complex(m.second.weight.view(4, 2, 2)).abs()
    return m.second(m.first(x)) * m.scale + pairs.sum()


def read_early_changed_late(m: Any, x: torch.Tensor) -> torch.Tensor:
    """As the centre of self-distillation."""
    out: torch.Tensor = m.third(m.second(m.first(x - m.mean).tanh()))
    m.mean.mul_(0.9).add_(out.detach().mean(0) * 0.1)
    return out


def read_late_changed_early(m: Any, x: torch.Tensor) -> torch.Tensor:
    hidden = m.first(x)
    before = m.mean.clone()
    m.mean.copy_(hidden.detach().mean(0))
    return m.third(m.second(hidden).tanh()) * before + m.count


def both_ways(m: Any, x: torch.Tensor) -> torch.Tensor:
    hidden = m.first(x) + m.count
    out: torch.Tensor = m.third(m.second(hidden).tanh()) * m.mean.exp()
    m.count.copy_(out.detach().sum().tanh())
    m.mean.add_(hidden.detach().sum(0).tanh())
    return out


def loads_of_several_layers(m: Any, x: torch.Tensor) -> torch.Tensor:
    """As biases that even out how often experts are chosen."""
    first = m.first(x) + m.mean
    second = m.second(first.tanh()) * (1 + m.count)
    out: torch.Tensor = m.third(second.tanh())
    loads = torch.stack([(each.detach() > 0).sum(0) for each in (first, second, out)]).to(x.dtype)
    m.mean.add_(0.1 * torch.sign(loads.mean() - loads[0]))
    m.count.copy_((loads[2] - loads[1]).sum() * 0.01)
    return out


class Layers(nn.Module):
    """Three layers, a number and two buffers."""

    def __init__(self, script: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.first, self.second, self.third = (nn.Linear(4, 4) for _ in range(3))
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(4))
        self.script = script

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.script(self, x).square().mean()


@pytest.mark.parametrize("plan", PLANS, ids=str)
@pytest.mark.parametrize(
    "script",
    [buffer_of_a_buffer, running_mean_of_a_layer, read_without_a_gradient, buffers_of_one_total, weight_seen_as_complex,
     total_beside_what_the_batch_tells, total_beside_a_buffer_that_changes, read_early_changed_late,
     read_late_changed_early, both_ways, loads_of_several_layers],
)  # fmt: skip
def test_stages_keep_what_they_read(script: Any, plan: Plan, trained_alike: Any) -> None:
    xs = torch.randn(3, 8, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    trained_alike(Layers(script).double(), [{"x": x} for x in xs], plan)
