"""Python state: marks of all plain values that a model's code and a loss read besides tensors of the model.

A captured graph holds numbers, flags, hooks and functions as they were. Marks are equal as long as those are the same:
attributes of modules, of configurations that they hold, of their classes, what functions close over, their defaults,
and globals that their code names. Code of torch and of Python's library is taken to read nothing.
"""

import functools
import sys
from collections.abc import Callable, Iterator, Mapping
from types import BuiltinFunctionType, CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from comms.errors import PlanError
from kernels.optimizers import own_attributes
from orchestrator.planning.job_parts import HOOKS

Place: TypeAlias = tuple[Mapping[str, Any], str]  # a namespace and a name in it

ATOMS = frozenset({int, float, bool, str, bytes, complex, type(None), torch.dtype, torch.device, range})
ELSEWHERE = frozenset(
    {"_parameters", "_buffers", "training"}
)  # of a model's modules: watched as values and modes
MAX_DEPTH, MAX_LENGTH, MAX_BYTES, CHUNK = 6, 4096, 1 << 20, 4096
LIBRARIES = frozenset({"torch", *sys.stdlib_module_names}) - {"__main__"}
NAMESPACES = frozenset(
    {"SimpleNamespace", "Namespace"}
)  # of Python's library, holding what a user puts there


class PythonState:
    """Marks what code reads: of a model and its loss, or of an optimizer. What was marked is kept alive, so that no
    address is used twice."""

    def __init__(self) -> None:
        self._kept: dict[int, object] = {}
        self._turns: dict[int, int] = {}
        self._own: set[int] = set()
        self._names = {"forward", "__call__", "step"}  # attributes that code names: others are not read
        self._places: dict[object, tuple[int, list[Place]]] = {}

    def marks(self, model: nn.Module, loss_fn: Callable[..., Any] | None) -> tuple[object, ...]:
        """Equal (and hashable) while everything that is read is the same."""
        self._own = {id(v) for v in (*model.parameters(), *model.buffers())}
        modules = list(model.modules())

        def walk() -> tuple[object, ...]:
            self._turns = {id(module): turn for turn, module in enumerate(modules)}
            return *(self._module(module, ELSEWHERE) for module in modules), self._mark(loss_fn, 0)

        return self._settled(walk)

    def _settled(self, walk: Callable[[], tuple[object, ...]]) -> tuple[object, ...]:
        """What a walk finds once it meets no code that names more."""
        while True:
            known = len(self._names)
            found = walk()
            if known == len(self._names):
                return found

    def values(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, object]:
        """Marks of parameters, buffers, states and of what the optimizer holds besides. Raises PlanError."""
        named = [*model.named_parameters(), *model.named_buffers()]
        if lazy := [name for name, value in named if is_lazy(value)]:
            problem = f"{lazy[0]} has no shape before the model's first forward"
            raise PlanError(problem, type(model).__name__, "call model(**batch) once, then distribute")
        seen: dict[str, object] = {name: _written(value) for name, value in named}
        for name, param in model.named_parameters():
            own = optimizer.state.get(param, {})
            marks = tuple((k, _written(v) if isinstance(v, torch.Tensor) else v) for k, v in own.items())
            seen[f"the optimizer's state of {name}"] = marks
        held = own_attributes(optimizer), *(optimizer.__dict__.get(name) for name in HOOKS)

        def walk() -> tuple[object, ...]:
            self._turns = {}
            return self._class(type(optimizer)), *(self._mark(value, 0) for value in held)

        seen["what the optimizer holds"] = self._settled(walk)
        return seen

    def _module(self, module: nn.Module, skipped: frozenset[str]) -> tuple[object, ...]:
        found: list[object] = [self._class(type(module))]
        for name, value in module.__dict__.items():
            if name not in skipped:
                if type(value) in ATOMS:
                    found += (name, type(value), value)
                elif not (isinstance(value, dict) and not value):
                    found += (name, self._mark(value, 1))
        return tuple(found)

    def _same(self, value: object) -> int:
        self._kept.setdefault(id(value), value)
        return id(value)

    def _mark(self, value: Any, depth: int) -> object:  # noqa: ANN401
        kind = type(value)
        if kind in ATOMS:
            return kind, value
        if isinstance(value, torch.Tensor):
            return id(value) if id(value) in self._own else _tensor_mark(value)
        if id(value) in self._turns:
            return "again", self._turns[id(value)]
        self._turns[id(value)] = len(self._turns)
        if depth > MAX_DEPTH or isinstance(value, ModuleType | type | BuiltinFunctionType):
            return self._same(value)
        if isinstance(value, dict | list | tuple | set | frozenset):
            return self._entries(value, depth + 1)
        if isinstance(value, nn.Module):
            return self._module(value, frozenset())
        if isinstance(value, FunctionType):
            return self._function(value, depth + 1)
        if (parts := _parts(value)) is not None:
            return kind, *(self._mark(part, depth + 1) for part in parts)
        if hasattr(value, "tobytes") and getattr(value, "nbytes", 0) <= MAX_BYTES:
            return str(value.dtype), str(getattr(value, "shape", "")), value.tobytes()  # numpy's
        return self._object(value, depth + 1)

    def _entries(self, value: Any, depth: int) -> object:  # noqa: ANN401
        if len(value) > MAX_LENGTH:
            return self._same(value), len(value)
        if isinstance(value, dict):
            return tuple((self._mark(k, depth), self._mark(v, depth)) for k, v in list(value.items()))
        return type(value), tuple(self._mark(each, depth) for each in list(value))

    def _object(self, value: object, depth: int) -> object:
        kind = type(value)
        if _is_library(kind) and kind.__name__ not in NAMESPACES:
            return self._same(value)
        named = {n: getattr(value, n) for n in _slots(kind) if hasattr(value, n)}
        named |= getattr(value, "__dict__", {})
        own = tuple((n, self._mark(v, depth)) for n, v in named.items() if n in self._names)
        return self._same(value), self._class(kind), own

    def _function(self, value: FunctionType, depth: int) -> object:
        if _is_library(value):
            return self._same(value)
        if value not in self._places:
            names, places = _reads(value)
            self._names |= names
            self._places[value] = 0, places
        held = [cell.cell_contents for cell in value.__closure__ or () if _is_full(cell)]
        held += [value.__defaults__, value.__kwdefaults__]
        held += [space.get(name) for space, name in self._places[value][1]]
        return self._same(value), tuple(self._mark(each, depth) for each in held)

    def _class(self, kind: type) -> object:
        """Methods and values of a class that code names."""
        if _is_library(kind) or id(kind) in self._turns:
            return self._same(kind)
        self._turns[id(kind)] = len(self._turns)
        if self._places.get(kind, (0, []))[0] != len(self._names):
            spaces: list[Mapping[str, Any]] = [vars(each) for each in kind.__mro__ if not _is_library(each)]
            places = [(space, n) for space in spaces for n in space if n in self._names]
            self._places[kind] = len(self._names), places
        return self._same(kind), tuple(self._mark(space.get(n), 1) for space, n in self._places[kind][1])


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
    about = (id(value), tuple(value.shape), value.dtype)
    is_dense = value.layout is torch.strided and not value.is_meta and not value.is_quantized
    return (*about, checksum(value)) if is_dense else about


