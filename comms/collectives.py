"""Collectives: closed forms of how long one takes, with the fastest algorithm for its group and size.

Hockney's model for every hop, latency + nbytes / bytes_per_s (Parallel Computing 20, 1994); step counts of
the algorithms as in Thakur, Rabenseifner and Gropp (Int. J. High Perf. Comp. Appl. 19, 2005). A group of n
chips is folded into levels: f1 members share an innermost tier, f2 such bunches the next one, ..., n = f1 *
f2 * ... How many members share a tier follows from the strides of the mesh, so the cost of a cost does not
grow with n.

`nbytes` is the full buffer in an all_reduce and a broadcast, the gathered result in an all_gather, the input
in a reduce_scatter, and what one chip holds in an all_to_all.

Assumes that all members start together and that every chip has its tier's loaded link to itself. A group that
sits unevenly on a tier (3 members in one host, 5 in the next) is priced as if no two shared it. Not modelled:
contention between collectives, the time to add contributions, protocols by size, in-network reduction. A new
algorithm is one function from (nbytes, levels) to seconds, entered in ALGORITHMS.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from typing import TypeAlias

from comms.groups import Lattice as Lattice
from comms.groups import Members as Members
from comms.groups import group_size, sharing
from comms.groups import mesh_group as mesh_group
from comms.links import Link
from comms.network import Network


@dataclass(frozen=True, slots=True)
class Level:
    """One fold of a group: bunches of `fanout` that meet over this tier's link."""

    tier: str
    fanout: int
    link: Link


@dataclass(frozen=True, slots=True)
class CollectiveCost:
    """How long, by which algorithm, and the outermost tier it crosses (empty for one chip)."""

    seconds: float
    algorithm: str
    tier: str


Levels: TypeAlias = tuple[Level, ...]
Algorithm: TypeAlias = Callable[[float, Levels], float]


def collective_seconds(op: str, nbytes: float, members: Members, network: Network) -> CollectiveCost:
    """The fastest algorithm for `op` over these chips; of equally fast ones the first in ALGORITHMS."""
    levels = fold(members, network)
    if not levels:
        return CollectiveCost(0.0, "none", "")
    priced = [(algorithm(nbytes, levels), name) for name, algorithm in ALGORITHMS[op].items()]
    seconds, name = min(priced, key=lambda pair: pair[0])
    return CollectiveCost(seconds, name, levels[-1].tier)


def transfer_seconds(nbytes: float, source: int, target: int, network: Network) -> CollectiveCost:
    """One message between two chips, all chips of the source's stage sending theirs at the same time."""
    tier = network.tier_for((source, target))
    return CollectiveCost(tier.loaded_link.seconds(nbytes), "direct", tier.name)


def fold(members: Members, network: Network) -> Levels:
    """The levels of a group, innermost first, only those where members meet; none for a single chip."""
    total = group_size(members)
    levels: list[Level] = []
    together = 1
    for index, tier in enumerate(network.tiers):
        is_last = index == len(network.tiers) - 1
        count = total if is_last else sharing(members, tier.size) or 1
        if count > together and count % together == 0:
            levels.append(Level(tier.name, count // together, tier.loaded_link))
            together = count
    return tuple(levels)


def _ring(passes: int) -> Algorithm:
    """n - 1 synchronous steps per pass, each one nth of the buffer over the slowest hop of the ring."""

    def seconds(nbytes: float, levels: Levels) -> float:
        num_chips = prod(level.fanout for level in levels)
        return passes * (num_chips - 1) * max(level.link.seconds(nbytes / num_chips) for level in levels)

    return seconds


def _hierarchical(passes: int) -> Algorithm:
    """Rings level by level: each level handles only the part that the levels inside it left to a chip."""

    def seconds(nbytes: float, levels: Levels) -> float:
        total = 0.0
        for level in levels:
            nbytes /= level.fanout
            total += (level.fanout - 1) * level.link.seconds(nbytes)
        return passes * total

    return seconds


def _recursive_doubling(nbytes: float, levels: Levels) -> float:
    """Exchanges of the whole buffer with chips 1, 2, 4, ... away; a surplus over a power of two adds two."""
    return sum(_exchanges(level.fanout) * level.link.seconds(nbytes) for level in levels)


def _exchanges(fanout: int) -> int:
    whole = fanout.bit_length() - 1
    return whole if fanout == 1 << whole else whole + 2


def _pairwise(nbytes: float, levels: Levels) -> float:
    """One message of an nth of the buffer to each other chip in turn, over the innermost tier they share."""
    num_chips = prod(level.fanout for level in levels)
    total, inside = 0.0, 1
    for level in levels:
        reached = inside * level.fanout
        total += (reached - inside) * level.link.seconds(nbytes / num_chips)
        inside = reached
    return total


def _binomial_tree(nbytes: float, levels: Levels) -> float:
    """Whole buffers, twice as many chips have it after each step."""
    return sum((level.fanout - 1).bit_length() * level.link.seconds(nbytes) for level in levels)


def _scatter_gather(nbytes: float, levels: Levels) -> float:
    """Van de Geijn's broadcast: scatter down a binomial tree, then a ring all-gather."""
    num_chips = prod(level.fanout for level in levels)
    slowest = max((level.link for level in levels), key=lambda link: link.seconds(nbytes / num_chips))
    steps = (num_chips - 1).bit_length()
    scatter = steps * slowest.latency_s + (num_chips - 1) / num_chips * nbytes / slowest.bytes_per_s
    return scatter + _ring(1)(nbytes, levels)


ALGORITHMS: Mapping[str, Mapping[str, Algorithm]] = {
    "all_reduce": {
        "ring": _ring(2),
        "hierarchical": _hierarchical(2),  # reduce-scatter inwards out, all-gather back
        "recursive doubling": _recursive_doubling,
    },
    "all_gather": {"ring": _ring(1), "hierarchical": _hierarchical(1)},
    "reduce_scatter": {"ring": _ring(1), "hierarchical": _hierarchical(1)},
    "all_to_all": {"pairwise": _pairwise},
    "broadcast": {"binomial tree": _binomial_tree, "scatter and gather": _scatter_gather},
}
