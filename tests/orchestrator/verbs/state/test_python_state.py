"""Python state: what code reads may change between steps as in a plain loop, and every write to values is seen."""

import copy
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from comms.errors import OptimizerError, PlanError, UserError
from orchestrator.verbs.distribute import distribute
from orchestrator.verbs.state.python_state import PythonState, checksum
from partitioner.layout.parallel_plan import Plan

WEIGHTS = {"global": 0.5}
SHIFT = torch.zeros(6, dtype=torch.float64)


class Annealed(nn.Module):
    """Reads numbers from everywhere."""

    factor = 1.0

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.first, self.norm, self.act = nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Tanh()
        self.beta, self.config = 0.0, SimpleNamespace(powers=[2, 3])
        self.double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found = self.act(self.norm(self.first(x))) * self.factor + self.shifted()
        powers: list[int] = self.config.powers
        return found.pow(powers[0]).mean() + self.beta * self.first.weight.square().sum()

    def shifted(self) -> torch.Tensor:
        return SHIFT * getattr(self, "scale", 1.0) + WEIGHTS["global"]


def doubled(module: nn.Module, args: object, output: torch.Tensor) -> torch.Tensor:
    return output * 2


CHANGES: dict[str, Callable[[Any], object]] = {
    "a number": lambda m: setattr(m, "beta", 0.5),
    "a number of a layer": lambda m: setattr(m.norm, "momentum", 0.5),
    "another function": lambda m: setattr(m, "act", nn.ReLU()),
    "a hook": lambda m: m.first.register_forward_hook(doubled),
    "a configuration": lambda m: m.config.powers.reverse(),
    "a class": lambda m: setattr(type(m), "factor", 2.0),
    "a new attribute": lambda m: setattr(m, "scale", 3.0),
    "a global": lambda m: WEIGHTS.update([("global", 0.25)]),
    "a global tensor": lambda m: SHIFT.data.add_(1.0),
}


