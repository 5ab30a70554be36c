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
    require_no_parameters,
    same_kind,
    states_per_element,
)
from kernels.trials.optimizer_trials import Scope, scope_of

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
    ours = FlatOptimizer(spec, flat, {} if decay else {"weight_decay": 0.0})
    for number, grad in enumerate(grads):
        lr = 0.01 * (number + 1)
        optimizer.param_groups[0]["lr"] = lr
        shaped.grad = 0.5 * grad
        optimizer.step()
        ours.step(grad.clone().flatten(), 0.5, {"lr": lr})
    torch.testing.assert_close(flat.reshape(4, 6), shaped.detach(), rtol=1e-12, atol=1e-12)


@each_spec
def test_shards_step_like_the_whole(spec: OptimizerSpec) -> None:
    start, *grads = randoms(4)
    whole, parts = start.clone().flatten(), start.clone().flatten()
    one = FlatOptimizer(spec, whole, {})
    several = [FlatOptimizer(spec, part, {}) for part in parts.chunk(3)]
    for grad in grads:
        one.step(grad.clone().flatten(), 1.0, {})
        for optimizer, part in zip(several, grad.clone().flatten().chunk(3), strict=True):
            optimizer.step(part, 1.0, {})
    torch.testing.assert_close(parts, whole, rtol=1e-14, atol=0)


@each_spec
def test_state_comes_back_bit_for_bit(spec: OptimizerSpec) -> None:
    start, *grads = randoms(5)
    flats = [start.clone().flatten() for _ in range(2)]
    first = FlatOptimizer(spec, flats[0], {})
    for grad in grads[:2]:
        first.step(grad.clone().flatten(), 1.0, {})
    flats[1].copy_(flats[0])
    second = FlatOptimizer(spec, flats[1], {})
    second.load(first.state())
    for grad in grads[2:]:
        first.step(grad.clone().flatten(), 1.0, {})
        second.step(grad.clone().flatten(), 1.0, {})
    assert torch.equal(flats[0], flats[1])
    assert set(first.state()) == set(second.state())


def test_loaded_state_is_a_copy() -> None:
    first, second = (FlatOptimizer(SPECS[0], torch.ones(4), {}) for _ in range(2))
    first.step(torch.ones(4), 1.0, {"lr": 0.1})
    second.load(first.state())
    before = {k: v.clone() for k, v in second.state().items()}
    first.step(torch.ones(4), 1.0, {"lr": 0.1})
    assert all(torch.equal(second.state()[k], v) for k, v in before.items())


@pytest.mark.parametrize(("spec", "count"), list(zip(SPECS, (2, 0, 1), strict=True)))
def test_states_are_counted_by_taking_a_step(spec: OptimizerSpec, count: int) -> None:
    known = BUILT_IN[spec.name]
    assert states_per_element(spec) == count
    assert (known.states if spec.momentum else known.states_without_momentum) == count


def test_settings_last_until_others_come_and_unknown_ones_are_passed_over() -> None:
    flat = torch.zeros(3)
    optimizer = FlatOptimizer(SPECS[1], flat, {"lr": 0.5, "weight_decay": 0.0, "no such": 1})
    optimizer.step(torch.ones(3), 1.0, {"no such": 1})
    assert flat.tolist() == [-0.5] * 3
    optimizer.step(torch.ones(3), 1.0, {"lr": 0.25})
    optimizer.step(torch.ones(3), 2.0, {})
    assert flat.tolist() == [-1.25] * 3


@pytest.mark.parametrize("factory", [*SPECS, torch.optim.RMSprop, torch.optim.Adagrad, torch.optim.Adamax])
def test_elementwise_optimizers_look_at_entries(factory: object) -> None:
    assert scope_of(factory) is Scope.ENTRY  # type: ignore[arg-type]


