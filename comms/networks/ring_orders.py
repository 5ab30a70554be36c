"""Ring orders of the chips of a network, and the subgroups they fall into.

A ring order visits every chip once and comes back. It is as good as the slowest of its hops when all hops carry
bytes at once; several rings that use different wires carry several shares of the bytes side by side (as channels
do). Where a shape says what its best rings are, they are constructed:

    torus, mesh     one snake each way round; one per dimension and way where it is a torus (`hamiltonian_cycles`)
    full mesh       steps of 1, of 2, ... chips, each that is prime to their number

Networks given edge by edge are searched, ring after ring on what rate the rings before have left: up to ALL_CHIPS chips
every order with all its hops at once; up to EXACT_CHIPS the order with the widest bottleneck, then the shortest lap,
among all orders (Held and Karp, J. SIAM 10, 1962); more by nearest neighbours and 2-opt exchange (Croes, Operations
Research 6, 1958). Taking the widest ring
first need not make the sum of several the largest. All else is taken in its natural order, which trees are numbered
for.

Subgroups are chips that are closer to each other than to all others: pairs are compared by latency times seconds per
byte, so that either one sets a tier apart.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import permutations
from math import gcd
from typing import TypeAlias

import numpy as np

from comms.networks.fabrics.edge_list import Rerouted
from comms.networks.fabrics.torus_mesh import FullMesh, Torus
from comms.networks.hamiltonian_cycles import disjoint_cycles, torus_cycle
from comms.networks.paths import BoolArray
from comms.networks.tiered import sole_shape
from comms.networks.topology import FloatArray, IntArray, Routes, Topology, Wires, route_latencies

Subgroups: TypeAlias = tuple[tuple[int, ...], ...]

ALL_CHIPS = 6
EXACT_CHIPS = 16
TINY = 1e-30  # what a ring carries over a wire that it does not use
SEARCHED_CHIPS = 512  # more are left in their natural order: the search needs tables of pairs
REFERENCE_NBYTES = 2**20  # message by which hops are compared where all orders are too many to try
LEAST_SHARE = 1 / 16  # of the first ring's rate: slower rings are not worth a channel
GAP = 1.2  # how much further apart chips of another subgroup are: more than jitter, less than another tier


@dataclass(frozen=True, slots=True, eq=False)
class RingOrder:
    """All chips in an order, the last followed by the first."""

    chips: IntArray
    bytes_per_s: float  # of the slowest hop when all hops of all rings are used at once
    latency_s: float  # of all hops together


@dataclass(frozen=True, slots=True, eq=False)
class _PairTables:
    """What a hop between any two chips is like, in tables of [chips, chips]."""

    routes: Routes
    latency_s: FloatArray
    relayed: BoolArray  # the way leads through other chips


def ring_orders(topology: Topology, most: int = 8) -> tuple[RingOrder, ...]:
    """Up to `most` rings that share no wire's rate, the first as if it were alone; at least one."""
    wires = topology.wires()
    left = wires.bytes_per_s.copy()
    propose = _proposals(topology, wires, most)
    rings: list[RingOrder] = []
    while len(rings) < most:
        found = [_ring(topology, wires, order, left) for order in propose(rings, left)]
        if not found:
            break
        best, load = max(found, key=lambda pair: (pair[0].bytes_per_s, -pair[0].latency_s))
        if rings and best.bytes_per_s < LEAST_SHARE * rings[0].bytes_per_s:
            break
        rings.append(best)
        if not load.any():  # one chip
            break
        left = np.maximum(left - best.bytes_per_s * load, 0.0)
    return tuple(rings)


def hierarchy(topology: Topology) -> tuple[Subgroups, ...]:
    """Subgroups of chips at every tier that can be distinguished, innermost first, up to all chips; memory n^2.

    Chips are a subgroup where each is closer to every other one than to any chip outside, by GAP at least.
    """
    pairs = _pairs(topology, topology.wires())
    rate = _rates(pairs, topology.wires().bytes_per_s)
    positive = pairs.latency_s[pairs.latency_s > 0]
    latency = np.maximum(pairs.latency_s, positive.min() if len(positive) else 1.0)
    np.fill_diagonal(rate, np.inf)
    distance = np.maximum(latency / rate, (latency / rate).T)
    steps = np.unique(distance[~np.eye(len(distance), dtype=np.bool_)])
    levels: list[Subgroups] = []
    for near, far in zip(steps, np.append(steps[1:], np.inf), strict=False):
        if far < near * GAP:
            continue
        together = distance <= near
        first = together.argmax(axis=1)
        if np.array_equal(together, first[:, None] == first):
            levels.append(tuple(tuple(np.flatnonzero(first == chip).tolist()) for chip in np.unique(first)))
    everyone: Subgroups = (tuple(range(topology.num_chips)),)
    return tuple(levels) if levels and levels[-1] == everyone else (*levels, everyone)


