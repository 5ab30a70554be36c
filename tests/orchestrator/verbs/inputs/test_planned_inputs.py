"""Inputs: options, files and earlier runs all become the same cluster, job and plan."""

from pathlib import Path

import pytest

from comms.errors import ConfigError, PlanError
from comms.selection.progress import quiet
from orchestrator.config.hardware.cluster_file import cluster_path, load_cluster
from orchestrator.config.job_file import load_job
from orchestrator.runs import run_dir
from orchestrator.verbs.inputs.options import TrainOptions
from orchestrator.verbs.inputs.planned_inputs import DEMONSTRATION, prepare, read_plan, resolve
from orchestrator.verbs.training.resuming import resumed
from partitioner.layout.parallel_plan import Plan, plan_to_yaml


def test_without_options_it_is_the_laptop_and_the_default_job() -> None:
    inputs = resolve(TrainOptions())
    assert inputs.cluster == load_cluster(cluster_path("laptop")).take(None)
    assert inputs.job == load_job(None)
    assert inputs.plan is None


def test_a_demonstration_shows_every_kind_of_parallelism() -> None:
    assert resolve(TrainOptions(), demonstrate=True).job == load_job(None, DEMONSTRATION)


@pytest.mark.parametrize(
    "options",
    [TrainOptions(model="builtin:gpt-mini"), TrainOptions(chips=2), TrainOptions(overrides=("plan.zero=1",))],
    ids=["model", "chips", "plan"],
)
def test_who_asks_for_anything_gets_no_demonstration(options: TrainOptions) -> None:
    wanted = resolve(options, demonstrate=True).job.plan
    assert (wanted.dp, wanted.tp, wanted.pp) == (None, None, None)


def test_flags_come_before_overrides_and_both_before_the_file(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text("kind: job\nversion: 1\nseq: 32\nsteps: 7\nseed: 3\nmodel: builtin:gpt-nano\n")
    options = TrainOptions(
        job=path, seq=64, steps=9, overrides=("steps=11", "optimizer.lr=0.5"), chips=2, global_batch=4
    )
    inputs = resolve(options)
    job = inputs.job
    assert (job.seq, job.steps, job.seed, job.global_batch, job.model) == (64, 11, 3, 4, "builtin:gpt-nano")
    assert job.optimizer.lr == 0.5
    assert inputs.cluster.num_chips == 2


@pytest.mark.parametrize("runner", ["inline", "ray"])
def test_a_configuration_gives_the_same_inputs_again(tmp_path: Path, runner: str) -> None:
    plan = Plan(dp=2)
    inputs = resolve(
        TrainOptions(
            chips=2, model="builtin:gpt-nano", data="builtin:english", seq=16, overrides=("clip_norm=null",)
        )
    )
    folder = run_dir.create(tmp_path / "run")
    folder.write_config(inputs.config(runner))
    folder.write_plan(plan_to_yaml(plan))
    again = resumed(TrainOptions(resume=folder.root), folder)
    assert (again.inputs.job, again.inputs.plan) == (inputs.job, plan)
    assert again.inputs.document == inputs.document
    assert again.inputs.cluster.num_chips == 2 and again.inputs.cluster.unit == inputs.cluster.unit
    assert again.runner == runner and again.found is None


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"cluster": {}, "job": {}},
        {"cluster": 1, "job": {}, "chips": 2},
        {"cluster": {}, "job": {}, "chips": "2"},
    ],
)
def test_what_is_no_configuration_of_a_run_is_refused(tmp_path: Path, config: dict[str, object]) -> None:
    folder = run_dir.create(tmp_path / "run")
    folder.write_config(config)
    with pytest.raises(ConfigError, match="not the configuration of a run"):
        resumed(TrainOptions(resume=folder.root), folder)


def test_a_plan_file_is_read_and_its_faults_named(tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text(plan_to_yaml(Plan(dp=2, tp=4)))
    assert read_plan(path) == Plan(dp=2, tp=4)
    assert read_plan(None) is None
    with pytest.raises(ConfigError, match="cannot read the file"):
        read_plan(tmp_path / "nowhere.yaml")
    path.write_text("kind: plan\nversion: 1\ndepth: 3\n")
    with pytest.raises(PlanError, match="unknown key 'depth'") as caught:
        read_plan(path)
    assert caught.value.where == f"{path}:3"


def test_options_lead_to_a_program(tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text(plan_to_yaml(Plan(dp=1, tp=2)))
    overrides = ("model_args={layers: 1, width: 16, heads: 2, max_seq: 16}",)
    options = TrainOptions(
        model="builtin:gpt-nano", plan=path, chips=2, global_batch=4, seq=16, overrides=overrides
    )
    prepared = prepare(options, quiet)
    assert prepared.program.size("tp") == 2
