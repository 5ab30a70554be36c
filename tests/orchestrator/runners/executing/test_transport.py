import queue
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgpack
import pytest
import torch
import zmq
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.runners.executing import transport
from orchestrator.runners.executing.header import BadMessage, Header
from orchestrator.runners.executing.peer_keys import PeerKeys, new_keys, present
from orchestrator.runners.executing.transport import RAW_BYTES, Address, Arrival, Transport
from partitioner.capture.captured_graph import TORCH
from partitioner.program.machine import Key

KEY = Key("p2p", (0, 1), 0)
ARRIVAL_S = 20


class End:
    """A transport whose arrivals are kept in order."""

    def __init__(self, keys: PeerKeys) -> None:
        self.arrived: queue.Queue[Arrival] = queue.Queue()
        self.transport = Transport(keys, self.arrived.put)

    def next(self) -> Arrival:
        return self.arrived.get(timeout=ARRIVAL_S)


@contextmanager
def ends_of(number: int, share_memory: bool = True) -> Iterator[list[End]]:
    with pytest.MonkeyPatch.context() as patch:
        if not share_memory:
            patch.setattr(transport, "write_proof", lambda _: None)
        made = [End(keys) for keys in new_keys(range(number)).values()]
    for actor, end in enumerate(made):
        end.transport.connect({a: other.transport.address for a, other in enumerate(made) if a != actor})
    try:
        yield made
    finally:
        for end in made:
            end.transport.close()


@pytest.fixture(scope="module", params=[True, False], ids=["shared memory", "sockets"])
def ends(request: pytest.FixtureRequest) -> Iterator[tuple[End, End]]:
    with ends_of(2, request.param) as pair:
        assert pair[0].transport._peers[1].shares_memory == request.param
        yield pair


def make(dtype: torch.dtype, shape: list[int], seed: int) -> torch.Tensor:
    numbers = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 50
    return (numbers > 0) if dtype == torch.bool else numbers.to(dtype)


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    left, right = (t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b))
    return torch.equal(left, right)


@given(
    dtype=st.sampled_from(sorted(TORCH.values(), key=str)),
    shape=st.lists(st.integers(0, 40), max_size=3),
    seed=st.integers(0, 1000),
    header=st.tuples(st.integers(0, 9), st.integers(0, 9)),
)
@settings(max_examples=60)
def test_a_tensor_arrives_as_it_was_sent(ends, dtype, shape, seed, header):
    epoch, source = header
    sent = make(dtype, shape, seed)
    ends[0].transport.send(1, epoch, KEY, source, sent)
    got = ends[1].next()
    assert got[:4] == (0, epoch, KEY, source)
    assert same_bytes(got.tensor, sent)


@pytest.mark.parametrize("rows", [1, 40, 3000])
def test_a_view_that_is_not_in_order_arrives_in_order(ends, rows):
    sent = torch.arange(rows * 600.0).reshape(rows, 600).t()[::2]
    ends[0].transport.send(1, 0, KEY, 0, sent)
    assert same_bytes(ends[1].next().tensor, sent)


def test_messages_keep_their_order_whatever_their_size(ends):
    sizes = [1, 200_000, 3, RAW_BYTES, 5_000_000, 0, 40_000, 2] * 3
    for number, size in enumerate(sizes):
        ends[0].transport.send(1, 0, Key("p2p", (0, 1), number), 0, torch.full((size,), float(number)))
    for number, size in enumerate(sizes):
        got = ends[1].next()
        assert got.key.number == number
        assert same_bytes(got.tensor, torch.full((size,), float(number)))


def test_a_tensor_may_change_as_soon_as_it_is_sent(ends):
    tensor = torch.zeros(300_000)
    for number in range(20):
        tensor.fill_(number)
        ends[0].transport.send(1, 0, KEY, 0, tensor)
    tensor.fill_(-1)
    assert [ends[1].next().tensor.unique().tolist() for _ in range(20)] == [[float(n)] for n in range(20)]


def test_both_ends_send_at_once(ends):
    big = torch.arange(2_000_000)
    for number in range(4):
        for end, other in (ends, ends[::-1]):
            end.transport.send(other.transport.keys.actor, 0, KEY, number, big + number)
    for end in ends:
        for number in range(4):
            assert torch.equal(end.next().tensor, big + number)


def test_strangers_are_not_heard():
    with ends_of(2) as (first, second):
        stranger = End(replace(new_keys([0, 1])[1], public=second.transport.keys.public))
        stranger.transport.connect({0: first.transport.address})
        stranger.transport.send(0, 0, KEY, 0, torch.ones(3))
        bare = zmq.Context.instance().socket(zmq.PUSH)
        bare.linger = 0
        bare.connect(first.transport.address.endpoint)
        bare.send_multipart([header(0, shape=(1,)), b"1234"])
        second.transport.send(0, 7, KEY, 0, torch.ones(2))
        assert first.next().epoch == 7
        assert first.arrived.empty() and first.transport.failure is None
        stranger.transport.close()
        bare.close()


def header(sequence: int, **other: Any) -> bytes:
    made = Header(sequence, 0, *KEY, 0, "f32", (2,), None)
    return made._replace(**other).packed()


@contextmanager
def raw(end: End, peer: End) -> Iterator[zmq.Socket[bytes]]:
    """A socket by which `end` sends what it likes to `peer`."""
    socket = zmq.Context.instance().socket(zmq.PUSH)
    socket.linger = 0
    present(socket, end.transport.keys, peer.transport.keys.actor)
    socket.connect(peer.transport.address.endpoint)
    yield socket
    socket.close()


