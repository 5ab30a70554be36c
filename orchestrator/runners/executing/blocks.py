"""Blocks: memory that a process of the same host can read, for tensors on their way to another actor.

A block is an anonymous file in memory (memfd): it has no name, so nothing is left behind however its owner ends, and
it does not count against the size of /dev/shm. Another process of the same user opens it as
/proc/OWNER/fd/NUMBER. Its first byte says whether a message is in it: the owner sets the byte before it tells the
reader, the reader clears it after copying the bytes out, and the owner then uses the block again. So giving a block
back costs no message, and a reader keeps no state.

Not here: flow control. When all blocks are in use the caller sends the bytes another way.
"""

import os
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from threading import Lock

NAME = "orchestrate"
HEAD = 64  # bytes before the data: the flag, padded to a cache line
SMALLEST = 1 << 16
MAX_BLOCKS = 256  # descriptors that a pool may hold open
IN_USE, FREE = b"\1", b"\0"


class BlockPool:
    """The blocks of one owner, by size; those of one size are used in turn. Thread-safe."""

    def __init__(self, limit_bytes: int = 1 << 30) -> None:
        self.limit_bytes = limit_bytes
        self.blocks: dict[int, deque[int]] = defaultdict(deque)  # size: descriptors, longest in use first
        self.nbytes = 0
        self.lock = Lock()

    def put(self, data: memoryview) -> int | None:
        """Copy `data` into a block; its descriptor, or None if there is no memory to be had."""
        size = max(SMALLEST, 1 << (len(data) - 1).bit_length())
        with self.lock:
            block = self._take(size)
        if block is None:
            return None
        try:
            os.pwrite(block, IN_USE, 0)
            _write(block, data)
        except OSError:  # memory is full
            with self.lock:
                self._close(block, size)
            return None
        with self.lock:
            self.blocks[size].append(block)
        return block

    def close(self) -> None:
        """Give all memory back."""
        with self.lock:
            for size in list(self.blocks):
                for block in self.blocks.pop(size):
                    self._close(block, size)

    def _take(self, size: int) -> int | None:
        queue = self.blocks[size]
        if queue and _is_free(queue[0]):
            return queue.popleft()
        if not self._has_room(size):
            self._make_room(size)
        if not self._has_room(size):
            return None
        try:
            block = os.memfd_create(NAME)
        except OSError:  # no descriptors left
            return None
        self.nbytes += size
        return block

    def _has_room(self, size: int) -> bool:
        count = sum(map(len, self.blocks.values()))
        return self.nbytes + size <= self.limit_bytes and count < MAX_BLOCKS

    def _make_room(self, size: int) -> None:
        """Close free blocks of other sizes."""
        for other, queue in self.blocks.items():
            while queue and _is_free(queue[0]) and not self._has_room(size):
                self._close(queue.popleft(), other)

    def _close(self, block: int, size: int) -> None:
        os.close(block)
        self.nbytes -= size


@contextmanager
def read_block(owner: int, block: int, nbytes: int) -> Iterator[Callable[[memoryview], None]]:
    """What fills a target of `nbytes` from a block of process `owner`; the block is free afterwards.

    FileNotFoundError: the owner has ended. ValueError: what the owner holds under this number is no such block.
    """
    try:
        # nothing else is ever opened
        if not str(Path(_path(owner, block)).readlink()).startswith(f"/memfd:{NAME}"):
            raise ValueError("a block that is none")
        descriptor = os.open(_path(owner, block), os.O_RDWR | os.O_CLOEXEC)
    except PermissionError as error:
        raise ValueError("a block that cannot be read") from error
    try:
        if nbytes and os.fstat(descriptor).st_size < HEAD + nbytes:
            raise ValueError(f"a block of less than {nbytes} bytes")
        yield partial(_fill, descriptor)
        os.pwrite(descriptor, FREE, 0)
    finally:
        os.close(descriptor)


def _fill(descriptor: int, target: memoryview) -> None:
    done = 0
    while done < len(target):
        count = os.preadv(descriptor, [target[done:]], HEAD + done)
        if not count:
            raise ValueError("a block that ends early")
        done += count


def write_proof(proof: bytes) -> int | None:
    """A descriptor that holds `proof`, for `can_read`; None where blocks do not exist (not Linux)."""
    if not hasattr(os, "memfd_create"):
        return None
    block = os.memfd_create(NAME)
    os.pwrite(block, proof, 0)
    return block


def can_read(owner: int, block: int | None, proof: bytes) -> bool:
    """True if process `owner` is on this host and lets us read its blocks; and so it can read ours."""
    if block is None:
        return False
    try:
        descriptor = os.open(_path(owner, block), os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        return os.pread(descriptor, len(proof), 0) == proof
    except OSError:
        return False
    finally:
        os.close(descriptor)


def _path(owner: int, block: int) -> str:
    return f"/proc/{owner}/fd/{block}"


def _write(block: int, data: memoryview) -> None:
    done = 0  # one call writes at most 2 GiB
    while done < len(data):
        done += os.pwrite(block, data[done:], HEAD + done)


def _is_free(block: int) -> bool:
    return os.pread(block, 1, 0) == FREE
