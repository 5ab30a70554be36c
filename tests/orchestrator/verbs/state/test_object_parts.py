"""What code reads, (how a number is kept) x (how it is read): marks change when what a forward returns does."""

import array
import collections
import contextvars
import ctypes
import dataclasses
import functools
import multiprocessing
import operator
import os
import threading
import types
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from comms.errors import PlanError
from orchestrator.verbs.state.python_state import PythonState

OPTIMIZER = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.5)
SCHEDULER = torch.optim.lr_scheduler.ExponentialLR(OPTIMIZER, 0.5)
VARIABLE = contextvars.ContextVar("VARIABLE", default=0.0)
LOCAL = threading.local()
LOCAL.beta = 0.0


class Holding(nn.Module):
    """Returns what `read` finds in `held`."""

    def __init__(self, held: Any, read: Callable[[Any], Any]) -> None:
        super().__init__()
        self.held, self.read = held, read

    def forward(self) -> Any:
        return self.read(self.held)


@dataclasses.dataclass
class Fields:
    beta: float = 0.0
    other: float = 0.0


class Slotted:
    __slots__ = ("beta",)

    def __init__(self) -> None:
        self.beta = 0.0


class Through:
    """As configurations of libraries are: attributes and entries are found by code."""

    def __init__(self) -> None:
        object.__setattr__(self, "_kept", {"beta": 0.0})

    def __getattr__(self, name: str) -> Any:
        return object.__getattribute__(self, "_kept")[name]  # KeyError for all else

    def __setattr__(self, name: str, value: Any) -> None:
        self._kept[name] = value


class Listed(list[float]):
    beta = 0.0


class Meta(type):
    hidden = 0.0

    @property
    def beta(cls) -> float:
        return cls.hidden

    @beta.setter
    def beta(cls, value: float) -> None:
        cls.hidden = value


def config_class() -> Any:
    return type("Config", (), {"beta": 0.0, "__module__": __name__})


HOLDERS: dict[str, Callable[[], Any]] = {
    "a namespace": lambda: types.SimpleNamespace(beta=0.0),
    "a dataclass": Fields,
    "slots": Slotted,
    "__getattr__": Through,
    "a class": config_class,
    "a class with a metaclass": lambda: Meta("Config", (), {"__module__": __name__}),
    "a module": lambda: types.ModuleType("config"),
    "a list": Listed,
    "a function": lambda: functools.wraps(abs)(lambda: 0),
    "a thread's values": lambda: LOCAL,
}


def chain(number: int) -> Callable[[Any], float]:
    def read(held: Any) -> float:
        return float(inner(held))

    inner = chain(number - 1) if number else operator.attrgetter("beta")
    return read


class Property:
    def __init__(self, held: Any) -> None:
        self.inner = held

    @property
    def found(self) -> float:
        return float(self.inner.beta)

    def __float__(self) -> float:
        return self.found


@functools.lru_cache
def remembered(_: int) -> Callable[[Any], Any]:
    return lambda held: held.beta


PART = "be"
READERS: dict[str, Callable[[Any], Any]] = {
    "by name": lambda held: held.beta,
    "getattr": lambda held: getattr(held, "beta", 1.0),
    "a name that is built": lambda held: getattr(held, f"{PART}ta"),
    "a name in a loop": lambda held: sum(getattr(held, name) for name in ("beta",)),
    "eval": lambda held: eval("held.beta * 2", {"held": held}),
    "format": lambda held: float("{0.beta}".format(held)),  # noqa: UP030, UP032
    "twelve functions": chain(12),
    "a property": lambda held: Property(held).found,
    "float()": lambda held: float(Property(held)),  # type: ignore[arg-type]
    "a cached function": lambda held: remembered(1)(held),
    "a partial": functools.partial(lambda name, held: getattr(held, name), "beta"),
}


def require_seen(module: nn.Module, change: Callable[[], object]) -> None:
    """Marks are equal while nothing changes, and differ once the forward returns another number."""
    state = PythonState()
    before, was = state.marks(module, None), module()
    assert state.marks(module, None) == before
    change()
    assert module() != was
    assert state.marks(module, None) != before


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize("holder", HOLDERS)
def test_an_attribute_is_seen_wherever_it_is_and_however_it_is_read(holder: str, read: str) -> None:
    held = HOLDERS[holder]()
    held.beta = 0.0
    require_seen(Holding(held, READERS[read]), lambda: setattr(held, "beta", 1.0))


def nested(depth: int) -> dict[str, Any]:
    found: dict[str, Any] = {"in": 0.0}
    for _ in range(depth):
        found = {"in": found}
    return found


def deepest(held: dict[str, Any]) -> Any:
    found: Any = held
    while isinstance(found, dict):
        found = found["in"]
    return found


def set_deepest(held: dict[str, Any]) -> None:
    while isinstance(held["in"], dict):
        held = held["in"]
    held["in"] = 1.0


class Entries:
    def __init__(self) -> None:
        self.store = {"beta": 0.0}

    def __getitem__(self, name: str) -> float:
        return self.store[name]

    def __iter__(self) -> Any:
        return iter(self.store.values())

    def __bool__(self) -> bool:
        return bool(self.store["beta"])

    def __enter__(self) -> float:
        return self.store["beta"]

    def __exit__(self, *_: object) -> None:
        return None


def entered(held: Any) -> Any:
    with held as found:
        return found


class Beta(float):
    pass


