"""distribute: the loop a user had before, with the same losses and parameters."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import orchestrator
from comms.errors import CaptureError, PlanError, RunError, UserError
from orchestrator.verbs.distribute import distribute
from partitioner.layout.parallel_plan import Plan

Batch = dict[str, torch.Tensor]
PLANS = [Plan(), Plan(dp=2), Plan(dp=2, zero=1, microbatches=2), Plan(pp=2, microbatches=4), Plan(tp=2)]
each_plan = pytest.mark.parametrize("plan", PLANS, ids=str)


class Perceptron(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 2)
        )

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return nn.functional.mse_loss(self.layers(x), y)


def model() -> Perceptron:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Perceptron().double()


def batch(number: int, size: int = 8) -> Batch:
    generator = torch.Generator().manual_seed(number)
    return {"x": torch.randn(size, 6, generator=generator, dtype=torch.float64),
            "y": torch.randn(size, 2, generator=generator, dtype=torch.float64)}  # fmt: skip


def adamw(module: nn.Module, **more: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(module.parameters(), lr=0.01, weight_decay=0.1, **more)


def eager(
    make: Callable[[nn.Module], torch.optim.Optimizer],
    steps: int,
    clip: float | None = None,
    gamma: float = 1.0,
) -> Any:
    """(losses, module) of a plain torch loop."""
    module = model()
    optimizer = make(module)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma)
    losses = []
    for number in range(steps):
        optimizer.zero_grad()
        loss = module(**batch(number))
        loss.backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(module.parameters(), clip)
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
    return losses, module


def close(one: nn.Module, other: nn.Module) -> None:
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


@each_plan
def test_it_equals_the_plain_loop(plan: Plan, laptop: Any, one_thread: None) -> None:
    losses, expected = eager(adamw, 4)
    module = model()
    step = distribute(module, adamw(module), laptop, plan=plan, chips=plan.num_chips)
    assert [step(batch(number)) for number in range(4)] == pytest.approx(losses, rel=1e-10)
    close(step.sync(), expected)
    assert step.sync() is module


@pytest.mark.parametrize(
    "make",
    [
        lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9, nesterov=True),
        lambda m: torch.optim.Adam(m.parameters(), lr=0.01, weight_decay=0.05, amsgrad=True),
        lambda m: torch.optim.RMSprop(m.parameters(), lr=0.01, centered=True),
        lambda m: torch.optim.AdamW([{"params": [p for p in m.parameters() if p.dim() > 1]}, {"params": [
            p for p in m.parameters() if p.dim() < 2], "weight_decay": 0.0}], lr=0.01),
    ],
    ids=["sgd", "adam", "rmsprop", "two groups"],
)  # fmt: skip
def test_settings_of_the_users_optimizer_are_kept(make: Any, laptop: Any, one_thread: None) -> None:
    losses, expected = eager(make, 3)
    module = model()
    step = distribute(module, make(module), laptop, plan=Plan(dp=2, zero=1), chips=2)
    assert [step(batch(number)) for number in range(3)] == pytest.approx(losses, rel=1e-10)
    close(step.sync(), expected)


def test_clipping_is_torchs(laptop: Any, one_thread: None) -> None:
    losses, expected = eager(adamw, 3, clip=0.05)
    module = model()
    step = distribute(module, adamw(module), laptop, plan=Plan(dp=2), chips=2, clip_norm=0.05)
    assert [step(batch(number)) for number in range(3)] == pytest.approx(losses, rel=1e-10)
    close(step.sync(), expected)


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
def test_a_learning_rate_scheduler_keeps_working(laptop: Any, one_thread: None) -> None:
    losses, expected = eager(adamw, 4, gamma=0.5)
    module = model()
    optimizer = adamw(module)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    step = distribute(module, optimizer, laptop, plan=Plan(dp=2), chips=2)
    found = []
    for number in range(4):
        found.append(step(batch(number)))
        scheduler.step()
    assert found == pytest.approx(losses, rel=1e-10)
    close(step.sync(), expected)


def test_loss_fn_and_cluster_by_name_and_a_plan_of_its_own(one_thread: None) -> None:
    module = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 2)).double()
    inputs = {"input": batch(0)["x"]}
    expected = module(**inputs).square().mean().item()
    step = orchestrator.distribute(
        module, adamw(module), "laptop", chips=2, loss_fn=lambda out, **batch: out.square().mean()
    )
    assert step.evaluate(inputs) == pytest.approx(expected, rel=1e-12)
    assert step(inputs) == pytest.approx(expected, rel=1e-12)
    assert step.plan is not None and step.plan.num_chips == 2
    assert step(inputs) < expected


def test_evaluate_does_not_train(laptop: Any, one_thread: None) -> None:
    module = model()
    step = distribute(module, adamw(module), laptop, plan=Plan(dp=2), chips=2)
    first = step.evaluate(batch(0))
    assert step.evaluate(batch(0)) == first == step(batch(0))


def test_before_the_first_batch_sync_changes_nothing(laptop: Any) -> None:
    module = model()
    step = distribute(module, adamw(module), laptop, chips=2)
    close(step.sync(), model())


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({}, "not a mapping"), ([1, 2], "not a mapping"), (batch(0, size=7), "does not divide into 2 parts"),
        (batch(0, size=0), "no samples"), ({**batch(0), "x": object()}, "the batch's x is a object"),
        ({"x": batch(0)["x"], "y": batch(0)["y"][:4]}, "cannot capture Perceptron"),
        ({"x": batch(0)["x"]}, "does not fit the model.*'y'"), ({**batch(0), "z": 1}, "does not fit the model.*'z'"),
    ],
)  # fmt: skip
def test_a_bad_batch_is_refused_with_what_is_wrong(wrong: Any, said: str, laptop: Any) -> None:
    module = model()
    step = distribute(module, adamw(module), laptop, plan=Plan(dp=2), chips=2)
    with pytest.raises(UserError, match=said):
        step(wrong)


def test_what_cannot_be_captured_or_cut_is_a_user_error(laptop: Any) -> None:
    class Branching(Perceptron):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return super().forward(x, y) if x.sum() > 0 else super().forward(y, x)

    module = Branching().double()
    with pytest.raises(CaptureError, match="_local_scalar_dense"):
        distribute(module, adamw(module), laptop, chips=2, plan=Plan(dp=2))(batch(0))
    module = model()
    with pytest.raises(PlanError, match="places 9 units"):
        distribute(module, adamw(module), laptop, chips=2, plan=Plan(pp=2, stages=(4, 5)))(batch(0))


class Classes(Perceptron):
    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(self.layers(x), y)


@pytest.mark.parametrize("plan", [Plan(), Plan(dp=2, microbatches=2), Plan(tp=2)], ids=str)
def test_labels_that_are_no_class_are_told_with_operator_and_entry(plan: Plan, laptop: Any) -> None:
    module = Classes().double()
    step = distribute(module, adamw(module), laptop, plan=plan, chips=plan.num_chips)
    with pytest.raises(RunError, match=r"aten\..* failed: .*out of bounds") as caught:
        step({"x": batch(0)["x"], "y": torch.arange(8)})
    assert "numbers in y name classes" in caught.value.hint and "on chip" in caught.value.where


class Complex(Perceptron):
    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        turned = torch.fft.fft(self.layers(x)) * (1 + 2j) + torch.tensor([1j, 2.0])
        missing = torch.where(y > 9, torch.tensor(float("nan"), dtype=y.dtype), y)
        return (turned * torch.exp(1j * missing)).abs().square().mean()


@each_plan
def test_complex_numbers_and_nan_in_the_code_are_carried_out(
    plan: Plan, laptop: Any, one_thread: None
) -> None:
    module, plain = Complex().double(), Complex().double()
    plain.load_state_dict(module.state_dict())
    step = distribute(
        module, torch.optim.SGD(module.parameters(), 0.1), laptop, plan=plan, chips=plan.num_chips
    )
    optimizer = torch.optim.SGD(plain.parameters(), 0.1)
    loss = plain(**batch(0))
    loss.backward()
    assert step(batch(0)) == pytest.approx(loss.item(), rel=1e-12)
    optimizer.step()
    close(step.sync(), plain)


def test_a_step_that_is_not_finite_is_skipped_and_said(laptop: Any, one_thread: None) -> None:
    module = model()
    step = distribute(module, adamw(module), laptop, plan=Plan(dp=2), chips=2)
    bad = batch(0)
    bad["x"][3, 2] = float("nan")
    with pytest.raises(RunError, match="not finite"):
        step(bad)
    close(step.sync(), model())
    assert step(batch(0)) == pytest.approx(model()(**batch(0)).item(), rel=1e-12)


def test_chips_of_the_plan_and_of_the_cluster_must_agree(laptop: Any) -> None:
    module = model()
    step = distribute(module, adamw(module), laptop, plan=Plan(dp=4), chips=2)
    with pytest.raises(PlanError, match="4 chips"):
        step(batch(0))


class Turning(nn.Module):
    """Hands on a strided tensor and takes one in."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.linear(x.reshape(-1, 8))).reshape(-1, 8, 8).transpose(1, 2)


