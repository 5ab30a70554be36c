"""What surrounds a step, what shares its parameters, and what is not the model's: as in plain PyTorch, or refused."""

import copy
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.modules import module as modules

from comms.errors import PlanError, UserError
from orchestrator.verbs.distribute import DistributedStep, distribute
from partitioner.layout.parallel_plan import Plan

PLANS = [Plan(), Plan(dp=2), Plan(tp=2)]
X = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.first(x).tanh()).float().square().mean()


def step_of(module: nn.Module, laptop: Any, plan: Plan, **more: Any) -> DistributedStep:
    optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
    return distribute(module, optimizer, laptop, plan=plan, chips=plan.num_chips, **more)


@pytest.mark.parametrize("plan", PLANS, ids=str)
@pytest.mark.parametrize("first", [True, False], ids=["on then off", "off then on"])
def test_autocast_around_a_step_holds_for_that_step(first: bool, plan: Plan, laptop: Any) -> None:
    module, plain = Net(), Net()
    step, optimizer = step_of(module, laptop, plan), torch.optim.SGD(plain.parameters(), lr=0.5)
    found, expected = [], []
    for number in range(4):
        is_on = (number < 2) is first
        with torch.autocast("cpu", torch.bfloat16) if is_on else nullcontext():
            found.append(step({"x": X}))
            optimizer.zero_grad()
            loss = plain(X)
        loss.backward()
        optimizer.step()
        expected.append(loss.item())
    off = [k for k in range(4) if (k < 2) is not first]
    assert found == pytest.approx(expected, rel=0.02)
    if first is False:  # before anything was rounded
        assert [found[k] for k in off] == pytest.approx([expected[k] for k in off], rel=1e-6)


@pytest.fixture
def hook() -> Iterator[Callable[..., Any]]:
    handles: list[Any] = []
    yield lambda register, function: handles.append(register(function))
    for handle in handles:
        handle.remove()


def test_hooks_on_all_modules_are_seen(hook: Callable[..., Any], laptop: Any) -> None:
    module, plain = Net(), Net()
    step = step_of(module, laptop, Plan(dp=2))
    assert step({"x": X}) == pytest.approx(plain(X).item(), rel=1e-6)
    step.sync()
    hook(
        modules.register_module_forward_hook, lambda m, a, out: out * 2 if isinstance(m, nn.Linear) else None
    )
    assert step({"x": X}) == pytest.approx(module(X).item(), rel=1e-6)
    hook(modules.register_module_full_backward_hook, lambda m, g, h: None)
    with pytest.raises(PlanError, match="backward hook on all modules"):
        step({"x": X})


def test_two_steps_of_one_model_need_sync_between(laptop: Any) -> None:
    module, plain = Net(), Net()
    steps = [step_of(module, laptop, Plan(dp=2)) for _ in range(2)]
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.5)
    for step in (*steps, *steps):
        optimizer.zero_grad()
        (loss := plain(X)).backward()
        optimizer.step()
        assert step({"x": X}) == pytest.approx(loss.item(), rel=1e-5)
        with pytest.raises(PlanError, match="another step has trained this model"):
            steps[step is steps[0]]({"x": X})
        step.sync()
    steps[0]({"x": X})
    del step, steps[0]  # what is gone holds nothing back
    assert steps[0]({"x": X}) == pytest.approx(plain(X).item(), rel=1e-5)


def test_an_entry_that_the_optimizer_trains_is_refused(laptop: Any) -> None:
    module, entry = Net(), nn.Parameter(X.clone())
    optimizer = torch.optim.SGD([*module.parameters(), entry], lr=0.5)
    step = distribute(module, optimizer, laptop, plan=Plan(dp=2), chips=2)
    with pytest.raises(PlanError, match="the batch's x is a parameter, which nothing would train"):
        step({"x": entry})


def test_other_parameters_in_the_place_of_those_that_are_trained_stay_as_they_are(laptop: Any) -> None:
    module = Net()
    step = step_of(module, laptop, Plan(dp=2))
    step({"x": X})
    step.sync()
    before = copy.deepcopy(module.state_dict())
    module.load_state_dict(copy.deepcopy(before), assign=True)  # the optimizer has the former ones
    with pytest.raises(UserError, match="the optimizer holds none of the model's parameters"):
        step({"x": X})
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())


