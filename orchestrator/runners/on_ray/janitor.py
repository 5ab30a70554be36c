"""Janitor: removes what a Ray of our own leaves, also where the process that started it was killed.

A program of its own that needs nothing but Python: it reads from a pipe until the owner says that all is done, or
until the pipe ends because the owner has. Then whatever process still has the folder's name on its command line is
ended, and the folder is removed.
"""

import os
import shutil
import signal
import sys
import time
from pathlib import Path

DONE = b"done"
PATIENCE_S = 10.0  # processes that are ending may still write
LOOK_S = 0.2


def processes_of(folder: str) -> list[int]:
    """Those of this user with the folder's name on their command line, but this one."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            if folder.encode() in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
        except OSError:  # it has ended
            continue
    return found


def clean(folder: str) -> None:
    """End what runs in `folder` and remove it."""
    end = time.monotonic() + PATIENCE_S
    while time.monotonic() < end:
        left = processes_of(folder)
        for process in left:
            try:
                os.kill(process, signal.SIGKILL)
            except OSError:
                continue
        shutil.rmtree(folder, ignore_errors=True)
        if not left and not Path(folder).exists():
            return
        time.sleep(LOOK_S)


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # the owner's end is what counts
    if sys.stdin.buffer.read() != DONE:
        clean(sys.argv[1])
