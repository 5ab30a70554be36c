"""Messages that nobody sound sends: to an end of a run, with and without a key of it.

Without a key: connections that send damaged greetings, handshakes and frames of ZMTP. With one: damaged headers and
tensors, each looked at as if it were the holder's first. After every thousand a sound peer's tensor must arrive, the
receiving thread must be alive, and at the end the process must not have grown.

    cd benchmarks; python -m exactness.fuzzed_frames [--strangers 1000000] [--holders 100000] [--seed 0]
"""

import argparse
import queue
import random
import socket
import time
from dataclasses import dataclass, replace

import msgpack
import psutil
import torch
import zmq
from support.harness import report

from orchestrator.runners.executing.header import Header
from orchestrator.runners.executing.peer_keys import new_keys, present
from orchestrator.runners.executing.transport import Arrival, Transport
from orchestrator.runners.on_ray.screening import require_of_chips
from partitioner.program.machine import Key

GREETING = b"\xff\x00\x00\x00\x00\x00\x00\x00\x01\x7f\x03\x01CURVE" + bytes(15) + b"\x00" + bytes(31)
ACTOR_OF = (0, 1, 2)
PER_CONNECTION = 500
ARRIVAL_S = 20.0
MB = 1e6


@dataclass
class Victim:
    """An end that takes communications of chips, with a sound peer (actor 1) and a holder that goes wrong (actor 2)."""

    arrived: "queue.Queue[Arrival]"
    end: Transport
    sound: Transport
    holder: Transport
    sent: int = 0

    def take(self, arrival: Arrival) -> None:
        """What an actor does with what arrives, short of computing."""
        require_of_chips(arrival, ACTOR_OF, 0)
        self.arrived.put(arrival)

    def still_works(self) -> bool:
        """Whether a sound peer's tensor comes in."""
        while not self.arrived.empty():
            self.arrived.get()
        self.sound.send(0, 0, Key("p2p", (1, 0), self.sent), 1, torch.full((4,), float(self.sent)))
        self.sent += 1
        try:
            while True:
                found = self.arrived.get(timeout=ARRIVAL_S)
                if found.sender == 1:
                    return found.tensor.tolist() == [float(self.sent - 1)] * 4
        except queue.Empty:
            return False

    def has_seen(self, holder: "zmq.Socket[bytes]", number: int) -> bool:
        """Whether all that the holder has sent was looked at: a sound message of its own comes in after it."""
        mark = [Header(0, 0, "p2p", (2, 0), 10**6 + number, 2, "f32", (1,), None).packed(), bytes(4)]
        end = time.monotonic() + ARRIVAL_S
        while time.monotonic() < end:
            self.forgive()
            holder.send_multipart(mark)
            try:
                while (found := self.arrived.get(timeout=0.2)).key.number != 10**6 + number:
                    pass
            except queue.Empty:
                continue
            return found.sender == 2
        return False

    def forgive(self) -> None:
        """The next message of the holder's is looked at again, as its first."""
        self.end._refused.clear()
        self.end._received[2] = 0
        self.end.failure = None


def victim() -> Victim:
    """Three ends that know each other."""
    arrived: queue.Queue[Arrival] = queue.Queue()
    keys = new_keys(range(3))
    made = Victim(arrived, *(Transport(keys[actor], lambda _: None) for actor in range(3)))
    made.end.deliver = made.take
    for actor, each in enumerate((made.end, made.sound, made.holder)):
        others = {0: made.end.address, 1: made.sound.address, 2: made.holder.address}
        each.connect({peer: address for peer, address in others.items() if peer != actor})
    return made


def stranger_bytes(draw: random.Random) -> bytes:
    """A greeting, most often a damaged one, and frames after it."""
    start = bytearray(draw.choice((GREETING, GREETING.replace(b"CURVE", b"NULL\0"), b"", draw.randbytes(64))))
    for _ in range(draw.choice((0, 0, 1, 5))):
        if start:
            start[draw.randrange(len(start))] = draw.randrange(256)
    frames = []
    for _ in range(PER_CONNECTION):
        body = draw.randbytes(draw.choice((0, 1, 7, 33, 200)))
        flags = draw.choice((0, 1, 2, 4, 6, 255))
        size = len(body).to_bytes(8, "big") if flags & 2 else bytes([len(body) & 255])
        if draw.random() < 0.05:
            size = draw.randbytes(len(size))
        hello = b"\x05HELLO\x01\x00" if draw.random() < 0.1 else b""
        frames.append(bytes([flags]) + size + hello + body)
    return bytes(start) + b"".join(frames)


