"""Optimizers on flat shards step as torch's do on shaped parameters; what cannot is refused."""

import math
from collections.abc import Sequence

import pytest
import torch
from torch.nn.utils import clip_grad_norm_

from comms.errors import OptimizerError
from kernels.builtin_optimizers import BUILT_IN
from kernels.optimizers import (
    FlatOptimizer,
    OptimizerSpec,
    StepStatistics,
    require_elementwise,
    states_per_element,
)

SPECS = [
    OptimizerSpec("adamw", lr=0.01, weight_decay=0.1),
    OptimizerSpec("sgd", lr=0.1, weight_decay=0.01),
    OptimizerSpec("sgd", lr=0.1, weight_decay=0.0, momentum=0.9),
]
each_spec = pytest.mark.parametrize("spec", SPECS, ids=lambda s: f"{s.name} {s.momentum}")


def plain(spec: OptimizerSpec, params: Sequence[torch.Tensor]) -> torch.optim.Optimizer:
    """The same settings in torch's simplest implementation."""
    if spec.name == "sgd":
        return torch.optim.SGD(params, spec.lr, spec.momentum, weight_decay=spec.weight_decay, foreach=False)
    return torch.optim.AdamW(
        params, spec.lr, spec.betas, spec.eps, spec.weight_decay, foreach=False, fused=False
    )


def randoms(count: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(4, 6, generator=generator, dtype=torch.float64) for _ in range(count)]


@each_spec
@pytest.mark.parametrize("decay", [True, False])
def test_a_flat_step_equals_torchs_step_on_the_matrix(spec: OptimizerSpec, decay: bool) -> None:
    start, *grads = randoms(5)
    shaped = start.clone().requires_grad_()
    optimizer = plain(spec, [shaped])
    if not decay:
        optimizer.param_groups[0]["weight_decay"] = 0.0
    flat = start.clone().flatten()
    ours = FlatOptimizer(spec, flat, decay=decay)
    for number, grad in enumerate(grads):
        lr = 0.01 * (number + 1)
        optimizer.param_groups[0]["lr"] = lr
        shaped.grad = 0.5 * grad
        optimizer.step()
        ours.step(grad.clone().flatten(), 0.5, lr)
    torch.testing.assert_close(flat.reshape(4, 6), shaped.detach(), rtol=1e-12, atol=1e-12)


@each_spec
def test_shards_step_like_the_whole(spec: OptimizerSpec) -> None:
    start, *grads = randoms(4)
    whole, parts = start.clone().flatten(), start.clone().flatten()
    one = FlatOptimizer(spec, whole, decay=True)
    several = [FlatOptimizer(spec, part, decay=True) for part in parts.chunk(3)]
    for grad in grads:
        one.step(grad.clone().flatten(), 1.0, spec.lr)
        for optimizer, part in zip(several, grad.clone().flatten().chunk(3), strict=True):
            optimizer.step(part, 1.0, spec.lr)
    torch.testing.assert_close(parts, whole, rtol=1e-14, atol=0)


@each_spec
def test_state_comes_back_bit_for_bit(spec: OptimizerSpec) -> None:
    start, *grads = randoms(5)
    flats = [start.clone().flatten() for _ in range(2)]
    first = FlatOptimizer(spec, flats[0], decay=True)
    for grad in grads[:2]:
        first.step(grad.clone().flatten(), 1.0, spec.lr)
    flats[1].copy_(flats[0])
    second = FlatOptimizer(spec, flats[1], decay=True)
    second.load(first.state())
    for grad in grads[2:]:
        first.step(grad.clone().flatten(), 1.0, spec.lr)
        second.step(grad.clone().flatten(), 1.0, spec.lr)
    assert torch.equal(flats[0], flats[1])
    assert set(first.state()) == set(second.state())


def test_loaded_state_is_a_copy() -> None:
    first, second = (FlatOptimizer(SPECS[0], torch.ones(4), decay=True) for _ in range(2))
    first.step(torch.ones(4), 1.0, 0.1)
    second.load(first.state())
    before = {k: v.clone() for k, v in second.state().items()}
    first.step(torch.ones(4), 1.0, 0.1)
    assert all(torch.equal(second.state()[k], v) for k, v in before.items())


@pytest.mark.parametrize(("spec", "count"), list(zip(SPECS, (2, 0, 1), strict=True)))
def test_states_are_counted_by_taking_a_step(spec: OptimizerSpec, count: int) -> None:
    known = BUILT_IN[spec.name]
    assert states_per_element(spec) == count
    assert (known.states if spec.momentum else known.states_without_momentum) == count


@pytest.mark.parametrize("factory", [*SPECS, torch.optim.RMSprop, torch.optim.Adagrad, torch.optim.Adamax])
def test_elementwise_optimizers_are_accepted(factory: object) -> None:
    require_elementwise(factory)  # type: ignore[arg-type]


class RowNormalised(torch.optim.Optimizer):
    """Divides each gradient by the norm of its rows: no sense on a flat buffer."""

    def __init__(self, params: Sequence[torch.Tensor]) -> None:
        super().__init__(params, {"lr": 0.1})

    @torch.no_grad()
    def step(self) -> None:
        for param in self.param_groups[0]["params"]:
            param.sub_(0.1 * param.grad / param.grad.norm(dim=-1, keepdim=True))


@pytest.mark.parametrize("factory", [RowNormalised, torch.optim.Adafactor])
def test_optimizers_that_look_at_shapes_are_refused_by_name(factory: type) -> None:
    with pytest.raises(OptimizerError, match=f"{factory.__name__} depends on the shape"):
        require_elementwise(factory)


@pytest.mark.parametrize("clip", [0.1, 1.0, 1e6])
@pytest.mark.parametrize("count", [30, 32])
def test_scaling_equals_clipping_the_gradient_of_the_mean_loss(clip: float, count: int) -> None:
    generator = torch.Generator().manual_seed(4)
    of_sum = [torch.randn(s, generator=generator, dtype=torch.float64) for s in ((4, 6), (5,))]
    nominal = 32
    ours = [g / nominal for g in of_sum]  # what the Program accumulates
    stats = StepStatistics(sum(float(g.square().sum()) for g in ours), 3.0 * count, count, nominal)
    params = [torch.zeros_like(g, requires_grad=True) for g in of_sum]
    for param, grad in zip(params, of_sum, strict=True):
        param.grad = grad / count
    norm = clip_grad_norm_(params, clip)
    assert stats.grad_norm == pytest.approx(float(norm), rel=1e-12)
    for param, grad in zip(params, ours, strict=True):
        assert param.grad is not None
        torch.testing.assert_close(grad * stats.gradient_scale(clip), param.grad, rtol=1e-12, atol=0)


def test_statistics_say_the_mean_loss_and_whether_a_step_may_be_taken() -> None:
    good = StepStatistics(4.0, 6.0, 3.0, 6.0)
    assert (good.loss, good.grad_norm, good.gradient_scale(None)) == (2.0, 4.0, 2.0)
    assert good.is_finite
    for bad in (
        StepStatistics(math.nan, 1, 1, 1),
        StepStatistics(1, math.inf, 1, 1),
        StepStatistics(1, 1, 0, 1),
    ):
        assert not bad.is_finite
    empty = StepStatistics(0.0, 0.0, 0.0, 4.0)
    assert math.isnan(empty.loss) and math.isnan(empty.correction)
