"""Networks given edge by edge, and any network with some of its wires dead or slow.

A message takes the path with the smallest latency, then the fewest wires, then the widest bottleneck. Among paths
alike in all three it takes one by a hash of its two ends (equal-cost multi-path). Nodes are told apart by where
they first appear in the list of edges, never by their number or name: a network whose chips are relabelled, its
edges in the same order, has the same paths over the same wires.

Paths are found from one source to all nodes at once (Bellman-Ford over whole columns of wires), when they are
first asked for; those of the latest sources are kept up to a fixed size, so that memory grows with the wires and
not with the pairs.

Latencies are compared as whole multiples of a millionth of the largest or finer, so that equal sums are equal.
Not modelled: paths that change with load, and which of several parallel edges a real switch would hash to.
"""

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from math import isfinite
from typing import TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from comms.errors import CommsError
from comms.links import Link
from comms.topology import FloatArray, IntArray, Routes, Topology, Wires, routes_of

BoolArray: TypeAlias = NDArray[np.bool_]
Tree: TypeAlias = tuple[IntArray, FloatArray]  # [nodes] cost and width of the best path from one source
Value = TypeVar("Value", np.int64, np.float64)

FAR = np.int64(2**62)  # cost of what cannot be reached; one wire more still fits into 64 bits
BLOCK_CELLS = 2**21  # sources times wires (or nodes) that are worked on at once
KEPT_CELLS = 2**22  # sources times nodes whose trees are kept: 64 MiB


class Duplex(StrEnum):
    """What the two directions of an edge have to do with each other."""

    FULL = "full"  # each has the whole rate
    HALF = "half"  # they share it
    ONE_WAY = "one_way"  # there is only a to b


@dataclass(frozen=True, slots=True)
class Edge:
    """One link between two nodes: chips by number, switches by name or by number (they follow the chips)."""

    a: int | str
    b: int | str
    link: Link
    duplex: Duplex = Duplex.FULL
    back: Link | None = None  # from b to a where it differs
    tier: str = "link"
    forward_nbytes: float = 0.0  # what its far end takes in before it sends on; see Wires


@dataclass(frozen=True, slots=True, eq=False)
class Graph:
    """A network of any shape. Raises CommsError for edges that make no sense and for chips that cannot meet."""

    num_chips: int
    edges: tuple[Edge, ...]
    switches: tuple[str, ...] = ()
    through_chips: bool = True  # chips pass on what is not for them
    _wires: Wires = field(init=False, repr=False)
    _paths: "Paths" = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if self.num_chips < 1:
            raise CommsError(f"{self.num_chips} chips", "graph", "give at least one chip")
        object.__setattr__(self, "_wires", _wires_of(self))
        object.__setattr__(self, "_paths", paths_of(self._wires, self, self.through_chips))
        self._paths.check_chips_meet(self.num_chips)

    @property
    def num_nodes(self) -> int:
        return self.num_chips + len(self.switches)

    @property
    def tiers(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(edge.tier for edge in self.edges))

    def wires(self) -> Wires:
        """Edge by edge: first a to b, then b to a where there is a way back."""
        return self._wires

    def routes(self, src: IntArray, dst: IntArray) -> Routes:
        """The best paths; see the module. Raises CommsError where there is none."""
        return self._paths.routes(src, dst)


