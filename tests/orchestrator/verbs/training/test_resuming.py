"""Runs that go on: by any plan, to another end, from an older checkpoint, by one process at a time."""

import shutil
import signal
import threading
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from comms.errors import ConfigError, ModelError, RunError, UserError
from orchestrator.runners.failure import RunPhase
from orchestrator.runners.signals import StopSignal
from orchestrator.runs.checkpoints import checkpoint_folder as checkpoint
from orchestrator.runs.checkpoints.checkpoint_folder import TrainingState
from orchestrator.runs.run_lock import locked
from orchestrator.verbs import train
from orchestrator.verbs.training import training_loop
from partitioner.layout.parallel_plan import Plan, plan_to_yaml

Make = Callable[..., Any]
FIRST = Plan(dp=2, pp=2, zero=1, microbatches=2)
OTHERS = [
    Plan(), Plan(dp=4, zero=1), Plan(tp=2), Plan(dp=2, tp=2, pp=2, zero=1, microbatches=2),
    Plan(pp=2, microbatches=4),
]  # fmt: skip
ENDING = ("checkpoints.every=3", "checkpoints.keep=9", "lr_schedule.name=constant", "steps=4")
pytestmark = pytest.mark.usefixtures("undrawn", "one_thread")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, train_job: Make) -> Path:
    """A run of four steps with checkpoints after three and four."""
    return train_job(tmp_path_factory.mktemp("whole") / "run", FIRST, *ENDING)


@pytest.fixture
def cut(whole: Path, tmp_path: Path) -> Path:
    """The same as if it had been killed in its fourth step."""
    folder = Path(shutil.copytree(whole, tmp_path / "cut"))
    shutil.rmtree(folder / "checkpoints" / "step-000004")
    return folder