def strangers(target: Victim, count: int, draw: random.Random) -> int:
    """Frames of those who hold no key; how often the end no longer worked afterwards."""
    host, port = target.end.address.endpoint.removeprefix("tcp://").rsplit(":", 1)
    failures = 0
    for number in range(count // PER_CONNECTION):
        with socket.create_connection((host, int(port))) as connection:
            connection.settimeout(1.0)
            try:
                connection.sendall(stranger_bytes(draw))
                if draw.random() < 0.1:
                    connection.recv(100)
            except OSError:  # it has hung up, as it should
                pass
        if number % 20 == 0:
            failures += not target.still_works()
    return failures


def holder_frames(draw: random.Random) -> list[bytes]:
    """A message with something wrong in most cases."""
    fields: list[object] = list(Header(0, 0, "p2p", (2, 0), 0, 2, "f32", (2, 3), None))
    odd: tuple[object, ...] = (
        -1, 2**70, 1 << 40, 0.5, None, True, "x", "p2p", b"x", (), (2,), (2, 0), (0, 2), (1 << 60,) * 5, "f32", "f99",
        (0, 1 << 61), [1, [2, [3]]], {"a": 1}, "value:w", "a" * 5000, draw.randrange(100),
    )  # fmt: skip
    for _ in range(draw.choice((0, 1, 1, 1, 2, 3))):
        fields[draw.randrange(len(fields))] = draw.choice(odd)
    if draw.random() < 0.05:
        fields = fields[: draw.randrange(len(fields))] + [draw.choice(odd)] * draw.randrange(3)
    try:
        packed = bytearray(msgpack.packb(fields))
    except (OverflowError, ValueError):
        packed = bytearray(draw.randbytes(30))
    if draw.random() < 0.3 and packed:
        packed[draw.randrange(len(packed))] = draw.randrange(256)
    if draw.random() < 0.1:
        packed = packed[: draw.randrange(len(packed) + 1)]
    bodies = [
        draw.randbytes(draw.choice((24, 24, 0, 23, 25, 500))) for _ in range(draw.choice((1, 1, 1, 0, 2)))
    ]
    return [bytes(packed), *bodies]


def holders(target: Victim, count: int, draw: random.Random) -> int:
    """Messages of one who holds a key; how often the end no longer worked afterwards."""
    context = zmq.Context.instance()
    outgoing = context.socket(zmq.PUSH)
    present(outgoing, replace(target.holder.keys), 0)
    outgoing.connect(target.end.address.endpoint)
    failures = 0
    for number in range(count):
        outgoing.send_multipart(holder_frames(draw))
        target.forgive()
        if number % 1000 == 0:
            failures += not (target.has_seen(outgoing, number) and target.still_works())
    outgoing.close(0)
    return failures + (not target.end._thread.is_alive())


def main() -> None:
    """Send, look and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--strangers", type=int, default=1_000_000)
    parser.add_argument("--holders", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    draw, target, process = random.Random(options.seed), victim(), psutil.Process()
    strangers(target, 20 * PER_CONNECTION, draw)
    holders(target, 2000, draw)  # what is imported and allocated once
    rows = []
    for name, send, count in (
        ("without a key", strangers, options.strangers), ("with a key", holders, options.holders),
    ):  # fmt: skip
        before, start = process.memory_info().rss, time.perf_counter()
        failures = send(target, count, draw)
        is_well = target.still_works() and target.end._thread.is_alive()
        grown = (process.memory_info().rss - before) / MB
        rows.append({"sender": name, "frames": count, "end_failed": failures + (not is_well), "grown_MB": grown,
                     "seconds": time.perf_counter() - start})  # fmt: skip
    report("fuzzed_frames", rows)


if __name__ == "__main__":
    main()
