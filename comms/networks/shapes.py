"""Shapes: topologies that also say by arithmetic what a tier of a network wants to know of them.

A tree is one. `shape_of` makes one of any other topology: tori and full meshes fold groups that fill them or an
aligned part of them, line by line; of everything else (dragonflies, graphs, degraded networks) the routes are looked
at, and groups on it do not fold. Only trees are cut to fewer chips: elsewhere messages may need the other chips on
their way.
"""

from dataclasses import dataclass, replace
from math import prod
from typing import Protocol

import numpy as np

from comms.networks.fabrics.switch_tree import Tree
from comms.networks.fabrics.torus_mesh import FullMesh, Torus
from comms.networks.groups import Lattice, Level, Levels, Members, group_size, sharing
from comms.networks.links import Link
from comms.networks.tiered import TieredTopology
from comms.networks.topology import IntArray, Routes, Topology, Wires, route_latencies


class Shape(Topology, Protocol):
    """What a tier of a network is built of."""

    @property
    def link(self) -> Link:
        """What one message alone has: between the chips furthest apart in a tree, between neighbours elsewhere."""

    @property
    def loaded_link(self) -> Link:
        """What each chip has when all chips send so at once."""

    def cut(self, num_chips: int) -> "Shape":
        """The shape for its first `num_chips` chips only; a shape that cannot lose chips stays as it is."""

    def levels(self, members: Members, inner: int = 1, aligned: bool = False) -> Levels | None:
        """The levels at which a group folds over the shape, innermost first; None where it sits unevenly.

        Members are numbers within the shape, ascending. Those in one aligned block of `inner` chips meet
        elsewhere and count as one subgroup. A Lattice stands for all its copies, busy at the same time.
        """


@dataclass(frozen=True, slots=True)
class Whole:
    """Any topology as a Shape."""

    topology: Topology

    @property
    def num_chips(self) -> int:
        return self.topology.num_chips

    @property
    def num_nodes(self) -> int:
        return self.topology.num_nodes

    @property
    def tiers(self) -> tuple[str, ...]:
        return self.topology.tiers

    def wires(self) -> Wires:
        """The topology's."""
        return self.topology.wires()

    def routes(self, src: IntArray, dst: IntArray) -> Routes:
        """The topology's."""
        return self.topology.routes(src, dst)

    @property
    def link(self) -> Link:
        """The longest latency and the slowest wire on the routes from chip 0."""
        return self._seen(np.zeros(self.num_chips, dtype=np.int64), shared=False)

    @property
    def loaded_link(self) -> Link:
        """The least that a message gets when each chip sends to the one half of all chips further on."""
        return self._seen((np.arange(self.num_chips) + self.num_chips // 2) % self.num_chips, shared=True)

    def _seen(self, src: IntArray, shared: bool) -> Link:
        wires = self.topology.wires()
        routes = self.topology.routes(src, np.arange(self.num_chips))
        users = np.bincount(wires.shares[routes.wires], minlength=wires.num_wires)
        rates = wires.bytes_per_s / np.maximum(users[wires.shares] if shared else 1, 1)
        return Link(
            float(route_latencies(wires, routes).max()), float(rates[routes.wires].min(initial=np.inf))
        )

    def cut(self, num_chips: int) -> "Shape":
        """Itself."""
        return self

    def levels(self, members: Members, inner: int = 1, aligned: bool = False) -> Levels | None:
        """None, unless no two members meet here."""
        return () if sharing(members, inner) == group_size(members) else None


@dataclass(frozen=True, slots=True)
class Grid(Whole):
    """A torus or mesh as a Shape: one level for each dimension along which members stand side by side."""

    topology: Torus

    @property
    def link(self) -> Link:
        """Between neighbours in the slowest dimension."""
        access = self.topology.access
        links = [self.topology.link(dim) for dim, size in enumerate(self.topology.dims) if size > 1]
        links = links or [self.topology.link(0)]
        rates = [link.bytes_per_s for link in links] + ([access.bytes_per_s] if access else [])
        latency_s = max(link.latency_s for link in links) + (2 * access.latency_s if access else 0.0)
        return Link(latency_s, min(rates))

    @property
    def loaded_link(self) -> Link:
        """The same: neighbours share no wires."""
        return self.link

    def levels(self, members: Members, inner: int = 1, aligned: bool = False) -> Levels | None:
        """None unless the group fills an aligned block of the torus, and `inner` whole dimensions of it."""
        if sharing(members, inner) == group_size(members):
            return ()
        sub = self._block(members)
        dims = self.topology.dims
        whole = [prod(dims[:k]) for k in range(len(dims))]
        one_way_round = self.topology.one_way and self.topology.num_networks < 2
        if sub is None or one_way_round or self.topology.forward_nbytes or inner not in whole:
            return None
        inside = sum(size > 1 for size in sub[: whole.index(inner)])
        return self.topology.levels(sub)[inside:]

    def _block(self, members: Members) -> tuple[int, ...] | None:
        """The sizes of the block that a group fills; None where it fills none."""
        chips = members.chips() if isinstance(members, Lattice) else np.asarray(members, dtype=np.int64)
        digits = [np.unique(column) for column in self.topology.digits(chips)]
        sub = tuple(len(each) for each in digits)
        side_by_side = all(each[-1] - each[0] + 1 == len(each) for each in digits)
        copies_fit = all(size % part == 0 for size, part in zip(self.topology.dims, sub, strict=True))
        copies_fit = copies_fit or not isinstance(members, Lattice) or members.alone
        return sub if side_by_side and copies_fit and prod(sub) == len(chips) else None


@dataclass(frozen=True, slots=True)
class Pairs(Whole):
    """A full mesh as a Shape: any members meet at one level."""

    topology: FullMesh

    @property
    def link(self) -> Link:
        """The wire of a pair."""
        return self.topology.link

    @property
    def loaded_link(self) -> Link:
        """Half of a shared medium."""
        share = 0.5 if self.topology.half_duplex else 1.0
        return Link(self.topology.link.latency_s, self.topology.link.bytes_per_s * share)

    def levels(self, members: Members, inner: int = 1, aligned: bool = False) -> Levels | None:
        """None where some members meet elsewhere, and where the directions of a wire share its rate."""
        count = group_size(members)
        if sharing(members, inner) == count:
            return ()
        if sharing(members, inner) != 1 or self.topology.half_duplex:
            return None
        link = self.topology.link
        pool = (count - 1) * link.bytes_per_s
        return (Level(self.topology.tier, count, link.latency_s, link.bytes_per_s, pool, pairs=True),)


def shape_of(topology: Topology) -> Shape:
    """The topology as a Shape."""
    if isinstance(topology, Tree | Whole):
        return topology
    if isinstance(topology, Torus):
        return Grid(topology)
    return Pairs(topology) if isinstance(topology, FullMesh) else Whole(topology)


def sole_shape(topology: Topology) -> Topology:
    """The torus, tree, graph, ... that joins just the chips of a network of one tier; else the topology itself.

    Of chips that are not all of a torus, the block that they fill.
    """
    if not isinstance(topology, TieredTopology) or len(topology.fabrics) != 1:
        return topology
    (fabric,) = topology.fabrics
    shape = fabric.shape.topology if isinstance(fabric.shape, Whole) else fabric.shape
    num_chips = topology.num_chips
    if fabric.size != num_chips:
        return topology
    if shape.num_chips == num_chips:
        return shape
    if isinstance(shape, Torus):
        return shape.first(num_chips) or topology
    return replace(shape, num_chips=num_chips) if isinstance(shape, FullMesh) else topology
