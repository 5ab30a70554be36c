"""Numbers as first operands: what torch computes of them, in its dtype."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from orchestrator.verbs.distribute import distribute
from partitioner.layout.parallel_plan import Plan

NUMBER_FIRST: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "add": lambda h: torch.add(1.5, h),
    "alpha": lambda h: torch.add(0.1, h, alpha=2),
    "mul": lambda h: torch.mul(2, h),
    "sub": lambda h: torch.sub(1.0, h),
    "div": lambda h: torch.div(0.3, h.exp()),
    "of a whole number": lambda h: torch.add(1.5, (h > 0).long()) * h,
    "of a loss": lambda h: torch.sub(1.0, h.square().mean()),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", NUMBER_FIRST)
def test_they_train_as_in_torch(name: str, dtype: torch.dtype, laptop: Any, one_thread: None) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(4, 4, dtype=dtype)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return NUMBER_FIRST[name](self.lin(x)).square().mean()

    module, x = Model(), torch.linspace(-1, 1, 16, dtype=dtype).view(4, 4)
    plain = copy.deepcopy(module)
    step = distribute(module, torch.optim.SGD(module.parameters(), 0.1), laptop, plan=Plan(), chips=1)
    loss = plain(x)
    loss.backward()
    assert step({"x": x}) == pytest.approx(loss.item(), rel=1e-6 if dtype == torch.float32 else 1e-12)
    step.sync()
    torch.testing.assert_close(module.lin.weight, plain.lin.weight - 0.1 * plain.lin.weight.grad)
