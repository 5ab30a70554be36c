"""Around steps: hooks, modes, odd batches and optimizers, changed models are as in plain torch, or refused."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import optimizer as optimizers
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from orchestrator.exceptions import UserError
from orchestrator.verbs.distribute import DistributedStep, distribute
from partitioner import Plan

X = torch.randn(8, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Net(nn.Module):
    """A loss that goes by how its batch is nested, too."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.register_buffer("scale", torch.ones(4))

    def forward(self, x: torch.Tensor, more: Any = ()) -> torch.Tensor:
        out = self.second(torch.tanh(self.first(x))) * self.scale
        way = (2 if isinstance(more, tuple) else 3) * (1 if x.is_contiguous() else 5)
        return out.square().mean() * way * (1 if not x.requires_grad else 7)


class Assigning(torch.optim.SGD):
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    param.data = param.data - 0.1 * param.grad


class Reading(Net):
    """Changes lists of the batch, and reads what else is given."""

    def forward(self, x: torch.Tensor, more: Any = ()) -> torch.Tensor:
        if isinstance(more, list):
            more.append(1)
        self.scale.mul_(0.9)
        return super().forward(x) * (more.mean() if isinstance(more, torch.Tensor) else 1)


def test_lists_of_the_batch_that_a_forward_changes_are_refused(one_thread: None) -> None:
    step = step_of(Reading().double())
    with pytest.raises(UserError, match="the forward changes what the batch's more holds") as caught:
        step({"x": X, "more": [2]})
    assert __file__ in caught.value.where


@pytest.mark.parametrize("name", ["scale", "first.weight"])
def test_what_the_model_trains_cannot_be_given_as_data(name: str, one_thread: None) -> None:
    module = Reading().double()
    value = module.get_buffer(name) if name == "scale" else module.get_parameter(name).detach()
    with pytest.raises(UserError, match=f"the batch's more lies in the memory of {name}"):
        step_of(module)({"x": X, "more": value})


def test_that_an_entry_is_given_no_gradient_is_said_once(one_thread: None) -> None:
    step, x = step_of(Net().double()), X.clone().requires_grad_()
    with pytest.warns(UserWarning, match="the batch's x requires a gradient, which it is not given"):
        step({"x": x})


