"""A borrowed module: its forward runs on other tensors, and afterwards it is what it was, bit for bit.

Every parameter and buffer is replaced wherever a submodule registers it, under however many names, and all that the
submodules hold (attributes, and builtin containers in them at any depth) is put back at the end, after an exception
too. What a forward changed in between is known by name, so that a forward that depends on it can be refused.
Not seen: changes of objects of other kinds, and of what lies outside the module.
"""

from collections import deque
from collections.abc import Iterator, Mapping, MutableMapping, MutableSequence, MutableSet
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from comms.errors import CaptureError

REGISTERED = ("_parameters", "_buffers")  # where a module keeps the tensors that it registers
NUMBERS = (int, float)  # arrays make new ones each time
CONTAINERS = (MutableMapping, MutableSequence, MutableSet)


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
            value = open_.popleft()
            if (
                isinstance(value, nn.Module)
                or not isinstance(value, CONTAINERS)
                or id(value) in self.contents
            ):
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

    def restore(self) -> None:
        """Give everything back."""
        for _, child, before in self.attributes:
            child.__dict__.clear()
            child.__dict__.update(before)
        for _, container, before in self.contents.values():
            if not _differs(container, before):
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


def _differs(container: Any, before: Any) -> bool:
    """Whether a container holds other objects than it did, or holds them in another order."""
    now = container.items() if isinstance(container, MutableMapping) else container
    then = before.items() if isinstance(before, dict) else before
    if len(now) != len(then):
        return True
    pairs = zip(now, then, strict=True)
    if isinstance(before, dict):
        return any(a[0] != b[0] or a[1] is not b[1] for a, b in pairs)
    return any(a is not b and (type(a) not in NUMBERS or type(a) is not type(b) or a != b) for a, b in pairs)


@contextmanager
def borrowed(module: nn.Module) -> Iterator[Borrowed]:
    """Lend a module: what happens to it inside the block is undone at its end."""
    lent = Borrowed(module)
    try:
        yield lent
    finally:
        lent.restore()