@dataclass(frozen=True, slots=True, eq=False)
class Rerouted:
    """A topology without its `dead` wires and with a part of the rate on its `slow` ones.

    Wires keep their order, the dead ones are gone: wire w was number kept[w]. Routes over a dead wire are replaced
    by the best path in what is left; all others stay as they were. Raises CommsError where chips are cut off.
    """

    topology: Topology
    dead: tuple[int, ...] = ()
    slow: Mapping[int, float] = field(default_factory=dict)  # wire to the share of its rate that is left
    kept: IntArray = field(init=False, repr=False)
    _wires: Wires = field(init=False, repr=False)
    _paths: "Paths" = field(init=False, repr=False)

    def __post_init__(self) -> None:
        whole = self.topology.wires()
        self._check(whole.num_wires)
        alive = np.ones(whole.num_wires, dtype=np.bool_)
        alive[list(self.dead)] = False
        object.__setattr__(self, "kept", np.flatnonzero(alive))
        object.__setattr__(self, "_wires", _wires_left(whole, self.kept, self.slow))
        object.__setattr__(self, "_paths", paths_of(self._wires, self, self.through_chips))
        self._paths.check_chips_meet(self.num_chips)

    def _check(self, num_wires: int) -> None:
        for wire in (*self.dead, *self.slow):
            if not 0 <= wire < num_wires:
                raise CommsError(
                    f"there is no wire {wire}", "degraded network", f"wires are 0 to {num_wires - 1}"
                )
        for wire, share in self.slow.items():
            if not 0 < share <= 1:
                raise CommsError(
                    f"a wire cannot have {share} of its rate",
                    f"wire {wire}",
                    "give a share above 0 and up to 1, or name it among the dead",
                )

    @property
    def num_chips(self) -> int:
        return self.topology.num_chips

    @property
    def num_nodes(self) -> int:
        return self.topology.num_nodes

    @property
    def tiers(self) -> tuple[str, ...]:
        return self.topology.tiers

    @property
    def through_chips(self) -> bool:
        """Whether ways round may lead through chips: as graphs say; else where there are no switches."""
        if isinstance(self.topology, Graph | Rerouted):
            return self.topology.through_chips
        return self.topology.num_nodes == self.topology.num_chips

    def wires(self) -> Wires:
        return self._wires

    def routes(self, src: IntArray, dst: IntArray) -> Routes:
        """As the topology routes, where that is still possible."""
        usual = self.topology.routes(src, dst)
        renumbered = np.full(self.topology.wires().num_wires, -1, dtype=np.int64)
        renumbered[self.kept] = np.arange(len(self.kept))
        wires = renumbered[usual.wires]
        lost = np.concatenate([[0], np.cumsum(wires < 0)])
        broken = np.flatnonzero(lost[usual.offsets[1:]] > lost[usual.offsets[:-1]])
        if not len(broken):
            return Routes(usual.offsets, wires)
        around = self._paths.routes(np.asarray(src)[broken], np.asarray(dst)[broken])
        return _replaced(Routes(usual.offsets, wires), broken, around)


