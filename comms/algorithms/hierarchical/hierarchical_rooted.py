"""Hierarchical, from and to a root: level by level, so that all members of a subgroup carry a share out of it.

A scatter deals to the members of the root's subgroup what they then deal to their counterparts in the other
subgroups; a gather is that backwards. A broadcast scatters a buffer so and gathers it on the way back; a reduce
scatters sums level by level outwards, which are then collected at the root.

Over a ring of chips everything goes the shorter way, to the furthest first, one chip a round, so that all of a side
have theirs at once.

Pieces follow each other one at a time in each phase (SERIAL). A port deals or collects all pieces before it passes on
the first in the next phase that uses it; only the outermost level of a broadcast deals and gathers piece by piece.

Backwards all do the same at the same time: outlines of gather and reduce are exact, with several pieces where levels
have ports of their own. Forwards a chip deals to one after another, the far ones first, and who has its part early goes
on early. Outlines of a scatter are exact still where subgroups have all that their members have outwards (with several
pieces: and levels have ports of their own), those of a broadcast in one piece where both hold. Elsewhere they are
estimates: who is early takes what others may use later (on random trees down to half of the outline), or a chip that
has its part of a broadcast is in the way of one that has not (up to 1.2; 1.006 on rails over a spine).

A broadcast in pieces takes longer than its outline where members of the root's subgroup pass on parts of the first
piece while others still get theirs: by up to 1.4 messages of one piece within a subgroup, 12 % for two pieces, 6 %
for the numbers of pieces that `best_pieces` takes (which counts that in), on hosts of 8 chips on rails up to 3.3 % at
64 MiB and 1 % at 1 GiB. If all gathered directly or by doubling they would be in the way of the root as long as it
deals, up to 2.4 times the outline; so a broadcast gathers around rings only.

Not in pieces: levels that share a port, where what is passed on and what still comes in meet at one chip (up to 1.3
times what an outline says), and rings, round which chips near the root run ahead.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

import numpy as np

from comms.algorithms.catalog import Algorithm, Needs, spans
from comms.algorithms.hierarchical.hierarchical import (
    MIXES,
    RINGS,
    Blocks,
    Crossing,
    Move,
    begun,
    crossed,
    fastest_cut,
    gathered,
    is_ring,
    most_peers,
    name_of,
    scattered,
    stages,
    turning,
    way_at,
)
from comms.algorithms.rounds import Ranks, moved, reversed_rounds, schedule_of
from comms.collectives.outline import Hop, Outline, OutlineStage
from comms.collectives.schedule import Op, Round, Schedule
from comms.networks.groups import Level, Levels, inner_sizes
from comms.networks.topology import IntArray

LINEAR = "hierarchical linear"
WHOLE = (Op.BROADCAST, Op.REDUCE)
IN_THE_WAY = 1.5  # messages of one piece per inner level, by which a broadcast in pieces may be late


def schedule(op: Op, ranks: Ranks, *, ways: Sequence[Crossing] = RINGS) -> Schedule:
    """Dealt level by level outwards, then gathered by all; or backwards, sums scattered, then collected.

    What is whole is gathered around rings: as those behind get their part later, they do not disturb those ahead.
    """
    blocks, places = begun(ranks, nested=op in WHOLE)
    deals = _dealt(blocks, ranks)
    collects = [reversed_rounds(phase, reduces=False) for phase in reversed(deals)]
    match op:
        case Op.SCATTER:
            phases = deals
        case Op.GATHER:
            phases = collects
        case Op.BROADCAST:
            phases = turning(deals, [gathered(blocks, place, Crossing.RING) for place in reversed(places)])
        case _:
            phases = [*(scattered(blocks, place, way_at(ways, place)) for place in places), *collects]
    name = name_of(ways) if op in WHOLE else LINEAR
    return schedule_of(op, name, ranks, ranks.num, *phases, pieces=ranks.pieces)


def _dealt(blocks: Blocks, ranks: Ranks) -> list[tuple[Round, ...]]:
    """Per level, what the root's subgroup has by then goes to the other subgroups."""
    return [
        tuple(_along_ring(blocks, place, ranks.root)) if ring else (_directly(blocks, place, ranks.root),)
        for place, ring in enumerate(ranks.of_digits(ranks.rings, False))
    ]


def _directly(blocks: Blocks, place: int, root: int) -> Round:
    """A message to each of the other subgroups."""
    rows, digit, fanout = _subgroup(blocks, place, root), blocks.digit(place), blocks.fanouts[place]
    others = [(digit[rows] + by) % fanout for by in reversed(range(1, fanout))]
    return blocks.round_of(place, [Move(rows, other, other) for other in others], reduces=False)