BAD: dict[str, list[bytes]] = {
    "noise": [b"\xc1\x00noise"],
    "no header": [b""],
    "another number of fields": [msgpack.packb([0, 1])],
    "a map": [msgpack.packb({"a": 1})],
    "no tensor": [header(0)],
    "a short tensor": [header(0), b"1234567"],
    "a long tensor": [header(0), b"123456789"],
    "three frames": [header(0), b"12345678", b"1"],
    "a frame beside a block": [header(0, block=3), b"12345678"],
    "a block that is none": [header(0, block=0)],
    "an unknown type": [header(0, dtype="f99"), b"12345678"],
    "a negative size": [header(0, shape=(-2,)), b"12345678"],
    "a huge size": [header(0, shape=(1 << 61,)), b""],
    "an impossible product": [header(0, shape=(1 << 60, 1 << 60, 0)), b""],
    "a size that is no number": [header(0, shape=("2",)), b"12345678"],
    "a negative epoch": [header(0, epoch=-1), b"12345678"],
    "a truth for a number": [header(0, epoch=True), b"12345678"],
    "a kind that is no text": [header(0, kind=3), b"12345678"],
    "chips that are no list": [header(0, chips=3), b"12345678"],
    "a message of later": [header(1), b"12345678"],
}


@pytest.mark.parametrize("frames", BAD.values(), ids=BAD)
def test_what_is_no_message_ends_its_sender_alone(frames: list[bytes]) -> None:
    with ends_of(3) as (victim, holder, sound):
        with raw(holder, victim) as socket:
            socket.send_multipart(frames)
            socket.send_multipart([header(0), b"12345678"])  # too late for good manners
            wait_for(lambda: victim.transport.failure is not None)
        assert "actor 1 sent" in str(victim.transport.failure)
        sound.transport.send(0, 5, KEY, 0, torch.ones(2))
        assert victim.next().epoch == 5
        assert victim.arrived.empty()


def test_a_message_once_more_ends_its_sender_alone() -> None:
    with ends_of(2) as (victim, holder), raw(holder, victim) as socket:
        for _ in range(2):
            socket.send_multipart([header(0), b"12345678"])
        assert victim.next().epoch == 0
        wait_for(lambda: victim.transport.failure is not None)
        assert "once more" in str(victim.transport.failure)
        assert victim.arrived.empty()


def test_a_message_that_its_taker_refuses_ends_its_sender_alone() -> None:
    def refuse(message: Arrival) -> None:
        raise BadMessage("something")

    with ends_of(2) as (first, second):
        second.transport.deliver = refuse
        first.transport.send(1, 0, KEY, 0, torch.zeros(1))
        wait_for(lambda: second.transport.failure is not None)
        assert "actor 0 sent something" in str(second.transport.failure)
        assert second.transport._thread.is_alive()


def wait_for(is_so: Callable[[], bool]) -> None:
    end = time.monotonic() + ARRIVAL_S
    while not is_so():
        assert time.monotonic() < end


def descriptors() -> set[str]:
    return {entry.name for entry in Path("/proc/self/fd").iterdir()}


def test_closing_gives_back_all_descriptors_and_threads():
    before = descriptors()
    with ends_of(2) as (first, second):
        first.transport.send(1, 0, KEY, 0, torch.zeros(1_000_000))
        second.next()
        second.transport.close()
        second.transport.close()  # twice does no harm
    assert descriptors() <= before


class _Late:
    """A socket that sends when `before` has been called and nobody reads the other end any more."""

    def __init__(self, socket: zmq.Socket[bytes], before: Callable[[], None]) -> None:
        self.socket, self.before = socket, before

    def send(self, *given: Any) -> None:
        self.before()
        while self.socket.poll(0, zmq.POLLOUT):
            pass
        self.socket.send(*given)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.socket, name)


def test_a_message_that_arrives_while_an_end_closes_does_not_hold_it(monkeypatch):
    with ends_of(2) as (first, second):
        closing, make_socket = first.transport, first.transport._socket

        def message() -> None:
            second.transport.send(0, 0, KEY, 0, torch.ones(3))
            closing._thread.join()

        monkeypatch.setattr(closing, "_socket", lambda kind: _Late(make_socket(kind), message))
        closing.close()
        assert closing.failure is None


def test_what_ends_the_receiving_thread_is_kept():
    with ends_of(2) as (first, second):
        second.transport.deliver = lambda *_: 1 / 0
        first.transport.send(1, 0, KEY, 0, torch.zeros(1))
        second.transport._thread.join(ARRIVAL_S)
        assert isinstance(second.transport.failure, ZeroDivisionError)


def test_a_message_of_a_process_that_has_ended_is_dropped():
    with ends_of(2) as (first, second):
        second.transport._peers[0].process = 2**22 + 1  # more than the kernel's largest process number
        first.transport.send(1, 0, KEY, 0, torch.zeros(1_000_000))
        first.transport.send(1, 1, KEY, 0, torch.zeros(1))
        assert second.next().epoch == 1


def test_memory_of_another_host_is_not_shared():
    with ends_of(2) as (first, second):
        there = second.transport.address
        first.transport.keys = replace(
            first.transport.keys, public={**first.transport.keys.public, 2: second.transport.keys.public[1]}
        )
        first.transport.connect({2: Address(there.endpoint, there.process, there.block, b"0" * 16)})
        assert not first.transport._peers[2].shares_memory
        first.transport.send(2, 3, KEY, 0, torch.arange(100_000))
        assert torch.equal(second.next().tensor, torch.arange(100_000))


def test_when_memory_is_short_tensors_go_through_the_socket():
    with ends_of(2) as (first, second):
        first.transport._pool.limit_bytes = 0
        first.transport.send(1, 0, KEY, 0, torch.arange(500_000))
        assert torch.equal(second.next().tensor, torch.arange(500_000))
