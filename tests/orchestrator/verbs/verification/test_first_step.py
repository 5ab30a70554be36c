"""train --verify-first: the step that the run takes is one chip's, or the run ends; also where it goes on."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from comms.errors import DifferenceError
from orchestrator.config.hardware.cluster_file import cluster_path
from orchestrator.config.yaml_file import read_yaml
from orchestrator.planning.job_parts import job_optimizer, job_parts
from orchestrator.planning.preparation import prepare
from orchestrator.runners.executing.chip_set import InlineLaunch
from orchestrator.runs.metrics import read_metrics
from orchestrator.verbs import train
from orchestrator.verbs.training.job_step import step_of_job
from orchestrator.verbs.verification.first_step import verified_step
from orchestrator.verbs.verification.job_steps import job_steps
from partitioner.layout.parallel_plan import Plan

Make = Callable[..., Any]
PLAN = Plan(dp=2, pp=2, zero=1, microbatches=2)
SMALL = ("validation.every=0", "lr_schedule.warmup_steps=1", "model_args.vocab=256", "steps=2")
pytestmark = pytest.mark.usefixtures("one_thread", "undrawn")


def losses_of(job: Any, plan: Plan, cluster: Any, said: list[str] | None) -> list[float]:
    """Of two steps, the first one verified if there is somewhere to say so."""
    prepared, parts = prepare(cluster.take(plan.num_chips), job, plan), job_parts(job, "cpu")
    optimizer = job_optimizer(job, parts.model.module)
    step = step_of_job(prepared, parts, optimizer, InlineLaunch(prepared.cluster))
    first, second = (each.batch for each in job_steps(parts, 2))
    ran = step.execute(first) if said is None else verified_step(step, first, said.append)
    return [each.stats.loss for each in (ran, step.execute(second)) if each.stats is not None]


@pytest.mark.parametrize("dtype", ["fp64", "fp32", "bf16"])
def test_a_right_step_says_so_and_is_the_step(dtype: str, tiny_job: Make, laptop: Any) -> None:
    said: list[str] = []
    job = tiny_job(*SMALL, f"dtype={dtype}")
    assert losses_of(job, PLAN, laptop, said) == losses_of(job, PLAN, laptop, None)
    assert len(said) == 1 and said[0].startswith("first step verified: equal to one chip")


@pytest.mark.parametrize("dtype", ["fp64", "fp32"])
def test_a_wrong_step_is_an_error(wrong: str, dtype: str, tiny_job: Make, laptop: Any) -> None:
    job = tiny_job(*SMALL, f"dtype={dtype}", "clip_norm=null")
    with pytest.raises(DifferenceError, match=f"the first step differs from one chip: {wrong}"):
        losses_of(job, Plan(dp=2), laptop, [])


def test_a_wrong_run_ends_before_its_second_step(
    broken: Callable[[str], None], tiny_job: Make, laptop: Any, tmp_path: Path
) -> None:
    broken("a wrong update")
    with pytest.raises(DifferenceError) as caught:
        train.run(
            laptop.take(2), tiny_job(*SMALL), plan=Plan(dp=2), folder=tmp_path / "run", verify_first=True
        )
    assert caught.value.exit_code == 5 and not read_metrics(tmp_path / "run" / "metrics.jsonl")


def test_a_run_that_goes_on_is_verified_from_its_checkpoint(
    tiny_job: Make, laptop: Any, tmp_path: Path, orchestrate: Callable[..., Any]
) -> None:
    folder, document = tmp_path / "run", dict(read_yaml(cluster_path("laptop")).root)
    job = tiny_job(*SMALL, "checkpoints.every=1", "steps=3")
    train.run(laptop.take(4), job, plan=PLAN, folder=folder, document=document)
    shutil.rmtree(folder / "checkpoints" / "step-000003")
    ran = orchestrate("train", "--resume", folder, "--runner", "inline", "--verify-first")
    assert ran.code == 0 and "first step verified: equal" in ran.err
