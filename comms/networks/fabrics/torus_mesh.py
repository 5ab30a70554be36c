"""Rings, meshes, tori of any number of dimensions, on and between chips, and boards where every pair has a wire.

Chip c stands at the digits (c % d1, c // d1 % d2, ...): the first dimension is the one that neighbours in number
share. A message goes dimension by dimension, the first one first, the shorter way round; half way round, chips at
even digits go up and those at odd digits go down, which loads all wires of a ring alike. (Dally and Towles,
Principles and Practices of Interconnection Networks, 2004, chapter 8.) A ring of two has one link, not two.

One-way networks have wires in one direction only, every second network in the opposite one, as the two
networks on Tenstorrent's chips: 9 cycles from router to router, 5 cycles to enter and 5 to leave, 32 bytes a
cycle (Tenstorrent ISA documentation, Wormhole B0).

Not modelled: virtual channels and their deadlocks, adaptive routing, packet headers (take them off the rate).
"""

from dataclasses import dataclass, replace
from math import prod

import numpy as np

from comms.errors import CommsError
from comms.networks.groups import Lattice, Level, Levels, Members, group_size, inner_sizes, sharing
from comms.networks.links import Link
from comms.networks.paths import node_pairs
from comms.networks.shapes import RoutedShape
from comms.networks.topology import IntArray, Routes, Ways, Wires, ranges, routes_of


@dataclass(frozen=True, slots=True)
class _WireBlock:
    """The wires of one network along one dimension in one direction, line by line."""

    network: int
    dim: int
    up: bool
    offset: int
    per_line: int


