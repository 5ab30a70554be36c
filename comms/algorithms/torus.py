"""Tori: dimension by dimension, with all wires of a dimension busy in both directions.

Two channels with half of the buffer each go round every ring in opposite directions: reduce-scatter along the
first dimension, the next, ..., all-gather on the way back (bucket algorithms; Jain and Sabharwal, IPDPS 2010).
Only one dimension's wires are busy at a time. Rotated, there are as many pairs of channels as dimensions, each
pair starting with another dimension, so that all wires are busy at all times, as on TPU pods.

A dimension that does not wrap around is a line. There, chunks go from chip to chip both ways from where they start
(or to where they are summed), in one round per chip; both channels share each wire. All-reduce on a line alone is
faster otherwise: one half of the buffer goes in pieces up the line as a sum and down it again, the other half the
other way round, so that every wire carries the buffer once, not twice. The way back begins when the last piece is
there, which is when the wires are free.

Outlines are exact for dimensions whose wires are a chip's own (rings of two have one link, which both channels
share). Rotated, they are so for rings all alike; for others there is none, as channels then meet on the wires of
a dimension at times that depend on all figures.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from math import ceil, prod

import numpy as np

from comms.algorithms.hierarchical import Blocks, Move, ring_moves
from comms.algorithms.rounds import Outlines, Schedules, check_ranks, checked_fanouts, folds
from comms.errors import CommsError
from comms.levels import Level, Levels, num_members
from comms.outline import Hop, Outline, Stage
from comms.schedule import Channel, Op, Pattern, Round, Schedule
from comms.topology import IntArray

TORUS, ROTATED, LINE = "torus", "rotated torus", "line"
FILLING = 1 / 32  # of the time with endless pieces, what filling pipelines may cost more
BOTH_WAYS = (1, -1)


def all_reduce(
    num_ranks: int,
    *,
    fanouts: Sequence[int] | None = None,
    wraps: Sequence[bool] | None = None,
    rotated: bool = False,
) -> Schedule:
    """Reduce-scatter along all dimensions, then all-gather back."""
    return _torus(Op.ALL_REDUCE, num_ranks, fanouts, wraps, rotated)


def reduce_scatter(
    num_ranks: int,
    *,
    fanouts: Sequence[int] | None = None,
    wraps: Sequence[bool] | None = None,
    rotated: bool = False,
) -> Schedule:
    """From the first dimension to the last. What goes to one chip is not one range of chunks, so it is several."""
    return _torus(Op.REDUCE_SCATTER, num_ranks, fanouts, wraps, rotated)


def all_gather(
    num_ranks: int,
    *,
    fanouts: Sequence[int] | None = None,
    wraps: Sequence[bool] | None = None,
    rotated: bool = False,
) -> Schedule:
    """From the last dimension to the first."""
    return _torus(Op.ALL_GATHER, num_ranks, fanouts, wraps, rotated)


def line_all_reduce(num_ranks: int, *, pieces: int = 1) -> Schedule:
    """Two chains that cross: sums go to one end and results back, each half in `pieces` chunks of its own."""
    check_ranks(num_ranks, pieces=pieces)
    channels = tuple(
        _there_and_back(np.arange(num_ranks)[::step], np.arange(pieces) + half * pieces)
        for half, step in enumerate(BOTH_WAYS)
        if num_ranks > 1
    )
    return Schedule(Op.ALL_REDUCE, LINE, num_ranks, 2 * pieces, 0.5 / pieces, channels)


def line_pieces(nbytes: float, levels: Levels) -> int:
    """The fewest pieces with which filling the chains costs at most FILLING of the time with endless pieces."""
    spans = folds(levels)
    if not spans or num_members(levels) < 3:
        return 1
    level, _ = spans[0]
    half_s = nbytes / 2 / level.rate(2)
    endless = (level.fanout - 1) * level.latency_s + half_s
    return max(1, ceil((level.fanout - 2) * half_s / (FILLING * endless))) if endless > 0 else 1


def outline(op: Op, nbytes: float, levels: Levels, *, rotated: bool = False) -> Outline | None:
    """Over rings and lines; rotated, over two rings or more of the same size and figures."""
    spans = folds(levels)
    if not spans or not all(level.ring for level, _ in spans):
        return None
    alike = {(s.fanout, s.latency_s, s.bytes_per_s, s.wraps and s.fanout > 2) for s, _ in spans}
    if rotated and (len(spans) < 2 or len(alike) > 1 or not all(_wraps(level) for level, _ in spans)):
        return None
    scatter: list[tuple[Stage, ...]] = []
    part = nbytes / (2 * len(spans) if rotated else 2)
    for level, inner in spans:
        part /= level.fanout
        rate = min(level.bytes_per_s / (1 if _wraps(level) else 2), level.rate(2 * inner))
        scatter.append((Stage(level.fanout - 1, part, (Hop(level.latency_s, rate),), not _wraps(level)),))
    gather = scatter[::-1]
    phases = {Op.REDUCE_SCATTER: scatter, Op.ALL_GATHER: gather, Op.ALL_REDUCE: scatter + gather}[op]
    return Outline(_name(rotated), tuple(phases), (0,) * len(phases))


def line_outline(nbytes: float, levels: Levels, *, pieces: int = 1) -> Outline | None:
    """All pieces leave the end of the line, the last one goes along it, and the same back."""
    spans = folds(levels)
    if len(spans) != 1 or not spans[0][0].ring or spans[0][0].wraps or spans[0][0].fanout < 3:
        return None
    level, _ = spans[0]
    piece, rate = nbytes / 2 / pieces, level.rate(2)
    way = (
        Stage(pieces - 1, piece, (Hop(0.0, rate),), own_ports=True),
        Stage(level.fanout - 1, piece, (Hop(level.latency_s, rate),), own_ports=True),
    )
    return Outline(LINE, (way, way), (0, 0))


def _name(rotated: bool) -> str:
    return ROTATED if rotated else TORUS


def _wraps(level: Level) -> bool:
    return level.wraps and level.fanout > 2


def _torus(
    op: Op,
    num_ranks: int,
    fanouts: Sequence[int] | None,
    wraps: Sequence[bool] | None,
    rotated: bool,
) -> Schedule:
    check_ranks(num_ranks)
    parts = checked_fanouts(num_ranks, fanouts)
    rings = _rings(parts, fanouts, wraps)
    dims = tuple(range(len(parts)))
    orders = [dims[first:] + dims[:first] for first in (dims if rotated else dims[:1])]
    ways = [(order, step) for order in orders for step in BOTH_WAYS]
    num_chunks = num_ranks * max(1, len(ways))
    channels = []
    for part, (order, step) in enumerate(ways):
        if op is Op.ALL_REDUCE:
            blocks = Blocks.nested(parts, order, part * num_ranks)
        else:
            blocks = Blocks.by_rank(parts, order, part, len(ways))
        scatter = [_along(blocks, place, rings, step, gathers=False) for place in dims]
        gather = [_along(blocks, place, rings, step, gathers=True) for place in reversed(dims)]
        phases = {Op.REDUCE_SCATTER: scatter, Op.ALL_GATHER: gather, Op.ALL_REDUCE: scatter + gather}[op]
        channels.append(Channel(tuple(phases)))
    return Schedule(op, _name(rotated), num_ranks, num_chunks, 1.0 / num_chunks, tuple(channels))


def _rings(
    parts: tuple[int, ...], fanouts: Sequence[int] | None, wraps: Sequence[bool] | None
) -> tuple[bool, ...]:
    """Per dimension of more than one chip, whether it is gone round; all where nothing is said."""
    given = parts if fanouts is None else tuple(fanouts)
    said = (True,) * len(given) if wraps is None else tuple(wraps)
    if len(said) != len(given):
        problem = f"{len(said)} answers for {len(given)} dimensions"
        raise CommsError(problem, "torus", "say of each whether it wraps around")
    return tuple(wrap for wrap, fanout in zip(said, given, strict=True) if fanout > 1)


def _along(blocks: Blocks, place: int, rings: tuple[bool, ...], step: int, gathers: bool) -> tuple[Round, ...]:
    """The rounds of one channel along one dimension."""
    which = blocks.order[place]
    fanout, digit = blocks.fanouts[which], blocks.digit(place)
    moves: Iterator[tuple[Move, ...]] = (
        ring_moves(fanout, digit, step, gathers) if rings[which] else _line_moves(fanout, digit, gathers)
    )
    return tuple(blocks.round_of(place, each, reduces=not gathers) for each in moves)


def _line_moves(fanout: int, digit: IntArray, gathers: bool) -> Iterator[tuple[Move, ...]]:
    """Gathering, round s takes what is s places behind one further, both ways; scattering is that backwards."""
    for each in range(fanout - 1):
        behind = each if gathers else fanout - 2 - each
        moves = []
        for step in BOTH_WAYS:
            start = digit - step * behind
            rows = np.flatnonzero(
                (start >= 0) & (start < fanout) & (digit + step >= 0) & (digit + step < fanout)
            )
            if gathers:
                moves.append(Move(rows, digit[rows] + step, start[rows]))
                continue
            back = {here: row for row, here in enumerate(digit[rows])}
            del back
        yield tuple(moves)


def _there_and_back(line: IntArray, chunks: IntArray) -> Channel:
    """Sums along a line in pieces, one a round, then results back from its end."""
    places, pieces = len(line) - 1, len(chunks)
    one = np.ones(places, dtype=np.int64)
    there, back = [], []
    patterns: dict[tuple[int, int], tuple[Pattern, Pattern]] = {}
    for each in range(pieces + places - 1):
        low, high = max(0, each - pieces + 1), min(each, places - 1)
        if (low, high) not in patterns:
            near, far = line[low : high + 1], line[low + 1 : high + 2]
            patterns[low, high] = Pattern(near, far), Pattern(line[::-1][low : high + 1], line[::-1][low + 1 : high + 2])
        upwards, downwards = patterns[low, high]
        chunk = chunks[each - np.arange(low, high + 1)]
        there.append(Round(upwards, chunk, one[: len(chunk)], reduces=True))
        back.append(Round(downwards, chunk, one[: len(chunk)], reduces=False))
    return Channel((tuple(there), tuple(back)))