def test_a_first_evaluation_in_inference_mode_leaves_training_as_it_is(laptop: Any) -> None:
    module, plain = Net(), Net()
    step = step_of(module, laptop, Plan(dp=2))
    with torch.inference_mode():
        assert step.evaluate({"x": X.clone()}) == pytest.approx(plain(X).item(), rel=1e-6)
    assert step({"x": X}) == pytest.approx(plain(X).item(), rel=1e-6)


def test_a_parameter_of_another_shape_leads_to_another_program(laptop: Any) -> None:
    module, plain = Net(), Net()
    step = step_of(module, laptop, Plan(dp=2))
    step({"x": X})
    step.sync()
    plain.load_state_dict(module.state_dict())
    for each in (module, plain):
        each.first.weight.data, each.first.bias.data = each.first.weight.data[:4], each.first.bias.data[:4]
        each.last.weight.data = each.last.weight.data[:, :4]
    assert step({"x": X}) == pytest.approx(plain(X).item(), rel=1e-6)
    (plain(X) + 0).backward()
    expected = plain.first.weight - 0.5 * plain.first.weight.grad
    torch.testing.assert_close(step.sync().get_parameter("first.weight"), expected)


@pytest.mark.parametrize(
    ("change", "said"),
    [({"model": Net}, "model is the class Net"), ({"optimizer": None}, "optimizer is a NoneType"),
     ({"optimizer": torch.optim.SGD}, "optimizer is the class SGD"), ({"plan": "dp2"}, "plan is a str"),
     ({"chips": "2"}, "chips is a str"), ({"chips": True}, "chips is a bool"),
     ({"clip_norm": "1"}, "clip_norm is a str"),
     ({"seed": None}, "seed is a NoneType"), ({"seed": 0.5}, "seed is a float")],
)  # fmt: skip
def test_arguments_of_other_kinds_are_refused_by_name(change: dict[str, Any], said: str, laptop: Any) -> None:
    module = Net()
    given = {"model": module, "optimizer": torch.optim.SGD(module.parameters(), lr=0.1), "cluster": laptop}
    with pytest.raises(PlanError, match=said):
        distribute(**(given | change))


class Sharing(Net):
    """Tensors that lie in the memory of others."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, data = kind, self.first.weight.data
        self.plain = data.clone() if kind == "apart" else data
        self.register_buffer("kept", self.last.weight.data if kind == "buffer" else torch.zeros(8))
        self.register_buffer("part", self.kept[:4])
        if kind == "parameter":
            self.other = nn.Parameter(self.last.weight.data)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.kind == "buffers":
            self.kept += 1
        more = {
            "attribute": self.plain,
            "view": self.plain.detach().t(),
            "buffers": self.part,
            "apart": self.plain.clone(),
        }
        return super().forward(x) * more.get(self.kind, self.last.weight).square().mean()


@pytest.mark.parametrize("kind", ["attribute", "view", "buffer", "buffers", "parameter"])
def test_memory_that_training_changes_is_not_read_by_another_name(kind: str, laptop: Any) -> None:
    step = step_of(Sharing(kind), laptop, Plan(dp=2))
    with pytest.raises(UserError, match="lies in the memory of") as caught:
        step({"x": X})
    assert "Sharing.forward (" in caught.value.where and "a clone" in caught.value.hint


def test_a_clone_has_memory_of_its_own(laptop: Any) -> None:
    module = Sharing("apart")
    module.part = module.part.clone()
    assert step_of(module, laptop, Plan(dp=2))({"x": X}) == pytest.approx(
        Sharing("apart")(X).item(), rel=1e-6
    )


class Renewing(Net):
    """Makes a module in the forward, as models do that change their kind of attention, around parts that it has."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made = nn.Sequential(nn.Linear(6, 8))
        made[0] = self.first
        return self.last(made(x).tanh()).square().mean()


def test_a_module_that_the_forward_makes_of_known_weights_is_trained(laptop: Any) -> None:
    assert step_of(Renewing(), laptop, Plan(dp=2))({"x": X}) == pytest.approx(Net()(X).item(), rel=1e-6)
