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

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from math import ceil

import numpy as np

from comms.algorithms.rounds import Outlines, Schedules, check_ranks, folds
from comms.collectives.outline import Hop, Outline, Stage
from comms.collectives.schedule import Channel, Op, Order, Pattern, Round, Schedule
from comms.errors import CommsError
from comms.networks.levels import Level, Levels, num_members
from comms.networks.topology import IntArray

FILLING = 1 / 32  # of the time with endless pieces, what filling a chain may cost more
MAX_POSITIONS = 4096  # chips that all differ; a ring with more of them has no outline


def rail_orders(num_ranks: int, per_host: int, num_rings: int) -> tuple[IntArray, ...]:
    """Orders of ranks for several rings over hosts alike: ring c leaves every even host at chip c of it.

    Odd hosts are crossed backwards, so that a message between hosts joins like chips: it keeps to its rail. (Not the
    one from the last host of an odd number of hosts to the first.)
    """
    if per_host < 1 or num_ranks % per_host:
        raise CommsError(f"{num_ranks} ranks on hosts of {per_host}", "ring", "fill every host")
    hosts = np.arange(0, num_ranks, per_host)[:, np.newaxis]
    forth = np.arange(1, per_host + 1)
    chips = np.where(np.arange(len(hosts))[:, np.newaxis] % 2 == 0, forth, forth[::-1])
    return tuple((hosts + (chips + ring) % per_host).ravel() for ring in range(num_rings))


def all_reduce(
    num_ranks: int,
    *,
    orders: Sequence[IntArray] | None = None,
    both_ways: bool = False,
    pieces: int = 1,
    order: Order = Order.SERIAL,
) -> Schedule:
    """Reduce-scatter, then all-gather; one channel per order of ranks, and one back where `both_ways`."""
    return _around(Op.ALL_REDUCE, num_ranks, orders, both_ways, pieces, order)


def all_gather(
    num_ranks: int,
    *,
    orders: Sequence[IntArray] | None = None,
    both_ways: bool = False,
    pieces: int = 1,
    order: Order = Order.SERIAL,
) -> Schedule:
    """Every rank passes on what it got last."""
    return _around(Op.ALL_GATHER, num_ranks, orders, both_ways, pieces, order)


def reduce_scatter(
    num_ranks: int,
    *,
    orders: Sequence[IntArray] | None = None,
    both_ways: bool = False,
    pieces: int = 1,
    order: Order = Order.SERIAL,
) -> Schedule:
    """Every rank adds its part to what it got last and passes it on."""
    return _around(Op.REDUCE_SCATTER, num_ranks, orders, both_ways, pieces, order)


def broadcast(
    num_ranks: int,
    root: int = 0,
    *,
    orders: Sequence[IntArray] | None = None,
    both_ways: bool = False,
    pieces: int = 1,
) -> Schedule:
    """A chain from the root, in pieces that follow each other."""
    check_ranks(num_ranks, root, pieces)
    rings = _rings(num_ranks, orders, both_ways)
    chains = [np.roll(ring, -int(np.flatnonzero(ring == root)[0])) for ring in rings]
    channels = _chains(chains, pieces, reduces=False)
    return Schedule(Op.BROADCAST, _name(both_ways), num_ranks, len(rings), 1.0 / len(rings), channels, root)


def reduce(
    num_ranks: int,
    root: int = 0,
    *,
    orders: Sequence[IntArray] | None = None,
    both_ways: bool = False,
    pieces: int = 1,
) -> Schedule:
    """The chain of a broadcast backwards, in pieces that follow each other."""
    check_ranks(num_ranks, root, pieces)
    rings = _rings(num_ranks, orders, both_ways)
    chains = [np.roll(ring, -int(np.flatnonzero(ring == root)[0]))[::-1] for ring in rings]
    channels = _chains(chains, pieces, reduces=True)
    return Schedule(Op.REDUCE, _name(both_ways), num_ranks, len(rings), 1.0 / len(rings), channels, root)


def around_outline(
    op: Op,
    nbytes: float,
    levels: Levels,
    *,
    rings: int = 1,
    both_ways: bool = False,
    pieces: int = 1,
    order: Order = Order.SERIAL,
) -> Outline | None:
    """All-reduce, all-gather or reduce-scatter over members in order (`rail_orders` where rings > 1)."""
    n, flows = num_members(levels), rings * (2 if both_ways else 1)
    spans = folds(levels)
    each = nbytes / (n * flows)
    if any(level.ring for level, _ in spans):
        hops = _neighbour_hops(spans[0][0], flows, both_ways) if len(spans) == 1 else None
    elif len(spans) > 1:
        hops = None if both_ways else _carried_hops(spans, flows)
    else:
        hops = tuple(_hop(level, flows) for level, _ in spans)
    if hops is None:
        return None
    rounds = (n - 1) * (2 if op is Op.ALL_REDUCE else 1)
    stages = (Stage(rounds, each, hops),) if n > 1 else ()
    return Outline(_name(both_ways), (stages,), (0,), pieces, order)


