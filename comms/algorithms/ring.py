"""Rings: every rank sends to the next one only; bandwidth-optimal, with a latency that grows with the ranks.

All-reduce is a reduce-scatter and an all-gather around the ring (Patarasuk and Yuan, Journal of Parallel and
Distributed Computing 69, 2009): 2 (n - 1) rounds of nbytes / n. Broadcast and reduce are chains in pieces.
Several rings share the buffer out: over different orders of the ranks, so that each leaves a host by another
chip, or in both directions.

A ring has one pattern for all its rounds. Outlines are exact for one ring, and for several on one level. Several
rings over hosts, as `rail_orders` has them, use the wires inside a host in turns that are not modelled: one of a
ring's messages is taken to have its share of them, as that limits what they carry, and the others to have them
alone. With up to 8 rings over 2 to 16 hosts of 4 or 8 chips, with fabrics of 300 to 600 GB/s and cards of 25 to
50 GB/s, that is within 8 % of full fidelity, and 0.3 % in the mean.
"""

from collections.abc import Sequence
from functools import partial
from math import prod

import numpy as np

from comms.algorithms.catalog import Algorithm, Joined, Needs, cut_by, spans
from comms.algorithms.rounds import Ranks, halves
from comms.collectives.outline import Hop, Outline, OutlineStage
from comms.collectives.outline_time import pieces_to_fill
from comms.collectives.schedule import Channel, Op, Pattern, Round, Schedule
from comms.networks.groups import Level, Levels, num_members
from comms.networks.topology import IntArray

RING, BIDIRECTIONAL, RAIL_RINGS = "ring", "bidirectional ring", "rail rings"
AROUND = (Op.ALL_REDUCE, Op.ALL_GATHER, Op.REDUCE_SCATTER)
MOST_RINGS = 16  # as many channels as libraries open
MAX_POSITIONS = 4096  # chips that all differ; a ring with more of them has no outline


def rail_orders(num_ranks: int, per_host: int, num_rings: int) -> tuple[IntArray, ...]:
    """Orders of ranks for several rings over hosts alike: ring c leaves every even host at chip c of it.

    Odd hosts are crossed backwards, so that a message between hosts joins like chips: it keeps to its rail. (Not the
    one from the last host of an odd number of hosts to the first.)
    """
    hosts = np.arange(0, num_ranks, per_host)[:, np.newaxis]
    forth = np.arange(1, per_host + 1)
    chips = np.where(np.arange(len(hosts))[:, np.newaxis] % 2 == 0, forth, forth[::-1])
    return tuple((hosts + (chips + ring) % per_host).ravel() for ring in range(num_rings))


def schedule(
    op: Op, ranks: Ranks, *, orders: Sequence[IntArray] | None = None, both_ways: bool = False
) -> Schedule:
    """One channel per order of ranks, and one back where `both_ways`.

    Scattering, every rank adds its part to what it got last and passes it on; gathering, it passes that on.
    """
    rings = [np.arange(ranks.num)] if orders is None else [np.asarray(ring, np.int64) for ring in orders]
    if both_ways:
        rings = [each for ring in rings for each in (ring, ring[::-1].copy())]
    num_chunks = ranks.num * len(rings)
    channels = tuple(
        Channel((_rounds(op, ring, ring * len(rings) + index),), ranks.pieces)
        for index, ring in enumerate(rings)
        if ranks.num > 1
    )
    name = BIDIRECTIONAL if both_ways else RING
    return Schedule(op, name, ranks.num, num_chunks, 1.0 / num_chunks, channels)


def chain_schedule(op: Op, ranks: Ranks) -> Schedule:
    """Round s: the rank at place s of a chain from the root sends the whole to the next. A reduce goes backwards."""
    reduces, one = op is Op.REDUCE, np.ones(1, dtype=np.int64)
    away = np.roll(np.arange(ranks.num), -ranks.root)
    chain = away[::-1] if reduces else away
    rounds = tuple(
        Round(Pattern(chain[s : s + 1], chain[s + 1 : s + 2]), 0 * one, one, reduces)
        for s in range(ranks.num - 1)
    )
    channels = (Channel((rounds,), ranks.pieces),) if rounds else ()
    return Schedule(op, RING, ranks.num, 1, 1.0, channels, ranks.root)


def outline(
    op: Op, nbytes: float, levels: Levels, pieces: int = 1, *, rings: int = 1, both_ways: bool = False
) -> Outline | None:
    """Over members in order, or as `rail_orders` has them where rings > 1."""
    n, flows = num_members(levels), rings * (2 if both_ways else 1)
    parts = spans(levels)
    each = nbytes / (n * flows)
    if any(level.ring for level, _ in parts):
        hops = _neighbour_hops(parts[0][0], flows, both_ways) if len(parts) == 1 else None
    elif len(parts) > 1:
        hops = None if both_ways else _carried_hops(parts, flows)
    else:
        hops = tuple(_hop(level, flows) for level, _ in parts)
    if hops is None:
        return None
    rounds = (n - 1) * (2 if op is Op.ALL_REDUCE else 1)
    stages = (OutlineStage(rounds, each, hops),) if n > 1 else ()
    return Outline(BIDIRECTIONAL if both_ways else RING, (stages,), (0,), pieces)


