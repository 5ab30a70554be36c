"""Capture: what becomes a graph, what is refused, and that the graph computes what the module does."""

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from comms.errors import CaptureError
from partitioner.capture.graph_units import build_graph
from partitioner.capture.tracing import scalar_loss, trace_module

X = torch.randn(2, 4, generator=torch.Generator().manual_seed(1))
Forward = Callable[["Scripted", torch.Tensor], Any]


class Scripted(nn.Module):
    """One linear layer, one buffer, and whatever forward the test is about."""

    def __init__(self, forward: Forward) -> None:
        super().__init__()
        self.lin = nn.Linear(4, 4)
        self.register_buffer("seen", torch.zeros(()))
        self.script = forward

    def forward(self, x: torch.Tensor) -> Any:
        return self.script(self, x)


def values_of(captured: Any, module: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Run a captured graph on real tensors."""
    sources = {f"params:{k}": v for k, v in module.named_parameters()}
    sources |= {f"buffers:{k}": v for k, v in module.named_buffers()}
    sources |= {f"batch:{k}": v for k, v in batch.items()}
    return captured.graph_module(*(sources[name] for name in captured.names.values()))


def traced(forward: Forward) -> tuple[Any, Scripted]:
    module = Scripted(forward)
    return trace_module(module, {"x": X}, None), module


def refused(forward: Forward) -> CaptureError:
    with pytest.raises(CaptureError) as caught:
        build_graph(traced(forward)[0], num_samples=2)
    return caught.value


def same(forward: Forward) -> bool:
    captured, module = traced(forward)
    return torch.equal(values_of(captured, module, {"x": X}), scalar_loss(module(X)))


@dataclass
class Output:
    loss: torch.Tensor


@pytest.mark.parametrize(
    "wrap",
    [lambda v: v, Output, lambda v: SimpleNamespace(loss=v), lambda v: {"loss": v, "logits": X}, lambda v: (v, X),
     lambda v: v.reshape(1)],
    ids=["tensor", "dataclass", "namespace", "mapping", "tuple", "one element"],
)  # fmt: skip
def test_a_loss_is_found_in_every_form_that_models_return(wrap: Callable[[torch.Tensor], Any]) -> None:
    assert same(lambda m, x: wrap(m.lin(x).square().mean()))


def test_loss_fn_is_given_the_output_and_the_whole_batch() -> None:
    module, batch = nn.Linear(4, 3), {"input": X}
    captured = trace_module(
        module, batch, lambda output, **given: (output.sum(-1) - given["input"].sum(-1)).square().mean()
    )
    expected = (module(X).sum(-1) - X.sum(-1)).square().mean()
    torch.testing.assert_close(values_of(captured, module, batch), expected)


@pytest.mark.parametrize("output", [X, {"logits": X}, "text", None, ()])
def test_what_is_no_scalar_is_refused_with_what_it_is(output: object) -> None:
    with pytest.raises(CaptureError, match="not a scalar loss"):
        scalar_loss(output)


def relu_then_add(m: Scripted, x: torch.Tensor) -> torch.Tensor:
    hidden = m.lin(x)
    torch.relu_(hidden)
    hidden += 1
    return hidden.sum()


def under_no_grad(m: Scripted, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        scale = m.lin(x).abs().max()
    return (m.lin(x) / scale).sum()


def idle_dropout(m: Scripted, x: torch.Tensor) -> torch.Tensor:
    return F.dropout(F.dropout(m.lin(x), 0.0, training=True), 0.5, training=False).sum()


def autocast_off(m: Scripted, x: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", enabled=False):
        return m.lin(x).sum()


def small_tables(m: Scripted, x: torch.Tensor) -> torch.Tensor:
    table = torch.tensor([[1.0, 2.0], [3.0, 4.0]]).reshape(4)
    return (m.lin(x) * table + torch.tensor(0.5)).mean()


@pytest.mark.parametrize("forward", [relu_then_add, under_no_grad, idle_dropout, autocast_off, small_tables])
def test_the_graph_computes_what_the_module_does(forward: Forward) -> None:
    assert same(forward)


def test_in_place_operators_become_pure() -> None:
    captured, _ = traced(relu_then_add)
    targets = [n.target for n in captured.graph_module.graph.nodes if n.op == "call_function"]
    assert not any(t._schema.is_mutable for t in targets)


def test_values_made_under_no_grad_are_marked() -> None:
    captured, _ = traced(under_no_grad)
    marks = {n.name: n.meta["no_grad"] for n in captured.graph_module.graph.nodes if n.op == "call_function"}
    assert marks["max_1"] and not marks["div"]


def branching(m: Scripted, x: torch.Tensor) -> torch.Tensor:
    return m.lin(x).sum() if m.lin(x).sum() > 0 else m.lin(x).mean()


def selecting(m: Scripted, x: torch.Tensor) -> torch.Tensor:
    return m.lin(x)[x > 0].sum()


@pytest.mark.parametrize(
    ("forward", "operator"), [(branching, "aten._local_scalar_dense"), (selecting, "aten.nonzero")]
)
def test_what_depends_on_data_is_refused_with_operator_and_source_line(
    forward: Forward, operator: str
) -> None:
    error = refused(forward)
    line = forward.__code__.co_firstlineno + 1
    assert operator in error.problem
    assert error.where.startswith(f"{__file__}:{line} (")


def counting(m: Scripted, x: torch.Tensor) -> torch.Tensor:
    m.seen += 1
    return m.lin(x).sum() * m.seen


def writing_input(m: Scripted, x: torch.Tensor) -> torch.Tensor:
    return m.lin(x.add_(1)).sum()


def writing_slice(m: Scripted, x: torch.Tensor) -> torch.Tensor:
    hidden = m.lin(x)
    hidden[:, 0] = 0
    return hidden.sum()


@pytest.mark.parametrize(
    ("forward", "said"),
    [(counting, "aten.add_.Tensor changes buffers:seen"), (writing_input, "aten.add_.Tensor changes batch:x"),
     (writing_slice, "aten.fill_.Tensor changes select")],
)  # fmt: skip
def test_writes_to_buffers_inputs_and_slices_are_refused(forward: Forward, said: str) -> None:
    assert said in refused(forward).problem


def writing_what_was_viewed(m: Scripted, x: torch.Tensor) -> torch.Tensor:
    hidden = m.lin(x)
    flat = hidden.view(-1)
    hidden.add_(1)
    return flat.mean()


def writing_a_chunk(m: Scripted, x: torch.Tensor) -> torch.Tensor:
    hidden = m.lin(x)
    hidden.chunk(2, -1)[0].mul_(2)
    return hidden.mean()


def replacing_a_buffer(m: Scripted, x: torch.Tensor) -> torch.Tensor:
    m.seen = m.seen + 1
    return m.lin(x).mean() * m.seen


@pytest.mark.parametrize(
    ("forward", "problem"),
    [
        (writing_what_was_viewed, "in place"),
        (writing_a_chunk, "in place"),
        (replacing_a_buffer, "replaces a buffer"),
    ],
)
def test_writes_through_views_and_new_buffers_are_refused(forward: Forward, problem: str) -> None:
    assert problem in refused(forward).problem


def test_a_large_tensor_of_python_numbers_must_be_a_buffer() -> None:
    error = refused(lambda m, x: (m.lin(x).mean() * torch.tensor([1.0] * 100)).mean())
    assert "created from Python numbers" in error.problem and "buffer" in error.hint


def functional_dropout(m: Scripted, x: torch.Tensor) -> torch.Tensor:
    return F.dropout(m.lin(x), 0.5, training=True).mean()


def noisy(m: Scripted, x: torch.Tensor) -> torch.Tensor:
    return (m.lin(x) + torch.randn(2, 4)).mean()


def noisy_in_place(m: Scripted, x: torch.Tensor) -> torch.Tensor:
    return (m.lin(x) + torch.empty(2, 4).uniform_()).mean()


@pytest.mark.parametrize(
    ("forward", "operator"),
    [(functional_dropout, "aten.dropout"), (noisy, "aten.randn"), (noisy_in_place, "aten.uniform")],
)
def test_random_operators_are_refused_by_name(forward: Forward, operator: str) -> None:
    assert f"random operator {operator}" in refused(forward).problem


@pytest.mark.parametrize(("layer", "said"), [(nn.Dropout(0.1), "dropout"), (nn.BatchNorm1d(4), "batch norm")])
def test_active_dropout_and_batch_norm_are_refused_by_module_name(layer: nn.Module, said: str) -> None:
    module = nn.Sequential(nn.Linear(4, 4), layer)
    with pytest.raises(CaptureError, match=said) as caught:
        trace_module(module, {"input": X}, lambda out, **batch: out.sum())
    assert caught.value.where == f"1 ({type(layer).__name__})"


@pytest.mark.parametrize("layer", [nn.Dropout(0.1), nn.BatchNorm1d(4)])
def test_in_eval_mode_dropout_and_batch_norm_are_captured(layer: nn.Module) -> None:
    module = nn.Sequential(nn.Linear(4, 4), layer).eval()
    captured = trace_module(module, {"input": X}, lambda out, **batch: out.sum())
    torch.testing.assert_close(values_of(captured, module, {"input": X}), module(X).sum())


def autocasting(m: Scripted, x: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return m.lin(x).sum()


def test_a_model_that_switches_autocast_on_is_told_about_dtype() -> None:
    error = refused(autocasting)
    assert "autocast" in error.problem and "dtype" in error.hint


def test_a_loss_without_parameters_is_refused() -> None:
    assert "depends on no parameter" in refused(lambda m, x: x.mean()).problem


def test_hooks_are_removed_even_when_the_trace_fails() -> None:
    module = Scripted(branching)
    with pytest.raises(CaptureError):
        trace_module(module, {"x": X}, None)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())


@pytest.mark.parametrize("name", ["builtin:gpt-nano", "hf:gpt2-tiny", "hf:llama-tiny"])
def test_language_models_are_captured_exactly(name: str, tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("cpu", name=name)
    batch = model.example_batch(2, 8)
    captured = trace_module(model.module, batch, None, model.tp_plan)
    expected = scalar_loss(model.module(**batch))
    torch.testing.assert_close(values_of(captured, model.module, batch), expected, rtol=1e-6, atol=1e-6)


def test_frozen_parameters_and_tied_ones_are_noted(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model(tied=True)
    model.module.positions.weight.requires_grad_(False)
    captured = trace_module(model.module, model.example_batch(1, 8), None, model.tp_plan)
    assert captured.frozen == {"positions.weight"}
    assert "params:embed.weight" in captured.names.values()
    assert "params:head.weight" not in captured.names.values()


def test_the_models_own_tensor_parallel_plan_is_used_unless_one_is_given(
    tiny_model: Callable[..., Any],
) -> None:
    model = tiny_model()
    batch = model.example_batch(1, 8)
    assert trace_module(model.module, batch, None).tp_plan["embed"] == "vocab"
    assert trace_module(model.module, batch, None, {"embed": "replicate"}).tp_plan == {"embed": "replicate"}


def test_meta_parameters_are_enough(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("meta")
    captured = trace_module(model.module, model.example_batch(1, 8), None)
    assert all(p.is_meta for p in model.module.parameters())
    assert captured.calls and captured.containers == {"blocks.0", "blocks.1"}
