"""train, in this process: what a run leaves behind, how it goes on, and how it stops."""

import io
import json
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from comms.errors import ConfigError, RunError
from orchestrator.config.hardware.cluster_file import cluster_path, load_cluster
from orchestrator.config.yaml_file import read_yaml
from orchestrator.runners.signals import StopRequest
from orchestrator.runs import run_dir
from orchestrator.runs.accuracy import Basis
from orchestrator.runs.checkpoints import checkpoint_folder as checkpoint
from orchestrator.runs.metrics import read_metrics
from orchestrator.runs.timeline import Origin
from orchestrator.verbs import train
from orchestrator.verbs.inputs.options import RunnerKind, TrainOptions
from orchestrator.verbs.training import training_loop
from orchestrator.views.console import Console
from partitioner.layout.parallel_plan import Plan, plan_from_yaml
from partitioner.program.program_codec import decode
from partitioner.program.program_text import to_text

PLAN = Plan(dp=2, pp=2, zero=1, microbatches=2)
FILES = {
    "run.yaml", "plan.yaml", "program.txt", "program.msgpack", "metrics.jsonl", "predicted.msgpack", "measured.msgpack",
    "trace.json.gz", "loss.png", "timeline.png", "checkpoints", "log.txt", ".lock",
}  # fmt: skip
SMALL = ("validation.batches=1", "validation.every=2", "lr_schedule.warmup_steps=1", "model_args.vocab=256")
Make = Callable[..., Any]


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    return dict(read_yaml(cluster_path("laptop")).root)