def batch(number: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(number)
    return {"x": torch.randn(8, 6, generator=generator, dtype=torch.float64)}


def sgd(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)


def require_same(mine: nn.Module, plain: nn.Module) -> None:
    for (name, value), other in zip(mine.state_dict().items(), plain.state_dict().values(), strict=True):
        torch.testing.assert_close(value, other, rtol=1e-9, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("change", CHANGES)
def test_what_code_reads_may_change_between_steps(
    change: str, laptop: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Annealed, "factor", 1.0)
    monkeypatch.setitem(WEIGHTS, "global", 0.5)
    SHIFT.zero_()
    mine, plain = Annealed(), Annealed()
    step = distribute(mine, sgd(mine), laptop, plan=Plan(), chips=1)
    step(batch(0)), step(batch(1))
    num_programs = len(step._programs)
    optimizer = sgd(plain)
    for number in range(3):
        if number == 2:
            CHANGES[change](plain)
        optimizer.zero_grad()
        plain(**batch(number)).backward()
        optimizer.step()
    if change not in ("a class", "a global", "a global tensor"):
        CHANGES[change](mine)
    step(batch(2))
    assert (num_programs, len(step._programs)) == (1, 2)
    require_same(step.sync(), plain)


class Objective:
    def __init__(self) -> None:
        self.scale, self.log = [1.0], list[float]()

    def __call__(self, output: torch.Tensor) -> torch.Tensor:
        return output * self.factor()

    def factor(self) -> float:
        return self.scale[0]

    def method(self, output: torch.Tensor) -> torch.Tensor:
        return self(output)


@pytest.mark.parametrize("kind", ["closure", "object", "method"])
def test_what_a_loss_closes_over_may_change(kind: str, laptop: Any) -> None:
    held = Objective()
    scale = held.scale

    def closure(output: torch.Tensor) -> torch.Tensor:
        return output * scale[0]

    loss_fn: Any = {"closure": closure, "object": held, "method": held.method}[kind]
    mine = Annealed()
    plain, optimizer = copy.deepcopy(mine), sgd(mine)
    step = distribute(mine, optimizer, laptop, plan=Plan(), chips=1, loss_fn=loss_fn)
    optimizer = sgd(plain)
    for number in range(3):
        scale[0] = 1.0 + number // 2
        optimizer.zero_grad()
        (plain(**batch(number)) * scale[0]).backward()
        optimizer.step()
        step(batch(number))
        held.log.append(0.0)  # nothing that the loss reads
    assert len(step._programs) == 2
    require_same(step.sync(), plain)


def test_marks_of_a_hundred_modules_take_little_time_and_training_leaves_them_alone() -> None:
    layers = [
        nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Dropout(0.1), nn.LSTM(4, 4)) for _ in range(20)
    ]
    module, state = nn.Sequential(*layers), PythonState()
    marks = state.marks(module, None)
    with torch.no_grad():
        for param in module.parameters():
            param.add_(1.0)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        assert state.marks(module, None) == marks
        times.append(time.perf_counter() - start)
    assert min(times) < 5e-3  # 0.6 ms where nothing else runs


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.complex64, torch.bool, torch.int64])
@pytest.mark.parametrize("shape", [(), (0,), (5,), (3, 4096), (3, 5000)])
def test_checksums_see_order_and_every_bit(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    value = torch.arange(torch.Size(shape).numel()).view(shape).to(dtype)
    assert checksum(value) == checksum(value.clone())
    if value.numel() > 1 and dtype is not torch.bool:
        assert checksum(value.flip(0)) != checksum(value)
        assert checksum(value.roll(4096)) != checksum(value) or shape == (4096,)
    if value.numel():
        other = value.clone().reshape(-1)
        other[-1] = 0 if other[-1] else 1
        assert checksum(other) != checksum(value)


def state_of(optimizer: torch.optim.Optimizer, _: Any) -> None:
    for state in optimizer.state.values():
        state["momentum_buffer"].data.mul_(0.5)


def rows_swapped(_: object, module: Any) -> None:
    weight = module.first.weight.data
    weight[[0, 1]] = weight[[1, 0]]


def entries_swapped(_: object, module: Any) -> None:
    bias = module.first.bias.detach().numpy()
    bias[:2] = bias[1::-1].copy()


@pytest.mark.parametrize("write", [state_of, rows_swapped, entries_swapped])
def test_writes_that_no_version_counts_are_loaded(write: Callable[..., None], laptop: Any) -> None:
    mine, plain = Annealed(), Annealed()
    optimizers = sgd(mine), sgd(plain)
    step = distribute(mine, optimizers[0], laptop, plan=Plan(), chips=1)
    for number in range(2):
        step(batch(number))
        optimizers[1].zero_grad()
        plain(**batch(number)).backward()
        optimizers[1].step()
        step.sync()
        write(optimizers[0], mine)
        write(optimizers[1], plain)
    step(batch(2))
    optimizers[1].zero_grad()
    plain(**batch(2)).backward()
    optimizers[1].step()
    require_same(step.sync(), plain)


class Scaled(torch.optim.SGD):
    """Reads an attribute of its own."""

    scale = 1.0

    @torch.no_grad()
    def step(self, closure: object = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for param in group["params"]:
                param.sub_(param.grad, alpha=self.scale * group["lr"])


def test_attributes_and_hooks_of_an_optimizer_are_seen(laptop: Any) -> None:
    mine, plain = Annealed(), Annealed()
    optimizers = Scaled(mine.parameters(), lr=0.1), Scaled(plain.parameters(), lr=0.1)
    step = distribute(mine, optimizers[0], laptop, plan=Plan(), chips=1)
    for number in range(3):
        step.sync()
        for optimizer in optimizers:
            optimizer.scale = 1.0 + number // 2
        step(batch(number))
        optimizers[1].zero_grad()
        plain(**batch(number)).backward()
        optimizers[1].step()
    optimizers[0].scale = 5.0
    with pytest.raises(PlanError, match="what the optimizer holds was changed between steps"):
        step(batch(3))
    optimizers[0].scale = 2.0
    require_same(step.sync(), plain)
    optimizers[0].register_step_post_hook(lambda *_: None)
    with pytest.raises(PlanError, match="hooks of the optimizer's steps would not run"):
        step(batch(3))


def test_parameters_without_a_shape_are_refused_and_a_buffer_may_be_taken_away(laptop: Any) -> None:
    lazy = nn.LazyLinear(3)
    step = distribute(lazy, sgd(lazy), laptop, plan=Plan(), chips=1, loss_fn=lambda output: output.mean())
    with pytest.raises(UserError, match="has no shape before the"):
        step({"input": torch.ones(2, 2)})
    mine, plain = Annealed(), Annealed()
    optimizer = sgd(plain)
    step = distribute(mine, sgd(mine), laptop, plan=Plan(), chips=1)
    for number in range(2):
        step(batch(number))
        optimizer.zero_grad()
        plain(**batch(number)).backward()
        optimizer.step()
        for module in (mine, plain):
            module.norm.track_running_stats = False
            module.norm.running_mean = module.norm.running_var = None
    require_same(step.sync(), plain)


def test_a_step_that_was_put_into_the_optimizer_is_refused_unless_it_is_a_schedulers(laptop: Any) -> None:
    mine = Annealed()
    optimizer = sgd(mine)
    step = distribute(mine, optimizer, laptop, plan=Plan(), chips=1)
    torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    step(batch(0))
    optimizer.step = lambda: None  # type: ignore[method-assign]
    with pytest.raises(OptimizerError, match="step was replaced on the object"):
        step(batch(1))
    with pytest.raises(OptimizerError, match="step was replaced on the object"):
        distribute(mine, optimizer, laptop, plan=Plan(), chips=1)
