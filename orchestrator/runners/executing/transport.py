"""Transport: tensors from actor to actor (and from and to the driver, which is one more actor).

Every actor has one socket that it reads and one towards each peer (zmq over tcp, in order). A message is a header
(msgpack) and the tensor: in a shared block if the peer can read our memory (`blocks`), else as a raw frame of its
own; small tensors are always raw. Nothing is ever pickled. A tensor is copied before `send` returns, and copied out
on arrival, so that neither end waits for the other.

Headers carry a secret of the run; what comes without it is ignored. Not here: encryption, retries, back-pressure (a
program's messages are bounded by its schedule). A peer that has ended is noticed by the driver, not here.
"""

import os
import secrets
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias

import msgpack
import numpy as np
import torch
import zmq

from kernels.backend import prepare_thread
from orchestrator.runners.executing.blocks import BlockPool, can_read, read_block, write_proof
from partitioner.capture.captured_graph import SHORT, TORCH
from partitioner.program.machine import Key

Deliver: TypeAlias = Callable[[int, Key, int, torch.Tensor], None]
RAW_BYTES = 1 << 16  # up to here two copies through a socket are cheaper than opening a block
LOOPBACK = "127.0.0.1"  # all actors are on this host


class Address(NamedTuple):
    """Where an actor is reached, and what it takes to find out whether it shares our memory."""

    endpoint: str
    process: int
    block: int | None
    proof: bytes


class Header(NamedTuple):
    """What precedes a tensor on the wire. `block`: where its bytes are; None if they follow."""

    secret: bytes
    sender: int
    epoch: int
    kind: str
    chips: tuple[int, ...]
    number: int
    source: int
    dtype: str
    shape: tuple[int, ...]
    block: int | None

    @property
    def key(self) -> Key:
        return Key(self.kind, self.chips, self.number)


@dataclass
class _Peer:
    """Sockets are not thread-safe: `lock` is held while sending."""

    socket: zmq.Socket[bytes]
    process: int
    shares_memory: bool
    lock: threading.Lock = field(default_factory=threading.Lock)


class Transport:
    """One actor's end. `deliver` is called for every tensor that arrives, from the transport's own thread."""

    def __init__(self, actor: int, secret: bytes, deliver: Deliver) -> None:
        self.actor, self.secret, self.deliver = actor, secret, deliver
        self.failure: BaseException | None = None  # what ended the receiving thread
        self._pool = BlockPool()
        self._context = zmq.Context()
        self._inbox = self._socket(zmq.PULL)
        port = self._inbox.bind_to_random_port(f"tcp://{LOOPBACK}")
        self._inbox.bind("inproc://inbox")
        proof = secrets.token_bytes(16)
        self._proof = write_proof(proof)
        self.address = Address(f"tcp://{LOOPBACK}:{port}", os.getpid(), self._proof, proof)
        self._peers: dict[int, _Peer] = {}
        self._is_closing = False
        self._thread = threading.Thread(target=self._receive, name=f"transport-{actor}", daemon=True)
        self._thread.start()

    def connect(self, addresses: Mapping[int, Address]) -> None:
        """Open sockets to peers that are new; where they can be read, memory is shared."""
        for actor, address in addresses.items():
            if actor in self._peers:
                continue
            socket = self._socket(zmq.PUSH)
            socket.connect(address.endpoint)
            shares = self._proof is not None and can_read(address.process, address.block, address.proof)
            self._peers[actor] = _Peer(socket, address.process, shares)

    def send(self, actor: int, epoch: int, key: Key, source: int, tensor: torch.Tensor) -> None:
        """Deliver `tensor` at `actor`; it may be changed as soon as this returns."""
        peer = self._peers[actor]
        content = _bytes_of(tensor)
        block = self._pool.put(content) if peer.shares_memory and len(content) > RAW_BYTES else None
        dtype, shape = SHORT[tensor.dtype], tuple(tensor.shape)
        header = Header(self.secret, self.actor, epoch, *key, source, dtype, shape, block)
        frames = [msgpack.packb(header)] if block is not None else [msgpack.packb(header), content]
        with peer.lock:
            peer.socket.send_multipart(frames)

    def close(self) -> None:
        """End the thread, close the sockets, give memory back."""
        if self._is_closing:
            return
        self._is_closing = True
        stop = self._socket(zmq.PUSH)
        stop.connect("inproc://inbox")
        with suppress(zmq.Again):  # a message on its way, or a failure, has ended the thread: nobody listens
            stop.send(b"", zmq.DONTWAIT)
        self._thread.join()
        stop.close()
        for peer in self._peers.values():
            with peer.lock:
                peer.socket.close()
        self._context.term()
        self._pool.close()
        if self._proof is not None:
            os.close(self._proof)

    def _socket(self, kind: int) -> "zmq.Socket[bytes]":
        socket = self._context.socket(kind)
        socket.set_hwm(0)  # never block and never drop: see the module's docstring
        socket.linger = 0
        return socket

    def _receive(self) -> None:
        prepare_thread()
        try:
            while True:
                frames = self._inbox.recv_multipart(copy=False)
                if self._is_closing:
                    return
                header = read_header(frames[0].bytes, self.secret)
                if header is None:
                    continue
                tensor = self._tensor(header, frames)
                if tensor is not None:
                    self.deliver(header.epoch, header.key, header.source, tensor)
        except BaseException as error:  # whoever waits for the tensor asks for `failure`
            self.failure = error
        finally:
            self._inbox.close()

    def _tensor(self, header: Header, frames: "list[zmq.Frame]") -> torch.Tensor | None:
        tensor = torch.empty(header.shape, dtype=TORCH[header.dtype])
        target = _bytes_of(tensor)
        if header.block is None:
            np.copyto(
                np.asarray(target), np.frombuffer(frames[1].buffer, np.uint8)
            )  # releases the interpreter
            return tensor
        try:
            read_block(self._peers[header.sender].process, header.block, target)
        except FileNotFoundError:  # the sender has ended; its message is of no use any more
            return None
        return tensor


def read_header(content: bytes, secret: bytes) -> Header | None:
    """The header of a message; None if it is not one of this run's."""
    try:
        header = Header(*msgpack.unpackb(content, use_list=False))
    except (ValueError, TypeError, msgpack.UnpackException):
        return None
    return header if header.secret == secret else None


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    """The tensor's elements as bytes: of itself if it lies in order in main memory, else of a copy."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy())  # type: ignore[arg-type]  # numpy's stubs hide the buffer
