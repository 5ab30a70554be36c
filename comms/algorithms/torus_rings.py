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

Over several tori all wires of each are busy while shares of the buffer cross between them: every channel scatters along
the dimensions of its torus, rotated, then around a ring of the chips that sit alike in other tori, and gathers all the
way back. TPU pods over a data-centre network are joined so.

Outlines are exact for dimensions whose wires are a chip's own (rings of two have one link, which both channels
share). Rotated over rings that are not all alike, channels meet on the wires of a dimension at times that depend on
all figures, so that the outline has them side by side; over several tori it always has.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from math import prod

import numpy as np

from comms.algorithms.catalog import Algorithm, Joined, Needs, spans
from comms.algorithms.hierarchical.hierarchical import Blocks, Move, is_ring, ring_moves
from comms.algorithms.rounds import Ranks, halves
from comms.collectives.outline import Hop, Outline, OutlineStage
from comms.collectives.outline_time import fewest_pieces
from comms.collectives.schedule import Channel, Op, Pattern, Round, Schedule
from comms.networks.groups import Level, Levels, num_members
from comms.networks.topology import IntArray

TORUS, MESH, ROTATED, LINE = "torus", "mesh", "rotated torus", "line"
OVER_TORI = "hierarchical rotated torus"
OPS = (Op.ALL_REDUCE, Op.REDUCE_SCATTER, Op.ALL_GATHER)
BOTH_WAYS = (1, -1)
ROUNDING = 1e-9  # of a rate that was multiplied and divided by the same numbers


def schedule(op: Op, ranks: Ranks, *, name: str = TORUS) -> Schedule:
    """Reduce-scatter along all dimensions, then all-gather back; or either. A mesh goes round what wraps around.

    In the halves what goes to one chip is not one range of chunks, so it is several.
    """
    orders = rotations(len(ranks.digits))
    around = gone_round(ranks.of_digits(ranks.wraps, False), name == MESH)
    taken = orders if name == ROTATED else orders[:1]
    return scattering_and_gathering(op, name, ranks.digits, taken, around, at_once=name != ROTATED)


def line_schedule(op: Op, ranks: Ranks) -> Schedule:
    """Two chains that cross: sums go to one end and results back, each half in pieces that are chunks of its own."""
    pieces = ranks.pieces
    channels = tuple(
        _there_and_back(np.arange(ranks.num)[::step], np.arange(pieces) + half * pieces)
        for half, step in enumerate(BOTH_WAYS)
        if ranks.num > 1
    )
    return Schedule(op, LINE, ranks.num, 2 * pieces, 0.5 / pieces, channels)


def line_pieces(op: Op, nbytes: float, levels: Levels) -> int:
    """So many that filling the chains hardly counts."""
    parts = spans(levels)
    if not parts or num_members(levels) < 3:
        return 1
    level, _ = parts[0]
    half_s = nbytes / 2 / level.rate(2)
    return fewest_pieces((level.fanout - 2) * half_s, (level.fanout - 1) * level.latency_s + half_s)


def outline(op: Op, nbytes: float, levels: Levels, *, name: str = TORUS) -> Outline | None:
    """None where a dimension is not as the algorithm by this name needs it; rotated, all are rings with own wires."""
    parts, rotated = spans(levels), name == ROTATED
    around = gone_round(tuple(level.wraps for level, _ in parts), name == MESH)
    if not parts or not all(_suits(*each) for each in zip(parts, around, strict=True)):
        return None
    if rotated and not all(has_own_wires(*each) for each in parts):
        return None
    dims = tuple(range(len(parts)))
    alike = len({(level.fanout, level.latency_s, level.bytes_per_s) for level, _ in parts}) == 1
    part = nbytes / (2 * len(parts) if rotated else 2)
    channels = []
    for first in dims if rotated and not alike else dims[:1]:  # alike, they never meet
        order = dims[first:] + dims[:first]
        scatter = tuple(_scattering(part, [(parts[dim], around[dim]) for dim in order]))
        phases, ports = halves(op, scatter, scatter[::-1]), halves(op, order, order[::-1])
        channels.append(Outline(name, phases, ports if rotated else (0,) * len(phases)))
    return replace(channels[0], beside=tuple(channels[1:]))


