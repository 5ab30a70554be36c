"""Groups: the chips that take part in a collective, listed or by arithmetic.

A group by arithmetic stands for all its copies in a mesh at once, so that what it costs does not have to be worked
out chip by chip: a group of a million chips is a few pairs of numbers.

Assumes that the axes of a mesh nest (row-major), so that strides divide each other.
"""

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from math import prod
from typing import TypeAlias

import numpy as np

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
