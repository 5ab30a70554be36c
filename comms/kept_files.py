"""Kept files: where results are kept between commands, and how a damaged or misplaced one is known from a whole one."""

import hashlib
import os
from pathlib import Path

_NUM_BYTES = hashlib.sha256().digest_size


def cache_folder() -> Path:
    """Where all of it is: below XDG_CACHE_HOME if that is an absolute path, else below ~/.cache."""
    asked = Path(os.environ.get("XDG_CACHE_HOME", ""))  # not absolute: to be ignored by its specification
    return (asked if asked.is_absolute() else Path.home() / ".cache") / "orchestrate"


def sealed(name: str, data: bytes) -> bytes:
    """What is written into the file of that name."""
    return _digest(name, data) + data


def unsealed(name: str, content: bytes) -> bytes:
    """The data that `sealed` was given. Raises ValueError for anything else, and for what another file holds."""
    data = content[_NUM_BYTES:]
    if content[:_NUM_BYTES] != _digest(name, data):
        raise ValueError(f"{name} is damaged")
    return data


def _digest(name: str, data: bytes) -> bytes:
    return hashlib.sha256(name.encode() + b"\0" + data).digest()
