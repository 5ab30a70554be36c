"""Products of rows with their experts' matrices: those of one matmul per row, with its gradients and FLOPs."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

import kernels.expert_products  # noqa: F401  (registers orchestrate::expert_mm)


@given(st.integers(0, 9), st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.integers(0, 99))
def test_rows_and_gradients_are_those_of_a_matmul_each(
    rows: int, experts: int, k: int, n: int, seed: int
) -> None:
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, k, generator=draw, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(experts, k, n, generator=draw, dtype=torch.float64, requires_grad=True)
    expert = torch.randint(-1, experts + 1, (rows,), generator=draw)
    found = torch.ops.orchestrate.expert_mm(x, weights, expert)
    has_one = (expert >= 0) & (expert < experts)
    each = torch.einsum("rk,rkn->rn", x, weights[expert.clamp(0, experts - 1)])
    expected = torch.where(has_one[:, None], each, 0.0)
    torch.testing.assert_close(found, expected)
    seeds = torch.randn(rows, n, generator=draw, dtype=torch.float64)
    for mine, theirs in zip(
        torch.autograd.grad(found, (x, weights), seeds), torch.autograd.grad(expected, (x, weights), seeds),
        strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(mine, theirs)


def test_a_row_costs_one_matmul_forward_and_two_backward() -> None:
    x, weights = torch.randn(7, 3, requires_grad=True), torch.randn(4, 3, 5, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        torch.ops.orchestrate.expert_mm(x, weights, torch.tensor([0, 1, 1, 3, 0, 3, 3])).sum().backward()
    assert counter.get_total_flops() == 3 * (2 * 7 * 3 * 5)