def chain_outline(
    op: Op, nbytes: float, levels: Levels, *, rings: int = 1, both_ways: bool = False, pieces: int = 1
) -> Outline | None:
    """Broadcast from the first member along all others, or reduce to it; every chip sends by a wire of its own."""
    n, flows = num_members(levels), rings * (2 if both_ways else 1)
    spans = folds(levels)
    assert op in (Op.BROADCAST, Op.REDUCE)
    if len(spans) > 1 and (flows > 1 or any(level.ring for level, _ in spans)):
        return None
    if both_ways and spans and spans[0][0].ring:
        return None
    stages = tuple(
        Stage(n // inner - n // (inner * level.fanout), nbytes / flows, (_hop(level, flows),), own_ports=True)
        for level, inner in spans
    )
    return Outline(_name(both_ways), (stages,), (0,), pieces)


def chain_pieces(nbytes: float, levels: Levels) -> int:
    """The fewest pieces with which filling a chain costs at most FILLING of the time with endless pieces."""
    outline = chain_outline(Op.BROADCAST, nbytes, levels)
    if outline is None or num_members(levels) < 3:
        return 1
    stages = [(stage, stage.hops[0]) for stage in outline.phases[0] if stage.repeat]
    wire_s = [stage.nbytes / hop.bytes_per_s for stage, hop in stages]
    endless_s = sum(stage.repeat * hop.latency_s for stage, hop in stages) + max(wire_s)
    filling_s = sum(stage.repeat * wire for (stage, _), wire in zip(stages, wire_s, strict=True)) - max(
        wire_s
    )
    return max(1, ceil(filling_s / (FILLING * endless_s))) if filling_s > 0 else 1


def _name(both_ways: bool) -> str:
    return "bidirectional ring" if both_ways else "ring"


def _around(
    op: Op, num_ranks: int, orders: Sequence[IntArray] | None, both_ways: bool, pieces: int, order: Order
) -> Schedule:
    check_ranks(num_ranks, pieces=pieces)
    rings = _rings(num_ranks, orders, both_ways)
    num_chunks = num_ranks * len(rings)
    channels = tuple(
        Channel((_rounds(op, ring, ring * len(rings) + index),), pieces, order)
        for index, ring in enumerate(rings)
        if num_ranks > 1
    )
    return Schedule(op, _name(both_ways), num_ranks, num_chunks, 1.0 / num_chunks, channels)


def _rings(num_ranks: int, orders: Sequence[IntArray] | None, both_ways: bool) -> tuple[IntArray, ...]:
    """The orders, each checked to hold every rank once, and followed by its reverse where both ways are used."""
    rings = [np.arange(num_ranks)] if orders is None else [np.asarray(ring, np.int64) for ring in orders]
    for index, ring in enumerate(rings):
        if not np.array_equal(np.sort(ring), np.arange(num_ranks)):
            raise CommsError("does not hold every rank once", f"ring {index}", f"order 0 .. {num_ranks - 1}")
    if not rings:
        raise CommsError("no order of ranks", "ring", "give at least one, or none for 0, 1, 2, ...")
    if both_ways:
        return tuple(each for ring in rings for each in (ring, ring[::-1].copy()))
    return tuple(rings)


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
    if op is Op.ALL_REDUCE:
        return scatter + gather
    return scatter if op is Op.REDUCE_SCATTER else gather


def _chains(chains: Sequence[IntArray], pieces: int, reduces: bool) -> tuple[Channel, ...]:
    """Round s: the rank at place s sends the channel's chunk to the next."""
    one = np.ones(1, dtype=np.int64)
    return tuple(
        Channel(
            (
                tuple(
                    Round(Pattern(chain[s : s + 1], chain[s + 1 : s + 2]), index * one, one, reduces)
                    for s in range(len(chain) - 1)
                ),
            ),
            pieces,
        )
        for index, chain in enumerate(chains)
        if len(chain) > 1
    )


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


SCHEDULES: Schedules = {
    "ring": {
        Op.ALL_REDUCE: all_reduce,
        Op.ALL_GATHER: all_gather,
        Op.REDUCE_SCATTER: reduce_scatter,
        Op.BROADCAST: broadcast,
        Op.REDUCE: reduce,
    },
    "bidirectional ring": {
        Op.ALL_REDUCE: partial(all_reduce, both_ways=True),
        Op.ALL_GATHER: partial(all_gather, both_ways=True),
        Op.REDUCE_SCATTER: partial(reduce_scatter, both_ways=True),
    },
}
OUTLINES: Outlines = {
    "ring": {
        Op.ALL_REDUCE: partial(around_outline, Op.ALL_REDUCE),
        Op.ALL_GATHER: partial(around_outline, Op.ALL_GATHER),
        Op.REDUCE_SCATTER: partial(around_outline, Op.REDUCE_SCATTER),
        Op.BROADCAST: partial(chain_outline, Op.BROADCAST),
        Op.REDUCE: partial(chain_outline, Op.REDUCE),
    },
    "bidirectional ring": {
        Op.ALL_REDUCE: partial(around_outline, Op.ALL_REDUCE, both_ways=True),
        Op.ALL_GATHER: partial(around_outline, Op.ALL_GATHER, both_ways=True),
        Op.REDUCE_SCATTER: partial(around_outline, Op.REDUCE_SCATTER, both_ways=True),
    },
}
PIECES: Mapping[str, Mapping[Op, Callable[[float, Levels], int]]] = {
    "ring": {Op.BROADCAST: chain_pieces, Op.REDUCE: chain_pieces}
}
