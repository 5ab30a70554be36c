"""Candidate jobs: the messages of a fixed algorithm on a network, and how many they are before they are made.

On a network without levels, or with links down or slow, rings go from chip to neighbouring chip as well, as many as
its wires bear.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from comms.algorithms.catalog import algorithm_of
from comms.algorithms.ring import RING
from comms.collectives.schedule import Op
from comms.errors import TooManyMessages
from comms.networks.groups import Lattice
from comms.networks.tiered import TieredTopology
from comms.networks.topology import Topology
from comms.selection.choice import Choice
from comms.selection.pricing import groups_of, job_of
from comms.selection.topology_aware import laid_rings

if TYPE_CHECKING:
    from comms.simulation.compiled import CollectiveJob

MOST_MESSAGES = 2**24  # some 2 GB
EASILY_MADE = 2**22  # up to so many sends a schedule is made to know how many messages it has


def jobs_of(
    choice: Choice,
    members: Lattice,
    whole: TieredTopology,
    seen: Topology,
    most_messages: int = MOST_MESSAGES,
) -> "Iterator[CollectiveJob]":
    """What may be moved for a choice over all chips, each job instead of the one before.

    `seen` is the whole network or what conditions leave of it. Raises TooManyMessages.
    """
    sends, pieces = most_sends(choice)
    if sends > EASILY_MADE:
        check_messages(sends * pieces, choice.algorithm, most_messages)
    job = job_of(choice, groups_of(members, members.num_chips), whole)
    jobs = [job]
    if choice.algorithm == RING and not (choice.is_folded and seen is whole):
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
