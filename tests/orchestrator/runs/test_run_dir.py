"""Run directory: never overwrites, writes whole files, explains a full disk."""

import errno
import os
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest

from comms.errors import ConfigError, RunError
from orchestrator.runs import disk, run_dir
from orchestrator.runs.run_dir import RunDir, create, resume, versions
from orchestrator.runs.timeline import Lane, Origin, Span, Timeline


def full_disk(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return create(tmp_path / "run")


def test_a_new_run_never_takes_an_existing_directory(run: RunDir) -> None:
    with pytest.raises(ConfigError, match="exists") as caught:
        create(run.root)
    assert "--resume" in caught.value.hint


def test_a_file_in_the_way_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError):
        create(tmp_path / "file" / "run")
    with pytest.raises(ConfigError, match="cannot be made"):
        create(Path("/proc/run"))


def test_default_names_count_up_per_job_and_skip_what_is_there(tmp_path: Path) -> None:
    assert create(job="gpt", parent=tmp_path).root.name == "gpt-0001"
    (tmp_path / "gpt-0007").touch()
    assert create(job="gpt", parent=tmp_path).root.name == "gpt-0008"
    assert create(job="../odd name", parent=tmp_path).root == tmp_path / "odd-name-0001"


def test_two_runs_that_start_together_get_two_directories(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    create(job="gpt", parent=tmp_path)
    monkeypatch.setattr(Path, "glob", lambda *_: iter(()))  # as seen by a run that looked a moment too early
    monkeypatch.setattr(Path, "exists", lambda _: False)
    assert create(job="gpt", parent=tmp_path).root.name == "gpt-0002"


def test_config_comes_back_and_versions_stand_beside_it(run: RunDir) -> None:
    run.write_config({"steps": 10, "model": {"name": "gpt"}})
    assert run.read_config() == {"steps": 10, "model": {"name": "gpt"}}
    assert f"torch: {metadata.version('torch')}" in run.config.read_text()
    assert resume(run.root) == run


def test_nothing_written_holds_the_absolute_path(run: RunDir) -> None:
    run.write_config({"steps": 1})
    run.write_plan("dp: 2\n")
    run.write_program("role 0", b"\x80")
    for path in run.root.rglob("*"):
        assert path.is_dir() or str(run.root).encode() not in path.read_bytes()


def test_resume_needs_a_run_and_names_those_nearby(run: RunDir) -> None:
    run.write_config({})
    with pytest.raises(ConfigError, match="no run to resume") as caught:
        resume(run.root.parent / "typo")
    assert "run" in caught.value.hint


@pytest.mark.parametrize("text", ["", "config: [", "- 1"])
def test_a_damaged_config_is_a_user_error(run: RunDir, text: str) -> None:
    run.config.write_text(text)
    with pytest.raises(RunError):
        run.read_config()


def test_timelines_are_filed_under_their_origin(run: RunDir, timeline_of: Callable[..., Timeline]) -> None:
    timeline = timeline_of(Origin.MEASURED, [Span(0, 0, Lane.COMPUTE, "forward", "f", 0, 0, 1)])
    run.write_timeline(timeline)
    assert run.read_timeline(Origin.MEASURED) == timeline
    assert run.read_timeline(Origin.PREDICTED) is None
    run.timeline(Origin.PREDICTED).write_bytes(b"junk")
    with pytest.raises(RunError, match="cannot be read"):
        run.read_timeline(Origin.PREDICTED)


@pytest.mark.parametrize(("owner", "call"), [(os, "fsync"), (Path, "replace")])
def test_a_full_disk_leaves_the_old_file_and_no_rubbish(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, owner: object, call: str
) -> None:
    run.write_plan("dp: 2\n")
    monkeypatch.setattr(owner, call, full_disk)
    with pytest.raises(RunError, match="disk is full") as caught:
        run.write_plan("dp: 4\n")
    assert caught.value.where == str(run.plan)
    assert run.plan.read_text() == "dp: 2\n"
    assert sorted(path.name for path in run.root.iterdir()) == ["checkpoints", "plan.yaml"]


@pytest.mark.parametrize(
    ("name", "problem"), [("nowhere/file", "No such file or directory"), ("n" * 250, "the name is too long")]
)
def test_other_errors_of_the_system_are_told_in_its_words(tmp_path: Path, name: str, problem: str) -> None:
    with pytest.raises(RunError, match=problem) as caught:
        disk.write_whole(tmp_path / name, b"")
    assert caught.value.where == str(tmp_path / name) and caught.value.hint


def test_versions_leave_out_what_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_dir, "_PACKAGES", ("numpy", "no-such-distribution"))
    found = versions()
    assert set(found) == {"python", "numpy"}