def require_equal(one: dict[Any, torch.Tensor], other: dict[Any, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for key, value in one.items():
        assert value.dtype == other[key].dtype and torch.equal(value, other[key]), key


@pytest.mark.parametrize("plan", OTHERS, ids=str)
def test_a_run_goes_on_by_another_plan_from_the_same_bits(
    plan: Plan, cut: Path, whole: Path, resume_run: Make, tensors_of: Make, facts_of: Make
) -> None:
    (cut / "other.yaml").write_text(plan_to_yaml(plan))
    expected = tensors_of(cut, 3)
    original = training_loop.Training.run

    def saving_first(self: training_loop.Training, *rest: Any) -> None:
        self.save_now()
        require_equal(tensors_of(cut, 3), expected)
        assert checkpoint.latest(cut).checkpoint.manifest.planned == plan
        original(self, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training_loop.Training, "run", saving_first)
        said = resume_run(cut, plan=cut / "other.yaml")
    assert (
        f"goes on by the plan {plan}; until now it was {FIRST}" in said and "resumed at step 3 of 4" in said
    )
    (*before, last), (*others, found) = facts_of(whole), facts_of(cut)
    assert before == others and found[0] == 4
    assert found[1] == pytest.approx(last[1], rel=1e-6)
    used = yaml.safe_load((cut / "run.yaml").read_text())["config"]["used"]
    assert [(each["from_step"], each["plan"]) for each in used] == [(0, str(FIRST)), (3, str(plan))]


def test_chips_runner_and_degrees_may_be_given_instead_of_a_plan(cut: Path, resume_run: Make) -> None:
    resume_run(cut, chips=2, overrides=("plan.tp=2", "checkpoints.keep=1"))
    used = yaml.safe_load((cut / "run.yaml").read_text())["config"]["used"]
    assert used[-1]["chips"] == 2 and "tp2" in used[-1]["plan"]
    assert [path.name for path in (cut / "checkpoints").iterdir()] == ["step-000004"]


def test_more_steps_are_what_a_longer_run_would_have_taken(
    whole: Path, tmp_path: Path, train_job: Make, resume_run: Make, tensors_of: Make, facts_of: Make
) -> None:
    longer = train_job(tmp_path / "longer", FIRST, *ENDING, "steps=6")
    folder = Path(shutil.copytree(whole, tmp_path / "extended"))
    assert "the run now ends at step 6 instead of 4" in resume_run(folder, steps=6)
    assert facts_of(folder) == facts_of(longer)
    require_equal(tensors_of(folder, 6), tensors_of(longer, 6))
    assert resume_run(folder)  # once more: it stays at six
    for given in ({"steps": 5}, {"overrides": ("steps=5",)}):
        with pytest.raises(ConfigError, match="at step 6 already"):
            resume_run(folder, **given)


def test_a_schedule_that_ends_elsewhere_says_what_the_rate_becomes(
    tmp_path: Path, train_job: Make, resume_run: Make, facts_of: Make
) -> None:
    folder = train_job(tmp_path / "run", Plan(), "steps=3", "lr_schedule.min_lr_ratio=0.0")
    said = resume_run(folder, steps=5)
    rates = [row[4] for row in facts_of(folder)]
    assert rates[2] == 0.0 and rates[3] > 0.0
    assert f"the learning rate goes by the new end: {rates[3]:.3g} in step 4" in said


def test_a_damaged_checkpoint_is_passed_over_and_kept_aside(
    whole: Path, tmp_path: Path, resume_run: Make, tensors_of: Make, facts_of: Make
) -> None:
    folder = Path(shutil.copytree(whole, tmp_path / "damaged"))
    path = folder / "checkpoints" / "step-000004" / "model-00001.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    said = resume_run(folder)
    assert "warning: skipped " in said and "resumed at step 3 of 4" in said
    assert "the damaged checkpoint is kept as" in said
    assert (folder / "checkpoints" / "step-000004.damaged" / path.name).exists()
    assert facts_of(folder) == facts_of(whole)
    require_equal(tensors_of(folder, 4), tensors_of(whole, 4))


def test_without_a_whole_checkpoint_nothing_is_touched(cut: Path, resume_run: Make) -> None:
    (cut / "checkpoints" / "step-000003" / "manifest.json").write_text("{}")
    before = {path: path.read_bytes() for path in cut.rglob("*") if path.is_file() and path.name != ".lock"}
    with pytest.raises(RunError, match=r"no complete checkpoint: skipped .* version"):
        resume_run(cut)
    assert all(path.read_bytes() == data for path, data in before.items())


def with_state(run: Path, change: Callable[[TrainingState], TrainingState]) -> None:
    """Write the newest checkpoint anew, sound in itself."""
    found = checkpoint.latest(run).checkpoint
    assert found is not None
    checkpoint.save(run / "checkpoints", found.manifest, change(checkpoint.load(found)))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda name, value: {name: value.reshape(-1)[:1]}, "is torch.float32"),
        (lambda name, value: {name: value.double()}, "is torch.float64"),
        (lambda name, value: {}, "the checkpoint has no parameter"),
        (lambda name, value: {name: value, "more": value}, "the model has no parameter more"),
    ],
    ids=["shape", "type", "missing", "extra"],
)
def test_tensors_that_are_not_the_models_are_refused_by_name(
    change: Make, said: str, cut: Path, resume_run: Make
) -> None:
    def changed(state: TrainingState) -> TrainingState:
        name, value = next(iter(state.parameters.items()))
        others = {key: held for key, held in state.parameters.items() if key != name}
        return TrainingState(others | change(name, value), state.buffers, state.states)

    with_state(cut, changed)
    with pytest.raises(ModelError) as caught:
        resume_run(cut)
    assert said in str(caught.value) or "the weights do not fit" in str(caught.value)


def test_a_state_of_another_shape_than_its_parameter_is_refused_by_name(cut: Path, resume_run: Make) -> None:
    def changed(state: TrainingState) -> TrainingState:
        name, own = next(iter(state.states.items()))
        other = {**own, "exp_avg": own["exp_avg"].reshape(-1)[:1]}
        return TrainingState(state.parameters, state.buffers, {**state.states, name: other})

    with_state(cut, changed)
    with pytest.raises(ModelError, match=r"exp_avg of .* is \[1\] in the checkpoint, the parameter"):
        resume_run(cut)


def test_when_a_checkpoint_is_taken_changes_nothing(
    tmp_path: Path, train_job: Make, tensors_of: Make, facts_of: Make
) -> None:
    found = []
    for name, overrides in (("never", ()), ("always", ("checkpoints.interval=1 ns",))):
        folder = train_job(tmp_path / name, FIRST, *overrides)
        found.append((facts_of(folder), tensors_of(folder, 4)))
    assert found[0][0] == found[1][0]
    require_equal(found[0][1], found[1][1])
    assert len(list((tmp_path / "never" / "checkpoints").iterdir())) == 1
    assert len(list((tmp_path / "always" / "checkpoints").iterdir())) == 3  # as many as are kept


