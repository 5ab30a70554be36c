"""distribute keeps the user's optimizer: its class, its groups, schedulers of its settings, and its states."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from comms.errors import OptimizerError, PlanError
from orchestrator.verbs.distribute import distribute
from partitioner.layout.parallel_plan import Plan

Batch = dict[str, torch.Tensor]
Make = Callable[[nn.Module], torch.optim.Optimizer]
PLANS = [Plan(dp=2), Plan(dp=2, zero=1, microbatches=2), Plan(pp=2, microbatches=2), Plan(tp=2)]


class Perceptron(nn.Module):
    """Matrices, vectors, and parameters of one number, of which one has no dims."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.layers = nn.Sequential(
                nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2)
            )
        self.scale, self.shift = nn.Parameter(torch.ones(1)), nn.Parameter(torch.zeros(()))
        self.double()

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return nn.functional.mse_loss(self.layers(x) * self.scale + self.shift, y)


def batch(number: int) -> Batch:
    generator = torch.Generator().manual_seed(number)
    return {"x": torch.randn(8, 6, generator=generator, dtype=torch.float64),
            "y": torch.randn(8, 2, generator=generator, dtype=torch.float64)}  # fmt: skip


def plain_step(module: nn.Module, optimizer: torch.optim.Optimizer, number: int) -> float:
    optimizer.zero_grad()
    loss: torch.Tensor = module(**batch(number))
    loss.backward()
    optimizer.step()
    return loss.item()


def require_same_values(module: nn.Module, plain: nn.Module) -> None:
    for (name, mine), theirs in zip(module.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


def require_same_states(optimizer: torch.optim.Optimizer, plain: torch.optim.Optimizer) -> None:
    mine, theirs = optimizer.state_dict()["state"], plain.state_dict()["state"]
    assert mine.keys() == theirs.keys()
    for index, state in theirs.items():
        assert mine[index].keys() == state.keys()
        for key, value in state.items():
            found = torch.as_tensor(mine[index][key])
            torch.testing.assert_close(found.double(), torch.as_tensor(value).double(), rtol=1e-9, atol=1e-10)


def require_plain_loop(
    make: Make, plan: Plan, laptop: Any, schedule: Callable[[Any], Any] | None = None, steps: int = 3
) -> None:
    """Losses, parameters and states of the loop that a user had, and of a plain step after it."""
    module, plain = Perceptron(), Perceptron()
    optimizer, other = make(module), make(plain)
    step = distribute(module, optimizer, laptop, plan=plan, chips=plan.num_chips)
    schedulers = [schedule(each) for each in (optimizer, other)] if schedule else []
    for number in range(steps):
        assert step(batch(number)) == pytest.approx(plain_step(plain, other, number), rel=1e-10)
        for each in schedulers:
            each.step()
    step.sync()
    require_same_values(module, plain)
    require_same_states(optimizer, other)
    assert plain_step(module, optimizer, steps) == pytest.approx(plain_step(plain, other, steps), rel=1e-9)
    require_same_values(module, plain)


ELEMENTWISE: dict[str, Make] = {
    "sgd": lambda m: torch.optim.SGD(m.parameters(), lr=0.1),
    "nesterov": lambda m: torch.optim.SGD(
        m.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1
    ),
    "maximize": lambda m: torch.optim.SGD(m.parameters(), lr=0.01, maximize=True),
    "adam": lambda m: torch.optim.Adam(m.parameters(), lr=0.01, amsgrad=True, weight_decay=0.05),
    "adamw": lambda m: torch.optim.AdamW(m.parameters(), lr=0.01, weight_decay=0.1),
    "fused": lambda m: torch.optim.AdamW(m.parameters(), lr=0.01, fused=True),
    "foreach": lambda m: torch.optim.AdamW(m.parameters(), lr=0.01, foreach=True),
    "rmsprop": lambda m: torch.optim.RMSprop(m.parameters(), lr=0.01, centered=True, momentum=0.5),
    "adagrad": lambda m: torch.optim.Adagrad(m.parameters(), lr=0.05, lr_decay=0.1),
    "adadelta": lambda m: torch.optim.Adadelta(m.parameters(), lr=0.5),
    "adamax": lambda m: torch.optim.Adamax(m.parameters(), lr=0.01),
    "asgd": lambda m: torch.optim.ASGD(m.parameters(), lr=0.01, t0=1),
    "nadam": lambda m: torch.optim.NAdam(m.parameters(), lr=0.01),
    "radam": lambda m: torch.optim.RAdam(m.parameters(), lr=0.01),
    "rprop": lambda m: torch.optim.Rprop(m.parameters(), lr=0.01),
    "lr as a tensor": lambda m: torch.optim.AdamW(m.parameters(), lr=torch.tensor(0.01)),
}


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_every_elementwise_optimizer_of_torch_steps_as_it_does(
    name: str, laptop: Any, one_thread: None
) -> None:
    require_plain_loop(ELEMENTWISE[name], Plan(dp=2, zero=1), laptop)


def groups(module: nn.Module) -> torch.optim.Optimizer:
    """Three groups with settings of their own, and a parameter that no group holds."""
    first, second, third = module.layers[0], module.layers[2], module.layers[4]
    module.shift.requires_grad_(False)
    return torch.optim.AdamW(
        [
            {"params": [first.weight, second.weight], "lr": 0.02, "weight_decay": 0.3, "betas": (0.5, 0.8)},
            {"params": [first.bias, second.bias, module.scale], "weight_decay": 0.0},
            {"params": third.parameters(), "lr": 0.001, "eps": 1e-3, "amsgrad": True},
        ],
        lr=0.01,
    )


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_groups_keep_their_own_settings(plan: Plan, laptop: Any, one_thread: None) -> None:
    require_plain_loop(groups, plan, laptop)


def named(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(module.named_parameters(), lr=0.1, momentum=0.9)


def test_named_parameters_are_parameters(laptop: Any, one_thread: None) -> None:
    require_plain_loop(named, Plan(dp=2), laptop)


SCHEDULES: dict[str, Callable[[Any], Any]] = {
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, max_lr=[0.1] * len(o.param_groups), total_steps=6),
    "by group": lambda o: lr_scheduler.LambdaLR(o, [lambda s, k=k: 0.5 ** (s * k) for k in range(len(o.param_groups))]),
    "restarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 2),
    "sequence": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=2), lr_scheduler.ExponentialLR(o, 0.5)], [2]),
}  # fmt: skip


