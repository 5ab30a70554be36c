"""Refusals: what is said of calls that no graph holds, and what is answered instead of refused."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad, graph
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from comms.errors import CaptureError, PlanError
from partitioner.capture.batch_inputs import require_plain
from partitioner.capture.graph_units import capture_graph
from partitioner.capture.tracing import trace_module

X = torch.randn(8, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
Loss = Callable[[torch.Tensor], torch.Tensor]


def as_a_dual(h: torch.Tensor) -> torch.Tensor:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(forward_ad.make_dual(h, h)).primal


def normed(h: torch.Tensor) -> torch.Tensor:
    ones = torch.ones(4, dtype=torch.float64)
    return torch.native_batch_norm(h, ones, ones, ones * 0, ones * 1, True, 0.1, 1e-5)[0]


class Doubling(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {})) * 2


def in_a_mode(hidden: torch.Tensor) -> torch.Tensor:
    with Doubling():
        return hidden.sin()


def in_two_modes(hidden: torch.Tensor) -> torch.Tensor:
    norm = nn.functional.batch_norm
    mean, var = torch.zeros(4, dtype=hidden.dtype), torch.ones(4, dtype=hidden.dtype)
    return norm(norm(hidden, mean, var), mean, var, training=True)


def bags(hidden: torch.Tensor) -> torch.Tensor:
    return nn.functional.embedding_bag(hidden.argmax(1, keepdim=True), hidden, sparse=True)


REFUSED: dict[str, tuple[Loss, str, str]] = {
    "vmap": (lambda h: torch.vmap(torch.sin)(h), "vmap cannot be captured", "batch dim"),
    "grad": (lambda h: torch.func.grad(lambda v: v.sum())(h), "computes gradients itself", "as a formula"),
    "jvp": (lambda h: torch.func.jvp(torch.sin, (h,), (h,))[1], "computes derivatives itself", "as a formula"),
    "duals": (as_a_dual, "computes derivatives itself", "as a formula"),
    "retain_grad": (lambda h: (h.retain_grad(), h)[1], "nothing to keep", "leave it out"),
    "its gradient": (lambda h: h if h.grad is None else h * 2, "reads .grad", "in the optimizer"),
    "a mode": (in_a_mode, "Doubling changes what operators do", "TorchFunctionMode"),
    "two modes": (in_two_modes, "in eval mode, and then in train mode", "in one mode"),
    "hooks": (lambda h: (graph.register_multi_grad_hook((h,), print), h)[1], "hook on gradients", "leave"),
    "counts": (lambda h: h * torch.bincount(h.argmax(1)).sum(), "aten.bincount", "one_hot"),
    "repeats": (lambda h: h.repeat_interleave(h[0].long(), 1), "repeat_interleave", "pass output_size"),
    "values": (lambda h: h if h.sum() > 0 else -h, "_local_scalar_dense", "must not depend on tensor values"),
    "hidden writes": (normed, "native_batch_norm writes running statistics", "nn.functional.batch_norm"),
    "sparse gradients": (bags, "sparse gradients are not supported", "sparse=False"),
    "sparse": (lambda h: h.to_sparse().to_dense(), "to_sparse makes or reads a sparse tensor", "dense"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_refusal_says_what_and_on_which_line_and_what_to_do(name: str, refusal: Any) -> None:
    function, said, hint = REFUSED[name]
    error = refusal(lambda m, x: function(m.lin(x)).sum())
    assert said in error.problem and hint in error.hint
    if "sparse" not in name:  # lines of graphs take a second capture
        assert error.where.startswith(f"{__file__}:")


def tried(read: Callable[[torch.Tensor], Any]) -> Loss:
    """What reads a value in training, and is content with another number where that fails."""

    def function(hidden: torch.Tensor) -> torch.Tensor:
        try:
            read(hidden)
        except Exception:
            return hidden
        return hidden * 2

    return function


CAUGHT: dict[str, Callable[[torch.Tensor], Any]] = {
    "item": lambda h: h.sum().item(),
    "truth": lambda h: bool((h > 0).all()),
    "array": lambda h: h.detach().numpy(),
    "list": lambda h: h.tolist(),
    "places": lambda h: len(h.nonzero()),
    "memory": lambda h: h.data_ptr(),
    "derivative": lambda h: torch.autograd.grad(h.sum(), h),
    "shapes": lambda h: h + torch.ones(3, 5),
}


@pytest.mark.parametrize("name", CAUGHT)
def test_errors_that_the_forward_catches_do_not_decide_what_is_trained(name: str, refusal: Any) -> None:
    error = refusal(lambda m, x: tried(CAUGHT[name])(m.lin(x)).sum())
    assert "the forward catches an error that may not come in training" in error.problem
    assert error.where.startswith(f"{__file__}:") and "try" in error.hint


def test_errors_of_pythons_may_be_caught() -> None:
    def function(hidden: torch.Tensor) -> torch.Tensor:
        try:
            return hidden * hidden.no_such_thing
        except AttributeError:
            return hidden * 2

    capture_graph(Inner(lambda h: function(h).sum()), {"x": X})


class Inner(nn.Module):
    def __init__(self, function: Loss) -> None:
        super().__init__()
        self.lin, self.function = nn.Linear(4, 4).double(), function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(self.lin(x))


@pytest.mark.parametrize("function", [REFUSED["values"][0], REFUSED["sparse"][0], lambda h: h.cumsum(0)])
def test_the_submodule_is_named_beside_the_line(function: Loss) -> None:
    module = nn.Sequential(nn.Linear(4, 4).double(), Inner(function))
    with pytest.raises(CaptureError) as caught:
        capture_graph(module, {"input": X}, dp=2, microbatches=2, loss_fn=lambda o: o.square().mean())
    assert caught.value.where.startswith(f"{__file__}:") and caught.value.where.endswith(", in 1")


def asking(m: Any, x: torch.Tensor) -> torch.Tensor:
    hidden = m.lin(x)
    with torch.no_grad():
        other = m.lin(x)
    asked = (hidden, other, x, m.lin.weight, hidden.detach(), hidden > 0, m.lin.weight * 1)
    told = [v.requires_grad + 2 * v.is_leaf for v in asked]
    return (hidden * torch.tensor(told[:4], dtype=x.dtype)).sum() + (hidden.sum() * sum(told[4:]))


def asking_after_a_write(m: Any, x: torch.Tensor) -> torch.Tensor:
    hidden = torch.zeros(2, 4, dtype=x.dtype)
    hidden[0] = m.lin(x)[0]
    return hidden.sum() * (3.0 if hidden.requires_grad and not hidden.is_leaf else 1.0)


@pytest.mark.parametrize("forward", [asking, asking_after_a_write])
def test_whether_a_value_requires_a_gradient_is_answered_as_by_torch(
    forward: Any, same_as_eager: Any
) -> None:
    same_as_eager(forward)


@pytest.mark.parametrize("kind", [nn.DataParallel])
def test_wrappers_that_split_batches_are_refused(kind: Any) -> None:
    with pytest.raises(CaptureError, match="splits batches") as caught:
        trace_module(kind(nn.Linear(4, 4)), {"input": X}, lambda o: o.sum())
    assert "model.module" in caught.value.hint


def test_entries_and_buffers_that_are_not_dense_are_refused_by_name() -> None:
    with pytest.raises(PlanError, match="the batch's x is a sparse tensor"):
        require_plain({"x": X.to_sparse()})
    module = nn.Linear(4, 4)
    module.register_buffer("edges", torch.eye(4).to_sparse())
    with pytest.raises(CaptureError, match="edges is sparse"):
        trace_module(module, {"input": X}, lambda o: o.sum())


@pytest.mark.parametrize(("width", "number"), [(4, 0), (1, 1)])
def test_warnings_are_those_of_the_whole_batch_and_said_once(width: int, number: int) -> None:
    module, batch = nn.Linear(4, 4).double(), {"input": X, "y": X[:, :width]}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        capture_graph(module, batch, dp=2, microbatches=2, loss_fn=lambda o, y: F.mse_loss(o, y))
    assert ["torch.Size([8, 4])" in str(w.message) for w in caught] == [True] * number


def test_samples_in_the_second_dim_are_refused_with_the_entry() -> None:
    batch = {"input": X[:5].unsqueeze(1).expand(5, 8, 4)}
    with pytest.raises(PlanError, match="does not divide into 4 parts") as caught:
        capture_graph(nn.Linear(4, 4).double(), batch, dp=4, loss_fn=lambda o: o.square().mean())
    assert "with samples in the first dim of input" in caught.value.hint


def test_what_only_the_whole_batch_can_do_is_said_with_the_part() -> None:
    def loss(output: torch.Tensor) -> torch.Tensor:
        return (output - torch.ones(8, 4, dtype=torch.float64)).square().mean()

    with pytest.raises(CaptureError, match="4 of 8 samples cannot be run by themselves") as caught:
        capture_graph(nn.Linear(4, 4).double(), {"input": X}, dp=2, loss_fn=loss)
    assert "take sizes from the inputs" in caught.value.hint


@pytest.mark.filterwarnings("ignore")
def test_buffers_of_quantization_have_their_length_before() -> None:
    quantization = pytest.importorskip("torch.ao.quantization")
    module = nn.Sequential(nn.Linear(4, 4))
    module.qconfig = quantization.get_default_qat_qconfig("fbgemm")
    prepared = quantization.prepare_qat(module)
    batch = {"input": X.float()}
    with pytest.raises(CaptureError, match="as long as there are channels") as found:
        trace_module(prepared, batch, lambda output: output.sum())
    assert found.value.hint.startswith("call the model once before")
    prepared(**batch)
    trace_module(prepared, batch, lambda output: output.sum())
