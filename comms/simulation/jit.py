"""Compiled loops: how the inner loops of full fidelity become machine code, and where that is kept.

numba compiles them on first use (10 to 20 s) and needs no compiler on the machine. Division follows IEEE: a flow
of rate zero ends at infinity.

What was compiled is kept below $XDG_CACHE_HOME/orchestrate (~/.cache/orchestrate), which an installation that
cannot be written to does not hinder. numba keeps what it compiled from a file until that file changes, although
loops in other files may be compiled into it. So the folder is named after the content of all the files with loops,
or with constants that are built into them.
"""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar, cast

import numba
import numpy as np

FunctionT = TypeVar("FunctionT", bound=Callable[..., object])

HERE = Path(__file__).parent
FILES = (*sorted(HERE.glob("*.py")), HERE.parent / "synthesis" / "loops.py")


def cache_folder() -> str:
    """The folder of what these files compile to; where it cannot be written, numba's own choice ("")."""
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in FILES)).hexdigest()
    caches = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not caches.is_absolute():  # unset, or to be ignored by the specification of base directories
        caches = Path.home() / ".cache"
    folder = caches / "orchestrate" / f"loops-{digest[:16]}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return ""
    return str(folder) if os.access(folder, os.W_OK) else ""


FOLDER = cache_folder()


def compiled(function: FunctionT) -> FunctionT:
    """`function` as machine code that Python may call, with the same signature; kept on disk."""
    before, numba.config.CACHE_DIR = numba.config.CACHE_DIR, FOLDER  # type: ignore[attr-defined]
    try:
        return cast(FunctionT, numba.njit(cache=True, error_model="numpy")(function))
    except RuntimeError:  # nowhere to keep it: compiled anew in each process
        return cast(FunctionT, numba.njit(error_model="numpy")(function))
    finally:
        numba.config.CACHE_DIR = before  # type: ignore[attr-defined]


def compiled_inside(function: FunctionT) -> FunctionT:
    """`function` as machine code that only compiled functions call.

    It becomes part of those that are kept. A wrapper that unpacks Python's arguments, and a file of its own, for each
    of the small functions of the event loop were a third of the time it takes to compile.
    """
    options = {"no_cpython_wrapper": True, "no_cfunc_wrapper": True}
    return cast(FunctionT, numba.njit(error_model="numpy", **options)(function))  # type: ignore[call-overload]


@compiled_inside
def wide(number: int) -> int:
    """A number in 64 bits. Functions are compiled anew for each width of their arguments, and for each constant."""
    return np.int64(number)  # type: ignore[return-value]