def test_a_checkpoint_is_due_once_its_time_has_passed_since_the_last(tmp_path: Path, train_job: Make) -> None:
    """By a clock of the test's: 40 s a step, a checkpoint after every 60 s."""
    now = [0.0]
    original = training_loop.Training._step

    def step(self: training_loop.Training) -> Any:
        self.clock = lambda: now[0]
        self.saved_at_s = min(self.saved_at_s, now[0])
        now[0] += 40
        return original(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training_loop.Training, "_step", step)
        folder = train_job(
            tmp_path / "run", Plan(), "checkpoints.interval=60 s", "checkpoints.keep=9", "steps=7"
        )
    names = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert names == [f"step-00000{step}" for step in (2, 4, 6, 7)]


def test_two_processes_do_not_write_into_one_run(cut: Path, resume_run: Make) -> None:
    before = (cut / "metrics.jsonl").read_bytes()
    with (
        locked(cut, pytest.fail),
        pytest.raises(ConfigError, match=r"in use by process \d+ on .*, since \d+-") as caught,
    ):
        resume_run(cut)
    assert str(cut) in caught.value.where and caught.value.hint
    assert (cut / "metrics.jsonl").read_bytes() == before
    assert resume_run(cut)


def test_a_file_system_without_locks_is_warned_of(cut: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("orchestrator.runs.run_lock.fcntl.flock", none)
    said: list[str] = []
    with locked(cut, said.append):
        pass
    assert "cannot be locked (Operation not supported)" in said[0]


def test_a_run_that_was_stopped_before_its_first_step_begins_with_it(
    whole: Path, tmp_path: Path, train_job: Make, resume_run: Make, facts_of: Make, tensors_of: Make
) -> None:
    class Stopping:
        def enter(self, phase: RunPhase) -> None:
            raise StopSignal(signal.SIGTERM)

    folder = tmp_path / "early"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "stop_request", lambda: nullcontext(Stopping()))
        with pytest.raises(StopSignal):
            train_job(folder, FIRST, *ENDING)
    said = resume_run(folder, plan=whole / "plan.yaml")
    assert "resumed at step 0 of 4" in said
    assert facts_of(folder) == facts_of(whole)
    require_equal(tensors_of(folder, 4), tensors_of(whole, 4))


def test_a_save_that_fails_is_told_and_the_older_one_stays(
    cut: Path, resume_run: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(RunError, match="the disk is full"):
        resume_run(cut)
    found = checkpoint.latest(cut).checkpoint
    assert found is not None and found.manifest.step == 3


def test_what_is_being_written_when_a_step_fails_is_written_to_its_end(
    tmp_path: Path, train_job: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, failed = training_loop.Training._step, threading.Event()
    save_file = checkpoint.save_file

    def step(self: training_loop.Training) -> Any:
        if self.step == 2:
            failed.set()
            raise RunError("actor 1 has ended", "actor 1", "resume")
        return original(self)

    def slow(*given: Any) -> None:
        assert failed.wait(30)
        save_file(*given)

    monkeypatch.setattr(training_loop.Training, "_step", step)
    monkeypatch.setattr(checkpoint, "save_file", slow)
    with pytest.raises(RunError, match="actor 1 has ended"):
        train_job(tmp_path / "run", FIRST, "checkpoints.every=2")
    found = checkpoint.latest(tmp_path / "run").checkpoint
    assert found is not None and found.manifest.step == 2


def damaged(path: Path, how: str) -> None:
    data = path.read_bytes()
    path.unlink()
    contents = {"empty": b"", "half": data[: len(data) // 2], "zeros": bytes(len(data)), "list": b"[1]\n"}
    if how == "folder":
        path.mkdir()
    elif how != "gone":
        path.write_bytes(contents[how])


@pytest.mark.parametrize("how", ["gone", "empty", "half", "zeros", "folder", "list"])
@pytest.mark.parametrize(
    "name", ["run.yaml", "plan.yaml", "program.txt", "metrics.jsonl", ".lock", "measured.msgpack"]
)
def test_a_damaged_file_of_the_run_is_an_error_or_changes_nothing(
    name: str, how: str, cut: Path, whole: Path, resume_run: Make, facts_of: Make, tensors_of: Make
) -> None:
    damaged(cut / name, how)
    refused: UserError | None = None
    try:
        said = resume_run(cut)
    except UserError as error:
        refused = error
    if refused is not None:
        assert refused.problem and refused.where and refused.hint
        return
    require_equal(tensors_of(cut, 4), tensors_of(whole, 4))
    assert facts_of(cut) == facts_of(whole) or "warning: the metrics of steps" in said
