"""Batch norm over parts of a batch: statistics of all samples, forward, backward and kept, as on one chip."""

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from comms.errors import CaptureError
from orchestrator.verbs.distribute import distribute
from partitioner.capture.forwards.keyed_random import keyed_random
from partitioner.capture.samples.batch_norms import normalised_per_part
from partitioner.layout.parallel_plan import BatchNorms, Plan

Check = Callable[..., Any]
Doubles = Callable[..., torch.Tensor]

LAYERS: dict[str, Callable[[], nn.Module]] = {
    "plain": lambda: nn.BatchNorm1d(4),
    "momentum": lambda: nn.BatchNorm1d(4, momentum=0.7, eps=1e-3),
    "no weights": lambda: nn.BatchNorm1d(4, affine=False),
    "no statistics": lambda: nn.BatchNorm1d(4, track_running_stats=False),
    "neither": lambda: nn.BatchNorm1d(4, affine=False, track_running_stats=False),
    "of sequences": lambda: nn.Sequential(nn.Unflatten(1, (2, 2)), nn.BatchNorm1d(2), nn.Flatten()),
    "of images": lambda: nn.Sequential(nn.Unflatten(1, (2, 2, 1)), nn.BatchNorm2d(2), nn.Flatten()),
    "two": lambda: nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 4), nn.BatchNorm1d(4)),
}


def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
    return m.made(m.lin(x)).tanh().square().mean()


@pytest.mark.parametrize("dp", [2, 4])
@pytest.mark.parametrize("name", LAYERS)
def test_statistics_are_of_all_replicas(name: str, dp: int, check: Check, doubles: Doubles) -> None:
    parted = check(forward, {"x": doubles(8, 4)}, dp=dp, microbatches=1, make=lambda: LAYERS[name]().double())
    assert [target for target in parted.targets() if "sum_parts" in target]


def test_several_microbatches_are_refused_by_line(parts_of: Check, doubles: Doubles) -> None:
    def normed(m: Any, x: torch.Tensor) -> torch.Tensor:
        return F.batch_norm(m.lin(x), None, None, training=True).tanh().mean()

    with pytest.raises(CaptureError, match="mixes samples") as caught:
        parts_of(normed, {"x": doubles(8, 4)})
    assert "use 1 microbatch" in caught.value.hint and "batch_norm: per_part" in caught.value.hint


def test_in_evaluation_every_image_is_normalised_by_itself(check: Check, doubles: Doubles) -> None:
    parted = check(forward, {"x": doubles(8, 4)}, make=lambda: nn.BatchNorm1d(4).double().eval())
    assert not [target for target in parted.targets() if target.startswith("orchestrate")]


def counting(m: Any, x: torch.Tensor) -> torch.Tensor:
    m.steps += 1
    return m.lin(x).square().mean() / m.steps


def averaging(m: Any, x: torch.Tensor) -> torch.Tensor:
    h = m.lin(x)
    with torch.no_grad():
        m.mean.lerp_(h.mean(0), 0.1)
    return (h - m.mean).square().mean()


def averaging_inputs(m: Any, x: torch.Tensor) -> torch.Tensor:
    m.mean = 0.9 * m.mean + 0.1 * x.mean(0)
    return (m.lin(x) * m.mean).square().mean()


def keeping_the_last(m: Any, x: torch.Tensor) -> torch.Tensor:
    h = m.lin(x)
    m.mean = h.detach().mean(0)
    return h.square().mean()


@pytest.mark.parametrize("script", [counting, averaging, averaging_inputs, keeping_the_last])
def test_buffers_that_a_forward_keeps_are_of_the_whole_batch(
    script: Any, check: Check, doubles: Doubles
) -> None:
    assert check(script, {"x": doubles(8, 4)}, dp=4, microbatches=1).captured.updated


