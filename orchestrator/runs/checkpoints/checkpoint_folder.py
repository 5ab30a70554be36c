"""Checkpoints: folders that are complete or do not count, with whole tensors by name, for any plan.

    step-000100/manifest.json               `manifest.Manifest`: the commit marker
    step-000100/model-00001.safetensors     parameters and buffers under their own names
    step-000100/optimizer-00001.safetensors what the optimizer keeps: "STATE of PARAMETER"

A hidden folder is filled; the manifest is written last, the folder is synced and renamed. So a crash leaves either no
such checkpoint or a whole one, and never touches an older one. A checkpoint that is not in every byte what its
manifest says is skipped with a warning value, never half loaded, and stays as it is.

Tensors come back bit for bit. Files of several gigabytes follow each other, so that none has to be held at once.
Version 2, of shards that fit one plan only, is not read any more: its manifest is refused by its version.
"""

import hashlib
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from comms.errors import RunError
from orchestrator.runs.checkpoints.manifest import (
    MAX_BYTES,
    BadManifest,
    FileEntry,
    Manifest,
    TensorEntry,
    TensorPart,
    decode_manifest,
    encode_manifest,
)
from orchestrator.runs.disk import explained, sync, write_whole

MANIFEST = "manifest.json"
FILE_BYTES = 2 * 10**9  # of one file, unless a single tensor has more
ASIDE = ".damaged"  # what a folder is called that was skipped, once newer steps take its place
# A folder that is being replaced keeps its content under a hidden name until the new one is in place.
_FOLDER = re.compile(r"(?:step-(\d{6,})|\.step-(\d{6,})\.replaced)")
_PARTIAL = re.compile(r"\.step-\d{6,}\.partial")

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class TrainingState:
    """What training changes, as one chip would have it: parameters, buffers, and states of parameters by key."""

    parameters: Tensors
    buffers: Tensors
    states: Mapping[str, Tensors] = field(default_factory=dict)

    def parts(self) -> Iterator[tuple[TensorEntry, torch.Tensor]]:
        """Every tensor, with what there is to say of it but its file."""
        for part, held in ((TensorPart.PARAMETER, self.parameters), (TensorPart.BUFFER, self.buffers)):
            for name in sorted(held):
                yield _entry(part, name, "", held[name]), held[name]
        for name in sorted(self.states):
            for key in sorted(self.states[name]):
                value = self.states[name][key]
                yield _entry(TensorPart.STATE, name, key, value), value


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


def _entry(part: TensorPart, name: str, state: str, value: torch.Tensor) -> TensorEntry:
    dtype = str(value.dtype).removeprefix("torch.")
    return TensorEntry(part=part, name=name, state=state, file="", shape=tuple(value.shape), dtype=dtype)


def save(checkpoints: Path, manifest: Manifest, state: TrainingState) -> Checkpoint:
    """The checkpoint of this state on disk. A failure leaves no trace of it."""
    folder = checkpoints / f".{_name(manifest.step)}.partial"
    try:
        with explained(folder):
            shutil.rmtree(folder, ignore_errors=True)  # remains of a failed attempt
            folder.mkdir(parents=True)
        files, entries = [], []
        for name, held in _packed(state):
            with explained(folder / name):
                files.append(_write_file(folder / name, {entry.key: value for entry, value in held}))
            entries += [entry.model_copy(update={"file": name}) for entry, _ in held]
        found = manifest.model_copy(update={"files": tuple(files), "tensors": tuple(entries)})
        return _commit(folder, found)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _packed(state: TrainingState) -> Iterator[tuple[str, list[tuple[TensorEntry, torch.Tensor]]]]:
    """Names of files and what goes into them: as many tensors, in order, as FILE_BYTES allow."""
    held: dict[str, list[list[tuple[TensorEntry, torch.Tensor]]]] = {"model": [], "optimizer": []}
    sizes = dict.fromkeys(held, FILE_BYTES)
    for entry, value in state.parts():
        kind = "optimizer" if entry.part is TensorPart.STATE else "model"
        if not held[kind] or sizes[kind] + value.nbytes > FILE_BYTES:
            held[kind].append([])
            sizes[kind] = 0
        held[kind][-1].append((entry, value))
        sizes[kind] += value.nbytes
    for kind, files in held.items():
        for number, file in enumerate(files, start=1):
            yield f"{kind}-{number:05d}.safetensors", file


