"""Trees: few rounds, so the choice for small buffers; pipelined in two trees at once, for large ones too.

Binomial trees halve what is still without data in every round (Thakur, Rabenseifner and Gropp, Int. J. High Perf.
Comp. Appl. 19, 2005): broadcast and reduce move the whole buffer, scatter and gather what belongs to a subtree.
With `fanouts` they go over the digits of a rank from the outside in, so that a bunch is entered once. A large
buffer is broadcast by a scatter and an all-gather around the ring (van de Geijn, 1994).

The double binary tree reduces one half of the buffer up one tree and broadcasts it down again, the other half by a
second tree in which the inner ranks of the first are leaves, so that everyone sends and receives the buffer twice
(Sanders, Speck and Traeff, Parallel Computing 35, 2009; NCCL 2.4). Each half goes in pieces, one a round. The way
down begins when the last piece has reached the root: both ways keep all wires busy, so that overlapping them gains
nothing but the filling of one pipeline.

Outlines of binomial trees follow the longest path and are exact for any number of ranks; where chips share a
tapered trunk they are an upper bound, as most are silent in most rounds. That of the double tree has siblings send
to their parent, and a parent to its two children, at once at half the rate. So it is exact for 2**k and 2**k - 1
ranks, and an upper bound for others, by less than the time of two pieces (15 % for one piece, under 1 % for 32).
Where a parent serves one child after the other by one port, what comes down one tree meets what comes down the
other, and the outline is too low, by up to a quarter; with a wire per child, as on a board, it is exact again.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from math import ceil

import numpy as np

from comms.algorithms.ring import all_gather
from comms.algorithms.rounds import (
    Outlines,
    Schedules,
    check_ranks,
    checked_fanouts,
    folds,
    inner_sizes,
    moved,
    reversed_rounds,
    round_of,
    schedule_of,
)
from comms.collectives.outline import Hop, Outline, Stage
from comms.collectives.schedule import Channel, Op, Pattern, Round, Schedule
from comms.networks.levels import Level, Levels, num_members
from comms.networks.topology import IntArray

BINOMIAL, SCATTER_GATHER, DOUBLE = "binomial tree", "scatter and all-gather", "double tree"
INWARD = frozenset({Op.REDUCE, Op.GATHER})
IN_PARTS = frozenset({Op.SCATTER, Op.GATHER})
FILLING = 1 / 32  # of the time with endless pieces, what filling pipelines may cost more


def broadcast(num_ranks: int, root: int = 0, *, fanouts: Sequence[int] | None = None) -> Schedule:
    """Whoever has the buffer sends it to half of those that it stands for."""
    return schedule_of(
        Op.BROADCAST, BINOMIAL, num_ranks, 1, _copies(num_ranks, root, fanouts), shares=1.0, root=root
    )


def reduce(num_ranks: int, root: int = 0, *, fanouts: Sequence[int] | None = None) -> Schedule:
    """The broadcast backwards, each rank adding what it gets."""
    rounds = reversed_rounds(_copies(num_ranks, root, fanouts), reduces=True)
    return schedule_of(Op.REDUCE, BINOMIAL, num_ranks, 1, rounds, shares=1.0, root=root)


def scatter(num_ranks: int, root: int = 0, *, fanouts: Sequence[int] | None = None) -> Schedule:
    """As the broadcast, but of what belongs to the ranks beyond."""
    rounds = _parts(num_ranks, root, fanouts)
    return schedule_of(Op.SCATTER, BINOMIAL, num_ranks, num_ranks, rounds, root=root)


def gather(num_ranks: int, root: int = 0, *, fanouts: Sequence[int] | None = None) -> Schedule:
    """The scatter backwards."""
    rounds = reversed_rounds(_parts(num_ranks, root, fanouts), reduces=False)
    return schedule_of(Op.GATHER, BINOMIAL, num_ranks, num_ranks, rounds, root=root)


def scatter_gather_broadcast(num_ranks: int, root: int = 0) -> Schedule:
    """A binomial scatter, then an all-gather around the ring."""
    rounds = _parts(num_ranks, root, None)
    ring = tuple(each for channel in all_gather(num_ranks).channels for each in channel.rounds)
    channels = (Channel((rounds, ring)),) if rounds else ()
    return Schedule(Op.BROADCAST, SCATTER_GATHER, num_ranks, num_ranks, 1.0 / num_ranks, channels, root)


def double_tree_all_reduce(num_ranks: int, *, pieces: int = 1) -> Schedule:
    """Half of the buffer up and down either tree, cut into `pieces` that are chunks of their own."""
    check_ranks(num_ranks, pieces=pieces)
    channels = tuple(
        up_and_down(parents, np.arange(pieces) + tree * pieces)
        for tree, parents in enumerate(double_trees(num_ranks))
        if num_ranks > 1
    )
    return Schedule(Op.ALL_REDUCE, DOUBLE, num_ranks, 2 * pieces, 0.5 / pieces, channels)


def double_trees(num_ranks: int) -> tuple[IntArray, IntArray]:
    """Parents of all ranks in two binary trees, -1 for the root; no rank has children in both.

    In order of number, 1 to n, odd numbers are leaves: the second tree is the first one mirrored, or for an odd n
    turned by one.
    """
    number = np.arange(1, num_ranks + 1)
    low = number & -number
    up = (number - low) | (2 * low)
    parent = np.where(up <= num_ranks, up, number - low)
    other = num_ranks + 1 - number if num_ranks % 2 == 0 else number % num_ranks + 1
    second = np.empty_like(parent)
    second[other - 1] = np.where(parent > 0, other[parent - 1], 0)
    return parent - 1, second - 1


def double_tree_pieces(nbytes: float, levels: Levels) -> int:
    """The fewest pieces with which filling the pipelines costs at most FILLING of the time with endless pieces."""
    spans = folds(levels)
    if not spans or num_members(levels) < 4:
        return 1
    level, n = spans[0][0], num_members(levels)
    depth = n.bit_length() - 1
    half_s = nbytes / 2 / level.rate(2)
    endless = depth * level.latency_s + half_s
    return max(1, ceil((depth - 1) * half_s / (FILLING * endless))) if endless > 0 else 1


def rooted_outline(op: Op, nbytes: float, levels: Levels) -> Outline | None:
    """Broadcast, reduce, scatter or gather by a binomial tree over the digits; None on rings."""
    spans = folds(levels)
    if any(level.ring for level, _ in spans):
        return None
    per_bunch = [nbytes / num_members(levels) * inner if op in IN_PARTS else nbytes for _, inner in spans]
    stages = tuple(
        _longest_way(op, each, level, inner) for each, (level, inner) in zip(per_bunch, spans, strict=True)
    )
    return Outline(BINOMIAL, (stages if op in INWARD else stages[::-1],), (0,))


def scatter_gather_outline(nbytes: float, levels: Levels) -> Outline | None:
    """The rank that gets its part last has it go all around the ring; None on rings and over several levels."""
    spans = folds(levels)
    if len(spans) > 1 or any(level.ring for level, _ in spans):
        return None
    stages: tuple[Stage, ...] = ()
    for level, inner in spans:
        part = nbytes / level.fanout
        around = Stage(level.fanout - 1, part, (Hop(level.latency_s, level.rate()),))
        stages = (_longest_way(Op.SCATTER, part, level, inner), around)
    return Outline(SCATTER_GATHER, (stages,), (0,))


def double_tree_outline(nbytes: float, levels: Levels, *, pieces: int = 1) -> Outline | None:
    """All pieces leave the deepest leaf, the last one goes up to the root, and the same down again.

    The root of 2**k ranks has one child, with which it shares no wire. None on rings and over several levels.
    """
    spans = folds(levels)
    if len(spans) > 1 or any(level.ring for level, _ in spans):
        return None
    way: tuple[Stage, ...] = ()
    for level, _ in spans:
        n = level.fanout
        piece, alone = nbytes / 2 / pieces, n & (n - 1) == 0
        rate = level.rate(1 if n == 2 else 2)
        way = (
            Stage(pieces - 1, piece, (Hop(0.0, rate),), own_ports=True),
            Stage(n.bit_length() - 1 - alone, piece, (Hop(level.latency_s, rate),), own_ports=True),
            Stage(int(alone), piece, (Hop(level.latency_s, level.rate()),), own_ports=True),
        )
    return Outline(DOUBLE, (way, way[::-1]), (0, 0))


@dataclass(frozen=True, slots=True, eq=False)
class _Step:
    """One round of a binomial tree: ranks `src` each send to the one whose digit is `by` further on."""

    src: IntArray
    inner: int
    fanout: int
    by: int
    beyond: IntArray  # how many places the receiver stands for, itself included

    @property
    def dst(self) -> IntArray:
        return moved(self.src, self.inner, self.fanout, self.by)


def _steps(num_ranks: int, root: int, fanouts: Sequence[int] | None) -> Iterator[_Step]:
    """Digit by digit from the outermost; places count from the root's digit, far ones come first."""
    check_ranks(num_ranks, root)
    parts = checked_fanouts(num_ranks, fanouts)
    for fanout, inner in reversed(list(zip(parts, inner_sizes(parts), strict=True))):
        holders = np.arange(root % inner, num_ranks, inner)
        place = (holders // inner - root // inner) % fanout
        for by in (1 << bit for bit in reversed(range((fanout - 1).bit_length()))):
            sends = (place % (2 * by) == 0) & (place + by < fanout)
            yield _Step(holders[sends], inner, fanout, by, np.minimum(by, fanout - place[sends] - by))


def _copies(num_ranks: int, root: int, fanouts: Sequence[int] | None) -> tuple[Round, ...]:
    rounds = []
    for step in _steps(num_ranks, root, fanouts):
        zero = np.zeros_like(step.src)
        rounds.append(Round(Pattern(step.src, step.dst), zero, zero + 1, reduces=False))
    return tuple(rounds)


def _parts(num_ranks: int, root: int, fanouts: Sequence[int] | None) -> tuple[Round, ...]:
    rounds = []
    for step in _steps(num_ranks, root, fanouts):
        offset = np.arange(step.by)
        row, further = np.nonzero(offset < step.beyond[:, np.newaxis])
        src, dst = step.src[row], step.dst[row]
        bunch = moved(src, step.inner, step.fanout, step.by + further) // step.inner * step.inner
        chunk = (bunch[:, np.newaxis] + np.arange(step.inner)).ravel()
        rounds.append(round_of(np.repeat(src, step.inner), np.repeat(dst, step.inner), chunk, reduces=False))
    return tuple(rounds)


def _longest_way(op: Op, nbytes: float, level: Level, inner: int) -> Stage:
    """The messages of one level up to the one that arrives last, as rounds alike.

    From the root: a rank sends to its subtrees one after another. Towards it: what comes in at once shares the
    wire, which is busy from the time something comes until all has that came later. Ranks that have a wire to
    every other one (inside a board) do neither.
    """
    rate, latency = level.rate(), level.latency_s
    own_wires = inner == 1 and level.rate(level.fanout - 1) >= level.bytes_per_s
    unit = nbytes / rate

    def moving(size: int) -> float:
        return unit * size if op in IN_PARTS else unit

    @cache
    def last(size: int) -> tuple[int, float]:
        """(messages, seconds without latency) of the longest way through the tree of a subtree's ranks."""
        if size == 1:
            return 0, 0.0
        top = 1 << ((size - 1).bit_length() - 1)
        children = [size - top, *(1 << bit for bit in reversed(range(top.bit_length() - 1)))]
        ways = [last(child) for child in children]
        ends = [count * latency + seconds for count, seconds in ways]
        found = []
        for index, (child, (count, seconds)) in enumerate(zip(children, ways, strict=True)):
            before = [
                other
                for each, other in enumerate(children)
                if (ends[each] >= ends[index] if op in INWARD else each <= index)
            ]
            waits = moving(child) if own_wires else sum(map(moving, before))
            found.append((count + 1, seconds + waits))
        return max(found, key=lambda way: way[0] * latency + way[1])

    count, seconds = last(level.fanout)
    return Stage(count, seconds * rate / count, (Hop(latency, rate),), own_ports=True)


def up_and_down(parents: IntArray, chunks: IntArray) -> Channel:
    """One tree up, then down: in each round every rank that has the next chunk by then sends it on."""
    pieces, depth = len(chunks), _depths(parents)
    deepest = int(depth.max())
    ranks = np.flatnonzero(parents >= 0)
    one = np.ones(len(ranks), dtype=np.int64)
    patterns: dict[tuple[bool, int, int], Pattern] = {}
    ways: list[tuple[Round, ...]] = []
    for upwards, turn in ((True, deepest - depth[ranks]), (False, depth[ranks] - 1)):
        rounds = []
        for each in range(pieces + deepest - 1):
            low, high = max(0, each - pieces + 1), min(each, deepest - 1)
            taken = (turn >= low) & (turn <= high)
            if (upwards, low, high) not in patterns:
                here, there = ranks[taken], parents[ranks[taken]]
                patterns[upwards, low, high] = Pattern(here, there) if upwards else Pattern(there, here)
            pattern = patterns[upwards, low, high]
            rounds.append(Round(pattern, chunks[each - turn[taken]], one[: len(pattern.src)], upwards))
        ways.append(tuple(rounds))
    return Channel(tuple(ways), at_once=True)


def _depths(parents: IntArray) -> IntArray:
    depth, at = np.zeros_like(parents), parents
    while (at >= 0).any():
        depth += at >= 0
        at = np.where(at >= 0, parents[at], -1)
    return depth


SCHEDULES: Schedules = {
    BINOMIAL: {Op.BROADCAST: broadcast, Op.REDUCE: reduce, Op.SCATTER: scatter, Op.GATHER: gather},
    SCATTER_GATHER: {Op.BROADCAST: scatter_gather_broadcast},
    DOUBLE: {Op.ALL_REDUCE: double_tree_all_reduce},
}
OUTLINES: Outlines = {
    BINOMIAL: {op: partial(rooted_outline, op) for op in (Op.BROADCAST, Op.REDUCE, Op.SCATTER, Op.GATHER)},
    SCATTER_GATHER: {Op.BROADCAST: scatter_gather_outline},
    DOUBLE: {Op.ALL_REDUCE: double_tree_outline},
}
PIECES: Mapping[str, Mapping[Op, Callable[[float, Levels], int]]] = {
    DOUBLE: {Op.ALL_REDUCE: double_tree_pieces}
}