@dataclass(frozen=True, slots=True)
class Torus(RoutedShape):
    """A mesh of `dims` chips; a dimension that `wraps` is a ring. One link or one per dimension, so with wraps.

    With `access` every chip hangs on one router per network, by a wire in and a wire out; else chips route
    themselves.
    """

    dims: tuple[int, ...]
    links: tuple[Link, ...]
    wraps: tuple[bool, ...] = (True,)
    num_networks: int = 1
    one_way: bool = False  # networks 0, 2, ... have wires upwards only, networks 1, 3, ... downwards only
    access: Link | None = None

    def __post_init__(self) -> None:
        where = f"torus {' x '.join(map(str, self.dims))}"
        if not self.dims or min(self.dims) < 1:
            raise CommsError("every dimension needs at least one chip", where, "give sizes such as 4 x 4")
        if self.num_networks < 1:
            raise CommsError(f"{self.num_networks} networks", where, "give at least one")

    @property
    def num_chips(self) -> int:
        return prod(self.dims)

    @property
    def num_nodes(self) -> int:
        return self.num_chips * (1 if self.access is None else 1 + self.num_networks)

    @property
    def tiers(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((*self._names, *(() if self.access is None else ("access",)))))

    @property
    def _names(self) -> tuple[str, ...]:
        known = ("x", "y", "z")
        return tuple(known[k] if k < 3 else f"dimension {k + 1}" for k in range(len(self.dims)))

    @property
    def link(self) -> Link:
        """Between neighbours in the slowest dimension."""
        access = self.access
        links = [self.link_along(dim) for dim, size in enumerate(self.dims) if size > 1]
        links = links or [self.link_along(0)]
        rates = [link.bytes_per_s for link in links] + ([access.bytes_per_s] if access else [])
        latency_s = max(link.latency_s for link in links) + (2 * access.latency_s if access else 0.0)
        return Link(latency_s, min(rates))

    @property
    def loaded_link(self) -> Link:
        """The same: neighbours share no wires."""
        return self.link

    def link_along(self, dim: int) -> Link:
        """The link of one dimension."""
        return self.links[dim % len(self.links)]

    def first(self, num_chips: int) -> "Torus | None":
        """The first chips alone, as a torus or mesh of their own; None where they fill no block."""
        sizes, left = [], num_chips
        for size in self.dims:
            if left % size and left > size:
                return None
            sizes.append(min(left, size))
            left //= sizes[-1]
        # A part of a ring is a line: its ends have no link.
        wraps = tuple(
            self.is_ring(dim) and part == size
            for dim, (part, size) in enumerate(zip(sizes, self.dims, strict=True))
        )
        if left != 1 or (self.one_way and not all(wraps)):
            return None
        links = tuple(self.link_along(dim) for dim in range(len(sizes)))
        return replace(self, dims=tuple(sizes), links=links, wraps=wraps)

    def is_ring(self, dim: int) -> bool:
        """Whether the last chip of a line has a link of its own to the first."""
        return self.wraps[dim % len(self.wraps)] and (self.dims[dim] > 2 or self.one_way)

    def digits(self, chips: IntArray) -> IntArray:
        """[dimensions, chips] Where chips stand."""
        strides = inner_sizes(self.dims)
        return np.stack([chips // strides[k] % size for k, size in enumerate(self.dims)])

    def wires(self) -> Wires:
        """By network, dimension and direction, then the ways in and out of each network."""
        blocks, end = self._blocks()
        tail, head, tier = (np.empty(end, dtype=np.int64) for _ in range(3))
        latency_s, bytes_per_s = np.empty(end), np.empty(end)
        for block in blocks:
            rows = slice(block.offset, block.offset + block.per_line * self._lines(block.dim))
            tail[rows], head[rows] = self._ends(block)
            tier[rows] = self.tiers.index(self._names[block.dim])
            latency_s[rows] = self.link_along(block.dim).latency_s
            bytes_per_s[rows] = self.link_along(block.dim).bytes_per_s
        if self.access is not None:
            chips = np.tile(np.arange(self.num_chips), self.num_networks)
            routers = np.arange(self.num_chips, self.num_nodes)
            ways = slice(end - 2 * len(routers), end)
            tail[ways], head[ways] = np.concatenate([chips, routers]), np.concatenate([routers, chips])
            tier[ways] = self.tiers.index("access")
            latency_s[ways], bytes_per_s[ways] = self.access.latency_s, self.access.bytes_per_s
        return Wires(tail, head, latency_s, bytes_per_s, np.zeros(end), tier, np.arange(end))

    def routes(self, src: IntArray, dst: IntArray) -> Routes:
        """Dimension by dimension, on the network with the fewest wires between the two; see the module."""
        src, dst = node_pairs(src, dst, self.num_chips)
        return self._routes_on(self._network(src, dst), src, dst)

    def ways(self, src: IntArray, dst: IntArray) -> Ways:
        """One for each message."""
        return Ways.single(self.routes(src, dst))

    def levels(self, members: Members, inner: int = 1, aligned: bool = False) -> Levels | None:
        """One ring per dimension; None unless the group fills an aligned block, and `inner` whole dimensions of it."""
        if sharing(members, inner) == group_size(members):
            return ()
        sub, whole = self._block(members), inner_sizes(self.dims)
        # Of a single one-way network one way round is longer than the other.
        if sub is None or (self.one_way and self.num_networks < 2) or inner not in whole:
            return None
        outer = range(whole.index(inner), len(sub))
        return tuple(self._level(dim, sub[dim], prod(sub[:dim])) for dim in outer if sub[dim] > 1)

    def _block(self, members: Members) -> tuple[int, ...] | None:
        """The sizes of the block that a group fills; None where it fills none."""
        chips = members.chips() if isinstance(members, Lattice) else np.asarray(members, dtype=np.int64)
        digits = [np.unique(column) for column in self.digits(chips)]
        sub = tuple(len(each) for each in digits)
        side_by_side = all(each[-1] - each[0] + 1 == len(each) for each in digits)
        copies_fit = all(size % part == 0 for size, part in zip(self.dims, sub, strict=True))
        copies_fit = copies_fit or not isinstance(members, Lattice) or members.alone
        return sub if side_by_side and copies_fit and prod(sub) == len(chips) else None

    def _level(self, dim: int, size: int, inside: int) -> Level:
        # A ring of two has one link and not two. One-way networks have one way each, and every second one the other.
        link = self.link_along(dim)
        access = self.access or Link(0.0, link.bytes_per_s)
        rate = min(link.bytes_per_s, access.bytes_per_s)
        ways = (1 if size == 2 and not self.one_way else 2) * self.num_networks // (2 if self.one_way else 1)
        limit = inside * self.num_networks * access.bytes_per_s if self.access else np.inf
        return Level(
            tier=self._names[dim],
            fanout=size,
            latency_s=link.latency_s + 2 * access.latency_s,
            bytes_per_s=rate,
            pool_bytes_per_s=min(inside * ways * link.bytes_per_s, limit),
            hop_latency_s=link.latency_s,
            ring=True,
            wraps=self.is_ring(dim) and size == self.dims[dim],
            port=0 if self.access else dim,  # a chip without a way in of its own is on each dimension's wires
        )

    def _lines(self, dim: int) -> int:
        return self.num_chips // self.dims[dim]

    def _blocks(self) -> tuple[list[_WireBlock], int]:
        """All blocks of wires in order, and the number of wires with the ways in and out."""
        blocks: list[_WireBlock] = []
        offset = 0
        for network in range(self.num_networks):
            for dim, size in enumerate(self.dims):
                per_line = 0 if size == 1 else size if self.is_ring(dim) else size - 1
                for up in (True, False):
                    if not self.one_way or up == (network % 2 == 0):
                        blocks.append(_WireBlock(network, dim, up, offset, per_line))
                        offset += per_line * self._lines(dim)
        return blocks, offset + 2 * (self.num_nodes - self.num_chips)

    def _ends(self, block: _WireBlock) -> tuple[IntArray, IntArray]:
        """Tails and heads of the wires of a block."""
        size, stride = self.dims[block.dim], inner_sizes(self.dims)[block.dim]
        line = np.repeat(np.arange(self._lines(block.dim)), block.per_line)
        place = np.tile(np.arange(block.per_line), self._lines(block.dim))
        start = place if block.up or block.per_line == size else place + 1
        end = (start + (1 if block.up else -1)) % size
        base = line % stride + line // stride * stride * size
        routers = 0 if self.access is None else self.num_chips * (1 + block.network)
        return base + start * stride + routers, base + end * stride + routers

    def _network(self, src: IntArray, dst: IntArray) -> IntArray:
        """Which network each message takes: fewest wires; among equals in turn by position."""
        if self.num_networks == 1:
            return np.zeros(len(src), dtype=np.int64)
        up, digits = self._ups(src, dst), self.digits(src)
        # Networks with equally few wires take turns, or all traffic of a regular pattern would be on the first.
        turn = (np.arange(1, len(self.dims) + 1) @ up + digits.sum(axis=0)) % self.num_networks
        networks = np.arange(self.num_networks)[:, None]
        cost = np.abs(self._hops(networks, src, dst)).sum(axis=0)
        best: IntArray = (cost * self.num_networks + (networks - turn) % self.num_networks).argmin(axis=0)
        return best

    def _ups(self, src: IntArray, dst: IntArray) -> IntArray:
        """[dimensions, messages] Steps upwards from source to destination, once round where it wraps."""
        up: IntArray = (self.digits(dst) - self.digits(src)) % np.array(self.dims)[:, None]
        return up

    def _hops(self, network: IntArray, src: IntArray, dst: IntArray) -> IntArray:
        """[dimensions, (networks,) messages] Wires to cross in each dimension; below 0 downwards."""
        start, up = self.digits(src), self._ups(src, dst)
        hops: list[IntArray] = []
        for dim, size in enumerate(self.dims):
            down = up[dim] - size * (up[dim] > 0)
            if self.one_way:
                hops.append(np.where(network % 2 == 0, up[dim], down))
            elif self.is_ring(dim):
                # Half way round, chips at even places go up and the others down: both directions carry alike.
                rises = (up[dim] < -down) | ((up[dim] == -down) & (start[dim] % 2 == 0))
                hops.append(np.where(rises, up[dim], down) + 0 * network)
            else:
                hops.append(self.digits(dst)[dim] - start[dim] + 0 * network)
        return np.stack(hops)

    def _routes_on(self, network: IntArray, src: IntArray, dst: IntArray) -> Routes:
        hops, parts = self._hops(network, src, dst), len(self.dims) + 2
        # A way in, each dimension, a way out: how many wires of each part a message crosses says where in the column of
        # all routes they go, so that each part is filled for all messages at once.
        counts = np.zeros((len(src), parts), dtype=np.int64)
        counts[:, 1:-1] = np.abs(hops).T
        if self.access is not None:
            counts[:, 0] = counts[:, -1] = src != dst
        ends = np.cumsum(counts.ravel())
        starts = (ends - counts.ravel()).reshape(counts.shape)
        wires = np.empty(int(ends[-1]) if len(ends) else 0, dtype=np.int64)
        blocks, end = self._blocks()
        for dim in range(len(self.dims)):
            taken = counts[:, dim + 1]
            wires[ranges(starts[:, dim + 1], taken)] = self._crossed(
                dim, blocks, network, src, dst, hops[dim]
            )
        if self.access is not None:
            routers = self.num_chips * self.num_networks
            moved = src != dst
            into = end - 2 * routers + network * self.num_chips
            wires[starts[moved, 0]] = (into + src)[moved]
            wires[starts[moved, -1]] = (into + routers + dst)[moved]
        return Routes(np.concatenate([np.zeros(1, dtype=np.int64), ends[parts - 1 :: parts]]), wires)

    def _crossed(
        self,
        dim: int,
        blocks: list[_WireBlock],
        network: IntArray,
        src: IntArray,
        dst: IntArray,
        hops: IntArray,
    ) -> IntArray:
        """The wires that messages cross in one dimension, message by message."""
        size, stride = self.dims[dim], inner_sizes(self.dims)[dim]
        offsets = np.zeros((self.num_networks, 2), dtype=np.int64)
        per_line = 0
        for block in blocks:
            if block.dim == dim:
                offsets[block.network, int(block.up)], per_line = block.offset, block.per_line
        # Dimension by dimension: in the inner ones the message is where it wants to be, the outer ones are to come.
        line = dst % stride + src // (stride * size) * stride
        base = offsets[network, (hops > 0).astype(np.int64)] + line * per_line
        base -= (hops < 0) & (per_line < size)  # downward wires of an open line begin at its second chip
        count, sign = np.abs(hops), np.sign(hops)
        step = ranges(np.zeros_like(count), count)
        place = (np.repeat(src // stride % size, count) + step * np.repeat(sign, count)) % size
        wires: IntArray = np.repeat(base, count) + place
        return wires


@dataclass(frozen=True, slots=True)
class FullMesh:
    """A wire from every chip to every other: boards of a few chips, and on-chip exchanges that never block."""

    num_chips: int
    link: Link
    half_duplex: bool = False  # the two directions of a pair share one rate

    @property
    def num_nodes(self) -> int:
        return self.num_chips

    @property
    def tiers(self) -> tuple[str, ...]:
        return ("mesh",)

    @property
    def loaded_link(self) -> Link:
        """Half of a shared medium."""
        return Link(self.link.latency_s, self.link.bytes_per_s * (0.5 if self.half_duplex else 1.0))

    def cut(self, num_chips: int) -> "FullMesh":
        """Itself."""
        return self

    def levels(self, members: Members, inner: int = 1, aligned: bool = False) -> Levels | None:
        """Any members meet at one level; None where some meet elsewhere, and where directions share a wire's rate."""
        count = group_size(members)
        if sharing(members, inner) == count:
            return ()
        if sharing(members, inner) != 1 or self.half_duplex:
            return None
        pool = (count - 1) * self.link.bytes_per_s
        (tier,) = self.tiers
        return (Level(tier, count, self.link.latency_s, self.link.bytes_per_s, pool, pairs=True),)

    def wires(self) -> Wires:
        """By tail, then by head."""
        number = np.arange(self.num_chips * (self.num_chips - 1))
        tail, head = np.divmod(number, max(1, self.num_chips - 1))
        head += head >= tail
        shares = self._wire(np.minimum(tail, head), np.maximum(tail, head)) if self.half_duplex else number
        latency_s = np.full(len(number), self.link.latency_s)
        rate = np.full(len(number), self.link.bytes_per_s)
        return Wires(tail, head, latency_s, rate, np.zeros(len(number)), np.zeros_like(number), shares)

    def routes(self, src: IntArray, dst: IntArray) -> Routes:
        """The one wire between the two."""
        src, dst = node_pairs(src, dst, self.num_chips)
        return routes_of([np.where(src == dst, -1, self._wire(src, dst))])

    def ways(self, src: IntArray, dst: IntArray) -> Ways:
        """One for each message."""
        return Ways.single(self.routes(src, dst))

    def _wire(self, tail: IntArray, head: IntArray) -> IntArray:
        return tail * (self.num_chips - 1) + head - (head > tail)
