"""reordering: sums in another order are the same sums, and places keep their values."""

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional

from orchestrator.verbs.verification.reordering import Reordered


def normal(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64).to(
        dtype
    )


FORWARDS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "linear": lambda x: functional.linear(x, normal(3, 4), normal(3)),
    "matmul": lambda x: x @ x.transpose(1, 2),
    "batched addition": lambda x: torch.baddbmm(normal(6, 5, 5), x, x.transpose(1, 2)),
    "convolution": lambda x: functional.conv1d(x, normal(2, 5, 3), normal(2)),
    "layer norm": lambda x: functional.layer_norm(x, (4,), x[0, 0] * 2, x[0, 1]),
    "rms norm": lambda x: functional.rms_norm(x, (4,), x[0, 0]),
    "batch norm": lambda x: functional.batch_norm(x, None, None, x[0, :, 0], x[1, :, 0], training=True),
    "group norm": lambda x: functional.group_norm(x[:, :4], 2, x[0, 0], x[0, 1]),
    "embedding": lambda x: functional.embedding(torch.arange(12).view(4, 3) % 5, x[0]),
    "reductions": lambda x: x.sum(1) + x.mean(1) + x.logsumexp(1) + x.sum() + x.mean(),
    "cross-entropy": lambda x: functional.cross_entropy(x.flatten(0, 1), torch.arange(30) % 4),
}


def gradient_of(
    forward: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, order: int | None
) -> torch.Tensor:
    x = x.clone().requires_grad_()
    if order is None:
        forward(x).cos().sum().backward()
    else:
        with Reordered(order):
            forward(x).cos().sum().backward()
    assert x.grad is not None
    return x.grad


@pytest.mark.parametrize("name", FORWARDS)
def test_values_and_gradients_are_the_same_but_for_rounding(name: str) -> None:
    forward, x = FORWARDS[name], normal(6, 5, 4)
    with Reordered(0):
        torch.testing.assert_close(forward(x), forward(x), rtol=1e-12, atol=1e-12)
        reordered = forward(x)
    torch.testing.assert_close(reordered, forward(x), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        gradient_of(forward, x, 0), gradient_of(forward, x, None), rtol=1e-11, atol=1e-12
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_differs_by_about_what_the_type_can_tell_apart(dtype: torch.dtype) -> None:
    x, weight = normal(64, 256, dtype=dtype), normal(256, 32, dtype=dtype)
    plain = x @ weight
    with Reordered(1):
        other = x @ weight
    error = (other - plain).double().norm() / plain.double().norm()
    assert 0.01 * torch.finfo(dtype).eps < error < 8 * torch.finfo(dtype).eps


def test_orders_follow_from_their_number() -> None:
    x, layer = normal(8, 64, dtype=torch.float32), nn.Linear(64, 8)
    results = []
    for number in (0, 0, 1):
        with Reordered(number):
            results.append(layer(x))
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])
