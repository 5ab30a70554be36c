"""Checkpoints: bit-exact, complete or not counted, and older ones survive everything."""

import errno
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError

from comms.errors import RunError
from orchestrator.runs import checkpoint as checkpoints
from orchestrator.runs.checkpoint import (
    MANIFEST,
    Manifest,
    latest,
    load,
    prune,
    save,
)

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int8, torch.bool)


def manifest(step: int = 100) -> Manifest:
    return Manifest(step, sample=step * 32, seed=7, layout={"dp": 2, "tp": 4}, extra={"best": 1.5})


def save_step(run: Path, step: int) -> None:
    save(run / "checkpoints", manifest(step), {"chip-0": {"w": torch.full((3,), float(step))}})


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


def bits(tensor: torch.Tensor) -> tuple[object, ...]:
    raw = tensor.contiguous().reshape(-1).view(torch.uint8).tolist()
    return (tensor.dtype, tuple(tensor.shape), raw)


@given(
    st.dictionaries(
        st.sampled_from(("chip-0", "chip-1")), st.dictionaries(st.text("abc.", min_size=1), tensors())
    )
)
def test_tensors_come_back_bit_for_bit(
    tmp_path_factory: pytest.TempPathFactory, shards: dict[str, dict[str, torch.Tensor]]
) -> None:
    run = tmp_path_factory.mktemp("run")
    save(run / "checkpoints", manifest(), shards)
    found = latest(run)
    assert found.checkpoint is not None
    assert found.warnings == ()
    back = load(found.checkpoint)
    assert {w: {n: bits(t) for n, t in held.items()} for w, held in back.items()} == {
        w: {n: bits(t) for n, t in held.items()} for w, held in shards.items()
    }


def test_views_of_one_buffer_and_transposed_tensors_are_saved_as_what_they_show(tmp_path: Path) -> None:
    flat = torch.arange(12.0)
    given = {"a": flat[:6].view(2, 3), "b": flat[4:], "tied": flat[:6].view(2, 3), "t": flat.view(3, 4).t()}
    back = load(save(tmp_path, manifest(), {"chip-0": given}))["chip-0"]
    assert all(torch.equal(back[name], given[name]) for name in given)


def test_the_manifest_says_what_is_there(tmp_path: Path) -> None:
    save_step(tmp_path, 100)
    found = latest(tmp_path).checkpoint
    assert found is not None
    assert found.folder == tmp_path / "checkpoints" / "step-000100"
    held = found.manifest
    assert (held.step, held.sample, held.seed, held.layout, held.extra) == (
        100, 3200, 7, {"dp": 2, "tp": 4}, {"best": 1.5},
    )  # fmt: skip
    assert held.shards[0].tensors == [{"name": "w", "shape": [3], "dtype": "float32"}]
    assert str(tmp_path) not in (found.folder / MANIFEST).read_text()


def test_the_newest_complete_one_is_found_beyond_a_million_steps(tmp_path: Path) -> None:
    assert latest(tmp_path).checkpoint is None
    for step in (20, 1_000_000, 100):
        save_step(tmp_path, step)
    assert found_step(tmp_path) == 1_000_000


def truncate(folder: Path) -> None:
    path = folder / "chip-0.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def flip_a_bit(folder: Path) -> None:
    path = folder / "chip-0.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def edit_manifest(folder: Path) -> None:
    document = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps({**document, "version": 99}))


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (truncate, "bytes instead of"),
        (flip_a_bit, "digest"),
        (edit_manifest, "version 99"),
        (lambda folder: (folder / "chip-0.safetensors").unlink(), "is missing"),
        (lambda folder: (folder / MANIFEST).unlink(), "never finished"),
        (lambda folder: (folder / MANIFEST).write_text("{"), "cannot be read"),
    ],
)
def test_a_damaged_checkpoint_is_skipped_with_a_warning(
    tmp_path: Path, damage: object, expected: str
) -> None:
    save_step(tmp_path, 1)
    save_step(tmp_path, 2)
    damage(tmp_path / "checkpoints" / "step-000002")  # type: ignore[operator]
    found = latest(tmp_path)
    assert found.checkpoint is not None
    assert found.checkpoint.manifest.step == 1
    (warning,) = found.warnings
    assert "step-000002" in warning
    assert expected in warning


def test_damage_after_finding_is_noticed_before_loading(tmp_path: Path) -> None:
    save_step(tmp_path, 1)
    found = latest(tmp_path).checkpoint
    assert found is not None
    flip_a_bit(found.folder)
    with pytest.raises(RunError, match="digest"):
        load(found)


@pytest.mark.parametrize("call", ["save_file", "write_whole", "sync"])
def test_a_crash_at_any_point_keeps_the_older_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    def die(*_: object) -> None:
        raise KeyboardInterrupt

    save_step(tmp_path, 1)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, call, die)
        with pytest.raises(KeyboardInterrupt):
            save_step(tmp_path, 2)
    assert found_step(tmp_path) == 1
    assert latest(tmp_path).warnings == ()
    save_step(tmp_path, 2)
    assert found_step(tmp_path) == 2


def test_a_process_killed_between_the_two_renames_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_step(tmp_path, 5)
    real = Path.rename

    def die_on_the_second(path: Path, target: Path) -> Path:
        if path.name.endswith(".partial"):
            raise KeyboardInterrupt
        return real(path, target)

    monkeypatch.setattr(Path, "rename", die_on_the_second)
    monkeypatch.setattr(
        checkpoints.shutil, "rmtree", lambda *_, **__: None
    )  # a kill leaves no chance to clean up
    with pytest.raises(KeyboardInterrupt):
        save_step(tmp_path, 5)
    assert found_step(tmp_path) == 5


def test_saving_a_step_again_replaces_it_and_leaves_one_folder(tmp_path: Path) -> None:
    save_step(tmp_path, 5)
    save(tmp_path / "checkpoints", manifest(5), {"chip-0": {"w": torch.zeros(1)}})
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000005"]
    found = latest(tmp_path).checkpoint
    assert found is not None
    assert load(found)["chip-0"]["w"].tolist() == [0.0]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), SafetensorError("No space left on")])
def test_a_full_disk_is_a_user_error_and_leaves_no_trace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def full(*_: object) -> None:
        raise error

    save_step(tmp_path, 1)
    monkeypatch.setattr(checkpoints, "save_file", full)
    with pytest.raises(RunError, match="disk is full"):
        save_step(tmp_path, 2)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000001"]


def test_prune_keeps_the_newest_and_never_counts_a_broken_one(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        save_step(tmp_path, step)
    (tmp_path / "checkpoints" / "step-000004" / MANIFEST).unlink()
    prune(tmp_path, keep=2)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        "step-000002", "step-000003", "step-000004",
    ]  # fmt: skip
    assert found_step(tmp_path) == 3
