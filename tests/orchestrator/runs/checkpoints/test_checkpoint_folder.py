"""Checkpoints: bit-exact, complete or not counted, and older ones survive everything."""

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError

from comms.errors import RunError
from orchestrator.runs.checkpoints import checkpoint_folder as checkpoints
from orchestrator.runs.checkpoints.checkpoint_folder import (
    MANIFEST,
    TrainingState,
    latest,
    load,
    prune,
    remove_partial,
    save,
    set_aside,
)
from orchestrator.runs.checkpoints.manifest import decode_manifest, encode_manifest

Make = Callable[..., Any]
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int8, torch.bool)


def found_step(run: Path) -> int | None:
    found = latest(run).checkpoint
    return found.manifest.step if found else None


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    """Any bit pattern in any dtype: NaN payloads and negative zeros included."""
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.lists(st.integers(0, 3), max_size=3))
    size = torch.empty(shape, dtype=dtype).nbytes
    data = draw(st.binary(min_size=size, max_size=size))
    data = bytes(byte & 1 for byte in data) if dtype is torch.bool else data
    return torch.tensor(list(data), dtype=torch.uint8).view(dtype).reshape(shape)


NAMES = st.text("ab.: of", min_size=1, max_size=4)
HELD = st.dictionaries(NAMES, tensors(), max_size=3)


@st.composite
def states(draw: st.DrawFn) -> TrainingState:
    parameters = draw(HELD)
    buffers = {name: value for name, value in draw(HELD).items() if name not in parameters}
    own = st.dictionaries(st.sampled_from(("step", "exp_avg", "step: int")), tensors(), min_size=1)
    return TrainingState(parameters, buffers, {name: draw(own) for name in parameters})


def bits(state: TrainingState) -> dict[tuple[str, ...], object]:
    return {
        (entry.part, entry.name, entry.state): (
            value.dtype, tuple(value.shape), value.contiguous().reshape(-1).view(torch.uint8).tolist(),
        )
        for entry, value in state.parts()
    }  # fmt: skip


@given(state=states(), most=st.sampled_from((1, 40, 10**9)))
def test_tensors_come_back_bit_for_bit_in_files_of_any_size(
    tmp_path_factory: pytest.TempPathFactory, run_manifest: Make, state: TrainingState, most: int
) -> None:
    run = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoints, "FILE_BYTES", most)
        save(run / "checkpoints", run_manifest(100), state)
    found = latest(run)
    assert found.checkpoint is not None
    assert found.warnings == ()
    assert bits(load(found.checkpoint)) == bits(state)


def test_views_of_one_buffer_and_transposed_tensors_are_saved_as_what_they_show(
    tmp_path: Path, run_manifest: Make
) -> None:
    flat = torch.arange(12.0)
    given = {"a": flat[:6].view(2, 3), "b": flat[4:], "tied": flat[:6].view(2, 3), "t": flat.view(3, 4).t()}
    back = load(save(tmp_path, run_manifest(1), TrainingState(given, {}))).parameters
    assert all(torch.equal(back[name], given[name]) for name in given)


def test_the_newest_complete_one_is_found_beyond_a_million_steps(tmp_path: Path, save_whole: Make) -> None:
    assert latest(tmp_path).checkpoint is None
    for step in (20, 1_000_000, 100):
        save_whole(tmp_path, step)
    assert found_step(tmp_path) == 1_000_000


def test_a_manifest_comes_back_as_it_was_and_no_path_is_in_it(tmp_path: Path, save_whole: Make) -> None:
    made = save_whole(tmp_path, 100)
    data = (made.folder / MANIFEST).read_bytes()
    assert decode_manifest(data) == made.manifest and encode_manifest(made.manifest) == data
    assert str(tmp_path).encode() not in data
    shapes = {entry.key: (entry.shape, entry.dtype) for entry in made.manifest.tensors}
    assert shapes["w"] == ((2, 3), "float32") and shapes["exp_avg of w"] == ((2, 3), "float32")


