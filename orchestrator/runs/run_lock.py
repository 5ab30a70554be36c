"""A run directory's lock: one process at a time writes there, and who comes second is told who does.

The lock is the operating system's (flock) on a hidden file, so that it goes with the process, however that ends; the
file stays, and says who had it last. File systems without locks are said to be.
"""

import fcntl
import json
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO

from comms.errors import ConfigError
from orchestrator.runs.disk import explained

LOCK = ".lock"
MAX_BYTES = 1000  # of what is read of a holder
UNKNOWN = "another process"


@contextmanager
def locked(root: Path, warn: Callable[[str], None]) -> Iterator[None]:
    """Hold a run directory. Raises ConfigError where another process does; `warn` is told where nobody can."""
    with explained(root):
        file = (root / LOCK).open("ab+")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            problem = f"the run directory is in use by {_holder(file)}"
            hint = "wait until that run has ended, or end it: two would spoil each other's files"
            raise ConfigError(problem, str(root), hint) from error
        except OSError as error:
            warn(f"{root} cannot be locked ({error.strerror}): let no other process train there meanwhile")
            yield
            return
        _sign(file, root)
        yield


def _sign(file: BinaryIO, root: Path) -> None:
    held = {"pid": os.getpid(), "host": socket.gethostname(), "since": _now()}
    with explained(root):
        file.truncate(0)
        file.write(json.dumps(held).encode())
        file.flush()


def _holder(file: BinaryIO) -> str:
    """Who signed last, in words."""
    try:
        file.seek(0)
        held = json.loads(file.read(MAX_BYTES))
        return f"process {int(held['pid'])} on {held['host']!s:.80}, since {held['since']!s:.40}"
    except (OSError, ValueError, KeyError, TypeError):  # just being written, or by something else
        return UNKNOWN


def _now() -> str:
    """When, to read: it decides nothing."""
    return datetime.now(UTC).isoformat(sep=" ", timespec="seconds")
