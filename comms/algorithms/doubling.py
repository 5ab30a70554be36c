"""Doubling: ranks exchange with partners at distances 1, 2, 4, ...; few rounds, so it suits small messages.

Recursive halving-doubling all-reduce, its two halves, and the all-reduce that exchanges all of the buffer in
each round (Thakur, Rabenseifner and Gropp, International Journal of High Performance Computing Applications 19,
2005). `near_large` has the rounds with large messages between near ranks, which spares the tiers far out: a
scatter starts with neighbours then, and a gather ends with them.

Where the ranks are not a power of two, each surplus rank gives its part to a neighbour beforehand and is given
the result afterwards. Not all ranks do the same then, so there is no outline for such numbers.
"""

from functools import partial

import numpy as np

from comms.algorithms.rounds import (
    Outlines,
    Schedules,
    check_ranks,
    folds,
    reversed_rounds,
    round_of,
    schedule_of,
)
from comms.collectives.outline import Hop, Outline, Stage
from comms.collectives.schedule import Op, Pattern, Round, Schedule
from comms.networks.levels import Level, Levels, num_members
from comms.networks.topology import IntArray


def all_reduce(num_ranks: int, *, near_large: bool = True) -> Schedule:
    """Recursive halving, then recursive doubling: 2 log2 n rounds, every byte twice."""
    check_ranks(num_ranks)
    ranks, surplus = _core(num_ranks)
    num = len(ranks)
    halving = _halving(ranks, _bits(num, near_large), np.arange(num + 1))
    rounds = _folded((*halving, *_doubled(halving, num)), surplus, num, gives=True, gets=True)
    return schedule_of(Op.ALL_REDUCE, "halving-doubling", num_ranks, num, rounds)


def reduce_scatter(num_ranks: int, *, near_large: bool = True) -> Schedule:
    """Recursive halving: log2 n rounds, every byte once."""
    check_ranks(num_ranks)
    ranks, surplus = _core(num_ranks)
    halving = _scatter(ranks, surplus, num_ranks, near_large)
    rounds = list(_folded(halving, surplus, num_ranks, gives=True, gets=False))
    if len(surplus):
        one = np.ones(len(surplus), dtype=np.int64)
        rounds.append(Round(Pattern(surplus - 1, surplus), surplus, one, reduces=False))
    return schedule_of(Op.REDUCE_SCATTER, "halving-doubling", num_ranks, num_ranks, rounds)


def all_gather(num_ranks: int, *, near_large: bool = True) -> Schedule:
    """Recursive doubling: the reduce-scatter backwards."""
    scatter = reduce_scatter(num_ranks, near_large=near_large)
    rounds = [each for channel in scatter.channels for each in channel.rounds]
    return schedule_of(
        Op.ALL_GATHER, "halving-doubling", num_ranks, num_ranks, reversed_rounds(rounds, reduces=False)
    )


def whole_all_reduce(num_ranks: int) -> Schedule:
    """Exchange all of the buffer in each of log2 n rounds: the fewest rounds, the most bytes."""
    check_ranks(num_ranks)
    ranks, surplus = _core(num_ranks)
    one = np.ones(len(ranks), dtype=np.int64)
    ids = np.arange(len(ranks))
    rounds = tuple(
        Round(Pattern(ranks, ranks[ids ^ (1 << bit)]), 0 * one, one, reduces=True)
        for bit in _bits(len(ranks), near_large=True)
    )
    rounds = _folded(rounds, surplus, 1, gives=True, gets=True)
    return schedule_of(Op.ALL_REDUCE, "recursive doubling", num_ranks, 1, rounds)


def halving_outline(op: Op, nbytes: float, levels: Levels, *, near_large: bool = True) -> Outline | None:
    """All-reduce, reduce-scatter or all-gather over members whose bunches are all powers of two."""
    hops = _hops(levels)
    if hops is None:
        return None
    if not near_large:
        hops = hops[::-1]
    scatter = tuple(Stage(1, nbytes / 2 ** (step + 1), (hop,)) for step, hop in enumerate(hops))
    gather = scatter[::-1]
    stages = {Op.REDUCE_SCATTER: scatter, Op.ALL_GATHER: gather, Op.ALL_REDUCE: scatter + gather}[op]
    return Outline("halving-doubling", (stages,), (0,))


def whole_outline(nbytes: float, levels: Levels) -> Outline | None:
    """The all-reduce that exchanges all of the buffer in each round."""
    hops = _hops(levels)
    if hops is None:
        return None
    return Outline("recursive doubling", (tuple(Stage(1, nbytes, (hop,)) for hop in hops),), (0,))


def _core(num_ranks: int) -> tuple[IntArray, IntArray]:
    """The ranks that exchange, 2^k of them, and the surplus: each of those follows its neighbour in the core."""
    num = 1 << (num_ranks.bit_length() - 1)
    surplus = 2 * np.arange(num_ranks - num) + 1
    ids = np.arange(num)
    return ids + np.minimum(ids, len(surplus)), surplus


