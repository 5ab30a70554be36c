"""Questions about types that a forward asks: `type(x)` of a stand-in is what it is in training.

`isinstance` is right by itself. `type` is a name that code looks up in its module, so modules get one that knows the
answer while a forward is traced; torch's own, which must tell stand-ins apart, keep Python's. Not here: `x.__class__`.
"""

import builtins
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FunctionType
from typing import Any

import torch
from torch import nn
from torch._subclasses import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

STAND_INS = (FakeTensor, FunctionalTensor)
OWN = frozenset({"torch", "partitioner", "kernels", "comms", "orchestrator"}) | sys.stdlib_module_names


class _Asked(type):
    """Makes `_Told` answer as `type` does, whatever it is asked."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        return told_type(args[0]) if len(args) == 1 and not kwargs else builtins.type(*args, **kwargs)

    def __instancecheck__(cls, value: object) -> bool:
        return isinstance(value, builtins.type)

    def __subclasscheck__(cls, value: type) -> bool:
        return issubclass(value, builtins.type)

    def __eq__(cls, other: object) -> bool:
        return other is builtins.type or other is cls

    def __hash__(cls) -> int:
        return hash(builtins.type)


class _Told(type, metaclass=_Asked):
    """What code of the user's finds as `type` while it is traced."""


def told_type(value: object) -> type:
    """The type of a value, or of what it stands for."""
    if not isinstance(value, STAND_INS):
        return builtins.type(value)
    return nn.Parameter if isinstance(value, nn.Parameter) else torch.Tensor


@contextmanager
def types_as_in_training(module: nn.Module, loss_fn: Callable[..., Any] | None) -> Iterator[None]:
    """Inside the block code that is not torch's is told the types of what stand-ins stand for."""
    spaces = {id(space): space for space in _spaces(module, loss_fn) if "type" not in space}
    try:
        for space in spaces.values():
            space["type"] = _Told
        yield
    finally:
        for space in spaces.values():
            space.pop("type", None)


def _spaces(module: nn.Module, loss_fn: Callable[..., Any] | None) -> Iterator[dict[str, Any]]:
    """The namespaces of modules, and those of the model's own functions, which may be of none."""
    for name, loaded in list(sys.modules.items()):
        if name.partition(".")[0] not in OWN and isinstance(getattr(loaded, "__dict__", None), dict):
            yield vars(loaded)
    kinds = {kind for part in module.modules() for kind in builtins.type(part).__mro__}
    functions = [f for kind in kinds for f in vars(kind).values()] + [loss_fn]
    for function in functions:
        space = getattr(function, "__globals__", {}) if isinstance(function, FunctionType) else {}
        if str(space.get("__name__", "torch")).partition(".")[0] not in OWN:
            yield space