def _write_file(path: Path, tensors: Tensors) -> FileEntry:
    try:
        save_file(separate(tensors), path)
    except SafetensorError as error:  # it reports the operating system's error as text only
        if "No space left" in str(error):
            raise OSError(28, str(error)) from error
        raise
    sync(path)
    return FileEntry(name=path.name, nbytes=path.stat().st_size, sha256=_sha256(path))


def _commit(folder: Path, manifest: Manifest) -> Checkpoint:
    """Write the manifest and give the folder its name; from here on it counts."""
    final = folder.with_name(_name(manifest.step))
    replaced = folder.with_name(f".{final.name}.replaced")
    write_whole(folder / MANIFEST, encode_manifest(manifest))
    with explained(final):
        if final.exists():
            shutil.rmtree(replaced, ignore_errors=True)
            final.rename(replaced)
        folder.rename(final)
        sync(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)
    return Checkpoint(final, manifest)


def latest(run_dir: Path) -> NewestCheckpoint:
    """The newest complete checkpoint under `run_dir`/checkpoints. Nothing is changed on disk."""
    warnings: list[str] = []
    for folder in newest_first(run_dir / "checkpoints"):
        try:
            return NewestCheckpoint(open_checkpoint(folder), tuple(warnings))
        except RunError as error:
            warnings.append(f"skipped {error.where}: {error.problem}")
    return NewestCheckpoint(None, tuple(warnings))


def open_checkpoint(folder: Path) -> Checkpoint:
    """The checkpoint in `folder`, every file checked against the manifest. Raises RunError if it is not whole."""
    manifest = read_manifest(folder)
    for entry in manifest.files:
        _verify(folder / entry.name, entry)
    return Checkpoint(folder, manifest)


def read_manifest(folder: Path) -> Manifest:
    """What a folder says that it holds. Raises RunError where it says nothing sound."""
    path = folder / MANIFEST
    try:
        if not path.is_file():
            there = "is no file" if path.exists() else "is missing: the write never finished"
            raise _damaged(folder, f"{path.name} {there}")
        if path.stat().st_size > MAX_BYTES:
            raise _damaged(folder, f"{path.name} has {path.stat().st_size} bytes")
        manifest = decode_manifest(path.read_bytes())
    except BadManifest as error:
        raise _damaged(folder, f"{path.name} cannot be read: {error}") from error
    except OSError as error:
        raise _damaged(folder, f"{path.name} cannot be read: {error.strerror}") from error
    match = _FOLDER.fullmatch(folder.name)
    if match and int(match[1] or match[2]) != manifest.step:
        raise _damaged(folder, f"it is of step {manifest.step}, but called {folder.name}")
    return manifest


def load(checkpoint: Checkpoint) -> TrainingState:
    """Every tensor, on the CPU; each file is checked again before it is read. Raises RunError."""
    whole: dict[TensorPart, dict[str, torch.Tensor]] = {TensorPart.PARAMETER: {}, TensorPart.BUFFER: {}}
    states: dict[str, dict[str, torch.Tensor]] = {}
    for file in checkpoint.manifest.files:
        tensors = _load_file(checkpoint.folder, file)
        entries = [each for each in checkpoint.manifest.tensors if each.file == file.name]
        if tensors.keys() != {each.key for each in entries}:
            raise _damaged(checkpoint.folder, f"{file.name} holds other tensors than the manifest says")
        for entry in entries:
            value = tensors[entry.key]
            told = _entry(entry.part, entry.name, entry.state, value)
            if (told.shape, told.dtype) != (entry.shape, entry.dtype):
                problem = f"{entry.key} is {told.dtype} {list(told.shape)} in {file.name}"
                wanted = f"{entry.dtype} {list(entry.shape)} in the manifest"
                raise _damaged(checkpoint.folder, f"{problem}, {wanted}")
            held = states.setdefault(entry.name, {}) if entry.part is TensorPart.STATE else whole[entry.part]
            held[entry.state if entry.part is TensorPart.STATE else entry.name] = value
    return TrainingState(whole[TensorPart.PARAMETER], whole[TensorPart.BUFFER], states)


def _load_file(folder: Path, file: FileEntry) -> dict[str, torch.Tensor]:
    _verify(folder / file.name, file)
    try:
        found: dict[str, torch.Tensor] = load_file(folder / file.name)
    except (SafetensorError, OSError) as error:
        raise _damaged(folder, f"{file.name} cannot be read: {error}") from error
    return found


