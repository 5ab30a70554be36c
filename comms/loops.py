"""Loops: how the inner loops of full fidelity are compiled.

numba compiles them on first use (some seconds, kept on disk beside the source) and needs no compiler on the
machine. Division follows IEEE: a flow of rate zero ends at infinity.
"""

from collections.abc import Callable
from typing import TypeVar, cast

from numba import njit

FunctionT = TypeVar("FunctionT", bound=Callable[..., object])


def compiled(function: FunctionT) -> FunctionT:
    """`function` as machine code, with the same signature."""
    return cast(FunctionT, njit(cache=True, error_model="numpy")(function))
