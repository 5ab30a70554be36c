"""Preparation: every failure names the input at fault; the cache of Programs goes by content, whole or not at all."""

import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from comms.errors import CaptureError, ModelError, OptimizerError, PlanError
from comms.kept_files import unsealed
from orchestrator.config.job_file import Dtype
from orchestrator.planning import job_capture, preparation
from orchestrator.planning import preparation as cache
from orchestrator.runners.timing.fastest_plan import prepare
from partitioner.layout.parallel_plan import Plan
from partitioner.layout.pipeline_schedules import PipelineSchedule
from partitioner.program.program import Program, TensorKind
from partitioner.program.program_codec import encode

Make = Callable[..., Any]
ROOT = Path(__file__).parents[3]


class Phases:
    """Progress that remembers its phases."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def phase(self, name: str) -> Any:
        self.names.append(name)
        return nullcontext()


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "orchestrate"


def test_the_second_time_nothing_is_captured(empty_cache: Path, tiny_job: Make, laptop: Any) -> None:
    shown = [Phases(), Phases()]
    first, second = (prepare(laptop.take(2), tiny_job(), progress=p.phase) for p in shown)
    assert (first.was_cached, second.was_cached) == (False, True)
    first_captures = [f"capture for parts of {n} samples" for n in (1, 2)]
    assert shown[0].names[:3] == ["search for the fastest plan", "import torch", "build model"]
    assert [name for name in shown[0].names if "parts of" in name and "price" not in name] == first_captures
    assert shown[0].names[-2].startswith("capture for ") and shown[0].names[-1] == "partition"
    assert shown[1].names == []
    assert second.program == first.program
    assert second.plan == first.plan


SCRIPT = """
import sys
from orchestrator.verbs.inputs.planned_inputs import prepare
from comms.selection.progress import quiet
from orchestrator.verbs.inputs.options import PlanOptions
from orchestrator.runners.timing.prediction import simulate
overrides = ("model_args={layers: 1, width: 16, heads: 2, max_seq: 16}",)
prepared = prepare(PlanOptions(model="builtin:gpt-nano", chips=2, global_batch=4, seq=16, overrides=overrides), quiet)
assert simulate(prepared.program, prepared.cluster).step_time_s > 0
print(prepared.was_cached, "torch" in sys.modules, "ray" in sys.modules)
"""


def test_a_cached_program_is_simulated_without_torch(tmp_path: Path) -> None:
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "XDG_CACHE_HOME": str(tmp_path),
    }
    runs = [
        subprocess.run(
            [sys.executable, "-c", SCRIPT],
            capture_output=True,
            text=True,
            env=environment,
            check=True,
        )
        for _ in range(2)
    ]
    assert [run.stdout.split() for run in runs] == [["False", "True", "False"], ["True", "False", "False"]]


def changed(section: Any, **fields: object) -> Any:
    return section.model_copy(update=fields)


CHANGES: dict[str, Callable[[Any, Plan], tuple[Any, Plan]]] = {
    "model": lambda job, plan: (changed(job, model="builtin:gpt-mini"), plan),
    "model arguments": lambda job, plan: (changed(job, model_args={**job.model_args, "layers": 3}), plan),
    "seq": lambda job, plan: (changed(job, seq=8), plan),
    "global batch": lambda job, plan: (changed(job, global_batch=16), plan),
    "dtype": lambda job, plan: (changed(job, dtype=Dtype.BF16), plan),
    "optimizer": lambda job, plan: (changed(job, optimizer=changed(job.optimizer, name="sgd")), plan),
    "degrees": lambda job, plan: (job, replace(plan, dp=1, tp=2)),
    "stages": lambda job, plan: (job, replace(plan, stages=(4,))),
    "schedule": lambda job, plan: (job, replace(plan, schedule=PipelineSchedule.GPIPE)),
    "buckets": lambda job, plan: (job, replace(plan, bucket_bytes=7)),
    "microbatches": lambda job, plan: (job, replace(plan, microbatches=2)),
}
SAME: dict[str, Callable[[Any], Any]] = {
    "steps": lambda job: changed(job, steps=99),
    "seed": lambda job: changed(job, seed=5),
    "data": lambda job: changed(job, data="elsewhere.txt"),
    "learning rate": lambda job: changed(job, optimizer=changed(job.optimizer, lr=0.5)),
    "order of arguments": lambda job: changed(job, model_args=dict(reversed(list(job.model_args.items())))),
}


def key(job: Any, plan: Plan) -> str:
    return preparation.key_of(preparation._content(job, plan))


@pytest.mark.parametrize("change", CHANGES)
def test_everything_that_decides_a_program_is_in_its_key(change: str, tiny_job: Make) -> None:
    job, plan = tiny_job(), Plan(dp=2)
    assert key(*CHANGES[change](job, plan)) != key(job, plan)


def test_momentum_counts_where_it_is_state(tiny_job: Make) -> None:
    keys = {
        key(tiny_job("optimizer.name=sgd", f"optimizer.momentum={m}"), Plan(dp=2)) for m in (0.0, 0.5, 0.9)
    }
    assert len(keys) == 2


@pytest.mark.parametrize("change", SAME)
def test_nothing_else_is(change: str, tiny_job: Make) -> None:
    job, plan = tiny_job(), Plan(dp=2)
    assert key(SAME[change](job), plan) == key(job, plan)


MODEL_FILE = """
from torch import nn

