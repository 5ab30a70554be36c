"""Topologies: the wires of a network as columns, and the routes that messages take over them.

Nodes are numbered: chips first (0 .. num_chips - 1), then switches. A wire is one direction of one link, from
its tail to its head node. A route is the wires a message crosses, in order; its first byte arrives after the
sum of their latencies, and it moves at the rate of the slowest share it gets. A node that forwards packets or
whole messages (`forward_nbytes` of the wire into it) takes that many bytes in before it sends on; the others
cut through.

Regular topologies compute routes from positions and keep no table of pairs, so their memory grows with the
number of wires only. How wires and nodes differ from their data sheets while something is timed is `Conditions`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

IntArray: TypeAlias = NDArray[np.int64]
FloatArray: TypeAlias = NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class Wires:
    """All wires of a topology; one row each.

    `shares` is the number of the wire whose capacity a wire uses: its own, or for half-duplex media that of the
    opposite direction.
    """

    tail: IntArray  # [wires] node it leaves
    head: IntArray  # [wires] node it enters
    latency_s: FloatArray  # [wires] first byte in to first byte out, with the switch at its head
    bytes_per_s: FloatArray  # [wires]
    forward_nbytes: FloatArray  # [wires] bytes the head takes in before it forwards; 0 cut-through, inf whole
    tier: IntArray  # [wires] index into Topology.tiers
    shares: IntArray  # [wires]

    @property
    def num_wires(self) -> int:
        return len(self.tail)


@dataclass(frozen=True, slots=True, eq=False)
class Routes:
    """The routes of m messages: message i crosses wires[offsets[i] : offsets[i + 1]]."""

    offsets: IntArray  # [m + 1]
    wires: IntArray  # [offsets[-1]]

    @property
    def num_messages(self) -> int:
        return len(self.offsets) - 1

    def of(self, message: int) -> IntArray:
        """The wires of one message, in the order it crosses them."""
        return self.wires[self.offsets[message] : self.offsets[message + 1]]

    def take(self, which: IntArray) -> "Routes":
        """The routes of some messages, in the order of `which`."""
        lengths = np.diff(self.offsets)[which]
        rows = ranges(self.offsets[which], lengths)
        return Routes(np.concatenate([[0], np.cumsum(lengths)]), self.wires[rows])


@dataclass(frozen=True, slots=True, eq=False)
class Ways:
    """Routes that messages spread over: route i carries share[i] of message[i], whose shares sum to 1."""

    routes: Routes
    message: IntArray  # [routes] ascending
    share: FloatArray

    @classmethod
    def single(cls, routes: Routes) -> "Ways":
        """Each message on one route."""
        return cls(routes, np.arange(routes.num_messages), np.ones(routes.num_messages))

    def kept(self, keep: NDArray[np.bool_]) -> "Ways":
        """Only some of the routes, each with as much more as its message has lost."""
        which = np.flatnonzero(keep)
        message, share = self.message[which], self.share[which]
        sums = np.bincount(message, weights=share, minlength=int(self.message.max(initial=-1)) + 1)
        return Ways(self.routes.take(which), message, share / sums[message])


@dataclass(frozen=True, slots=True)
class Change:
    """From `at_s` on, a wire runs at `factor` of the topology's rate: 0 is down. It takes the place of `factors`."""

    at_s: float
    wire: int
    factor: float


@dataclass(frozen=True, slots=True, eq=False)
class Conditions:
    """How the wires and nodes of one topology differ from their data sheets while it is timed."""

    factors: Mapping[int, float] = field(default_factory=dict)  # wire -> share of its rate
    changes: tuple[Change, ...] = ()
    overhead_s: Mapping[int, float] = field(default_factory=dict)  # node -> before each message it sends
    noise_s: float = 0.0  # mean of an exponential delay before each message
    seed: int = 0


UNDISTURBED = Conditions()


