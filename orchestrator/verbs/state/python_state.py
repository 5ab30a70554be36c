"""Python state: marks of all plain values that a model's code and a loss read besides tensors of the model.

A captured graph holds numbers, flags, hooks and functions as they were. Marks are equal as long as those are the same:
attributes of modules, of configurations that they hold, of their classes, what functions close over, their defaults,
and globals that their code names. Where code makes names as it runs, all attributes count. Code of torch, numpy and
Python's library is taken to read nothing but what its objects hold; what can be seen in no way is known by identity.
"""

import collections
import functools
import operator
import os
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.parameter import is_lazy

from comms.errors import PlanError
from kernels.optimizers import own_attributes, require_own_step
from orchestrator.planning.optimizer_checks import HOOKS
from orchestrator.verbs.state.code_reads import CodeReads, Place, reads_of
from orchestrator.verbs.state.object_parts import (
    LIBRARIES,
    MAX_PLAIN,
    NAMESPACES,
    OWN_PACKAGES,
    Seen,
    attributes,
    base_value,
    in_installed,
    is_installed,
    is_library,
    library_parts,
    made_of,
    plain_mark,
    raw_mark,
    reduced,
    root_of,
    settings_of_groups,
)

Look: TypeAlias = Callable[[Any], Seen]

ATOMS = frozenset({int, float, bool, str, bytes, complex, type(None), torch.dtype, torch.device, range})
ELSEWHERE = frozenset(
    {"_parameters", "_buffers", "training"}
)  # of a model's modules: watched as values and modes
CHUNK = 4096
CONTAINERS = (dict, list, tuple, set, frozenset)
EMPTY = frozenset({dict, collections.OrderedDict, set})  # left out where they are
QUIET = LIBRARIES | OWN_PACKAGES  # code that is taken to read nothing of the user's
MADE = frozenset({"__init__", "__new__", "__post_init__"})  # run where code makes an instance
KEPT = frozenset({
    "__setattr__", "__delattr__", "__init_subclass__", "__set_name__", "__del__", "__getstate__", "__setstate__",
    "__reduce__", "__reduce_ex__", "__deepcopy__", "__copy__", "__getnewargs__", "__getnewargs_ex__",
    "__class_getitem__", "__sizeof__", "__dir__",
})  # fmt: skip
ATTRIBUTES = frozenset({"__getattr__", "__getattribute__"})  # which may read any other attribute
ITEMS = ATTRIBUTES | {"__getitem__", "__iter__", "__float__", "__int__", "__bool__"}
METHODS = (types.FunctionType, staticmethod, classmethod, property)
CODE = (types.FunctionType, types.ModuleType, type)
SILENT_BASES = frozenset({"builtins", "abc", "typing", "enum", "collections", "_collections_abc"})


class KindOf:
    """A class as that of an instance, which was made before: its `__init__` is not run again."""

    __slots__ = ("kind",)

    def __init__(self, kind: type) -> None:
        self.kind = kind


