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
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar, cast

import numba
import numpy as np
from numba.core.serialize import dumps

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


class _SealedFiles:
    """What numba keeps of one function, a file per signature, with digests: what is damaged is compiled again.

    In place of `numba.core.caching.IndexDataCacheFile`, which runs whatever the bytes say.
    """

    def __init__(self, folder: str, function: str, stamp: object) -> None:
        self._folder, self._function = Path(folder), function
        self._stamp = (numba.__version__, FOLDER or stamp)  # the folder says of which sources

    def load(self, key: object) -> object:
        """What was saved under that key; None where there is nothing, or nothing whole."""
        path = self._path(key)
        try:
            return cast(object, pickle.loads(unsealed(path.name, path.read_bytes())))
        except (OSError, ValueError):
            return None

    def save(self, key: object, data: object) -> None:
        """Whole or not at all; where it cannot be written, the next process compiles again."""
        path = self._path(key)
        content = sealed(path.name, dumps(data))  # type: ignore[no-untyped-call]
        with suppress(OSError), TemporaryDirectory(dir=self._folder) as beside:
            written = Path(beside, path.name)
            written.write_bytes(content)
            written.replace(path)

    def _path(self, key: object) -> Path:
        digest = hashlib.sha256(repr((self._stamp, key)).encode()).hexdigest()
        return self._folder / f"{self._function}.{digest[:32]}.nbc"


def compiled(function: FunctionT) -> FunctionT:
    """`function` as machine code that Python may call, with the same signature; kept on disk."""
    before, numba.config.CACHE_DIR = numba.config.CACHE_DIR, FOLDER  # type: ignore[attr-defined]
    try:
        made: Any = numba.njit(cache=True, error_model="numpy")(function)
        kept, files = made._cache, made._cache._cache_file
        kept._cache_file = _SealedFiles(kept.cache_path, kept._impl.filename_base, files._source_stamp)
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
