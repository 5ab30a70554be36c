"""Object parts: what an object of Python's library, of torch or of numpy holds, as other objects and as bytes.

Attributes, entries, what is referred to, raw memory, and else what would be pickled. Of some modules objects are
taken to hold nothing that a forward computes with: locks, streams, loggers, generators of random numbers.
"""

import collections.abc
import contextvars
import functools
import hashlib
import marshal
import sys
import threading
import types
import warnings
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch._library.custom_ops import CustomOpDef

from comms.errors import PlanError

Seen: TypeAlias = tuple[object, Sequence[object]]  # a mark, and the objects that are looked at besides

LIBRARIES = frozenset({"torch", "numpy", *sys.stdlib_module_names}) - {"__main__"}
OWN_PACKAGES = frozenset({"comms", "kernels", "partitioner", "orchestrator"})
NAMESPACES = frozenset({"SimpleNamespace", "Namespace"})  # of Python's library, with a user's attributes
OF_TORCH = (
    "torch.optim",
    "torch.distributions",
    "torch.amp",
    "torch.cuda.amp",
)  # objects that are looked into
NOTHING = frozenset({
    "_abc", "_frozen_importlib", "_frozen_importlib_external", "_io", "_random", "_socket", "_thread", "abc", "ast",
    "asyncio", "concurrent", "dataclasses", "importlib", "inspect", "io", "logging", "multiprocessing", "random", "re",
    "select", "socket", "sqlite3", "ssl", "subprocess", "tempfile", "threading", "traceback", "typing", "unittest",
    "warnings", "zipimport",
})  # fmt: skip
SHARED = "multiprocessing.sharedctypes"
CACHED = type(functools.lru_cache(abs))
BASES = (int, float, complex, str, bytes)
MAX_PLAIN, MAX_RAW = 16, 64  # entries, bytes: of more, only a digest is kept


def root_of(value: object) -> str:
    """The package that a class is of, or what has a `__module__`."""
    found = getattr(value, "__module__", None)
    return found.partition(".")[0] if isinstance(found, str) else "torch"


def is_library(kind: type) -> bool:
    """Whether code of a class is taken to read nothing of the user's."""
    return root_of(kind) in LIBRARIES


@functools.lru_cache(maxsize=4096)
def is_installed(kind: type) -> bool:
    """Whether a class is of an installed package."""
    return in_installed(vars(sys.modules.get(kind.__module__, sys)))


def in_installed(space: Mapping[str, Any]) -> bool:
    """Whether a module's namespace is of an installed package."""
    path = str(space.get("__file__", ""))
    return "site-packages" in path or "dist-packages" in path


def digest(raw: bytes | memoryview) -> bytes:
    """Bytes, or what stands for many."""
    return bytes(raw) if len(raw) <= MAX_RAW else hashlib.blake2b(raw, digest_size=16).digest()


def plain_mark(value: Any) -> bytes | None:  # noqa: ANN401
    """Of a large container of numbers and text, at any depth: all of it."""
    try:
        return digest(
            marshal.dumps(value, 2)
        )  # of a later version, it also depends on who else holds an entry
    except ValueError:
        return None


def attributes(value: object) -> dict[str, Any]:
    """What an instance holds by name, without running code of its class."""
    try:
        held = object.__getattribute__(value, "__dict__")
    except Exception:  # it has none, or its class has another
        held = {}
    found = dict(held) if isinstance(held, dict) else {}
    kind: Any = type(value)
    for name, slot in slots(kind):
        try:
            found[name] = slot.__get__(value)
        except AttributeError:  # not assigned yet
            continue
    return found


@functools.lru_cache(maxsize=4096)
def slots(kind: type) -> tuple[tuple[str, Any], ...]:
    """Members of `__slots__`, named as code has them."""
    return tuple(
        (name, value)
        for each in kind.__mro__
        if not is_library(each)
        for name, value in vars(each).items()
        if isinstance(value, types.MemberDescriptorType)
    )


def raw_mark(value: Any) -> Seen | None:  # noqa: ANN401
    """Of an array or a buffer: its memory."""
    try:
        view = memoryview(value)
    except (TypeError, ValueError, BufferError):
        return None
    about = (view.format, view.shape, str(getattr(value, "dtype", "")))
    if "O" in view.format:
        return about, [value.tolist()]
    return (*about, digest(view if view.c_contiguous else view.tobytes())), list(attributes(value).values())


def made_of(value: Any) -> tuple[object, ...] | None:  # noqa: ANN401
    """What a method, a partial, a property or a reference is made of."""
    if isinstance(value, types.MethodType):
        return value.__func__, value.__self__
    if isinstance(value, functools.partial):
        return value.func, value.args, value.keywords, value.__dict__
    if isinstance(value, property):
        return (value.fget,)
    if isinstance(value, functools.cached_property):
        return (value.func,)
    if isinstance(value, staticmethod | classmethod):
        return (value.__func__,)
    if isinstance(value, weakref.ReferenceType):
        return (value(),)
    if isinstance(value, contextvars.ContextVar):
        return (value.get(None),)
    if isinstance(value, threading.local):
        return (dict(value.__dict__),)
    return None


def library_parts(value: Any) -> Seen | None:  # noqa: ANN401
    """What an object of a library holds; None: nothing that can be seen, or that matters."""
    kind = type(value)
    module = str(getattr(kind, "__module__", ""))
    root = module.partition(".")[0]
    if isinstance(value, CustomOpDef):
        return "operator", [value._init_fn, value._backward_fn, value._setup_context_fn]
    if isinstance(value, torch.optim.Optimizer):
        return "optimizer", [settings_of_groups(value)]
    if (root in NOTHING and module != SHARED) or (root == "torch" and not module.startswith(OF_TORCH)):
        return None
    if kind is CACHED and in_installed(getattr(value.__wrapped__, "__globals__", {})):
        return None  # of packages: what they ask of the installation, once
    if hasattr(kind, "__next__"):
        raise PlanError(f"code of the model or the loss reads a {kind.__name__}, which a capture would use up",
                        "forward", "read a list, or pass what it gives as an entry of the batch")  # fmt: skip
    if (raw := raw_mark(value)) is not None:
        return raw
    held = list(attributes(value).items())
    if isinstance(value, collections.abc.Mapping):
        return len(value), [*held, *value.items()]
    if isinstance(value, collections.abc.Collection):
        return len(value), [*held, *value]
    if not held:
        return reduced(value)
    return tuple(name for name, _ in held), [each for _, each in held]


def settings_of_groups(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """The groups without their parameters."""
    return [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]


def reduced(value: Any) -> Seen | None:  # noqa: ANN401
    """What would be pickled; None where that is the class alone."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made = value.__reduce_ex__(4)
    except Exception:  # whatever objects raise that cannot be pickled
        return None
    if isinstance(made, str) or (made[1] == (type(value),) and not any(made[2:])):
        return None
    return len(made), [list(part) if isinstance(part, Iterator) else part for part in made]


def base_value(value: object) -> tuple[object, ...]:
    """The number or text that an instance of a subclass is."""
    base: Any = next((base for base in BASES if isinstance(value, base)), None)
    return tuple(base.__getnewargs__(value)) if base else ()
