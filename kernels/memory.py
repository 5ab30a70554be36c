"""Memory of a process that trains: freed pieces are kept, in one pool, on large pages.

Every step takes the same pieces again. What was given back to the system comes back zeroed, which costs a tenth of a
step; and a chip's steps run in turns in several threads, which would have a pool each. Large pages (2 MiB, where the
system has them on request) save another twentieth of a step whose tensors are large.
"""

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress

M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8  # of glibc's mallopt
LARGE_PAGES = "THP_MEM_ALLOC_ENABLE"  # torch's; read when it first takes memory
# The same for a process that is still to be started: glibc reads them before any thread is there
VARIABLES = {"MALLOC_ARENA_MAX": "1", LARGE_PAGES: "1"}


def keep_memory() -> None:
    """Set up this process; what its user has set himself stays. To be called before torch takes memory.

    For glibc's allocator; others have no effect.
    """
    os.environ.setdefault(LARGE_PAGES, VARIABLES[LARGE_PAGES])
    with suppress(OSError, AttributeError):
        allocator = ctypes.CDLL(None)
        allocator.mallopt(M_TRIM_THRESHOLD, ctypes.c_int(2**31 - 1))
        allocator.mallopt(M_MMAP_MAX, ctypes.c_int(0))
        if "MALLOC_ARENA_MAX" not in os.environ:
            allocator.mallopt(M_ARENA_MAX, ctypes.c_int(1))


@contextmanager
def inherited() -> Iterator[None]:
    """Have processes that are started meanwhile set up from their start on."""
    missing = VARIABLES.keys() - os.environ.keys()
    os.environ |= {name: VARIABLES[name] for name in missing}
    try:
        yield
    finally:
        for name in missing:
            os.environ.pop(name, None)
