"""The user's autograd functions: their own backward is what trains, what no graph holds is refused."""

from collections.abc import Callable
from contextlib import nullcontext, suppress
from typing import Any

import pytest
import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from comms.errors import CaptureError
from orchestrator.verbs.distribute import distribute
from partitioner.capture.forwards.user_functions import AppliedFunction
from partitioner.capture.tracing import trace_module
from partitioner.layout.parallel_plan import Plan

Forward = Callable[[Any, torch.Tensor], torch.Tensor]
Same = Callable[..., Any]
X = torch.randn(4, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


class Reversed(torch.autograd.Function):
    """The identity, whose gradient is turned around and scaled: no derivative of the forward."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, scale: float) -> torch.Tensor:
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return -ctx.scale * grads[0], None


class StraightThrough(torch.autograd.Function):
    """Rounds forward, and passes gradients where values are small; the context is set up apart."""

    @staticmethod
    def forward(x: torch.Tensor) -> torch.Tensor:
        return x.round()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
        ctx.save_for_backward(inputs[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        (x,) = ctx.saved_tensors
        return grads[0] * (x.abs() < 1)


class TwoOfThem(torch.autograd.Function):
    """Two tensors and a text in, two tensors out."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, how: str, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        assert how == "both"
        ctx.save_for_backward(x, w)
        return x @ w, x.sum(-1)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, torch.Tensor]:
        x, w = ctx.saved_tensors
        return grads[0] @ w.t() + grads[1].unsqueeze(-1), None, 0.5 * x.t() @ grads[0]


def reversing(m: Any, x: torch.Tensor) -> torch.Tensor:
    return Reversed.apply(m.lin(x), 0.3).square().mean()


def rounding(m: Any, x: torch.Tensor) -> torch.Tensor:
    return (StraightThrough.apply(m.lin(x)) * m.lin(x)).sum()


def both(m: Any, x: torch.Tensor) -> torch.Tensor:
    product, total = TwoOfThem.apply(m.lin(x), "both", m.lin.weight)
    return product.square().mean() + total.exp().mean()


def twice(m: Any, x: torch.Tensor) -> torch.Tensor:
    return Reversed.apply(Reversed.apply(m.lin(x), 2.0), 0.5).sum()


def checkpointed(m: Any, x: torch.Tensor) -> torch.Tensor:
    return checkpoint(lambda v: m.lin(v).tanh(), m.lin(x), use_reentrant=True).sum()


def checkpointed_anew(m: Any, x: torch.Tensor) -> torch.Tensor:
    return checkpoint(lambda v: m.lin(v).tanh(), m.lin(x), use_reentrant=False).sum()


def beside_a_write(m: Any, x: torch.Tensor) -> torch.Tensor:
    hidden = Reversed.apply(m.lin(x), 0.3)
    m.seen += 1
    table = hidden * 2
    table[:, 0] = 0
    return (Reversed.apply(table, 2.0) * m.seen).square().sum()


alias = Reversed.apply  # as torch's documentation has it


def by_another_name(m: Any, x: torch.Tensor) -> torch.Tensor:
    return alias(m.lin(x), 0.3).square().mean()


def of_the_batch(m: Any, x: torch.Tensor) -> torch.Tensor:
    return m.lin(StraightThrough.apply(x * 2) + Reversed.apply(x, 1.0)).square().sum()


class Doubled(Reversed):
    """Its own `apply` changes what it is given."""

    @classmethod
    def apply(cls, x: torch.Tensor, scale: float) -> torch.Tensor:
        return super().apply(2 * x, scale)


def with_its_own_apply(m: Any, x: torch.Tensor) -> torch.Tensor:
    return Doubled.apply(m.lin(x), 0.3).square().mean()


FORWARDS = [
    reversing,
    rounding,
    both,
    twice,
    checkpointed,
    checkpointed_anew,
    beside_a_write,
    by_another_name,
    of_the_batch,
    with_its_own_apply,
]


@pytest.mark.parametrize("forward", FORWARDS)
def test_gradients_are_those_of_the_users_backward(forward: Forward, same_as_eager: Same) -> None:
    same_as_eager(forward)


def test_each_call_is_one_operation_with_its_name_and_settings(same_as_eager: Same) -> None:
    nodes = same_as_eager(twice).graph_module.graph.nodes
    calls = [n.target for n in nodes if isinstance(n.target, AppliedFunction)]
    assert [call.__name__ for call in calls] == ["Reversed", "Reversed"]
    assert [call.leaves for call in calls] == [[None, 2.0], [None, 0.5]]
    assert str(calls[0]).endswith("Reversed(None, 2.0)")


def test_outside_of_a_capture_functions_are_torchs(same_as_eager: Same) -> None:
    before = torch.autograd.Function.apply, torch.Tensor.register_hook, torch.autograd.grad
    same_as_eager(reversing)
    assert (torch.autograd.Function.apply, torch.Tensor.register_hook, torch.autograd.grad) == before


def hooking(m: Any, x: torch.Tensor) -> torch.Tensor:
    hidden = m.lin(x)
    hidden.register_hook(lambda grad: 2 * grad)
    return hidden.sum()


