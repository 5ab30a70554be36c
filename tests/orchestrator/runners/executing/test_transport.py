import queue
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgpack
import pytest
import torch
import zmq
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.runners.executing import transport
from orchestrator.runners.executing.transport import RAW_BYTES, Address, Transport, read_header
from partitioner.capture.captured_graph import TORCH
from partitioner.program.machine import Key

SECRET = b"s" * 16
KEY = Key("p2p", (0, 1), 0)
ARRIVAL_S = 20


class End:
    """A transport whose arrivals are kept in order."""

    def __init__(self, actor: int, *, secret: bytes = SECRET) -> None:
        self.arrived: queue.Queue[tuple[int, Key, int, torch.Tensor]] = queue.Queue()
        self.transport = Transport(actor, secret, lambda *a: self.arrived.put(a))

    def next(self) -> tuple[int, Key, int, torch.Tensor]:
        return self.arrived.get(timeout=ARRIVAL_S)


@contextmanager
def two_ends(share_memory: bool, **other: bytes) -> Iterator[tuple[End, End]]:
    with pytest.MonkeyPatch.context() as patch:
        if not share_memory:
            patch.setattr(transport, "write_proof", lambda _: None)
        first, second = End(0), End(1, **other)
    first.transport.connect({1: second.transport.address})
    second.transport.connect({0: first.transport.address})
    try:
        yield first, second
    finally:
        first.transport.close()
        second.transport.close()


@pytest.fixture(scope="module", params=[True, False], ids=["shared memory", "sockets"])
def ends(request: pytest.FixtureRequest) -> Iterator[tuple[End, End]]:
    with two_ends(request.param) as pair:
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
    got_epoch, key, got_source, tensor = ends[1].next()
    assert (got_epoch, key, got_source) == (epoch, KEY, source)
    assert same_bytes(tensor, sent)


@pytest.mark.parametrize("rows", [1, 40, 3000])
def test_a_view_that_is_not_in_order_arrives_in_order(ends, rows):
    sent = torch.arange(rows * 600.0).reshape(rows, 600).t()[::2]
    ends[0].transport.send(1, 0, KEY, 0, sent)
    assert same_bytes(ends[1].next()[3], sent)


def test_messages_keep_their_order_whatever_their_size(ends):
    sizes = [1, 200_000, 3, RAW_BYTES, 5_000_000, 0, 40_000, 2] * 3
    for number, size in enumerate(sizes):
        ends[0].transport.send(1, 0, Key("p2p", (0, 1), number), 0, torch.full((size,), float(number)))
    for number, size in enumerate(sizes):
        _, key, _, tensor = ends[1].next()
        assert key.number == number
        assert same_bytes(tensor, torch.full((size,), float(number)))


def test_a_tensor_may_change_as_soon_as_it_is_sent(ends):
    tensor = torch.zeros(300_000)
    for number in range(20):
        tensor.fill_(number)
        ends[0].transport.send(1, 0, KEY, 0, tensor)
    tensor.fill_(-1)
    assert [ends[1].next()[3].unique().tolist() for _ in range(20)] == [[float(n)] for n in range(20)]


def test_both_ends_send_at_once(ends):
    big = torch.arange(2_000_000)
    for number in range(4):
        for end, other in (ends, ends[::-1]):
            end.transport.send(other.transport.actor, 0, KEY, number, big + number)
    for end in ends:
        for number in range(4):
            assert torch.equal(end.next()[3], big + number)


def test_headers_of_other_runs_are_ignored():
    with two_ends(True, secret=b"x" * 16) as (first, second):
        second.transport.send(0, 0, KEY, 0, torch.ones(3))
        first.transport.connect({0: first.transport.address})
        first.transport.send(0, 7, KEY, 0, torch.ones(2))
        assert first.next()[0] == 7
        assert first.arrived.empty()


@given(
    st.binary(max_size=60)
    | st.lists(st.integers() | st.binary(), max_size=12).map(lambda x: bytes(str(x), "utf8"))
)
def test_noise_is_no_header(content):
    assert read_header(content, SECRET) is None


def test_a_header_needs_the_secret():
    fields = [SECRET, 0, 0, "p2p", (0, 1), 0, 0, "f32", (2,), None]
    assert read_header(msgpack.packb(fields), SECRET) is not None
    assert read_header(msgpack.packb([b"other", *fields[1:]]), SECRET) is None


def descriptors() -> set[str]:
    return {entry.name for entry in Path("/proc/self/fd").iterdir()}


def test_closing_gives_back_all_descriptors_and_threads():
    before = descriptors()
    with two_ends(True) as (first, second):
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
    with two_ends(True) as (first, second):
        closing, make_socket = first.transport, first.transport._socket

        def message() -> None:
            second.transport.send(0, 0, KEY, 0, torch.ones(3))
            closing._thread.join()

        monkeypatch.setattr(closing, "_socket", lambda kind: _Late(make_socket(kind), message))
        closing.close()
        assert closing.failure is None


def test_what_ends_the_receiving_thread_is_kept():
    with two_ends(True) as (first, second):
        second.transport.deliver = lambda *_: 1 / 0
        first.transport.send(1, 0, KEY, 0, torch.zeros(1))
        second.transport._thread.join(ARRIVAL_S)
        assert isinstance(second.transport.failure, ZeroDivisionError)


def test_a_message_of_a_process_that_has_ended_is_dropped():
    with two_ends(True) as (first, second):
        second.transport._peers[0].process = 2**22 + 1  # more than the kernel's largest process number
        first.transport.send(1, 0, KEY, 0, torch.zeros(1_000_000))
        first.transport.send(1, 1, KEY, 0, torch.zeros(1))
        assert second.next()[0] == 1


def test_memory_of_another_host_is_not_shared():
    with two_ends(True) as (first, second):
        there = second.transport.address
        first.transport.connect({2: Address(there.endpoint, there.process, there.block, b"0" * 16)})
        assert not first.transport._peers[2].shares_memory
        first.transport.send(2, 3, KEY, 0, torch.arange(100_000))
        assert torch.equal(second.next()[3], torch.arange(100_000))


def test_when_memory_is_short_tensors_go_through_the_socket():
    with two_ends(True) as (first, second):
        first.transport._pool.limit_bytes = 0
        first.transport.send(1, 0, KEY, 0, torch.arange(500_000))
        assert torch.equal(second.next()[3], torch.arange(500_000))
