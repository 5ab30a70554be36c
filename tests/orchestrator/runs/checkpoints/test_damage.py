"""Damage to checkpoints, of all kinds: skipped with a word, the older one is used, and nothing is touched."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from comms.errors import RunError
from orchestrator.runs.checkpoints.checkpoint_folder import MANIFEST, latest, load, open_checkpoint

MODEL, OPTIMIZER = "model-00001.safetensors", "optimizer-00001.safetensors"
Damage = Callable[[Path], object]
KINDS: dict[str, Damage] = {}


def kind(name: str) -> Callable[[Damage], Damage]:
    def keep(damage: Damage) -> Damage:
        KINDS[name] = damage
        return damage

    return keep


def written(name: str, change: Callable[[bytes], bytes]) -> Damage:
    def damage(folder: Path) -> None:
        (folder / name).write_bytes(change((folder / name).read_bytes()))

    return damage


for file in (MANIFEST, MODEL, OPTIMIZER):
    KINDS |= {
        f"{file} is gone": lambda folder, name=file: (folder / name).unlink(),
        f"{file} is empty": written(file, lambda data: b""),
        f"{file} lacks its last byte": written(file, lambda data: data[:-3]),
        f"{file} is half there": written(file, lambda data: data[: len(data) // 2]),
        f"{file} has a flipped bit in the middle": written(
            file, lambda data: data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1 :]
        ),
        f"{file} has zeros where it had content": written(file, lambda data: bytes(len(data))),
        f"{file} has more at its end": written(file, lambda data: data + b"more"),
        f"{file} is a folder": lambda folder, name=file: ((folder / name).unlink(), (folder / name).mkdir()),
        f"{file} is a pipe": lambda folder, name=file: ((folder / name).unlink(), os.mkfifo(folder / name)),
        f"{file} is a link to nothing": lambda folder, name=file: (
            (folder / name).unlink(), (folder / name).symlink_to("nowhere"),
        ),
        f"{file} is a link to itself": lambda folder, name=file: (
            (folder / name).unlink(), (folder / name).symlink_to(name),
        ),
        f"{file} is of another checkpoint": lambda folder, name=file: shutil.copy(
            folder.with_name("step-000004") / name, folder / name
        ),
    }  # fmt: skip


def document(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / MANIFEST).read_text())
    return found


def sign(folder: Path, fields: dict[str, Any]) -> None:
    """As somebody would write it who knows how, so that the schema alone stands against it."""
    fields.pop("digest", None)
    text = json.dumps(fields, sort_keys=True, separators=(",", ":"))
    digest = hashlib.sha256(text.encode()).hexdigest()
    (folder / MANIFEST).write_text(json.dumps(fields | {"digest": digest}))


def signed(**changes: object) -> Damage:
    """Fields with other values; `...` takes one away."""

    def damage(folder: Path) -> None:
        fields = document(folder) | changes
        sign(folder, {name: value for name, value in fields.items() if value is not ...})

    return damage


KINDS |= {
    "the step is -1": signed(step=-1),
    "the step is huge": signed(step=10**40),
    "the step is a fraction": signed(step=8.5),
    "the step is true": signed(step=True),
    "the step is text": signed(step="8"),
    "the step is missing": signed(step=...),
    "the step is another than the folder's": signed(step=9),
    "the version is older": signed(version=2),
    "the version is newer": signed(version=99),
    "the version is true": signed(version=True),
    "the version is missing": signed(version=...),
    "the format is another's": signed(format="other"),
    "the sample is negative": signed(sample=-1),
    "the seed is nothing": signed(seed=None),
    "the end is zero": signed(steps=0),
    "the plan is no plan": signed(plan="dp: 2"),
    "the rates are text": signed(rates="0.1"),
    "a rate is infinite": signed(rates=[float("inf")]),
    "there is one field more": signed(more=1),
    "the evidence is missing": signed(evidence=...),
    "the evidence is a list": signed(evidence=[]),
    "the files are missing": signed(files=...),
    "there are no tensors": signed(tensors=[]),
    "the manifest is a list": written(MANIFEST, lambda data: b"[]"),
    "the manifest is deep": written(MANIFEST, lambda data: b"[" * 100_000),
    "the manifest is no text": written(MANIFEST, lambda data: b"\xff\xfe" + data),
    "the manifest has no digest": lambda folder: (folder / MANIFEST).write_text(
        json.dumps({k: v for k, v in document(folder).items() if k != "digest"})
    ),
    "a field was changed": written(MANIFEST, lambda data: data.replace(b'"seed": 7', b'"seed": 8')),
}


def tensor_changed(change: Callable[[dict[str, Any]], object]) -> Damage:
    def damage(folder: Path) -> None:
        fields = document(folder)
        change(fields["tensors"][0])
        sign(folder, fields)

    return damage


KINDS |= {
    "a tensor stands twice": lambda folder: sign(
        folder, document(folder) | {"tensors": document(folder)["tensors"][:1] * 2}
    ),
    "a tensor has a negative length": tensor_changed(lambda entry: entry.update(shape=[-1])),
    "a tensor has an unknown type": tensor_changed(lambda entry: entry.update(dtype="float33")),
    "a tensor has no name": tensor_changed(lambda entry: entry.pop("name")),
    "a tensor is of no part": tensor_changed(lambda entry: entry.update(part="other")),
    "a tensor is in no file": tensor_changed(lambda entry: entry.update(file="model-00009.safetensors")),
}


def file_changed(**changes: object) -> Damage:
    def damage(folder: Path) -> None:
        fields = document(folder)
        fields["files"][0] |= changes
        sign(folder, fields)

    return damage


KINDS |= {
    "a file is elsewhere": file_changed(name="../../other.safetensors"),
    "a file has a negative size": file_changed(nbytes=-1),
    "a file's digest is none": file_changed(sha256="ABC"),
    "a file's digest is another's": file_changed(sha256="0" * 64),
    "the folder is empty": lambda folder: [path.unlink() for path in folder.iterdir()],
    "the folder is a file": lambda folder: (shutil.rmtree(folder), folder.write_text("?")),
    "the folder is a link to nothing": lambda folder: (shutil.rmtree(folder), folder.symlink_to("nowhere")),
}


@kind("the files have each other's names")
def swapped(folder: Path) -> None:
    (folder / MODEL).rename(folder / "other")
    (folder / OPTIMIZER).rename(folder / MODEL)
    (folder / "other").rename(folder / OPTIMIZER)


@kind("the folder has another step's name")
def renamed(folder: Path) -> None:
    other = folder.with_name("step-000009")
    folder.rename(other)


def rewritten(change: Callable[[dict[str, torch.Tensor]], object]) -> Damage:
    def damage(folder: Path) -> None:
        held = load_file(folder / MODEL)
        change(held)
        save_file(held, folder / MODEL)

    return damage


KINDS |= {
    "a tensor has another shape": rewritten(lambda held: held.update(w=held["w"].reshape(3, 2))),
    "a tensor is of another type": rewritten(lambda held: held.update(w=held["w"].to(torch.int32))),
    "a tensor is missing": rewritten(lambda held: held.pop("w")),
    "there is one tensor more": rewritten(lambda held: held.update(more=torch.ones(1))),
    "a tensor has another name": rewritten(lambda held: held.update(v=held.pop("w"))),
}


def everything(root: Path) -> dict[str, tuple[str, bytes]]:
    """All that lies below, without opening what would wait."""
    return {
        str(path.relative_to(root)): (str(path.lstat().st_mode), path.read_bytes() if path.is_file() else b"")
        for path in sorted(root.rglob("*"))
    }


def test_there_are_sixty_kinds_and_more() -> None:
    assert len(KINDS) >= 60


@pytest.mark.parametrize("name", KINDS)
def test_a_damaged_checkpoint_is_skipped_with_a_word_and_stays_as_it_is(
    tmp_path: Path, save_whole: Callable[..., Any], name: str
) -> None:
    save_whole(tmp_path, 4)
    KINDS[name](save_whole(tmp_path, 8).folder)
    before = everything(tmp_path)
    found = latest(tmp_path)
    assert found.checkpoint is not None and found.checkpoint.manifest.step == 4
    (said,) = found.warnings
    assert said.startswith("skipped ") and "step-00000" in said and len(said) < 500
    assert everything(tmp_path) == before


@pytest.mark.parametrize("other", [{"shape": [9]}, {"dtype": "int8"}], ids=str)
def test_a_manifest_that_says_other_shapes_than_its_files_is_not_believed(
    tmp_path: Path, save_whole: Callable[..., Any], other: dict[str, Any]
) -> None:
    folder = save_whole(tmp_path, 4).folder
    tensor_changed(lambda entry: entry.update(other))(folder)
    with pytest.raises(RunError, match="in the manifest"):
        load(open_checkpoint(folder))
