"""Numbers that a forward takes from the host are refused: a capture would keep the first for all steps."""

import copy
import itertools
import os
import random
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from torch import nn

from comms.errors import CaptureError
from partitioner.capture.graph_units import capture_graph
from partitioner.capture.tracing import trace_module

COUNTER = itertools.count()
TAKEN: dict[str, tuple[Callable[[], Any], str]] = {
    "random": (random.random, "Python's random"),
    "numpy": (numpy.random.rand, "numpy.random"),
    "numpy array": (lambda: torch.from_numpy(numpy.random.rand(4)), "numpy.random"),
    "fresh generator": (lambda: numpy.random.default_rng().random(), "the system's random numbers"),
    "clock": (time.perf_counter, "another number each time"),
    "operating system": (lambda: int.from_bytes(os.urandom(8), "big"), "another number each time"),
    "counter": (lambda: next(COUNTER), "another number each time"),
    "constant tensor": (lambda: torch.tensor([next(COUNTER), 0, 0, 0]), "another number each time"),
}


class Scaled(nn.Module):
    """Its loss depends on a number from the host."""

    def __init__(self, taken: Callable[[], Any]) -> None:
        super().__init__()
        self.lin, self.taken = nn.Linear(4, 4), taken

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.lin(x) * self.taken()).mean()


@pytest.mark.parametrize("dp", [1, 2])
@pytest.mark.parametrize("name", TAKEN)
def test_what_differs_from_call_to_call_is_refused(name: str, dp: int) -> None:
    taken, why = TAKEN[name]
    with pytest.raises(CaptureError, match=why):
        capture_graph(Scaled(taken), {"x": torch.randn(4, 4)}, dp=dp)


class Copying(nn.Module):
    """A weight is used as a copy: gradients do not reach it, while its values follow it."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.lin(x) + copy.deepcopy(self.lin)(x)).mean()


def test_a_layer_that_is_copied_in_the_forward_is_refused_with_what_to_do() -> None:
    with pytest.raises(CaptureError, match=r"what the forward copies \(deepcopy\)"):
        capture_graph(Copying(), {"x": torch.randn(4, 4)})


class Skipping(nn.Module):
    """A layer that is left out at random, by a generator of its own."""

    def __init__(self, made: Callable[[], Any]) -> None:
        super().__init__()
        self.lin, self.made = nn.Linear(4, 1), made
        self.rng = made()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.lin(x) if self.rng.random() < 0.1 else self.lin(2 * x)).sum()


@pytest.mark.parametrize(
    "made",
    [lambda: numpy.random.default_rng(0), lambda: random.Random(0), random.SystemRandom,
     lambda: numpy.random.RandomState(0)],
    ids=["numpy's", "Python's", "the system's", "an old one of numpy"],
)  # fmt: skip
def test_generators_of_the_module_itself_are_seen(made: Callable[[], Any]) -> None:
    with pytest.raises(CaptureError, match="the forward draws from"):
        capture_graph(Skipping(made), {"x": torch.randn(4, 4)})


@pytest.mark.parametrize(
    "taken", [random.random, random.SystemRandom().random], ids=["Python's", "the system's"]
)
def test_what_other_threads_draw_is_none_of_the_forwards(taken: Callable[[], float]) -> None:
    def elsewhere() -> float:
        drawn: list[float] = []
        thread = threading.Thread(target=lambda: drawn.append(random.random() + taken()))
        thread.start()
        thread.join()
        return 2.0

    before = random.getstate()
    capture_graph(Scaled(elsewhere), {"x": torch.randn(4, 4)})
    assert random.getstate() != before, "what they drew stays drawn"


@pytest.mark.parametrize(
    ("taken", "text"),
    [
        (time.perf_counter, "self.taken"),
        (lambda: random.random(), "random()"),
        (lambda: numpy.random.rand(), "rand()"),
    ],
)
def test_the_line_is_named(taken: Callable[[], Any], text: str) -> None:
    with pytest.raises(CaptureError) as caught:
        capture_graph(Scaled(taken), {"x": torch.randn(4, 4)})
    assert __file__ in caught.value.where and text in caught.value.where


def test_generators_are_as_they_were() -> None:
    before, of_numpy = random.getstate(), numpy.random.get_state()[1]
    for taken in (random.random, numpy.random.rand):
        with pytest.raises(CaptureError):
            capture_graph(Scaled(taken), {"x": torch.randn(4, 4)})
    assert random.getstate() == before
    assert (numpy.random.get_state()[1] == of_numpy).all()


@pytest.mark.parametrize("taken", [lambda: 0.5, lambda: numpy.float64(0.5), lambda: torch.linspace(0, 1, 4)])
def test_what_is_always_the_same_may_be_taken(taken: Callable[[], Any]) -> None:
    assert capture_graph(Scaled(taken), {"x": torch.randn(4, 4)}).units


@pytest.mark.parametrize("draws", [False, True])
def test_a_generator_that_is_only_held_is_no_draw(draws: bool, scripted: Any) -> None:
    module = scripted(lambda m, x: m.lin(x).sum() * (torch.rand(1, generator=m.held).item() if draws else 1))
    module.held = torch.Generator().manual_seed(1)
    state = module.held.get_state()
    if draws:
        with pytest.raises(CaptureError):
            trace_module(module, {"x": torch.ones(2, 4, dtype=torch.float64)}, None)
    else:
        trace_module(module, {"x": torch.ones(2, 4, dtype=torch.float64)}, None)
    assert torch.equal(module.held.get_state(), state)
