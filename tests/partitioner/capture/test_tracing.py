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
from partitioner.capture.forwards.step_loss import scalar_loss
from partitioner.capture.tracing import trace_module

X = torch.randn(2, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
Forward = Callable[[Any, torch.Tensor], Any]
Same = Callable[..., Any]
Refusal = Callable[[Forward], CaptureError]


@dataclass
class Output:
    loss: torch.Tensor


@pytest.mark.parametrize(
    "wrap",
    [lambda v: v, Output, lambda v: SimpleNamespace(loss=v), lambda v: {"loss": v, "logits": X}, lambda v: (v, X),
     lambda v: v.reshape(1)],
    ids=["tensor", "dataclass", "namespace", "mapping", "tuple", "one element"],
)  # fmt: skip
def test_a_loss_is_found_in_every_form_that_models_return(
    wrap: Callable[[torch.Tensor], Any], same_as_eager: Same
) -> None:
    same_as_eager(lambda m, x: wrap(m.lin(x).square().mean()))


def by_names(output: torch.Tensor, **given: torch.Tensor) -> torch.Tensor:
    return (output.sum(-1) - given["input"].sum(-1)).square().mean()


def by_batch(output: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return by_names(output, **batch)


@pytest.mark.parametrize("loss_fn", [by_names, by_batch])
def test_loss_fn_is_given_the_output_and_the_whole_batch(loss_fn: Any, check_against_eager: Any) -> None:
    check_against_eager(nn.Linear(4, 3).double(), {"input": X}, loss_fn)


@pytest.mark.parametrize("output", [X, {"logits": X}, "text", None, ()])
def test_what_is_no_scalar_is_refused_with_what_it_is(output: object) -> None:
    with pytest.raises(CaptureError, match="not a scalar loss"):
        scalar_loss(output)


@pytest.mark.parametrize("batch", [{"x": X}, {"input": X, "labels": X}, {}], ids=["other", "more", "none"])
def test_a_batch_that_the_forward_does_not_take_is_refused_with_what_it_takes(batch: Any) -> None:
    with pytest.raises(CaptureError, match=r"does not fit the model|labels is read by neither") as caught:
        trace_module(nn.Linear(4, 3), batch, by_names)
    assert caught.value.where.startswith("Linear.forward(input")


def add_then_relu(m: Any, x: torch.Tensor) -> torch.Tensor:
    hidden = m.lin(x)
    hidden += 1
    torch.relu_(hidden)
    return hidden.square().sum()


def under_no_grad(m: Any, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        scale = m.lin(x).abs().max()
    return (m.lin(x) / scale).sum()


def detached(m: Any, x: torch.Tensor) -> torch.Tensor:
    return (m.lin(x) * m.lin(x).detach()).sum()


def idle_dropout(m: Any, x: torch.Tensor) -> torch.Tensor:
    return F.dropout(F.dropout(m.lin(x), 0.0, training=True), 0.5, training=False).sum()


def autocast_off(m: Any, x: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", enabled=False):
        return m.lin(x).sum()


def autocasting(m: Any, x: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden = F.linear(x.float(), m.lin.weight.float())
        with torch.autocast("cpu", enabled=False):
            again = F.linear(x, m.lin.weight)
    assert hidden.dtype is torch.bfloat16
    return (hidden.double() * again).sum()


def small_tables(m: Any, x: torch.Tensor) -> torch.Tensor:
    table = torch.tensor([[1.0, 2.0], [3.0, 4.0]]).reshape(4)
    return (m.lin(x) * table + torch.tensor(0.5)).mean()


def counting(m: Any, x: torch.Tensor) -> torch.Tensor:
    m.seen += 1
    return m.lin(x).sum() * m.seen


def replacing_a_buffer(m: Any, x: torch.Tensor) -> torch.Tensor:
    m.seen = m.seen + 2
    return m.lin(x).mean() * m.seen


def moving_average(m: Any, x: torch.Tensor) -> torch.Tensor:
    hidden = m.lin(x)
    with torch.no_grad():
        m.seen.lerp_(hidden.abs().mean(), 0.1)
    return hidden.sum() * (1 + m.seen)


@pytest.mark.parametrize(
    "forward",
    [add_then_relu, under_no_grad, detached, idle_dropout, autocast_off, autocasting, small_tables, counting,
     replacing_a_buffer, moving_average],
)  # fmt: skip
def test_the_graph_computes_what_the_module_does(forward: Forward, same_as_eager: Same) -> None:
    same_as_eager(forward)


def test_only_buffers_that_change_are_updated(same_as_eager: Same) -> None:
    assert same_as_eager(counting).updated == ("seen",)
    assert same_as_eager(replacing_a_buffer).updated == ("seen",)
    assert same_as_eager(lambda m, x: (m.lin(x) + m.seen).sum()).updated == ()


def branching(m: Any, x: torch.Tensor) -> torch.Tensor:
    return m.lin(x).sum() if m.lin(x).sum() > 0 else m.lin(x).mean()


def selecting(m: Any, x: torch.Tensor) -> torch.Tensor:
    return m.lin(x)[x > 0].sum()


def converting(m: Any, x: torch.Tensor) -> torch.Tensor:
    return m.lin(x).sum() * x.sum().item()


@pytest.mark.parametrize(
    ("forward", "operator"),
    [
        (branching, "aten._local_scalar_dense"),
        (selecting, "aten.nonzero"),
        (converting, "aten._local_scalar_dense"),
    ],
)
def test_what_depends_on_data_is_refused_with_operator_and_source_line(
    forward: Forward, operator: str, refusal: Refusal
) -> None:
    error = refusal(forward)
    line = forward.__code__.co_firstlineno + 1
    assert operator in error.problem
    assert error.where.startswith(f"{__file__}:{line} (")


def failing(m: Any, x: torch.Tensor) -> torch.Tensor:
    raise KeyError("no such layer")


def test_an_exception_of_the_users_code_is_told_with_its_line(refusal: Refusal) -> None:
    error = refusal(failing)
    assert "KeyError at 'no such layer'" in error.problem
    assert error.where.startswith(f"{__file__}:{failing.__code__.co_firstlineno + 1} (raise KeyError")


def test_a_large_tensor_of_python_numbers_must_be_a_buffer(refusal: Refusal) -> None:
    error = refusal(lambda m, x: (m.lin(x).mean() * torch.tensor([1.0] * 100)).mean())
    assert "neither parameter nor buffer" in error.problem and "buffer" in error.hint


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layer", [nn.Dropout(0.1), nn.BatchNorm1d(4), nn.BatchNorm1d(4, affine=False),
                                   nn.BatchNorm1d(4, track_running_stats=False)], ids=str)  # fmt: skip
def test_layers_that_differ_in_training_are_captured_in_both_modes(
    layer: nn.Module, training: bool, check_against_eager: Any
) -> None:
    module = nn.Sequential(nn.Linear(4, 4), layer).double().train(training)
    captured = check_against_eager(
        module, {"input": X}, lambda out, **batch: out.square().sum(), keyed=isinstance(layer, nn.Dropout)
    )
    tracks = training and getattr(layer, "running_mean", None) is not None
    names = ("1.running_mean", "1.running_var", "1.num_batches_tracked")
    assert captured.updated == (names if tracks else ())


def test_a_loss_without_parameters_is_refused(refusal: Refusal) -> None:
    assert "depends on no parameter" in refusal(lambda m, x: x.mean()).problem


def ignore(*_: Any) -> None:
    return None


@pytest.mark.parametrize(
    ("add", "said"),
    [
        (lambda m: m.lin.register_full_backward_hook(ignore), "backward hook"),
        (lambda m: m.lin.register_full_backward_pre_hook(ignore), "backward hook"),
        (lambda m: m.lin.weight.register_hook(ignore), "gradient hook"),
        (lambda m: m.lin.weight.register_post_accumulate_grad_hook(ignore), "gradient hook"),
    ],
)
def test_hooks_that_would_not_run_are_refused_with_their_place(add: Any, said: str, scripted: Any) -> None:
    module = scripted(add_then_relu)
    add(module)
    with pytest.raises(CaptureError, match=f"a {said} would not run") as caught:
        trace_module(module, {"x": X}, None)
    assert caught.value.where.startswith("lin (Linear)")


def test_forward_hooks_of_the_user_run_in_the_trace(scripted: Any, check_against_eager: Any) -> None:
    module = scripted(lambda m, x: m.lin(x).square().sum())
    module.lin.register_forward_hook(lambda layer, args, output: output * 3)
    plain = trace_module(scripted(module.script), {"x": X}, None)
    hooked = check_against_eager(module, {"x": X})
    assert len(hooked.graph_module.graph.nodes) == len(plain.graph_module.graph.nodes) + 1


def test_our_hooks_are_removed_even_when_the_trace_fails(scripted: Any) -> None:
    module = scripted(branching)
    with pytest.raises(CaptureError):
        trace_module(module, {"x": X}, None)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())


@pytest.mark.parametrize("name", ["builtin:gpt-nano", "hf:gpt2-tiny", "hf:llama-tiny"])
def test_language_models_are_captured_exactly(
    name: str, tiny_model: Callable[..., Any], check_against_eager: Any
) -> None:
    model = tiny_model("cpu", name=name)
    check_against_eager(model.module, model.example_batch(2, 8))


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
