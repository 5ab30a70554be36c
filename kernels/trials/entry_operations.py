"""Entry operations: whether a step computes every entry of a parameter from entries at the same place alone.

Only then may parameters be stepped on end to end and in shards. A trial (`optimizer_trials`) sees a few steps; what a
class of the user's does later is watched while it does it.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.utils import _pytree as trees
from torch.utils._python_dispatch import TorchDispatchMode

BY_ENTRIES = (  # beginnings of names, of operations that torch does not mark so
    "zeros", "ones", "full", "empty", "new_", "scalar_tensor", "lift_fresh", "arange",  # with no entry read
    "copy", "clone", "_to_copy", "detach", "alias", "fill", "zero", "masked_fill", "_conj", "resolve_",
    "_foreach_", "_fused_",
)  # fmt: skip
REDUCING = ("_foreach_norm", "_foreach_max")


class StepWatch(TorchDispatchMode):
    """Notes what a step does that is not by entries, and what it draws at random, by the names of operations."""

    def __init__(self) -> None:
        super().__init__()
        self.mixing: set[str] = set()
        self.drawing: set[str] = set()

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        name = str(func._schema.name).partition("::")[2]
        if torch.Tag.nondeterministic_seeded in func.tags:
            self.drawing.add(name)
        if not _is_by_entries(func, name, args, kwargs or {}):
            self.mixing.add(name)
        return func(*args, **(kwargs or {}))


def _is_by_entries(func: Any, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    is_known = name.startswith(BY_ENTRIES) and not name.startswith(REDUCING)
    if torch.Tag.pointwise in func.tags or is_known:
        return True
    values = (v for v in trees.tree_leaves((args, kwargs)) if isinstance(v, torch.Tensor))
    return all(value.numel() <= 1 for value in values)  # counts and the like
