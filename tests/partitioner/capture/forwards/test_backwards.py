"""Backwards of autograd functions: what they read, draw, count and leave out is as in plain torch, or refused."""

import copy
import random
import sys
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from orchestrator.exceptions import UserError
from orchestrator.verbs.distribute import distribute
from partitioner import Plan

SEEN: list[int] = []
PLANS = [Plan(), Plan(dp=2, microbatches=2)]


class Reversed(torch.autograd.Function):
    factor = 1.0

    @staticmethod
    def forward(_: Any, x: torch.Tensor) -> torch.Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(_: Any, grad: torch.Tensor) -> torch.Tensor:
        return -Reversed.factor * grad


class Asking(Reversed):
    @staticmethod
    def backward(_: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad * (2 if type(grad) is torch.Tensor else 3)


class Gated(torch.autograd.Function):
    """Its second operand gets no gradient."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate)
        return x * gate

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad * ctx.saved_tensors[0], None


class Drawn(Reversed):
    @staticmethod
    def backward(_: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad * random.random()


class DrawnByTorch(Reversed):
    @staticmethod
    def backward(_: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad * torch.rand_like(grad)


class Counted(Reversed):
    @staticmethod
    def backward(_: Any, grad: torch.Tensor) -> torch.Tensor:
        SEEN.append(1)
        return grad * (1 + len(SEEN) % 2)


class Caught(Reversed):
    @staticmethod
    def backward(_: Any, grad: torch.Tensor) -> torch.Tensor:
        try:
            return grad * (1 + grad.max().item())
        except Exception:
            return grad


class Net(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.gate = nn.Parameter(torch.full((4,), 2.0))
        self.register_buffer("count", torch.zeros(()))
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.first(x)
        hidden = self.function(self, hidden) if callable(self.function) else hidden
        return self.second(hidden).square().mean()


def closing_over(change: Any) -> Any:
    """A function whose backward has the module from outside."""

    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        class Own(torch.autograd.Function):
            @staticmethod
            def forward(_: Any, value: torch.Tensor) -> torch.Tensor:
                return value * 2

            @staticmethod
            def backward(_: Any, grad: torch.Tensor) -> torch.Tensor:
                return change(m, grad)

        made: torch.Tensor = Own.apply(x)
        return made

    return forward


def counts_in_a_buffer(m: Any, grad: torch.Tensor) -> torch.Tensor:
    m.count.add_(1)
    return grad * m.count


def sets_a_gradient(m: Any, grad: torch.Tensor) -> torch.Tensor:
    m.gate.grad = grad.sum(0)
    return grad


def counts_in_the_module(m: Any, grad: torch.Tensor) -> torch.Tensor:
    m.calls = getattr(m, "calls", 0) + 1
    return grad * m.calls


def annealed(step: int) -> AbstractContextManager[None]:
    Reversed.factor = 1.0 + step // 3
    return nullcontext()


@pytest.mark.parametrize("plan", PLANS, ids=str)
@pytest.mark.parametrize(
    "function",
    [lambda _, x: Reversed.apply(x), lambda _, x: Asking.apply(x), lambda m, x: Gated.apply(x, m.gate)],
    ids=["reversed", "asking", "gated"],
)
def test_a_backward_is_that_of_plain_torch_in_every_step(
    function: Any, plan: Plan, trained_alike: Any
) -> None:
    xs = torch.randn(7, 8, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    batches = [{"x": x} for x in xs]  # the last ones come after the steps whose forwards are looked at
    settings = {"kind": torch.optim.AdamW, "weight_decay": 0.5, "rel": 1e-11, "around": annealed}
    trained_alike(Net(function).double(), batches, plan, **settings)


@pytest.mark.parametrize(
    ("function", "problem"),
    [
        (lambda _, x: Drawn.apply(x), "draws from Python's random"),
        (
            lambda _, x: DrawnByTorch.apply(x),
            "the backward of DrawnByTorch draws random numbers",
        ),
        (lambda _, x: Counted.apply(x), "computes with another number each time"),
        (lambda _, x: Caught.apply(x), "catches an error"),
        (closing_over(counts_in_a_buffer), "computes with count, which its forward is not given"),
        (closing_over(lambda m, grad: grad * m.gate), "computes with gate, which its forward is not given"),
        (closing_over(sets_a_gradient), "sets .grad"),
        (closing_over(counts_in_the_module), "depends on calls, which it changes itself"),
    ],
)
def test_what_a_backward_does_besides_is_refused(function: Any, problem: str, one_thread: None) -> None:
    module = Net(function)
    held = copy.deepcopy(module.state_dict())
    step = distribute(module, torch.optim.SGD(module.parameters(), 0.1), "laptop", plan=Plan(), chips=1)
    with pytest.raises(UserError, match=problem) as caught:
        step({"x": torch.randn(8, 4)})
    assert __file__ in caught.value.where
    assert all(torch.equal(value, held[name]) for name, value in module.state_dict().items())


def seeded(_: Any, x: torch.Tensor) -> torch.Tensor:
    torch.manual_seed(0)
    return x @ torch.randn(4, 4)


def seeded_elsewhere(_: Any, x: torch.Tensor) -> torch.Tensor:
    torch.default_generator.manual_seed(0)
    return x @ torch.randn(4, 4)


def hooked(_: Any, x: torch.Tensor) -> torch.Tensor:
    made = x.tanh()
    node: Any = made.grad_fn
    node.register_hook(lambda *_: None)
    return made


def hooked_below(_: Any, x: torch.Tensor) -> torch.Tensor:
    made = x.tanh()
    node: Any = made.grad_fn
    node.next_functions[0][0].register_prehook(lambda *_: None)
    return made


@pytest.mark.parametrize(
    ("function", "problem"),
    [
        (seeded, "seeds torch's generator"),
        (seeded_elsewhere, "draws from torch's generator, past the keys"),
        (hooked, "a hook on a gradient would not run"),
        (hooked_below, "a hook on a gradient would not run"),
    ],
)
def test_seeds_and_hooks_on_nodes_are_refused(function: Any, problem: str, one_thread: None) -> None:
    module = Net(function)
    step = distribute(module, torch.optim.SGD(module.parameters(), 0.1), "laptop", plan=Plan(), chips=1)
    state = torch.get_rng_state()
    with pytest.raises(UserError, match=problem):
        step({"x": torch.ones(8, 4)})
    assert torch.equal(torch.get_rng_state(), state)


def named(_: Any, x: torch.Tensor) -> torch.Tensor:
    made = x.tanh()
    node: Any = made.grad_fn
    told = type(node).__name__ == "TanhBackward0" and node.name() == "TanhBackward0" and node == made.grad_fn
    return made * (2 if told and sys.getrefcount(node) else 3)


def test_a_node_tells_what_it_is(one_thread: None) -> None:
    module = Net(named).double()
    x = torch.ones(8, 4).double()
    expected = module(x).item()
    step = distribute(module, torch.optim.SGD(module.parameters(), 0.1), "laptop", plan=Plan(), chips=1)
    assert step({"x": x}) == pytest.approx(expected, rel=1e-9)


def counted_in_a_checkpoint(use_reentrant: bool) -> Any:
    def forward(_: Any, x: torch.Tensor) -> torch.Tensor:
        seen: list[int] = []

        def function(value: torch.Tensor) -> torch.Tensor:
            seen.append(1)
            return value.tanh() * len(seen)

        made: torch.Tensor = checkpoint(function, x, use_reentrant=use_reentrant)
        return made

    return forward


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_checkpointed_function_that_counts_its_runs_is_refused(
    use_reentrant: bool, one_thread: None
) -> None:
    module = Net(counted_in_a_checkpoint(use_reentrant))
    step = distribute(module, torch.optim.SGD(module.parameters(), 0.1), "laptop", plan=Plan(), chips=1)
    with pytest.raises(UserError, match="computes with another number the second time"):
        step({"x": torch.ones(8, 4)})
