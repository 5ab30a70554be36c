"""What `sync()` writes buffers into: the model's own memory, never that of a batch."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

from orchestrator.exceptions import UserError
from orchestrator.verbs.distribute import distribute
from partitioner import Plan


class Remembering(nn.Module):
    """Keeps its last input as it is, a mean in every place of a row, and one value under two names."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.layer = nn.Linear(4, 4)
        self.register_buffer("input", torch.zeros(8, 4))
        self.register_buffer("row", torch.zeros(1).expand(4))
        self.register_buffer("low", torch.zeros(()))
        self.register_buffer("high", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.layer(x) + self.input * 0.1 + self.row + self.low - self.high
        self.row = hidden.detach().mean().expand(4)
        self.low = self.high = x.amax()
        self.input = x
        return hidden.square().mean()


def test_a_forward_of_ones_own_between_steps_leaves_its_batch_alone(laptop: Any, one_thread: None) -> None:
    module = Remembering()
    plain = copy.deepcopy(module)
    optimizers = [torch.optim.SGD(m.parameters(), 0.1) for m in (module, plain)]
    step = distribute(module, optimizers[0], laptop, chips=1)
    other, *batches = torch.randn(4, 8, 4, generator=torch.Generator().manual_seed(0))
    before = other.clone()
    for x in batches:
        step({"x": x})
        optimizers[1].zero_grad()
        plain(x).backward()
        optimizers[1].step()
        for name, value in plain.state_dict().items():
            torch.testing.assert_close(step.sync().state_dict()[name], value, rtol=1e-5, atol=1e-6)
        for own in (module, plain):
            own(other)
    assert torch.equal(other, before)


def test_buffers_that_are_written_stay_the_tensors_that_others_hold(laptop: Any, one_thread: None) -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    held = module[1].running_mean
    step = distribute(
        module, torch.optim.SGD(module.parameters(), 0.1), laptop, chips=2, loss_fn=lambda o, **_: o.var()
    )
    step({"input": torch.randn(8, 4)})
    assert step.sync()[1].running_mean is held and held.abs().sum() > 0  # type: ignore[index, union-attr]


@pytest.mark.parametrize(
    "plan", [Plan(), Plan(dp=2, microbatches=2), Plan(pp=2), Plan(tp=2), Plan(dp=2, pp=2)], ids=str
)
def test_a_step_that_is_not_finite_changes_no_buffer(plan: Plan, laptop: Any, one_thread: None) -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4), nn.BatchNorm1d(4))
    step = distribute(
        module, torch.optim.SGD(module.parameters(), 0.1), laptop, plan=plan, chips=plan.num_chips,
        loss_fn=lambda output, **_: output.square().mean(),
    )  # fmt: skip
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    step({"input": x})
    held = copy.deepcopy(step.sync().state_dict())
    with pytest.raises(UserError, match="is not finite; the step was skipped"):
        step({"input": torch.where(x > 1, torch.nan, x)})
    assert all(torch.equal(value, held[name]) for name, value in step.sync().state_dict().items())
    step({"input": x})