def gone_round(wraps: tuple[bool, ...], is_mesh: bool) -> tuple[bool, ...]:
    """Which dimensions are gone round: all of a torus, of a mesh only those that wrap around, and none if all do."""
    return tuple((wrap and not all(wraps)) or not is_mesh for wrap in wraps)


def _scattering(
    part: float, dims: Iterable[tuple[tuple[Level, int], bool]]
) -> Iterator[tuple[OutlineStage, ...]]:
    """Dimension by dimension (level, members inside it, whether it is a ring), what a chip sends one way round."""
    for (level, inner), ring in dims:
        part /= level.fanout
        # Of two chips, and along a line, both channels go by the same wires.
        per_wire = 1 if ring and level.fanout > 2 else 2
        hop = Hop(level.latency_s, min(level.bytes_per_s / per_wire, level.rate(2 * inner)))
        yield (OutlineStage(level.fanout - 1, part, (hop,), own_ports=not ring),)


def line_outline(op: Op, nbytes: float, levels: Levels, pieces: int = 1) -> Outline | None:
    """All pieces leave the end of the line, the last one goes along it, and the same back."""
    ((level, inner),) = spans(levels)
    if level.wraps or level.fanout == 2 or not has_own_wires(level, inner):
        return None
    piece, rate = nbytes / 2 / pieces, level.rate(2)
    way = (
        OutlineStage(pieces - 1, piece, (Hop(0.0, rate),), own_ports=True),
        OutlineStage(level.fanout - 1, piece, (Hop(level.latency_s, rate),), own_ports=True),
    )
    return Outline(LINE, (way, way), (0, 0))


def over_tori_schedule(op: Op, ranks: Ranks) -> Schedule:
    """One of OPS; the last fanout joins tori, the others are their dimensions."""
    digits = ranks.digits
    outermost = len(digits) - 1
    orders = [(*order, outermost) for order in rotations(outermost)] or rotations(len(digits))
    return scattering_and_gathering(op, OVER_TORI, digits, orders)


def over_tori_outline(op: Op, nbytes: float, levels: Levels) -> Outline | None:
    """Rings whose wires are a chip's own, two or more, and one level further out that is none."""
    parts = spans(levels)
    dims, (outer, _) = parts[:-1], parts[-1]
    goes_round = all(has_own_wires(*each) and (each[0].wraps or each[0].fanout == 2) for each in dims)
    if not goes_round or outer.ring:
        return None
    part, channels = nbytes / (2 * len(dims)), []
    for order in rotations(len(dims)):
        for side in range(len(BOTH_WAYS)):
            places = (*order, len(dims))
            stages = _one_way(part, [parts[place] for place in places])
            ports = tuple(_port(place, side, parts) for place in places)
            there_and_back = halves(op, stages, stages[::-1]), halves(op, ports, ports[::-1])
            channels.append(Outline(OVER_TORI, *there_and_back))
    return replace(channels[0], beside=tuple(channels[1:]))


def has_own_wires(level: Level, inner: int) -> bool:
    """Whether chips have wires of their own to their neighbours along this dimension, at its full rate."""
    sides = 1 if level.fanout == 2 else 2
    return level.ring and level.rate(sides * inner) >= level.bytes_per_s * (1 - ROUNDING)


def _suits(span: tuple[Level, int], ring: bool) -> bool:
    level, _ = span
    if level.fanout == 2:
        return level.ring
    return level.ring and level.wraps if ring else has_own_wires(*span)


def _port(place: int, side: int, parts: Sequence[tuple[Level, int]]) -> int:
    """Rings have wires for either way round, but of two chips one; what joins tori is used both ways round."""
    ring = is_ring(parts[place][0])
    return len(BOTH_WAYS) * place + (side if ring else 0)


def _one_way(part: float, parts: Sequence[tuple[Level, int]]) -> tuple[tuple[OutlineStage, ...], ...]:
    """What a chip sends along one level after another."""
    phases = []
    for level, inner in parts:
        part /= level.fanout
        hop = Hop(level.latency_s, level.rate(inner))
        phases.append((OutlineStage(level.fanout - 1, part, (hop,)),))
    return tuple(phases)