class Topology(Protocol):
    """What every network shape offers; a new shape is one class with these."""

    @property
    def num_chips(self) -> int:
        """Chips are nodes 0 .. num_chips - 1."""

    @property
    def num_nodes(self) -> int:
        """Chips and switches."""

    @property
    def tiers(self) -> tuple[str, ...]:
        """Names of the tiers that wires belong to."""

    def wires(self) -> Wires:
        """The wires, always in the same order."""

    def routes(self, src: IntArray, dst: IntArray) -> Routes:
        """One route per pair of nodes; empty where both are the same. Keyed by position, never random.

        Any two chips have one. A chip and a switch above it have one where the shape lets switches reduce.
        """

    def ways(self, src: IntArray, dst: IntArray) -> Ways:
        """All equal routes that a message between two nodes spreads over; `routes` has one of them."""


def routes_of(columns: Sequence[IntArray]) -> Routes:
    """Routes from columns of wires, hop by hop: columns[h][i] is the h-th wire of message i, -1 for none."""
    table = np.stack([np.asarray(column, dtype=np.int64) for column in columns], axis=1)
    taken = table >= 0
    offsets = np.zeros(len(table) + 1, dtype=np.int64)
    np.cumsum(taken.sum(axis=1), out=offsets[1:])
    return Routes(offsets, table[taken])


def merged_routes(num_messages: int, parts: Sequence[tuple[IntArray, Routes]]) -> Routes:
    """The routes of all messages, from those of some of them by number; messages in no part have none."""
    lengths = np.zeros(num_messages, dtype=np.int64)
    for which, routes in parts:
        lengths[which] = np.diff(routes.offsets)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    wires = np.zeros(int(offsets[-1]), dtype=np.int64)
    for which, routes in parts:
        wires[ranges(offsets[which], lengths[which])] = routes.wires
    return Routes(offsets, wires)


def merged_ways(num_messages: int, parts: Sequence[tuple[IntArray, Ways]]) -> Ways:
    """The ways of all messages, from those of some of them by number; messages in no part have an empty route."""
    there = np.concatenate([np.zeros(0, dtype=np.int64), *(which for which, _ in parts)])
    if len(parts) == 1 and len(there) == num_messages:  # the usual case, in no time
        return parts[0][1]
    rest = np.setdiff1d(np.arange(num_messages), there)
    none = Routes(np.zeros(len(rest) + 1, dtype=np.int64), np.zeros(0, dtype=np.int64))
    every = [*parts, (rest, Ways.single(none))]
    message = np.concatenate([which[ways.message] for which, ways in every])
    lengths = np.concatenate([np.diff(ways.routes.offsets) for _, ways in every])
    routes = Routes(
        np.concatenate([[0], np.cumsum(lengths)]), np.concatenate([ways.routes.wires for _, ways in every])
    )
    order = np.argsort(message, kind="stable")
    share = np.concatenate([ways.share for _, ways in every])
    return Ways(routes.take(order), message[order], share[order])


def route_latencies(wires: Wires, routes: Routes) -> FloatArray:
    """[m] Sum of the latencies along each route, in seconds."""
    sums = np.concatenate([[0.0], np.cumsum(wires.latency_s[routes.wires])])
    totals: FloatArray = sums[routes.offsets[1:]] - sums[routes.offsets[:-1]]
    return totals


def ranges(starts: IntArray, counts: IntArray) -> IntArray:
    """starts[0], starts[0] + 1, ... (counts[0] of them), then those of starts[1], and so on."""
    before = np.cumsum(counts) - counts
    numbers: IntArray = np.repeat(starts - before, counts) + np.arange(int(np.sum(counts)))
    return numbers


def run_starts(*columns: NDArray[np.integer]) -> IntArray:
    """The first rows of all runs of rows that are the same in every column."""
    new = np.ones(len(columns[0]), dtype=np.bool_)
    new[1:] = np.any([column[1:] != column[:-1] for column in columns], axis=0)
    return np.flatnonzero(new)


def repeats_before(keys: IntArray) -> IntArray:
    """[keys] How many of the same there are before each."""
    order = np.argsort(keys, kind="stable")
    starts = run_starts(keys[order])
    numbers = np.empty_like(keys)
    numbers[order] = np.arange(len(keys)) - np.repeat(starts, np.diff(starts, append=len(keys)))
    return numbers
