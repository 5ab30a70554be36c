"""Job parts: batches without names, optimizers and schedulers of every form."""

from collections.abc import Callable
from dataclasses import make_dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from comms.errors import DataError, ModelError, PlanError
from orchestrator.config.job_file import load_job
from orchestrator.planning.job_parts import LrSchedule, PositionalInputs, job_optimizer, job_parts
from orchestrator.planning.optimizer_checks import checked_traits

A, B, C = (torch.full((4, 2), float(n)) for n in range(3))


class One(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


class Two(nn.Module):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return x


class Given(NamedTuple):
    x: Tensor
    y: Tensor


def loss(output: Tensor, y: Tensor) -> Tensor:
    return output - y


def weighted(output: Tensor, y: Tensor, weight: Tensor | None = None) -> Tensor:
    return output - y


def of_batch(output: Tensor, batch: Any) -> Any:
    return batch


def named(module: nn.Module, loss_fn: Callable[..., Any] | None, value: object) -> list[str]:
    found = PositionalInputs(module, loss_fn, "mine.py:data").named(value)
    assert [int(v[0, 0]) for v in found.values()] == list(range(len(found)))
    return list(found)


@pytest.mark.parametrize(
    ("module", "loss_fn", "value", "expected"),
    [
        (One(), None, A, ["x"]), (One(), None, (A,), ["x"]), (One(), loss, [A, B], ["x", "y"]),
        (Two(), None, (A, B), ["x", "mask"]), (Two(), loss, (A, B), ["x", "y"]),
        (Two(), loss, (A, B, C), ["x", "mask", "y"]),
        (One(), weighted, (A, B, C), ["x", "y", "weight"]), (One(), nn.MSELoss(), (A, B), ["x", "target"]),
        (One(), of_batch, (A, B), ["x", "entry_0"]), (One(), loss, {"y": A, "x": B}, ["y", "x"]),
        (One(), loss, Given(A, B), ["x", "y"]), (One(), loss, make_dataclass("Data", ["x", "y"])(A, B), ["x", "y"]),
    ],
)  # fmt: skip
def test_entries_without_names_are_forwards_arguments_and_then_the_losss(
    module: nn.Module, loss_fn: Callable[..., Any] | None, value: object, expected: list[str]
) -> None:
    assert named(module, loss_fn, value) == expected


@pytest.mark.parametrize(
    ("module", "loss_fn", "value", "said"),
    [
        (One(), None, (A, B), r"1 entry is left over for the loss, and the job has none; forward takes \(x\)"),
        (One(), loss, (A,), ""), (One(), loss, (A, B, C), "after the output the loss takes .y."),
        (Two(), of_batch, (A, B), r"which of 2 entries are for forward\(x, mask\)"),
        (One(), None, 5, "a batch is a int"), (One(), None, None, "a batch is a NoneType"),
    ],
)  # fmt: skip
def test_entries_that_nobody_takes_are_refused_with_what_is_taken(
    module: nn.Module, loss_fn: Callable[..., Any] | None, value: object, said: str
) -> None:
    if not said:
        assert named(module, loss_fn, value) == ["x"]
        return
    with pytest.raises(DataError, match=said) as caught:
        named(module, loss_fn, value)
    assert caught.value.where == "mine.py:data" and "give dicts" in caught.value.hint


def test_a_loss_of_the_batch_gets_the_tuple_that_the_data_gave() -> None:
    inputs = PositionalInputs(One(), of_batch, "mine.py:data")
    batch = inputs.named((A, B))
    assert inputs.loss_fn is not None
    assert [v is w for v, w in zip(inputs.loss_fn(A, batch), (A, B), strict=True)] == [True, True]


PASSES = """
import torch
def data():
    for k in range(4):
        yield torch.full((2,), float(k)), torch.zeros(1)
"""


def test_a_function_that_yields_is_called_anew_for_each_pass(tmp_path: Path) -> None:
    (tmp_path / "yielding.py").write_text(PASSES)
    given = [f"data={tmp_path}/yielding.py:data", "global_batch=2", "model=torch.nn:Linear",
             "model_args={in_features: 2, out_features: 1}", "loss=torch.nn:MSELoss"]  # fmt: skip
    data = job_parts(load_job(None, given), "cpu").data
    assert data is not None
    assert [data.batch(step)["input"][:, 0].tolist() for step in (0, 1, 2, 3)] == [[0, 1], [2, 3]] * 2


RANDOM = """
import numpy, random, torch
from torch.utils.data import TensorDataset
def data(): return TensorDataset(torch.randn(8, 2) * random.random() * numpy.random.rand(), torch.randn(8, 1))
"""


def test_what_a_data_function_draws_follows_from_the_seed_alone(tmp_path: Path) -> None:
    (tmp_path / "drawn.py").write_text(RANDOM)
    found = []
    for seed in (1, 1, 2):
        given = [f"data={tmp_path}/drawn.py:data", f"seed={seed}", "global_batch=4", "model=torch.nn:Linear",
                 "model_args={in_features: 2, out_features: 1}", "loss=torch.nn:MSELoss"]  # fmt: skip
        before = torch.get_rng_state()
        data = job_parts(load_job(None, given), "cpu").data
        assert data is not None and torch.equal(before, torch.get_rng_state())
        found.append(torch.cat(list(data.source.tensors), dim=1))
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def test_a_model_of_ones_own_without_data_is_told_what_to_give() -> None:
    given = ["model=torch.nn:Linear", "model_args={in_features: 2, out_features: 1}"]
    with pytest.raises(
        ModelError, match=r"no data was given, so a batch of text .* takes \(input\)"
    ) as caught:
        job_parts(load_job(None, given), "cpu").example_batch()
    assert caught.value.hint.startswith("give --data file.py:name, or example_batch")


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))