@dataclass(frozen=True, slots=True, eq=False)
class Paths:
    """The best paths over wires, from the trees of their sources."""

    num_nodes: int
    wires: Wires
    passes: BoolArray  # [nodes] whether a node passes on what is not for it
    order: IntArray  # [wires] wires by head, then by number
    first: IntArray  # [nodes + 1] where the wires into a node begin in `order`
    weights: IntArray  # [wires] in `order`: latency, then one per wire
    appearance: IntArray  # [nodes] rank by first appearance among the wires
    _trees: OrderedDict[int, Tree] = field(default_factory=OrderedDict, init=False, repr=False)

    def routes(self, src: IntArray, dst: IntArray) -> Routes:
        """One path per pair; empty where both ends are the same."""
        src, dst = node_pairs(src, dst, self.num_nodes)
        sources, row = np.unique(src, return_inverse=True)
        lengths = np.zeros(len(src), dtype=np.int64)
        parts: list[tuple[IntArray, Routes]] = []
        for block in _blocks(len(sources), self.num_nodes):
            messages = np.flatnonzero((row >= block.start) & (row < block.stop) & (src != dst))
            if not len(messages):
                continue
            trees = self._trees_of(sources[block])
            found = self._traced(trees, row[messages] - block.start, src[messages], dst[messages])
            lengths[messages] = np.diff(found.offsets)
            parts.append((messages, found))
        offsets = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(lengths)])
        wires = np.empty(offsets[-1], dtype=np.int64)
        for messages, found in parts:
            wires[ranges(offsets[messages], lengths[messages])] = found.wires
        return Routes(offsets, wires)

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
            reached = _reached(tail, head, self.passes)
            if not reached[:num_chips].all():
                chip = int(np.flatnonzero(~reached[:num_chips])[0])
                raise _no_way(there.format(chip))

    def _trees_of(self, sources: IntArray) -> Tree:
        """[sources, nodes] Costs and widths, kept from earlier or found now."""
        missing = np.array(
            [source for source in sources.tolist() if source not in self._trees], dtype=np.int64
        )
        found: dict[int, Tree] = {}
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
        """[nodes, sources] Smallest sums of weights (of the wires in `order`), by relaxing all wires at once."""
        columns = np.arange(len(sources))
        cost = np.full((self.num_nodes, len(sources)), far, dtype=weights.dtype)
        cost[sources, columns] = 0
        if not len(self.order):
            return cost
        tails, heads, starts = self._ends()
        while True:
            leaving = np.where(self.passes[:, None], cost, far)
            leaving[sources, columns] = 0
            best = np.minimum.reduceat(leaving[tails] + weights[:, None], starts, axis=0)
            better = np.minimum(cost[heads], best)
            if np.array_equal(better, cost[heads]):
                return cost
            cost[heads] = better

    def _widest(self, cost: IntArray, sources: IntArray) -> FloatArray:
        """[nodes, sources] Largest bottleneck among the paths of the smallest cost; 0 where there is none."""
        columns = np.arange(len(sources))
        width = np.zeros(cost.shape)
        width[sources, columns] = np.inf
        if not len(self.order):
            return width
        tails, heads, starts = self._ends()
        tight = cost[tails] + self.weights[:, None] == cost[self.wires.head[self.order]]
        tight &= self.passes[tails][:, None] | (tails[:, None] == sources)
        rates = np.where(tight, self.wires.bytes_per_s[self.order][:, None], 0.0)
        while True:
            best = np.maximum.reduceat(np.minimum(width[tails], rates), starts, axis=0)
            better = np.maximum(width[heads], best)
            if np.array_equal(better, width[heads]):
                return width
            width[heads] = better

    def _ends(self) -> tuple[IntArray, IntArray, IntArray]:
        """Tails of the wires in `order`; the nodes that wires lead to, and where theirs begin."""
        heads = np.flatnonzero(np.diff(self.first))
        return self.wires.tail[self.order], heads, self.first[heads]

    def _traced(self, trees: Tree, row: IntArray, src: IntArray, dst: IntArray) -> Routes:
        """Paths from their ends back to their sources, one wire of all messages at a time."""
        cost, width = trees
        if (cost[row, dst] >= FAR).any():
            lost = int(np.argmax(cost[row, dst] >= FAR))
            raise _no_way(f"from node {src[lost]} to node {dst[lost]}")
        need, node = width[row, dst], dst.copy()
        key = _mixed(self.appearance[src] * self.num_nodes + self.appearance[dst])
        columns: list[IntArray] = []
        active = np.arange(len(src))
        while len(active):
            counts = self.first[node[active] + 1] - self.first[node[active]]
            slot = ranges(self.first[node[active]], counts)
            turn = np.repeat(np.arange(len(active)), counts)
            message, wire = active[turn], self.order[slot]
            tail = self.wires.tail[wire]
            fits = cost[row[message], tail] + self.weights[slot] == cost[row[message], node[message]]
            fits &= np.minimum(width[row[message], tail], self.wires.bytes_per_s[wire]) >= need[message]
            fits &= self.passes[tail] | (tail == src[message])
            choices = np.bincount(turn[fits], minlength=len(active))
            pick = np.cumsum(choices) - choices + (key[active] % choices.astype(np.uint64)).astype(np.int64)
            column = np.full(len(src), -1, dtype=np.int64)
            column[active] = wire[fits][pick]
            columns.append(column)
            node[active] = self.wires.tail[column[active]]
            key = _mixed(key)
            active = active[node[active] != src[active]]
        return routes_of(columns[::-1])


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
    return Paths(num_nodes, wires, passes, order, first, _weights(wires, num_nodes)[order], appearance)


def _weights(wires: Wires, num_nodes: int) -> IntArray:
    """Latency and one wire as one whole number, so that the sums over any path are exact and below FAR."""
    hop_bits = num_nodes.bit_length()
    fineness = 2.0 ** min(40, 60 - 2 * hop_bits)
    longest = float(wires.latency_s.max(initial=0.0))
    units = np.rint(wires.latency_s / longest * fineness) if longest else np.zeros(wires.num_wires)
    weights: IntArray = units.astype(np.int64) * 2**hop_bits + 1
    return weights


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


def ranges(starts: IntArray, counts: IntArray) -> IntArray:
    """starts[0], starts[0] + 1, ... (counts[0] of them), then those of starts[1], and so on."""
    before = np.cumsum(counts) - counts
    numbers: IntArray = np.repeat(starts - before, counts) + np.arange(int(np.sum(counts)))
    return numbers


