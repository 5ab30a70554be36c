"""Exact float64: models that cast to float32 inside (norms, losses, softmax) would hide the proof under rounding.

While the mode is active, a float64 tensor asked to become a narrower float stays as it is. Used when capturing and
when running the one-chip reference of a float64 verification, never in training.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

NARROWER = (torch.float32, torch.bfloat16, torch.float16)
SHORTHANDS = (torch.Tensor.float, torch.Tensor.half, torch.Tensor.bfloat16)


class ExactFloat64(TorchFunctionMode):
    """Keeps float64 values wide through explicit casts."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        named = kwargs or {}
        is_cast = func in SHORTHANDS or "dtype" in named or any(type(a) is torch.dtype for a in args)
        if is_cast and args and isinstance(args[0], torch.Tensor) and args[0].dtype is torch.float64:
            if func in SHORTHANDS:
                return args[0]
            args = tuple(torch.float64 if isinstance(a, torch.dtype) and a in NARROWER else a for a in args)
            if named.get("dtype") in NARROWER:
                named = {**named, "dtype": torch.float64}
        return func(*args, **named)