def test_with_the_built_in_optimizers_matrices_decay_and_all_else_does_not() -> None:
    made = job_optimizer(load_job(None, ["optimizer={lr: 0.5, weight_decay: 0.25}"]), net())
    assert [(g["lr"], g["weight_decay"], [p.dim() for p in g["params"]]) for g in made.param_groups] == [
        (0.5, 0.25, [2, 2]), (0.5, 0.0, [1, 1])]  # fmt: skip


def test_what_is_not_written_of_an_own_optimizer_stays_as_its_code_has_it() -> None:
    job = load_job(None, ["optimizer={name: torch.optim:Adam, args: {eps: 0.5}}"])
    (group,) = job_optimizer(job, net()).param_groups
    assert (group["lr"], group["betas"], group["eps"], group["weight_decay"]) == (1e-3, (0.9, 0.999), 0.5, 0)
    assert job.clip_limit is None and job.shape_of_lr is None
    asked = load_job(None, ["optimizer=torch.optim:Adam", "clip_norm=2", "lr_schedule=linear"])
    assert asked.clip_limit == 2 and asked.shape_of_lr is not None


def test_a_schedule_of_a_job_moves_every_group_from_its_own_peak() -> None:
    job = load_job(None, ["optimizer=torch.optim:SGD", "lr_schedule={name: linear, warmup_steps: 0, min_lr_ratio: 0}",
                          "steps=3"])  # fmt: skip
    module = net()
    optimizer = torch.optim.SGD([{"params": [p], "lr": 2.0**i} for i, p in enumerate(module.parameters())])
    schedule, rates = LrSchedule(job, optimizer), []
    for step in range(3):
        schedule.before(step)
        rates.append(schedule.rates)
        schedule.after()
    assert rates == [[1, 2, 4, 8], [0.5, 1, 2, 4], [0, 0, 0, 0]]


def test_a_scheduler_goes_through_the_steps_again_and_says_when_the_last_one_is() -> None:
    halves = "lr_schedule={name: torch.optim.lr_scheduler:ExponentialLR, args: {gamma: 0.5}}"
    job = load_job(None, ["optimizer=torch.optim:SGD", halves])
    schedule, seen = LrSchedule(job, torch.optim.SGD(net().parameters(), lr=8.0)), list[list[float]]()
    schedule.replay(2, lambda: seen.append(schedule.rates), moves_groups=False)
    assert schedule.rates == [2.0] and seen == [[4.0]]


def test_hooks_of_an_optimizer_are_refused() -> None:
    optimizer = torch.optim.SGD(net().parameters(), lr=1.0)
    optimizer.register_step_post_hook(lambda *_: None)
    with pytest.raises(PlanError, match="hooks of the optimizer's steps would not run"):
        checked_traits(optimizer)
