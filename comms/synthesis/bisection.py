"""Bisection: the least bandwidth between two halves of a network, and bounds that no collective can beat.

A cut puts one half of the chips (one more on either side where their number is odd) on one side and the switches
where they let the least across. Its capacity is what its wires carry from one side to the other, the smaller of
both directions; a half-duplex wire counts whole. Bisection bandwidth is the least capacity of all cuts.

    torus, mesh of even sides   n / d wires' rates per way across the dimension d where that is least (for equal links:
                                Leighton, Introduction to Parallel Algorithms and Architectures, 1992, section 1.9;
                                Bollobas and Leader, Combinatorica 11, 1991)
    full mesh                   all cuts are alike
    up to 16 chips              every cut, as long as chips and switches together have no more than MOST_CUTS
    all else                    the best of some straight cuts after exchanges of pairs (Kernighan and Lin, Bell System
                                Technical J. 49, 1970): the bisection is no larger, and may be smaller

Lower bounds for a collective follow from any cut: what one side has to send the other over its capacity, where a
side may be a single chip. They hold for every schedule, however it shares out and relays its bytes (Chan,
Heimlich, Purkayastha, van de Geijn, Concurrency and Computation 19, 2007, section 4).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import combinations
from math import comb, prod

import numpy as np

from comms.collectives.schedule import Op
from comms.networks.fabrics.dragonfly import Dragonfly
from comms.networks.fabrics.torus_mesh import FullMesh, Torus
from comms.networks.paths import BoolArray, paths_of
from comms.networks.ring_orders import SEARCHED_CHIPS, hierarchy
from comms.networks.tiered import sole_shape
from comms.networks.topology import FloatArray, Topology, Wires

EXACT_CHIPS = 16
MOST_CUTS = 2**21
BLOCK_CUTS = 2**15
DENSE_NODES = 2048  # more are not exchanged: gains need a table of pairs
BOUND_SOURCES = 64  # chips from which the farthest one is looked for


class Proof(StrEnum):
    """Why a cut is thought to be the least."""

    CLOSED_FORM = "closed form"
    EVERY_CUT = "every cut tried"
    BEST_FOUND = "best cut found"  # the bisection is no larger


@dataclass(frozen=True, slots=True, eq=False)
class Cut:
    """Two halves of the chips and what passes between them."""

    bytes_per_s: float  # the smaller of both directions
    there_bytes_per_s: float  # from the chips of `side` to the others
    back_bytes_per_s: float
    side: BoolArray  # [chips]
    proof: Proof


def bisection(topology: Topology) -> Cut:
    """The cut into halves that the least can pass."""
    wires, shape = topology.wires(), sole_shape(topology)
    n = topology.num_chips
    if n == 1:
        return _cut(wires, np.ones(topology.num_nodes, dtype=np.bool_), n, Proof.CLOSED_FORM)
    # Closed forms first: they are exact at any size. Then every cut, as far as that can be afforded; then a search.
    if shape.num_nodes < topology.num_nodes:  # chips of a larger torus: others pass nothing on for them
        return bisection(shape)
    if isinstance(shape, FullMesh):
        return _cut(wires, np.arange(n) < n // 2, n, Proof.CLOSED_FORM)
    if isinstance(shape, Torus) and shape.access is None and all(d % 2 == 0 or d == 1 for d in shape.dims):
        sides = [_straight(shape.dims, dim) for dim, size in enumerate(shape.dims) if size > 1]
        return _least(
            [_cut(wires, side, n, Proof.CLOSED_FORM) for side in sides or [np.ones(n, dtype=np.bool_)]]
        )
    num_switches = topology.num_nodes - n
    if n <= EXACT_CHIPS and 2 * comb(n, n // 2) << num_switches <= MOST_CUTS:
        return _every_cut(wires, n, topology.num_nodes)
    return _least([_improved(wires, side, n, topology.num_nodes) for side in _candidates(topology)])


def narrow_cuts(topology: Topology) -> tuple[Cut, ...]:
    """Cuts that may bound a collective: the bisection, and around each subgroup of chips that are close together."""
    wires, num_chips, cuts = topology.wires(), topology.num_chips, [bisection(topology)]
    if 2 < num_chips <= SEARCHED_CHIPS:
        for subgroup in (
            subgroup for level in hierarchy(topology) for subgroup in level if 1 < len(subgroup) < num_chips
        ):
            chips = np.isin(np.arange(num_chips), subgroup)
            side = _with_switches(wires, chips, topology.num_nodes)
            cuts.append(_cut(wires, side, num_chips, Proof.BEST_FOUND))
    return tuple(cuts)


def bandwidth_bound(
    topology: Topology,
    op: Op,
    nbytes: float,
    root: int = 0,
    switches_reduce: bool = False,
    cuts: Sequence[Cut] = (),
) -> float:
    """Seconds that the wires need at least; rank r is chip r, `nbytes` as in `collectives.schedule`.

    `switches_reduce`: switches add and copy, so that chips send less in all. Beside single chips `cuts` are used.
    """
    wires, n = topology.wires(), topology.num_chips
    if n < 2 or op is Op.BARRIER:
        return 0.0
    out_of, into = (np.bincount(ends, wires.bytes_per_s, n)[:n] for ends in (wires.tail, wires.head))
    # A chip by itself is a cut too, with all its own wires across.
    is_inside = np.eye(n, dtype=np.bool_)
    sends = np.array([_crossing(op, inside, root) for inside in is_inside]) * nbytes
    receives = np.array([_crossing(op, ~inside, root) for inside in is_inside]) * nbytes
    bounds = [float((sends / out_of).max()), float((receives / into).max())]
    # All that is sent leaves some chip and enters another. (Switches that add take in what no chip receives.)
    if not switches_reduce:
        total = _total(op, n) * nbytes
        bounds += [total / float(out_of.sum()), total / float(into.sum())]
    for cut in cuts:
        bounds.append(_crossing(op, cut.side, root) * nbytes / cut.there_bytes_per_s)
        bounds.append(_crossing(op, ~cut.side, root) * nbytes / cut.back_bytes_per_s)
    return max(bounds)


def latency_bound(topology: Topology, op: Op, root: int = 0) -> float:
    """Seconds until what one chip has can have come to where it is needed, over the quickest wires."""
    chips = np.arange(topology.num_chips)
    # The farthest pair over some of the sources only: a bound that is too low is still a bound.
    some = chips[:: -(-len(chips) // BOUND_SOURCES)]
    paths = paths_of(topology.wires(), topology, through_chips=True)
    match op:
        case Op.BROADCAST | Op.SCATTER:
            return float(paths.latencies(chips[root : root + 1])[:, chips].max())
        case Op.REDUCE | Op.GATHER:
            return float(paths.latencies(some)[:, root].max())
        case _:
            return float(paths.latencies(some)[:, chips].max())


def makespan_bound(
    topology: Topology,
    op: Op,
    nbytes: float,
    root: int = 0,
    switches_reduce: bool = False,
    cuts: Sequence[Cut] = (),
) -> float:
    """Seconds that no schedule can beat: the larger of what latency and what bandwidth ask for."""
    wires = bandwidth_bound(topology, op, nbytes, root, switches_reduce, cuts)
    return max(wires, latency_bound(topology, op, root))


def _crossing(op: Op, inside: BoolArray, root: int) -> float:
    """Share of nbytes that the ranks inside have to send to those outside, together."""
    n, a = len(inside), int(inside.sum())
    b = n - a
    if a == 0 or b == 0:
        return 0.0
    shares = {
        Op.ALL_REDUCE: 1.0,
        Op.ALL_GATHER: a / n,
        Op.REDUCE_SCATTER: b / n,
        Op.ALL_TO_ALL: a * b / n,
        Op.BROADCAST: float(inside[root]),
        Op.REDUCE: float(not inside[root]),
        Op.GATHER: a / n * (not inside[root]),
        Op.SCATTER: b / n * bool(inside[root]),
        Op.BARRIER: 0.0,
    }
    return shares[op]


def _total(op: Op, n: int) -> float:
    """What all chips send in all over nbytes, where only chips add and copy."""
    match op:
        case Op.ALL_REDUCE:  # n - 1 partial sums to make one whole, which n - 1 chips then get
            return 2.0 * (n - 1)
        case Op.GATHER | Op.SCATTER:
            return (n - 1) / n
        case Op.BARRIER:
            return 0.0
        case _:
            return n - 1.0


def _cut(wires: Wires, side: BoolArray, num_chips: int, proof: Proof) -> Cut:
    """The cut with these nodes (chips first) on one side."""
    there = float(wires.bytes_per_s[side[wires.tail] & ~side[wires.head]].sum())
    back = float(wires.bytes_per_s[~side[wires.tail] & side[wires.head]].sum())
    return Cut(min(there, back), there, back, side[:num_chips], proof)


def _least(cuts: list[Cut]) -> Cut:
    return min(cuts, key=lambda cut: cut.bytes_per_s)


def _straight(dims: tuple[int, ...], first: int) -> BoolArray:
    """[chips] Half of a mesh: below the middle of one dimension; a layer in the middle is halved in its turn."""
    place = np.arange(prod(dims)) // prod(dims[:first]) % dims[first]
    side: BoolArray = place < dims[first] // 2
    if dims[first] % 2 and prod(dims) > dims[first]:
        rest = (*dims[:first], 1, *dims[first + 1 :])
        side[place == dims[first] // 2] = _straight(rest, int(np.argmax(rest)))
    return side


def _candidates(topology: Topology) -> Iterator[BoolArray]:
    """Halves of the chips to start from."""
    n, shape = topology.num_chips, sole_shape(topology)
    yield np.arange(n) < n // 2
    if isinstance(shape, Torus):
        yield from (_straight(shape.dims, dim) for dim, size in enumerate(shape.dims) if size > 1)
    elif isinstance(shape, Dragonfly):
        routers = np.arange(n) // shape.chips_per_router
        order = np.argsort(routers % shape.routers_per_group, kind="stable")
        yield np.isin(np.arange(n), order[: n // 2])
    elif n <= DENSE_NODES:
        near = paths_of(topology.wires(), topology, through_chips=True).latencies(np.arange(1))[0, :n]
        yield np.isin(np.arange(n), np.argsort(near, kind="stable")[: n // 2])


def _every_cut(wires: Wires, num_chips: int, num_nodes: int) -> Cut:
    """All halves of the chips, with all ways to place the switches."""
    capacity = _capacities(wires, num_nodes)
    num_switches = num_nodes - num_chips
    switches = (np.arange(2**num_switches)[:, None] >> np.arange(num_switches)) & 1
    # A cut of an odd number of chips has two sizes, as what passes one way and what passes the other may differ.
    best, side = np.inf, np.zeros(num_nodes, dtype=np.bool_)
    for size in {num_chips // 2, -(-num_chips // 2)}:
        rows = np.array(list(combinations(range(num_chips), size)), dtype=np.int64).reshape(-1, size)
        chips = np.zeros((len(rows), num_chips))
        np.put_along_axis(chips, rows, 1.0, axis=1)
        step = max(1, BLOCK_CUTS // len(switches))
        for start in range(0, len(rows), step):
            some = chips[start : start + step]
            # Rows of 0 and 1 for the nodes: two products of matrices are what passes in a block of cuts.
            nodes = np.hstack([np.repeat(some, len(switches), axis=0), np.tile(switches, (len(some), 1))])
            passed = ((nodes @ capacity) * (1 - nodes)).sum(axis=1)
            if passed.min() < best:
                best, side = float(passed.min()), nodes[passed.argmin()] > 0
    return _cut(wires, side, num_chips, Proof.EVERY_CUT)


def _improved(wires: Wires, chips: BoolArray, num_chips: int, num_nodes: int) -> Cut:
    """A cut after its switches have been placed and, where that is affordable, pairs of chips been exchanged."""
    side = _with_switches(wires, chips, num_nodes)
    if num_nodes <= DENSE_NODES:
        capacity = _capacities(wires, num_nodes)
        weights = capacity + capacity.T
        while (better := _exchanged(weights, side, num_chips)) is not None:
            side = better
    return _cut(wires, side, num_chips, Proof.BEST_FOUND)


def _capacities(wires: Wires, num_nodes: int) -> FloatArray:
    capacity = np.zeros((num_nodes, num_nodes))
    np.add.at(capacity, (wires.tail, wires.head), wires.bytes_per_s)
    return capacity


def _with_switches(wires: Wires, chips: BoolArray, num_nodes: int) -> BoolArray:
    """[nodes] Each switch with those neighbours that it has the most rate to, from the chips inwards."""
    # Switches take the side of the majority around them, layer by layer outwards: a few rounds reach any root.
    pull = np.zeros(num_nodes)
    pull[: len(chips)] = np.where(chips, 1.0, -1.0)
    for _ in range(16):
        drawn = np.zeros(num_nodes)
        np.add.at(drawn, wires.head, wires.bytes_per_s * pull[wires.tail])
        np.add.at(drawn, wires.tail, wires.bytes_per_s * pull[wires.head])
        pull[len(chips) :] = np.sign(drawn[len(chips) :])
    return pull > 0


def _exchanged(weights: FloatArray, side: BoolArray, num_chips: int) -> BoolArray | None:
    """One pass of Kernighan and Lin: pairs of chips change sides for good up to the best moment; then switches move.

    None where no cut on the way is better.
    """
    sign = np.where(side, 1.0, -1.0)
    pull = -sign * (weights @ sign)  # [nodes] rate across less rate inside
    free = np.zeros(len(side), dtype=np.bool_)
    free[:num_chips] = True
    gains, moves = [0.0], []
    while (free & (sign > 0)).any() and (free & (sign < 0)).any():
        # The gain of a pair is that of both alone, less twice the rate between them, which passes before and after.
        one = int(np.where(free & (sign > 0), pull, -np.inf).argmax())
        gain = np.where(free & (sign < 0), pull - 2 * weights[one], -np.inf)
        other = int(gain.argmax())
        gains.append(gains[-1] + float(pull[one] + gain[other]))
        free[[one, other]] = False
        moves.append((one, other))
        for node in (one, other):
            pull += 2 * sign * sign[node] * weights[node]
            sign[node] = -sign[node]
            pull[node] = -pull[node]
    # Pairs are exchanged to the end, also at a loss, and only then the best moment is taken: that leads out of cuts
    # that no single exchange improves.
    best = int(np.argmax(gains))
    moved = side.copy()
    for pair in moves[:best]:
        moved[list(pair)] ^= True
    # Better by more than roundings, or passes would go on for ever.
    settled = _settled(weights, moved, num_chips)
    return settled if _across(weights, settled) < _across(weights, side) * (1 - 1e-9) else None


def _settled(weights: FloatArray, side: BoolArray, num_chips: int) -> BoolArray:
    """Moves one switch after another as long as less passes."""
    side = side.copy()
    for _ in range(len(side)):
        sign = np.where(side, 1.0, -1.0)
        pull = -sign * (weights @ sign)
        pull[:num_chips] = 0.0
        node = int(pull.argmax())
        if pull[node] <= 1e-9 * weights[node].sum():
            break
        side[node] ^= True
    return side


def _across(weights: FloatArray, side: BoolArray) -> float:
    return float(weights[np.ix_(side, ~side)].sum())
