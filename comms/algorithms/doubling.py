"""Doubling: in every round ranks reach twice as far; few rounds, so it suits small messages.

Halving-doubling exchanges with partners at distances 1, 2, 4, ...: the all-reduce and its two halves, and the
all-reduce that exchanges all of the buffer in each round (Thakur, Rabenseifner and Gropp, International Journal of
High Performance Computing Applications 19, 2005). The rounds with large messages are between near ranks, which spares
the tiers far out: a scatter starts with neighbours, and a gather ends with them. Where the ranks are not a power of
two, each surplus rank gives its part to a neighbour beforehand and is given the result afterwards. Not all ranks do
the same then, so there is no outline for such numbers.

Bruck's algorithms go on by 1, 2, 4, ... around, for any number of ranks: all-gather and all-to-all in ceil(log2 n)
rounds (Bruck, Ho, Kipnis, Upfal and Weathersby, IEEE Transactions on Parallel and Distributed Systems 8, 1997).
Backwards, the all-gather is a reduce-scatter, and both are an all-reduce of 2 ceil(log2 n) rounds that moves every
byte twice, powers of two or not (Traff, 2024, "Optimal, Non-pipelined Reduce-scatter and Allreduce Algorithms"). With
nothing to send, it is the dissemination barrier (Hensgen, Finkel and Manber, International Journal of Parallel
Programming 17, 1988). With `fanouts` they go digit by digit, the outermost first where they gather, so that all ranks
cross the same tier of a network in every round and what crosses the outer ones is least. The all-to-all moves what
has furthest to go first, which keeps what goes together in one piece.
"""

import numpy as np

from comms.algorithms.catalog import Algorithm, Joined, Needs, spans
from comms.algorithms.rounds import Ranks, halves, moved, reversed_rounds, round_of, schedule_of
from comms.collectives.outline import Hop, Outline, OutlineStage
from comms.collectives.schedule import Op, Pattern, Round, Schedule
from comms.networks.groups import Level, Levels, inner_sizes, num_members
from comms.networks.topology import IntArray

HALVING, WHOLE, BRUCK, BARRIER = "halving-doubling", "recursive doubling", "bruck", "dissemination"
HALVES = (Op.ALL_REDUCE, Op.REDUCE_SCATTER, Op.ALL_GATHER)


def halving_schedule(op: Op, ranks: Ranks) -> Schedule:
    """Recursive halving, every byte once, and backwards recursive doubling: log2 n rounds each."""
    n = ranks.num
    core, surplus = _core(n)
    if op is Op.ALL_REDUCE:
        # Who ends with what does not matter in between, so that all that a rank gives is one range of chunks.
        num = len(core)
        halving = _halving(core, np.arange(num + 1))
        rounds = _folded((*halving, *_doubled(halving, num)), surplus, num, gets_all=True)
        return schedule_of(op, HALVING, ranks, num, rounds)
    rounds = _folded(_scatter(core, surplus, n), surplus, n, gets_all=False)
    if op is Op.ALL_GATHER:
        rounds = reversed_rounds(rounds, reduces=False)
    return schedule_of(op, HALVING, ranks, n, rounds)


def whole_schedule(op: Op, ranks: Ranks) -> Schedule:
    """Exchange all of the buffer in each of log2 n rounds: the fewest rounds, the most bytes."""
    core, surplus = _core(ranks.num)
    ids, one = np.arange(len(core)), np.ones(len(core), dtype=np.int64)
    rounds = tuple(
        Round(Pattern(core, core[ids ^ (1 << bit)]), 0 * one, one, reduces=True) for bit in _bits(len(core))
    )
    return schedule_of(op, WHOLE, ranks, 1, _folded(rounds, surplus, 1, gets_all=True))


def bruck_schedule(op: Op, ranks: Ranks) -> Schedule:
    """In each round of a gather a rank gets as much again as it has; scattering is that backwards."""
    if op is Op.ALL_TO_ALL:
        return _bruck_all_to_all(ranks)
    gather = _gather(ranks)
    rounds = reversed_rounds(gather, reduces=True) if op in (Op.ALL_REDUCE, Op.REDUCE_SCATTER) else ()
    rounds += gather if op is not Op.REDUCE_SCATTER else ()
    if op is Op.BARRIER:  # after the last round everyone has heard of everyone
        return schedule_of(op, BARRIER, ranks, ranks.num, rounds, shares=0.0)
    return schedule_of(op, BRUCK, ranks, ranks.num, rounds)


