"""Hierarchical: level by level, so that every wire further out carries only a share of the buffer.

Reduce-scatter inside, all-reduce of the shares across (all members of a subgroup at once, each with its counterpart
in the other subgroups), all-gather inside; with three levels the middle one in the same way. Its halves are
reduce_scatter and all_gather. (From and to a root: `algorithms.hierarchical.hierarchical_rooted`, from everyone to
everyone: `hierarchical_exchange`, with trees between subgroups: `algorithms.double_trees`.)

Each level by its own way: around a ring, by halving and doubling, or directly. Pieces follow each other one at a
time in each phase (SERIAL), so that a piece crosses while the next one is still inside: a flow shop.

Outlines are exact; with several pieces too, as levels say which of them share a port. Levels that are rings are gone
round in one direction.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import partial, reduce
from math import prod
from typing import TypeVar

import numpy as np

from comms.algorithms.catalog import Algorithm, Needs, cut_by, spans
from comms.algorithms.rounds import Ranks, schedule_of
from comms.collectives.outline import Hop, Outline, OutlineStage
from comms.collectives.outline_time import closed_seconds
from comms.collectives.schedule import Op, Pattern, Round, Schedule
from comms.errors import CommsError
from comms.networks.groups import Level, Levels, inner_sizes
from comms.networks.topology import IntArray


class Crossing(StrEnum):
    """How one level is crossed."""

    RING = "ring"
    DOUBLING = "halving-doubling"
    DIRECT = "direct"


T = TypeVar("T")

RINGS = (Crossing.RING,)  # ways by level, innermost first; the last one stands for all further out
MAX_PIECES = 64


@dataclass(frozen=True, slots=True, eq=False)
class Move:
    """Messages of all ranks to those whose digit is `to`, with what stands for `num` digits from `first` on.

    Empty columns where a rank stays silent: `rows` are those that do not.
    """

    rows: IntArray
    to: IntArray
    first: IntArray
    num: int = 1


@dataclass(frozen=True, slots=True, eq=False)
class Blocks:
    """Which chunks stand for which digits: chunk start + sum of strides[d] * digit[d].

    Scattering goes through the digits in `order`: a rank works on the chunks of its own digits so far, and of all
    those to come. Gathering comes back.
    """

    fanouts: tuple[int, ...]
    strides: tuple[int, ...]
    order: tuple[int, ...]
    start: int = 0
    patterns: dict[bytes, Pattern] = field(default_factory=dict)  # so far, to be shared by rounds alike

    @classmethod
    def nested(cls, fanouts: tuple[int, ...], order: tuple[int, ...], start: int = 0) -> "Blocks":
        """All that a rank works on is one range of chunks, whoever ends with which."""
        strides = [0] * len(fanouts)
        for place, digit in enumerate(order):
            strides[digit] = prod(fanouts[each] for each in order[place + 1 :])
        return cls(fanouts, tuple(strides), order, start)

    @classmethod
    def by_rank(
        cls, fanouts: tuple[int, ...], order: tuple[int, ...], start: int = 0, per_rank: int = 1
    ) -> "Blocks":
        """Rank r ends with chunk r * per_rank + start, so that what it works on is scattered over the buffer."""
        return cls(fanouts, tuple(per_rank * size for size in inner_sizes(fanouts)), order, start)

    @property
    def num_ranks(self) -> int:
        return prod(self.fanouts)

    def digit(self, place: int) -> IntArray:
        """[ranks] The digit at a place of the order."""
        which = self.order[place]
        return np.arange(self.num_ranks) // inner_sizes(self.fanouts)[which] % self.fanouts[which]

    def round_of(self, place: int, moves: Sequence[Move], reduces: bool) -> Round:
        """One round of messages along the digit at a place of the order."""
        which = self.order[place]
        inner, digit = inner_sizes(self.fanouts)[which], self.digit(place)
        base = self.start + sum(self.digit(k) * self.strides[self.order[k]] for k in range(place))
        columns = []
        for move in moves:
            offsets, counts = self._runs(place, move.num)
            src, num = np.arange(self.num_ranks)[move.rows], len(offsets)
            dst = src + (move.to - digit[move.rows]) * inner
            first = (base + 0 * digit)[move.rows] + move.first * self.strides[which]
            every = (first[:, np.newaxis] + offsets).ravel()
            columns.append((np.repeat(src, num), np.repeat(dst, num), every, np.tile(counts, len(src))))
        src, dst, first, count = (np.concatenate(column) for column in zip(*columns, strict=True))
        pattern = self.patterns.setdefault(src.tobytes() + dst.tobytes(), Pattern(src, dst))
        return Round(pattern, first, count, reduces)

    def _runs(self, place: int, num: int) -> tuple[IntArray, IntArray]:
        """What stands for `num` digits, as ranges of chunks: where they start, and how long they are."""
        own = np.arange(num) * self.strides[self.order[place]]
        open_digits = [np.arange(self.fanouts[each]) * self.strides[each] for each in self.order[place + 1 :]]
        chunks = np.sort(reduce(lambda a, b: np.add.outer(a, b).ravel(), open_digits, own))
        # What follows on the one before is the same range; the first chunk follows on nothing.
        starts = np.flatnonzero(np.diff(chunks, prepend=chunks[0] - 2) != 1)
        return chunks[starts], np.diff(np.append(starts, len(chunks)))


def scattered(blocks: Blocks, place: int, way: Crossing) -> tuple[Round, ...]:
    """Rounds after which each rank has the sum of what stands for its digit."""
    return tuple(blocks.round_of(place, moves, reduces=True) for moves in _moves(blocks, place, way, False))


def gathered(blocks: Blocks, place: int, way: Crossing) -> tuple[Round, ...]:
    """Rounds after which each rank has what stands for any digit."""
    return tuple(blocks.round_of(place, moves, reduces=False) for moves in _moves(blocks, place, way, True))


def ring_moves(fanout: int, digit: IntArray, step: int, gathers: bool) -> Iterator[tuple[Move, ...]]:
    """Around the ring, upwards (step 1) or downwards (step -1)."""
    every = np.arange(len(digit))
    for each in range(fanout - 1):
        behind = each if gathers else each + 1
        yield (Move(every, (digit + step) % fanout, (digit - step * behind) % fanout),)


def _moves(blocks: Blocks, place: int, way: Crossing, gathers: bool) -> Iterator[tuple[Move, ...]]:
    fanout, digit = blocks.fanouts[blocks.order[place]], blocks.digit(place)
    every = np.arange(len(digit))
    if way is Crossing.RING:
        yield from ring_moves(fanout, digit, 1, gathers)
    elif way is Crossing.DIRECT:
        others = [(digit + by) % fanout for by in range(1, fanout)]
        yield tuple(Move(every, other, digit if gathers else other) for other in others)
    else:
        if fanout & (fanout - 1):
            raise CommsError(f"{fanout} ranks", "halving-doubling", "take a power of two, or another way")
        bits = [1 << bit for bit in range(fanout.bit_length() - 1)]
        for half in bits if gathers else reversed(bits):
            kept = digit if gathers else digit ^ half
            yield (Move(every, digit ^ half, kept // half * half, half),)


def schedule(op: Op, ranks: Ranks, *, ways: Sequence[Crossing] = RINGS) -> Schedule:
    """Scatter inwards to outwards, then gather on the way back; the outermost level does both in one phase.

    In the halves what goes to one rank is not one range of chunks, so it is several.
    """
    blocks, places = begun(ranks, nested=op is Op.ALL_REDUCE)
    inward, outward = [], []
    if op is not Op.ALL_GATHER:
        inward = [scattered(blocks, place, way_at(ways, place)) for place in places]
    if op is not Op.REDUCE_SCATTER:
        outward = [gathered(blocks, place, way_at(ways, place)) for place in reversed(places)]
    phases = turning(inward, outward)
    return schedule_of(op, name_of(ways), ranks, ranks.num, *phases, pieces=ranks.pieces)


def outline(
    op: Op, nbytes: float, levels: Levels, pieces: int = 1, *, ways: Sequence[Crossing] = RINGS
) -> Outline | None:
    """None where a way does not suit a level (`suits`)."""
    parts = crossed(levels, ways)
    if parts is None:
        return None
    scatter = [stages(way, nbytes / inner, level, inner) for way, level, inner in parts]
    inward = scatter if op is not Op.ALL_GATHER else []
    outward = [rounds[::-1] for rounds in reversed(scatter)] if op is not Op.REDUCE_SCATTER else []
    ports = tuple(level.port for _, level, _ in parts)
    used = {Op.REDUCE_SCATTER: ports, Op.ALL_GATHER: ports[::-1]}.get(op, ports + ports[-2::-1])
    return Outline(name_of(ways), tuple(turning(inward, outward)), used, pieces)


def crossed(levels: Levels, ways: Sequence[Crossing]) -> list[tuple[Crossing, Level, int]] | None:
    """The levels that part anything, each with its way and the members inside; None where one does not suit."""
    parts = [(way_at(ways, place), *span) for place, span in enumerate(spans(levels))]
    return parts if all(suits(way, level) for way, level, _ in parts) else None


def fastest_cut(whole: Outline, late_s: float = 0.0) -> int:
    """The power of two of pieces in which an outline is fastest.

    Where it is in several pieces, it is `late_s` over their number slower than its outline says.
    """
    # Of equally fast numbers the smallest: pieces cost what is not modelled.
    times = {
        pieces: closed_seconds(replace(whole, pieces=pieces)) + (late_s / pieces if pieces > 1 else 0.0)
        for pieces in (1 << bit for bit in range(MAX_PIECES.bit_length()))
    }
    return min(times, key=times.__getitem__)


def _fastest_over_ports(whole: Outline) -> int:
    """One piece where all levels share a port: none goes on while another is under way."""
    return fastest_cut(whole) if len(set(whole.ports)) > 1 else 1


def name_of(ways: Sequence[Crossing]) -> str:
    """As the catalog calls it."""
    return "hierarchical " + ", ".join(dict.fromkeys(ways))


def way_at(ways: Sequence[T], place: int) -> T:
    """How the level at a place, from the inside, is crossed."""
    return ways[min(place, len(ways) - 1)]


def most_peers(levels: Levels, *, ways: Sequence[Crossing | None]) -> int:
    """With how many others of one level a chip exchanges parts at once; one unless directly."""
    parts = spans(levels)
    direct = [
        level.fanout for place, (level, _) in enumerate(parts) if way_at(ways, place) is Crossing.DIRECT
    ]
    return max(direct, default=2) - 1


def begun(ranks: Ranks, nested: bool) -> tuple[Blocks, range]:
    """The chunks of levels, and the places of these in their order."""
    order = tuple(range(len(ranks.digits)))
    blocks = Blocks.nested(ranks.digits, order) if nested else Blocks.by_rank(ranks.digits, order)
    return blocks, range(len(order))


def turning(inward: Sequence[tuple[T, ...]], outward: Sequence[tuple[T, ...]]) -> list[tuple[T, ...]]:
    """Phases there and back; the outermost level is turned round in."""
    if not (inward and outward):
        return [*inward, *outward]
    return [*inward[:-1], (*inward[-1], *outward[0]), *outward[1:]]


def is_ring(level: Level) -> bool:
    """Whether its subgroups reach their neighbours only."""
    return level.ring and level.fanout > 2


def suits(way: Crossing, level: Level) -> bool:
    """Neighbours only where there is a ring, powers of two to double."""
    if is_ring(level):
        return way is Crossing.RING and level.wraps
    return way is not Crossing.DOUBLING or level.fanout & (level.fanout - 1) == 0


def stages(way: Crossing, nbytes: float, level: Level, inner: int) -> tuple[OutlineStage, ...]:
    """Scattering `nbytes` per rank over a level, all `inner` members of each subgroup at once."""
    fanout = level.fanout
    hop = Hop(level.latency_s, level.rate(inner))
    if way is Crossing.RING:
        return (OutlineStage(fanout - 1, nbytes / fanout, (hop,)),)
    if way is Crossing.DOUBLING:
        bits = range(fanout.bit_length() - 1)
        return tuple(OutlineStage(1, nbytes / (2 << bit), (hop,)) for bit in bits)
    others = fanout - 1
    together = Hop(level.latency_s, others * level.rate(others * inner))
    return (OutlineStage(1, others * nbytes / fanout, (together,)),)


# Ways by level: one for all, or one inside and one for all further out. In the order of the catalog.
MIXES = (
    (Crossing.RING,),
    (Crossing.RING, Crossing.DOUBLING),
    (Crossing.RING, Crossing.DIRECT),
    (Crossing.DOUBLING, Crossing.RING),
    (Crossing.DOUBLING,),
    (Crossing.DOUBLING, Crossing.DIRECT),
    (Crossing.DIRECT, Crossing.RING),
    (Crossing.DIRECT, Crossing.DOUBLING),
    (Crossing.DIRECT,),
)
ALGORITHMS: tuple[Algorithm, ...] = ()
for _ways in MIXES:
    ALGORITHMS += (
        Algorithm(
            name=name_of(_ways),
            rank=5,
            ops=(Op.ALL_REDUCE, Op.REDUCE_SCATTER, Op.ALL_GATHER),
            make=partial(schedule, ways=_ways),
            sketch=partial(outline, ways=_ways),
            cut=cut_by(_fastest_over_ports, partial(outline, ways=_ways)),
            needs=Needs(min_levels=2),
            rail_aligned=True,
            is_hierarchy=True,
            peers=partial(most_peers, ways=_ways),
        ),
    )
