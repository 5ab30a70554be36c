"""Levels: a group of chips folded by the tiers it spans, which is all that symmetric collectives depend on.

A group of n chips is folded into levels, innermost first: subgroups of f1 members share an innermost tier, f2 such
subgroups the next, ..., n = f1 * f2 * ... Member number m has the digits (m % f1, m // f1 % f2, ...). Dimensions
of a torus are levels too, whose subgroups stand in a ring. The time of a message depends only on the outermost
level whose digit differs between its ends, and on how many messages leave a subgroup of that level at once.
"""

from dataclasses import dataclass, replace
from math import inf, prod
from typing import TypeAlias

from comms.networks.links import Protocol


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

    def seconds(self, nbytes: float, flows: int = 1) -> float:
        """One message of `nbytes` between neighbouring subgroups, when `flows` such messages leave each subgroup."""
        return self.latency_s + nbytes / self.rate(flows)

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