SHARED = multiprocessing.Value("d", 0.0)
RAW = bytearray(2)
TARGET = Fields()
# what holds a number, how it is read, and how it is changed
OTHERS: dict[str, tuple[Callable[[], Any], Callable[[Any], Any], Callable[[Any], object]]] = {
    "a queue": (lambda: collections.deque([0.0]), lambda q: q[-1], lambda q: q.append(1.0)),
    "a default": (lambda: collections.defaultdict(float), lambda d: d.get("a"), lambda d: d.update(a=1.0)),
    "chained": (lambda: collections.ChainMap({"a": 0.0}), lambda d: d["a"], lambda d: d.update(a=1.0)),
    "a user's dict": (lambda: collections.UserDict(a=0.0), lambda d: d["a"], lambda d: d.update(a=1.0)),
    "a context": (lambda: VARIABLE, lambda v: v.get(), lambda v: v.set(1.0)),
    "the environment": (lambda: None, lambda _: os.environ.get("ANNEALED"), lambda _: os.environ.update(ANNEALED="1")),
    "shared memory": (lambda: SHARED, lambda v: v.value, lambda v: setattr(v, "value", 1.0)),
    "ctypes": (lambda: ctypes.c_double(0.0), lambda v: v.value, lambda v: setattr(v, "value", 1.0)),
    "bytes": (lambda: bytearray(3000), lambda v: v[2999], lambda v: v.__setitem__(2999, 1)),
    "a view of bytes": (lambda: memoryview(RAW), lambda v: v[0], lambda v: v.__setitem__(0, 1)),
    "an array": (lambda: array.array("d", [0.0]), lambda v: v[0], lambda v: v.__setitem__(0, 1.0)),
    "numpy": (lambda: np.zeros(200_000), lambda v: float(v[7]), lambda v: v.__setitem__(7, 1.0)),
    "numpy in columns": (lambda: np.zeros((4, 9)).T, lambda v: float(v[7, 1]), lambda v: v.__setitem__((7, 1), 1.0)),
    "numpy of objects": (lambda: np.array([0.0, None]), lambda v: v[0], lambda v: v.__setitem__(0, 1.0)),
    "dates": (lambda: np.zeros(2, "M8[D]"), lambda v: int(v[0].astype(int)), lambda v: v.__setitem__(0, "1971-01-01")),
    "a long list": (lambda: [0.0] * 100_000, lambda v: v[99_999], lambda v: v.__setitem__(99_999, 1.0)),
    "a sign": (lambda: [0.0] * 2, lambda v: str(v[0]), lambda v: v.__setitem__(0, -0.0)),
    "a set": (set, len, lambda v: v.add(3)),
    "a deep dict": (lambda: nested(3000), deepest, set_deepest),
    "entries of an object": (Entries, lambda v: v["beta"], lambda v: v.store.update(beta=1.0)),
    "iterated": (Entries, sum, lambda v: v.store.update(beta=1.0)),
    "a truth": (Entries, lambda v: 1 if v else 2, lambda v: v.store.update(beta=1.0)),
    "entered": (Entries, entered, lambda v: v.store.update(beta=1.0)),
    "asdict": (Fields, lambda v: dataclasses.asdict(v)["beta"], lambda v: setattr(v, "beta", 1.0)),
    "astuple": (Fields, lambda v: dataclasses.astuple(v)[0], lambda v: setattr(v, "beta", 1.0)),
    "vars": (Fields, lambda v: sum(vars(v).values()), lambda v: setattr(v, "beta", 1.0)),
    "a reference": (lambda: weakref.ref(TARGET), lambda v: v().beta, lambda _: setattr(TARGET, "beta", 1.0)),
    "a bound method": (lambda: [0.0], list[float].copy, lambda v: v.append(1.0)),
    "rates": (lambda: OPTIMIZER, lambda v: v.param_groups[0]["lr"], lambda v: v.param_groups[0].update(lr=0.25)),
    "last rates": (lambda: SCHEDULER, lambda v: v.get_last_lr()[0], lambda v: (OPTIMIZER.step(), v.step())),
    "a float's subclass": (lambda: [Beta(0.0)], lambda v: v[0], lambda v: v.__setitem__(0, Beta(1.0))),
    "globals()": (lambda: None, lambda _: globals()["PA" + "RT_OF"], lambda _: globals().update(PART_OF=1.0)),
}  # fmt: skip
PART_OF = 0.0


@pytest.mark.parametrize("kind", OTHERS)
def test_objects_of_libraries_are_looked_into(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANNEALED", "0")
    make, read, change = OTHERS[kind]
    held = make()
    require_seen(Holding(held, read), lambda: change(held))


class Trainer:
    """Holds much that its loss does not read."""

    def __init__(self) -> None:
        self.count, self.log, self.beta = 0, list[float](), 1.0
        self.config = Fields()

    def loss(self, output: torch.Tensor) -> torch.Tensor:
        return output * self.beta


def test_what_code_does_not_read_leads_to_no_capture() -> None:
    trainer, module, state = Trainer(), Holding(Through(), READERS["by name"]), PythonState()
    before = state.marks(module, trainer.loss)
    trainer.count, trainer.config.other = 1, 2.0
    trainer.log.append(0.5)
    assert state.marks(module, trainer.loss) == before
    trainer.beta = 2.0
    assert state.marks(module, trainer.loss) != before


@pytest.mark.parametrize("made", [lambda: iter([1.0]), lambda: (x for x in [1.0]), lambda: map(float, [1])])
def test_what_a_capture_would_use_up_is_refused(made: Callable[[], Any]) -> None:
    with pytest.raises(PlanError, match="which a capture would use up"):
        PythonState().marks(Holding(made(), next), None)
