"""Optimizers of users that write into groups, read what only some have, or keep what chips cannot: as in a plain loop,
or refused."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from comms.errors import OptimizerError
from orchestrator.verbs.distribute import distribute
from partitioner.layout.parallel_plan import Plan

Params = Any
Make = Callable[[nn.Module], torch.optim.Optimizer]
PLANS = [Plan(dp=2), Plan(dp=2, zero=1), Plan(pp=2, microbatches=2), Plan(tp=2)]


class Tanh(nn.Module):
    """Two layers, and parameters of one entry with and without a dim."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 6)
        self.scale, self.shift = nn.Parameter(torch.ones(1)), nn.Parameter(torch.zeros(()))
        self.double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.second(self.first(x).tanh()) * self.scale + self.shift).square().mean()


class Own(torch.optim.Optimizer):
    """Steps along the gradient by a factor that subclasses make of a group, a parameter and its state."""

    def __init__(self, params: Params, lr: float = 0.05) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: object = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            by_group = self.by_group(group)
            for param in group["params"]:
                if param.grad is not None:
                    by_state = self.by_state(self.state[param], param)
                    param.sub_(param.grad * by_state * by_group, alpha=group["lr"])

    def by_group(self, group: dict[str, Any]) -> float:
        return 1.0

    def by_state(self, state: dict[str, Any], param: torch.Tensor) -> Any:
        return 1.0


class Counting(Own):
    def by_group(self, group: dict[str, Any]) -> float:
        group["k"] = group.get("k", 0) + 1
        return 1.0 / group["k"]


class Decaying(Own):
    def by_group(self, group: dict[str, Any]) -> float:
        group["lr"] *= 0.9
        group.setdefault("sum", torch.tensor(0.0)).add_(group["lr"])
        group.setdefault("past", []).append(group["lr"])
        return float(group["sum"]) / len(group["past"])


class Multiplied(Own):
    def by_group(self, group: dict[str, Any]) -> float:
        return float(group.get("mult", 1.0))


class Numbers(Own):
    """Plain numbers that must come back as such, one of them late."""

    def by_state(self, state: dict[str, Any], param: torch.Tensor) -> Any:
        state["count"] = state.get("count", 0) + 1
        state["rate"] = state.get("rate", 1.0) * 0.7
        state["odd"] = not state.get("odd", False)
        if state["count"] == 3:
            state["late"] = 2
        assert type(state["count"]) is int and type(state["odd"]) is bool
        return state["rate"] * (2.0 if state["odd"] is True else 1.0) * state.get("late", 1)


class Late(Own):
    def by_state(self, state: dict[str, Any], param: torch.Tensor) -> Any:
        state["count"] = state.get("count", 0) + 1
        if state["count"] == 2:
            state["moment"] = torch.zeros_like(param)
        return state["moment"].add_(param.grad) + 1 if "moment" in state else 1.0


class Stacked(Own):
    """States with a dim more than the parameter, one that its master copies are called like, and one long count."""

    def by_state(self, state: dict[str, Any], param: torch.Tensor) -> Any:
        if not state:
            state["both"] = torch.stack([torch.zeros_like(param)] * 2)
            state["master"], state["count"] = param.clone(), torch.zeros(4)
        state["both"][0].lerp_(param.grad, 0.3)
        state["count"] += 1
        return 1 + state["both"][0] + (state["master"] - param) / float(state["count"][3])


class Cleared(Own):
    def zero_grad(self, set_to_none: bool = True) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                param.grad = None


