"""Questions about types that a forward asks: `type(x)` of a stand-in is what it is in training.

`isinstance` is right by itself. `type` is a name that code looks up in its module, so modules get one that knows the
answer while a forward is traced; torch's own, which must tell stand-ins apart, keep Python's. So it is with attributes:
`x.__class__` and what stand-ins alone have.
"""

import builtins
import sys
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from types import FunctionType, ModuleType
from typing import Any, TypeAlias

import torch
from torch import nn
from torch._subclasses import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

from comms.errors import CaptureError
from partitioner.capture.forwards.replaced import replaced
from partitioner.capture.source_lines import is_users, running_line

Space: TypeAlias = dict[str, Any]
STAND_INS = (FakeTensor, FunctionalTensor)
UNLIKE = frozenset({"__class__", "fake_mode", "fake_device"})  # attributes that tell a stand-in by
READ = "__getattribute__"
READER = "attribute_in_training"  # a function that stands between who asks for an attribute and what answers
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


class AskedNode:
    """A node of autograd that a forward asked for: it tells all but takes no hooks, which would not run on chips."""

    def __init__(self, node: Any) -> None:
        self._node = node

    def __getattr__(self, name: str) -> Any:
        if name in ("register_hook", "register_prehook"):
            raise CaptureError("a hook on a gradient would not run", running_line(), "leave the hook out")
        found = getattr(self._node, name)
        return tuple((AskedNode(n) if n else n, at) for n, at in found) if name == "next_functions" else found

    def __eq__(self, other: object) -> bool:
        return isinstance(other, AskedNode) and self._node is other._node

    def __hash__(self) -> int:
        return hash(self._node)


def told_type(value: object) -> type:
    """The type of a value, or of what it stands for."""
    if isinstance(value, AskedNode):
        return builtins.type(value._node)
    if not isinstance(value, STAND_INS):
        return builtins.type(value)
    return nn.Parameter if isinstance(value, nn.Parameter) else torch.Tensor


@contextmanager
def types_as_in_training(spaces: Collection[Space]) -> Iterator[None]:
    """Inside the block code of these namespaces (see `spaces_of`) is told the types of what stand-ins stand for."""
    try:
        for space in spaces:
            space["type"] = _Told
        with replaced((kind, READ, _as_in_training(getattr(kind, READ))) for kind in STAND_INS):
            yield
    finally:
        for space in spaces:
            space.pop("type", None)


def _as_in_training(own: Callable[[Any, str], Any]) -> Callable[[Any, str], Any]:
    """Reads an attribute of a stand-in: for code outside of torch that of what it stands for."""

    def attribute_in_training(value: torch.Tensor, name: str) -> Any:
        if name not in UNLIKE or not is_users(sys._getframe(1).f_code.co_filename):
            return own(value, name)
        if name == "__class__":
            return told_type(value)
        raise AttributeError(f"'Tensor' object has no attribute '{name}'")

    return attribute_in_training


def spaces_of(module: nn.Module, loss_fn: Callable[..., Any] | None) -> list[Space]:
    """The namespaces of a model's own classes and loss, and of what they name, as far as that is of no package."""
    return spaces_from(
        [*{kind for part in module.modules() for kind in builtins.type(part).__mro__}, loss_fn]
    )


def spaces_from(code: Iterable[object]) -> list[Space]:
    """The namespaces of these classes and functions, and of what they name."""
    pending = [space for value in code for space in _homes(value)]
    found: dict[int, Space] = {}
    while pending:
        space = pending.pop()
        if id(space) in found or str(space.get("__name__", "")).partition(".")[0] in OWN:
            continue
        found[id(space)] = space
        if "site-packages" not in str(space.get("__file__", "")):
            named = [home for value in list(space.values()) for home in _homes(value)]
            pending += [home for home in named if "site-packages" not in str(home.get("__file__", ""))]
    return [space for space in found.values() if "type" not in space]


def _homes(value: object) -> Iterator[Space]:
    """The namespaces that a function, a class or a module looks names up in."""
    if isinstance(value, FunctionType):
        yield value.__globals__
    elif isinstance(value, builtins.type):
        methods = (getattr(f, "__func__", f) for f in list(vars(value).values()))
        yield from (f.__globals__ for f in methods if isinstance(f, FunctionType))
    elif isinstance(value, ModuleType):
        yield vars(value)