def rotations(num_dims: int) -> list[tuple[int, ...]]:
    """Orders of the dimensions, each starting with another one."""
    dims = tuple(range(num_dims))
    return [dims[first:] + dims[:first] for first in dims]


def scattering_and_gathering(
    op: Op,
    name: str,
    parts: tuple[int, ...],
    orders: Sequence[tuple[int, ...]],
    rings: Sequence[bool] | None = None,
    at_once: bool = False,
) -> Schedule:
    """Two channels for each order of the digits, one either way round; `rings`: which digits are gone round (all)."""
    num_ranks, around = prod(parts), (True,) * len(parts) if rings is None else rings
    ways = [(order, step) for order in orders if parts for step in BOTH_WAYS]
    num_chunks = num_ranks * max(1, len(ways))
    channels = []
    for part, (order, step) in enumerate(ways):
        if op is Op.ALL_REDUCE:
            blocks = Blocks.nested(parts, order, part * num_ranks)
        else:
            blocks = Blocks.by_rank(parts, order, part, len(ways))
        places = range(len(parts))
        scatter = tuple(_along(blocks, place, around, step, gathers=False) for place in places)
        gather = tuple(_along(blocks, place, around, step, gathers=True) for place in reversed(places))
        channels.append(Channel(halves(op, scatter, gather), at_once=at_once))
    return Schedule(op, name, num_ranks, num_chunks, 1.0 / num_chunks, tuple(channels))


def _along(blocks: Blocks, place: int, rings: Sequence[bool], step: int, gathers: bool) -> tuple[Round, ...]:
    """The rounds of one channel along one dimension."""
    which = blocks.order[place]
    fanout, digit = blocks.fanouts[which], blocks.digit(place)
    moves: Iterator[tuple[Move, ...]] = (
        ring_moves(fanout, digit, step, gathers) if rings[which] else _line_moves(fanout, digit, gathers)
    )
    return tuple(blocks.round_of(place, each, reduces=not gathers) for each in moves)


def _line_moves(fanout: int, digit: IntArray, gathers: bool) -> Iterator[tuple[Move, ...]]:
    """Gathering, round s takes what is from s places behind one further, both ways; scattering is that backwards."""
    for each in range(fanout - 1):
        moves = []
        for step in BOTH_WAYS:
            first = digit - step * each if gathers else digit + step * (fanout - 1 - each)
            there = [(place >= 0) & (place < fanout) for place in (first, digit + step)]
            rows = np.flatnonzero(there[0] & there[1])
            moves.append(Move(rows, digit[rows] + step, first[rows]))
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
            patterns[low, high] = (
                Pattern(near, far),
                Pattern(line[::-1][low : high + 1], line[::-1][low + 1 : high + 2]),
            )
        upwards, downwards = patterns[low, high]
        chunk = chunks[each - np.arange(low, high + 1)]
        there.append(Round(upwards, chunk, one[: len(chunk)], reduces=True))
        back.append(Round(downwards, chunk, one[: len(chunk)], reduces=False))
    return Channel((tuple(there), tuple(back)))


_RINGS = Needs(Joined.IN_RING, Joined.IN_RING)
_TORUS = Algorithm(name=TORUS, rank=10, ops=OPS, make=schedule, sketch=outline, needs=_RINGS)
ALGORITHMS = (
    _TORUS,
    replace(_TORUS, name=MESH, make=partial(schedule, name=MESH), sketch=partial(outline, name=MESH)),
    replace(
        _TORUS,
        name=ROTATED,
        make=partial(schedule, name=ROTATED),
        sketch=partial(outline, name=ROTATED),
        needs=replace(_RINGS, min_levels=2),
    ),
    Algorithm(
        name=LINE,
        rank=10,
        ops=(Op.ALL_REDUCE,),
        make=line_schedule,
        sketch=line_outline,
        cut=line_pieces,
        needs=replace(_RINGS, min_levels=1, max_levels=1),
    ),
    Algorithm(
        name=OVER_TORI,
        rank=9,
        ops=OPS,
        make=over_tori_schedule,
        sketch=over_tori_outline,
        needs=Needs(Joined.IN_RING, min_levels=3, most_shared=0),
        rail_aligned=True,
    ),
)
