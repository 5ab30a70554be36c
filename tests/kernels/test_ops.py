"""Operators that stand for communication have gradients, of the shapes that FLOPs are counted with."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import kernels.ops

pytestmark = pytest.mark.filterwarnings("error")
OPS = torch.ops.orchestrate


@pytest.mark.parametrize("dim", [0, 1])
def test_gradients_pass_between_the_parts(dim: int) -> None:
    assert kernels.ops.GOLDEN % 2
    with FakeTensorMode():
        x = torch.empty(4, 6, requires_grad=True)
        gathered = OPS.gather_parts(x, dim, 2, 3)
        assert gathered.shape == ((12, 6), (4, 18))[dim]
        (grad,) = torch.autograd.grad(OPS.sum_parts(gathered), x, torch.empty_like(gathered))
    assert grad.shape == x.shape


def test_what_comes_before_an_exchange_is_counted_twice_in_the_backward() -> None:
    with FakeTensorMode(), FlopCounterMode(display=False) as counter:
        x, weight = torch.empty(4, 6, requires_grad=True), torch.empty(6, 6, requires_grad=True)
        OPS.gather_parts(x @ weight, 0, 1, 2).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 4 * 6 * 6


@pytest.mark.parametrize("numel", [0, 1, 4095, 4096, 4097, 300_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_norm_is_as_in_double_precision(numel: int, dtype: torch.dtype) -> None:
    x = (torch.randn(numel, generator=torch.Generator().manual_seed(numel)) * 3).to(dtype)
    found = OPS.precise_norm(x)
    assert (found.shape, found.dtype) == ((), torch.float64)
    assert found.item() == pytest.approx(
        x.double().norm().item(), rel=1e-6 if dtype is torch.float32 else 1e-12
    )
    with FakeTensorMode():
        assert OPS.precise_norm(torch.empty(numel)).dtype is torch.float64


@pytest.mark.parametrize("odd", [float("nan"), float("inf")])
@pytest.mark.parametrize("at", [0, 4999])
def test_a_norm_shows_what_is_not_finite(odd: float, at: int) -> None:
    x = torch.ones(5000)
    x[at] = odd
    assert not OPS.precise_norm(x).isfinite()