class Averaging(Net):
    """A running average whose share is a count."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4, momentum=None)

    def forward(self, x: torch.Tensor, more: Any = ()) -> torch.Tensor:
        return super().forward(self.norm(x))


def test_averages_by_a_count_are_refused(one_thread: None) -> None:
    with pytest.raises(UserError, match="momentum=None go by a count") as caught:
        step_of(Averaging().double())({"x": X})
    assert caught.value.where.startswith("norm (BatchNorm1d)")


class Doubling(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        return made * 2 if func is torch.tanh else made


class Passing(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def step_of(module: nn.Module, kind: Any = torch.optim.SGD, plan: Plan | None = None) -> DistributedStep:
    plan = plan or Plan(dp=2)
    return distribute(module, kind(module.parameters(), lr=0.1), "laptop", plan=plan, chips=plan.num_chips)


@pytest.mark.parametrize(
    "plan", [Plan(), Plan(dp=2, zero=1), Plan(tp=2), Plan(pp=2, microbatches=2)], ids=str
)
def test_an_optimizer_may_assign_data(plan: Plan, trained_alike: Any) -> None:
    trained_alike(Net().double(), [{"x": X}] * 3, plan, kind=Assigning, rel=1e-11)


@pytest.mark.filterwarnings("ignore:the batch's x requires a gradient")
def test_how_a_batch_is_nested_and_lies_counts_in_every_step(one_thread: None) -> None:
    module, step = Net().double(), step_of(Net().double(), lambda p, lr: torch.optim.SGD(p, lr=0.0))
    others: list[Any] = [(), (), (), (), (), [], (), {}, ()]
    for number, more in enumerate(others):
        x = {6: X.t().contiguous().t(), 7: X.clone().requires_grad_()}.get(number, X)
        expected = module(x, more).item()
        assert step({"x": x, "more": more}) == pytest.approx(expected, rel=1e-9), number


@pytest.fixture
def hooks() -> Iterator[list[Any]]:
    handles: list[Any] = []
    yield handles
    for handle in handles:
        handle.remove()


LATE: dict[str, Callable[[Any], Any]] = {
    "a gradient hook would not run": lambda m: m.first.weight.register_hook(lambda g: g * 0),
    "a backward hook would not run": lambda m: m.second.register_full_backward_hook(lambda *_: None),
    "hooks of the optimizer's steps would not run": lambda _: optimizers.register_optimizer_step_pre_hook(
        lambda *_: None
    ),
}


@pytest.mark.parametrize("problem", LATE)
@pytest.mark.parametrize("is_synced", [False, True])
def test_hooks_that_come_after_a_step_are_seen(
    problem: str, is_synced: bool, hooks: list[Any], one_thread: None
) -> None:
    module = Net().double()
    step = step_of(module)
    step({"x": X})
    if is_synced:
        step.sync()
    hooks.append(LATE[problem](module))
    with pytest.raises(UserError, match=problem) as caught:
        step({"x": X})
    assert __file__ in caught.value.where


@pytest.mark.parametrize(
    "around",
    [Doubling, Passing, lambda: torch.autograd.graph.saved_tensors_hooks(lambda t: t * 2, lambda t: t)],
)
def test_what_is_around_a_step_and_would_not_see_it_is_refused(around: Any, one_thread: None) -> None:
    step = step_of(Net().double())
    with around(), pytest.raises(UserError, match="is around the step, and would not see what it computes"):
        step({"x": X})


def test_anomaly_detection_is_refused_by_its_name(one_thread: None) -> None:
    step = step_of(Net().double())
    with torch.autograd.set_detect_anomaly(True), pytest.raises(UserError, match="anomaly detection is on"):
        step({"x": X})


def test_modes_of_torch_may_be_around_a_step(one_thread: None) -> None:
    module, step = Net().double(), step_of(Net().double())
    with torch.device("cpu"), torch.autograd.graph.save_on_cpu():
        assert step({"x": X}) == pytest.approx(module(X).item(), rel=1e-9)


def twice(module: Any) -> list[Any]:
    return [*module.parameters(), module.first.weight]


def with_a_buffer(module: Any) -> list[Any]:
    module.scale.requires_grad_()
    return [*module.parameters(), module.scale]


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate")
@pytest.mark.parametrize(
    ("trained", "problem"),
    [(twice, "holds first.weight twice"), (with_a_buffer, "holds the buffer scale")],
)
def test_what_an_optimizer_steps_on_besides_is_refused(trained: Any, problem: str, one_thread: None) -> None:
    module = Net().double()
    optimizer = torch.optim.SGD(trained(module), lr=0.1)
    with pytest.raises(UserError, match=problem):
        distribute(module, optimizer, "laptop", plan=Plan(), chips=1)({"x": X})


class Tagged(torch.Tensor):
    """A tensor with code of its own."""


class Named(dict):  # type: ignore[type-arg]
    """A batch with attributes."""


def noted(x: torch.Tensor, **attributes: object) -> Any:
    for name, value in attributes.items():
        setattr(x, name, value)
    return x


def hooked(x: torch.Tensor) -> torch.Tensor:
    x.requires_grad_().register_hook(lambda g: g)
    return x


@pytest.mark.parametrize(
    ("batch", "problem"),
    [
        ({"x": X.clone().requires_grad_() * 2}, "the batch's x was computed from what takes gradients"),
        ({"x": hooked(X.clone())}, "the batch's x has a gradient hook"),
        ({"x": X.as_subclass(Tagged)}, "the batch's x is a Tagged, whose own code would not run"),
        ({"x": noted(X.clone(), share=2.0)}, "the batch's x has the attribute share"),
        (noted(Named(x=X), share=2.0), "the batch has share beside its entries"),
        ({"x": X, "more": {1: X, "1": X}}, "two entries of the batch are called more.1"),
        ({"x": nn.Parameter(X)}, "the batch's x is a parameter, which nothing would train"),
        ({1: X}, "the batch has the key 1, which names no input"),
        ({"x": [1.0, 2.0]}, "no entry of the batch is a tensor with samples, to be cut into 2 parts"),
    ],
)
def test_batches_that_would_be_taken_for_others_are_refused(
    batch: Any, problem: str, one_thread: None
) -> None:
    with pytest.raises(UserError, match=problem) as caught:
        step_of(Net().double())(batch)
    assert __file__ in caught.value.where


def of_inference() -> nn.Module:
    with torch.inference_mode():
        return Net()


@pytest.mark.parametrize(
    ("made", "problem"),
    [
        (lambda: Net().to("meta"), "on the meta device"),
        (of_inference, "a tensor of inference_mode"),
        (lambda: torch.jit.script(nn.Linear(4, 4)), "the module is scripted"),
        (lambda: torch.compile(Net()), "the module is compiled"),
    ],
)
def test_models_that_cannot_be_trained_so_are_refused(made: Any, problem: str, one_thread: None) -> None:
    with pytest.raises(UserError, match=problem):
        step_of(made(), plan=Plan())({"x": X.float()})


def cut(module: Any, _: Any) -> None:
    module.second = nn.Identity()


def emptied(_: Any, optimizer: Any) -> None:
    optimizer.param_groups.clear()


def spoilt(module: Any, optimizer: Any) -> None:
    optimizer.state[module.first.weight] = "none"


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (cut, "the model has no second.bias any more, which the chips have trained"),
        (emptied, "holds none of the model's parameters"),
        (spoilt, "the optimizer's state of first.weight is a str"),
    ],
)
def test_what_is_taken_away_between_steps_is_said(change: Any, problem: str, one_thread: None) -> None:
    module = Net().double()
    step = step_of(module)
    step({"x": X})
    change(module, step.optimizer)
    with pytest.raises(UserError, match=problem):
        step({"x": X})


@pytest.mark.parametrize("change", [{"dp": "2"}, {"zero": True}, {"microbatches": 2.0}])
def test_degrees_are_whole_numbers(change: Any) -> None:
    with pytest.raises(UserError, match=next(iter(change))):
        Plan(**change)