class PythonState:
    """Marks what code reads: of a model and its loss, or of an optimizer. What was marked is kept alive, so that no
    address is used twice."""

    def __init__(self) -> None:
        self._kept: dict[int, object] = {}
        self._turns: dict[int, int] = {}
        self._alive: list[object] = []  # during a walk: no other object gets the address of one that was seen
        self._own: set[int] = set()
        # attributes that code names, or that torch asks for: others are not read
        self._names = {
            "forward",
            "__call__",
            "step",
            "backward",
            "setup_context",
            "_backward_fn",
            "_setup_context_fn",
        }
        self._is_open = False  # some code makes names as it runs
        self._reads: dict[tuple[int, int], CodeReads] = {}
        self._kinds: dict[type, KindOf] = {}
        self._named: dict[object, tuple[object, list[Place]]] = {}
        self._looks: dict[type, Look] = {KindOf: self._kind_of}

    def marks(self, model: nn.Module, loss_fn: Callable[..., Any] | None) -> tuple[object, ...]:
        """Equal (and hashable) while everything that is read is the same. Raises PlanError."""
        named = [*model.named_parameters(), *model.named_buffers()]
        if lazy := [name for name, value in named if is_lazy(value)]:
            problem = f"{lazy[0]} has no shape before the model's first forward"
            raise PlanError(problem, type(model).__name__, "call model(**batch) once, then distribute")
        values = [value for _, value in named]
        self._own = {id(v) for v in values}
        modules = list(model.modules())

        def walk() -> tuple[object, ...]:
            self._turns = {id(module): turn for turn, module in enumerate(modules)}
            found: list[object] = []
            for module in modules:
                mark, parts = self._module(module, ELSEWHERE)
                found.append(mark)
                self._walk(parts, found)
            self._walk([self._wanted(vars(value)) for value in values if vars(value)], found)
            self._walk([loss_fn], found)
            return tuple(found)

        return self._settled(walk)

    def _settled(self, walk: Callable[[], tuple[object, ...]]) -> tuple[object, ...]:
        """What a walk finds once it meets no code that names more."""
        while True:
            known = len(self._names), self._is_open
            self._alive.clear()
            found = walk()
            self._alive.clear()
            if known == (len(self._names), self._is_open):
                return found

    def values(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, object]:
        """Marks of parameters, buffers, states and of what the optimizer holds besides. Raises PlanError."""
        require_own_step(optimizer)
        named = [*model.named_parameters(), *model.named_buffers()]
        seen: dict[str, object] = {name: _written(value) for name, value in named}
        for name, param in model.named_parameters():
            own = optimizer.state.get(param, {})
            marks = tuple((k, _written(v) if isinstance(v, torch.Tensor) else v) for k, v in own.items())
            seen[f"the optimizer's state of {name}"] = marks
        held = own_attributes(optimizer), *(optimizer.__dict__.get(name) for name in HOOKS)

        def walk() -> tuple[object, ...]:
            self._turns = {}
            found: list[object] = []
            self._walk([self._instance_of(type(optimizer)), *held], found)
            return tuple(found)

        seen["what the optimizer holds"] = self._settled(walk)
        return seen

    def _walk(self, roots: Sequence[object], found: list[object]) -> None:
        """Add marks of objects and of all that they hold, each once; a number of parts tells what belongs to what."""
        open_, turns, looks, alive = list(reversed(roots)), self._turns, self._looks, self._alive
        while open_:
            value = open_.pop()
            kind = type(value)
            if kind in ATOMS:
                found += kind, value or repr(value)  # -0.0 is not 0.0
                continue
            if (turn := turns.get(id(value))) is not None:
                found.append(turn)
                continue
            turns[id(value)] = len(turns)
            alive.append(value)
            look = looks.get(kind)
            if look is None:
                look = looks[kind] = self._look_for(kind)
            mark, parts = look(value)
            found += mark, len(parts)
            open_ += reversed(parts)

    def _look_for(self, kind: type) -> Look:
        """How to look at objects of a class."""
        table: Sequence[tuple[Any, Any]] = (
            (torch.Tensor, self._tensor),
            (nn.Module, functools.partial(self._module, skipped=frozenset())),
            (types.ModuleType, self._module_of_code),
            (type, self._class),
            (types.FunctionType, self._function),
            (types.BuiltinFunctionType, self._builtin),
            (CONTAINERS, self._entries),
        )
        return next((look for kinds, look in table if issubclass(kind, kinds)), self._object)

    def _same(self, value: object) -> int:
        self._kept.setdefault(id(value), value)
        return id(value)

    def _instance_of(self, kind: type) -> KindOf:
        return self._kinds.setdefault(kind, KindOf(kind))

    def _wanted(self, held: Mapping[str, Any]) -> dict[str, Any]:
        return dict(held) if self._is_open else {n: v for n, v in held.items() if n in self._names}

    def _tensor(self, value: torch.Tensor) -> Seen:
        return id(value) if id(value) in self._own else _tensor_mark(value), ()

    def _module(self, module: nn.Module, skipped: frozenset[str]) -> Seen:
        found = {}
        for name, value in module.__dict__.items():
            kind: Any = type(value)
            if name in skipped or (kind in EMPTY and not value):
                continue
            if kind in ATOMS or name in self._names or not _is_iterator(kind):
                found[name] = value
        return tuple(found), [self._instance_of(type(module)), *found.values()]

    def _builtin(self, value: types.BuiltinFunctionType) -> Seen:
        owner = value.__self__
        if owner is None or isinstance(owner, types.ModuleType | type):
            return self._same(value), ()
        return value.__name__, (owner,)  # a method of what it is bound to

    def _entries(self, value: Any) -> Seen:  # noqa: ANN401
        kind = type(value)
        if len(value) > MAX_PLAIN and (raw := plain_mark(value)) is not None:
            return (kind, raw), ()
        base = next(base for base in CONTAINERS if issubclass(kind, base))
        parts = (
            [x for each in dict.items(value) for x in each] if base is dict else list(base.__iter__(value))
        )
        if kind not in CONTAINERS:
            held = attributes(value) if is_library(kind) else self._wanted(attributes(value))
            factory = value.default_factory if isinstance(value, collections.defaultdict) else None
            parts += self._instance_of(kind), factory, held
        return kind, parts

    def _object(self, value: Any) -> Seen:  # noqa: ANN401
        kind: Any = type(value)
        if (made := made_of(value)) is not None:
            return kind, made
        if is_library(kind) and kind.__name__ not in NAMESPACES:
            self._is_open |= kind in (operator.attrgetter, operator.methodcaller)
            seen = library_parts(value)
            return (self._same(value), ()) if seen is None else ((kind, seen[0]), seen[1])
        held = attributes(value)
        mark, more = (not held and (raw_mark(value) or reduced(value))) or (None, ())
        if _is_read_by_name(kind):
            held = self._wanted(held)
        parts = [self._instance_of(kind), *held.values(), *more, *base_value(value)]
        if isinstance(value, torch.optim.Optimizer):
            parts += settings_of_groups(value)
        return (self._same(value), mark, tuple(held)), parts

    def _function(self, value: types.FunctionType) -> Seen:
        cells = zip(value.__code__.co_freevars, value.__closure__ or (), strict=True)
        parts = [
            self._instance_of(held) if name == "__class__" and isinstance(held, type) else held
            for name, cell in cells for held in _held(cell)
        ]  # fmt: skip
        parts += value.__defaults__, value.__kwdefaults__, value.__dict__.get("__wrapped__")
        space = value.__globals__
        if str(space.get("__name__")).partition(".")[0] not in QUIET:
            reads = self._reads_of(value)
            parts += [at.get(name) for at, name in reads.places]
            if not in_installed(space) and {"environ", "getenv"} & reads.names:
                parts.append(os.environ)
            parts.append(self._wanted(value.__dict__))
            if reads.reads_all_globals:
                parts.append({n: v for n, v in space.items() if type(v) in ATOMS or n in self._names})
        return self._same(value.__code__), parts

    def _reads_of(self, function: types.FunctionType) -> CodeReads:
        key = self._same(function.__code__), self._same(function.__globals__)
        if key not in self._reads:
            self._reads[key] = reads = reads_of(function)
            self._names |= reads.names
            self._is_open |= reads.is_open and not in_installed(function.__globals__)
        return self._reads[key]

    def _module_of_code(self, module: types.ModuleType) -> Seen:
        """A module as a configuration."""
        if module.__name__.partition(".")[0] in QUIET:
            return self._same(module), ()

        def is_read(name: str, value: object) -> bool:
            return name in self._names or (self._is_open and name[:2] != "__" and type(value) in ATOMS)

        parts = self._read_in(module, (vars(module),), is_read)
        if not in_installed(vars(module)):
            return self._same(module), parts
        code = [each for each in parts if isinstance(each, CODE)]  # which ones, but not what they read
        return (self._same(module), *map(self._same, code)), [
            each for each in parts if not isinstance(each, CODE)
        ]

    def _kind_of(self, holder: KindOf) -> Seen:
        return self._members(holder.kind, is_made=False)

    def _class(self, kind: type) -> Seen:
        if is_installed(kind):
            return self._same(kind), ()
        return self._members(kind, is_made=not issubclass(kind, nn.Module))

    def _members(self, kind: type, *, is_made: bool) -> Seen:
        """Methods and values of a class that code names or that Python calls."""
        if is_library(kind) or root_of(kind) in OWN_PACKAGES:
            return self._same(kind), ()
        spaces = tuple(vars(each) for each in kind.__mro__ if not is_library(each))
        foreign = is_installed(kind)

        def is_read(name: str, value: object) -> bool:
            if name[:2] != "__" or name[-2:] != "__":
                return name in self._names or (self._is_open and not (foreign and isinstance(value, METHODS)))
            is_code = isinstance(value, types.FunctionType) and value.__code__.co_filename != "<string>"
            return is_code and not foreign and name not in KEPT and (is_made or name not in MADE)

        parts = self._read_in((kind, is_made), spaces, is_read)
        meta = type(kind)
        return self._same(kind), [*parts, self._instance_of(meta)] if not is_library(meta) else parts

    def _read_in(
        self, owner: object, spaces: Sequence[Mapping[str, Any]], is_read: Callable[[str, object], bool]
    ) -> list[object]:
        """Values of namespaces that are read; which names those are is kept until there are more."""
        version = len(self._names), self._is_open, *map(len, spaces)
        known = self._named.get(owner)
        if known is None or known[0] != version:
            places = [(space, n) for space in spaces for n, v in list(space.items()) if is_read(n, v)]
            known = self._named[owner] = version, places
        return [space.get(name) for space, name in known[1]]