def _along_ring(blocks: Blocks, place: int, root: int) -> Iterator[Round]:
    """Rounds in which what goes to the furthest subgroup that is left leaves, both ways, and all others go on."""
    rows, digit, fanout = _subgroup(blocks, place, root), blocks.digit(place), blocks.fanouts[place]
    inner, sides = inner_sizes(blocks.fanouts)[place], _sides(fanout)
    for each in range(max(hops for _, hops in sides)):
        moves = []
        for step, hops in sides:
            for hop in range(each + 1 if each < hops else 0):
                here = moved(rows, inner, fanout, step * hop)
                to, target = ((digit[here] + step * by) % fanout for by in (1, hops - each))
                moves.append(Move(here, to, target))
        yield blocks.round_of(place, moves, reduces=False)


def _subgroup(blocks: Blocks, place: int, root: int) -> IntArray:
    """The members of the subgroup within a level that has the root."""
    inner = inner_sizes(blocks.fanouts)[place]
    return root // inner * inner + np.arange(inner)


def _sides(fanout: int) -> tuple[tuple[int, int], ...]:
    """(step, hops) of the ways around a ring."""
    up = fanout // 2
    return ((1, up), (-1, fanout - 1 - up))


def outline(
    op: Op, nbytes: float, levels: Levels, pieces: int = 1, *, ways: Sequence[Crossing] = RINGS
) -> Outline | None:
    """No lines, on which it depends on the root."""
    parts = crossed(levels, ways)
    if parts is None:
        return None
    deals = [_dealing(nbytes / inner, level, inner) for _, level, inner in parts]
    gathers = [stages(way, nbytes / inner, level, inner) for way, level, inner in parts]
    ports = tuple(level.port for _, level, _ in parts)
    phases, used = {
        Op.SCATTER: (deals, ports),
        Op.GATHER: (deals[::-1], ports[::-1]),
        Op.BROADCAST: (turning(deals, [each[::-1] for each in reversed(gathers)]), ports + ports[-2::-1]),
        Op.REDUCE: ([*gathers, *deals[::-1]], ports + ports[::-1]),
    }[op]
    return Outline(name_of(ways) if op in WHOLE else LINEAR, tuple(phases), used, pieces)


def best_pieces(op: Op, nbytes: float, levels: Levels, *, ways: Sequence[Crossing] = RINGS) -> int:
    """The best power of two of pieces; one where two levels share a port, or one is a ring."""
    parts = spans(levels)
    if len({level.port for level, _ in parts}) < len(parts) or any(is_ring(level) for level, _ in parts):
        return 1
    late_s = 0.0
    if op is Op.BROADCAST:
        part_s = sum(nbytes / inner / level.fanout / level.rate(inner) for level, inner in parts[:-1])
        late_s = IN_THE_WAY * part_s
    whole = outline(op, nbytes, levels, ways=ways)
    return fastest_cut(whole, late_s) if whole is not None else 1


def _dealing(nbytes: float, level: Level, inner: int) -> tuple[OutlineStage, ...]:
    """Dealing `nbytes` per member out over a level, or collecting it.

    Who does has no one to wait for, so that each piece leaves as soon as the one before has.
    """
    if is_ring(level):
        hops = max(hops for _, hops in _sides(level.fanout))
        return (OutlineStage(hops, nbytes / level.fanout, (Hop(level.latency_s, level.rate(2 * inner)),)),)
    # The port is free when the last byte has left, the last message there a latency later: a stage of its own.
    (together,) = stages(Crossing.DIRECT, nbytes, level, inner)
    (hop,) = together.hops
    leaves = replace(together, hops=(replace(hop, latency_s=0.0),))
    return (leaves, OutlineStage(1, 0.0, (hop,), own_ports=True))


_LINEAR = Algorithm(
    name=LINEAR,
    rank=7,
    ops=(Op.SCATTER, Op.GATHER),
    make=schedule,
    sketch=outline,
    cut=best_pieces,
    needs=Needs(min_levels=2),
    rail_aligned=True,
)
ALGORITHMS: tuple[Algorithm, ...] = (_LINEAR,)
for _ways in MIXES:
    ALGORITHMS += (
        replace(
            _LINEAR,
            name=name_of(_ways),
            ops=(Op.BROADCAST, Op.REDUCE) if _ways == RINGS else (Op.REDUCE,),
            make=partial(schedule, ways=_ways),
            sketch=partial(outline, ways=_ways),
            cut=partial(best_pieces, ways=_ways),
            peers=partial(most_peers, ways=_ways),
        ),
    )
