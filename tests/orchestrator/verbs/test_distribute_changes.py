"""distribute between steps: what may change in a plain loop may change here, or is refused with what to do."""

import collections
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from comms.errors import CaptureError, PlanError, UserError
from orchestrator.verbs.distribute import DistributedStep, distribute
from partitioner.layout.parallel_plan import Plan

Batch = dict[str, torch.Tensor]
PLANS = [Plan(dp=2), Plan(dp=2, zero=1, microbatches=2), Plan(pp=2, microbatches=2), Plan(tp=2)]
each_plan = pytest.mark.parametrize("plan", PLANS, ids=str)


class Network(nn.Module):
    """Three layers, and a fourth that is used only where the batch says so."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 8)
            self.last, self.other = nn.Linear(8, 2), nn.Linear(6, 2)
        self.drop = nn.Dropout(0.5)
        self.double().eval()

    def forward(self, x: torch.Tensor, y: torch.Tensor, both: bool = False) -> torch.Tensor:
        found = self.last(self.drop(torch.tanh(self.second(torch.tanh(self.first(x))))))
        return nn.functional.mse_loss(found + self.other(x) if both else found, y)


def batch(number: int, size: int = 8) -> Batch:
    generator = torch.Generator().manual_seed(number)
    return {"x": torch.randn(size, 6, generator=generator, dtype=torch.float64),
            "y": torch.randn(size, 2, generator=generator, dtype=torch.float64)}  # fmt: skip


def adamw(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(module.parameters(), lr=0.02, weight_decay=0.2)


class Twins:
    """The same module twice: one is trained by `distribute`, the other by a plain loop."""

    def __init__(self, plan: Plan, laptop: Any, make: Callable[..., Any] = adamw, **more: Any) -> None:
        self.mine, self.plain = Network(), Network()
        self.optimizers = make(self.mine), make(self.plain)
        self.step: DistributedStep = distribute(
            self.mine, self.optimizers[0], laptop, plan=plan, chips=plan.num_chips, **more
        )

    def train(self, *numbers: int, size: int = 8, **more: Any) -> None:
        for number in numbers:
            self.optimizers[1].zero_grad()
            loss = self.plain(**batch(number, size), **more)
            loss.backward()
            self.optimizers[1].step()
            assert self.step({**batch(number, size), **more}) == pytest.approx(loss.item(), rel=1e-9)

    def each(self, change: Callable[[nn.Module, Any], object]) -> None:
        for module, optimizer in zip((self.mine, self.plain), self.optimizers, strict=True):
            change(module, optimizer)

    def require_same(self) -> None:
        self.step.sync()
        for (name, mine), theirs in zip(self.mine.named_parameters(), self.plain.parameters(), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


@each_plan
def test_parameters_without_a_gradient_stay_as_they_are(plan: Plan, laptop: Any, one_thread: None) -> None:
    twins = Twins(plan, laptop)
    before = twins.mine.other.weight.detach().clone()
    twins.train(0, 1, 2)
    twins.require_same()
    assert torch.equal(twins.mine.other.weight, before)
    assert twins.mine.other.weight not in twins.optimizers[0].state


@each_plan
def test_parameters_may_get_their_first_gradient_later(plan: Plan, laptop: Any, one_thread: None) -> None:
    twins = Twins(plan, laptop)
    twins.train(0, 1)
    twins.train(2, 3, both=True)
    twins.train(4)
    twins.require_same()


@each_plan
def test_layers_may_be_frozen_and_unfrozen(plan: Plan, laptop: Any, one_thread: None) -> None:
    twins = Twins(plan, laptop)
    twins.each(lambda m, o: m.first.requires_grad_(False))
    twins.train(0, 1)
    twins.each(lambda m, o: m.first.requires_grad_(True))
    twins.each(lambda m, o: m.last.bias.requires_grad_(False))
    twins.train(2, 3)
    twins.each(lambda m, o: m.last.bias.requires_grad_(True))
    twins.train(4)
    twins.require_same()


@each_plan
def test_groups_may_be_added(plan: Plan, laptop: Any, one_thread: None) -> None:
    def head_only(module: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW(module.last.parameters(), lr=0.02)

    twins = Twins(plan, laptop, head_only)
    twins.train(0, 1)
    twins.each(
        lambda m, o: o.add_param_group({"params": m.second.parameters(), "lr": 0.1, "weight_decay": 0.5})
    )
    twins.train(2, 3)
    twins.each(lambda m, o: o.add_param_group({"params": list(m.first.parameters()), "betas": (0.5, 0.7)}))
    twins.train(4)
    twins.require_same()


def test_settings_may_be_changed_at_any_time(laptop: Any, one_thread: None) -> None:
    twins = Twins(Plan(dp=2), laptop)
    for number, settings in enumerate(
        ({}, {"lr": 0.1}, {"weight_decay": 0.0}, {"betas": (0.1, 0.9), "eps": 1e-2})
    ):
        twins.each(lambda m, o, changed=settings: o.param_groups[0].update(changed))
        twins.train(number)
    twins.require_same()


EDITS: dict[str, Callable[[nn.Module, Any], object]] = {
    "a weight": lambda m, o: m.second.weight.data.mul_(0.5),
    "a weight under no_grad": lambda m, o: nn.init.constant_(m.last.bias, 0.25),
    "another parameter": lambda m, o: setattr(
        m.last, "bias", nn.Parameter(torch.ones(2, dtype=torch.float64))
    ),
    "loaded weights": lambda m, o: m.load_state_dict({k: v + 0.1 for k, v in m.state_dict().items()}),
    "storage": lambda m, o: setattr(m.last.bias, "data", torch.ones(2, dtype=torch.float64)),
    "loaded states": lambda m, o: o.load_state_dict(o.state_dict()),
    "a state": lambda m, o: o.state[m.last.bias]["exp_avg"].zero_(),
    "cleared states": lambda m, o: o.state.clear(),
    "other states": lambda m, o: o.load_state_dict(adamw(m).state_dict()),
    "other dict": lambda m, o: setattr(o, "state", collections.defaultdict(dict)),
}


@pytest.mark.parametrize("name", [name for name in EDITS if name != "another parameter"])
def test_what_was_fetched_may_be_changed(name: str, laptop: Any, one_thread: None) -> None:
    twins = Twins(Plan(dp=2, zero=1), laptop)
    twins.train(0, 1)
    twins.step.sync()
    twins.each(EDITS[name])
    twins.train(2, 3)
    twins.require_same()


@pytest.mark.parametrize("name", [n for n in EDITS if n not in ("loaded states", "a state")])
def test_what_was_not_fetched_is_not_overwritten_in_silence(name: str, laptop: Any, one_thread: None) -> None:
    twins = Twins(Plan(dp=2), laptop)
    twins.train(0)
    EDITS[name](twins.mine, twins.optimizers[0])
    for call in (twins.step, twins.step.evaluate):
        with pytest.raises(
            PlanError, match="was changed between steps, but trained values were not fetched"
        ) as caught:
            call(batch(1))
        assert "step.sync()" in caught.value.hint


def test_states_that_are_not_here_yet_leave_no_trace(laptop: Any, one_thread: None) -> None:
    twins = Twins(Plan(dp=2), laptop)
    twins.train(0, 1)
    twins.require_same()
    mine, plain = ([*o.state_dict()["state"].items()] for o in twins.optimizers)
    assert [(turn, own.keys()) for turn, own in mine] == [(turn, own.keys()) for turn, own in plain]


@pytest.mark.parametrize("name", EDITS)
def test_before_the_first_step_everything_may_be_changed(name: str, laptop: Any, one_thread: None) -> None:
    twins = Twins(Plan(dp=2), laptop)
    assert twins.step.evaluate(batch(0)) == pytest.approx(twins.plain(**batch(0)).item(), rel=1e-12)
    if name == "a state":
        return  # there is none yet
    twins.each(EDITS[name])
    assert twins.step.evaluate(batch(0)) == pytest.approx(twins.plain(**batch(0)).item(), rel=1e-12)
    if name == "another parameter":
        return  # its optimizer does not hold it
    twins.train(0, 1)
    twins.require_same()


@each_plan
def test_batches_may_be_of_several_sizes(plan: Plan, laptop: Any, one_thread: None) -> None:
    twins = Twins(plan, laptop)
    for number, size in enumerate((8, 8, 4, 8, 12, 4)):
        twins.train(number, size=size)
    twins.require_same()


def test_programs_of_sizes_seen_before_are_kept(laptop: Any, one_thread: None) -> None:
    twins = Twins(Plan(dp=2), laptop)
    twins.train(0, 1)
    twins.train(2, size=4)
    seen = []
    for size in (8, 4, 8, 4):
        twins.step.evaluate(batch(0, size))
        seen.append(id(twins.step.program))
    assert seen[:2] == seen[2:]


def test_training_and_evaluation_may_alternate(laptop: Any, one_thread: None) -> None:
    twins = Twins(Plan(dp=2), laptop)
    for number in range(3):
        twins.mine.train()
        twins.step(batch(number))
        trained = twins.step.evaluate(batch(9))
        twins.mine.eval()
        plain = twins.step.evaluate(batch(9))
        assert plain == twins.step.evaluate(batch(9))
        assert plain == pytest.approx(twins.step.sync()(**batch(9)).item(), rel=1e-12)
        assert trained != plain
    assert twins.step.steps == 3


def test_another_call_of_the_model_is_another_program(laptop: Any, one_thread: None) -> None:
    twins = Twins(Plan(dp=2), laptop)
    for both in (True, False, True):
        expected = twins.plain(**batch(0), both=both).item()
        assert twins.step.evaluate({**batch(0), "both": both}) == pytest.approx(expected, rel=1e-12)


def test_with_everything_frozen_there_is_nothing_to_train(laptop: Any) -> None:
    twins = Twins(Plan(dp=2), laptop)
    twins.mine.requires_grad_(False)
    with pytest.raises(UserError):
        twins.step(batch(0))


def test_a_gradient_that_nobody_clips_is_refused(laptop: Any) -> None:
    def head_only(module: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW(module.last.parameters(), lr=0.02)

    twins = Twins(Plan(dp=2), laptop, head_only, clip_norm=1.0)
    with pytest.raises(PlanError, match="takes a gradient but is in no group of the optimizer"):
        twins.step(batch(0))
    twins.mine.requires_grad_(False)
    twins.mine.last.requires_grad_(True)
    twins.step(batch(0))


@pytest.mark.parametrize("clip", [0.0, -1.0, float("inf"), float("nan")])
def test_norms_that_clip_nothing_or_everything_are_refused(clip: float, laptop: Any) -> None:
    module = Network()
    with pytest.raises(PlanError, match="clip_norm is"):
        distribute(module, adamw(module), laptop, chips=2, clip_norm=clip)


@pytest.mark.parametrize(
    "add",
    [
        lambda m: m.first.register_full_backward_hook(lambda *_: None),
        lambda m: m.first.weight.register_hook(lambda g: g),
        lambda m: m.first.weight.register_post_accumulate_grad_hook(lambda p: None),
    ],
)
def test_hooks_on_gradients_are_refused(add: Callable[[nn.Module], object], laptop: Any) -> None:
    module = Network()
    add(module)
    with pytest.raises(CaptureError, match="hook would not run"):
        distribute(module, adamw(module), laptop, plan=Plan(dp=2), chips=2)(batch(0))


def test_a_failed_step_leaves_everything_as_it_was(laptop: Any, one_thread: None) -> None:
    twins = Twins(Plan(dp=2), laptop)
    twins.train(0)
    for wrong in (batch(1, size=7), {"x": batch(1)["x"]}, {**batch(1), "more": torch.ones(8)}):
        with pytest.raises(UserError):
            twins.step(wrong)
    twins.train(1)
    twins.require_same()


def test_gradients_and_modes_of_the_module_are_left_alone(laptop: Any, one_thread: None) -> None:
    twins = Twins(Plan(dp=2), laptop)
    given = torch.full_like(twins.mine.first.weight, 3.0)
    twins.mine.first.weight.grad = given
    twins.mine.second.train()
    twins.step(batch(0))
    twins.step.sync()
    assert twins.mine.first.weight.grad is given and bool((given == 3.0).all())
    assert twins.mine.second.training and not twins.mine.first.training
    assert all(p.requires_grad and p.is_leaf for p in twins.mine.parameters())
