"""Operators taken apart: what they consist of computes the same, and stays only where parts need it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

from partitioner.capture.samples.taking_apart import consists_of_others, put_apart, replace_by

Check = Callable[..., Any]
X = torch.randn(6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Function = Callable[[torch.Tensor], torch.Tensor]

FUNCTIONS: dict[str, Function] = {
    "cosine similarity": lambda x: F.cosine_similarity(x, x.cos(), dim=-1),
    "instance norm": lambda x: F.instance_norm(x.view(2, 3, 4)),
    "triplet": lambda x: F.triplet_margin_loss(x, x.sin(), x.cos()),
    "hinge": lambda x: F.hinge_embedding_loss(x, x.sign()),
    "unsafe chunk": lambda x: torch.unsafe_chunk(x, 2)[1],
    "softmax with grad": lambda x: torch._softmax_backward_data(x, x.softmax(-1), -1, x.dtype),
    "trace": lambda x: x[:4].trace() * x,
    "diff": lambda x: x.diff(dim=1),
}


def traced(function: Function) -> torch.fx.GraphModule:
    x = FakeTensorMode(allow_non_fake_inputs=True).from_tensor(X)
    return make_fx(function, pre_dispatch=True, tracing_mode="real", _allow_non_fake_inputs=True)(x)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_what_an_operator_consists_of_computes_the_same(name: str) -> None:
    module = traced(FUNCTIONS[name])
    taken = 0
    for node in list(module.graph.nodes):
        if node.op == "call_function" and consists_of_others(node):
            _, result = put_apart(node)
            replace_by(node, result)
            taken += 1
    module.graph.lint()
    assert taken
    torch.testing.assert_close(torch.fx.Interpreter(module).run(X), FUNCTIONS[name](X))


def test_every_step_knows_its_value_and_its_place() -> None:
    module = traced(FUNCTIONS["triplet"])
    (node,) = [n for n in module.graph.nodes if "triplet" in str(n.target)]
    node.meta["place"] = "here"
    steps, result = put_apart(node)
    assert len(steps) > 3 and result is steps[-1]
    assert all(step.meta["place"] == "here" for step in steps)
    assert all(isinstance(step.meta["val"], torch.Tensor) for step in steps)
    assert steps[-1].meta["val"].shape == node.meta["val"].shape


def test_what_torch_cannot_take_apart_stays() -> None:
    graph = traced(lambda x: torch.mm(x, x[:4]).sort(-1).values).graph
    known = {str(n.target): consists_of_others(n) for n in graph.nodes if n.op == "call_function"}
    assert not known["aten.mm.default"] and not known["aten.sort.default"]
    assert not any(consists_of_others(n) for n in graph.nodes if n.op != "call_function")


def test_an_operator_stays_whole_where_parts_need_nothing(check: Check, doubles: Any) -> None:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        return F.cosine_similarity(m.lin(x), m.lin(x).sin(), dim=-1).mean()

    assert "aten.cosine_similarity.default" in check(forward, {"x": doubles(8, 4)}).targets()


def test_an_operator_over_samples_is_replaced_by_sums(check: Check, doubles: Any) -> None:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        return F.cosine_similarity(m.lin(x), m.lin(x).sin(), dim=0).mean()

    targets = check(forward, {"x": doubles(8, 4)}, dp=4, microbatches=1).targets()
    assert "aten.cosine_similarity.default" not in targets
    assert [target for target in targets if target.startswith("orchestrate")]


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.sin() * 2

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        return grads[0] * 5


def test_a_users_function_that_works_sample_by_sample_stays(check: Check, doubles: Any) -> None:
    parted = check(lambda m, x: Doubled.apply(m.lin(x)).mean(), {"x": doubles(8, 4)})
    assert [target for target in parted.targets() if "Doubled" in target]
    assert not [target for target in parted.targets() if "sin" in target]


def test_several_results_are_replaced_one_by_one() -> None:
    class Two(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            first, second = torch.ops.aten.unsafe_chunk(x, 2)
            return first * second.sin()

    module = traced(Two())
    (node,) = [n for n in module.graph.nodes if "unsafe_chunk" in str(n.target)]
    _, result = put_apart(node)
    replace_by(node, result)
    assert not [n for n in module.graph.nodes if "unsafe_chunk" in str(n.target)]
    torch.testing.assert_close(torch.fx.Interpreter(module).run(X), X[:3] * X[3:].sin())
