"""Heaps of the event loop: what comes next, ties broken by number. Compiled; arrays are changed in place.

Timers hold events that never change. Finishes hold at most one time per port, which may move.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from comms.simulation.jit import compiled, compiled_inside

NONE = -1
TIMER = np.dtype([("time", "f8"), ("number", "i8")], align=True)
FINISH = np.dtype([("time", "f8"), ("where", "i8")], align=True)  # where in the heap, or NONE


class Timers(NamedTuple):
    """A heap of (time, number); size[0] is how many there are. The caller makes room."""

    heap: NDArray[np.void]  # TIMER
    size: NDArray[np.int64]


class Finishes(NamedTuple):
    """An indexed heap: the ports with a finish time, the earliest first."""

    heap: NDArray[np.int64]  # ports
    port: NDArray[np.void]  # [ports] FINISH
    size: NDArray[np.int64]


def empty_timers(room: int) -> Timers:
    """No event yet."""
    return Timers(np.zeros(room, dtype=TIMER), np.zeros(1, dtype=np.int64))


def empty_finishes(num_ports: int) -> Finishes:
    """Nothing under way."""
    ports = np.zeros(num_ports, dtype=FINISH)
    ports["where"] = NONE
    return Finishes(np.zeros(num_ports + 1, dtype=np.int64), ports, np.zeros(1, dtype=np.int64))


@compiled
def add_timer(timers: Timers, time: float, number: int) -> None:
    """One more event. There must be room."""
    # Equal times are told apart by number, so that the order in which events come out does not depend on the order in
    # which they were put in. Entries on the way move down into a hole: one write each, where a swap has two.
    heap, at = timers.heap, timers.size[0]
    timers.size[0] = at + 1
    while at > 0:
        parent = (at - 1) >> 1
        above = heap[parent].time
        if above < time or (above == time and heap[parent].number <= number):
            break
        heap[at].time, heap[at].number = above, heap[parent].number
        at = parent
    heap[at].time, heap[at].number = time, number


@compiled_inside
def take_timer(timers: Timers) -> int:
    """Remove the earliest event; its number."""
    heap, size = timers.heap, timers.size[0] - 1
    timers.size[0] = size
    taken, time, number = heap[0].number, heap[size].time, heap[size].number
    at = 0
    while 2 * at + 1 < size:
        child = 2 * at + 1
        below = heap[child].time
        if child + 1 < size:
            right = heap[child + 1].time
            if right < below or (right == below and heap[child + 1].number < heap[child].number):
                child, below = child + 1, right
        if below > time or (below == time and heap[child].number >= number):
            break
        heap[at].time, heap[at].number = below, heap[child].number
        at = child
    heap[at].time, heap[at].number = time, number
    return taken  # type: ignore[no-any-return]


@compiled_inside
def set_finish(finishes: Finishes, port: int, time: float) -> None:
    """A port's flow ends at `time`: put in, or moved."""
    # Each port knows its place, so that an end that moves is moved and not put in again: where many share wires, a
    # flow's rate changes several times before it ends.
    at = finishes.port[port].where
    if at == NONE:
        at = finishes.size[0]
        finishes.size[0] = at + 1
        finishes.port[port].time = time
        _up(finishes, at, port)
        return
    before = finishes.port[port].time
    finishes.port[port].time = time
    if time < before:
        _up(finishes, at, port)
    else:
        _down(finishes, at, port)


@compiled_inside
def clear_finish(finishes: Finishes, port: int) -> None:
    """Forget a port's finish time."""
    at = finishes.port[port].where
    if at == NONE:
        return
    size = finishes.size[0] - 1
    finishes.size[0] = size
    finishes.port[port].where = NONE
    if at == size:
        return
    # The last entry fills the gap. It may come from another branch, so it may have to go either way.
    last = finishes.heap[size]
    if finishes.port[last].time < finishes.port[port].time:
        _up(finishes, at, last)
    else:
        _down(finishes, at, last)


@compiled_inside
def _up(finishes: Finishes, at: int, port: int) -> None:
    heap, ports = finishes.heap, finishes.port
    time = ports[port].time
    while at > 0:
        parent = heap[(at - 1) >> 1]
        if ports[parent].time <= time:
            break
        heap[at] = parent
        ports[parent].where = at
        at = (at - 1) >> 1
    heap[at] = port
    ports[port].where = at


@compiled_inside
def _down(finishes: Finishes, at: int, port: int) -> None:
    heap, ports, size = finishes.heap, finishes.port, finishes.size[0]
    time = ports[port].time
    while 2 * at + 1 < size:
        child = 2 * at + 1
        if child + 1 < size and ports[heap[child + 1]].time < ports[heap[child]].time:
            child += 1
        below = heap[child]
        if ports[below].time >= time:
            break
        heap[at] = below
        ports[below].where = at
        at = child
    heap[at] = port
    ports[port].where = at
