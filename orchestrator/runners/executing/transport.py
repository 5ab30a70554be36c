"""Transport: tensors from actor to actor (and from and to the driver, which is one more actor).

Every actor has one socket that it reads and one towards each peer (zmq over tcp, in order), encrypted and
authenticated by the keys of the run (`peer_keys`). A message is a header (`header`) and the tensor: in a shared block
if the peer can read our memory (`blocks`), else as a frame of its own; small tensors are always sent as frames.
Nothing is ever pickled. A tensor is copied before `send` returns, so that neither end waits for the other; what arrives
in a block for a communication of the Program is used where it lies.

A peer that sends what is no message, or the same once more, is not listened to any longer; others are. Not here:
retries, back-pressure (a program's messages are bounded by its schedule). A peer that has ended is noticed by the
driver, not here. See docs/security.md.
"""

import os
import secrets
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias

import numpy as np
import torch
import zmq

from comms.errors import RunError
from kernels.backend import prepare_thread
from orchestrator.runners.executing.blocks import BlockPool, BlockReader, can_read, write_proof
from orchestrator.runners.executing.header import BadMessage, Header, read_header
from orchestrator.runners.executing.peer_keys import Gate, PeerKeys, guard, present
from partitioner.capture.captured_graph import SHORT, TORCH
from partitioner.program.machine import Key


class Arrival(NamedTuple):
    """A tensor that has arrived. `sender`: the actor that is known to have sent it."""

    sender: int
    epoch: int
    key: Key
    source: int
    tensor: torch.Tensor


Deliver: TypeAlias = Callable[[Arrival], None]
RAW_BYTES = 1 << 16  # up to here two copies through a socket are cheaper than opening a block
COMMUNICATIONS = ("p2p", "group")  # of a Program: their tensors are used in place, as nobody keeps them
LOOPBACK = "127.0.0.1"
INBOX = "inproc://inbox"


class Address(NamedTuple):
    """Where an actor is reached, and what it takes to find out whether it shares our memory."""

    endpoint: str
    process: int
    block: int | None
    proof: bytes


@dataclass
class _Peer:
    """Sockets are not thread-safe: `lock` is held while sending."""

    socket: zmq.Socket[bytes]
    process: int
    shares_memory: bool
    lock: threading.Lock = field(default_factory=threading.Lock)
    sent: int = 0