Proposals: TypeAlias = Callable[[list[RingOrder], FloatArray], Iterator[IntArray]]


def _proposals(topology: Topology, wires: Wires, most: int) -> Proposals:
    """Orders to choose the next ring from, given those before and the rate that is left on each wire."""
    fixed = _constructed(topology, most)
    is_known = isinstance(sole_shape(topology), Torus | FullMesh)
    is_searched = not is_known and 2 < topology.num_chips <= SEARCHED_CHIPS
    pairs = _pairs(topology, wires) if is_searched else None
    every = _every_order(topology, wires) if is_searched and topology.num_chips <= ALL_CHIPS else None

    def propose(rings: list[RingOrder], left: FloatArray) -> Iterator[IntArray]:
        if rings:
            yield np.roll(rings[-1].chips[::-1], 1)
        yield from fixed
        if every is not None:
            orders, loads, laps = every
            rates = np.min(left / np.maximum(loads, TINY), axis=1)
            yield orders[np.lexsort((laps, -rates))[0]]
        if pairs is not None:
            rate = _rates(pairs, left[wires.shares])
            yield (
                _widest_order(rate, pairs) if topology.num_chips <= EXACT_CHIPS else _near_order(rate, pairs)
            )

    return propose


def _every_order(topology: Topology, wires: Wires) -> tuple[IntArray, FloatArray, FloatArray]:
    """All rings, how often each uses each wire, and the latency of a lap."""
    n = topology.num_chips
    orders = np.array([(0, *rest) for rest in permutations(range(1, n))], dtype=np.int64)
    loads, latency = _loads(topology, wires, *np.divmod(np.arange(n * n), n))
    hops = orders * n + np.roll(orders, -1, axis=1)
    return orders, loads[hops].sum(axis=1), latency[hops].sum(axis=1)


def _loads(topology: Topology, wires: Wires, src: IntArray, dst: IntArray) -> tuple[FloatArray, FloatArray]:
    """[messages, wires] What each message carries over each capacity, and [messages] its latency."""
    ways = topology.ways(src, dst)
    lengths, loads = np.diff(ways.routes.offsets), np.zeros((len(src), wires.num_wires))
    at = np.repeat(ways.message, lengths), wires.shares[ways.routes.wires]
    np.add.at(loads, at, np.repeat(ways.share, lengths))
    latency = np.zeros(len(src))
    np.add.at(latency, ways.message, ways.share * route_latencies(wires, ways.routes))
    return loads, latency


def _constructed(topology: Topology, most: int) -> list[IntArray]:
    """The orders that the shape of a topology suggests."""
    natural = np.arange(topology.num_chips)
    whole = sole_shape(topology.topology if isinstance(topology, Rerouted) else topology)
    if isinstance(whole, Torus):
        wraps = tuple(map(whole.is_ring, range(len(whole.dims))))
        rings = all(wraps) and min(whole.dims) > 2
        cycles = disjoint_cycles(whole.dims) if rings and len(whole.dims) > 1 and most > 2 else ()
        return [*cycles, torus_cycle(whole.dims, wraps), natural]
    if isinstance(whole, FullMesh):
        n = whole.num_chips
        return [natural, *(natural * step % n for step in range(2, n) if gcd(step, n) == 1)][:most]
    return [natural]


def _ring(
    topology: Topology, wires: Wires, order: IntArray, left: FloatArray
) -> tuple[RingOrder, FloatArray]:
    """A ring on what rate is left, and how often it uses each wire."""
    if len(order) <= ALL_CHIPS:
        each, latency = _loads(topology, wires, order, np.roll(order, -1))
        load, lap = each.sum(axis=0), float(latency.sum())
    else:
        routes = topology.routes(order, np.roll(order, -1))
        load = np.bincount(wires.shares[routes.wires], minlength=wires.num_wires).astype(np.float64)
        lap = float(route_latencies(wires, routes).sum())
    used = load > 0
    rate = float((left[used] / load[used]).min(initial=np.inf))
    return RingOrder(order, rate, lap), load