def test_files_follow_each_other_within_their_size(tmp_path: Path, run_manifest: Make) -> None:
    held = {f"p{number}": torch.zeros(10) for number in range(5)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoints, "FILE_BYTES", 80)
        made = save(tmp_path, run_manifest(1), TrainingState(held, {}))
    assert [each.name for each in made.manifest.files] == [f"model-0000{n}.safetensors" for n in (1, 2, 3)]
    assert load(made).parameters.keys() == held.keys()


def test_damage_after_finding_is_noticed_before_loading(tmp_path: Path, save_whole: Make) -> None:
    save_whole(tmp_path, 1)
    found = latest(tmp_path).checkpoint
    assert found is not None
    path = found.folder / found.manifest.files[0].name
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    with pytest.raises(RunError, match="digest"):
        load(found)


@pytest.mark.parametrize("call", ["save_file", "write_whole", "sync"])
def test_a_crash_at_any_point_keeps_the_older_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, save_whole: Make, call: str
) -> None:
    def die(*_: object) -> None:
        raise KeyboardInterrupt

    save_whole(tmp_path, 1)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, call, die)
        with pytest.raises(KeyboardInterrupt):
            save_whole(tmp_path, 2)
    assert found_step(tmp_path) == 1
    assert latest(tmp_path).warnings == ()
    save_whole(tmp_path, 2)
    assert found_step(tmp_path) == 2


def test_a_process_killed_between_the_two_renames_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, save_whole: Make
) -> None:
    save_whole(tmp_path, 5)
    real = Path.rename

    def die_on_the_second(path: Path, target: Path) -> Path:
        if path.name.endswith(".partial"):
            raise KeyboardInterrupt
        return real(path, target)

    with monkeypatch.context() as patch:  # a kill leaves no chance to clean up
        patch.setattr(Path, "rename", die_on_the_second)
        patch.setattr(checkpoints.shutil, "rmtree", lambda *_, **__: None)
        with pytest.raises(KeyboardInterrupt):
            save_whole(tmp_path, 5)
    assert found_step(tmp_path) == 5
    remove_partial(tmp_path)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == [".step-000005.replaced"]
    assert found_step(tmp_path) == 5


def test_saving_a_step_again_replaces_it_and_leaves_one_folder(
    tmp_path: Path, save_whole: Make, run_manifest: Make
) -> None:
    save_whole(tmp_path, 5)
    save(tmp_path / "checkpoints", run_manifest(5), TrainingState({"w": torch.zeros(1)}, {}))
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000005"]
    found = latest(tmp_path).checkpoint
    assert found is not None
    assert load(found).parameters["w"].tolist() == [0.0]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), SafetensorError("No space left on")])
def test_a_full_disk_is_a_user_error_and_leaves_no_trace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, save_whole: Make, error: Exception
) -> None:
    def full(*_: object) -> None:
        raise error

    save_whole(tmp_path, 1)
    monkeypatch.setattr(checkpoints, "save_file", full)
    with pytest.raises(RunError, match="disk is full"):
        save_whole(tmp_path, 2)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000001"]


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def test_prune_keeps_the_newest_and_never_counts_a_damaged_one(tmp_path: Path, save_whole: Make) -> None:
    for step in (1, 2, 3, 4, 5):
        save_whole(tmp_path, step)
    (tmp_path / "checkpoints" / "step-000005" / MANIFEST).unlink()
    cut = tmp_path / "checkpoints" / "step-000004" / "model-00001.safetensors"
    cut.write_bytes(cut.read_bytes()[:-1])
    prune(tmp_path, keep=2)
    assert names(tmp_path) == [f"step-00000{step}" for step in (2, 3, 4, 5)]
    assert found_step(tmp_path) == 3


def test_what_is_set_aside_keeps_every_byte_and_is_not_found_again(tmp_path: Path, save_whole: Make) -> None:
    kept = save_whole(tmp_path, 1)
    for _ in range(2):
        folder = save_whole(tmp_path, 2).folder
        (folder / MANIFEST).write_text("{")
        content = {path.name: path.read_bytes() for path in folder.iterdir()}
        (moved,) = set_aside(tmp_path, kept)
        assert {path.name: path.read_bytes() for path in moved.iterdir()} == content
    assert names(tmp_path) == ["step-000001", "step-000002.damaged", "step-000002.damaged2"]
    assert latest(tmp_path).warnings == () and found_step(tmp_path) == 1