class Net(nn.Module):
    vocab_size = 64
    def __init__(self, width=8):
        super().__init__()
        self.embed, self.head = nn.Embedding(64, width), nn.Linear(width, 64)
    def forward(self, input_ids, labels):
        if {branch}:
            input_ids = labels
        logits = self.head(self.embed(input_ids))
        return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())

def make(width=8):
    return Net(width)
"""


def model_file(folder: Path, branch: str = "False") -> str:
    path = folder / "net.py"
    path.write_text(MODEL_FILE.format(branch=branch))
    return f"{path}:make"


def test_a_model_from_the_users_file_is_never_cached(
    empty_cache: Path, tmp_path: Path, tiny_job: Make, laptop: Any
) -> None:
    job = changed(tiny_job(), model=model_file(tmp_path), model_args={"width": 16})
    assert not any(prepare(laptop.take(2), job).was_cached for _ in range(2))
    assert not list(empty_cache.glob("*"))


def test_a_model_that_cannot_be_captured_is_a_user_error_with_the_line(
    tmp_path: Path, tiny_job: Make, laptop: Any
) -> None:
    job = changed(tiny_job(), model=model_file(tmp_path, "input_ids.sum() > 3"), model_args={})
    with pytest.raises(CaptureError, match="_local_scalar_dense") as caught:
        prepare(laptop.take(1), job)
    assert "net.py:10 (if input_ids.sum() > 3:)" in caught.value.where


@pytest.mark.parametrize(
    ("overrides", "plan", "kind", "said"),
    [
        ((), Plan(dp=4), PlanError, "dp 4 x tp 1 x pp 1 = 4 chips, the cluster has 2"),
        ((), Plan(dp=2, microbatches=3), PlanError, "global_batch 8 does not split into dp 2 x 3"),
        ((), Plan(pp=2, stages=(1, 1)), PlanError, "places 2 units, the model has 4"),
        (("model_args.layers=0",), Plan(dp=2), ModelError, "layers is 0"),
        (("seq=32",), Plan(dp=2), ModelError, "longer than the 16 positions"),
        (("plan.dp=3",), None, PlanError, "dp 3 does not multiply to 2"),
    ],
)
def test_what_does_not_fit_together_is_a_user_error(
    overrides: tuple[str, ...], plan: Plan | None, kind: type, said: str, tiny_job: Make, laptop: Any
) -> None:
    with pytest.raises(kind, match=said):
        prepare(laptop.take(2), tiny_job(*overrides), plan)


def test_an_optimizer_of_the_users_own_is_checked_and_its_state_counted(tiny_job: Make, laptop: Any) -> None:
    assert job_capture.optimizer_states(tiny_job()) == 2
    assert job_capture.optimizer_states(tiny_job("optimizer.name=sgd")) == 0
    assert job_capture.optimizer_states(tiny_job("optimizer.name=sgd", "optimizer.momentum=0.9")) == 1
    program = prepare(laptop.take(1), tiny_job("optimizer.name=torch.optim:Adagrad")).program
    assert {t.kind for role in program.roles for t in role.tensors} >= {TensorKind.FLAT}
    for name, said in (("torch.optim:NoSuch", "no 'NoSuch'"), ("no_such:thing", "no module 'no_such'")):
        with pytest.raises(ModelError, match=said):
            prepare(laptop.take(1), tiny_job(f"optimizer.name={name}"))


@pytest.mark.parametrize(
    ("name", "whole"), [("adamw", 0), ("torch.optim:Adagrad", 0), ("torch.optim:Adafactor", 1)]
)
def test_what_an_optimizer_looks_at_is_found_by_trial(
    name: str, whole: int, tiny_job: Make, laptop: Any
) -> None:
    program = prepare(laptop.take(1), tiny_job(f"optimizer.name={name}")).program
    assert program.facts["whole_tensors"] == whole


def test_an_optimizer_that_cannot_serve_is_refused_with_its_name(tiny_job: Make, laptop: Any) -> None:
    with pytest.raises(OptimizerError, match="cannot step on given gradients") as caught:
        prepare(laptop.take(1), tiny_job("optimizer.name=torch.optim:LBFGS"))
    assert (caught.value.where, caught.value.hint) == (
        "LBFGS.step",
        "use one whose step needs nothing but gradients",
    )


def test_heads_that_do_not_divide_can_be_planned(tiny_job: Make, laptop: Any) -> None:
    assert prepare(laptop.take(2), tiny_job("model_args.heads=1"), Plan(tp=2)).program.size("tp") == 2


Make = Callable[..., Any]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache that is not there yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "not" / "there yet"))
    return tmp_path / "not" / "there yet" / "orchestrate"


def stored(folder: Path, pattern: str) -> Path:
    """The one entry of that kind."""
    (path,) = folder.glob(pattern)
    return path


def prepared(tiny_job: Make, laptop: Any) -> Any:
    return cache.prepare(laptop.take(2), tiny_job(), Plan(pp=2, microbatches=2))


def test_a_program_comes_back_equal(folder: Path, tiny_job: Make, laptop: Any) -> None:
    first = prepared(tiny_job, laptop)
    assert [path.suffix for path in folder.iterdir()] == [".program"]
    second = prepared(tiny_job, laptop)
    assert isinstance(second.program, Program)
    assert (second.was_cached, second.program) == (True, first.program)


@pytest.mark.parametrize("damage", [lambda _: b"", lambda _: b"nonsense", lambda data: data[:-20]])
def test_an_unreadable_entry_counts_as_none(
    damage: Callable[[bytes], bytes], folder: Path, tiny_job: Make, laptop: Any
) -> None:
    first = prepared(tiny_job, laptop)
    entry = stored(folder, "*.program")
    entry.write_bytes(damage(entry.read_bytes()))
    again = prepared(tiny_job, laptop)
    assert (again.was_cached, again.program) == (False, first.program)


def test_a_cache_that_cannot_be_written_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_job: Make, laptop: Any
) -> None:
    (tmp_path / "orchestrate").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert not cache.prepare(laptop.take(2), tiny_job(), Plan(dp=2)).was_cached
    cache.remember("entry", b"data")
    with pytest.raises(OSError, match="Not a directory"):
        cache.recall("entry")


def test_no_byte_of_an_entry_can_change_without_notice(folder: Path, tiny_job: Make, laptop: Any) -> None:
    prepare(laptop.take(2), tiny_job())
    for entry in (stored(folder, "*.program"),):
        whole = entry.read_bytes()
        flipped = [
            whole[:at] + bytes([byte ^ 1 << at % 8]) + whole[at + 1 :] for at, byte in enumerate(whole)
        ]
        for damaged in (*flipped, *(whole[:length] for length in range(0, len(whole), 97)), whole + b"0"):
            with pytest.raises(ValueError, match="is damaged"):
                unsealed(entry.name, damaged)


def test_an_entry_under_anothers_name_counts_as_none(folder: Path, tiny_job: Make, laptop: Any) -> None:
    first = prepared(tiny_job, laptop)
    entry = stored(folder, "*.program")
    other = prepare(laptop.take(2), tiny_job(), Plan(dp=2)).program
    (elsewhere,) = set(folder.glob("*.program")) - {entry}
    entry.write_bytes(elsewhere.read_bytes())
    again = prepared(tiny_job, laptop)
    assert (again.was_cached, again.program) == (False, first.program)
    cache.remember(entry.name, encode(other))  # whole, but of another plan
    again = prepared(tiny_job, laptop)
    assert (again.was_cached, again.program) == (False, first.program)


def test_the_users_cache_folder_is_obeyed_if_it_is_absolute(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    for said, kept in (
        ("/elsewhere", "/elsewhere/orchestrate"),
        ("relative", "/home/someone/.cache/orchestrate"),
        ("", "/home/someone/.cache/orchestrate"),
    ):
        monkeypatch.setenv("XDG_CACHE_HOME", said)
        assert cache.cache_folder() == Path(kept)
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache.cache_folder() == Path("/home/someone/.cache/orchestrate")


def test_keys_depend_on_content_and_not_on_order() -> None:
    assert cache.key_of({"a": 1, "b": [2]}) == cache.key_of({"b": [2], "a": 1})
    assert len({cache.key_of(f) for f in ({"a": 1}, {"a": 2}, {"b": 1}, {"a": "1"}, {})}) == 5


def test_keys_depend_on_the_code(monkeypatch: pytest.MonkeyPatch) -> None:
    before: Any = cache.key_of({"a": 1})
    monkeypatch.setattr(cache, "code_digest", lambda rooms: "other code")
    assert cache.key_of({"a": 1}) != before


def test_the_code_of_every_package_is_in_a_key_wherever_it_lies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a cluster, where each package that travels has a folder of its own."""
    folders = {name: tmp_path / f"at-{name}" / name for name in ("partitioner", "kernels", "orchestrator")}
    for room in preparation.CODE:
        package, *inside = room.split("/")
        (made := folders[package].joinpath(*inside)).mkdir(parents=True)
        (made / "module.py").write_text("one")
    monkeypatch.setattr(preparation, "PACKAGE_FOLDERS", folders)
    digests = {preparation.code_digest.__wrapped__()}
    for file in sorted(tmp_path.rglob("module.py")):
        file.write_text("two")
        digests.add(preparation.code_digest.__wrapped__())
    assert len(digests) == 1 + len(preparation.CODE)