def penalising_gradients(m: Any, x: torch.Tensor) -> torch.Tensor:
    hidden = m.lin(x)
    (grad,) = torch.autograd.grad(hidden.sum(), m.lin.weight, create_graph=True)
    return hidden.sum() + grad.square().sum()


def going_backward(m: Any, x: torch.Tensor) -> torch.Tensor:
    m.lin(x).sum().backward()
    return m.lin(x).sum()


def setting_data(m: Any, x: torch.Tensor) -> torch.Tensor:
    m.seen.data = m.seen + 1
    return m.lin(x).sum() * m.seen


class Doubling(torch.autograd.Function):
    """Writes into its operand, and says so."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.mark_dirty(x)
        return x.mul_(2)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        return 2 * grads[0]


def writing_its_operand(m: Any, x: torch.Tensor) -> torch.Tensor:
    hidden = m.lin(x).clone()
    Doubling.apply(hidden[:, :2])
    return hidden.sum()


def writing_what_it_shares(m: Any, x: torch.Tensor) -> torch.Tensor:
    inputs = x * 1
    turned = Reversed.apply(inputs, 1.0)
    inputs.add_(1)
    return m.lin(turned * inputs).sum()


@pytest.mark.parametrize(
    ("forward", "said"),
    [
        (hooking, "a hook on a value would not run"),
        (penalising_gradients, "the forward computes gradients itself"),
        (going_backward, "the forward computes gradients itself"),
        (setting_data, "the forward sets .data, which leaves no trace"),
        (writing_its_operand, "the autograd function Doubling writes into its operands"),
        (
            writing_what_it_shares,
            "what the autograd function Reversed returns lies where its operand does, and is written later",
        ),
    ],
)
def test_what_no_graph_holds_is_refused(forward: Forward, said: str, refusal: Any) -> None:
    error = refusal(forward)
    assert error.problem == said
    assert any(word in error.hint for word in ("leave it out", "as a formula", "new tensors", "copy_()"))


class Model(nn.Module):
    def __init__(self, forward: Forward) -> None:
        super().__init__()
        self.lin, self.script = nn.Linear(4, 4, dtype=torch.float64), forward

    def forward(self, *args: torch.Tensor, **batch: torch.Tensor) -> torch.Tensor:
        return self.script(self, *args, **batch)


def stepped(module: Model, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Its weight after a step on one chip."""
    module.zero_grad()
    module(**batch).backward()
    return module.lin.weight - 0.1 * module.lin.weight.grad


@pytest.mark.parametrize(
    "plan", [Plan(), Plan(dp=2), Plan(microbatches=2), Plan(dp=2, microbatches=2)], ids=str
)
@pytest.mark.parametrize("forward", [reversing, rounding, twice, checkpointed])
def test_functions_that_work_sample_by_sample_train_under_every_plan(
    forward: Forward, plan: Plan, laptop: Any, one_thread: None
) -> None:
    module = Model(forward)
    expected = stepped(module, {"x": X})
    step = distribute(
        module, torch.optim.SGD(module.parameters(), 0.1), laptop, plan=plan, chips=plan.num_chips
    )
    step({"x": X})
    torch.testing.assert_close(step.sync().lin.weight, expected)


class Centred(torch.autograd.Function):
    """Mixes samples forward, and has a gradient of its own."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x - x.mean(0)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        return 3 * grads[0]


class Clipped(torch.autograd.Function):
    """Its gradient is not linear in the one that comes."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        return grads[0].clamp(-0.01, 0.01)


class Normalised(Clipped):
    """Its gradient mixes samples."""

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        return grads[0] / grads[0].norm()


LOSSES = {
    "mean": lambda output, y: output.square().mean(),
    "counted": lambda output, y: nn.functional.cross_entropy(output, y),
}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("plan", [Plan(), Plan(dp=2), Plan(microbatches=2)], ids=str)
@pytest.mark.parametrize("function", [Centred, Clipped, Normalised])
def test_a_gradient_is_that_of_the_users_backward_or_refused(
    function: Any, plan: Plan, loss: str, laptop: Any, one_thread: None
) -> None:
    module = Model(lambda m, x, y: LOSSES[loss](function.apply(m.lin(x)), y))
    batch = {"x": X, "y": torch.tensor([0, 1, -100, 3])}
    expected = stepped(module, batch)
    step = distribute(
        module, torch.optim.SGD(module.parameters(), 0.1), laptop, plan=plan, chips=plan.num_chips
    )
    with suppress(CaptureError) if plan.dp * plan.microbatches > 1 else nullcontext():
        step(batch)
        torch.testing.assert_close(step.sync().lin.weight, expected)


def test_a_function_whose_backward_fails_is_a_user_error() -> None:
    class Broken(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            raise ValueError("not like this")

    module = Model(lambda m, x: Broken.apply(m.lin(x)).sum())
    with pytest.raises(CaptureError, match="ValueError at not like this"):
        trace_module(module, {"x": X}, None)