def halving_outline(op: Op, nbytes: float, levels: Levels) -> Outline | None:
    """Over members whose subgroups are all powers of two."""
    hops = _hops(levels)
    if hops is None:
        return None
    scatter = tuple(OutlineStage(1, nbytes / 2 ** (step + 1), (hop,)) for step, hop in enumerate(hops))
    return Outline(HALVING, (halves(op, scatter, scatter[::-1]),), (0,))


def whole_outline(op: Op, nbytes: float, levels: Levels) -> Outline | None:
    """The same."""
    hops = _hops(levels)
    if hops is None:
        return None
    return Outline(WHOLE, (tuple(OutlineStage(1, nbytes, (hop,)) for hop in hops),), (0,))


def bruck_outline(op: Op, nbytes: float, levels: Levels) -> Outline:
    """With the digits that the levels say."""
    held = 0.0 if op is Op.BARRIER else nbytes / num_members(levels)
    gather: list[OutlineStage] = []
    for level, inner in reversed(spans(levels)):
        hop = Hop(level.latency_s, level.rate(inner))
        if op is Op.ALL_TO_ALL:  # in the round of 2^j everyone sends what has 2^j in its distance
            for step in reversed(_steps(level.fanout)):
                whole, rest = divmod(level.fanout, 2 * step)  # of 2^(j + 1) distances in a row half have it
                moving = whole * step + max(0, rest - step)
                gather.append(OutlineStage(1, nbytes * moving / level.fanout, (hop,)))
            continue
        # Everyone has as much as it has heard of; in the last round only what is left.
        windows = [min(step, level.fanout - step) for step in _steps(level.fanout)]
        gather.extend(OutlineStage(1, held * window, (hop,)) for window in windows)
        held *= level.fanout
    stages = halves(op, tuple(gather[::-1]), tuple(gather)) if op in HALVES else tuple(gather)
    return Outline(BARRIER if op is Op.BARRIER else BRUCK, (stages,), (0,))


def _core(num_ranks: int) -> tuple[IntArray, IntArray]:
    """The ranks that exchange, 2^k of them, and the surplus: each of those follows its neighbour in the core."""
    num = 1 << (num_ranks.bit_length() - 1)
    # Ranks 1, 3, 5, ... as far as there are too many: each next to the one that stands for it, on the same host if any.
    surplus = 2 * np.arange(num_ranks - num) + 1
    ids = np.arange(num)
    return ids + np.minimum(ids, len(surplus)), surplus


def _bits(num: int) -> range:
    """Which bit of its number each rank and its partner differ in, in the order of halving: near ones first."""
    return range(num.bit_length() - 1)


def _halving(ranks: IntArray, bounds: IntArray) -> tuple[Round, ...]:
    """Each rank sends the half of its range that it does not keep; range [a, b) is chunks bounds[a] .. bounds[b]."""
    num = len(ranks)
    ids, low = np.arange(num), np.zeros(num, dtype=np.int64)
    rounds, length = [], num
    for bit in _bits(num):
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


def _scatter(ranks: IntArray, surplus: IntArray, num_ranks: int) -> tuple[Round, ...]:
    """Halving after which each rank of the core holds its own chunk, and that of the surplus rank that follows."""
    owner = np.arange(num_ranks) - np.searchsorted(surplus, np.arange(num_ranks), side="right")
    ids, rounds = np.arange(len(ranks))[:, np.newaxis], []
    for bit in _bits(len(ranks)):
        # A rank still works on what belongs to ranks like it in all bits so far; what differs in this one it gives.
        known = (owner ^ ids) & ((1 << bit) - 1) == 0
        given = known & ((owner ^ ids) >> bit & 1 == 1)
        sender, chunk = np.nonzero(given)
        rounds.append(round_of(ranks[sender], ranks[sender ^ (1 << bit)], chunk, reduces=True))
    return tuple(rounds)


def _folded(
    rounds: tuple[Round, ...], surplus: IntArray, num_chunks: int, *, gets_all: bool
) -> tuple[Round, ...]:
    """Surplus ranks give all they have beforehand, and get all or their own chunk afterwards."""
    if not len(surplus):
        return rounds
    none, every = np.zeros_like(surplus), np.full_like(surplus, num_chunks)
    before = Round(Pattern(surplus, surplus - 1), none, every, reduces=True)
    gets = (none, every) if gets_all else (surplus, np.ones_like(surplus))
    after = Round(Pattern(surplus - 1, surplus), *gets, reduces=False)
    return (before, *rounds, after)