@pytest.mark.parametrize("plan", [Plan(dp=2, zero=1), Plan(pp=2, microbatches=2)], ids=str)
@pytest.mark.parametrize("name", SCHEDULES)
def test_schedulers_change_every_setting_that_they_do(
    name: str, plan: Plan, laptop: Any, one_thread: None
) -> None:
    require_plain_loop(groups, plan, laptop, SCHEDULES[name], steps=5)


class Lion(torch.optim.Optimizer):
    """Elementwise, with settings by keyword only and a count of steps that is a plain number."""

    def __init__(self, params: Any, *, lr: float = 0.01, **more: float) -> None:
        super().__init__(params, {"lr": lr, "momentum": 0.9, **more})

    @torch.no_grad()
    def step(self, closure: object = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    state = self.state[param]
                    state["count"] = state.get("count", 0) + 1
                    moving = state.setdefault("moving", torch.zeros_like(param))
                    moving.lerp_(param.grad, 1 - group["momentum"])
                    param.add_(moving.sign() + moving / state["count"], alpha=-group["lr"])


class Warm(torch.optim.AdamW):
    """A subclass that changes how its parent steps."""

    def __init__(self, params: Any, warmup: int, **more: Any) -> None:
        super().__init__(params, **more)
        self.warmup = warmup

    def step(self, closure: Any = None) -> Any:
        rates = [group["lr"] for group in self.param_groups]
        for group in self.param_groups:
            group["lr"] = group["lr"] / self.warmup
        super().step(closure)
        for group, rate in zip(self.param_groups, rates, strict=True):
            group["lr"] = rate


class PerTensor(torch.optim.Optimizer):
    """Divides a parameter's gradient by its root mean square, with a state of one number for each parameter."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: object = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    state = self.state[param]
                    square = state.setdefault("square", torch.zeros((), dtype=param.dtype))
                    square.lerp_(param.grad.square().mean(), 0.3)
                    param.sub_(group["lr"] * param.grad / (square.sqrt() + 1e-8))


@pytest.mark.parametrize("plan", PLANS, ids=str)
@pytest.mark.parametrize(
    "make",
    [lambda m: Lion(m.parameters(), lr=0.02, decay=0.5), lambda m: Warm(m.parameters(), warmup=4, lr=0.04)],
    ids=["lion", "warm"],
)
def test_classes_of_the_user_are_kept_whatever_they_take(
    make: Make, plan: Plan, laptop: Any, one_thread: None
) -> None:
    require_plain_loop(make, plan, laptop)


WHOLE: dict[str, Make] = {
    "per tensor": lambda m: PerTensor(m.parameters(), lr=0.05),
    "adafactor": lambda m: torch.optim.Adafactor(m.parameters(), lr=0.05),
    "muon": lambda m: torch.optim.Muon([p for p in m.parameters() if p.dim() == 2], lr=0.05),
}


@pytest.mark.parametrize("plan", [*PLANS, Plan(tp=3), Plan(dp=2, tp=2, zero=1)], ids=str)
@pytest.mark.parametrize("name", WHOLE)
def test_optimizers_that_look_at_whole_parameters_step_on_each_by_itself(
    name: str, plan: Plan, laptop: Any, one_thread: None
) -> None:
    require_plain_loop(WHOLE[name], plan, laptop)


class Coupled(torch.optim.SGD):
    """Divides by the norm of all gradients."""

    def step(self, closure: Any = None) -> Any:
        nn.utils.clip_grad_norm_([p for group in self.param_groups for p in group["params"]], 1e-3)
        return super().step(closure)


class Noisy(torch.optim.SGD):
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for param in group["params"]:
                param.grad.add_(torch.randn_like(param))
        return super().step(closure)


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (torch.optim.LBFGS, "cannot step on given gradients"),
        (Coupled, "couples parameters to each other, or draws random numbers"),
        (Noisy, "couples parameters to each other, or draws random numbers"),
    ],
)
def test_optimizers_that_cannot_be_served_are_refused_by_name(kind: Any, said: str, laptop: Any) -> None:
    with pytest.raises(OptimizerError, match=said) as caught:
        distribute(Perceptron(), kind(Perceptron().parameters()), laptop, chips=2)
    assert kind.__name__ in caught.value.where


@pytest.mark.parametrize("add", ["register_step_pre_hook", "register_step_post_hook"])
def test_hooks_of_the_optimizer_are_refused(add: str, laptop: Any) -> None:
    module = Perceptron()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    getattr(optimizer, add)(lambda *_: None)
    with pytest.raises(PlanError, match="hooks of the optimizer's steps would not run"):
        distribute(module, optimizer, laptop, chips=2)


@pytest.mark.parametrize("name", ["sgd", "nesterov", "adamw", "nadam", "asgd"])
@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_an_optimizer_that_has_stepped_before_goes_on(
    name: str, plan: Plan, laptop: Any, one_thread: None
) -> None:
    module, plain = Perceptron(), Perceptron()
    optimizer, other = ELEMENTWISE[name](module), ELEMENTWISE[name](plain)
    for number in range(2):
        assert plain_step(module, optimizer, number) == plain_step(plain, other, number)
    step = distribute(module, optimizer, laptop, plan=plan, chips=plan.num_chips)
    for number in range(2, 4):
        assert step(batch(number)) == pytest.approx(plain_step(plain, other, number), rel=1e-9)
    step.sync()
    require_same_values(module, plain)
    require_same_states(optimizer, other)


def test_what_the_user_gave_to_the_optimizer_stays_the_users(laptop: Any, one_thread: None) -> None:
    module = Perceptron()
    optimizer = Lion(module.parameters())
    before = [list(group["params"]) for group in optimizer.param_groups]
    step = distribute(module, optimizer, laptop, plan=Plan(dp=2), chips=2)
    step(batch(0))
    step.sync()
    assert len(optimizer.param_groups) == 1
    assert all(p is q for p, q in zip(before[0], optimizer.param_groups[0]["params"], strict=True))
    assert set(optimizer.state) == set(module.parameters())


def step_of(make: Make, laptop: Any, plan: Plan) -> Sequence[Any]:
    module = Perceptron()
    optimizer = make(module)
    return module, optimizer, distribute(module, optimizer, laptop, plan=plan, chips=plan.num_chips)


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_a_checkpoint_of_torchs_own_resumes(plan: Plan, laptop: Any, one_thread: None) -> None:
    module, optimizer, step = step_of(groups, laptop, plan)
    losses = [step(batch(number)) for number in range(4)]
    first, first_optimizer, again = step_of(groups, laptop, Plan(dp=2))
    assert [again(batch(number)) for number in range(2)] == pytest.approx(losses[:2], rel=1e-9)
    again.sync()
    saved = first.state_dict(), first_optimizer.state_dict()
    resumed, resumed_optimizer, later = step_of(groups, laptop, plan)
    resumed.load_state_dict(saved[0])
    resumed_optimizer.load_state_dict(saved[1])
    assert [later(batch(number)) for number in range(2, 4)] == pytest.approx(losses[2:], rel=1e-9)
    require_same_values(later.sync(), step.sync())
    require_same_states(resumed_optimizer, optimizer)
    assert module is step.model


@pytest.mark.parametrize("lr", [1e-2, 1e-7], ids=["seen", "below rounding"])
@pytest.mark.parametrize("plan", [Plan(), Plan(dp=2, zero=1)], ids=str)
def test_a_half_precision_module_is_stepped_on_as_it_is(plan: Plan, lr: float, laptop: Any) -> None:
    """Steps below its rounding are lost, as in torch: there is no wider copy that would add them up."""
    module, plain = Perceptron().bfloat16(), Perceptron().bfloat16()
    optimizers = [torch.optim.AdamW(each.parameters(), lr=lr, weight_decay=0.0) for each in (module, plain)]
    step = distribute(module, optimizers[0], laptop, plan=plan, chips=plan.num_chips)
    inputs = {name: value.bfloat16() for name, value in batch(0).items()}
    for _ in range(3):
        found = step(inputs)
        optimizers[1].zero_grad()
        (loss := plain(**inputs)).backward()
        optimizers[1].step()
        assert found == pytest.approx(loss.item(), rel=0.02)
    step.sync()
    rounding = 0.0 if lr < 1e-6 or plan == Plan() else 0.01
    for mine, theirs in zip(module.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=rounding, atol=rounding)
        kept = [optimizer.state[p] for optimizer, p in zip(optimizers, (mine, theirs), strict=True)]
        assert {k: v.dtype for k, v in kept[0].items()} == {k: v.dtype for k, v in kept[1].items()}


@pytest.mark.parametrize("settings", [{"fused": True}, {"foreach": True}, {"foreach": False}], ids=str)
def test_states_lie_in_memory_as_their_parameters_do(settings: dict[str, bool], laptop: Any) -> None:
    """A fused step walks both as they lie: plain steps go on right after `sync()`."""
    module, plain = Perceptron(), Perceptron()
    for each in (module, plain):
        first = each.layers[0]
        first.weight = nn.Parameter(first.weight.detach().t().contiguous().t())
    optimizer, other = (torch.optim.Adam(m.parameters(), 0.1, **settings) for m in (module, plain))
    step = distribute(module, optimizer, laptop, plan=Plan(dp=2), chips=2)
    for number in range(2):
        assert step(batch(number)) == pytest.approx(plain_step(plain, other, number), rel=1e-9)
    step.sync()
    assert optimizer.state[module.layers[0].weight]["exp_avg"].stride() == (1, 8)
    assert plain_step(module, optimizer, 2) == pytest.approx(plain_step(plain, other, 2), rel=1e-9)
    require_same_values(module, plain)