class Awkward(nn.Module):
    """Strided tensors between blocks, a table made in the forward, losses that are no plain mean."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.blocks = nn.ModuleList(Turning() if kind == "strided" else nn.Linear(8, 8) for _ in range(2))
        self.head = nn.Linear(8, 16, bias=False)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        if self.kind == "table":
            x = x * torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0])
        logits, labels = self.head(x).flatten(0, 1), y.flatten()
        if self.kind == "smoothed":
            return nn.functional.cross_entropy(logits, labels, label_smoothing=0.1)
        loss = nn.functional.cross_entropy(logits, labels)
        more = {"auxiliary": x, "mean of logits": logits}.get(self.kind)
        return loss if more is None else loss + 0.01 * more.square().mean()


AWKWARD = ("plain", "strided", "table", "smoothed", "auxiliary", "mean of logits")


@pytest.mark.parametrize("kind", AWKWARD)
def test_awkward_models_give_the_loss_of_the_module(kind: str, laptop: Any, one_thread: None) -> None:
    module = Awkward(kind).double()
    generator = torch.Generator().manual_seed(1)
    inputs = {
        "x": torch.randn(4, 8, 8, generator=generator, dtype=torch.float64),
        "y": torch.randint(0, 16, (4, 8), generator=generator),
    }
    expected = module(**inputs).item()
    plan = Plan(dp=2) if kind == "strided" else Plan(tp=2)
    step = distribute(module, adamw(module), laptop, plan=plan, chips=2)
    assert step.evaluate(inputs) == pytest.approx(expected, rel=1e-10)


class Skipping(nn.Module):
    """Values that are used again in later stages, and one that stops there."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(6, 6) for _ in range(4))
        self.last = nn.Linear(6, 2)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        first = torch.tanh(self.blocks[0](x))
        second = torch.tanh(self.blocks[1](first))
        third = self.blocks[2](second) + first
        fourth = self.blocks[3](third) * first + second.detach()
        return nn.functional.mse_loss(self.last(fourth), y)


