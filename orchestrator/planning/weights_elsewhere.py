"""Weights elsewhere: while chips train, what a module holds are old values, not for code between steps."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch.utils import _pytree as trees
from torch.utils._python_dispatch import TorchDispatchMode

from comms.errors import ModelError


class WeightsElsewhere(TorchDispatchMode):
    """Inside, operations on these parameters raise ModelError: neither would reads be true nor writes arrive."""

    def __init__(self, params: Iterable[torch.Tensor], what: str) -> None:
        super().__init__()
        self.what = what
        self.storages = {p.untyped_storage()._cdata for p in params}

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> object:  # fmt: skip
        for value in trees.tree_leaves((args, kwargs)):
            if isinstance(value, torch.Tensor) and value.untyped_storage()._cdata in self.storages:
                problem = f"{self.what} uses the model's weights ({func}), which the chips hold"
                raise ModelError(
                    problem, "lr_schedule", "keep your own loop, with orchestrator.distribute and sync()"
                )
        return func(*args, **(kwargs or {}))
