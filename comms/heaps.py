"""Heaps of the event loop: what comes next, ties broken by number. Compiled; arrays are changed in place.

`Timers` holds events that never change; `Finishes` holds at most one time per port, which may move.
"""

from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

NONE = -1


class Timers(NamedTuple):
    """A heap of (time, number); size[0] is how many there are. The caller makes room by `grown`."""

    time: NDArray[np.float64]
    number: NDArray[np.int64]
    size: NDArray[np.int64]


class Finishes(NamedTuple):
    """An indexed heap: the ports with a finish time, the earliest first."""

    port: NDArray[np.int64]
    where: NDArray[np.int64]  # [ports] place in the heap, or NONE
    time: NDArray[np.float64]  # [ports]
    size: NDArray[np.int64]


def empty_timers(room: int) -> Timers:
    """No event yet."""
    return Timers(np.zeros(room), np.zeros(room, dtype=np.int64), np.zeros(1, dtype=np.int64))


def empty_finishes(num_ports: int) -> Finishes:
    """Nothing under way."""
    return Finishes(
        np.zeros(num_ports + 1, dtype=np.int64),
        np.full(num_ports, NONE),
        np.full(num_ports, np.inf),
        np.zeros(1, dtype=np.int64),
    )


@njit(cache=True)
def add_timer(timers: Timers, time: float, number: int) -> None:
    """One more event. There must be room."""
    at = timers.size[0]
    timers.size[0] = at + 1
    while at > 0:
        parent = (at - 1) >> 1
        above = timers.time[parent]
        if above < time or (above == time and timers.number[parent] <= number):
            break
        timers.time[at], timers.number[at] = above, timers.number[parent]
        at = parent
    timers.time[at], timers.number[at] = time, number


@njit(cache=True)
def take_timer(timers: Timers) -> int:
    """Remove the earliest event; its number."""
    taken = timers.number[0]
    size = timers.size[0] - 1
    timers.size[0] = size
    time, number = timers.time[size], timers.number[size]
    at = 0
    while 2 * at + 1 < size:
        child = 2 * at + 1
        if child + 1 < size:
            left, right = timers.time[child], timers.time[child + 1]
            if right < left or (right == left and timers.number[child + 1] < timers.number[child]):
                child += 1
        below = timers.time[child]
        if below > time or (below == time and timers.number[child] >= number):
            break
        timers.time[at], timers.number[at] = below, timers.number[child]
        at = child
    timers.time[at], timers.number[at] = time, number
    return taken


@njit(cache=True)
def set_finish(finishes: Finishes, port: int, time: float) -> None:
    """A port's flow ends at `time`: put in, or moved."""
    at = finishes.where[port]
    if at == NONE:
        at = finishes.size[0]
        finishes.size[0] = at + 1
        finishes.time[port] = time
        _up(finishes, at, port)
        return
    before = finishes.time[port]
    finishes.time[port] = time
    if time < before:
        _up(finishes, at, port)
    else:
        _down(finishes, at, port)


@njit(cache=True)
def clear_finish(finishes: Finishes, port: int) -> None:
    """Forget a port's finish time."""
    at = finishes.where[port]
    if at == NONE:
        return
    size = finishes.size[0] - 1
    finishes.size[0] = size
    finishes.where[port] = NONE
    if at == size:
        return
    last = finishes.port[size]
    if finishes.time[last] < finishes.time[port]:
        _up(finishes, at, last)
    else:
        _down(finishes, at, last)


@njit(cache=True)
def _up(finishes: Finishes, at: int, port: int) -> None:
    time = finishes.time[port]
    while at > 0:
        parent = finishes.port[(at - 1) >> 1]
        if finishes.time[parent] <= time:
            break
        finishes.port[at] = parent
        finishes.where[parent] = at
        at = (at - 1) >> 1
    finishes.port[at] = port
    finishes.where[port] = at


@njit(cache=True)
def _down(finishes: Finishes, at: int, port: int) -> None:
    time, size = finishes.time[port], finishes.size[0]
    while 2 * at + 1 < size:
        child = 2 * at + 1
        if child + 1 < size and finishes.time[finishes.port[child + 1]] < finishes.time[finishes.port[child]]:
            child += 1
        below = finishes.port[child]
        if finishes.time[below] >= time:
            break
        finishes.port[at] = below
        finishes.where[below] = at
        at = child
    finishes.port[at] = port
    finishes.where[port] = at
