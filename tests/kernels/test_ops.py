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
