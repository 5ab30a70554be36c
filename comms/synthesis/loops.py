"""Loops of synthesis, compiled: one tree over chips that grows hop by hop, and the clock of timetables.

In a timetable wires serve one message at a time, the most pressing that waits. Messages wait in skew heaps (Sleator
and Tarjan, SIAM Journal on Computing 15, 1986), one per wire, by their turn: each message is in one of them at most,
so two links per message hold them all. Arrays are changed in place.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from comms.simulation.heaps import Timers, add_timer, empty_timers, take_timer
from comms.simulation.jit import compiled, compiled_inside

NONE = -1


@compiled
def path_tree(costs: NDArray[np.float64], root: int, lean: float) -> NDArray[np.int64]:
    """[chips] The parent of each chip in one tree over hops of finite costs[parent, chip]; NONE at the root.

    The next chip is the one with the smallest cost of its hop plus `lean` times what its parent has so far.
    """
    # Prim's and Dijkstra's algorithms over a full table, without a heap: n^2 steps, as many as there are costs to read.
    n = len(costs)
    parent = np.full(n, NONE)
    is_open = np.ones(n, dtype=np.bool_)
    key = np.full(n, np.inf)
    chip, so_far = root, 0.0
    for _ in range(n - 1):
        is_open[chip] = False
        following, least = NONE, np.inf
        for other in range(n):
            if not is_open[other]:
                continue
            offer = costs[chip, other] + lean * so_far
            if offer < key[other]:
                key[other], parent[other] = offer, chip
            if key[other] < least:
                following, least = other, key[other]
        chip, so_far = following, least
    return parent


class SendTable(NamedTuple):
    """What is to be sent. A message crosses the wires of its hop; after[after0[m] : after0[m + 1]] follow message m."""

    hop: NDArray[np.int64]  # [sends]
    moving_s: NDArray[np.float64]  # [sends]
    arriving_s: NDArray[np.float64]  # [sends]
    missing: NDArray[np.int64]  # [sends] messages that it still needs
    after0: NDArray[np.int64]  # [sends + 1]
    after: NDArray[np.int64]
    route0: NDArray[np.int64]  # [hops + 1]
    route: NDArray[np.int64]  # wires of each hop


class Queues(NamedTuple):
    """Messages that wait, by turn, and which wires are held."""

    turn: NDArray[np.int64]  # [sends]
    top: NDArray[np.int64]  # [wires] the first of those that wait
    left: NDArray[np.int64]  # [sends]
    right: NDArray[np.int64]  # [sends]
    held: NDArray[np.bool_]  # [wires]


def played(work: SendTable, turn: NDArray[np.int64], num_wires: int) -> NDArray[np.float64]:
    """[sends] When each leaves. `work.missing` is used up."""
    sends = len(turn)
    links = np.full((2, sends), NONE)
    queues = Queues(turn, np.full(num_wires, NONE), links[0], links[1], np.zeros(num_wires, dtype=np.bool_))
    start = np.zeros(sends)
    _run(work, queues, empty_timers(2 * sends + 1), start)
    return start


@compiled
def _run(work: SendTable, queues: Queues, timers: Timers, start: NDArray[np.float64]) -> None:
    """Event 2 m is that message m has arrived, 2 m + 1 that it has left. At one instant all come before any start."""
    # All that may be touched at one instant: every message that begins to wait, every wire that falls free.
    sends = len(work.hop)
    touched = np.zeros(sends + len(work.route), dtype=np.int64)
    for send in range(sends):
        if work.missing[send] == 0:
            _wait(queues, work.route[work.route0[work.hop[send]]], send)
    for wire in range(len(queues.top)):
        _serve(work, queues, timers, start, wire, 0.0)
    while timers.size[0] > 0:
        # A free wire is given away only when all who may want it at this instant are known.
        now = timers.heap[0].time
        num = 0
        while timers.size[0] > 0 and timers.heap[0].time == now:
            event = take_timer(timers)
            send = event >> 1
            if event & 1:
                for row in range(work.route0[work.hop[send]], work.route0[work.hop[send] + 1]):
                    queues.held[work.route[row]] = False
                    touched[num] = work.route[row]
                    num += 1
            else:
                num = _arrived(work, queues, touched, num, send)
        for index in range(num):
            _serve(work, queues, timers, start, touched[index], now)


@compiled_inside
def _arrived(work: SendTable, queues: Queues, touched: NDArray[np.int64], num: int, send: int) -> int:
    """Let those wait for their wire that need nothing more."""
    for row in range(work.after0[send], work.after0[send + 1]):
        late = work.after[row]
        work.missing[late] -= 1
        if work.missing[late] == 0:
            wire = work.route[work.route0[work.hop[late]]]
            _wait(queues, wire, late)
            touched[num] = wire
            num += 1
    return num


@compiled_inside
def _serve(
    work: SendTable, queues: Queues, timers: Timers, start: NDArray[np.float64], wire: int, now: float
) -> None:
    """Start the most pressing message that waits for this wire and finds all others free.

    One that finds another held waits there, and is tried again when that falls free.
    """
    while queues.top[wire] != NONE and not queues.held[wire]:
        send = queues.top[wire]
        queues.top[wire] = _merged(queues, queues.left[send], queues.right[send])
        first, last = work.route0[work.hop[send]], work.route0[work.hop[send] + 1]
        held = NONE
        for row in range(first, last):
            if queues.held[work.route[row]]:
                held = work.route[row]
                break
        # It waits at the wire that is in its way, and lets the next one of this wire try meanwhile: it is not
        # tried again before that wire falls free.
        if held != NONE:
            _wait(queues, held, send)
            continue
        for row in range(first, last):
            queues.held[work.route[row]] = True
        start[send] = now
        add_timer(timers, now + work.moving_s[send], 2 * send + 1)
        add_timer(timers, now + work.arriving_s[send], 2 * send)


@compiled_inside
def _wait(queues: Queues, wire: int, send: int) -> None:
    queues.left[send] = queues.right[send] = NONE
    queues.top[wire] = _merged(queues, queues.top[wire], send)


@compiled_inside
def _merged(queues: Queues, one: int, other: int) -> int:
    """The first of both heaps as one."""
    if one == NONE:
        return other
    if other == NONE:
        return one
    # Down the right sides, with children swapped on the way: that keeps them short in the mean, and needs no balance
    # kept with each message. A loop, as a heap may be as deep as it has messages.
    if queues.turn[other] < queues.turn[one]:
        one, other = other, one
    top = one
    while True:
        below = queues.right[one]
        queues.right[one] = queues.left[one]
        if below == NONE:
            queues.left[one] = other
            return top
        if queues.turn[other] < queues.turn[below]:
            below, other = other, below
        queues.left[one] = below
        one = below


@compiled
def ways_behind(work: SendTable) -> NDArray[np.float64]:
    """[sends] Seconds of the longest chain that starts with each, on empty wires; followers have higher numbers."""
    # One pass from the back: messages are numbered so that each comes after those that it needs.
    behind = np.zeros(len(work.hop))
    for send in range(len(work.hop) - 1, -1, -1):
        longest = 0.0
        for row in range(work.after0[send], work.after0[send + 1]):
            longest = max(longest, behind[work.after[row]])
        behind[send] = work.arriving_s[send] + longest
    return behind


@compiled
def places(work: SendTable, order: NDArray[np.int64], port: NDArray[np.int64]) -> NDArray[np.int64]:
    """[sends] The first round after those that each needs and after the one before it, in `order`, at its port."""
    # A port sends one message a round, and none before what it needs: the earliest such round, in order of leaving.
    place = np.zeros(len(order), dtype=np.int64)
    last = np.full(port.max() + 1, NONE)
    for send in order:
        place[send] = max(place[send], last[port[send]] + 1)
        last[port[send]] = place[send]
        for row in range(work.after0[send], work.after0[send + 1]):
            late = work.after[row]
            place[late] = max(place[late], place[send] + 1)
    return place
