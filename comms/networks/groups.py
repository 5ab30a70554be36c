"""Groups: the chips that take part in a collective, listed or by arithmetic, and what their levels are.

A group by arithmetic stands for all its copies in a mesh at once, so that what it costs does not have to be worked
out chip by chip: a group of a million chips is a few pairs of numbers.

Assumes that the axes of a mesh nest (row-major), so that strides divide each other.

A group of n chips is folded into levels, innermost first: subgroups of f1 members share an innermost tier, f2 such
subgroups the next, ..., n = f1 * f2 * ... Member number m has the digits (m % f1, m // f1 % f2, ...). Dimensions
of a torus are levels too, whose subgroups stand in a ring. The time of a message depends only on the outermost
level whose digit differs between its ends, and on how many messages leave a subgroup of that level at once.
"""

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from math import inf, prod
from typing import TypeAlias

import numpy as np

from comms.networks.links import Protocol
from comms.networks.topology import IntArray


@dataclass(frozen=True, slots=True)
class Lattice:
    """A group of chips by arithmetic: an offset plus all sums of k * stride, k < size, per (stride, size).

    Stands for every offset that the mesh has, all busy at the same time, and is priced as the worst of them.
    """

    steps: tuple[tuple[int, int], ...]
    alone: bool = False  # it has no other copies: there are no more chips

    @property
    def num_chips(self) -> int:
        return prod(size for _, size in self.steps)

    @property
    def highest(self) -> int:
        """The last chip of the copy with offset 0."""
        return sum(stride * (size - 1) for stride, size in self.steps)

    def chips(self) -> IntArray:
        """The chips of the copy with offset 0, in ascending order."""
        chips = np.zeros(1, dtype=np.int64)
        for stride, size in self.steps:
            chips = (np.arange(size)[:, None] * stride + chips).ravel()
        return chips

    def copies(self, num_chips: int) -> IntArray:
        """[copies, chips] All copies in a mesh of `num_chips` chips, by their first chip, each in ascending order."""
        every = np.arange(num_chips)
        first = every.copy()
        for stride, size in self.steps:
            first -= every // stride % size * stride
        return np.argsort(first, kind="stable").reshape(-1, self.num_chips)

    def within(self, size: int) -> "Lattice":
        """What of the group lies in one aligned block of `size` chips, where all blocks hold alike."""
        kept = [(stride, min(length, size // stride)) for stride, length in self.steps if stride < size]
        return Lattice(tuple((stride, length) for stride, length in kept if length > 1))


Members: TypeAlias = Sequence[int] | Lattice


def mesh_group(axes: Sequence[tuple[str, int]], along: Collection[str]) -> Lattice:
    """The chips that differ only `along` these axes of a row-major mesh (`axes` slowest first)."""
    steps: list[tuple[int, int]] = []
    stride = 1
    for axis, size in reversed(axes):
        if axis in along and size > 1:
            if steps and steps[-1][0] * steps[-1][1] == stride:  # neighbouring axes are one longer axis
                steps[-1] = (steps[-1][0], steps[-1][1] * size)
            else:
                steps.append((stride, size))
        stride *= size
    return Lattice(tuple(steps))


def group_size(members: Members) -> int:
    """Chips in the group."""
    return members.num_chips if isinstance(members, Lattice) else len(members)


def sharing(members: Members, size: int) -> int | None:
    """How many members share each aligned block of `size` chips that has any; None where blocks differ."""
    if not isinstance(members, Lattice):
        counts = set(Counter(chip // size for chip in members).values())
        return counts.pop() if len(counts) == 1 else None
    count = 1
    for stride, length in members.steps:
        if stride >= size:
            continue
        if size % (stride * length) == 0:
            count *= length
        elif size % stride == 0 and length % (size // stride) == 0:
            count *= size // stride
        else:
            return None
    return count


@dataclass(frozen=True, slots=True)
class Level:
    """One fold of a group: `fanout` subgroups that meet over this tier."""

    tier: str
    fanout: int
    latency_s: float  # of one message between two subgroups (of neighbours, in a ring)
    bytes_per_s: float  # of one message alone, one direction
    pool_bytes_per_s: float = inf  # what one subgroup has to all others, shared by all messages that leave it
    hop_latency_s: float = 0.0  # ring only: for each subgroup further than the neighbour
    ring: bool = False  # subgroups have wires to their two neighbours only; else all reach each other alike
    wraps: bool = True  # ring only: the last is a neighbour of the first
    reduces: bool = False  # the switch between the subgroups can add and copy
    # every two subgroups have a wire of their own: messages to different ones share nothing
    pairs: bool = False
    shared: bool = False  # the pool is what a switch passes in all, or a wire in both directions
    port: int = 0  # levels with the same number leave a chip by the same wires

    def rate(self, flows: int = 1) -> float:
        """Bytes per second of each of `flows` equal messages that leave one subgroup at once."""
        return min(self.bytes_per_s, self.pool_bytes_per_s / flows)

    def under(self, protocol: Protocol) -> "Level":
        """The level as messages of a protocol see it."""
        return replace(
            self,
            latency_s=self.latency_s + protocol.latency_s,
            bytes_per_s=self.bytes_per_s * protocol.share,
            pool_bytes_per_s=self.pool_bytes_per_s * protocol.share,
        )


Levels: TypeAlias = tuple[Level, ...]


def num_members(levels: Levels) -> int:
    """Chips in the group."""
    return prod(level.fanout for level in levels)


def inner_sizes(fanouts: Sequence[int]) -> tuple[int, ...]:
    """Per fanout, how many ranks one subgroup inside it has: 1, f1, f1 * f2, ..."""
    return tuple(prod(fanouts[:index]) for index in range(len(fanouts)))
