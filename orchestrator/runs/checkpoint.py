"""Checkpoints: folders that are complete or do not count.

    step-000100/manifest.json          step, data position, seed, layout, digests: the commit marker
    step-000100/<writer>.safetensors   what one shard holds, name -> tensor

A hidden folder is filled; the manifest is written last, the folder is synced and renamed. So a crash leaves either no
such checkpoint or a whole one, and never touches an older one. A checkpoint whose files do not have the sizes and
SHA-256 digests of its manifest is skipped with a warning value, never half loaded.

Tensors come back bit for bit. Not here: what the tensors mean and how they are cut (the `layout` is stored as given),
and random state, of which training has none: the sample index says it all.
"""

import hashlib
import json
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from comms.errors import RunError
from orchestrator.runs.disk import explained, sync, write_whole

VERSION = 2
MANIFEST = "manifest.json"
SUFFIX = ".safetensors"
# A folder that is being replaced keeps its content under a hidden name until the new one is in place.
_FOLDER = re.compile(r"(?:step-(\d{6,})|\.step-(\d{6,})\.replaced)")

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class ShardFile:
    """One shard's file and what is in it, as plain JSON data: name, shape and dtype of every tensor."""

    writer: str
    nbytes: int
    sha256: str
    tensors: Sequence[Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a checkpoint holds.

    `sample` is the global index of the next sample; `extra` is the caller's own. `layout` and
    `extra` are plain JSON data: string keys, lists instead of tuples.
    """

    step: int
    sample: int
    seed: int
    shards: tuple[ShardFile, ...] = ()
    layout: Mapping[str, Any] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)
    version: int = VERSION


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A complete checkpoint on disk."""

    folder: Path
    manifest: Manifest


@dataclass(frozen=True, slots=True)
class NewestCheckpoint:
    """The newest complete checkpoint, if any, and one sentence for each newer one that was skipped."""

    checkpoint: Checkpoint | None
    warnings: tuple[str, ...]


def save(checkpoints: Path, manifest: Manifest, shards: Mapping[str, Tensors]) -> Checkpoint:
    """The checkpoint of these `shards` (writer to tensors) on disk. A failure leaves no trace of it."""
    folder = checkpoints / f".{_name(manifest.step)}.partial"
    try:
        with explained(folder):
            shutil.rmtree(folder, ignore_errors=True)  # remains of a failed attempt
            folder.mkdir(parents=True)
        files = tuple(_write_shard(folder, writer, tensors) for writer, tensors in sorted(shards.items()))
        return _commit(folder, replace(manifest, shards=files))
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _write_shard(folder: Path, writer: str, tensors: Tensors) -> ShardFile:
    path = folder / f"{writer}{SUFFIX}"
    with explained(path):
        try:
            save_file(_separate(tensors), path)
        except SafetensorError as error:  # it reports the operating system's error as text only
            if "No space left" in str(error):
                raise OSError(28, str(error)) from error
            raise
        sync(path)
        entries = [
            {"name": name, "shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch.")}
            for name, tensor in sorted(tensors.items())
        ]
        return ShardFile(writer, path.stat().st_size, _sha256(path), entries)


def _commit(folder: Path, manifest: Manifest) -> Checkpoint:
    """Write the manifest and give the folder its name; from here on it counts."""
    final = folder.with_name(_name(manifest.step))
    replaced = folder.with_name(f".{final.name}.replaced")
    write_whole(folder / MANIFEST, json.dumps(asdict(manifest), indent=1).encode())
    with explained(final):
        if final.exists():
            shutil.rmtree(replaced, ignore_errors=True)
            final.rename(replaced)
        folder.rename(final)
        sync(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)
    return Checkpoint(final, manifest)


