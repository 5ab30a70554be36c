"""Best paths over wires: the smallest latency, then the fewest wires, then the widest bottleneck.

Over paths alike in the first two a message spreads (`ways`), up to MOST_WAYS of them, the widest, so that the busiest
wire carries as little of it as may be (`spreading`); among up to EXACT_NODES nodes it has all that the wires of these
paths can carry. Where one path is asked for (`routes`), it is one of the widest, by a hash of its two ends. Nodes are
told apart by where they first appear among the wires, never by their number: a network whose chips are
relabelled, its wires in the same order, has the same paths over the same wires.

Paths are found from one source to all nodes at once (Bellman-Ford over whole columns of wires), when they are
first asked for; those of the latest sources are kept up to a fixed size, so that memory grows with the wires and
not with the pairs.

Latencies are compared as whole multiples of what divides them all (where nothing does, of a small part of the
largest), so that equal sums are equal.
Not modelled: paths that change with load.
"""

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from comms.errors import CommsError
from comms.networks.spreading import spread
from comms.networks.topology import (
    FloatArray,
    IntArray,
    Routes,
    Topology,
    Ways,
    Wires,
    merged_routes,
    merged_ways,
    ranges,
    repeats_before,
    routes_of,
)

BoolArray: TypeAlias = NDArray[np.bool_]
PathTree: TypeAlias = tuple[IntArray, FloatArray]  # [nodes] cost and width of the best path from one source
# Trees, their roots, and of each message its tree and its two ends.
_Ends: TypeAlias = tuple[PathTree, IntArray, IntArray, IntArray, IntArray]
Value = TypeVar("Value", np.int64, np.float64)

FAR = np.int64(2**62)  # cost of what cannot be reached; one wire more still fits into 64 bits
MOST_WAYS = 16  # equal paths that one message spreads over
EXACT_NODES = 32  # of more the ways of a pair may carry less than their wires could
BLOCK_CELLS = 2**21  # sources times wires (or nodes) that are worked on at once
KEPT_CELLS = 2**22  # sources times nodes whose trees are kept: 64 MiB


