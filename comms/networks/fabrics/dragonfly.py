"""Dragonfly networks: groups of routers that all see each other, joined group to group by long links.

After Kim, Dally, Scott and Abts, "Technology-driven, highly-scalable dragonfly topology" (ISCA 2008): p chips on a
router, a routers in a group with a link between every two, h long links per router; at most a * h + 1 groups. Which
router of a group holds the link to which other group is the arrangement (Hastings and others, "Comparing global
link arrangements for dragonfly networks", Cluster 2015): port k of group i leads to

    absolute    group k, or k + 1 from i on
    palmtree    group (i - k - 1) mod groups

where ports are counted router by router. With fewer groups than possible every two groups have several links,
as many as ports allow alike; ports that are left over stay empty.

Minimal routes cross at most one long link and one local link at either side. Valiant's (SIAM J. Computing 11, 1982)
go by a third group, found from the two ends by position, which spreads traffic that all goes from one group to
one other.

Not modelled: adaptive choice between the two, the queues that make it.
"""

from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from comms.errors import CommsError
from comms.networks.links import Link
from comms.networks.paths import mixed, node_pairs
from comms.networks.shapes import RoutedShape
from comms.networks.topology import IntArray, Routes, Ways, Wires, routes_of


class Arrangement(StrEnum):
    """Which router holds which long link."""

    ABSOLUTE = "absolute"
    PALMTREE = "palmtree"


class Routing(StrEnum):
    """Which way messages between groups take."""

    MINIMAL = "minimal"
    VALIANT = "valiant"


