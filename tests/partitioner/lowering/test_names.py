"""Names that a user gives: whatever they are, values are told apart."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

from comms.errors import PartitionError
from orchestrator.verbs.distribute import distribute
from partitioner.layout.parallel_plan import Plan


class Named(nn.Module):
    """A parameter and a buffer called like operations, and a buffer called like an input."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.lin = nn.Linear(4, 4)
            self.t = nn.Parameter(torch.randn(4, 4))
            self.register_buffer("tanh", torch.randn(4, 4))
            self.register_buffer("mask", torch.randn(4))

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        hidden = self.lin(x) @ self.tanh.tanh() @ self.t.t()
        return (hidden @ self.tanh * self.mask * mask).square().mean()


@pytest.mark.parametrize("plan", [Plan(), Plan(dp=2, microbatches=2), Plan(tp=2), Plan(pp=2)], ids=str)
def test_values_of_one_name_are_told_apart(plan: Plan, laptop: Any, one_thread: None) -> None:
    module, draw = Named().double(), torch.Generator().manual_seed(0)
    batch = {name: torch.randn(8, 4, generator=draw, dtype=torch.float64) for name in ("x", "mask")}
    plain = copy.deepcopy(module)
    step = distribute(
        module, torch.optim.SGD(module.parameters(), 0.1), laptop, plan=plan, chips=plan.num_chips
    )
    loss = plain(**batch)
    loss.backward()
    assert step(batch) == pytest.approx(loss.item(), rel=1e-9)
    step.sync()
    for mine, theirs in zip(module.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs - 0.1 * theirs.grad)


def test_a_name_that_lowering_needs_is_refused(laptop: Any) -> None:
    module = nn.Module()
    module.seed = nn.Parameter(torch.ones(()))
    module.forward = lambda x: (module.seed * x).sum()
    step = distribute(module, torch.optim.SGD(module.parameters(), 0.1), laptop, plan=Plan(), chips=1)
    with pytest.raises(PartitionError, match="both called seed"):
        step({"x": torch.ones(2)})