def latest(run_dir: Path) -> NewestCheckpoint:
    """The newest complete checkpoint under `run_dir`/checkpoints."""
    warnings: list[str] = []
    for folder in _newest_first(run_dir / "checkpoints"):
        try:
            return NewestCheckpoint(open_checkpoint(folder), tuple(warnings))
        except RunError as error:
            warnings.append(f"skipped {error.where}: {error.problem}")
    return NewestCheckpoint(None, tuple(warnings))


def open_checkpoint(folder: Path) -> Checkpoint:
    """The checkpoint in `folder`, every file checked against the manifest. Raises RunError if incomplete."""
    manifest = _read_manifest(folder / MANIFEST)
    for shard in manifest.shards:
        _verify(folder / f"{shard.writer}{SUFFIX}", shard)
    return Checkpoint(folder, manifest)


def load(checkpoint: Checkpoint) -> dict[str, dict[str, torch.Tensor]]:
    """Every shard, on the CPU: writer -> name -> tensor; each file is checked again before it is read."""
    found = {}
    for shard in checkpoint.manifest.shards:
        path = checkpoint.folder / f"{shard.writer}{SUFFIX}"
        _verify(path, shard)
        found[shard.writer] = load_file(path)
    return found


def prune(run_dir: Path, keep: int) -> None:
    """Remove all but the newest `keep` (at least 1) complete checkpoints and what is older."""
    complete = 0
    for folder in _newest_first(run_dir / "checkpoints"):
        if complete >= keep:
            _remove(folder)
        elif (folder / MANIFEST).exists():
            complete += 1


def remove_newer(run_dir: Path, kept: Checkpoint) -> None:
    """Remove what is newer than `kept`: checkpoints that could not be read, which must not outlive good ones."""
    for folder in _newest_first(run_dir / "checkpoints"):
        if folder == kept.folder:
            return
        _remove(folder)


def _remove(folder: Path) -> None:
    """Without its manifest a folder does not count, even if the removal is interrupted."""
    (folder / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(folder)


def _name(step: int) -> str:
    return f"step-{step:06d}"


def _newest_first(checkpoints: Path) -> list[Path]:
    """Candidates by step, newest first; at equal step the named folder before the one it replaces."""
    found = []
    for path in checkpoints.iterdir() if checkpoints.is_dir() else ():
        match = _FOLDER.fullmatch(path.name)
        if match:
            found.append((-int(match[1] or match[2]), match[1] is None, path))
    return [path for *_, path in sorted(found)]


def _separate(tensors: Tensors) -> dict[str, torch.Tensor]:
    """Each tensor contiguous, on the CPU, in storage of its own: safetensors refuses views of one buffer."""
    return {
        name: tensor.detach().to(device="cpu", copy=True, memory_format=torch.contiguous_format)
        for name, tensor in sorted(tensors.items())
    }


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _verify(path: Path, shard: ShardFile) -> None:
    if not path.is_file():
        raise _incomplete(path.parent, f"{path.name} is missing")
    if path.stat().st_size != shard.nbytes:
        raise _incomplete(
            path.parent, f"{path.name} has {path.stat().st_size} bytes instead of {shard.nbytes}"
        )
    if _sha256(path) != shard.sha256:
        raise _incomplete(path.parent, f"{path.name} does not have the digest of its manifest")


def _read_manifest(path: Path) -> Manifest:
    try:
        document = json.loads(path.read_bytes())
        if document["version"] != VERSION:
            raise ValueError(f"version {document['version']}; this reads version {VERSION}")
        shards = tuple(
            ShardFile(each["writer"], int(each["nbytes"]), str(each["sha256"]), list(each["tensors"]))
            for each in document.pop("shards")
        )
        return Manifest(shards=shards, **document)
    except FileNotFoundError:
        raise _incomplete(path.parent, f"{path.name} is missing: the write never finished") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _incomplete(
            path.parent, f"{path.name} cannot be read: {type(error).__name__}: {error}"
        ) from error


def _incomplete(folder: Path, problem: str) -> RunError:
    return RunError(
        problem=problem, where=str(folder), hint="resume from an older checkpoint, or start a new run"
    )
