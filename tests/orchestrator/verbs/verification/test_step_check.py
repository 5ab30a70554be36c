"""step.verify: the user's own module, optimizer and batch, in any dtype, with dropout, and left as they were."""

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from orchestrator.verbs.distribute import DistributedStep, distribute
from partitioner.layout.parallel_plan import Plan

PLANS = [Plan(dp=2), Plan(dp=2, zero=1, microbatches=2), Plan(pp=2, microbatches=2), Plan(tp=2)]


class Net(nn.Module):
    def __init__(self, *, norm: bool = False) -> None:
        super().__init__()
        self.first, self.second, self.drop = nn.Linear(6, 16), nn.Linear(16, 2), nn.Dropout(0.4)
        self.norm = nn.BatchNorm1d(16) if norm else nn.LayerNorm(16)

    def forward(self, x: torch.Tensor, gain: float = 1.0) -> torch.Tensor:
        inner = checkpoint(lambda v: self.drop(torch.tanh(self.first(v))), x, use_reentrant=False)
        return (gain * self.second(self.norm(inner))).square().mean()


def step_of(
    plan: Plan, dtype: torch.dtype, laptop: Any, *, norm: bool = False, clip: float | None = 0.5
) -> DistributedStep:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = Net(norm=norm).to(dtype)
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.01)
    return distribute(module, optimizer, laptop, plan=plan, chips=plan.num_chips, clip_norm=clip)


def batch(number: int, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    return {"x": torch.randn(8, 6, generator=torch.Generator().manual_seed(number)).to(dtype), "gain": 1.5}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_every_plan_is_equal_with_dropout_and_checkpoints(
    plan: Plan, dtype: torch.dtype, laptop: Any, one_thread: None
) -> None:
    step = step_of(plan, dtype, laptop)
    found = step.verify(batch(0, dtype))
    assert found.equal and found.differs is None and found.steps == 2, str(found)
    assert found.errors is not None and found.errors.worst < 1e-10
    assert (found.own is None) is (dtype is torch.float64)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_verifying_changes_nothing(dtype: torch.dtype, laptop: Any, one_thread: None) -> None:
    plan, losses = Plan(dp=2), []
    for verified in (True, False):
        step = step_of(plan, dtype, laptop, norm=True)
        own = []
        for number in range(4):
            if verified:
                before = copy.deepcopy(step.sync().state_dict())
                assert step.verify(batch(number, dtype)).equal
                assert all(torch.equal(before[k], v) for k, v in step.model.state_dict().items())
                assert all(p.grad is None for p in step.model.parameters())
            own.append(step(batch(number, dtype)))
        losses.append((own, step.sync().state_dict()))
    assert losses[0][0] == losses[1][0]
    assert all(torch.equal(losses[0][1][k], v) for k, v in losses[1][1].items())


def test_a_split_that_is_wrong_is_found_on_the_users_batch(wrong: str, laptop: Any, one_thread: None) -> None:
    found = step_of(Plan(dp=2), torch.float32, laptop, clip=None).verify(batch(0, torch.float32))
    assert not found.equal
    assert found.differs is not None and found.differs.startswith(wrong)
    assert found.differs in str(found) and found.document()["differs"] == found.differs


def test_what_cannot_run_in_float64_is_held_against_noise(laptop: Any, one_thread: None) -> None:
    class Narrow(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (self.layer(x) @ torch.ones(4, 2, dtype=torch.float32)).square().mean()

    module = Narrow()
    step = distribute(module, torch.optim.SGD(module.parameters(), lr=0.1), laptop, plan=Plan(dp=2), chips=2)
    found = step.verify({"x": torch.randn(4, 4, generator=torch.Generator().manual_seed(0))})
    assert found.equal and found.errors is None and found.unproved
    assert "no proof" in str(found)