def batch(number: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(number)
    return {"x": torch.randn(8, 6, generator=generator, dtype=torch.float64)}


def in_groups(kind: type[Own], **second: Any) -> Make:
    def make(module: Any) -> torch.optim.Optimizer:
        rest = [*module.second.parameters(), module.scale]
        return kind(
            [{"params": [*module.first.parameters(), module.shift]}, {"params": rest, "lr": 0.02} | second]
        )

    return make


def trained(make: Make, plan: Plan | None, laptop: Any, between: Callable[..., object]) -> tuple[Any, ...]:
    """Losses, parameters, states and settings after five steps, the last ones plain."""
    module = Tanh()
    optimizer = make(module)
    step: Any = distribute(module, optimizer, laptop, plan=plan, chips=plan.num_chips) if plan else None
    losses = []
    for number in range(5):
        between(number, module, optimizer)
        if step and number < 4:
            losses.append(step(batch(number)))
        if step and number in (1, 3):
            step.sync()
        if not step or number == 4:
            optimizer.zero_grad()
            (loss := module(**batch(number))).backward()
            optimizer.step()
            losses.append(loss.item())
    saved = optimizer.state_dict()
    kept = [(i, k, own[k]) for i, own in sorted(saved["state"].items()) for k in sorted(own)]
    kinds = [(i, k, type(v), getattr(v, "shape", None), getattr(v, "dtype", None)) for i, k, v in kept]
    states = [torch.as_tensor(v, dtype=torch.float64) for *_, v in kept]
    groups = [sorted((k, v) for k, v in own.items() if k != "sum") for own in saved["param_groups"]]
    return losses, [*map(torch.Tensor.detach, module.parameters()), *states], kinds, groups


def require_plain_loop(
    make: Make, plan: Plan, laptop: Any, between: Callable[..., object] = lambda *_: None
) -> None:
    """All the same, whatever is done before each step: `between(number, module, optimizer)`."""
    mine, plain = (trained(make, each, laptop, between) for each in (plan, None))
    assert mine[0] == pytest.approx(plain[0], rel=1e-10)
    assert mine[2] == plain[2]
    assert mine[3] == plain[3]
    torch.testing.assert_close(mine[1], plain[1], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("plan", PLANS, ids=str)
@pytest.mark.parametrize("kind", [Counting, Decaying, Numbers, Late, Cleared])
def test_what_a_step_keeps_and_moves_by_itself_is_as_in_a_plain_loop(
    kind: type[Own], plan: Plan, laptop: Any, one_thread: None
) -> None:
    require_plain_loop(in_groups(kind), plan, laptop)


@pytest.mark.parametrize("make", [in_groups(Multiplied, mult=0.1), lambda m: Multiplied(m.parameters())])
def test_settings_that_some_groups_have_come_and_go(make: Make, laptop: Any, one_thread: None) -> None:
    def between(number: int, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        if number == 1:
            optimizer.param_groups[0]["mult"] = 0.3
        if number == 3:
            del optimizer.param_groups[0]["mult"]

    require_plain_loop(make, Plan(dp=2), laptop, between)


@pytest.mark.parametrize("plan", [Plan(dp=2), Plan(dp=2, zero=1), Plan(dp=2, tp=2, zero=1)], ids=str)
def test_states_that_do_not_lie_as_the_parameter_keep_their_shapes(
    plan: Plan, laptop: Any, one_thread: None
) -> None:
    require_plain_loop(in_groups(Stacked), plan, laptop)


class Normed(Own):
    """Looks at whole parameters where its group says so."""

    @torch.no_grad()
    def step(self, closure: object = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for param in group["params"]:
                whole = param.grad.norm() if group.get("whole") else 1.0
                param.sub_(param.grad / whole, alpha=group["lr"])


class Guarded(Own):
    """Leaves a parameter out while its largest entry is in a narrow window, which no trial may meet."""

    @torch.no_grad()
    def step(self, closure: object = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for param in group["params"]:
                if not 0.4 < param.abs().max() < 0.45:
                    param.sub_(param.grad, alpha=group["lr"])


class Slowed(Own):
    """Does something else once its rate is small."""

    @torch.no_grad()
    def step(self, closure: object = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for param in group["params"]:
                scale = 1.0 if group["lr"] > 1e-3 else self.of(param.grad)
                param.sub_(param.grad * scale, alpha=group["lr"])

    def of(self, grad: torch.Tensor) -> torch.Tensor:
        return 1 / grad.norm()


class SlowedByDraws(Slowed):
    def of(self, grad: torch.Tensor) -> torch.Tensor:
        return torch.rand_like(grad)


def test_a_guard_on_whole_parameters_sees_them(laptop: Any, one_thread: None) -> None:
    require_plain_loop(in_groups(Guarded), Plan(dp=2, zero=1), laptop)


@pytest.mark.parametrize(
    ("kind", "said"),
    [(Slowed, "first looks at whole parameters"), (SlowedByDraws, "first draws random numbers")],
)
def test_what_a_step_does_later_is_seen_when_it_does(
    kind: type[Slowed], said: str, laptop: Any, one_thread: None
) -> None:
    module = Tanh()
    optimizer = kind(module.parameters())
    step = distribute(module, optimizer, laptop, plan=Plan(dp=2), chips=2)
    step(batch(0))
    optimizer.param_groups[0]["lr"] = 1e-4
    with pytest.raises(OptimizerError, match=said):
        step(batch(1))


def test_a_group_that_needs_whole_parameters_is_not_the_first(laptop: Any, one_thread: None) -> None:
    require_plain_loop(in_groups(Normed, whole=True), Plan(dp=2), laptop)


def test_a_rate_of_nothing_hides_no_coupling(laptop: Any, one_thread: None) -> None:
    """As a scheduler with warmup sets it before the first step, and a setting that comes later."""

    def between(number: int, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        optimizer.param_groups[0].update({"lr": 0.05 * number, "whole": number > 1})

    require_plain_loop(lambda m: Normed(m.parameters()), Plan(dp=2), laptop, between)


def test_an_old_checkpoint_of_sgd_goes_on(laptop: Any, one_thread: None) -> None:
    def make(module: nn.Module) -> torch.optim.Optimizer:
        made = torch.optim.SGD(module.parameters(), lr=0.1)
        saved = made.state_dict()
        made.load_state_dict({**saved, "state": {i: {"momentum_buffer": None} for i in range(6)}})
        return made

    module, plain = Tanh(), Tanh()
    step, other = distribute(module, make(module), laptop, plan=Plan(dp=2), chips=2), make(plain)
    for number in range(2):
        found = step(batch(number))
        other.zero_grad()
        (loss := plain(**batch(number))).backward()
        other.step()
        assert found == pytest.approx(loss.item(), rel=1e-12)


def refused(make: Make, laptop: Any) -> str:
    with pytest.raises(OptimizerError) as caught:
        distribute(Tanh(), make(Tanh()), laptop, chips=2)
    assert caught.value.where and caught.value.hint
    return caught.value.problem


def of_state(function: Callable[[dict[Any, Any], torch.Tensor], object]) -> Make:
    def by_state(self: Own, state: dict[Any, Any], param: torch.Tensor) -> float:
        function(state, param)
        return 1.0

    kind = type("OfState", (Own,), {"by_state": by_state})
    return lambda module: kind(module.parameters())


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (lambda s, p: s.setdefault("past", []).append(1), "state 'past' is a list"),
        (lambda s, p: s.update(phase="a"), "state 'phase' is a str"),
        (lambda s, p: s.update(none=None), "state 'none' is a NoneType"),
        (lambda s, p: s.update(deep={"k": 1}), "state 'deep' is a dict"),
        (lambda s, p: s.update(rows=(p.sum(), 1)), "state 'rows' is a tuple"),
        (lambda s, p: s.update(turn=1j), "state 'turn' is a complex"),
        (lambda s, p: s.update({0: 1.0}), "state has the key 0"),
        (lambda s, p: s.update(thin=torch.zeros_like(p).to_sparse()), "is a tensor .torch.sparse_coo."),
        (lambda s, p: s.update(last=p.grad), "'last' shares its memory with the gradient"),
        (lambda s, p: s.update(own=p.data), "'own' shares its memory with the parameter"),
    ],
)
def test_states_that_chips_cannot_keep_are_refused(function: Any, said: str, laptop: Any) -> None:
    assert re.search(said, refused(of_state(function), laptop))


class ByString(Own):
    def by_group(self, group: dict[str, Any]) -> float:
        self.state["k"] = (self.state.get("k") or 0) + 1  # type: ignore[index, call-overload]
        return 1.0


class Largest(Own):
    def by_group(self, group: dict[str, Any]) -> float:
        group["d"] = max(float(p.grad.abs().max()) for p in group["params"])
        return 1.0


class ManyParameters(Own):
    def by_group(self, group: dict[str, Any]) -> float:
        return 0.5 if len(group["params"]) > 4 else 1.0


class ManyGroups(Own):
    def by_group(self, group: dict[str, Any]) -> float:
        return 0.5 if len(self.param_groups) > 4 else 1.0


@pytest.mark.parametrize(
    "make",
    [
        lambda module: ManyParameters(module.parameters()),
        lambda module: ManyGroups([{"params": [param]} for param in module.parameters()]),
    ],
)
def test_steps_that_go_by_numbers_of_parameters_or_groups_are_refused(make: Make, laptop: Any) -> None:
    assert "goes by how many parameters or groups there are" in refused(make, laptop)


class FirstRate(Own):
    def by_group(self, group: dict[str, Any]) -> float:
        return float(self.param_groups[0]["lr"])


class Halving(Own):
    def zero_grad(self, set_to_none: bool = True) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    param.grad.mul_(0.5)


class Unasked(Own):
    @torch.no_grad()
    def step(self, closure: object = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for param in group["params"]:
                param.mul_(0.9)


class Arguments(Own):
    @torch.no_grad()
    def step(self, scale: float) -> None:  # type: ignore[override]
        super().step()


class Defaults(Own):
    def by_group(self, group: dict[str, Any]) -> float:
        self.defaults["t"] = self.defaults.get("t", 0) + 1
        return 1.0


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (ByString, "keeps a state under 'k'"),
        (Largest, "couples parameters|sets its groups by gradients or states"),
        (FirstRate, "couples parameters"),
        (Halving, "own zero_grad changes what is trained"),
        (Unasked, "changes parameters that have no gradient"),
        (Arguments, "missing 1 required positional argument"),
        (Defaults, "changes its defaults"),
    ],
)
def test_steps_that_chips_cannot_take_are_refused(kind: type[Own], said: str, laptop: Any) -> None:
    assert re.search(said, refused(in_groups(kind), laptop))


class ByAttribute(Own):
    def by_state(self, state: dict[str, Any], param: torch.Tensor) -> Any:
        return getattr(param, "mult", 1.0)


def test_attributes_of_parameters_that_a_step_reads_are_refused(laptop: Any, one_thread: None) -> None:
    module = Tanh()
    optimizer = ByAttribute(module.parameters())
    step = distribute(module, optimizer, laptop, plan=Plan(dp=2), chips=2)
    step(batch(0))
    module.first.weight.other = 1.0  # type: ignore[assignment]
    step(batch(1))
    module.first.weight.mult = 0.1  # type: ignore[assignment]
    with pytest.raises(OptimizerError, match="reads mult of parameters, but chips step on other tensors"):
        step(batch(2))


def test_tensors_in_groups_and_names_are_refused(laptop: Any) -> None:
    assert "hold a tensor in anchor" in refused(in_groups(Own, anchor=[torch.zeros(6)]), laptop)
    kind = type("Named", (Own,), {"by_group": lambda self, group: 2.0 if "param_names" in group else 1.0})
    assert "goes by param_names" in refused(lambda m: kind(m.named_parameters()), laptop)
