"""verify, step.verify and train --verify-first on jobs of the user's own model, data, loss, optimizer and scheduler."""

import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from comms.errors import DifferenceError
from orchestrator.config.hardware.cluster_file import cluster_path
from orchestrator.config.job_file import Job, load_job
from orchestrator.config.yaml_file import read_yaml
from orchestrator.planning.preparation import prepare
from orchestrator.runs.metrics import read_metrics
from orchestrator.verbs import train
from orchestrator.verbs.distribute import DistributedStep, distribute
from orchestrator.verbs.verification.first_step import verified_step
from orchestrator.verbs.verify import verify
from partitioner.layout.parallel_plan import BatchNorms, Plan

OWN = """
import torch
from torch import nn
class Regressor(nn.Module):
    def __init__(self, norm=False):
        super().__init__()
        self.first, self.norm = nn.Linear(4, 8), nn.BatchNorm1d(8) if norm else nn.LayerNorm(8)
        self.drop, self.last = nn.Dropout(0.3), nn.Linear(8, 2)
    def forward(self, x, scale=1.0): return self.last(self.drop(torch.tanh(self.norm(self.first(x))))) * scale
class Ranked(Regressor):
    def forward(self, x): return super().forward(x).sort(0).values
def drawn(n, seed): return torch.randn(20, n, generator=torch.Generator().manual_seed(seed))
def rows(): return [{"x": x, "y": y} for x, y in zip(drawn(4, 0), drawn(2, 1))]
def distance(output, batch): return (output - batch["y"]).abs().mean()
class Own(torch.optim.AdamW):
    pass
def groups(model):
    return Own([{"params": model.first.parameters()}, {"params": model.last.parameters(), "lr": 0.01},
                {"params": model.norm.parameters(), "weight_decay": 0.0}], lr=0.02)
def one_cycle(optimizer): return torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=12)
"""
PLANS = [Plan(dp=2, zero=1), Plan(pp=2, microbatches=2), Plan(tp=2)]
pytestmark = pytest.mark.usefixtures("one_thread", "undrawn")


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """own.py in the current folder, and what is in it."""
    (tmp_path / "own.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    scope: dict[str, Any] = {"__name__": "own"}
    exec(OWN, scope)
    return scope


def job(*overrides: str) -> Job:
    """Five steps on 8, 8, 4, 8 and 8 samples."""
    base = ["model=own.py:Regressor", "data=own.py:rows", "loss=own.py:distance", "optimizer=own.py:groups",
            "lr_schedule=own.py:one_cycle", "clip_norm=0.5", "steps=5", "global_batch=8",
            "validation.every=0"]  # fmt: skip
    return load_job(None, [*base, *overrides])


@pytest.mark.parametrize("dtype", ["fp64", "bf16"])
@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_every_plan_is_equal_also_on_the_smaller_batch_at_a_pass_end(
    plan: Plan, dtype: str, own: dict[str, Any], laptop: Any
) -> None:
    result = verify(laptop.take(2), job(f"dtype={dtype}"), plan)
    assert result.equal and result.steps == 5, result.differs


@pytest.mark.parametrize("dtype", ["fp64", "fp32"])
def test_every_way_to_break_a_split_is_found(
    wrong: str, dtype: str, own: dict[str, Any], laptop: Any
) -> None:
    result = verify(laptop.take(2), job(f"dtype={dtype}", "clip_norm=null"), Plan(dp=2))
    assert not result.equal and result.differs is not None and result.differs.startswith(wrong)
    assert result.first_difference


def test_batch_norm_per_part_is_held_against_one_chip_that_cuts_its_batches(
    own: dict[str, Any], laptop: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = job("dtype=fp64", "model_args={norm: true}", "drop_last=true")
    plan = Plan(dp=2, microbatches=2, batch_norm=BatchNorms.PER_PART)
    assert verify(laptop.take(2), given, plan).equal
    monkeypatch.setattr(Plan, "norm_parts", 1)
    assert not verify(laptop.take(2), given, plan).equal


def test_a_model_that_mixes_samples_runs_its_microbatches_as_one(own: dict[str, Any], laptop: Any) -> None:
    plan, given = Plan(pp=2, microbatches=2), job("dtype=fp64", "model=own.py:Ranked")
    prepared = prepare(laptop.take(2), given, plan)
    assert prepared.plan.microbatches == prepared.program.microbatches == 1
    assert "2 microbatches run as one" in str(prepared.program.facts["merged"])
    assert verify(laptop.take(2), given, plan).equal


def test_a_warning_is_given_once_at_the_users_line(own: dict[str, Any], laptop: Any) -> None:
    step = step_of(own, laptop, Plan(pp=2, microbatches=2), "Ranked")
    for use in (step, step.verify, step.evaluate):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            use(batch(own))
        said = [each for each in caught if "run as one" in str(each.message)]
        assert [each.filename for each in said] == [__file__] * (use is step)


def steps_of(cluster: Any, folder: str, given: Job, *, verify_first: bool) -> list[Any]:
    found = train.run(cluster.take(2), given, plan=Plan(dp=2), folder=folder, verify_first=verify_first)
    return [(record["loss"], record["lr"]) for record in read_metrics(found.run_dir / "metrics.jsonl")]


@pytest.mark.parametrize("dtype", ["fp64", "fp32"])
def test_a_run_whose_first_step_is_verified_is_the_run(
    dtype: str, own: dict[str, Any], laptop: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    given = job(f"dtype={dtype}")
    verified = steps_of(laptop, "verified", given, verify_first=True)
    assert "first step verified: equal to one chip" in capsys.readouterr().err
    assert verified == steps_of(laptop, "plain", given, verify_first=False)


def test_a_wrong_run_ends_before_its_second_step(wrong: str, own: dict[str, Any], laptop: Any) -> None:
    with pytest.raises(DifferenceError, match=f"the first step differs from one chip: {wrong}"):
        steps_of(laptop, "run", job("clip_norm=null"), verify_first=True)
    assert not read_metrics(Path("run/metrics.jsonl"))


def test_a_run_that_goes_on_with_a_smaller_batch_is_verified_from_there(
    own: dict[str, Any], laptop: Any, orchestrate: Callable[..., Any]
) -> None:
    document = dict(read_yaml(cluster_path("laptop")).root)
    given = job("checkpoints={every: 1, keep: 9}")
    train.run(laptop.take(2), given, plan=Plan(dp=2), folder="run", document=document)
    for step in (3, 4, 5):
        shutil.rmtree(f"run/checkpoints/step-{step:06d}")
    ran = orchestrate("train", "--resume", "run", "--runner", "inline", "--verify-first")
    assert ran.code == 0 and "first step verified: equal" in ran.err


def step_of(
    own: dict[str, Any], laptop: Any, plan: Plan, model: str = "Regressor", runner: str = "inline"
) -> DistributedStep:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = own[model]()
    return distribute(
        module, own["groups"](module), laptop, plan=plan, chips=2, loss_fn=own["distance"], runner=runner
    )


def batch(own: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {"x": own["drawn"](4, 2), "y": own["drawn"](2, 3)}


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_a_step_with_own_loss_groups_and_scheduler_is_verified_between_steps(
    plan: Plan, own: dict[str, Any], laptop: Any
) -> None:
    step = step_of(own, laptop, plan)
    scheduler = own["one_cycle"](step.optimizer)
    for _ in range(2):
        found = step.verify(batch(own))
        assert found.equal and found.errors is not None, str(found)
        step(batch(own))
        scheduler.step()


@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
def test_steps_that_rays_actors_take_are_verified(own: dict[str, Any], laptop: Any) -> None:
    step, said = step_of(own, laptop, Plan(dp=2), runner="ray"), list[str]()
    try:
        step(batch(own))
        assert step.verify(batch(own)).equal
        verified_step(step, batch(own), said.append)
        assert said[0].startswith("first step verified: equal")
        assert step.steps == 2
    finally:
        step.close()
