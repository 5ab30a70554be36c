"""A batch as a model takes it: names with tensors, or with anything in which tensors stand.

Every tensor has a name of its own: that of the entry, then the keys and positions that lead to it (`images.0`). All
else (numbers, strings, None) is part of how the model is called, and thus of the captured graph.
"""

from collections import Counter
from collections.abc import Mapping
from typing import Any, TypeAlias

import torch
from torch.utils import _pytree as trees

from comms.errors import CaptureError, PlanError

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
    try:
        leaves, _ = trees.tree_flatten_with_path(dict(batch))
    except ValueError as error:  # of classes that are registered without names of their parts
        problem = f"parts of the batch have no names: {str(error).splitlines()[0]}"
        raise PlanError(problem, "batch", "pass lists or dicts of tensors") from error
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
        if isinstance(value, torch.Tensor):
            _require_own(f"the batch's {_name(path)}", value)
        if not isinstance(value, PLAIN):
            raise PlanError(f"the batch's {_name(path)} is a {type(value).__name__}", "batch",
                            "pass tensors, numbers, text, and lists or dicts of them")  # fmt: skip
        if isinstance(value, torch.Tensor) and (value.is_nested or value.layout is not torch.strided):
            hint = "pass to_padded_tensor(0.0), and a mask" if value.is_nested else "pass to_dense()"
            kind = "nested" if value.is_nested else "sparse"
            raise PlanError(f"the batch's {_name(path)} is a {kind} tensor", "batch", hint)


def _require_own(name: str, value: torch.Tensor) -> None:
    """Refuse tensors that bring code or a graph along, which chips would not run."""
    if not is_plain_kind(value):
        problem = f"{name} is a {type(value).__name__}, whose own code would not run"
        raise PlanError(problem, "batch", "pass as_subclass(torch.Tensor)")
    if held := list(vars(value)):
        problem = f"{name} has the attribute {held[0]}, which a forward would not see"
        raise PlanError(problem, "batch", "pass it as an entry of the batch")
    if value.grad_fn is not None:
        problem = f"{name} was computed from what takes gradients, which would get none"
        raise PlanError(problem, "batch", "compute it in the model's forward, or pass detach()")
    if value._backward_hooks or getattr(value, "_post_accumulate_grad_hooks", None):
        raise PlanError(f"{name} has a gradient hook, which would not run", "batch", "remove the hook")


def is_plain_kind(value: torch.Tensor) -> bool:
    """Whether a tensor is of torch's own kinds, which bring no code of the user's along."""
    return str(type(value).__module__).partition(".")[0] == "torch"


def require_unchanged(batch: Batch, used: Batch) -> None:
    """Refuse that a forward changes lists and dicts in the batch: given again, they would be as before.
    Raises CaptureError."""
    for name in (name for name in batch if name in used):
        before, after = (trees.tree_flatten_with_path(each[name]) for each in (batch, used))
        pairs = zip(before[0], after[0], strict=False)
        kept = before[1] == after[1] and all(
            a is b
            or (isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor))
            or (type(a), a) == (type(b), b)
            for (_, a), (_, b) in pairs
        )
        if not kept:
            problem = f"the forward changes what the batch's {name} holds, which the next step would not see"
            raise CaptureError(problem, hint="let it work on a copy")


def settings_of(batch: Batch) -> tuple[tuple[str, str], ...]:
    """What is no tensor, and how all is nested, as text: another batch with the same is called by the same graph."""
    leaves, nested = trees.tree_flatten_with_path(dict(batch))
    values = ((_name(path), repr(value)) for path, value in leaves if not isinstance(value, torch.Tensor))
    return *values, ("", str(nested))


def _name(path: tuple[Any, ...]) -> str:
    keys = (getattr(key, "key", getattr(key, "idx", getattr(key, "name", None))) for key in path)
    return ".".join(map(str, keys))
