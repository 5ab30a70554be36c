"""What tests of capture share: a module with any forward, and captured graphs run beside the module itself."""

import copy
from collections.abc import Callable, Mapping
from contextlib import ExitStack, nullcontext
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils import _pytree as trees

from comms.errors import CaptureError
from partitioner.capture.batch_inputs import tensors_of
from partitioner.capture.forwards.keyed_random import FIRST_SAMPLE, KEY, keyed_random
from partitioner.capture.forwards.step_loss import loss_of_step
from partitioner.capture.graph_units import build_graph
from partitioner.capture.samples.loss_form import whole_loss
from partitioner.capture.tracing import Captured, trace_module

Forward = Callable[..., Any]
X = torch.randn(2, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
NUMBER = 77  # the key of random numbers


class Scripted(nn.Module):
    """One linear layer, one buffer, and whatever forward the test is about."""

    def __init__(self, forward: Forward) -> None:
        super().__init__()
        self.lin = nn.Linear(4, 4, dtype=torch.float64)
        self.register_buffer("seen", torch.zeros((), dtype=torch.float64))
        self.script = forward

    def forward(self, x: torch.Tensor) -> Any:
        return self.script(self, x)


class UnderModes(torch.fx.Interpreter):
    """Runs every node of a graph under what it was traced under."""

    def run_node(self, n: torch.fx.Node) -> Any:
        with ExitStack() as modes:
            if n.meta.get("no_grad"):
                modes.enter_context(torch.no_grad())
            if autocast := n.meta.get("autocast"):
                modes.enter_context(torch.autocast(*autocast, cache_enabled=False))
            return super().run_node(n)


def run_captured(
    captured: Captured, module: nn.Module, batch: Mapping[str, Any], first: int = 0
) -> list[Any]:
    """The loss, and what updated buffers hold then."""
    sources = {f"params:{k}": v for k, v in module.named_parameters()}
    sources |= {f"buffers:{k}": v for k, v in module.named_buffers()}
    sources |= {f"batch:{k}": v for k, v in tensors_of(batch).items()}
    sources |= {f"batch:{KEY}": torch.tensor(NUMBER), f"batch:{FIRST_SAMPLE}": torch.tensor(first)}
    return list(UnderModes(captured.graph_module).run(*(sources[n] for n in captured.names.values())))


def gradients(loss: torch.Tensor, module: nn.Module) -> list[torch.Tensor]:
    module.zero_grad()
    loss.backward()
    found = [
        torch.zeros_like(p) if p.grad is None else p.grad for p in module.parameters() if p.requires_grad
    ]
    module.zero_grad()
    return found


def check_against_eager(
    module: nn.Module, batch: Mapping[str, Any], loss_fn: Forward | None = None, *, keyed: bool = False
) -> Captured:
    """The graph's loss, gradients and new buffers are those of the module itself."""
    captured = trace_module(module, batch, loss_fn)
    loss, *after = run_captured(captured, module, batch)
    plain = copy.deepcopy(module)
    inputs = trees.tree_map_only(torch.Tensor, torch.Tensor.clone, dict(batch))
    with keyed_random(torch.tensor(NUMBER), torch.tensor(0)) if keyed else nullcontext():
        expected = loss_of_step(plain, loss_fn, inputs)
    torch.testing.assert_close(loss, expected)
    for mine, theirs in zip(gradients(loss, module), gradients(expected, plain), strict=True):
        torch.testing.assert_close(mine, theirs)
    buffers = dict(module.named_buffers()) | dict(zip(captured.updated, after, strict=True))
    for name, value in plain.named_buffers():
        torch.testing.assert_close(buffers[name], value)
    return captured


@pytest.fixture(scope="session")
def scripted() -> Callable[[Forward], Scripted]:
    """A module whose forward is `forward(module, x)`, always with the same weights."""

    def make(forward: Forward) -> Scripted:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return Scripted(forward)

    return make


@pytest.fixture(scope="session")
def same_as_eager(scripted: Callable[[Forward], Scripted]) -> Callable[..., Captured]:
    """Check that a forward's graph does what the forward does; returns the capture."""

    def check(forward: Forward, **more: Any) -> Captured:
        return check_against_eager(scripted(forward), {"x": X}, **more)

    return check


@pytest.fixture(scope="session", name="check_against_eager")
def checker() -> Callable[..., Captured]:
    return check_against_eager


@pytest.fixture(scope="session", name="run_captured")
def runner() -> Callable[..., list[Any]]:
    return run_captured


@pytest.fixture(scope="session")
def refusal(scripted: Callable[[Forward], Scripted]) -> Callable[[Forward], CaptureError]:
    """What is said to a forward that cannot be captured; its module is as it was afterwards."""

    def capture(module: nn.Module) -> None:
        captured = trace_module(module, {"x": X.clone()}, None)
        build_graph(captured, whole_loss(captured), frozenset())

    def refuse(forward: Forward) -> CaptureError:
        module = scripted(forward)
        before = copy.deepcopy(module.state_dict())
        with pytest.raises(CaptureError) as caught:
            capture(module)
        assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())
        return caught.value

    return refuse
