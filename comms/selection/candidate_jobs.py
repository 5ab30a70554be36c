"""Candidate jobs: the messages of a fixed algorithm on a network, and how many they are before they are made.

On a network without levels, or with links down or slow, algorithms are laid out as the topology suggests as well.
Rings go from neighbour to neighbour, several at once where wires are left for them, as libraries open channels.
Hierarchies are made of the subgroups of chips that are found closest together, where those are alike in size.
"""

from collections.abc import Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from math import inf

import numpy as np

from comms.algorithms import ring
from comms.algorithms.catalog import algorithm_of, algorithms
from comms.algorithms.rounds import Ranks
from comms.collectives.schedule import Op, Schedule
from comms.errors import CommsError, TooManyMessages
from comms.networks.groups import Lattice, Level
from comms.networks.ring_orders import SEARCHED_CHIPS, Subgroups, hierarchy, ring_orders
from comms.networks.tiered import TieredTopology
from comms.networks.topology import IntArray, Topology
from comms.selection.choice import Choice
from comms.simulation.compiled import CollectiveJob

MOST_MESSAGES = 2**24  # some 2 GB
EASILY_MADE = 2**22  # up to so many sends a schedule is made to know how many messages it has


@dataclass(frozen=True, slots=True, eq=False)
class Laid:
    """A schedule and the chip of each of its ranks."""

    schedule: Schedule
    chips: IntArray


def jobs_of(
    choice: Choice,
    members: Lattice,
    whole: TieredTopology,
    seen: Topology,
    most_messages: int = MOST_MESSAGES,
) -> Iterator[CollectiveJob]:
    """What may be moved for a choice over all chips, each job instead of the one before.

    `seen` is the whole network or what conditions leave of it. Raises TooManyMessages.
    """
    sends, pieces = most_sends(choice)
    if sends > EASILY_MADE:
        check_messages(sends * pieces, choice.algorithm, most_messages)
    job = choice.job(members.copies(members.num_chips), whole)
    jobs = [job]
    if choice.algorithm == ring.RING and not (choice.is_folded and seen is whole):
        laid = laid_rings(choice.op, seen)
        jobs += [replace(job, schedule=each.schedule, places=each.chips) for each in laid]
    for each in jobs:
        check_messages(each.schedule.num_messages, choice.algorithm, most_messages)
        yield each


def expected_messages(choice: Choice) -> int:
    """About as many as it sends, without its schedule."""
    sends, pieces = most_sends(choice)
    return sends * pieces


def most_sends(choice: Choice) -> tuple[int, int]:
    """(sends, pieces of each) of a choice, without its schedule, if every chip sends in every round to all peers.

    Where what a chip holds is not one range of chunks, as many as there are chunks of others: between all pairs, and
    in halves of an all-reduce over several levels.
    """
    outline, algorithm = choice.outline(), algorithm_of(choice.op, choice.algorithm)
    phases = [phase for channel in outline.channels for phase in channel.phases]
    rounds = sum(stage.repeat for phase in phases for stage in phase)
    others, peers = choice.num_chips - 1, 1
    if algorithm.to_all_at_once:
        peers = others
    elif algorithm.peers is not None:
        peers = algorithm.peers(choice.levels)
    halves = choice.op in (Op.ALL_GATHER, Op.REDUCE_SCATTER)
    in_parts = halves and (len(choice.levels) > 1 or not algorithm.in_ranges)
    chunks = others if in_parts or choice.op is Op.ALL_TO_ALL else 0
    return choice.num_chips * max(rounds * peers, chunks), outline.pieces


def check_messages(count: int, algorithm: str, most: int = MOST_MESSAGES) -> None:
    """Raises TooManyMessages for more than are to be moved one by one."""
    if count > most:
        raise TooManyMessages(
            f"{algorithm} sends about {count / 1e6:.0f} million messages, too many to move one by one",
            "--fidelity full",
            "ask for folded, for fewer chips, or for an algorithm with fewer rounds",
        )


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
