"""Formats: whole tensors by name in files of others, read and written.

    run             a run directory: its newest complete checkpoint
    checkpoint      a folder with our manifest
    dcp             a folder of torch.distributed.checkpoint: {"model": ..., "optimizer": ..., "manifest": ...}
    safetensors     a file, or a folder of files whose names differ, as transformers saves a model

Reading needs no process group. Of DCP folders that others wrote, tensors below "model" are the model, or all tensors
where nothing lies below that; what is no tensor is left out. No pickle of a checkpoint is run, but that of DCP's own
index, which torch reads so: take such folders only from where you would take code.
"""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from comms.errors import ModelError, RunError
from orchestrator.runs.checkpoints.checkpoint_folder import (
    MANIFEST,
    TrainingState,
    latest,
    load,
    open_checkpoint,
    separate,
)
from orchestrator.runs.checkpoints.manifest import BadManifest, Manifest, decode_manifest, encode_manifest
from orchestrator.runs.disk import explained
from orchestrator.runs.run_dir import CONFIG

DCP_INDEX = ".metadata"
MODEL, OPTIMIZER, OURS = "model", "optimizer", "manifest"  # top names of our DCP folders


class Format(StrEnum):
    """What a path holds."""

    CHECKPOINT = "checkpoint"
    DCP = "dcp"
    SAFETENSORS = "safetensors"


@dataclass(frozen=True, slots=True)
class Weights:
    """What a path holds: tensors of a model by name; all of a checkpoint where it is one, or was."""

    where: Path
    format: Format
    tensors: Mapping[str, torch.Tensor]
    state: TrainingState | None = None
    manifest: Manifest | None = None


def format_of(path: Path) -> Format | None:
    """By the files that are there; None where nothing is known."""
    if (path / MANIFEST).exists() or (path / CONFIG).is_file():
        return Format.CHECKPOINT
    if (path / DCP_INDEX).is_file():
        return Format.DCP
    is_file = path.suffix == ".safetensors" and path.is_file()
    return Format.SAFETENSORS if is_file or next(path.glob("*.safetensors"), None) else None


def read(path: Path) -> Weights:
    """All of a path. Raises ModelError, and RunError for a checkpoint that is not whole."""
    match format_of(path):
        case Format.CHECKPOINT:
            return _of_checkpoint(path)
        case Format.DCP:
            return _of_dcp(path)
        case Format.SAFETENSORS:
            return Weights(path, Format.SAFETENSORS, _of_safetensors(path))
        case None:
            known = (
                "a run, a checkpoint, a .safetensors file or folder, or one of torch.distributed.checkpoint"
            )
            problem = "there are no weights here" if path.exists() else "there is no such file or folder"
            raise ModelError(problem, str(path), f"give {known}")


def _of_checkpoint(path: Path) -> Weights:
    if not (path / MANIFEST).exists():
        newest = latest(path)
        if newest.checkpoint is None:
            said = newest.warnings[0] if newest.warnings else "it was stopped before its first one"
            raise RunError(f"the run has no complete checkpoint: {said}", str(path), "give another one")
        found = newest.checkpoint
    else:
        found = open_checkpoint(path)
    state = load(found)
    return _of_state(found.folder, Format.CHECKPOINT, state, found.manifest)


def _of_state(where: Path, kind: Format, state: TrainingState, manifest: Manifest | None) -> Weights:
    return Weights(where, kind, {**state.parameters, **state.buffers}, state, manifest)