class Transport:
    """One actor's end, reached at `host` (a name or number of one interface of this machine).

    `deliver` is called for every tensor that arrives, from the transport's own thread; if it raises BadMessage, the
    sender is not listened to any longer.
    """

    def __init__(self, keys: PeerKeys, deliver: Deliver, host: str = LOOPBACK) -> None:
        self.keys, self.deliver = keys, deliver
        self.failure: BaseException | None = None  # what ended the receiving thread, or a peer
        self._pool, self._reader = BlockPool(), BlockReader()
        self._context = zmq.Context()
        self._gate = Gate(self._context, keys)
        self._inbox = self._socket(zmq.PULL)
        guard(self._inbox, keys)
        self._inbox.ipv6 = ":" in host
        named = f"[{host}]" if ":" in host else host
        port = self._inbox.bind_to_random_port(f"tcp://{named}")
        self._inbox.bind(INBOX)
        proof = secrets.token_bytes(16)
        self._proof = write_proof(proof)
        self.address = Address(f"tcp://{named}:{port}", os.getpid(), self._proof, proof)
        self._peers: dict[int, _Peer] = {}
        self._actor_of = {public.decode(): actor for actor, public in keys.public.items()}
        self._received: dict[int, int] = {}  # how many messages of each peer
        self._refused: set[int] = set()
        self._is_closing = False
        self._thread = threading.Thread(target=self._receive, name=f"transport-{keys.actor}", daemon=True)
        self._thread.start()

    def connect(self, addresses: Mapping[int, Address]) -> None:
        """Open sockets to peers that are new; where they can be read, memory is shared."""
        for actor, address in addresses.items():
            if actor in self._peers:
                continue
            socket = self._socket(zmq.PUSH)
            present(socket, self.keys, actor)
            socket.ipv6 = "[" in address.endpoint
            socket.connect(address.endpoint)
            shares = self._proof is not None and can_read(address.process, address.block, address.proof)
            self._peers[actor] = _Peer(socket, address.process, shares)

    def send(self, actor: int, epoch: int, key: Key, source: int, tensor: torch.Tensor) -> None:
        """Deliver `tensor` at `actor`; it may be changed as soon as this returns."""
        peer = self._peers[actor]
        content = _bytes_of(tensor)
        block = self._pool.put(content) if peer.shares_memory and len(content) > RAW_BYTES else None
        dtype, shape = SHORT[tensor.dtype], tuple(tensor.shape)
        with peer.lock:
            header = Header(peer.sent, epoch, *key, source, dtype, shape, block).packed()
            peer.socket.send_multipart([header] if block is not None else [header, content])
            peer.sent += 1

    def close(self) -> None:
        """End the threads, close the sockets, give memory back."""
        if self._is_closing:
            return
        self._is_closing = True
        stop = self._socket(zmq.PUSH)
        stop.connect(INBOX)
        with suppress(zmq.Again):  # a message on its way, or a failure, has ended the thread: nobody listens
            stop.send(b"", zmq.DONTWAIT)
        self._thread.join()
        stop.close()
        for peer in self._peers.values():
            with peer.lock:
                peer.socket.close()
        self._gate.close()
        self._context.term()
        self._pool.close()
        self._reader.close()
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
                sender = self._actor_of.get(str(frames[0].get("User-Id")))
                if sender is None or sender in self._refused:
                    continue
                try:
                    message = self._message(sender, frames)
                    if message is not None:
                        self.deliver(message)
                except BadMessage as bad:
                    self._refuse(sender, bad)
        except BaseException as error:  # whoever waits for the tensor asks for `failure`
            self.failure = error
        finally:
            self._inbox.close()

    def _refuse(self, sender: int, bad: BadMessage) -> None:
        self._refused.add(sender)
        who = f"actor {sender}" if sender >= 0 else "the driver"
        hint = "does every machine run the same version? continue from the last checkpoint with --resume"
        self.failure = self.failure or RunError(f"{who} sent {bad}", f"actor {self.keys.actor}", hint)

    def _message(self, sender: int, frames: "list[zmq.Frame]") -> Arrival | None:
        header = read_header(frames[0].buffer)
        expected = self._received.get(sender, 0)
        if header.sequence != expected:
            what = "once more" if header.sequence < expected else "after some that were lost"
            raise BadMessage(f"message {header.sequence} {what}: {expected} is next")
        self._received[sender] = expected + 1
        if len(frames) != 1 + (header.block is None):
            raise BadMessage(f"{len(frames)} frames")
        if header.block is None and len(frames[1].buffer) != header.nbytes:
            raise BadMessage(f"{len(frames[1].buffer)} bytes for a tensor of {header.nbytes}")
        tensor = self._tensor(sender, header, frames)
        return tensor if tensor is None else Arrival(sender, header.epoch, header.key, header.source, tensor)

    def _tensor(self, sender: int, header: Header, frames: "list[zmq.Frame]") -> torch.Tensor | None:
        if header.block is None:
            tensor = _empty(header)
            # numpy releases the interpreter
            np.copyto(np.asarray(_bytes_of(tensor)), np.frombuffer(frames[1].buffer, np.uint8))
            return tensor
        if sender not in self._peers:
            raise BadMessage("a block before it was met")
        try:
            content = self._reader.bytes_of(self._peers[sender].process, header.block, header.nbytes)
        except FileNotFoundError:  # the sender has ended; its message is of no use any more
            return None
        except ValueError as error:
            raise BadMessage(str(error)) from error
        tensor = torch.from_numpy(content).view(TORCH[header.dtype]).view(header.shape)
        return tensor if header.key.kind in COMMUNICATIONS else tensor.clone()


def _empty(header: Header) -> torch.Tensor:
    try:
        return torch.empty(header.shape, dtype=TORCH[header.dtype])
    except RuntimeError as error:  # no memory, or sizes whose product is no number of torch's
        raise BadMessage(f"a tensor of {header.shape}, which cannot be") from error


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    """The tensor's elements as bytes: of itself if it lies in order in main memory, else of a copy."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy())  # type: ignore[arg-type]  # numpy's stubs hide the buffer
