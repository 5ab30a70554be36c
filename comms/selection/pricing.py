"""Pricing: what a collective takes, at any fidelity, and which links decide.

    closed   arithmetic over the levels of the group, in microseconds of work
    folded   the same messages, swept over representative chips
    full     every message of every chip on the topology (comms.simulation.full), wires shared max-min fairly

What the library adds (`Choice.setup_s`) is the same in all. On groups that fold evenly the three agree; groups
that do not are priced by full fidelity where there is a topology of few enough chips.
"""

from dataclasses import dataclass, replace
from enum import StrEnum
from math import prod

import numpy as np

from comms.algorithms.catalog import num_layers_of_switches, outline_of
from comms.collectives.closed_form import closed_seconds
from comms.collectives.schedule import Op, bus_factor
from comms.networks.groups import Lattice, Members
from comms.networks.tiered import TieredTopology
from comms.networks.topology import IntArray
from comms.selection.choice import Choice
from comms.simulation.compiled import CollectiveJob

FREE = 1e9  # how much better a tier is made to see what it costs


class Fidelity(StrEnum):
    """How closely a collective is timed."""

    CLOSED = "closed"
    FOLDED = "folded"
    FULL = "full"


@dataclass(frozen=True, slots=True)
class TierShare:
    """One tier that a collective crosses."""

    tier: str
    fanout: int
    latency_s: float  # of one stage, by the protocol taken
    bytes_per_s: float  # of a chip, when all chips of a group send to others at once
    saved_s: float  # what would be saved if this tier cost nothing


def algbw(op: Op, nbytes: float, seconds: float) -> float:
    """Bytes per second as nccl-tests count them: nbytes over time."""
    return nbytes / seconds if seconds > 0 and op is not Op.BARRIER else 0.0


def busbw(op: Op, nbytes: float, seconds: float, num_chips: int) -> float:
    """What a link carries, as nccl-tests count it: comparable over numbers of chips."""
    return algbw(op, nbytes, seconds) * bus_factor(op, num_chips)


def tier_shares(choice: Choice) -> tuple[TierShare, ...]:
    """Per level that the group spans, what it costs: by the closed form with that level free."""
    shares = []
    # Levels overlap where pieces are pipelined, so that their times do not add up: each is taken away in turn.
    for at, level in enumerate(choice.levels):
        free = replace(
            level,
            latency_s=0.0,
            hop_latency_s=0.0,
            bytes_per_s=level.bytes_per_s * FREE,
            pool_bytes_per_s=level.pool_bytes_per_s * FREE,
        )
        levels = tuple(choice.seen(free if other == at else each) for other, each in enumerate(choice.levels))
        outline = outline_of(choice.algorithm, choice.op, choice.nbytes, levels)
        saved = choice.transfer_s - closed_seconds(outline) if outline is not None else 0.0
        inner = prod(each.fanout for each in choice.levels[:at])
        seen = choice.seen(level)
        shares.append(TierShare(level.tier, level.fanout, seen.latency_s, seen.rate(inner), max(0.0, saved)))
    return tuple(shares)


def job_of(choice: Choice, groups: IntArray, topology: TieredTopology, start_s: float = 0.0) -> CollectiveJob:
    """The messages of a choice for groups of chips ([groups, chips], members in order) on a topology."""
    schedule = choice.schedule()
    places = np.array([_places(choice, members, topology) for members in groups])
    return CollectiveJob(
        schedule, places, choice.nbytes, start_s, protocol=choice.protocol, inside=choice.inside
    )


def groups_of(members: Members, num_chips: int) -> IntArray:
    """[groups, chips] A list of chips alone, or all copies of a Lattice among `num_chips` chips."""
    if isinstance(members, Lattice):
        return members.copies(num_chips)
    return np.asarray(members, dtype=np.int64)[np.newaxis]


def _places(choice: Choice, members: IntArray, topology: TieredTopology) -> IntArray:
    """The members, and after them the switches that add for them: one per group, then the one over all."""
    layers = num_layers_of_switches(choice.algorithm, choice.levels)
    if layers == 0 or len(members) == 1:
        return members
    size = choice.levels[0].fanout
    groups = [members[first : first + size] for first in range(0, len(members), size)]
    switches = [topology.switch_over(each.tolist()) for each in groups]
    if layers > 1:
        switches.append(topology.switch_over(members.tolist()))
    return np.concatenate([members, np.array(switches, dtype=np.int64)])
