"""Networks given edge by edge, and any network with some of its wires dead or slow.

Messages spread over all equal best paths (`networks.paths`). Wires are in an order that does not depend on how edges
are listed, turned round and switches named (`edge_order`): same network, same times, bit for bit.

Parallel edges carry every message together, and so do switches with links to the same nodes whose rates are in the same
proportions (the planes of NVSwitch, the spines of a leaf and spine network): they count as one wire, and one switch, of
their summed rate. Half-duplex edges side by side are one medium.

Not modelled: longer or slower paths beside the best, the unevenness of hashing flows onto parallel links, the time
until a network has noticed a dead wire.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum

import numpy as np

from comms.errors import CommsError
from comms.networks.fabrics.edge_order import edge_order
from comms.networks.links import Link
from comms.networks.paths import Paths, paths_of
from comms.networks.shapes import RoutedShape
from comms.networks.topology import (
    IntArray,
    Routes,
    Topology,
    Ways,
    Wires,
    merged_routes,
    merged_ways,
)


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


@dataclass(frozen=True, slots=True, eq=False)
class EdgeList(RoutedShape):
    """A network of any shape. Raises CommsError for edges that make no sense and for chips that cannot meet."""

    num_chips: int
    edges: tuple[Edge, ...]
    switches: tuple[str, ...] = ()
    through_chips: bool = True  # chips pass on what is not for them
    _wires: Wires = field(init=False, repr=False)
    paths: Paths = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_wires", _bundled(_wires_of(self), self.num_chips, self.num_nodes))
        object.__setattr__(self, "paths", paths_of(self._wires, self, self.through_chips))
        self.paths.check_chips_meet(self.num_chips)

    @property
    def num_nodes(self) -> int:
        return self.num_chips + len(self.switches)

    @property
    def idle_edges(self) -> tuple[Edge, ...]:
        """Those beside one of less latency: as messages take the best paths only, none goes over them."""
        least: dict[tuple[int | str, int | str], float] = {}
        for edge in self.edges:
            for ends, latency_s in _latencies(edge):
                least[ends] = min(latency_s, least.get(ends, latency_s))
        return tuple(e for e in self.edges if all(s > least[ends] for ends, s in _latencies(e)))

    @property
    def tiers(self) -> tuple[str, ...]:
        return ("link",)

    def wires(self) -> Wires:
        """Edge by edge in their order, there and back; what runs side by side as its first."""
        return self._wires

    def routes(self, src: IntArray, dst: IntArray) -> Routes:
        """One of the best paths each. Raises CommsError where there is none."""
        return self.paths.routes(src, dst)

    def ways(self, src: IntArray, dst: IntArray) -> Ways:
        """The best paths; see the module. Raises CommsError where there is none."""
        return self.paths.ways(src, dst)


def _latencies(edge: Edge) -> list[tuple[tuple[int | str, int | str], float]]:
    """Of each direction that an edge has."""
    there = ((edge.a, edge.b), edge.link.latency_s)
    back = ((edge.b, edge.a), (edge.back or edge.link).latency_s)
    return [there] if edge.duplex is Duplex.ONE_WAY else [there, back]


@dataclass(frozen=True, slots=True, eq=False)
class Rerouted:
    """A topology without its `dead` wires and with a part of the rate on its `slow` ones.

    Wires keep their order, the dead ones are gone: wire w was number kept[w]. Routes over a dead wire are replaced
    by the best path in what is left; all others stay as they were. Raises CommsError where chips are cut off.
    """

    topology: Topology
    dead: tuple[int, ...] = ()
    slow: Mapping[int, float] = field(default_factory=dict)  # wire to the share of its rate that is left
    chips_relay: bool = False  # ways round may lead through chips though the topology does not say so
    kept: IntArray = field(init=False, repr=False)
    numbers: IntArray = field(init=False, repr=False)  # [wires of the topology] here, -1 for the dead
    _wires: Wires = field(init=False, repr=False)
    paths: Paths = field(init=False, repr=False)

    def __post_init__(self) -> None:
        whole = self.topology.wires()
        numbers = np.zeros(whole.num_wires, dtype=np.int64)
        numbers[list(self.dead)] = -1
        object.__setattr__(self, "kept", np.flatnonzero(numbers == 0))
        numbers[self.kept] = np.arange(len(self.kept))
        object.__setattr__(self, "numbers", numbers)
        object.__setattr__(self, "_wires", _wires_left(whole, self.kept, numbers, self.slow))
        object.__setattr__(self, "paths", paths_of(self._wires, self, self.through_chips))
        self.paths.check_chips_meet(self.num_chips)

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
        if isinstance(self.topology, EdgeList | Rerouted):
            return self.chips_relay or self.topology.through_chips
        return self.chips_relay or self.topology.num_nodes == self.topology.num_chips

    def wires(self) -> Wires:
        return self._wires

    def routes(self, src: IntArray, dst: IntArray) -> Routes:
        """As the topology routes, where that is still possible."""
        usual = self.topology.routes(src, dst)
        wires = self.numbers[usual.wires]
        lost = np.concatenate([[0], np.cumsum(wires < 0)])
        broken = np.flatnonzero(lost[usual.offsets[1:]] > lost[usual.offsets[:-1]])
        if not len(broken):
            return Routes(usual.offsets, wires)
        around = self.paths.routes(np.asarray(src)[broken], np.asarray(dst)[broken])
        same = np.setdiff1d(np.arange(usual.num_messages), broken)
        kept = Routes(usual.offsets, wires).take(same)
        return merged_routes(usual.num_messages, [(same, kept), (broken, around)])

    def ways(self, src: IntArray, dst: IntArray) -> Ways:
        """As `routes`: of a message's ways those that are left, and the best ones round where none is."""
        usual = self.topology.ways(src, dst)
        renumbered = replace(usual, routes=Routes(usual.routes.offsets, self.numbers[usual.routes.wires]))
        lost = np.concatenate([[0], np.cumsum(renumbered.routes.wires < 0)])
        is_whole = lost[usual.routes.offsets[1:]] == lost[usual.routes.offsets[:-1]]
        if is_whole.all():
            return renumbered
        kept = renumbered.kept(is_whole)
        broken = np.setdiff1d(usual.message, kept.message)
        around = self.paths.ways(np.asarray(src)[broken], np.asarray(dst)[broken])
        return merged_ways(len(src), [(np.arange(len(src)), kept), (broken, around)])


