"""Job files: precedence, overrides typed by the schema, and a document that gives the same job back."""

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from comms.errors import ConfigError
from orchestrator.config.job_file import Dtype, LrShape, job_from, load_job
from orchestrator.config.yaml_file import parse_yaml
from partitioner.layout.pipeline_schedules import PipelineSchedule

FILE = """\
kind: job
version: 1
model: hf:gpt2
model_args: {n_layer: 2}
steps: 7
optimizer: {name: sgd, lr: 3e-4, momentum: 0.9}
plan: {dp: 2, tp: auto, zero: 1}
"""


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "job.yaml"
    file.write_text(FILE)
    return file


def test_the_defaults_are_a_whole_job():
    job = load_job(None)
    assert (job.model, job.dtype, job.plan.schedule) == (
        "builtin:gpt-mini",
        Dtype.FP32,
        PipelineSchedule.ONE_F_ONE_B,
    )
    assert (job.plan.dp, job.plan.tp, job.plan.pp, job.microbatches) == (None, None, None, None)
    assert job.lr_schedule.name is LrShape.COSINE


def test_a_file_beats_defaults_and_overrides_beat_the_file(path):
    job = load_job(path, ["steps=9", "plan.pp=4"])
    assert (job.model, job.model_args, job.steps) == ("hf:gpt2", {"n_layer": 2}, 9)
    assert (job.plan.dp, job.plan.tp, job.plan.pp, job.plan.zero) == (2, None, 4, 1)
    assert (job.optimizer.name, job.optimizer.lr, job.optimizer.momentum) == ("sgd", 3e-4, 0.9)


def test_the_last_override_of_a_key_wins(path):
    assert load_job(path, ["steps=9", "steps=11"]).steps == 11


@pytest.mark.parametrize(
    ("override", "read"),
    [
        ("data=123", lambda job: job.data == "123"),
        ("model=a=b:c", lambda job: job.model == "a=b:c"),
        ("optimizer.lr=1e-5", lambda job: job.optimizer.lr == 1e-5),
        ("optimizer.lr=1", lambda job: job.optimizer.lr == 1.0),
        ("optimizer.betas=[0.8, 0.9]", lambda job: job.optimizer.betas == (0.8, 0.9)),
        ("optimizer.name=my.module:make", lambda job: job.optimizer.name == "my.module:make"),
        ("clip_norm=null", lambda job: job.clip_norm is None),
        ("model_args.n_head=4", lambda job: job.model_args["n_head"] == 4),
        ("microbatches=8", lambda job: job.microbatches == 8),
        ("plan={dp: 2, tp: 4}", lambda job: (job.plan.dp, job.plan.tp) == (2, 4)),
    ],
)
def test_overrides_are_typed_by_the_schema(override, read):
    assert read(load_job(None, [override]))


@pytest.mark.parametrize(
    ("override", "problem", "hint"),
    [
        ("plan.pd=2", "unknown key 'plan.pd'", "did you mean 'dp'?"),
        ("plan.dp=x", "plan.dp: 'x' is not a count", "'auto'"),
        ("plan.dp=0", "plan.dp: 0 is not a count", "above zero"),
        ("dtype=fp23", "dtype cannot be 'fp23'", "did you mean 'fp32'?"),
        ("steps=1.5", "steps should be a valid integer", "whole number"),
        ("steps=true", "steps should be a valid integer", "whole number"),
        ("optimizer.lr=-1", "optimizer.lr should be greater than 0", "inside the bounds"),
        ("optimizer.name=adam", "is not an optimizer", "adamw, sgd, file.py:name or pkg.module:name"),
        ("plan.zero=3", "plan.zero cannot be 3", "known here: 0, 1"),
        ("steps", "cannot read the override", "plan.dp=2"),
        ("plan..dp=2", "cannot read the override", "plan.dp=2"),
        ("plan=[", "not valid YAML", "brackets"),
        ("plam.dp=2", "unknown key 'plam'", "did you mean 'plan'?"),
        ("a.b.c=1", "unknown key 'a'", "known here"),
        ("plan.dp.x=2", "plan.dp: {'x': 2} is not a count", "'auto'"),
        ("steps.x=2", "steps should be a valid integer", "whole number"),
        ("data_args={a: 1}", "data_args has no effect on text", "data of your own"),
        ("lr_schedule.args={a: 1}", "lr_schedule: cosine takes no args", "scheduler of yours"),
        ("optimizer.args={a: 1}", "optimizer: adamw takes no args", "beside its name"),
        (
            "optimizer={name: torch.optim:SGD, lr: 1, args: {lr: 2}}",
            "optimizer: lr stands twice",
            "leave one out",
        ),
        ("version='1'", "version should be a valid integer, got '1'", "write a whole number"),
        ("version=true", "version should be a valid integer, got True", "write a whole number"),
        ("plan.zero=true", "plan.zero should be a valid integer, got True", "write a whole number"),
        ("plan.zero=1.0", "plan.zero should be a valid integer, got 1.0", "write a whole number"),
        ("clip_norm=.inf", "clip_norm should be a finite number", "not infinite"),
        ("optimizer.lr=1e400", "optimizer.lr should be a finite number", "not infinite"),
        ("optimizer.weight_decay=.nan", "optimizer.weight_decay should be a finite number", "not infinite"),
        ("steps=010", "cannot read '010' as a number", "quotes"),
        ("seed=1:30", "cannot read '1:30' as a number", "quotes"),
    ],
)
def test_a_bad_override_is_named_in_the_error(override, problem, hint):
    with pytest.raises(ConfigError) as error:
        load_job(None, [override])
    assert problem in error.value.problem
    assert error.value.where == f"--set {override}"
    assert hint in error.value.hint


def test_an_override_inside_of_a_name_keeps_the_name(tmp_path):
    file = tmp_path / "job.yaml"
    file.write_text("kind: job\nversion: 1\nsteps: 5\noptimizer: sgd\nlr_schedule: constant\n")
    job = load_job(file, ["optimizer.lr=0.5", "lr_schedule.warmup_steps=3"])
    assert (job.optimizer.name, job.optimizer.lr) == ("sgd", 0.5)
    assert (job.lr_schedule.name, job.lr_schedule.warmup_steps) == (LrShape.CONSTANT, 3)
    with pytest.raises(ConfigError, match="5 has no key 'x'"):
        load_job(file, ["steps.x=1"])


def test_what_an_override_replaces_is_no_place_any_more(path):
    with pytest.raises(ConfigError) as error:
        load_job(path, ["optimizer=adam"])
    assert error.value.where == "--set optimizer=adam"


def test_errors_of_file_and_overrides_come_together(tmp_path):
    file = tmp_path / "job.yaml"
    file.write_text(FILE.replace("steps: 7", "stesp: 7"))
    with pytest.raises(ConfigError) as error:
        load_job(file, ["plan.dp=x"])
    assert {finding.where for finding in error.value.findings} == {f"{file}:5", "--set plan.dp=x"}


@given(st.integers(1, 64), st.integers(1, 9), st.floats(1e-9, 1.0), st.sampled_from(["fp32", "bf16", "fp64"]))
def test_a_job_survives_its_document(steps, dp, lr, dtype):
    job = load_job(None, [f"steps={steps}", f"plan.dp={dp}", f"optimizer.lr={lr!r}", f"dtype={dtype}"])
    text = yaml.safe_dump(job.model_dump())
    assert job_from(parse_yaml(text, "run.yaml")) == job