def prune(run_dir: Path, keep: int) -> None:
    """Remove all but the newest `keep` (at least 1) checkpoints and what is older than they are.

    Only what has a sound manifest and files of their sizes counts, so that damaged ones never push out good ones.
    """
    complete = 0
    for folder in newest_first(run_dir / "checkpoints"):
        if complete >= keep:
            remove(folder)
        else:
            complete += _seems_whole(folder)


def _seems_whole(folder: Path) -> bool:
    try:
        require_sizes(folder)
    except RunError:
        return False
    return True


def require_sizes(folder: Path) -> None:
    """Raise RunError where a file is not there, or not of its size; what is in it is not read."""
    for entry in read_manifest(folder).files:
        _verify_size(folder / entry.name, entry)


def set_aside(run_dir: Path, kept: Checkpoint | None) -> list[Path]:
    """Give other names to checkpoints newer than `kept`, which could not be read: a run that goes on must not come
    back to them. Nothing of them is lost; returns where they are. Raises RunError.
    """
    moved = []
    for folder in newest_first(run_dir / "checkpoints"):
        if kept is not None and folder == kept.folder:
            break
        target = next(path for path in _names_aside(folder) if not path.exists())
        with explained(folder):
            folder.rename(target)
        moved.append(target)
    return moved


def _names_aside(folder: Path) -> Iterator[Path]:
    number = 1
    while True:
        yield folder.with_name(f"{folder.name.lstrip('.')}{ASIDE}{'' if number == 1 else number}")
        number += 1


def remove_partial(run_dir: Path) -> None:
    """Remove what processes left that were killed while they wrote; nobody else may be writing."""
    checkpoints = run_dir / "checkpoints"
    for path in checkpoints.iterdir() if checkpoints.is_dir() else ():
        if _PARTIAL.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)


def remove(folder: Path) -> None:
    """Without its manifest a folder does not count, even if the removal is interrupted. Raises RunError."""
    with explained(folder):
        if folder.is_symlink() or not folder.is_dir():
            folder.unlink()
            return
        (folder / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(folder)


def _name(step: int) -> str:
    return f"step-{step:06d}"


def newest_first(checkpoints: Path) -> list[Path]:
    """Candidates by step, newest first; at equal step the named folder before the one it replaces."""
    found = []
    for path in checkpoints.iterdir() if checkpoints.is_dir() else ():
        match = _FOLDER.fullmatch(path.name)
        if match:
            found.append((-int(match[1] or match[2]), match[1] is None, path))
    return [path for *_, path in sorted(found)]


def separate(tensors: Tensors) -> dict[str, torch.Tensor]:
    """Each tensor contiguous, on the CPU, in storage of its own: safetensors refuses views of one buffer."""
    seen: set[int] = set()
    found = {}
    for name, tensor in sorted(tensors.items()):
        value = tensor.detach().to(device="cpu").contiguous()
        storage = value.untyped_storage()
        is_own = storage.nbytes() == value.nbytes and storage.data_ptr() not in seen
        found[name] = value if is_own else value.clone()
        seen.add(found[name].untyped_storage().data_ptr())
    return found


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _verify(path: Path, entry: FileEntry) -> None:
    _verify_size(path, entry)
    try:
        digest = _sha256(path)
    except OSError as error:
        raise _damaged(path.parent, f"{path.name} cannot be read: {error.strerror}") from error
    if digest != entry.sha256:
        raise _damaged(path.parent, f"{path.name} does not have the digest of its manifest")


def _verify_size(path: Path, entry: FileEntry) -> None:
    try:
        if not path.is_file():
            raise _damaged(path.parent, f"{path.name} is {'no file' if path.exists() else 'missing'}")
        nbytes = path.stat().st_size
    except OSError as error:
        raise _damaged(path.parent, f"{path.name} cannot be read: {error.strerror}") from error
    if nbytes != entry.nbytes:
        raise _damaged(path.parent, f"{path.name} has {nbytes} bytes instead of {entry.nbytes}")


def _damaged(folder: Path, problem: str) -> RunError:
    return RunError(
        problem=problem, where=str(folder), hint="resume from an older checkpoint, or start a new run"
    )
