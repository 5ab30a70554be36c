"""Counts: what a forward counts in Python is refused where it matters, whenever it begins to, and left alone else."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch
from torch import nn

from orchestrator.exceptions import UserError
from orchestrator.verbs.distribute import distribute
from partitioner import Plan

SEEN: list[int] = []
X = torch.randn(8, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Count = Callable[[Any], float]


class Net(nn.Module):
    calls = 0

    def __init__(self, count: Count) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.count = count
        self.step, self.losses, self.widest = 0, list[int](), 0
        self.array, self.held = numpy.zeros(2), SimpleNamespace(k=0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(x))).square().mean() * self.count(self)


def attribute(after: int) -> Count:
    def count(m: Any) -> float:
        m.step += 1
        return 1.0 if m.step <= after else 2.0

    return count


def every_hundredth(m: Any) -> float:
    m.step += 1
    return 2.0 if m.step % 100 == 0 else 1.0


def length(m: Any) -> float:
    m.losses.append(1)
    return 1.0 if len(m.losses) < 30 else 2.0


def entry_of_an_array(m: Any) -> float:
    m.array[0] += 1
    return 1.0 if m.array[0] < 20 else 2.0


def attribute_of_an_object(m: Any) -> float:
    m.held.k += 1
    return 1.0 if m.held.k < 25 else 2.0


def largest(m: Any) -> float:
    m.widest = max(m.widest, 4)
    return float(m.widest)


def of_the_class(m: Any) -> float:
    type(m).calls += 1
    return 1.0 if type(m).calls < 1000 else 2.0


def in_a_global(_: Any) -> float:
    SEEN.append(1)
    return 1.0 if len(SEEN) < 1000 else 2.0


def unused(m: Any) -> float:
    m.step += 1
    m.losses.append(m.step)
    m.held.k, m.array[1] = m.step, m.step
    return 1.0


@pytest.mark.parametrize(
    "count",
    [*map(attribute, range(1, 9)), attribute(1000), every_hundredth, length, entry_of_an_array,
     attribute_of_an_object, largest],
)  # fmt: skip
def test_a_count_of_the_model_that_matters_at_any_time_is_refused(count: Count, one_thread: None) -> None:
    module = Net(count).double()
    step = distribute(module, torch.optim.SGD(module.parameters(), 0.1), "laptop", plan=Plan(dp=2), chips=2)
    with pytest.raises(UserError, match=r"the forward depends on \w+, which it changes itself") as caught:
        step({"x": X})
    assert __file__ in caught.value.where
    assert (module.step, module.losses, module.widest, module.held.k) == (0, [], 0, 0)
    assert not module.array.any()


@pytest.mark.parametrize("count", [of_the_class, in_a_global])
def test_a_count_outside_of_the_model_is_refused(count: Count, one_thread: None) -> None:
    module = Net(count).double()
    step = distribute(module, torch.optim.SGD(module.parameters(), 0.1), "laptop", plan=Plan(), chips=1)
    with pytest.raises(UserError, match="each forward changes what its code names outside of the model"):
        step({"x": X})


def test_a_count_that_nothing_reads_is_no_matter_but_is_not_kept(trained_alike: Any) -> None:
    module = Net(unused).double()
    with pytest.warns(UserWarning, match="the forward counts step, which stays as it was"):
        trained_alike(module, [{"x": X}] * 3, Plan(dp=2))
    assert (module.step, module.losses) == (0, [])


@torch.library.custom_op("orchestrate_tests::counted", mutates_args=())
def counted(x: torch.Tensor) -> torch.Tensor:
    SEEN.append(1)
    return x * len(SEEN)


@torch.library.custom_op("orchestrate_tests::drawn", mutates_args=())
def drawn(x: torch.Tensor) -> torch.Tensor:
    return x * torch.rand_like(x)


@torch.library.custom_op("orchestrate_tests::doubled", mutates_args=())
def doubled(x: torch.Tensor) -> torch.Tensor:
    return x * 2


for operator in (counted, drawn, doubled):
    operator.register_fake(torch.empty_like)
    operator.register_autograd(lambda _, grad: grad * 2)


class Operated(Net):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.count(self.first(x))).square().mean()  # type: ignore[operator]


@pytest.mark.parametrize(
    ("operator", "problem"),
    [(counted, "counted.default changes what its code"), (drawn, "drawn.default draws random numbers")],
)
def test_what_an_operator_does_besides_is_refused(operator: Any, problem: str, one_thread: None) -> None:
    module = Operated(operator).double()
    step = distribute(module, torch.optim.SGD(module.parameters(), 0.1), "laptop", plan=Plan(pp=2), chips=2)
    with pytest.raises(UserError, match=problem):
        step({"x": X})


def test_operators_of_users_train_as_in_torch(trained_alike: Any) -> None:
    trained_alike(Operated(lambda x: doubled(x)).double(), [{"x": X}] * 2, Plan(pp=2))