def checksum(value: torch.Tensor) -> int:
    """A number that any write changes, also one through `.data`, which no version counts, and any other order."""
    flat = value.detach().reshape(-1)
    if flat.is_complex():
        flat = torch.view_as_real(flat).reshape(-1)
    size = flat.element_size()
    if flat.numel() > 1 and not (flat.numel() * size % 8 or flat.storage_offset() * size % 8):
        size = 8  # several numbers at once
    flat = flat.contiguous().view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[size])
    rows, rest = divmod(flat.numel(), CHUNK)
    factors = _factors(max(rows, CHUNK), flat.device)
    total = (flat[rows * CHUNK :] * factors[:rest]).sum()
    if rows:
        sums = (flat[: rows * CHUNK].view(rows, CHUNK) * factors[:CHUNK]).sum(1)
        total = total * 3 + (sums * factors[:rows].flip(0)).sum()
    return int(total)


@functools.lru_cache(maxsize=64)
def _factors(count: int, device: torch.device) -> torch.Tensor:
    """Odd numbers; products and sums of whole numbers wrap around."""
    generator = torch.Generator().manual_seed(0)
    return (torch.randint(-(2**62), 2**62, (count,), generator=generator) * 2 + 1).to(device)


def _written(value: torch.Tensor) -> tuple[object, ...]:
    return id(value), value.data_ptr(), value._version, checksum(value)


def _tensor_mark(value: torch.Tensor) -> object:
    if isinstance(value, FakeTensor):
        raise PlanError("code of the model keeps a value of a forward outside of it", "forward",
                        "keep it in ctx, in a buffer, or pass it on")  # fmt: skip
    about = (id(value), tuple(value.shape), value.dtype)
    is_dense = value.layout is torch.strided and not value.is_meta and not value.is_quantized
    return (*about, checksum(value)) if is_dense else about


def _held(cell: types.CellType) -> Iterator[object]:
    try:
        yield cell.cell_contents
    except ValueError:  # not assigned yet
        return


@functools.lru_cache(maxsize=4096)
def _is_read_by_name(kind: type) -> bool:
    """Whether only code of the user's reads attributes of instances, by their own names."""
    bases = [each for each in kind.__mro__ if is_library(each)]
    if any(root_of(each) not in SILENT_BASES or each.__name__ == "UserDict" for each in bases):
        return False
    own = {name for each in kind.__mro__ if each not in bases for name in vars(each)}
    return not own & (ITEMS if is_installed(kind) else ATTRIBUTES)


@functools.lru_cache(maxsize=4096)
def _is_iterator(kind: type) -> bool:
    return hasattr(kind, "__next__")