class Stepping(torch.optim.Optimizer):
    """Steps by what a subclass makes of a gradient."""

    def __init__(self, params: Sequence[torch.Tensor]) -> None:
        super().__init__(params, {"lr": 0.1})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for param in self.param_groups[0]["params"]:
            param.sub_(0.1 * self.direction(param.grad))

    def direction(self, grad: torch.Tensor) -> torch.Tensor:
        return grad


class RowNormalised(Stepping):
    def direction(self, grad: torch.Tensor) -> torch.Tensor:
        return grad / grad.norm(dim=-1, keepdim=True)


class ByRootMeanSquare(Stepping):
    def direction(self, grad: torch.Tensor) -> torch.Tensor:
        return grad / grad.square().mean().sqrt()


class MatricesOnly(Stepping):
    def direction(self, grad: torch.Tensor) -> torch.Tensor:
        return grad @ grad.mT @ grad


class BlackBox(Stepping):
    """Elementwise, but takes nothing flat: it cannot be known to be."""

    def direction(self, grad: torch.Tensor) -> torch.Tensor:
        if grad.dim() != 2:
            raise ValueError("matrices only")
        return grad


@pytest.mark.parametrize(
    "factory",
    [RowNormalised, ByRootMeanSquare, MatricesOnly, BlackBox, torch.optim.Adafactor, torch.optim.Muon],
)
def test_optimizers_that_look_at_shapes_are_found_to_need_whole_parameters(factory: type) -> None:
    assert scope_of(factory) is Scope.PARAMETER


class Coupled(Stepping):
    """Divides by the norm of all gradients together."""

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        params = self.param_groups[0]["params"]
        norm = sum(p.grad.square().sum() for p in params).sqrt()
        for param in params:
            param.sub_(param.grad / norm)


class Drawing(Stepping):
    def direction(self, grad: torch.Tensor) -> torch.Tensor:
        return grad + torch.randn_like(grad)


class Momentum(Stepping):
    """Keeps what it needs at the next step where neither `state_dict` nor a checkpoint finds it."""

    def __init__(self, params: Sequence[torch.Tensor]) -> None:
        super().__init__(params)
        self.moments: dict[torch.Tensor, torch.Tensor] = {}

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for param in self.param_groups[0]["params"]:
            moment = self.moments.setdefault(param, torch.zeros_like(param)).data
            param.sub_(moment.mul_(0.9).add_(param.grad), alpha=0.1)


class Counting(Stepping):
    def direction(self, grad: torch.Tensor) -> torch.Tensor:
        self.count = getattr(self, "count", 0) + 1
        return grad


@pytest.mark.parametrize(("kind", "name"), [(Momentum, "moments"), (Counting, "count")])
def test_what_an_optimizer_keeps_besides_its_state_is_refused(kind: type[Stepping], name: str) -> None:
    optimizer = kind([torch.nn.Parameter(torch.ones(3))])
    with pytest.raises(OptimizerError, match=f"changes its {name}, which is neither state nor setting"):
        scope_of(same_kind(optimizer))
    assert getattr(optimizer, name, None) in (None, {})