@pytest.mark.parametrize(
    "plan", [Plan(), Plan(pp=3, microbatches=4), Plan(pp=4, microbatches=2), Plan(tp=2, pp=2)], ids=str
)
def test_a_value_may_skip_stages(plan: Plan, laptop: Any, one_thread: None) -> None:
    plain, module = Skipping().double(), Skipping().double()
    module.load_state_dict(plain.state_dict())
    optimizer, losses = adamw(plain), []
    for number in range(3):
        optimizer.zero_grad()
        loss = plain(**batch(number))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    step = distribute(module, adamw(module), laptop, plan=plan, chips=plan.num_chips)
    assert [step(batch(number)) for number in range(3)] == pytest.approx(losses, rel=1e-10)
    close(step.sync(), plain)


def test_parameters_that_the_optimizer_does_not_hold_stay_as_they_are(laptop: Any, one_thread: None) -> None:
    module, expected = model(), model()
    first = module.layers[0]
    optimizer = torch.optim.AdamW(
        [p for n, p in module.named_parameters() if not n.startswith("layers.0.")], lr=0.01
    )
    step = distribute(module, optimizer, laptop, plan=Plan(dp=2), chips=2)
    step(batch(0))
    step.sync()
    assert torch.equal(first.weight, expected.layers[0].weight)
    assert not torch.equal(module.layers[2].weight, expected.layers[2].weight)


class TiedAutoencoder(nn.Module):
    """Two weights, each used once on the way in and once, in the other order, on the way out."""

    def __init__(self) -> None:
        super().__init__()
        self.inwards = nn.ModuleList(nn.Linear(8, 8, bias=False) for _ in range(2))
        self.outwards = nn.ModuleList(nn.Linear(8, 8, bias=False) for _ in range(2))
        for layer, twin in zip(self.outwards, reversed(self.inwards), strict=True):
            layer.weight = twin.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = x
        for layer in (*self.inwards, *self.outwards):
            hidden = torch.tanh(layer(hidden))
        return nn.functional.mse_loss(hidden, x)


def test_several_weights_tied_across_stages_each_get_their_own_gradient(
    laptop: Any, one_thread: None
) -> None:
    torch.manual_seed(0)
    model = TiedAutoencoder().double()
    alone = copy.deepcopy(model)
    x = torch.randn(8, 8, dtype=torch.float64)
    step = distribute(model, adamw(model), laptop, plan=Plan(pp=2, stages=(2, 2)), chips=2)
    optimizer = adamw(alone)
    for _ in range(3):
        optimizer.zero_grad()
        loss = alone(x)
        loss.backward()
        optimizer.step()
        assert step({"x": x}) == pytest.approx(loss.item(), rel=1e-12)


def test_a_number_of_chips_that_does_not_divide_the_batch_splits_the_model() -> None:
    module = model()
    step = distribute(module, adamw(module), "laptop", chips=3)
    assert step(batch(0)) == pytest.approx(eager(adamw, 1)[0][0], rel=1e-12)
    assert step.plan is not None and (step.plan.dp, step.plan.num_chips) == (1, 3)


def test_an_optimizer_of_another_model_is_refused() -> None:
    step = distribute(model(), adamw(model()), "laptop", chips=2)
    with pytest.raises(PlanError, match="the optimizer holds none of the model's parameters"):
        step(batch(0))
