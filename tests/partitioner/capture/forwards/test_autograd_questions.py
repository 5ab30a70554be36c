"""Questions about autograd are answered as in a plain loop, or refused; what a forward changes there is refused."""

import math
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from comms.errors import CaptureError
from partitioner.capture.graph_units import capture_graph
from partitioner.capture.tracing import trace_module

KINDS = ("trained", "frozen", "buffer", "hidden", "detached", "constant", "inferred", "own")
QUESTIONS: dict[str, Callable[[Tensor], bool]] = {
    "requires_grad": lambda v: v.requires_grad,
    "grad_fn": lambda v: v.grad_fn is not None,
    "is_leaf": lambda v: v.is_leaf,
    "parameter": lambda v: isinstance(v, nn.Parameter),
    "tracing": lambda v: torch.jit.is_tracing() or torch.compiler.is_compiling(),
    "modes": lambda v: torch.is_grad_enabled() and not torch.is_inference_mode_enabled(),
}
WAYS = ("plain", "writes", "checkpointed", "reentrant")
X = torch.randn(4, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


class Asking(nn.Module):
    """A forward that goes another way by what it asks of a tensor of one kind."""

    def __init__(self, kind: str, question: str, way: str) -> None:
        super().__init__()
        self.kind, self.question, self.way = kind, question, way
        self.trained, self.frozen = nn.Linear(3, 3), nn.Linear(3, 3).requires_grad_(False)
        self.register_buffer("kept", torch.ones(3))
        self.double()

    @torch.inference_mode()
    def inferred(self, x: Tensor) -> Tensor:
        return self.trained(x)

    def of_kind(self, x: Tensor) -> Tensor:
        hidden = self.trained(x)
        if self.kind == "constant":
            with torch.no_grad():
                return self.trained(x)
        return {
            "trained": self.trained.weight, "frozen": self.frozen.weight, "buffer": self.kept, "hidden": hidden,
            "detached": hidden.detach(), "inferred": self.inferred(x), "own": x.clone().requires_grad_(),
        }[self.kind]  # fmt: skip

    def inner(self, x: Tensor) -> Tensor:
        return self.trained(x) * (3 if QUESTIONS[self.question](self.of_kind(x)) else 1)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.frozen(x) * self.trained.bias
        if self.way == "writes":
            hidden.mul_(2)
        if self.way in ("plain", "writes"):
            hidden = hidden + self.inner(hidden)
        else:
            hidden = hidden + checkpoint(self.inner, hidden, use_reentrant=self.way == "reentrant")
        return (hidden - self.inferred(x).clone()).square().mean()


@pytest.mark.parametrize("way", WAYS)
def test_every_question_is_answered_as_in_training_or_refused(way: str, check_against_eager: Any) -> None:
    refused = [
        e for asked in product(KINDS, QUESTIONS) if (e := refusal_of(*asked, way, check_against_eager))
    ]
    assert bool(refused) == (way == "reentrant")
    assert all("reentrant" in e.problem and "test_autograd_questions.py" in e.where for e in refused)


def refusal_of(kind: str, question: str, way: str, check: Any) -> CaptureError | None:
    try:
        check(Asking(kind, question, way), {"x": X})
    except CaptureError as error:
        return error
    except AssertionError as error:
        raise AssertionError(f"{kind} {question} {way}") from error
    return None


def test_attributes_of_parameters_are_seen(scripted: Any, run_captured: Any) -> None:
    module = scripted(lambda m, x: m.lin(x).sum() * getattr(m.lin.weight, "scale", 1.0))
    module.lin.weight.scale = 3.0
    batch = {"x": torch.ones(2, 4, dtype=X.dtype)}
    loss = run_captured(trace_module(module, batch, None), module, batch)[0]
    torch.testing.assert_close(loss, module.lin(batch["x"]).sum() * 3)


def regulariser(module: nn.Module, x: Tensor) -> Tensor:
    return module.lin(x).sum() + sum(p.square().sum() for p in module.parameters() if p.requires_grad)


def filled(module: nn.Module, x: Tensor) -> Tensor:
    table = torch.zeros(2, 4, dtype=x.dtype)
    table[0] = module.lin(x)[0]
    return table.square().sum() * (3 if table.requires_grad and not table.is_leaf else 1)


def looked_up(module: nn.Module, x: Tensor) -> Tensor:
    return (x @ module.get_parameter("lin.weight")).sum()


def switched(module: nn.Module, x: Tensor) -> Tensor:
    torch.set_grad_enabled(False)
    constant = module.lin(x)
    with torch.inference_mode(False):
        trained = module.lin(x)
    torch.set_grad_enabled(True)
    return (trained * constant).sum()


def same_again(module: nn.Module, x: Tensor) -> Tensor:
    module.requires_grad_(True)
    return module.lin(x).sum()


@pytest.mark.parametrize("forward", [regulariser, filled, looked_up, switched, same_again])
def test_what_autograd_does_is_what_it_does_in_training(forward: Any, same_as_eager: Any) -> None:
    same_as_eager(forward)


class Scale(torch.autograd.Function):
    """Doubles where a gradient is needed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * (2 if ctx.needs_input_grad[0] else 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad * 2


def test_an_autograd_function_knows_whether_a_gradient_is_needed(same_as_eager: Any) -> None:
    same_as_eager(lambda m, x: (Scale.apply(m.lin(x)) + Scale.apply(x)).square().sum())


def freezes(module: nn.Module, x: Tensor) -> Tensor:
    module.lin.requires_grad_(False)
    loss = module.lin(x).sum()
    module.lin.requires_grad_(True)
    return loss + module.lin(x).square().sum()


def sets(module: nn.Module, x: Tensor) -> Tensor:
    module.lin.bias.requires_grad = False
    return module.lin(x).sum()


def detaches(module: nn.Module, x: Tensor) -> Tensor:
    module.lin.bias.detach_()
    return module.lin(x).sum()


def asks_memory(module: nn.Module, x: Tensor) -> Tensor:
    return module.lin(x).sum() * module.lin.weight._version


def makes(module: nn.Module, x: Tensor) -> Tensor:
    if not hasattr(module, "gain"):
        module.gain = nn.Parameter(torch.ones(4, dtype=x.dtype))
    return (module.lin(x) * module.gain).sum()


foreign, held = (
    torch.ones(4, dtype=X.dtype, requires_grad=True),
    nn.BatchNorm1d(4, affine=False, dtype=X.dtype),
)


@pytest.mark.parametrize(
    ("forward", "said"),
    [(freezes, "sets requires_grad of the parameter lin.weight"),
     (sets, "sets requires_grad of the parameter lin.bias"),
     (detaches, "sets requires_grad of the parameter lin.bias"), (asks_memory, "asks for the memory"),
     (makes, "the first forward makes gain"),
     (lambda m, x: (m.lin(x) * foreign).sum(), "trained in plain PyTorch, but is no parameter"),
     (lambda m, x: held(m.lin(x)).square().sum(), "writes into a tensor that is neither parameter nor buffer")],
    ids=["freezes", "sets", "detaches", "memory", "makes", "foreign", "written"],
)  # fmt: skip
def test_what_would_train_otherwise_is_refused_with_its_line(forward: Any, said: str, refusal: Any) -> None:
    error = refusal(forward)
    assert said in error.problem
    assert error.where


class Centred(nn.Module):
    """A loss with a buffer of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("centre", torch.zeros((), dtype=X.dtype))

    def forward(self, output: Tensor) -> Tensor:
        self.centre = self.centre * 0.5 + output.detach().mean()
        return (output - self.centre).square().sum()


def test_a_loss_that_changes_its_own_buffer_is_refused_and_left_as_it_was() -> None:
    loss = Centred()
    with pytest.raises(CaptureError, match="centre of Centred changes"):
        trace_module(nn.Linear(3, 2).double(), {"input": X}, loss)
    assert loss.centre.tolist() == 0.0


MODEL_OF_A_LIBRARY = """
class Asking(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(4, 4)

    def forward(self, x):
        height = x.shape[0] / 2
        rows = int(torch.ceil(height) if torch.jit.is_tracing() else math.ceil(height))
        return self.lin(x).mul_(2.0)[:rows].square().mean()
"""


@pytest.mark.parametrize("library", ["transformers.models.asking", "timm.models.asking"])
def test_models_of_libraries_are_not_told_that_they_are_traced(library: str) -> None:
    space = {"__name__": library, "math": math, "nn": nn, "torch": torch}
    exec(MODEL_OF_A_LIBRARY, space)
    assert capture_graph(space["Asking"](), {"x": torch.randn(4, 4)}).units