def _wires_of(graph: Graph) -> Wires:
    numbers: dict[int | str, int] = {name: graph.num_chips + i for i, name in enumerate(graph.switches)}
    numbers |= {node: node for node in range(graph.num_nodes)}
    tier = {name: i for i, name in enumerate(graph.tiers)}
    rows: list[tuple[int, int, float, float, float, int, int]] = []
    for index, edge in enumerate(graph.edges):
        _check_edge(edge, f"edge {index} ({edge.a} - {edge.b})", numbers)
        ways = [(edge.a, edge.b, edge.link)]
        if edge.duplex is not Duplex.ONE_WAY:
            ways.append((edge.b, edge.a, edge.back or edge.link))
        owner = len(rows)
        for a, b, link in ways:
            shares = owner if edge.duplex is Duplex.HALF else len(rows)
            figures = (link.latency_s, link.bytes_per_s, edge.forward_nbytes)
            rows.append((numbers[a], numbers[b], *figures, tier[edge.tier], shares))
    tail, head, latency_s, bytes_per_s, forward, tiers, shares_of = (
        zip(*rows, strict=True) if rows else ((),) * 7
    )
    integers = [np.array(column, dtype=np.int64) for column in (tail, head, tiers, shares_of)]
    floats = [np.array(column, dtype=np.float64) for column in (latency_s, bytes_per_s, forward)]
    return Wires(integers[0], integers[1], floats[0], floats[1], floats[2], integers[2], integers[3])


def _check_edge(edge: Edge, where: str, numbers: Mapping[int | str, int]) -> None:
    for node in (edge.a, edge.b):
        if node not in numbers:
            raise CommsError(f"there is no node {node!r}", where, "name chips by number, switches as listed")
    if numbers[edge.a] == numbers[edge.b]:
        raise CommsError("a link leads from a node to itself", where, "take it out")
    for link in (edge.link, edge.back or edge.link):
        if not (isfinite(link.bytes_per_s) and link.bytes_per_s > 0 and isfinite(link.latency_s)):
            raise CommsError(
                f"a link with {link.bytes_per_s} bytes/s and {link.latency_s} s", where, "give finite figures"
            )
    if edge.duplex is not Duplex.FULL and edge.back is not None:
        raise CommsError(f"a {edge.duplex} link has no other rate back", where, "leave the way back out")


def _wires_left(whole: Wires, kept: IntArray, slow: Mapping[int, float]) -> Wires:
    rate = whole.bytes_per_s.copy()
    rate[list(slow)] *= list(slow.values())
    renumbered = np.full(whole.num_wires, -1, dtype=np.int64)
    renumbered[kept] = np.arange(len(kept))
    shares = renumbered[whole.shares[kept]]
    return Wires(
        whole.tail[kept],
        whole.head[kept],
        whole.latency_s[kept],
        rate[kept],
        whole.forward_nbytes[kept],
        whole.tier[kept],
        np.where(shares < 0, np.arange(len(kept)), shares),
    )


def _replaced(routes: Routes, which: IntArray, by: Routes) -> Routes:
    """The routes with those of some messages replaced, in the order of `which`."""
    lengths = np.diff(routes.offsets)
    lengths[which] = np.diff(by.offsets)
    offsets = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(lengths)])
    wires = np.empty(offsets[-1], dtype=np.int64)
    same = np.setdiff1d(np.arange(len(lengths)), which)
    wires[ranges(offsets[same], lengths[same])] = routes.wires[ranges(routes.offsets[same], lengths[same])]
    wires[ranges(offsets[which], lengths[which])] = by.wires
    return Routes(offsets, wires)


def _reached(tail: IntArray, head: IntArray, passes: BoolArray) -> BoolArray:
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


def _mixed(keys: NDArray[np.int64] | NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Well mixed bits of each key: the finaliser of splitmix64 (Steele, Lea, Flood, OOPSLA 2014)."""
    bits = keys.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))


def _blocks(count: int, cells_each: int) -> list[slice]:
    """Slices of `count` rows that hold about BLOCK_CELLS cells."""
    step = max(1, BLOCK_CELLS // max(1, cells_each))
    return [slice(start, min(start + step, count)) for start in range(0, count, step)]