def _hops(levels: Levels) -> tuple[Hop, ...] | None:
    """The exchange at distance 1, 2, 4, ...; None where some number of subgroups is no power of two."""
    if num_members(levels) & (num_members(levels) - 1):
        return None
    return tuple(
        _exchange(level, inner, 1 << bit)
        for level, inner in spans(levels)
        for bit in range(level.fanout.bit_length() - 1)
    )


def _exchange(level: Level, inner: int, distance: int) -> Hop:
    """All members of two subgroups `distance` apart exchange.

    In a row of subgroups as many exchanges as the distance cross the wire in the middle between them. Halfway round a
    ring both ways are as short, and messages take them in turn by position, which halves that.
    """
    rate = level.rate(inner)
    if not level.ring:
        return Hop(level.latency_s, rate)
    halfway = level.wraps and 2 * distance == level.fanout > 2
    messages = distance / 2 if halfway else distance
    return Hop(level.latency_s + (distance - 1) * level.hop_latency_s, rate / messages)


def _bruck_all_to_all(ranks: Ranks) -> Schedule:
    """What has 2^j in the distance it still has to go moves on by 2^j."""
    n = ranks.num
    chunk = np.arange(n**2)
    here, target, rounds = chunk // n, chunk % n, []
    for fanout, inner in reversed(list(zip(ranks.digits, inner_sizes(ranks.digits), strict=True))):
        distance = (target // inner - here // inner) % fanout
        for step in reversed(_steps(fanout)):
            moves = np.flatnonzero(distance & step)
            there = moved(here[moves], inner, fanout, step)
            rounds.append(round_of(here[moves], there, chunk[moves], reduces=False))
            here[moves] = there
    return schedule_of(Op.ALL_TO_ALL, BRUCK, ranks, n**2, rounds, shares=1.0 / n)


def _steps(fanout: int) -> tuple[int, ...]:
    return tuple(1 << bit for bit in range((fanout - 1).bit_length()))


def _gather(ranks: Ranks) -> tuple[Round, ...]:
    """Everyone sends what it has of the current digit to the rank `step` before it."""
    if len(ranks.digits) == 1:
        return _around(ranks.num)
    every, rounds = np.arange(ranks.num), []
    for fanout, inner in reversed(list(zip(ranks.digits, inner_sizes(ranks.digits), strict=True))):
        size = inner * fanout  # subgroups of this size are done with; everyone has the same of each of them
        for step in _steps(fanout):
            window = np.arange(min(step, fanout - step))
            own = every[:, np.newaxis, np.newaxis]
            subgroups = np.arange(0, ranks.num, size)[np.newaxis, :, np.newaxis]
            chunk = subgroups + moved(own, inner, fanout, window) % size
            src = np.broadcast_to(own, chunk.shape).ravel()
            rounds.append(round_of(src, moved(src, inner, fanout, -step), chunk.ravel(), reduces=False))
    return tuple(rounds)


def _around(num_ranks: int) -> tuple[Round, ...]:
    """One digit: all that a rank has is its own chunk and those that follow, in one message."""
    ranks = np.arange(num_ranks)
    return tuple(
        Round(
            Pattern(ranks, (ranks - step) % num_ranks),
            ranks,
            np.full(num_ranks, min(step, num_ranks - step)),
            reduces=False,
        )
        for step in _steps(num_ranks)
    )


# Bruck's messages pass over the chips between.
_SWITCHED = Needs(Joined.BY_SWITCH, Joined.BY_SWITCH)
ALGORITHMS = (
    Algorithm(
        name=HALVING,
        rank=1,
        ops=HALVES,
        make=halving_schedule,
        sketch=halving_outline,
        rail_aligned=True,
        in_ranges=False,
    ),
    Algorithm(
        name=WHOLE,
        rank=1,
        ops=(Op.ALL_REDUCE,),
        make=whole_schedule,
        sketch=whole_outline,
        rail_aligned=True,
    ),
    Algorithm(
        name=BRUCK,
        rank=3,
        ops=(Op.ALL_GATHER, Op.REDUCE_SCATTER, Op.ALL_REDUCE, Op.ALL_TO_ALL),
        make=bruck_schedule,
        sketch=bruck_outline,
        needs=_SWITCHED,
        rail_aligned=True,
    ),
    Algorithm(
        name=BARRIER,
        rank=3,
        ops=(Op.BARRIER,),
        make=bruck_schedule,
        sketch=bruck_outline,
        needs=_SWITCHED,
        rail_aligned=True,
    ),
)