@dataclass(frozen=True, slots=True, eq=False)
class Paths:
    """The best paths over wires, from the trees of their sources."""

    num_nodes: int
    wires: Wires
    passes: BoolArray  # [nodes] whether a node passes on what is not for it
    order: IntArray  # [wires] wires by head, then by number
    first: IntArray  # [nodes + 1] where the wires into a node begin in `order`
    weights: IntArray  # [wires] in `order`: latency, then one per wire
    # [nodes] the only wire out of a node, -1 if there are several or its head passes nothing on
    start: IntArray
    root: IntArray  # [nodes] where trees for what a node sends begin: at the head of `start`, or itself
    appearance: IntArray  # [nodes] rank by first appearance among the wires
    _trees: OrderedDict[int, PathTree] = field(default_factory=OrderedDict, init=False, repr=False)

    def routes(self, src: IntArray, dst: IntArray) -> Routes:
        """One path per pair; empty where both ends are the same."""
        parts = [(of, self._traced(*ends)) for of, ends in self._blocks_of(src, dst)]
        return merged_routes(len(src), parts)

    def ways(self, src: IntArray, dst: IntArray) -> Ways:
        """All paths of the smallest cost of each pair, and what each carries; empty where both ends are the same."""
        parts = [(of, self._spread(*ends)) for of, ends in self._blocks_of(src, dst)]
        return merged_ways(len(src), parts)

    def _blocks_of(self, src: IntArray, dst: IntArray) -> Iterator[tuple[IntArray, _Ends]]:
        """Pairs that differ, by number, in blocks that fit."""
        src, dst = node_pairs(src, dst, self.num_nodes)
        roots, row = np.unique(self.root[src], return_inverse=True)
        for block in _blocks(len(roots), self.num_nodes):
            messages = np.flatnonzero((row >= block.start) & (row < block.stop) & (src != dst))
            if not len(messages):
                continue
            trees = self._trees_of(roots[block])
            for some in _blocks(len(messages), MOST_WAYS * int(np.diff(self.first).max(initial=1))):
                of = messages[some]
                yield of, (trees, roots[block], row[of] - block.start, src[of], dst[of])

    def latencies(self, sources: IntArray) -> FloatArray:
        """[sources, nodes] Smallest latency from each source to each node in seconds; inf where there is no way."""
        rows = [
            self._cheapest(self.wires.latency_s[self.order], sources[block], np.float64(np.inf)).T
            for block in _blocks(len(sources), max(self.num_nodes, self.wires.num_wires))
        ]
        return np.concatenate(rows)

    def check_chips_meet(self, num_chips: int) -> None:
        """Raises CommsError with two chips of which one cannot reach the other. O(wires), from chip 0."""
        for tail, head, there in (
            (self.wires.tail, self.wires.head, "from chip 0 to chip {}"),
            (self.wires.head, self.wires.tail, "from chip {} to chip 0"),
        ):
            reached = within_reach(tail, head, self.passes)
            if not reached[:num_chips].all():
                chip = int(np.flatnonzero(~reached[:num_chips])[0])
                raise _no_way(there.format(chip))

    def _trees_of(self, sources: IntArray) -> PathTree:
        """[sources, nodes] Costs and widths, kept from earlier or found now."""
        missing = np.array(
            [source for source in sources.tolist() if source not in self._trees], dtype=np.int64
        )
        found: dict[int, PathTree] = {}
        for block in _blocks(len(missing), max(self.num_nodes, self.wires.num_wires)):
            cost = self._cheapest(self.weights, missing[block], FAR)
            width = self._widest(cost, missing[block])
            found.update(
                (source, (cost[:, i].copy(), width[:, i].copy()))
                for i, source in enumerate(missing[block].tolist())
            )
        trees = [found[source] if source in found else self._trees[source] for source in sources.tolist()]
        self._trees.update(found)
        while len(self._trees) > max(1, KEPT_CELLS // self.num_nodes):
            self._trees.popitem(last=False)
        return np.stack([cost for cost, _ in trees]), np.stack([width for _, width in trees])

    def _cheapest(self, weights: NDArray[Value], sources: IntArray, far: Value) -> NDArray[Value]:
        """[nodes, sources] Smallest sums of weights (of the wires in `order`).

        Relaxes the wires out of all nodes that have come nearer to any source, until none does.
        """
        cost = np.full((self.num_nodes, len(sources)), far, dtype=weights.dtype)
        cost[sources, np.arange(len(sources))] = 0
        tails, heads = self.wires.tail[self.order], self.wires.head[self.order]
        nearer = np.zeros(self.num_nodes, dtype=np.bool_)
        nearer[sources] = True
        while True:
            active = np.flatnonzero(nearer[tails])
            if not len(active):
                return cost
            tail = tails[active]
            reach = np.where(self._leads(tail, sources), cost[tail], far) + weights[active][:, None]
            starts = np.flatnonzero(np.diff(heads[active], prepend=-1))
            ends = heads[active][starts]
            best = np.minimum.reduceat(reach, starts, axis=0)
            nearer[:] = False
            nearer[ends] = (best < cost[ends]).any(axis=1)
            cost[ends] = np.minimum(best, cost[ends])

    def _widest(self, cost: IntArray, sources: IntArray) -> FloatArray:
        """[nodes, sources] Largest bottleneck among the paths of the smallest cost; 0 where there is none."""
        width = np.zeros(cost.shape)
        width[sources, np.arange(len(sources))] = np.inf
        if not len(self.order):
            return width
        tails, heads = self.wires.tail[self.order], self.wires.head[self.order]
        is_best = cost[tails] + self.weights[:, None] == cost[heads]
        is_best &= self._leads(tails, sources)
        rates = np.where(is_best, self.wires.bytes_per_s[self.order][:, None], 0.0)
        wider = np.zeros(self.num_nodes, dtype=np.bool_)
        wider[sources] = True
        while True:
            active = np.flatnonzero(wider[tails])
            if not len(active):
                return width
            starts = np.flatnonzero(np.diff(heads[active], prepend=-1))
            ends = heads[active][starts]
            best = np.maximum.reduceat(np.minimum(width[tails[active]], rates[active]), starts, axis=0)
            wider[:] = False
            wider[ends] = (best > width[ends]).any(axis=1)
            width[ends] = np.maximum(best, width[ends])

    def _leads(self, tails: IntArray, sources: IntArray) -> BoolArray:
        """[tails, sources] Whether what comes from a source may leave a node."""
        leads: BoolArray = self.passes[tails][:, None] | (tails[:, None] == sources)
        return leads

    def _traced(
        self, trees: PathTree, roots: IntArray, row: IntArray, src: IntArray, dst: IntArray
    ) -> Routes:
        """Paths from their ends back to their roots, one wire of all messages at a time."""
        needs, need = self._needed(trees, row, src, dst)
        key = mixed(self.appearance[src] * self.num_nodes + self.appearance[dst])
        node, backwards = dst.copy(), list[IntArray]()
        active = np.flatnonzero(node != roots[row])
        while len(active):
            wires, first, case = self._last_wires(
                trees, roots, row[active], node[active], needs, need[active]
            )
            choices = np.diff(first)[case].astype(np.uint64)
            column = np.full(len(src), -1, dtype=np.int64)
            column[active] = wires[first[case] + (key[active] % choices).astype(np.int64)]
            backwards.append(column)
            node[active] = self.wires.tail[column[active]]
            key = mixed(key)
            active = active[node[active] != roots[row[active]]]
        return routes_of([self.start[src], *backwards[::-1]])

    def _spread(self, trees: PathTree, roots: IntArray, row: IntArray, src: IntArray, dst: IntArray) -> Ways:
        """All paths, from their ends back to their roots; where there are too many, some by a hash."""
        self._check_reached(trees, row, src, dst)
        none, need = np.zeros(1), np.zeros(len(src), dtype=np.int64)  # any width
        message, node, backwards = np.arange(len(src)), dst.copy(), list[IntArray]()
        width = np.full(len(src), np.inf)
        key = mixed(self.appearance[src] * self.num_nodes + self.appearance[dst])
        while (is_active := node != roots[row[message]]).any():
            of = message[is_active]
            wires, first, case = self._last_wires(trees, roots, row[of], node[is_active], none, need[of])
            counts = np.ones(len(node), dtype=np.int64)
            counts[is_active] = np.diff(first)[case]
            origin = np.repeat(np.arange(len(node)), counts)
            wire = np.full(len(origin), -1, dtype=np.int64)
            wire[is_active[origin]] = wires[ranges(first[case], counts[is_active])]
            key, message = mixed(key[origin] + wire.astype(np.uint64)), message[origin]
            node = np.where(wire >= 0, self.wires.tail[wire], node[origin])
            width = np.minimum(width[origin], np.append(self.wires.bytes_per_s, np.inf)[wire])
            kept = _first_of_each(message, np.minimum(width, trees[1][row[message], node]), key, MOST_WAYS)
            origin, wire, key, message = origin[kept], wire[kept], key[kept], message[kept]
            node, width = node[kept], width[kept]
            backwards = [*(column[origin] for column in backwards), wire]
        routes = routes_of([self.start[src[message]], *backwards[::-1]])
        return spread(routes, message, self.wires, exact=self.num_nodes <= EXACT_NODES)

    def _needed(
        self, trees: PathTree, row: IntArray, src: IntArray, dst: IntArray
    ) -> tuple[FloatArray, IntArray]:
        """The widths that paths have, and which one each message's. Raises CommsError where there is no path."""
        self._check_reached(trees, row, src, dst)
        rate = np.append(self.wires.bytes_per_s, np.inf)  # of no wire, number -1
        return np.unique(np.minimum(trees[1][row, dst], rate[self.start[src]]), return_inverse=True)

    def _check_reached(self, trees: PathTree, row: IntArray, src: IntArray, dst: IntArray) -> None:
        far = trees[0][row, dst] >= FAR
        if far.any():
            lost = int(np.argmax(far))
            raise _no_way(f"from node {src[lost]} to node {dst[lost]}")

    def _last_wires(
        self,
        trees: PathTree,
        roots: IntArray,
        row: IntArray,
        node: IntArray,
        needs: FloatArray,
        need: IntArray,
    ) -> tuple[IntArray, IntArray, IntArray]:
        """As `_choices`, found once for what is alike: message i is case[i]."""
        place, cases = np.unique(row * self.num_nodes + node, return_inverse=True)
        cases, case = np.unique(cases * len(needs) + need, return_inverse=True)
        at, level = place[cases // len(needs)], needs[cases % len(needs)]
        wires, first = self._choices(trees, roots, at // self.num_nodes, at % self.num_nodes, level)
        return wires, first, case

    def _choices(
        self, trees: PathTree, roots: IntArray, row: IntArray, node: IntArray, need: FloatArray
    ) -> tuple[IntArray, IntArray]:
        """For each case the last wires of all best paths to a node: case i has wires[first[i] : first[i + 1]]."""
        cost, width = trees
        counts = self.first[node + 1] - self.first[node]
        slot = ranges(self.first[node], counts)
        case = np.repeat(np.arange(len(node)), counts)
        wire, of = self.order[slot], row[case]
        tail = self.wires.tail[wire]
        fits = cost[of, tail] + self.weights[slot] == cost[of, node[case]]
        fits &= np.minimum(width[of, tail], self.wires.bytes_per_s[wire]) >= need[case]
        fits &= self.passes[tail] | (tail == roots[of])
        first = np.concatenate([[0], np.cumsum(np.bincount(case[fits], minlength=len(node)))])
        return wire[fits], first


def _first_of_each(message: IntArray, width: FloatArray, key: NDArray[np.uint64], most: int) -> IntArray:
    """[kept] Rows, ascending: of each message at most so many, the widest, of these those with the smallest keys."""
    if np.bincount(message).max(initial=0) <= most:
        return np.arange(len(message))
    order = np.lexsort((key, -width, message))
    return np.sort(order[repeats_before(message[order]) < most])


def paths_of(wires: Wires, topology: Topology, through_chips: bool) -> Paths:
    """The best paths over some wires of a topology, which may be fewer than it has."""
    num_nodes = topology.num_nodes
    order = np.lexsort((np.arange(wires.num_wires), wires.head))
    first = np.searchsorted(wires.head[order], np.arange(num_nodes + 1))
    passes = np.ones(num_nodes, dtype=np.bool_)
    passes[: topology.num_chips] = through_chips
    ends = np.stack([wires.tail, wires.head], axis=1).ravel()
    seen = np.full(num_nodes, len(ends), dtype=np.int64)
    np.minimum.at(seen, ends, np.arange(len(ends)))
    appearance = np.empty(num_nodes, dtype=np.int64)
    appearance[np.argsort(seen, kind="stable")] = np.arange(num_nodes)
    leaving = np.bincount(wires.tail, minlength=num_nodes)
    start = np.full(num_nodes, -1, dtype=np.int64)
    start[wires.tail] = np.arange(wires.num_wires)
    start[leaving != 1] = -1
    start[start >= 0] = np.where(passes[wires.head[start[start >= 0]]], start[start >= 0], -1)
    root = np.where(start < 0, np.arange(num_nodes), np.append(wires.head, 0)[start])
    weights = _weights(wires, num_nodes)[order]
    return Paths(num_nodes, wires, passes, order, first, weights, start, root, appearance)


def _weights(wires: Wires, num_nodes: int) -> IntArray:
    """Latency and one wire as one whole number, so that the sums over any path are exact and below FAR."""
    hop_bits = num_nodes.bit_length()
    units = np.zeros(wires.num_wires)
    longest = float(wires.latency_s.max(initial=0.0))
    if longest:
        finest = longest / 2.0 ** min(40, 60 - 2 * hop_bits)
        units = np.rint(
            wires.latency_s / max(_divisor(np.unique(wires.latency_s / longest)) * longest, finest)
        )
    weights: IntArray = units.astype(np.int64) * 2**hop_bits + 1
    return weights


def _divisor(values: FloatArray) -> float:
    """What all values up to 1 are multiples of, by Euclid's algorithm to nine digits; 0 where there is nothing."""
    divisor = 1.0
    for value in values.tolist():
        rest = value
        while rest > 1e-9:
            divisor, rest = rest, divisor - rest * round(divisor / rest)
            rest = abs(rest)
        if divisor < 1e-6:
            return 0.0
    return divisor


def node_pairs(src: IntArray, dst: IntArray, num_nodes: int) -> tuple[IntArray, IntArray]:
    """Both ends as columns of integers. Raises CommsError for a node that does not exist."""
    src, dst = np.asarray(src, dtype=np.int64), np.asarray(dst, dtype=np.int64)
    for ends in (src, dst):
        wrong = (ends < 0) | (ends >= num_nodes)
        if wrong.any():
            raise CommsError(
                f"there is no node {ends[wrong][0]}",
                "network",
                f"nodes are 0 to {num_nodes - 1}, chips first",
            )
    return src, dst


def within_reach(tail: IntArray, head: IntArray, passes: BoolArray) -> BoolArray:
    """[nodes] What can be reached from node 0."""
    reached = np.zeros(len(passes), dtype=np.bool_)
    reached[0] = True
    leads = passes.copy()
    leads[0] = True
    while True:
        new = head[(reached & leads)[tail] & ~reached[head]]
        if not len(new):
            return reached
        reached[new] = True


def _no_way(between: str) -> CommsError:
    return CommsError(f"there is no way {between}", "network", "join them by a link, or leave a wire alive")


def mixed(keys: NDArray[np.int64] | NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Well mixed bits of each key: the finaliser of splitmix64 (Steele, Lea, Flood, OOPSLA 2014)."""
    bits = keys.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))


def _blocks(count: int, cells_each: int) -> list[slice]:
    """Slices of `count` rows that hold about BLOCK_CELLS cells."""
    step = max(1, BLOCK_CELLS // max(1, cells_each))
    return [slice(start, min(start + step, count)) for start in range(0, count, step)]
