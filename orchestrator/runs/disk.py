"""Disk: files that appear whole or not at all, and a full disk that is an error message instead of a loss.

A file is written beside its final name, synced, and renamed over it; the folder is synced after, so that a
crash at any moment leaves the old file or the new one. Assumes that rename within a folder is atomic (POSIX).
"""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from comms.errors import RunError

_HINTS = {
    errno.ENOSPC: ("the disk is full", "free some space, or write to another disk"),
    errno.EDQUOT: ("the disk quota is used up", "free some space, or write to another disk"),
    errno.EROFS: ("the file system is read-only", "write to a disk that is not"),
    errno.EACCES: ("no permission to write", "write to a folder where you may"),
    errno.ENAMETOOLONG: ("the name is too long", "write to a shorter one"),
}


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn the operating system's refusal to write `path` into a RunError; what was there before stays."""
    try:
        yield
    except OSError as error:
        problem, hint = _HINTS.get(error.errno or 0, (str(error.strerror), "write to another folder"))
        raise RunError(
            problem=f"{problem}; what was written earlier is intact", where=str(path), hint=hint
        ) from error


def write_whole(path: Path, data: bytes) -> None:
    """Replace `path` with `data` atomically. Raises RunError where the disk refuses."""
    partial = path.with_name(f".{path.name}.partial")
    with explained(path):
        try:
            with partial.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        sync(path.parent)


def sync(path: Path) -> None:
    """Make what was written to this file or folder survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
