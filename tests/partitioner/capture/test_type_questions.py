"""A forward that asks for the type of a value trains as it does in plain PyTorch."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from orchestrator.verbs.distribute import distribute
from partitioner.layout.parallel_plan import Plan

Question = Callable[[nn.Module, Tensor, Tensor], bool]
MADE = type("Made", (), {"there": True})
QUESTIONS: dict[str, Question] = {
    "input": lambda m, x, y: type(x) is Tensor,
    "value": lambda m, x, y: type(y) in (Tensor, list),
    "parameter": lambda m, x, y: type(m.weight) is nn.Parameter and type(m.bias) is not Tensor,
    "buffer": lambda m, x, y: type(m.kept) is Tensor,
    "table": lambda m, x, y: {Tensor: True}.get(type(y), False),
    "name": lambda m, x, y: type(y).__name__ == "Tensor",
    "others": lambda m, x, y: type([y]) is list and type(m) is Asking,
    "a type": lambda m, x, y: isinstance(Tensor, type) and issubclass(type, type) and not isinstance(3, type),
    "made": lambda m, x, y: type("Made", (MADE,), {})().there,
    "type itself": lambda m, x, y: type(Tensor) is type(x).__class__ and {type: True}[type],
    "class": lambda m, x, y: x.__class__ is Tensor and y.__class__ in (Tensor, list),
    "class of a parameter": lambda m, x, y: m.weight.__class__ is nn.Parameter is not m.kept.__class__,
    "stand-in": lambda m, x, y: (
        not hasattr(y, "fake_mode") and getattr(m.weight, "fake_device", None) is None
    ),
    "isinstance": lambda m, x, y: isinstance(x, Tensor) and isinstance(m.weight, nn.Parameter),
}


class Asking(nn.Linear):
    """Doubles its loss if the answer is yes."""

    kept: Tensor

    def __init__(self, question: Question) -> None:
        super().__init__(4, 4, dtype=torch.float64)
        self.question = question
        self.register_buffer("kept", torch.ones(4, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x) * self.kept
        return (y * 2 if self.question(self, x, y) else y).square().mean()


@pytest.mark.parametrize("plan", [Plan(), Plan(dp=2, tp=2)], ids=str)
@pytest.mark.parametrize("name", QUESTIONS)
def test_types_are_those_of_training(name: str, plan: Plan, laptop: Any, one_thread: None) -> None:
    module, x = Asking(QUESTIONS[name]), torch.randn(8, 4, dtype=torch.float64)
    assert QUESTIONS[name](module, x, x)
    step = distribute(
        module, torch.optim.SGD(module.parameters(), lr=0.1), laptop, plan=plan, chips=plan.num_chips
    )
    assert step({"x": x}) == pytest.approx(module(x).item(), rel=1e-12)
    assert "type" not in globals()