class OfModel(Stepping):
    """Steps on the parameters of a model that it holds."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__(list(module.parameters()))
        self.module = module

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for param in self.module.parameters():
            param.mul_(0.9)


class ById(Stepping):
    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__(list(module.parameters()))
        self.slow = {id(next(module.parameters()))}


def test_trials_leave_alone_what_an_optimizer_holds() -> None:
    module = torch.nn.Linear(3, 3)
    before = [p.clone() for p in module.parameters()]
    optimizer = OfModel(module)
    with pytest.raises(OptimizerError, match="changes its module"):
        scope_of(same_kind(optimizer))
    assert all(torch.equal(p, was) for p, was in zip(module.parameters(), before, strict=True))
    with pytest.raises(OptimizerError, match="module holds parameters"):
        require_no_parameters(optimizer)
    with pytest.raises(OptimizerError, match="slow holds parameters, or ids of them"):
        require_no_parameters(ById(module))


class LargeOtherwise(Stepping):
    """As 8-bit optimizers, which keep full precision for what is small."""

    def direction(self, grad: torch.Tensor) -> torch.Tensor:
        return grad if grad.numel() > self.limit else grad / 10

    limit = 4096


class VeryLargeOtherwise(LargeOtherwise):
    limit = 10**6


@pytest.mark.parametrize("kind", [LargeOtherwise, VeryLargeOtherwise])
def test_optimizers_that_ask_how_large_a_parameter_is_need_whole_ones(kind: type[Stepping]) -> None:
    assert scope_of(kind) is Scope.PARAMETER


class Late(Stepping):
    """By entries for a thousand steps, or while gradients are small."""

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for param in self.param_groups[0]["params"]:
            own = self.state[param]
            own["n"] = own.get("n", 0) + 1
            param.sub_(0.1 * (self.direction(param.grad) if own["n"] > 1000 else param.grad))


class LateNormalised(Late):
    def direction(self, grad: torch.Tensor) -> torch.Tensor:
        return grad / grad.abs().max()


class LateDrawing(Late):
    def direction(self, grad: torch.Tensor) -> torch.Tensor:
        return grad * torch.rand(())


class LateCoupled(Late):
    def direction(self, grad: torch.Tensor) -> torch.Tensor:
        return grad / len(self.param_groups[0]["params"])


class LateCounting(Late):
    calls = 0

    def direction(self, grad: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return grad / self.calls


class LargeNormalised(Stepping):
    def direction(self, grad: torch.Tensor) -> torch.Tensor:
        largest = grad.abs().max()
        return grad / largest if largest > 1e6 else grad


@pytest.mark.parametrize("kind", [LateNormalised, LargeNormalised])
def test_optimizers_that_look_at_whole_parameters_later_need_whole_ones(kind: type[Stepping]) -> None:
    assert scope_of(kind) is Scope.PARAMETER


def test_late_steps_by_entries_are_by_entries() -> None:
    assert scope_of(Late) is Scope.ENTRY


@pytest.mark.parametrize(
    ("kind", "said"),
    [(LateDrawing, "draws random"), (LateCoupled, "couples"), (LateCounting, "changes its calls")],
)
def test_optimizers_that_couple_draw_or_count_later_are_refused(kind: type[Stepping], said: str) -> None:
    with pytest.raises(OptimizerError, match=said):
        scope_of(kind)


@pytest.mark.parametrize("factory", [Coupled, Drawing])
def test_optimizers_that_couple_parameters_or_draw_are_refused(factory: type) -> None:
    with pytest.raises(OptimizerError, match="couples parameters to each other, or draws random numbers"):
        scope_of(factory)


def test_an_optimizer_that_needs_a_closure_is_refused() -> None:
    with pytest.raises(OptimizerError, match="cannot step on given gradients") as caught:
        scope_of(torch.optim.LBFGS)
    assert "closure" in caught.value.problem and "nothing but gradients" in caught.value.hint


class Keywords(torch.optim.SGD):
    """Takes nothing by position, and hands settings on."""

    def __init__(self, *, params: Sequence[torch.Tensor], slow: float, **more: float) -> None:
        super().__init__(params, lr=slow * 10, **more)
        self.slow = slow

    def step(self, closure: object = None) -> None:
        assert self.slow == 0.05
        super().step()


def test_the_same_kind_is_made_without_asking_its_constructor() -> None:
    original = torch.nn.Parameter(torch.zeros(2))
    optimizer = Keywords(params=[original], slow=0.05, momentum=0.5)
    torch.optim.lr_scheduler.StepLR(optimizer, 1)  # binds a `step` to the object
    param = torch.nn.Parameter(torch.zeros(3))
    made = same_kind(optimizer)([param])
    param.grad = torch.ones(3)
    made.step()
    assert param.tolist() == [-0.5] * 3
    assert original.tolist() == [0.0] * 2
    assert made.param_groups[0]["params"] == [param] and made.state is not optimizer.state


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