def _pairs(topology: Topology, wires: Wires) -> _PairTables:
    n = topology.num_chips
    src, dst = np.divmod(np.arange(n * n), n)
    routes = topology.routes(src, dst)
    from_chip = np.append(wires.tail[routes.wires] < n, False).astype(np.int64)
    relayed = np.add.reduceat(from_chip, routes.offsets[:-1]) > 1  # the first wire always leaves a chip
    return _PairTables(routes, route_latencies(wires, routes).reshape(n, n), relayed.reshape(n, n))


def _rates(pairs: _PairTables, left: FloatArray) -> FloatArray:
    """[chips, chips] Rate of a message alone on what is left of each wire."""
    n = len(pairs.latency_s)
    rate = np.minimum.reduceat(np.append(left[pairs.routes.wires], np.inf), pairs.routes.offsets[:-1])
    rate[:: n + 1] = 0.0
    return rate.reshape(n, n)


def _widest_order(rate: FloatArray, pairs: _PairTables) -> IntArray:
    """The shortest lap among the orders with the widest bottleneck; without relays where that can be."""
    for usable in (np.where(pairs.relayed, 0.0, rate), rate):
        steps = np.unique(usable[usable > 0])
        best: IntArray | None = None
        low, high = 0, len(steps)
        while low < high:
            middle = (low + high) // 2
            order = shortest_cycle(np.where(usable >= steps[middle], pairs.latency_s, np.inf))
            best, low, high = (best, low, middle) if order is None else (order, middle + 1, high)
        if best is not None:
            return best
    return np.arange(len(rate))


def shortest_cycle(cost: FloatArray) -> IntArray | None:
    """The cheapest order of all with cost[i, j] from i to j, from 0 on; None if all are infinite. 2^n * n^2 steps."""
    n = len(cost)
    masks = np.arange(2 ** (n - 1), dtype=np.int64)  # bit j: node j + 1 has been visited
    size = sum((masks >> j) & 1 for j in range(n - 1))
    total = np.full((len(masks), n), np.inf)
    total[0, 0] = 0.0
    before = np.zeros((len(masks), n), dtype=np.int64)
    for visited in range(n - 1):
        layer = masks[size == visited]
        reach = total[layer][:, :, None] + cost
        came, least = reach.argmin(axis=1), reach.min(axis=1)
        for j in range(1, n):
            free = (layer >> (j - 1)) & 1 == 0
            grown = layer[free] | (1 << (j - 1))
            total[grown, j], before[grown, j] = least[free, j], came[free, j]
    ends = total[-1] + cost[:, 0]
    node, mask = int(ends.argmin()), len(masks) - 1
    if not np.isfinite(ends[node]):
        return None
    order = []
    while node:
        order.append(node)
        node, mask = int(before[mask, node]), mask ^ (1 << (node - 1))
    return np.array([0, *order[::-1]], dtype=np.int64)


def _near_order(rate: FloatArray, pairs: _PairTables) -> IntArray:
    """Nearest neighbours from chip 0 on, then 2-opt on the seconds of a reference message."""
    with np.errstate(divide="ignore"):
        seconds = pairs.latency_s + REFERENCE_NBYTES * np.where(pairs.relayed, 2.0, 1.0) / rate
    seconds = np.maximum(seconds, seconds.T)
    np.fill_diagonal(seconds, 0.0)
    finite = np.isfinite(seconds)
    seconds = np.where(finite, seconds, 1e3 * len(seconds) * seconds[finite].max())
    order, free = [0], np.ones(len(seconds), dtype=np.bool_)
    free[0] = False
    while free.any():
        order.append(int(np.where(free, seconds[order[-1]], np.inf).argmin()))
        free[order[-1]] = False
    return _exchanged(np.array(order, dtype=np.int64), seconds)


def _exchanged(order: IntArray, seconds: FloatArray) -> IntArray:
    """2-opt: turns parts of the order round as long as that makes the lap shorter."""
    n, better = len(order), True
    while better:
        better = False
        for i in range(n - 2):
            a, b = order[i], order[i + 1]
            c, d = order[i + 2 :], np.append(order[i + 3 :], order[0])
            gain = seconds[a, b] + seconds[c, d] - seconds[a, c] - seconds[b, d]
            j = int(gain.argmax())
            if gain[j] > 1e-9 * seconds[a, b]:
                order[i + 1 : i + 3 + j] = order[i + 1 : i + 3 + j][::-1].copy()
                better = True
    return order
