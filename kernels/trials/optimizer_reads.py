"""What an optimizer's code reads: names in it, and attributes of the parameters that it steps on."""

import inspect
from collections.abc import Iterator, Sequence
from types import CodeType, FunctionType
from typing import Any

import torch

from kernels.optimizers import is_torchs


def names_of(kind: type) -> frozenset[str]:
    """Names and texts in the code of a class that is not torch's, and of functions that it calls."""
    own = [
        f for k in kind.__mro__ if not is_torchs(k) for f in vars(k).values() if isinstance(f, FunctionType)
    ]
    return frozenset(_read(own, set()))


def _read(functions: Sequence[FunctionType], seen: set[int]) -> Iterator[str]:
    for function in map(inspect.unwrap, functions):
        if id(function) in seen or is_torchs(function):
            continue
        seen.add(id(function))
        for code in codes_in(function.__code__):
            yield from code.co_names
            yield from (text for text in code.co_consts if isinstance(text, str))
            called = [function.__globals__.get(name) for name in code.co_names]
            called += inspect.getclosurevars(function).nonlocals.values()
            yield from _read([each for each in called if isinstance(each, FunctionType)], seen)


def codes_in(code: CodeType) -> Iterator[CodeType]:
    """A code object, and those of the functions that are defined in it."""
    yield code
    for each in code.co_consts:
        if isinstance(each, CodeType):
            yield from codes_in(each)


def recording(reads: set[str]) -> type[torch.nn.Parameter]:
    """Parameters that note which attributes are asked for."""

    class Probe(torch.nn.Parameter):
        def __getattribute__(self, name: str) -> Any:
            reads.add(name)
            return super().__getattribute__(name)

        def __len__(self) -> int:
            reads.add("shape")
            return self.shape[0]

    return Probe