@pytest.fixture(scope="module")
def finished(
    tmp_path_factory: pytest.TempPathFactory, tiny_job: Make, laptop: Any, document: dict[str, Any]
) -> tuple[Any, Path]:
    """A run of four steps on four chips, with checkpoints after each two."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    job = tiny_job(*SMALL, "checkpoints.every=2", "checkpoints.keep=3")
    return train.run(laptop.take(4), job, plan=PLAN, folder=folder, document=document), folder


def saved(folder: Path, step: int) -> dict[str, torch.Tensor]:
    """All tensors in the newest checkpoint, which must be of `step`."""
    found = checkpoint.latest(folder).checkpoint
    assert found is not None and found.manifest.step == step
    return {entry.key: value for entry, value in checkpoint.load(found).parts()}


def test_the_run_directory_has_every_file(finished: tuple[Any, Path]) -> None:
    result, folder = finished
    assert {path.name for path in folder.iterdir()} == FILES
    assert (result.run_dir, result.steps, result.was_interrupted) == (folder, 4, False)
    assert all((folder / name).stat().st_size for name in FILES - {"log.txt"})


def test_metrics_have_a_line_per_step_and_the_loss_goes_down(finished: tuple[Any, Path]) -> None:
    result, folder = finished
    records = read_metrics(folder / "metrics.jsonl")
    assert [r["step"] for r in records] == [1, 2, 3, 4]
    assert [r["val_loss"] is not None for r in records] == [False, True, False, True]
    losses = [float(str(r["loss"])) for r in records]
    assert losses[-1] == result.final_loss < losses[0]
    assert records[-1]["val_loss"] == result.val_loss
    assert all(
        float(str(r[k])) > 0
        for r in records
        for k in ("lr", "step_time_s", "tokens_per_s", "predicted_step_time_s")
    )


def test_predicted_and_measured_are_compared_in_what_does_not_depend_on_this_machine(
    finished: tuple[Any, Path],
) -> None:
    found = finished[0].accuracy
    assert (found.basis, found.num_steps) == (Basis.SHARES, 2)
    assert (found.only_predicted, found.only_measured) == (0, 0)
    assert (found.num_chips, found.chips_in_order) == (4, 4)
    assert found.nbytes.predicted == found.nbytes.measured > 0
    assert found.flops.predicted == found.flops.measured > 0
    assert all(pair.measured == pytest.approx(pair.predicted, rel=0.05) for pair in found.memory_bytes)
    assert {"forward", "backward", "optimizer", "send", "recv"} <= {each.kind for each in found.kinds}


def test_plan_and_program_can_be_read_back(finished: tuple[Any, Path]) -> None:
    _, folder = finished
    program = decode((folder / "program.msgpack").read_bytes())
    assert (folder / "program.txt").read_text() == to_text(program)
    assert plan_from_yaml((folder / "plan.yaml").read_text()) == PLAN
    assert program.num_chips == 4


def test_predicted_and_measured_spans_join(finished: tuple[Any, Path]) -> None:
    folder = run_dir.RunDir(finished[1])
    predicted, measured = (folder.read_timeline(origin) for origin in (Origin.PREDICTED, Origin.MEASURED))
    assert predicted is not None and measured is not None
    keys = [{(s.chip, s.instr, s.microbatch) for s in t.spans} for t in (measured, predicted)]
    assert keys[0] and {chip for chip, _, _ in keys[0]} == set(range(4))
    stages = [
        {(chip // 2, *rest) for chip, *rest in found} for found in keys
    ]  # predicted: one chip speaks for a role
    assert stages[0] <= stages[1]


@contextmanager
def stopping_after(steps: int) -> Iterator[None]:
    """Ask the loop to end after so many steps, as the first Ctrl-C does."""
    request, original = StopRequest(owns_process=False), training_loop.Training._step

    def step(self: training_loop.Training, *rest: Any) -> Any:
        found = original(self, *rest)
        if self.step == steps:
            request(signal.SIGINT, None)
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training_loop.Training, "_step", step)
        patch.setattr(train, "stop_request", lambda: nullcontext(request))
        yield


def test_a_resumed_run_goes_on_bit_for_bit(
    finished: tuple[Any, Path], tmp_path: Path, tiny_job: Make, laptop: Any, document: dict[str, Any]
) -> None:
    folder = tmp_path / "resumed"
    job = tiny_job(*SMALL, "checkpoints.every=2", "checkpoints.keep=3")
    with stopping_after(2):
        interrupted = train.run(laptop.take(4), job, plan=PLAN, folder=folder, document=document)
    assert interrupted.was_interrupted and interrupted.steps == 2
    assert interrupted.tables()[0].title == "interrupted at step 2 of 4"
    said = f"SIGINT: interrupted at step 2 of 4; saved; go on with `orchestrate train --resume {folder}`"
    assert said in (folder / "log.txt").read_text().splitlines()
    result = train.main(
        TrainOptions(resume=folder, runner=RunnerKind.INLINE), Console(out=io.StringIO(), err=io.StringIO())
    )
    assert result == 0
    one, other = (read_metrics(f / "metrics.jsonl") for f in (finished[1], folder))
    facts = ("step", "loss", "grad_norm", "val_loss", "lr")
    assert [[r[k] for k in facts] for r in one] == [[r[k] for k in facts] for r in other]
    expected, found = saved(finished[1], 4), saved(folder, 4)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_a_resumed_run_without_new_steps_keeps_what_was_measured(
    finished: tuple[Any, Path], tmp_path: Path
) -> None:
    folder, out = tmp_path / "again", io.StringIO()
    shutil.copytree(finished[1], folder)
    before = (folder / "measured.msgpack").read_bytes()
    console = Console(out=out, err=io.StringIO(), as_json=True)
    assert train.main(TrainOptions(resume=folder, runner=RunnerKind.INLINE), console) == 0
    assert json.loads(out.getvalue())["accuracy"] is not None
    assert (folder / "measured.msgpack").read_bytes() == before


def test_a_run_is_resumed_only_on_the_data_it_was_trained_on(
    tmp_path: Path, tiny_job: Make, laptop: Any, document: dict[str, Any]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("to be or not to be " * 100)
    job = tiny_job(*SMALL, f"data={text}", "steps=3")
    folder = tmp_path / "run"
    with stopping_after(1):
        train.run(laptop.take(1), job, folder=folder, document=document)
    text.write_text("that is the question" * 100)
    with pytest.raises(RunError, match="not what the run was trained on"):
        train.main(
            TrainOptions(resume=folder, runner=RunnerKind.INLINE),
            Console(out=io.StringIO(), err=io.StringIO()),
        )


def test_a_loss_that_explodes_stops_the_run_and_names_step_and_instruction(
    tmp_path: Path, tiny_job: Make, laptop: Any
) -> None:
    job = tiny_job(*SMALL, "optimizer.lr=1e30", "optimizer.name=sgd", "clip_norm=null", "steps=20")
    with pytest.raises(RunError) as caught:
        train.run(laptop.take(2), job, plan=Plan(dp=2), folder=tmp_path / "run")
    error = caught.value
    assert "not finite at step" in error.problem
    assert "chip 0 (stage 0), microbatch 0, instruction " in error.where
    step = int(error.problem.rsplit(" ", 1)[1])
    assert saved(tmp_path / "run", step - 1)
    assert len(read_metrics(tmp_path / "run" / "metrics.jsonl")) == step - 1


def test_the_command_line_prints_one_json_document(tmp_path: Path) -> None:
    args = "model_args={layers: 1, width: 16, heads: 2, max_seq: 16}"
    options = TrainOptions(
        model="builtin:gpt-nano", chips=2, global_batch=4, seq=16, steps=2, runner=RunnerKind.INLINE,
        run_dir=tmp_path / "run", overrides=(args, "validation.batches=1"), as_json=True,
    )  # fmt: skip
    out, err = io.StringIO(), io.StringIO()
    assert train.main(options, Console(as_json=True, out=out, err=err)) == 0
    found = json.loads(out.getvalue())
    assert found["accuracy"]["basis"] == "shares"
    assert found["steps"] == 2 and found["run_dir"] == str(tmp_path / "run")
    assert "predicted step on these chips" in err.getvalue()


def test_a_plan_that_real_chips_have_no_room_for_is_warned_of(tiny_job: Make, tmp_path: Path) -> None:
    chips = "count: 4 "
    text = (
        cluster_path("laptop").read_text().replace(chips, f"memory: {{capacity: 100 kB}}\n        {chips}", 1)
    )
    (tmp_path / "small.yaml").write_text(text)
    err = io.StringIO()
    console = Console(out=io.StringIO(), err=err)
    cluster = load_cluster(tmp_path / "small.yaml").take(2)
    train.run(cluster, tiny_job(*SMALL, "steps=1"), plan=Plan(dp=2), folder=tmp_path / "run", console=console)
    said = " ".join(err.getvalue().split())
    assert (
        "warning: does not fit" in said and "has 100 kB" in said and "real chips would not train this" in said
    )


def test_a_dry_run_predicts_and_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    options = TrainOptions(
        model="builtin:gpt-nano", chips=2, global_batch=4, seq=16, dry_run=True, as_json=True
    )
    out = io.StringIO()
    assert train.main(options, Console(as_json=True, out=out, err=io.StringIO())) == 0
    assert json.loads(out.getvalue())["step_time_s"] > 0
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("given", "flag"),
    [
        ({"seq": 8}, "--seq"), ({"global_batch": 2}, "--global-batch"), ({"overrides": ("seed=1",)}, "--set seed"),
        ({"data": "other.txt"}, "--data"), ({"overrides": ("plan.tp=2", "optimizer.lr=1.0")}, "--set optimizer.lr"),
    ],
)  # fmt: skip
def test_a_resumed_run_takes_no_inputs_that_say_what_is_trained(
    given: dict[str, Any], flag: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=f"{flag} cannot change a run"):
        train.main(TrainOptions(resume=tmp_path, **given), Console(out=io.StringIO(), err=io.StringIO()))


def test_a_resumed_run_goes_on_with_its_own_runner(
    finished: tuple[Any, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def launch(cluster: Any, kind: RunnerKind, address: None) -> None:
        asked.append(kind)
        raise NotImplementedError

    monkeypatch.setattr(train, "launch_of", launch)
    for options in (TrainOptions(resume=finished[1]), TrainOptions(run_dir=tmp_path / "new")):
        with pytest.raises(NotImplementedError):
            train.main(options, Console(out=io.StringIO(), err=io.StringIO()))
    assert asked == [RunnerKind.INLINE, RunnerKind.RAY]
