"""Costs: FLOPs equal closed forms and torch's own counter; bytes follow from shapes; views are free."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

from partitioner.capture.captured_graph import op_bytes, op_flops, op_name
from partitioner.program.program import Compute

SEQ = 16
MATMULS = ("linear", "matmul", "mm", "addmm", "bmm")


def nodes_of(
    function: Callable[..., Any], *inputs: torch.Tensor, dispatched: bool = True
) -> list[torch.fx.Node]:
    traced = make_fx(function, pre_dispatch=not dispatched, tracing_mode="fake")(*inputs)
    return [n for n in traced.graph.nodes if n.op == "call_function"]


def flops_of(function: Callable[..., Any], *inputs: torch.Tensor, dispatched: bool = True) -> int:
    return sum(op_flops(node) for node in nodes_of(function, *inputs, dispatched=dispatched))


A, B, X = torch.zeros(3, 4), torch.zeros(4, 5), torch.zeros(2, 3, 4)


@pytest.mark.parametrize("dispatched", [True, False])
@pytest.mark.parametrize(
    ("function", "inputs", "flops"),
    [
        (torch.mm, (A, B), 2 * 3 * 4 * 5),
        (torch.matmul, (X, B), 2 * 2 * 3 * 4 * 5),
        (lambda x, w: torch.nn.functional.linear(x, w.t()), (X, B), 2 * 2 * 3 * 4 * 5),
        (torch.bmm, (X, torch.zeros(2, 4, 6)), 2 * 2 * 3 * 4 * 6),
        (torch.relu, (X,), X.numel()),
        (lambda x: x.transpose(0, 1).reshape(3, 8)[:2], (X,), None),
    ],
    ids=["mm", "matmul", "linear", "bmm", "relu", "views"],
)
def test_flops_of_single_operations(function: Any, inputs: Any, flops: int | None, dispatched: bool) -> None:
    found = flops_of(function, *inputs, dispatched=dispatched)
    if flops is None:
        copies = [
            n for n in nodes_of(function, *inputs, dispatched=dispatched) if op_name(n.target) == "clone"
        ]
        assert found == sum(n.meta["val"].numel() for n in copies)
    else:
        assert found == flops


@pytest.mark.parametrize("causal", [False, True])
def test_attention_counts_two_matmuls_and_half_when_causal(causal: bool) -> None:
    q = torch.zeros(2, 4, SEQ, 8)
    full = 2 * 2 * 2 * 4 * SEQ * SEQ * 8
    attention = torch.nn.functional.scaled_dot_product_attention
    for dispatched in (True, False):
        found = flops_of(lambda x: attention(x, x, x, is_causal=causal), q, dispatched=dispatched)
        assert found == (full // 2 if causal else full)


def test_attention_backward_counts_five_matmuls() -> None:
    def backward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
        inputs = [t.detach().requires_grad_() for t in (q, k, v)]
        out = torch.nn.functional.scaled_dot_product_attention(*inputs, is_causal=True)
        return torch.autograd.grad(out.sum(), inputs)

    shape = (2, 4, SEQ, 8)
    nodes = nodes_of(backward, *(torch.zeros(shape) for _ in range(3)))
    found = {op_name(n.target): op_flops(n) for n in nodes if "dot_product" in str(n.target)}
    forward, back = (found[n] for n in sorted(found, key=len))
    assert (forward, back) == (2 * 2 * 4 * SEQ * SEQ * 8, 5 * 2 * 4 * SEQ * SEQ * 8)


def test_bytes_are_operands_plus_results_and_lookups_read_only_rows() -> None:
    (product,) = nodes_of(torch.mm, A, B)
    assert op_bytes(product) == (4 * (A.numel() + B.numel()), 4 * 15)
    (view,) = nodes_of(lambda x: x.transpose(0, 1), X)
    assert op_bytes(view) == (0, 0)
    (rows,) = nodes_of(
        lambda i, w: torch.nn.functional.embedding(i, w),
        torch.zeros(3, dtype=torch.int64),
        torch.zeros(1000, 8),
    )
    assert op_bytes(rows) == (3 * 8 * 4, 3 * 8 * 4)
    (made,) = nodes_of(lambda x: torch.zeros(5), X)
    assert op_bytes(made) == (0, 20)


def weight_flops(graph: Any) -> int:
    """Matmul FLOPs of the captured forward, attention's own products left out."""
    nodes = [n for u in graph.units for n in graph.templates[u.template].graph.graph.nodes]
    return sum(op_flops(n) for n in nodes if n.op == "call_function" and op_name(n.target) in MATMULS)


@pytest.mark.parametrize("name", ["builtin:gpt-nano", "hf:gpt2-tiny", "hf:llama-tiny"])
def test_the_forward_of_a_gpt_does_two_flops_per_weight_and_token(
    name: str, tiny_graph: Callable[..., Any], tiny_model: Callable[..., Any]
) -> None:
    samples = 2
    tables = ("embed", "wte", "wpe", "positions")
    weights = sum(
        p.numel() for n, p in tiny_model(name=name).module.named_parameters(remove_duplicate=False)
        if p.dim() == 2 and not any(t in n for t in tables)
    )  # fmt: skip
    assert weight_flops(tiny_graph(samples, name=name)) == 2 * weights * samples * SEQ


def test_a_step_does_six_flops_per_weight_and_token_and_attention_beside(
    tiny_program: Callable[..., Any], tiny_model: Callable[..., Any]
) -> None:
    program, module = tiny_program(), tiny_model().module
    weights = sum(
        p.numel()
        for n, p in module.named_parameters()
        if p.dim() == 2 and n not in ("embed.weight", "positions.weight")
    )
    tokens, layers, width = 2 * SEQ, 2, 32
    attention = 3 * layers * 4 * tokens * SEQ * width  # 4 s d per token forward, causal or not
    assert program.facts["model_flops"] == 6 * weights * tokens + attention


def test_matmul_flops_of_a_program_equal_torchs_counter_on_the_eager_module(
    tiny_program: Callable[..., Any], tiny_model: Callable[..., Any]
) -> None:
    model = tiny_model("cpu")
    batch = model.example_batch(2, SEQ)
    with FlopCounterMode(display=False) as counter:
        model.module(**batch).backward()
    counts = counter.get_flop_counts()["Global"]
    expected = sum(n for op, n in counts.items() if str(op).removeprefix("aten.") in MATMULS)
    program = tiny_program()
    ran = [program.segments[i.segment] for body in ("forward", "backward")
           for i in program.roles[0].body[body].instructions if isinstance(i, Compute)]  # fmt: skip
    found = sum(
        op.flops
        for s in ran
        for op in s.ops
        if op.target.startswith("aten.") and op.target.split(".")[1] in MATMULS
    )
    assert found == expected > 0