def _of_safetensors(path: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in sorted(path.glob("*.safetensors")) if path.is_dir() else [path]:
        try:
            held = load_file(file)
        except (SafetensorError, OSError) as error:
            raise ModelError(f"it cannot be read: {error}", str(file), "give a whole file") from error
        if twice := sorted(held.keys() & found.keys()):
            raise ModelError(f"{twice[0]} is in another file, too", str(file), "keep one of them")
        found |= held
    return found


def _of_dcp(path: Path) -> Weights:
    from torch.distributed.checkpoint import state_dict_loader
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    try:
        reader = FileSystemReader(str(path))
        index = reader.read_metadata()
        kinds = index.state_dict_metadata
        flat: dict[str, Any] = {
            name: torch.empty(tuple(kind.size), dtype=kind.properties.dtype)
            if isinstance(kind, TensorStorageMetadata)
            else ""
            for name, kind in kinds.items()
            if isinstance(kind, TensorStorageMetadata) or name == OURS
        }
        with _alone():
            state_dict_loader.load(flat, storage_reader=reader, no_dist=True)
    except Exception as error:  # whatever torch makes of files that are none of its own
        said = " ".join(str(error).split())[:200] or type(error).__name__
        raise ModelError(f"it cannot be read: {said}", str(path), "give a folder that torch wrote") from error
    places = index.planner_data or {name: (name,) for name in flat}
    by_top: dict[str, dict[tuple[str, ...], Any]] = {}
    for name, value in flat.items():
        top, *rest = map(str, places.get(name, (name,)))
        by_top.setdefault(top, {})[tuple(rest)] = value
    if OURS in by_top and MODEL in by_top:
        return _of_our_dcp(path, by_top)
    own = by_top.get(MODEL) or {(top, *rest): v for top, held in by_top.items() for rest, v in held.items()}
    return Weights(path, Format.DCP, {".".join(rest): value for rest, value in own.items()})


def _of_our_dcp(path: Path, by_top: Mapping[str, Mapping[tuple[str, ...], Any]]) -> Weights:
    try:
        manifest = decode_manifest(str(by_top[OURS][()]).encode())
    except (BadManifest, KeyError) as error:
        raise ModelError(
            f"its manifest cannot be read: {error}", str(path), "convert it once more"
        ) from error
    parts = {each.name for each in manifest.tensors if each.part == "parameter"}
    held = {rest[0]: value for rest, value in by_top[MODEL].items()}
    states: dict[str, dict[str, torch.Tensor]] = {}
    for (name, key), value in by_top.get(OPTIMIZER, {}).items():
        states.setdefault(name, {})[key] = value
    state = TrainingState(
        {name: value for name, value in held.items() if name in parts},
        {name: value for name, value in held.items() if name not in parts},
        states,
    )
    return _of_state(path, Format.DCP, state, manifest)


def write_safetensors(target: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """One file of a model's tensors under their names. Raises RunError."""
    with explained(target):
        try:
            save_file(separate(tensors), target, metadata={"format": "pt"})
        except SafetensorError as error:
            raise RunError(str(error), str(target), "write to another disk") from error


def write_dcp(target: Path, weights: Weights) -> None:
    """A folder of torch.distributed.checkpoint; with all of a checkpoint it becomes one again. Raises RunError."""
    from torch.distributed.checkpoint.filesystem import FileSystemWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    whole: dict[str, Any] = {MODEL: dict(weights.tensors)}
    if weights.state is not None and weights.manifest is not None:
        whole[OPTIMIZER] = {name: dict(own) for name, own in weights.state.states.items()}
        whole[OURS] = encode_manifest(weights.manifest).decode()
    with explained(target):
        try:
            with _alone():
                save(whole, storage_writer=FileSystemWriter(str(target)), no_dist=True)
        except OSError:
            raise
        except Exception as error:  # torch wraps the operating system's words
            raise RunError(" ".join(str(error).split())[:200], str(target), "write elsewhere") from error


@contextmanager
def _alone() -> Iterator[None]:
    """torch warns that there is no process group, which is meant so."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def described(weights: Weights) -> dict[str, object]:
    """How many tensors, parameters and bytes, as JSON values."""
    held = weights.tensors.values()
    return {
        "format": str(weights.format), "tensors": len(weights.tensors), "numbers": sum(v.numel() for v in held),
        "nbytes": sum(v.nbytes for v in held), "step": weights.manifest.step if weights.manifest else None,
    }  # fmt: skip
