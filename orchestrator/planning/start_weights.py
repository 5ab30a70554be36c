"""Start weights: a model's tensors from files instead of from the seed, by exact names and shapes.

All parameters and all buffers that a model saves must be there, and nothing else: what only one side has, or has in
another shape, is listed. Buffers that a model does not save are taken where they are given, as from a checkpoint. Other
types of numbers are taken into the job's, which is said.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from comms.errors import ModelError
from orchestrator.models.model_builder import BuiltModel
from orchestrator.runs.checkpoints.formats import read

LISTED = 8  # differences in an error; the rest are counted
META = "meta"


def started_from(model: BuiltModel, path: str | None) -> BuiltModel:
    """The model with the weights of `path`, if there is one; as it is where it has shapes only. Raises UserError."""
    if path is None or model.device == META:
        return model
    tensors = read(Path(path)).tensors
    _require_same(model.module, tensors, path)
    kinds = set()
    own = _named(model.module)
    with torch.no_grad():
        for name, value in tensors.items():
            if own[name].dtype != value.dtype:
                kinds.add(f"{value.dtype} as {own[name].dtype}")
            own[name].copy_(value)
    said = [f"{path}: taken from {each}" for each in sorted(kinds)]
    return replace(model, said=(*model.said, *said))


def _require_same(module: nn.Module, tensors: Mapping[str, torch.Tensor], path: str) -> None:
    """Raise ModelError with all that differs."""
    tied = _named(module)
    first = {id(value): name for name, value in reversed(tied.items())}
    saved = {name for name in module.state_dict() if name in tied}
    given = {id(tied[name]) for name in tensors.keys() & tied.keys()}
    found = [f"{name} is missing" for name in sorted(saved - tensors.keys()) if id(tied[name]) not in given]
    for name, value in sorted(tensors.items()):
        if name not in tied:
            found.append(f"{name} is not of this model")
        elif tied[name].shape != value.shape:
            found.append(f"{name} is {list(value.shape)}, the model has {list(tied[name].shape)}")
        elif (other := first[id(tied[name])]) in tensors and not _is_equal(tensors[other], value):
            found.append(f"{name} and {other} are one in the model, and differ")
    if found:
        more = f" (and {len(found) - LISTED} more)" * (len(found) > LISTED)
        hint = "give weights of this model, with its model_args"
        raise ModelError(f"the weights do not fit: {'; '.join(found[:LISTED])}{more}", path, hint)


def _named(module: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers under all names that they have."""
    found: dict[str, torch.Tensor] = dict(module.named_buffers(remove_duplicate=False))
    return found | dict(module.named_parameters(remove_duplicate=False))


def _is_equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one is other or torch.equal(one, other)