class Normed(nn.Module):
    """Batch norm between two layers, as most networks for images have it."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.layers = nn.Sequential(
                nn.Linear(4, 6, bias=False), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 6), nn.BatchNorm1d(6),
                nn.Tanh(), nn.Linear(6, 2),
            ).double()  # fmt: skip

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return F.mse_loss(self.layers(x), y)


@pytest.mark.parametrize(
    "plan", [Plan(), Plan(dp=2), Plan(dp=4, zero=1), Plan(pp=2), Plan(tp=2), Plan(dp=2, pp=2)], ids=str
)
def test_training_is_that_of_one_chip_with_its_running_statistics(
    plan: Plan, doubles: Doubles, trained_alike: Any
) -> None:
    batches = [{"x": 1 + 3 * doubles(8, 4, seed=s), "y": doubles(8, 2, seed=s)} for s in range(3)]
    module = Normed()
    step = trained_alike(module, batches, plan, lr=0.2)
    assert step.evaluate(batches[0]) == pytest.approx(module(**batches[0]).item(), rel=1e-9)


def test_half_precision_is_summed_up_in_float32(laptop: Any, one_thread: None) -> None:
    class Large(Normed):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            with torch.autocast("cpu", torch.float16):
                hidden = self.layers[1](self.layers[0](x) * 300)
            return F.mse_loss(hidden.float()[:, :2], y)

    draw = torch.Generator().manual_seed(0)
    batch = {"x": torch.randn(8, 4, generator=draw), "y": torch.randn(8, 2, generator=draw)}
    module = Large().float()
    plain = copy.deepcopy(module)
    step = distribute(module, torch.optim.SGD(module.parameters(), 0.1), laptop, plan=Plan(dp=2), chips=2)
    assert step(batch) == pytest.approx(
        plain(**batch).item(), rel=1e-2
    )  # means of squares of 300 have left float16
    step.sync()
    torch.testing.assert_close(module.layers[1].running_var, plain.layers[1].running_var, rtol=1e-2, atol=0)


PER_PART = BatchNorms.PER_PART


@pytest.mark.parametrize(
    "plan",
    [Plan(dp=2, batch_norm=PER_PART), Plan(microbatches=4, batch_norm=PER_PART), Plan(tp=2, batch_norm=PER_PART),
     Plan(dp=2, zero=1, microbatches=2, batch_norm=PER_PART), Plan(dp=2, pp=2, microbatches=2, batch_norm=PER_PART)],
    ids=str,
)  # fmt: skip
def test_normalised_per_part_is_what_each_part_does_alone(
    plan: Plan, doubles: Doubles, trained_alike: Any
) -> None:
    batches = [{"x": 1 + 3 * doubles(8, 4, seed=s), "y": doubles(8, 2, seed=s)} for s in range(3)]
    trained_alike(Normed(), batches, plan, lr=0.2, around=lambda _: normalised_per_part(plan.norm_parts))


@pytest.mark.parametrize("name", LAYERS)
def test_every_kind_of_batch_norm_is_normalised_per_part(
    name: str, doubles: Doubles, trained_alike: Any
) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin, self.made = nn.Linear(4, 4), LAYERS[name]()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return forward(self, x)

    batches = [{"x": doubles(8, 4, seed=s)} for s in range(2)]
    plan = Plan(dp=2, microbatches=2, batch_norm=PER_PART)
    trained_alike(
        Net().double(), batches, plan, lr=0.2, around=lambda _: normalised_per_part(plan.norm_parts)
    )


@pytest.mark.parametrize("keyed", [nullcontext(), keyed_random(torch.tensor(5), torch.tensor(0))])
def test_the_reference_is_torchs_own_on_each_piece(keyed: Any, doubles: Doubles) -> None:
    x, norm = doubles(8, 4), nn.BatchNorm1d(4).double()
    with keyed, normalised_per_part(2):
        out = norm(x)
    torch.testing.assert_close(out, torch.cat([nn.BatchNorm1d(4).double()(half) for half in x.chunk(2)]))
    half_means = torch.stack([half.mean(0) for half in x.chunk(2)])
    torch.testing.assert_close(norm.running_mean, 0.1 * half_means.mean(0))


def test_per_part_without_a_batch_norm_is_refused(doubles: Doubles, laptop: Any) -> None:
    module = nn.Linear(4, 1).double()
    step = distribute(
        module, torch.optim.SGD(module.parameters(), 0.2), laptop, chips=2, loss_fn=lambda out, batch: out.mean(),
        plan=Plan(dp=2, batch_norm=PER_PART),
    )  # fmt: skip
    with pytest.raises(CaptureError, match="the model has no batch norm"):
        step({"input": doubles(8, 4)})


@pytest.mark.parametrize("script", [averaging_inputs, keeping_the_last])
@pytest.mark.parametrize("plan", [Plan(microbatches=2), Plan(dp=2, microbatches=2), Plan(dp=4)], ids=str)
def test_kept_means_do_not_depend_on_microbatches(
    script: Any, plan: Plan, doubles: Doubles, trained_alike: Any
) -> None:
    class Keeping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(4, 4)
            self.register_buffer("mean", torch.zeros(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return script(self, x)

    trained_alike(Keeping().double(), [{"x": doubles(8, 4, seed=s)} for s in range(3)], plan, lr=0.2)


def test_evaluation_uses_running_statistics_and_changes_none(
    doubles: Doubles, laptop: Any, one_thread: None
) -> None:
    batch = {"x": 1 + 3 * doubles(8, 4), "y": doubles(8, 2)}
    module = Normed()
    step = distribute(module, torch.optim.SGD(module.parameters(), 0.2), laptop, plan=Plan(dp=2), chips=2)
    step(batch)
    step.sync()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    module.eval()
    assert step.evaluate(batch) == pytest.approx(module(**batch).item(), rel=1e-9)
    module.train()
    step.evaluate(batch)
    step.sync()
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


class Twins(nn.Module):
    """One network on two inputs: its statistics move twice."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).double()

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return F.mse_loss(self.net(x), self.net(y))


@pytest.mark.parametrize("plan", [Plan(), Plan(dp=2), Plan(tp=2), Plan(pp=2)], ids=str)
def test_a_batch_norm_of_two_inputs_trains_as_in_torch(
    plan: Plan, doubles: Doubles, trained_alike: Any
) -> None:
    batches = [{"x": 1 + 3 * doubles(8, 4, seed=s), "y": doubles(8, 4, seed=s + 9)} for s in range(3)]
    trained_alike(Twins(), batches, plan)
