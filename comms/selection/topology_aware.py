"""Topology-aware: fixed algorithms laid out as a topology suggests that does not fold into levels.

Rings go from neighbour to neighbour, several at once where wires are left for them, as libraries open channels.
Hierarchies are made of the subgroups of chips that are found closest together, where those are alike in size.
"""

from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass
from math import inf

import numpy as np

from comms.algorithms import ring
from comms.algorithms.catalog import algorithms
from comms.algorithms.rounds import Ranks
from comms.collectives.schedule import Op, Schedule
from comms.errors import CommsError
from comms.networks.groups import Level
from comms.networks.ring_orders import SEARCHED_CHIPS, Subgroups, hierarchy, ring_orders
from comms.networks.topology import IntArray, Topology


@dataclass(frozen=True, slots=True, eq=False)
class Laid:
    """A schedule and the chip of each of its ranks."""

    schedule: Schedule
    chips: IntArray


def laid_rings(op: Op, topology: Topology) -> tuple[Laid, ...]:
    """One ring over all chips, and as many as the wires bear; none for operations that do not go round."""
    if op not in ring.AROUND:
        return ()
    orders = [each.chips for each in ring_orders(topology)]
    chips = np.arange(topology.num_chips)
    ranks = Ranks(len(chips))
    return tuple(
        Laid(ring.schedule(op, ranks, orders=orders[:num]), chips) for num in sorted({1, len(orders)})
    )


def laid_hierarchies(op: Op, topology: Topology, names: Collection[str]) -> tuple[Laid, ...]:
    """Hierarchical algorithms among `names` over the subgroups found, with as many peers as an automatic choice allows.

    None where these are not alike, or chips are too many.
    """
    if not 2 < topology.num_chips <= SEARCHED_CHIPS:
        return ()
    found = hierarchy(topology)
    fanouts = _fanouts(found)
    if len(fanouts) < 2:
        return ()
    levels = tuple(Level("", fanout, 0.0, inf, inf) for fanout in fanouts)
    laid = []
    for each in algorithms(op).values():
        if not each.is_hierarchy or each.name not in names or each.has_many_peers(op, levels):
            continue
        with suppress(CommsError):  # halving and doubling over other than powers of two
            schedule = each.make(op, Ranks(topology.num_chips, fanouts=fanouts))
            laid.append(Laid(schedule, _nested(found)))
    return tuple(laid)


def _fanouts(levels: tuple[Subgroups, ...]) -> tuple[int, ...]:
    """How many subgroups of a level are one of the next, from the inside; none where they differ in size."""
    sizes = [{len(subgroup) for subgroup in subgroups} for subgroups in levels]
    if any(len(each) > 1 for each in sizes):
        return ()
    outer = [each.pop() for each in sizes]
    return tuple(size // inner for inner, size in zip([1, *outer], outer, strict=False) if size > inner)


def _nested(levels: tuple[Subgroups, ...]) -> IntArray:
    """All chips, so that every subgroup of every level is one range of them."""
    place = np.zeros((len(levels), sum(len(subgroup) for subgroup in levels[-1])), dtype=np.int64)
    for row, subgroups in zip(place, levels, strict=True):
        for number, subgroup in enumerate(subgroups):
            row[list(subgroup)] = number
    return np.lexsort([np.arange(place.shape[1]), *place])
