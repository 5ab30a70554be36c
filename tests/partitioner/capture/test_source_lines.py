"""Every refusal of a model, a loss, an optimizer or a call names the line of the user's that it is about."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from comms.errors import has_line, method_line
from orchestrator.exceptions import UserError
from orchestrator.verbs.distribute import distribute
from partitioner import Plan

X = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))


class Drawing(torch.autograd.Function):
    @staticmethod
    def forward(_: Any, x: torch.Tensor) -> torch.Tensor:
        return x * 2

    @staticmethod
    def backward(_: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad * 2 + torch.rand_like(grad)


class Writing(torch.autograd.Function):
    @staticmethod
    def forward(_: Any, x: torch.Tensor) -> torch.Tensor:
        return x.add_(1)

    @staticmethod
    def backward(_: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad


class Scripted(nn.Module):
    """One layer and one buffer, and a script for what lies between layer and loss."""

    def __init__(self, script: Callable[[Any, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.layer, self.script, self.calls = nn.Linear(3, 3), script, 0
        self.register_buffer("held", torch.zeros(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.script(self, self.layer(x)).mean()


class Counting(torch.optim.SGD):
    """Steps by the number of parameters."""

    def step(self, closure: Any = None) -> None:
        super().step(closure)
        for group in self.param_groups:
            for param in group["params"]:
                param.data.add_(len(group["params"]))


def following(m: Any, x: torch.Tensor) -> torch.Tensor:
    m.register_buffer("held", m.layer.weight[0])
    return x


def counting(m: Any, x: torch.Tensor) -> torch.Tensor:
    m.calls += 1
    return x * m.calls


def strided(_: Any, x: torch.Tensor) -> torch.Tensor:
    whole = x * 2
    return torch.as_strided(whole, (2, 2), (1, 1))


MODELS: dict[str, tuple[Callable[[Any, torch.Tensor], torch.Tensor], Plan, str]] = {
    "memory layout": (strided, Plan(), "torch.as_strided(whole, (2, 2), (1, 1))"),
    "draws in a backward": (lambda _, x: Drawing.apply(x), Plan(), "rand_like"),
    "writes in a function": (lambda _, x: Writing.apply(x), Plan(), "Writing.forward"),
    "nothing to cut": (lambda _, x: x, Plan(tp=2), "in layer"),
    "memory of a parameter": (following, Plan(), "Scripted.forward"),
    "counts in Python": (counting, Plan(), "Scripted.forward"),
    "no gradient": (lambda _, x: x.detach(), Plan(), "self.script(self, self.layer(x)).mean()"),
    "values decide": (lambda _, x: x * x.max().item(), Plan(), "x.max().item()"),
    "a generator of its own": (
        lambda _, x: x * torch.rand(3, generator=torch.Generator()), Plan(), "torch.rand(3, generator",
    ),
}  # fmt: skip


def refused(
    script: Any, plan: Plan, kind: type[torch.optim.Optimizer] = torch.optim.SGD, batch: Any = None, **options: Any
) -> str:  # fmt: skip
    module = Scripted(script)
    params = list(module.parameters())[: 1 if "clip_norm" in options else None]
    with pytest.raises(UserError) as caught:
        distribute(module, kind(params, lr=0.1), "laptop", plan=plan, chips=plan.num_chips, **options)(
            batch or {"x": X}
        )
    assert has_line(caught.value.where) and caught.value.hint, str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_refused_with_the_line(name: str, one_thread: None) -> None:
    script, plan, code = MODELS[name]
    said = refused(script, plan)
    assert __file__ in said and code in said


def test_an_optimizer_is_refused_with_its_step(one_thread: None) -> None:
    assert method_line(Counting, "step") in refused(lambda _, x: x, Plan(), Counting)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"clip_norm": 1.0}, "is in no group of the optimizer"),
        ({"batch": {"x": X.to("meta")}}, "is on the meta device"),
        ({"batch": [X]}, "not a mapping"),
    ],
)
def test_a_call_is_refused_with_the_line_that_calls(
    change: dict[str, Any], problem: str, one_thread: None
) -> None:
    said = refused(lambda _, x: x, Plan(), **change)
    assert problem in said and __file__ in said


def test_a_method_that_python_keeps_no_line_of_is_named_alone() -> None:
    assert method_line(int, "bit_length") == "int.bit_length"
    assert has_line(method_line(Counting, "step")) and not has_line("plan: stages")