def _is_library(value: object) -> bool:
    return (getattr(value, "__module__", None) or "torch").partition(".")[0] in LIBRARIES


def _is_full(cell: CellType) -> bool:
    try:
        return cell.cell_contents is not cell
    except ValueError:  # not assigned yet
        return False


def _slots(kind: type) -> Iterator[str]:
    for each in kind.__mro__:
        slots = vars(each).get("__slots__", ())
        yield from (slots,) if isinstance(slots, str) else slots


def _codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for each in code.co_consts:
        if isinstance(each, CodeType):
            yield from _codes(each)


def _parts(value: Any) -> tuple[object, ...] | None:  # noqa: ANN401
    """What a method, a partial or a property is made of."""
    if isinstance(value, MethodType):
        return value.__func__, value.__self__
    if isinstance(value, functools.partial):
        return value.func, value.args, value.keywords
    if isinstance(value, property | functools.cached_property):
        return (value.fget if isinstance(value, property) else value.func,)
    return (value.__func__,) if isinstance(value, staticmethod | classmethod) else None


def _reads(function: FunctionType) -> tuple[set[str], list[Place]]:
    """The attributes that code names, also by `getattr`, and where it finds values by name."""
    codes = list(_codes(function.__code__))
    names = {n for code in codes for n in code.co_names}
    space: Mapping[str, Any] = function.__globals__
    places = [(space, n) for n in sorted(names) if n in space]
    for module in [space[n] for _, n in places if isinstance(space[n], ModuleType)]:
        if module.__name__.partition(".")[0] not in LIBRARIES:
            places += [(vars(module), n) for n in sorted(names) if n in vars(module)]
    places = [(at, n) for at, n in places if not isinstance(at[n], ModuleType | type)]
    return names | {c for code in codes for c in code.co_consts if isinstance(c, str)}, places