def _wires_of(graph: EdgeList) -> Wires:
    ends: list[tuple[int, int, int]] = []  # tail, head, and the wire whose capacity it uses
    figures: list[tuple[float, float]] = []
    media: dict[tuple[int, int, float], int] = {}
    for a, b, there, back, duplex in _in_order(graph):
        owner = len(ends)
        first = media.setdefault((a, b, there.latency_s), owner) if duplex is Duplex.HALF else owner
        if first != owner:
            figures[first] = there.latency_s, figures[first][1] + there.bytes_per_s
            figures[first + 1] = figures[first]
            continue
        for tail, head, link in ((a, b, there), (b, a, back)):
            if link is not None:
                ends.append((tail, head, owner if duplex is Duplex.HALF else len(ends)))
                figures.append((link.latency_s, link.bytes_per_s))
    # No edges at all make columns too, and each column is in one piece.
    tails, heads, shares = np.array(ends, dtype=np.int64).reshape(-1, 3).T.copy()
    latency_s, bytes_per_s = np.array(figures, dtype=np.float64).reshape(-1, 2).T.copy()
    return Wires(tails, heads, latency_s, bytes_per_s, np.zeros(len(tails)), np.zeros_like(tails), shares)


def _in_order(graph: EdgeList) -> list[tuple[int, int, Link, Link | None, Duplex]]:
    """The ends by number, what there is from the first to the second and back; see `edge_order`."""
    numbers: dict[int | str, int] = {name: graph.num_chips + i for i, name in enumerate(graph.switches)}
    numbers |= {node: node for node in range(graph.num_nodes)}
    rows: list[tuple[int, int, Link, Link | None, Duplex]] = []
    for index, edge in enumerate(graph.edges):
        if edge.duplex is not Duplex.FULL and edge.back is not None:
            where = f"edge {index} ({edge.a} - {edge.b})"
            raise CommsError(f"a {edge.duplex} link has no other rate back", where, "leave the way back out")
        back = None if edge.duplex is Duplex.ONE_WAY else edge.back or edge.link
        rows.append((numbers[edge.a], numbers[edge.b], edge.link, back, edge.duplex))
    kinds = [*Duplex]
    figures = [
        (link.latency_s, link.bytes_per_s, kinds.index(duplex)) if link else (-1.0, -1.0, -1)
        for _, _, there, back, duplex in rows
        for link in (there, back)
    ]
    ends = np.array([(a, b) for a, b, *_ in rows], dtype=np.int64).reshape(-1, 2)
    table = np.array(figures, dtype=np.float64).reshape(-1, 6)
    order, rank = edge_order(ends, table, graph.num_chips, graph.num_nodes)
    ordered = [rows[edge] for edge in order.tolist()]
    return [
        (b, a, back, there, duplex) if back and rank[a] > rank[b] else (a, b, there, back, duplex)
        for a, b, there, back, duplex in ordered
    ]


