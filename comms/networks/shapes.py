"""Shapes: topologies that also say by arithmetic what a tier of a network wants to know of them.

Trees, tori and full meshes fold groups: a torus such as fill an aligned part of it, line by line. Of everything else
(dragonflies, graphs) the routes are looked at, and groups on it do not fold. Only trees are cut to fewer chips:
elsewhere messages may need the other chips on their way.
"""

from typing import Protocol

import numpy as np

from comms.networks.groups import Levels, Members, group_size, sharing
from comms.networks.links import Link
from comms.networks.topology import IntArray, Topology, route_latencies


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


class RoutedShape:
    """What a topology that is looked at by its routes has beside them."""

    __slots__ = ()

    @property
    def link(self: Topology) -> Link:
        """The longest latency and the slowest wire on the routes from chip 0."""
        return _seen(self, np.zeros(self.num_chips, dtype=np.int64), shared=False)

    @property
    def loaded_link(self: Topology) -> Link:
        """The least that a message gets when each chip sends to the one half of all chips further on."""
        return _seen(self, (np.arange(self.num_chips) + self.num_chips // 2) % self.num_chips, shared=True)

    def cut(self: Shape, num_chips: int) -> Shape:
        """Itself."""
        return self

    def levels(self, members: Members, inner: int = 1, aligned: bool = False) -> Levels | None:
        """None, unless no two members meet here."""
        return () if sharing(members, inner) == group_size(members) else None


def _seen(topology: Topology, src: IntArray, shared: bool) -> Link:
    wires, ways = topology.wires(), topology.ways(src, np.arange(topology.num_chips))
    lengths = np.diff(ways.routes.offsets)
    used = wires.shares[ways.routes.wires]
    if not shared:  # each message has the wires to itself
        used = used + np.repeat(ways.message, lengths) * wires.num_wires
    numbers, place = np.unique(used, return_inverse=True)
    carried = np.bincount(place, weights=np.repeat(ways.share, lengths), minlength=len(numbers))
    rates = wires.bytes_per_s[ways.routes.wires] / carried[place]
    return Link(float(route_latencies(wires, ways.routes).max()), float(rates.min(initial=np.inf)))
