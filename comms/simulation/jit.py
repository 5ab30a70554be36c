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
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

import numba
import numpy as np
from numba.core.caching import IndexDataCacheFile

from comms.kept_files import cache_folder, sealed, unsealed

FunctionT = TypeVar("FunctionT", bound=Callable[..., object])

HERE = Path(__file__).parent
FILES = (*sorted(HERE.glob("*.py")), HERE.parent / "synthesis" / "loops.py")


def loops_folder() -> str:
    """The folder of what these files compile to; where it cannot be written, numba's own choice ("")."""
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in FILES)).hexdigest()
    folder = cache_folder() / f"loops-{digest[:16]}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return ""
    return str(folder) if os.access(folder, os.W_OK) else ""


FOLDER = loops_folder()


class _SealedFiles(IndexDataCacheFile):
    """numba's files of one function, with digests: what is damaged is compiled again, never run."""

    def _load_index(self) -> dict[object, str]:
        try:
            version, stamp, names = self._load_data(self._index_name)
        except OSError:
            return {}
        return names if (version, stamp) == (self._version, self._source_stamp) else {}

    def _save_index(self, overloads: dict[object, str]) -> None:
        self._save_data(self._index_name, (self._version, self._source_stamp, overloads))

    def _load_data(self, name: str) -> tuple[Any, ...]:
        content = self._path(name).read_bytes()
        try:
            return cast(tuple[Any, ...], pickle.loads(unsealed(name, content)))
        except ValueError as error:
            raise OSError(str(error)) from error  # which numba takes for a file that is gone

    def _save_data(self, name: str, data: object) -> None:
        with self._open_for_write(self._path(name)) as file:
            file.write(sealed(name, self._dump(data)))  # type: ignore[no-untyped-call]

    def _path(self, name: str) -> Path:
        return Path(self._cache_path, name)


def compiled(function: FunctionT) -> FunctionT:
    """`function` as machine code that Python may call, with the same signature; kept on disk."""
    before, numba.config.CACHE_DIR = numba.config.CACHE_DIR, FOLDER  # type: ignore[attr-defined]
    try:
        made: Any = numba.njit(cache=True, error_model="numpy")(function)
        files = made._cache._cache_file
        base = made._cache._impl.filename_base
        made._cache._cache_file = _SealedFiles(files._cache_path, base, files._source_stamp)  # type: ignore[no-untyped-call]
        return cast(FunctionT, made)
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