def chain_outline(op: Op, nbytes: float, levels: Levels, pieces: int = 1) -> Outline | None:
    """Every chip sends by a wire of its own; the root is the first member."""
    n, parts = num_members(levels), spans(levels)
    if len(parts) > 1 and any(level.ring for level, _ in parts):
        return None
    stages = tuple(
        OutlineStage(n // inner - n // (inner * level.fanout), nbytes, (_hop(level, 1),), own_ports=True)
        for level, inner in parts
    )
    return Outline(RING, (stages,), (0,), pieces)


def _rail_schedule(op: Op, ranks: Ranks) -> Schedule:
    per_host, rings = prod(ranks.fanouts[:-1]), _num_rings(ranks.fanouts)
    return schedule(op, ranks, orders=rail_orders(ranks.num, per_host, rings))


def _rail_outline(op: Op, nbytes: float, levels: Levels) -> Outline | None:
    rings = _num_rings([level.fanout for level in levels])
    return outline(op, nbytes, levels, rings=rings) if rings > 1 else None


def _num_rings(fanouts: Sequence[int]) -> int:
    """One ring for each chip of a subgroup, so that each leaves it by another chip."""
    return min(MOST_RINGS, prod(fanouts[:-1]))


def _rounds(op: Op, ring: IntArray, chunks: IntArray) -> tuple[Round, ...]:
    """Rounds of one ring; chunks[i] is the chunk that the rank at place i brings, or ends with.

    Scattering, place i sends chunk i - 1 - s in round s, and holds all of its own in the end; gathering, it
    sends chunk i - s. What is sent is a window that slides over the chunks written twice: no copies.
    """
    n = len(ring)
    pattern = Pattern(ring, np.roll(ring, -1))
    one = np.ones(n, dtype=np.int64)
    twice = np.concatenate([chunks, chunks])
    scatter = tuple(Round(pattern, twice[n - 1 - s : 2 * n - 1 - s], one, True) for s in range(n - 1))
    gather = tuple(Round(pattern, twice[n - s : 2 * n - s], one, False) for s in range(n - 1))
    return halves(op, scatter, gather)


def _carried_hops(spans: tuple[tuple[Level, int], ...], rings: int) -> tuple[Hop, ...] | None:
    """What each position's message to the next one costs: it crosses the levels that a count in digits carries over.

    Of several rings, one position per inner level has its share of the wires only; see the module.
    """
    positions, last = spans[-1][1], len(spans) - 1
    if positions > MAX_POSITIONS:
        return None
    flows = [rings if at == last else 1 for at in range(len(spans))]
    hops, busy = [], set()
    for place in range(1, positions + 1):
        at = max(index for index, (_, inner) in enumerate(spans) if place % inner == 0)
        level = spans[at][0]
        shared = at < last and at not in busy
        hops.append(_hop(level, rings - rings // level.fanout if shared else flows[at]))
        busy.add(at)
    return tuple(hops)


def _neighbour_hops(level: Level, flows: int, both_ways: bool) -> tuple[Hop, ...] | None:
    """Over wires between neighbours: where the last has none to the first, that message goes back all the way."""
    hop = _hop(level, flows)
    if both_ways and level.fanout == 2:
        return None  # both neighbours are the same one: whether by one wire or two, a level does not say
    if level.wraps or level.fanout == 2:
        return (hop,)
    if both_ways or level.fanout > MAX_POSITIONS:
        return None
    back = Hop(level.latency_s + (level.fanout - 2) * level.hop_latency_s, hop.bytes_per_s)
    return (hop,) * (level.fanout - 1) + (back,)


def _hop(level: Level, flows: int) -> Hop:
    return Hop(level.latency_s, level.rate(flows))


ALGORITHMS = (
    Algorithm(
        name=RING,
        rank=0,
        ops=AROUND,
        make=schedule,
        sketch=outline,
        needs=Needs(most_shared=1),
    ),
    Algorithm(
        name=RING,
        rank=0,
        ops=(Op.BROADCAST, Op.REDUCE),
        make=chain_schedule,
        sketch=chain_outline,
        cut=cut_by(pieces_to_fill, chain_outline),
        needs=Needs(most_shared=1),
    ),
    Algorithm(
        name=BIDIRECTIONAL,
        rank=0,
        ops=AROUND,
        make=partial(schedule, both_ways=True),
        sketch=partial(outline, both_ways=True),
        needs=Needs(max_levels=1),
    ),
    # Several rings over hosts are no faster than hierarchical algorithms, so that they are the last to be looked at,
    # and only where a library has them.
    Algorithm(
        name=RAIL_RINGS,
        rank=99,
        ops=AROUND,
        make=_rail_schedule,
        sketch=_rail_outline,
        needs=Needs(Joined.BY_SWITCH, Joined.BY_SWITCH, min_levels=2, most_shared=1),
        rail_aligned=True,
        by_default=False,
    ),
)