def _bundled(wires: Wires, num_chips: int, num_nodes: int) -> Wires:
    """Wires that run side by side as one, also by switches that are alike; those of half-duplex links stay."""
    while True:
        wires = _without_parallels(wires)
        if num_nodes == num_chips:
            return wires
        alike = _alike_switches(wires, num_chips, num_nodes)
        if (alike == np.arange(num_nodes)).all():
            return wires
        wires = replace(wires, tail=alike[wires.tail], head=alike[wires.head])


def _without_parallels(wires: Wires) -> Wires:
    """Of wires with the same ends and the same latency one, with the sum of their rates."""
    numbers = np.arange(wires.num_wires)
    is_own = np.bincount(wires.shares, minlength=wires.num_wires)[wires.shares] == 1
    apart = np.where(is_own, -1, numbers)
    keys = np.stack([wires.tail, wires.head, apart]).astype(np.float64)
    rows = np.column_stack([keys.T, wires.latency_s])
    _, first, of = np.unique(rows, axis=0, return_index=True, return_inverse=True)
    rates = np.bincount(of, weights=wires.bytes_per_s, minlength=len(first)).astype(np.float64)
    kept = np.sort(first)
    place = np.searchsorted(kept, first[of])  # of every wire, that of the one which stands for it
    return Wires(
        wires.tail[kept], wires.head[kept], wires.latency_s[kept], rates[of][kept], wires.forward_nbytes[kept],
        wires.tier[kept], place[wires.shares[kept]],
    )  # fmt: skip


def _alike_switches(wires: Wires, num_chips: int, num_nodes: int) -> IntArray:
    """[nodes] The first switch with like wires to and from the same nodes; every other node is itself."""
    links: list[list[tuple[int, int, float, float]]] = [[] for _ in range(num_nodes)]
    shared = wires.shares != np.arange(wires.num_wires)
    shared |= np.bincount(wires.shares, minlength=wires.num_wires)[np.arange(wires.num_wires)] > 1
    columns = (wires.tail, wires.head, wires.latency_s, wires.bytes_per_s, shared)
    for wire, (tail, head, latency, rate, is_shared) in enumerate(
        zip(*(c.tolist() for c in columns), strict=True)
    ):
        own = wire if is_shared else -1  # a half-duplex link is like no other
        links[tail].append((own, head, latency, rate))
        links[head].append((own, -1 - tail, latency, rate))
    known: dict[tuple[tuple[int, int, float, float], ...], int] = {}
    alike = np.arange(num_nodes)
    for node in range(num_chips, num_nodes):
        if links[node]:
            top = max(rate for _, _, _, rate in links[node])
            like = sorted((own, to, latency, round(rate / top, 9)) for own, to, latency, rate in links[node])
            alike[node] = known.setdefault(tuple(like), node)
    return alike


def _wires_left(whole: Wires, kept: IntArray, renumbered: IntArray, slow: Mapping[int, float]) -> Wires:
    rate = whole.bytes_per_s.copy()
    rate[list(slow)] *= list(slow.values())
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