@dataclass(frozen=True, slots=True)
class Dragonfly(RoutedShape):
    """Chips are numbered router by router, routers group by group; router r is node num_chips + r."""

    num_groups: int
    routers_per_group: int
    chips_per_router: int
    long_links_per_router: int
    terminal: Link  # between a chip and its router
    local: Link  # between two routers of a group
    long: Link  # between two groups
    arrangement: Arrangement = Arrangement.PALMTREE
    routing: Routing = Routing.MINIMAL

    def __post_init__(self) -> None:
        if self.num_groups > self._ports + 1:
            raise CommsError(
                f"{self._ports} long links per group do not reach {self.num_groups - 1} other groups",
                "dragonfly",
                "give more long links per router, or fewer groups",
            )

    @property
    def num_chips(self) -> int:
        return self.num_routers * self.chips_per_router

    @property
    def num_routers(self) -> int:
        return self.num_groups * self.routers_per_group

    @property
    def num_nodes(self) -> int:
        return self.num_chips + self.num_routers

    @property
    def tiers(self) -> tuple[str, ...]:
        return ("terminal", "local", "long")

    @property
    def links_per_pair(self) -> int:
        """Long links between every two groups."""
        return self._ports // max(1, self.num_groups - 1)

    @property
    def _ports(self) -> int:
        return self.routers_per_group * self.long_links_per_router

    @property
    def _used_ports(self) -> int:
        return self.links_per_pair * (self.num_groups - 1)

    def wires(self) -> Wires:
        """From the chips, to the chips, local by group and tail, long by group and port."""
        chips = np.arange(self.num_chips)
        routers = self.num_chips + chips // self.chips_per_router
        a = self.routers_per_group
        local = np.arange(self.num_routers * (a - 1))
        local_tail, other = np.divmod(local, max(1, a - 1))
        local_head = local_tail // a * a + other + (other >= local_tail % a)
        group, port = np.divmod(np.arange(self.num_groups * self._used_ports), max(1, self._used_ports))
        peer, peer_port = self._far_end(group, port)
        counts = [2 * self.num_chips, len(local), len(group)]
        links = (self.terminal, self.local, self.long)
        tail = np.concatenate(
            [chips, routers, self.num_chips + local_tail, self.num_chips + self._router(group, port)]
        )
        head = np.concatenate(
            [routers, chips, self.num_chips + local_head, self.num_chips + self._router(peer, peer_port)]
        )
        return Wires(
            tail,
            head,
            np.repeat([link.latency_s for link in links], counts),
            np.repeat([link.bytes_per_s for link in links], counts),
            np.zeros(len(tail)),
            np.repeat(np.arange(3), counts),
            np.arange(len(tail)),
        )

    def routes(self, src: IntArray, dst: IntArray) -> Routes:
        """Up, through the groups, down. Among several links to a group: fewest wires, then by position."""
        src, dst = node_pairs(src, dst, self.num_chips)
        start, end = src // self.chips_per_router, dst // self.chips_per_router
        same = src == dst
        key = (mixed(src * self.num_chips + dst) >> np.uint64(1)).astype(np.int64)
        columns = [np.where(same, -1, src)]
        middle = self._middle(start, end, key)
        if middle is not None:
            arrived, through = self._to_group(start, middle, key)
            columns += through
            start = arrived
        arrived, through = self._to_group(start, end // self.routers_per_group, key, end)
        columns += [*through, self._local_wire(arrived, end)]
        columns.append(np.where(same, -1, self.num_chips + dst))
        return routes_of(columns)

    def ways(self, src: IntArray, dst: IntArray) -> Ways:
        """One for each message."""
        return Ways.single(self.routes(src, dst))

    def _middle(self, start: IntArray, end: IntArray, key: IntArray) -> IntArray | None:
        """[messages] The group to go by, the group itself where there is none; None where no message needs one."""
        if self.routing is Routing.MINIMAL or self.num_groups < 3:
            return None
        low, high = np.sort(np.stack([start, end]) // self.routers_per_group, axis=0)
        middle = key % (self.num_groups - 2)
        middle += middle >= low
        middle += middle >= high
        return np.where(low == high, low, middle)

    def _to_group(
        self, router: IntArray, group: IntArray, key: IntArray, end: IntArray | None = None
    ) -> tuple[IntArray, list[IntArray]]:
        """Where messages arrive in a group, and the wires to there: local, then long; -1 where none is needed."""
        own = router // self.routers_per_group
        stays = own == group
        if stays.all():
            return router, []
        best = np.full(len(router), np.iinfo(np.int64).max)
        port = np.zeros_like(router)
        for copy in range(self.links_per_pair):
            at = self._port_to(own, group, copy)
            peer, peer_port = self._far_end(own, at)
            cost = (self._router(own, at) != router).astype(np.int64)
            if end is not None:
                cost += self._router(peer, peer_port) != end
            cost = cost * self.links_per_pair + (copy - key) % self.links_per_pair
            port = np.where(cost < best, at, port)
            best = np.minimum(cost, best)
        port = np.where(stays, 0, port)
        gate = self._router(own, port)
        arrived = self._router(*self._far_end(own, port))
        local = np.where(stays, -1, self._local_wire(router, gate))
        first_long = 2 * self.num_chips + self.num_routers * (self.routers_per_group - 1)
        long = np.where(stays, -1, first_long + own * self._used_ports + port)
        return np.where(stays, router, arrived), [local, long]

    def _local_wire(self, router: IntArray, to: IntArray) -> IntArray:
        """The wire between two routers of a group, -1 where they are the same."""
        a = self.routers_per_group
        place, other = router % a, to % a
        wire = 2 * self.num_chips + router * (a - 1) + other - (other > place)
        return np.where(place == other, -1, wire)

    def _router(self, group: IntArray, port: IntArray) -> IntArray:
        return group * self.routers_per_group + port // max(1, self.long_links_per_router)

    def _port_to(self, group: IntArray, other: IntArray, copy: int) -> IntArray:
        """The port of a group with the link number `copy` to another."""
        if self.arrangement is Arrangement.ABSOLUTE:
            port = other - (other > group)
        else:
            port = (group - other - 1) % self.num_groups
        return copy * (self.num_groups - 1) + port

    def _far_end(self, group: IntArray, port: IntArray) -> tuple[IntArray, IntArray]:
        """Group and port at the other end of a long link."""
        copy, k = np.divmod(port, max(1, self.num_groups - 1))
        if self.arrangement is Arrangement.ABSOLUTE:
            other = k + (k >= group)
            back = group - (group > other)
        else:
            other = (group - k - 1) % self.num_groups
            back = self.num_groups - 2 - k
        return other, copy * (self.num_groups - 1) + back
