"""A batch as a model takes it: names with tensors, or with anything in which tensors stand.

Every tensor has a name of its own: that of the entry, then the keys and positions that lead to it (`images.0`). All
else (numbers, strings, None) is part of how the model is called, and thus of the captured graph.
"""

from collections import Counter
from collections.abc import Mapping
from typing import Any, TypeAlias

import torch
from torch.utils import _pytree as trees

from comms.errors import PlanError

Batch: TypeAlias = Mapping[str, Any]


def tensors_of(batch: Batch) -> dict[str, torch.Tensor]:
    """The batch's tensors by name."""
    leaves, _ = trees.tree_flatten_with_path(dict(batch))
    return {_name(path): value for path, value in leaves if isinstance(value, torch.Tensor)}


def rebuilt(batch: Batch, tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """The batch with other tensors in the places of its own."""
    found: dict[str, Any] = trees.tree_map_with_path(
        lambda path, value: tensors[_name(path)] if isinstance(value, torch.Tensor) else value, dict(batch)
    )
    return found


PLAIN = (torch.Tensor, bool, int, float, complex, str, bytes, torch.dtype, torch.device, type(None))


def require_plain(batch: Batch) -> None:
    """Refuse what could hide tensors, objects that are neither tensors, numbers, text nor containers of them, and
    tensors that are not stored entry by entry."""
    leaves, _ = trees.tree_flatten_with_path(dict(batch))
    counted = Counter(_name(path) for path, _ in leaves)
    if twice := [name for name, times in counted.items() if times > 1]:
        problem = f"two entries of the batch are called {twice[0]}"
        raise PlanError(
            problem, "batch", "give keys other names: dots and numbers as text join what is nested"
        )
    for path, value in leaves:
        if isinstance(value, torch.nn.Parameter):
            problem = f"the batch's {_name(path)} is a parameter, which nothing would train"
            raise PlanError(problem, "batch", "register it in the model, or pass detach()")
        if not isinstance(value, PLAIN):
            raise PlanError(f"the batch's {_name(path)} is a {type(value).__name__}", "batch",
                            "pass tensors, numbers, text, and lists or dicts of them")  # fmt: skip
        if isinstance(value, torch.Tensor) and (value.is_nested or value.layout is not torch.strided):
            hint = "pass to_padded_tensor(0.0), and a mask" if value.is_nested else "pass to_dense()"
            kind = "nested" if value.is_nested else "sparse"
            raise PlanError(f"the batch's {_name(path)} is a {kind} tensor", "batch", hint)


def settings_of(batch: Batch) -> tuple[tuple[str, str], ...]:
    """What is no tensor, and how all is nested, as text: another batch with the same is called by the same graph."""
    leaves, nested = trees.tree_flatten_with_path(dict(batch))
    values = ((_name(path), repr(value)) for path, value in leaves if not isinstance(value, torch.Tensor))
    return *values, ("", str(nested))


def _name(path: tuple[Any, ...]) -> str:
    keys = (getattr(key, "key", getattr(key, "idx", getattr(key, "name", None))) for key in path)
    return ".".join(map(str, keys))
