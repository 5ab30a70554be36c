"""Pure graphs: writes become values with eager torch's gradients, those that no value expresses are refused."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from comms.errors import CaptureError
from partitioner.capture.pure_graph import LARGEST_LITERAL
from partitioner.capture.tracing import trace_module

Forward = Callable[[Any, torch.Tensor], torch.Tensor]
Same = Callable[..., Any]
Refusal = Callable[[Forward], CaptureError]


def writing_slice(m: Any, x: torch.Tensor) -> torch.Tensor:
    hidden = m.lin(x)
    hidden[:, 0] = 0
    return hidden.square().sum()


def writing_what_was_viewed(m: Any, x: torch.Tensor) -> torch.Tensor:
    hidden = m.lin(x)
    flat = hidden.view(-1)
    hidden.add_(x)
    return flat.square().mean()


def writing_a_part(m: Any, x: torch.Tensor) -> torch.Tensor:
    hidden = m.lin(x)
    hidden.narrow(-1, 1, 2).mul_(2)
    return hidden.square().mean()


def writing_a_transposed_view(m: Any, x: torch.Tensor) -> torch.Tensor:
    hidden = m.lin(x) * 1
    hidden.t()[1].copy_(m.lin(2 * x)[:, 0])
    return hidden.square().mean()


def filling_a_new_tensor(m: Any, x: torch.Tensor) -> torch.Tensor:
    table = torch.zeros(3, *x.shape, dtype=x.dtype)
    for row in range(3):
        table[row] = m.lin(x) * (row + 1)
    return table.square().mean()


def adding_at_indices(m: Any, x: torch.Tensor) -> torch.Tensor:
    found = torch.zeros(3, 4, dtype=x.dtype)
    found.index_add_(0, torch.tensor([2, 2]), m.lin(x))
    return found.square().sum()


def masking_in_place(m: Any, x: torch.Tensor) -> torch.Tensor:
    scores = m.lin(x)
    scores.masked_fill_(x > 0, float("-inf"))
    return scores.logsumexp(-1).clamp(min=-50.0).sum()


def with_functions_that_write(m: Any, x: torch.Tensor) -> torch.Tensor:
    hidden = F.relu(m.lin(x), inplace=True)
    return F.hardtanh(hidden + x, inplace=True).square().sum()


def writing_the_detached_copy(m: Any, x: torch.Tensor) -> torch.Tensor:
    copied = m.lin(x).detach().clone()
    copied.mul_(3)
    return (m.lin(x) * copied).sum()


def writing_numbers_under_no_grad(m: Any, x: torch.Tensor) -> torch.Tensor:
    table = torch.ones_like(x)
    with torch.no_grad():
        table[0].mul_(5)
    return (m.lin(x) * table).sum()


def writing_a_buffer_through_a_view(m: Any, x: torch.Tensor) -> torch.Tensor:
    m.seen.view(1)[0] = x.sum()
    return m.lin(x).sum() * m.seen


WRITES = [
    writing_slice, writing_what_was_viewed, writing_a_part, writing_a_transposed_view, filling_a_new_tensor,
    adding_at_indices, masking_in_place, with_functions_that_write, writing_the_detached_copy,
    writing_numbers_under_no_grad, writing_a_buffer_through_a_view,
]  # fmt: skip


@pytest.mark.parametrize("forward", WRITES)
def test_writes_give_the_values_and_gradients_of_eager_torch(forward: Forward, same_as_eager: Same) -> None:
    graph = same_as_eager(forward).graph_module.graph
    operators = [n.target for n in graph.nodes if isinstance(n.target, torch._ops.OpOverload)]
    assert operators and not any(operator._schema.is_mutable for operator in operators)
    assert {node.op for node in graph.nodes} == {"placeholder", "call_function", "output"}


def writing_input(m: Any, x: torch.Tensor) -> torch.Tensor:
    return m.lin(x.add_(1)).sum()


def writing_a_view_of_the_input(m: Any, x: torch.Tensor) -> torch.Tensor:
    x.t()[0].zero_()
    return m.lin(x).sum()


def writing_a_parameter(m: Any, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        m.lin.weight.mul_(0.5)
    return m.lin(x).sum()


def writing_through_data(m: Any, x: torch.Tensor) -> torch.Tensor:
    m.lin.weight.data[0].zero_()
    return m.lin(x).sum()


@pytest.mark.parametrize(
    ("forward", "said"),
    [
        (writing_input, "aten.add_.Tensor writes into the input x"),
        (writing_a_view_of_the_input, "aten.zero_.default writes into the input x"),
        (writing_a_parameter, "aten.mul_.Tensor writes into the parameter lin.weight"),
        (writing_through_data, "aten.zero_.default writes into the parameter lin.weight"),
    ],
)
def test_writes_into_inputs_and_parameters_are_refused(forward: Forward, said: str, refusal: Refusal) -> None:
    error = refusal(forward)
    assert error.problem == said
    assert "clone" in error.hint


def writing_what_was_detached(m: Any, x: torch.Tensor) -> torch.Tensor:
    hidden = m.lin(x)
    hidden.detach().mul_(2)
    return hidden.sum()


def writing_under_no_grad(m: Any, x: torch.Tensor) -> torch.Tensor:
    hidden = m.lin(x)
    with torch.no_grad():
        hidden[0] *= 2
    return hidden.sum()


def writing_through_data_of_a_value(m: Any, x: torch.Tensor) -> torch.Tensor:
    hidden = m.lin(x)
    hidden.data.clamp_(-1, 1)
    return hidden.sum()


def viewing_what_was_copied(m: Any, x: torch.Tensor) -> torch.Tensor:
    hidden = torch.zeros(2, 2, 2, dtype=x.dtype).transpose(1, 2)
    hidden.copy_(m.lin(x).view(2, 2, 2))
    return hidden.transpose(1, 2).view(2, 4).sin().sum()


def viewing_what_was_masked(m: Any, x: torch.Tensor) -> torch.Tensor:
    hidden = m.lin(x).view(2, 2, 2).transpose(1, 2) * 2
    hidden.masked_fill_(hidden.detach() > 1, 0.0)
    return hidden.transpose(1, 2).view(2, 4).sin().sum()


def writing_through_a_later_view(m: Any, x: torch.Tensor) -> torch.Tensor:
    hidden = m.lin(x).view(2, 2, 2).transpose(1, 2) * 2
    hidden.add_(1)
    flat = hidden.transpose(1, 2).view(2, 4)
    flat[0].mul_(3)
    return hidden.sin().sum()


def writing_into_out(m: Any, x: torch.Tensor) -> torch.Tensor:
    scale, largest, place = (
        torch.empty(2, 4, dtype=x.dtype),
        x.new_empty(0),
        torch.empty(0, dtype=torch.int64),
    )
    torch.mul(m.lin(x).detach(), 2.0, out=scale)
    torch.max(m.lin(x).detach(), 1, out=(largest, place))
    return (m.lin(x) * scale).sum() + (m.lin(x)[:, 0] * largest).sum()


OUT_OF_ORDER = [
    viewing_what_was_copied,
    viewing_what_was_masked,
    writing_through_a_later_view,
    writing_into_out,
]


@pytest.mark.parametrize("forward", OUT_OF_ORDER)
def test_writes_are_seen_through_views_and_other_arguments(forward: Forward, same_as_eager: Same) -> None:
    same_as_eager(forward)


HIDDEN = [writing_what_was_detached, writing_under_no_grad, writing_through_data_of_a_value]


@pytest.mark.parametrize("forward", HIDDEN)
def test_writes_behind_autograds_back_are_refused(forward: Forward, refusal: Refusal) -> None:
    assert "behind autograd's back" in refusal(forward).problem


class WritingLate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.lin(x)
        x.add_(1)
        return hidden.sum()


def test_a_refusal_names_the_line_of_the_write() -> None:
    line = WritingLate.forward.__code__.co_firstlineno + 2
    with pytest.raises(CaptureError) as caught:
        trace_module(WritingLate(), {"x": torch.ones(2, 4)}, None)
    assert caught.value.where == f"{__file__}:{line} (x.add_(1))"


def by_modes(m: Any, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        first = m.lin(x).exp()
        with torch.enable_grad():
            second = m.lin(x).sin()
        third = first.cos()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        fourth = third.tan()
        with torch.autocast("cpu", enabled=False):
            fifth = fourth.tanh()
    return (second * fifth).sum()


def test_every_operation_is_marked_with_what_it_runs_under(same_as_eager: Same) -> None:
    graph = same_as_eager(by_modes).graph_module.graph
    marks = {n.name: (n.meta["no_grad"], n.meta["autocast"]) for n in graph.nodes if n.op == "call_function"}
    bfloat = ("cpu", torch.bfloat16, True)
    expected = {"exp": (True, None), "sin": (False, None), "cos": (True, None), "tan": (False, bfloat)}
    assert {name: marks[name] for name in expected} == expected
    assert marks["tanh"][1][::2] == ("cpu", False)
    assert marks["sum_1"] == (False, None)
    assert not any("autocast" in str(n.target) or "grad_enabled" in str(n.target) for n in graph.nodes)


def literal(numel: int) -> Forward:
    numbers = [0.5 * n for n in range(numel)]
    return lambda m, x: m.lin(x).sum() * torch.tensor(numbers, dtype=torch.float64).square().sum()


def test_python_numbers_become_operators_up_to_a_size(same_as_eager: Same, refusal: Refusal) -> None:
    for numel in (0, 1, LARGEST_LITERAL):
        same_as_eager(literal(numel))
    assert "neither parameter nor buffer" in refusal(literal(LARGEST_LITERAL + 1)).problem


@pytest.mark.parametrize(
    "table",
    [
        torch.tensor(3),
        torch.tensor([True, False, True, True]),
        torch.tensor([[1, -2, 3, 4]], dtype=torch.int32),
    ],
    ids=["number", "booleans", "row"],
)
def test_literals_keep_dtype_and_shape(table: torch.Tensor, same_as_eager: Same) -> None:
    values = table.tolist()
    same_as_eager(lambda m, x: (m.lin(x) * torch.tensor(values, dtype=table.dtype)).sum())


def test_a_tensor_that_no_module_registers_is_refused(refusal: Refusal) -> None:
    outside = torch.randn(100)
    assert "neither parameter nor buffer" in refusal(lambda m, x: m.lin(x).sum() * outside.sum()).problem


def test_a_parameter_that_the_code_holds_by_another_name_is_the_parameter(
    scripted: Callable[..., nn.Module], check_against_eager: Any
) -> None:
    module = scripted(lambda m, x: (m.lin(x) @ m.held[0]).square().sum())
    module.held = [module.lin.weight]
    captured = check_against_eager(module, {"x": torch.ones(2, 4, dtype=torch.float64)})
    assert list(captured.names.values()).count("params:lin.weight") == 1


def test_assertions_of_the_forward_leave_no_trace(same_as_eager: Same) -> None:
    def asserting(m: Any, x: torch.Tensor) -> torch.Tensor:
        torch._assert(x.dim() == 2, "matrices only")
        torch._assert_async((x == x).all())
        return m.lin(x).sum()

    graph = same_as_eager(asserting).graph_module.graph
    assert [str(n.target) for n in graph.nodes if n.op == "call_function"] == [
        "aten.linear.default",
        "aten.sum.default",
        "aten.reshape.default",
    ]
