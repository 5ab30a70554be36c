"""What a forward leaves in a buffer is one step's only where it is like what was there, and nobody else's."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from comms.errors import CaptureError
from partitioner import Plan
from partitioner.capture.exact_float64 import ExactFloat64
from partitioner.capture.tracing import trace_module


class Kept(nn.Module):
    """A layer, and buffers that a script changes: `count` is whole, `twin` is `mean` under a second name."""

    def __init__(self, script: Callable[[Any, torch.Tensor], None]) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.layer = nn.Linear(4, 4)
        self.inner = nn.Module()
        self.script = script
        for name, value in (("mean", torch.ones(4)), ("last", torch.zeros(4)), ("count", torch.tensor(3))):
            self.register_buffer(name, value)
        self.inner.register_buffer("twin", self.mean)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.layer(x) * self.inner.twin + self.mean.sin() + self.last + self.count * 0.1
        self.script(self, hidden.detach().mean(0))
        return (hidden + self.last[:4]).square().mean()


def fraction(m: Any, _: torch.Tensor) -> None:
    m.count = m.count * 0.5


def longer(m: Any, made: torch.Tensor) -> None:
    m.last = torch.cat([m.last, made])


def one_of_two(m: Any, made: torch.Tensor) -> None:
    m.mean = made


def of_a_parameter(m: Any, _: torch.Tensor) -> None:
    m.last = m.layer.bias.detach()


def of_a_buffer_that_moves(m: Any, made: torch.Tensor) -> None:
    m.last = m.mean
    m.mean.mul_(0.5).add_(made)


def swapped(m: Any, made: torch.Tensor) -> None:
    m.last, m.mean = m.mean * 1.0, made
    m.inner.twin = m.mean


def of_one_value(m: Any, made: torch.Tensor) -> None:
    m.last = m.mean = m.inner.twin = made


def copied_without_a_gradient(m: Any, _: torch.Tensor) -> None:
    averaged = m.layer.weight.mean(0)
    with torch.no_grad():
        m.last.copy_(averaged)


def spread_without_a_gradient(m: Any, _: torch.Tensor) -> None:
    averaged = m.layer.weight.mean()
    with torch.no_grad():
        m.last.copy_(averaged)


@pytest.mark.parametrize(
    ("script", "problem"),
    [
        (fraction, "makes the buffer count, int64 of shape [], one of float32 of shape []"),
        (longer, "makes the buffer last, float32 of shape [4], one of float32 of shape [8]"),
        (one_of_two, "mean and inner.twin are one buffer, of which the forward assigns one"),
        (of_a_parameter, "leaves the buffer last in the memory of the parameter layer.bias"),
        (of_a_buffer_that_moves, "leaves the buffer last in the memory of the buffer mean"),
    ],
)
def test_what_the_next_forward_would_see_otherwise_is_refused(script: Any, problem: str) -> None:
    with pytest.raises(CaptureError) as raised:
        trace_module(Kept(script), {"x": torch.randn(8, 4)}, None)
    assert problem in raised.value.problem and raised.value.hint


def test_narrow_numbers_made_by_a_float64_copy_are_none_of_the_users() -> None:
    def zeroed(m: Any, _: torch.Tensor) -> None:
        m.last = torch.zeros(4)

    with ExactFloat64():
        assert "last" in trace_module(Kept(zeroed).double(), {"x": torch.randn(8, 4).double()}, None).updated


@pytest.mark.parametrize(
    "script", [swapped, of_one_value, copied_without_a_gradient, spread_without_a_gradient]
)
def test_assigned_buffers_train_as_in_plain_torch(script: Any, trained_alike: Any) -> None:
    xs = torch.randn(3, 8, 4, generator=torch.Generator().manual_seed(0))
    trained_alike(Kept(script), [{"x": x} for x in xs], Plan(dp=2), rel=1e-5)
