"""Tiered networks as one topology: copies of each fabric's shape side by side, all under the same chips.

A fabric is a shape that joins the chips of a block, with ports of its own: block b holds the chips
[b * size, (b + 1) * size). A message uses the innermost fabric with a block that holds both its ends.

Nodes: the chips, then the other nodes of each copy, fabric by fabric from the inside, then places of a last copy for
which there are no chips. Wires: copy by copy, fabric by fabric. Nothing is kept per pair, and of the copies of a
fabric only their number.

Not modelled: what fabrics share inside a chip or a host (a chip sends over all its fabrics at once), and messages
that change from one fabric to another on their way.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from comms.errors import CommsError
from comms.networks.fabrics.switch_tree import Tree, joined
from comms.networks.fabrics.torus_mesh import FullMesh, Torus
from comms.networks.shapes import Shape
from comms.networks.topology import (
    IntArray,
    Routes,
    Topology,
    Ways,
    Wires,
    merged_routes,
    merged_ways,
)


@dataclass(frozen=True, slots=True, eq=False)
class Fabric:
    """A shape, the chips that one copy of it joins, and the network's tier for each of the shape's."""

    shape: Shape
    size: int  # the first chips of the shape
    tiers: tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class _Copies:
    """The copies of one fabric, and where their wires and nodes start."""

    fabric: Fabric
    num_copies: int
    num_wires: int  # of one copy
    num_switches: int  # of one copy: all nodes but its chips
    first_wire: int
    first_node: int
    first_missing: int  # node of the first place without a chip in the last copy
    num_missing: int

    def wires(self, num_chips: int) -> Wires:
        one = self.fabric.shape.wires()
        copy = np.arange(self.num_copies)[:, None]
        tiers = np.array(self.fabric.tiers, dtype=np.int64)
        return Wires(
            tail=self.nodes(copy, one.tail, num_chips),
            head=self.nodes(copy, one.head, num_chips),
            latency_s=np.tile(one.latency_s, self.num_copies),
            bytes_per_s=np.tile(one.bytes_per_s, self.num_copies),
            forward_nbytes=np.tile(one.forward_nbytes, self.num_copies),
            tier=np.tile(tiers[one.tier], self.num_copies),
            shares=(self.first_wire + copy * self.num_wires + one.shares).ravel(),
        )

    def nodes(self, copy: IntArray, local: IntArray, num_chips: int) -> IntArray:
        """[copies * local] Nodes of the whole network."""
        chip = copy * self.fabric.size + local
        switch = self.first_node + copy * self.num_switches + local - self.fabric.size
        missing = self.first_missing + chip - num_chips
        nodes = np.where(local >= self.fabric.size, switch, np.where(chip < num_chips, chip, missing))
        return nodes.ravel()

    def places(self, nodes: IntArray, num_chips: int) -> tuple[IntArray, IntArray]:
        """Which copy each node is in (-1: in none) and its number there."""
        size, number = self.fabric.size, nodes - self.first_node
        is_chip, switches = nodes < num_chips, max(self.num_switches, 1)
        is_switch = (number >= 0) & (number < self.num_copies * self.num_switches)
        copy = np.where(is_chip, nodes // size, np.where(is_switch, number // switches, -1))
        return copy, np.where(is_chip, nodes % size, size + number % switches)


@dataclass(frozen=True, slots=True, eq=False)
class TieredTopology:
    """The topology of a network of tiers, for exactly `num_chips`; fabrics from the innermost."""

    num_chips: int
    tiers: tuple[str, ...]
    fabrics: tuple[Fabric, ...]
    _copies: tuple[_Copies, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        wire, node = 0, self.num_chips
        placed: list[_Copies] = []
        for fabric in self.fabrics:
            num_copies = -(-self.num_chips // fabric.size)
            num_wires = _num_wires(fabric.shape)
            switches = fabric.shape.num_nodes - fabric.size
            missing = num_copies * fabric.size - self.num_chips
            last = node + num_copies * switches
            placed.append(_Copies(fabric, num_copies, num_wires, switches, wire, node, last, missing))
            wire, node = wire + num_copies * num_wires, last + missing
        object.__setattr__(self, "_copies", tuple(placed))

    @property
    def num_nodes(self) -> int:
        """Chips, switches and places without a chip."""
        if not self._copies:
            return self.num_chips
        return self._copies[-1].first_missing + self._copies[-1].num_missing

    def copies(self) -> Iterator[tuple[Fabric, IntArray]]:
        """Fabrics from the innermost, each with [copies, nodes of its shape] the nodes of the network."""
        for copies in self._copies:
            copy, local = np.arange(copies.num_copies)[:, None], np.arange(copies.fabric.shape.num_nodes)
            yield copies.fabric, copies.nodes(copy, local, self.num_chips).reshape(len(copy), -1)

    def wires(self) -> Wires:
        """Copy by copy, fabric by fabric from the innermost."""
        if not self._copies:
            nothing, no_figures = np.zeros(0, dtype=np.int64), np.zeros(0)
            return Wires(nothing, nothing, no_figures, no_figures, no_figures, nothing, nothing)
        return joined([copies.wires(self.num_chips) for copies in self._copies])

    def routes(self, src: IntArray, dst: IntArray) -> Routes:
        """One route per pair of chips, or of a chip and a switch of a fabric's copy that holds the chip."""
        parts: list[tuple[IntArray, Routes]] = []
        for here, shape, local_src, local_dst, first in self._in_copies(src, dst):
            routes = shape.routes(local_src, local_dst)
            parts.append((here, _shifted(routes, first)))
        return merged_routes(len(src), parts)

    def ways(self, src: IntArray, dst: IntArray) -> Ways:
        """As `routes`, with all that a fabric has."""
        parts: list[tuple[IntArray, Ways]] = []
        for here, shape, local_src, local_dst, first in self._in_copies(src, dst):
            ways = shape.ways(local_src, local_dst)
            parts.append((here, replace(ways, routes=_shifted(ways.routes, first[ways.message]))))
        return merged_ways(len(src), parts)

    def _in_copies(
        self, src: IntArray, dst: IntArray
    ) -> Iterator[tuple[IntArray, Shape, IntArray, IntArray, IntArray]]:
        """Fabric by fabric the messages that use it: which, its shape, both ends in that, and their first wires."""
        src, dst = np.asarray(src, dtype=np.int64), np.asarray(dst, dtype=np.int64)
        waiting = np.ones(len(src), dtype=np.bool_)
        waiting[(src == dst) & (src >= 0) & (src < self.num_nodes)] = False
        for copies in self._copies:
            copy, local_src = copies.places(src, self.num_chips)
            copy_dst, local_dst = copies.places(dst, self.num_chips)
            here = np.flatnonzero(waiting & (copy == copy_dst) & (copy >= 0))
            if len(here):
                waiting[here] = False
                first = copies.first_wire + copy[here] * copies.num_wires
                yield here, copies.fabric.shape, local_src[here], local_dst[here], first
        if waiting.any():
            lost = int(np.flatnonzero(waiting)[0])
            raise CommsError(f"no route from node {src[lost]} to node {dst[lost]}", "network")

    def switch_over(self, chips: Sequence[int]) -> int:
        """The node of the innermost switch over all of these chips. Raises CommsError where there is none."""
        nodes = np.asarray(chips, dtype=np.int64)
        for copies in self._copies:
            copy, local = copies.places(nodes, self.num_chips)
            if (copy == copy[0]).all():
                shape = copies.fabric.shape
                if not isinstance(shape, Tree):
                    break
                switch = shape.switch_over(local) - copies.fabric.size
                return copies.first_node + int(copy[0]) * copies.num_switches + switch
        raise CommsError(
            "there is no switch over these chips", "network", "use an algorithm without switches"
        )


def _shifted(routes: Routes, first: IntArray) -> Routes:
    """Routes in copies of a shape whose wires start at `first`."""
    return Routes(routes.offsets, routes.wires + np.repeat(first, np.diff(routes.offsets)))


def sole_shape(topology: Topology) -> Topology:
    """The torus, tree, graph, ... that joins just the chips of a network of one tier; else the topology itself.

    Of chips that are not all of a torus, the block that they fill.
    """
    if not isinstance(topology, TieredTopology) or len(topology.fabrics) != 1:
        return topology
    (fabric,) = topology.fabrics
    shape, num_chips = fabric.shape, topology.num_chips
    if fabric.size != num_chips:
        return topology
    if shape.num_chips == num_chips:
        return shape
    if isinstance(shape, Torus):
        return shape.first(num_chips) or topology
    return replace(shape, num_chips=num_chips) if isinstance(shape, FullMesh) else topology


def _num_wires(shape: Shape) -> int:
    """Of a tree by arithmetic: a large one is never laid out only to be counted."""
    return shape.num_wires if isinstance(shape, Tree) else shape.wires().num_wires
