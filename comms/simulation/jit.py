"""Loops: how the inner loops of full fidelity are compiled.

numba compiles them on first use (some seconds, kept on disk) and needs no compiler on the machine. Division
follows IEEE: a flow of rate zero ends at infinity.

numba keeps what it compiled from a file until that file changes, although loops in other files may be compiled
into it. So what is kept lies in a folder named after the content of all the files with
loops, or with constants that are built into them.
"""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar, cast

import numba

FunctionT = TypeVar("FunctionT", bound=Callable[..., object])

HERE = Path(__file__).parent
FILES = (
    *sorted(HERE.glob("*.py")),
    HERE.parent / "synthesis" / "path_tree.py",
    HERE.parent / "synthesis" / "timetable_loops.py",
)


def _kept_in() -> str:
    """The folder of what these files compile to; where it cannot be written, numba's own choice ("")."""
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in FILES)).hexdigest()
    folder = HERE / "__pycache__"
    return str(folder / f"loops-{digest[:16]}") if os.access(folder, os.W_OK) else ""


FOLDER = _kept_in()


def compiled(function: FunctionT) -> FunctionT:
    """`function` as machine code, with the same signature."""
    before, numba.config.CACHE_DIR = numba.config.CACHE_DIR, FOLDER  # type: ignore[attr-defined]
    try:
        return cast(FunctionT, numba.njit(cache=True, error_model="numpy")(function))
    except RuntimeError:  # nowhere to keep it: compiled anew in each process
        return cast(FunctionT, numba.njit(error_model="numpy")(function))
    finally:
        numba.config.CACHE_DIR = before  # type: ignore[attr-defined]
