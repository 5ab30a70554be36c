"""Blocks: memory that a process of the same host can read, for tensors on their way to another actor.

A block is an anonymous file in memory (memfd): it has no name, so nothing is left behind however its owner ends, and
it does not count against the size of /dev/shm. Another process of the same user opens it as
/proc/OWNER/fd/NUMBER, maps it once, and uses the bytes where they lie. The first one says whether a message is in the
block: the owner sets it before it tells the reader, it is cleared when nothing of the reader's refers to the bytes any
more, and the owner then uses the block again. So giving a block back costs no message.

Not here: flow control. When all blocks are in use the caller sends the bytes another way.
"""

import fcntl
import mmap
import os
import weakref
from collections import OrderedDict, defaultdict, deque
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np

NAME = "orchestrate"
HEAD = 64  # bytes before the data: the flag, padded to a cache line
SMALLEST = 1 << 16
MAX_BLOCKS = 128  # of a pool, with two descriptors each; and of others, with one each, that are mapped
IN_USE, FREE = 1, 0


@dataclass(eq=False)
class Block:
    """One block of ours. `backed`: how many of its bytes have memory behind them."""

    descriptor: int
    memory: mmap.mmap
    size: int
    backed: int = 0

    @property
    def is_free(self) -> bool:
        """Whether its reader is done with it."""
        return self.memory[0] == FREE

    def fill(self, data: memoryview) -> None:
        """Copy `data` in, for a reader. Raises OSError where memory is full."""
        end = HEAD + len(data)
        if end > self.backed:  # asked for: writing to what is not there would end the process
            os.posix_fallocate(self.descriptor, 0, end)
            self.backed = end
        self.memory[0] = IN_USE
        np.copyto(np.frombuffer(self.memory, np.uint8, len(data), HEAD), np.frombuffer(data, np.uint8))

    def close(self) -> None:
        """Give the memory back, once no reader has it any more."""
        os.close(self.descriptor)
        self.memory.close()


def _new_block(size: int) -> Block:
    """Raises OSError where there is no descriptor or memory left."""
    descriptor = os.memfd_create(NAME, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(descriptor, HEAD + size)
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
        return Block(descriptor, mmap.mmap(descriptor, HEAD + size), size)
    except OSError:
        os.close(descriptor)
        raise


class BlockPool:
    """The blocks of one owner, by size; those of one size are used in turn. Thread-safe."""

    def __init__(self, limit_bytes: int = 1 << 30) -> None:
        self.limit_bytes = limit_bytes
        self.blocks: dict[int, deque[Block]] = defaultdict(deque)  # by size, longest in use first
        self.nbytes = 0
        self.lock = Lock()

    def put(self, data: memoryview) -> int | None:
        """Copy `data` into a block; its descriptor, or None if there is no memory to be had."""
        with self.lock:
            block = self._take(max(SMALLEST, 1 << (len(data) - 1).bit_length()))
        if block is None:
            return None
        try:
            block.fill(data)
        except OSError:  # memory is full
            with self.lock:
                self._close(block)
            return None
        with self.lock:
            self.blocks[block.size].append(block)
        return block.descriptor

    def close(self) -> None:
        """Give all memory back."""
        with self.lock:
            for size in list(self.blocks):
                for block in self.blocks.pop(size):
                    self._close(block)

    def _take(self, size: int) -> Block | None:
        queue = self.blocks[size]
        if queue and queue[0].is_free:
            return queue.popleft()
        if not self._has_room(size):
            self._make_room(size)
        if not self._has_room(size):
            return None
        try:
            block = _new_block(size)
        except OSError:
            return None
        self.nbytes += size
        return block

    def _has_room(self, size: int) -> bool:
        count = sum(map(len, self.blocks.values()))
        return self.nbytes + size <= self.limit_bytes and count < MAX_BLOCKS

    def _make_room(self, size: int) -> None:
        """Close free blocks of other sizes."""
        for queue in self.blocks.values():
            while queue and queue[0].is_free and not self._has_room(size):
                self._close(queue.popleft())

    def _close(self, block: Block) -> None:
        block.close()
        self.nbytes -= block.size


class BlockReader:
    """The blocks of others as they lie in our memory: each is mapped once. For one thread."""

    def __init__(self) -> None:
        # by owner and number: the number of its file, and the file
        self._mapped: OrderedDict[tuple[int, int], tuple[int, mmap.mmap]] = OrderedDict()

    def bytes_of(self, owner: int, block: int, nbytes: int) -> "np.ndarray[Any, np.dtype[np.uint8]]":
        """The first `nbytes` in a block of process `owner`, in place: free again when nobody has them any more.

        FileNotFoundError: the owner has ended. ValueError: what the owner holds under this number is no such block.
        """
        memory = self._memory(owner, block)
        if len(memory) < HEAD + nbytes:
            raise ValueError(f"a block of less than {nbytes} bytes")
        content = np.frombuffer(memory, np.uint8, nbytes, HEAD)
        weakref.finalize(content, _free, memory).atexit = False
        return content

    def close(self) -> None:
        """Forget all blocks; what is still in use stays until it is dropped."""
        self._mapped.clear()

    def _memory(self, owner: int, block: int) -> mmap.mmap:
        path, place = _path(owner, block), (owner, block)
        try:
            number = Path(path).stat().st_ino
            if place in self._mapped and self._mapped[place][0] == number:
                self._mapped.move_to_end(place)
                return self._mapped[place][1]
            memory = _mapped(path)
        except FileNotFoundError:
            raise
        except OSError as error:
            raise ValueError(f"a block that cannot be read: {error.strerror}") from error
        self._mapped[place] = number, memory
        if len(self._mapped) > MAX_BLOCKS:
            self._mapped.popitem(last=False)
        return memory


def _mapped(path: str) -> mmap.mmap:
    if not str(Path(path).readlink()).startswith(f"/memfd:{NAME}"):  # nothing else is ever opened
        raise ValueError("a block that is none")
    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        # Of one that its owner makes smaller, reading would end this process
        is_sealed = fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK
        if not is_sealed or os.fstat(descriptor).st_size < HEAD:
            raise ValueError("a block that may shrink")
        return mmap.mmap(descriptor, 0)
    finally:
        os.close(descriptor)


def _free(memory: mmap.mmap) -> None:
    memory[0] = FREE


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
