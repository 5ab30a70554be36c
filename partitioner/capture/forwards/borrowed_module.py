"""A borrowed module: its forward runs on other tensors, and afterwards it is what it was, bit for bit.

Every parameter and buffer is replaced wherever a submodule registers it, under however many names, and all that the
submodules hold (attributes, and builtin containers in them at any depth) is put back at the end, after an exception
too. What a forward changed in between is known by name, so that a forward that depends on it can be refused.
Objects with attributes of their own count as containers, and so do arrays of numpy. Not seen: what else objects hold,
and what lies outside the module.
"""

from collections import deque
from collections.abc import Iterator, Mapping, MutableMapping, MutableSequence, MutableSet
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FunctionType, ModuleType
from typing import Any
from weakref import CallableProxyType, ProxyType

import numpy
import torch
from torch import nn

from comms.errors import CaptureError

REGISTERED = ("_parameters", "_buffers")  # where a module keeps the tensors that it registers
NUMBERS = (int, float)  # arrays make new ones each time
CONTAINERS = (MutableMapping, MutableSequence, MutableSet)
LATER = 9_009_000 - 2  # forwards: the next few show what begins late, or at multiples of a number
NUM_LONG = 1_000  # entries of what is lengthened


@dataclass
class Borrowed:
    """What a module held before, object by object."""

    module: nn.Module
    attributes: list[tuple[str, nn.Module, dict[str, Any]]] = field(default_factory=list)
    contents: dict[int, tuple[str, Any, Any]] = field(default_factory=dict)  # by identity of a container
    stand_ins: Mapping[int, torch.Tensor] = field(default_factory=dict)  # by identity of registered tensors

    def __post_init__(self) -> None:
        for path, child in self.module.named_modules():
            self.attributes.append((path, child, dict(child.__dict__)))
            for name, value in child.__dict__.items():
                self._remember(f"{path}.{name}" if path else name, value)

    def _remember(self, name: str, root: Any) -> None:
        """Note the contents of builtin containers; what they contain is only looked into if it is one too."""
        open_: deque[Any] = deque([root])
        while open_:
            value = _container(open_.popleft())
            if value is None or id(value) in self.contents:
                continue
            if isinstance(value, numpy.ndarray):
                self.contents[id(value)] = (name, value, value.copy())
                continue
            copied = dict(value) if isinstance(value, MutableMapping) else list(value)
            self.contents[id(value)] = (name, value, copied)
            open_.extend(copied.values() if isinstance(copied, dict) else copied)

    def replace(self, stand_ins: Mapping[int, torch.Tensor]) -> None:
        """Put other tensors, by identity of the registered ones, in the place of all that are registered."""
        self.stand_ins = stand_ins
        for _, _, held in self.attributes:
            for kind in REGISTERED:
                for name, value in self.contents[id(held[kind])][2].items():
                    if value is not None:
                        held[kind][name] = stand_ins[id(value)]

    def changed(self) -> list[str]:
        """Names of attributes that are other objects than before, and of containers that contain others."""
        found = []
        for path, child, before in self.attributes:
            names = (
                n
                for n in {**before, **child.__dict__}
                if before.get(n, self) is not child.__dict__.get(n, self)
            )
            found += [f"{path}.{name}" if path else name for name in names]
        for name, container, before in self.contents.values():
            if name.rpartition(".")[2] not in REGISTERED and _differs(container, before):
                found.append(name)
        return list(dict.fromkeys(found))

    def require_known(self, *kinds: str) -> None:
        """Refuse that the first forward registers tensors, of these kinds, that were not there before."""
        for path, child, held in self.attributes:
            for kind in kinds:
                new = [name for name in held[kind] if name not in self.contents[id(held[kind])][2]]
                if new:
                    where = path or type(child).__name__
                    problem = f"the first forward makes {new[0]}, which no optimizer knows"
                    raise CaptureError(problem, where, "call the model once before")

    def run_on(self) -> list[str]:
        """As after many more forwards: whole numbers that they count move far, and what they lengthen is long. Returns
        the names of these."""
        counts: list[str] = []
        own = [(path, child.__dict__, before, True) for path, child, before in self.attributes]
        for path, after, before, is_module in (*own, *((*each, False) for each in self.contents.values())):
            if isinstance(after, numpy.ndarray):
                counts += [path] * bool((after > before).any())
                numpy.copyto(after, before + LATER, where=after > before, casting="unsafe")
                continue
            if isinstance(after, MutableSequence) and len(after) > len(before):
                counts.append(path)
                after.extend([after[-1]] * NUM_LONG)
            pairs = after.items() if isinstance(after, MutableMapping) else enumerate(after)
            for key, value in () if isinstance(after, MutableSet) else list(pairs):
                was = before.get(key) if isinstance(before, dict) else [*before[key : key + 1], None][0]
                if _is_whole(was) and _is_whole(value) and value != was:
                    counts.append(f"{path}.{key}".lstrip(".") if is_module else path)
                    after[key] = type(value)(LATER) if value > was else type(value)(-LATER)
        return counts

    def restore(self) -> None:
        """Give everything back."""
        for _, child, before in self.attributes:
            child.__dict__.clear()
            child.__dict__.update(before)
        for _, container, before in self.contents.values():
            if not _differs(container, before):
                continue
            if isinstance(container, numpy.ndarray):
                container[...] = before
                continue
            if hasattr(container, "clear"):
                container.clear()
            else:  # an array of numbers
                del container[:]
            if isinstance(container, MutableMapping):
                container.update(before)
            elif isinstance(container, MutableSequence):
                container.extend(before)
            else:
                container |= set(before)


def _container(value: Any) -> Any:
    """What holds the parts of a value that a forward may change: itself, or its attributes."""
    if isinstance(
        value, ProxyType | CallableProxyType | nn.Module | torch.Tensor | type | FunctionType | ModuleType
    ):
        return None
    if isinstance(value, CONTAINERS) or (isinstance(value, numpy.ndarray) and value.dtype.kind in "biuf"):
        return value
    held = getattr(value, "__dict__", None)
    return held if isinstance(held, dict) else None


def _is_whole(value: Any) -> bool:
    return type(value) is int or (type(value) is float and value.is_integer())


def _differs(container: Any, before: Any) -> bool:
    """Whether a container holds other objects than it did, or holds them in another order."""
    if isinstance(before, numpy.ndarray):
        return not numpy.array_equal(container, before, equal_nan=before.dtype.kind == "f")
    now = list(container.items()) if isinstance(container, MutableMapping) else container
    then = before.items() if isinstance(before, dict) else before
    if len(now) != len(then):
        return True
    pairs = zip(now, then, strict=True)
    if isinstance(before, dict):
        return any(a[0] not in {b[0]} or a[1] is not b[1] for a, b in pairs)  # != of tensors is no answer
    return any(a is not b and (type(a) not in NUMBERS or type(a) is not type(b) or a != b) for a, b in pairs)


@contextmanager
def borrowed(module: nn.Module) -> Iterator[Borrowed]:
    """Lend a module: what happens to it inside the block is undone at its end."""
    lent = Borrowed(module)
    try:
        yield lent
    finally:
        lent.restore()
