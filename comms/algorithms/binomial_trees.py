"""Binomial trees: whoever has the buffer sends it on; few rounds, so the choice for small buffers.

They halve what is still without data in every round (Thakur, Rabenseifner and Gropp, Int. J. High Perf. Comp. Appl.
19, 2005): broadcast and reduce move the whole buffer, scatter and gather what belongs to a subtree. With `fanouts`
they go over the digits of a rank from the outside in, so that a subgroup is entered once. A large buffer is broadcast
by a scatter and an all-gather around the ring (van de Geijn, 1994).

Outlines follow the longest path and are exact for any number of ranks; where chips share a tapered trunk they are an
upper bound, as most are silent in most rounds.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache

import numpy as np

from comms.algorithms import ring
from comms.algorithms.catalog import Algorithm, Joined, Needs, spans
from comms.algorithms.rounds import Ranks, moved, reversed_rounds, round_of, schedule_of
from comms.collectives.outline import Hop, Outline, OutlineStage
from comms.collectives.schedule import Op, Pattern, Round, Schedule
from comms.networks.groups import Level, Levels, inner_sizes, num_members
from comms.networks.topology import IntArray

BINOMIAL, SCATTER_GATHER = "binomial tree", "scatter and all-gather"
INWARD = frozenset({Op.REDUCE, Op.GATHER})
IN_PARTS = frozenset({Op.SCATTER, Op.GATHER})


def schedule(op: Op, ranks: Ranks) -> Schedule:
    """Whoever has the buffer sends it to half of those that it stands for, or what belongs to these; or backwards."""
    parts = op in IN_PARTS
    rounds = _parts(ranks) if parts else _copies(ranks)
    if op in INWARD:
        rounds = reversed_rounds(rounds, reduces=op is Op.REDUCE)
    return schedule_of(op, BINOMIAL, ranks, ranks.num if parts else 1, rounds)


def scatter_gather_schedule(op: Op, ranks: Ranks) -> Schedule:
    """A binomial scatter, then an all-gather around the ring."""
    n = ranks.num
    dealt = _parts(Ranks(n, ranks.root))
    around = [each for channel in ring.schedule(Op.ALL_GATHER, Ranks(n)).channels for each in channel.rounds]
    return schedule_of(op, SCATTER_GATHER, ranks, n, dealt, around)


def outline(op: Op, nbytes: float, levels: Levels) -> Outline:
    """Of a binomial tree over the digits."""
    parts = spans(levels)
    each = nbytes / num_members(levels)
    stages = tuple(
        _longest_way(op, each * inner if op in IN_PARTS else nbytes, level, inner) for level, inner in parts
    )
    return Outline(BINOMIAL, (stages if op in INWARD else stages[::-1],), (0,))


def scatter_gather_outline(op: Op, nbytes: float, levels: Levels) -> Outline:
    """The rank that gets its part last has it go all around the ring."""
    stages: tuple[OutlineStage, ...] = ()
    for level, inner in spans(levels):
        part = nbytes / level.fanout
        around = OutlineStage(level.fanout - 1, part, (Hop(level.latency_s, level.rate()),))
        stages = (_longest_way(Op.SCATTER, part, level, inner), around)
    return Outline(SCATTER_GATHER, (stages,), (0,))


@dataclass(frozen=True, slots=True, eq=False)
class _Sending:
    """One round of a binomial tree: ranks `src` each send to the one whose digit is `by` further on."""

    src: IntArray
    inner: int
    fanout: int
    by: int
    beyond: IntArray  # how many places the receiver stands for, itself included

    @property
    def dst(self) -> IntArray:
        return moved(self.src, self.inner, self.fanout, self.by)


def _sendings(ranks: Ranks) -> Iterator[_Sending]:
    """Digit by digit from the outermost; places count from the root's digit, far ones come first."""
    root, digits = ranks.root, ranks.digits
    for fanout, inner in reversed(list(zip(digits, inner_sizes(digits), strict=True))):
        holders = np.arange(root % inner, ranks.num, inner)
        place = (holders // inner - root // inner) % fanout
        for by in (1 << bit for bit in reversed(range((fanout - 1).bit_length()))):
            sends = (place % (2 * by) == 0) & (place + by < fanout)
            yield _Sending(holders[sends], inner, fanout, by, np.minimum(by, fanout - place[sends] - by))


def _copies(ranks: Ranks) -> tuple[Round, ...]:
    rounds = []
    for each in _sendings(ranks):
        zero = np.zeros_like(each.src)
        rounds.append(Round(Pattern(each.src, each.dst), zero, zero + 1, reduces=False))
    return tuple(rounds)


def _parts(ranks: Ranks) -> tuple[Round, ...]:
    rounds = []
    for each in _sendings(ranks):
        offset = np.arange(each.by)
        row, further = np.nonzero(offset < each.beyond[:, np.newaxis])
        src, dst = each.src[row], each.dst[row]
        subgroup = moved(src, each.inner, each.fanout, each.by + further) // each.inner * each.inner
        chunk = (subgroup[:, np.newaxis] + np.arange(each.inner)).ravel()
        rounds.append(round_of(np.repeat(src, each.inner), np.repeat(dst, each.inner), chunk, reduces=False))
    return tuple(rounds)


def _longest_way(op: Op, nbytes: float, level: Level, inner: int) -> OutlineStage:
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
        # The wire is busy from the root with the subtrees served before, and towards it with all that comes no earlier.
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
    return OutlineStage(count, seconds * rate / count, (Hop(latency, rate),), own_ports=True)


# Most are silent in most rounds, which is not what pools take for granted.
_SWITCHED = Needs(Joined.BY_SWITCH, Joined.BY_SWITCH, most_shared=0)
ALGORITHMS = (
    Algorithm(
        name=BINOMIAL,
        rank=4,
        ops=(Op.BROADCAST, Op.REDUCE, Op.SCATTER, Op.GATHER),
        make=schedule,
        sketch=outline,
        needs=_SWITCHED,
    ),
    Algorithm(
        name=SCATTER_GATHER,
        rank=4,
        ops=(Op.BROADCAST,),
        make=scatter_gather_schedule,
        sketch=scatter_gather_outline,
        needs=replace(_SWITCHED, max_levels=1),
    ),
)