def _bits(num: int, near_large: bool) -> tuple[int, ...]:
    """Which bit of its number each rank and its partner differ in, in the order of halving."""
    bits = range(num.bit_length() - 1)
    return tuple(bits) if near_large else tuple(reversed(bits))


def _halving(ranks: IntArray, bits: tuple[int, ...], bounds: IntArray) -> tuple[Round, ...]:
    """Each rank sends the half of its range that it does not keep; range [a, b) is chunks bounds[a] .. bounds[b]."""
    num = len(ranks)
    ids, low = np.arange(num), np.zeros(num, dtype=np.int64)
    rounds, length = [], num
    for bit in bits:
        length //= 2
        upper = ids >> bit & 1
        given = low + (1 - upper) * length
        low = low + upper * length
        pattern = Pattern(ranks, ranks[ids ^ (1 << bit)])
        rounds.append(Round(pattern, bounds[given], bounds[given + length] - bounds[given], reduces=True))
    return tuple(rounds)


def _doubled(halving: tuple[Round, ...], num: int) -> tuple[Round, ...]:
    """Halving backwards, by the same patterns: what a rank was sent it sends back."""
    ids, rounds = np.arange(num), []
    for each in reversed(halving):
        place = np.zeros(int(each.pattern.src.max()) + 1, dtype=np.int64)
        place[each.pattern.src] = ids
        partner = place[each.pattern.dst]
        rounds.append(Round(each.pattern, each.first[partner], each.count[partner], reduces=False))
    return tuple(rounds)


def _scatter(ranks: IntArray, surplus: IntArray, num_ranks: int, near_large: bool) -> tuple[Round, ...]:
    """Halving after which each rank of the core holds its own chunk, and that of the surplus rank that follows."""
    num = len(ranks)
    bounds = np.append(ranks, num_ranks)
    bits = _bits(num, near_large)
    if not near_large:
        return _halving(ranks, bits, bounds)
    owner = np.arange(num_ranks) - np.searchsorted(surplus, np.arange(num_ranks), side="right")
    ids, rounds = np.arange(num)[:, np.newaxis], []
    for bit in bits:
        known = (owner ^ ids) & ((1 << bit) - 1) == 0
        given = known & ((owner ^ ids) >> bit & 1 == 1)
        sender, chunk = np.nonzero(given)
        rounds.append(round_of(ranks[sender], ranks[sender ^ (1 << bit)], chunk, reduces=True))
    return tuple(rounds)


def _folded(
    rounds: tuple[Round, ...], surplus: IntArray, num_chunks: int, *, gives: bool, gets: bool
) -> tuple[Round, ...]:
    """Surplus ranks give all they have beforehand, and get all afterwards."""
    if not len(surplus):
        return rounds
    none, every = np.zeros_like(surplus), np.full_like(surplus, num_chunks)
    before = (Round(Pattern(surplus, surplus - 1), none, every, reduces=True),) if gives else ()
    after = (Round(Pattern(surplus - 1, surplus), none, every, reduces=False),) if gets else ()
    return (*before, *rounds, *after)


def _hops(levels: Levels) -> tuple[Hop, ...] | None:
    """The exchange at distance 1, 2, 4, ...; None where some number of bunches is no power of two."""
    if num_members(levels) & (num_members(levels) - 1):
        return None
    return tuple(
        _exchange(level, inner, 1 << bit)
        for level, inner in folds(levels)
        for bit in range(level.fanout.bit_length() - 1)
    )


def _exchange(level: Level, inner: int, distance: int) -> Hop:
    """All members of two bunches `distance` apart exchange.

    In a row of bunches as many exchanges as the distance cross the wire in the middle between them. Halfway round a
    ring both ways are as short, and messages take them in turn by position, which halves that.
    """
    rate = level.rate(inner)
    if not level.ring:
        return Hop(level.latency_s, rate)
    halfway = level.wraps and 2 * distance == level.fanout > 2
    messages = distance / 2 if halfway else distance
    return Hop(level.latency_s + (distance - 1) * level.hop_latency_s, rate / messages)


SCHEDULES: Schedules = {
    "halving-doubling": {
        Op.ALL_REDUCE: all_reduce,
        Op.REDUCE_SCATTER: reduce_scatter,
        Op.ALL_GATHER: all_gather,
    },
    "recursive doubling": {Op.ALL_REDUCE: whole_all_reduce},
}
OUTLINES: Outlines = {
    "halving-doubling": {
        op: partial(halving_outline, op) for op in (Op.ALL_REDUCE, Op.REDUCE_SCATTER, Op.ALL_GATHER)
    },
    "recursive doubling": {Op.ALL_REDUCE: whole_outline},
}
