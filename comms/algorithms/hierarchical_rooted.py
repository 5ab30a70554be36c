"""Hierarchical, from and to a root: level by level, so that all members of a bunch carry a share out of it.

A scatter deals to the members of the root's bunch what they then deal to their likes in the other bunches; a gather is
that backwards. A broadcast scatters a buffer so and gathers it on the way back; a reduce scatters sums level by level
outwards, which are then collected at the root.

Backwards all do the same at the same time: outlines of gather and reduce are exact. Forwards a chip deals to one
after another, the far ones first, and who has its part early goes on early. Outlines are exact still where bunches
have all that their members have outwards, those of a broadcast where levels have ports of their own too. Elsewhere
they are estimates: who is early takes what others may use later (on random trees down to half of the outline), or a
chip that has its part of a broadcast is in the way of one that has not (up to 1.2; 1.006 on rails over a spine).
"""

from collections.abc import Sequence
from functools import partial

import numpy as np

from comms.algorithms.hierarchical import (
    MIXES,
    RINGS,
    Blocks,
    Move,
    Way,
    begun,
    gathered,
    name_of,
    scattered,
    serial_schedule,
    stages,
    suits,
    turning,
    way_at,
)
from comms.algorithms.rounds import Outlines, Schedules, check_ranks, folds, inner_sizes, reversed_rounds
from comms.levels import Levels
from comms.outline import Outline
from comms.schedule import Op, Round, Schedule

LINEAR = "hierarchical linear"


def broadcast(num_ranks: int, root: int = 0, *, fanouts: Sequence[int] | None = None) -> Schedule:
    """Dealt level by level; then all gather.

    As those behind in a ring get their part later, they do not disturb those ahead.
    """
    check_ranks(num_ranks, root)
    blocks, places = begun(num_ranks, fanouts, 1, nested=True)
    inward = [dealt(blocks, place, root) for place in places]
    outward = [gathered(blocks, place, Way.RING) for place in reversed(places)]
    return serial_schedule(Op.BROADCAST, name_of(RINGS), num_ranks, turning(inward, outward), root=root)


def reduce(
    num_ranks: int, root: int = 0, *, fanouts: Sequence[int] | None = None, ways: Sequence[Way] = RINGS
) -> Schedule:
    """Sums scattered level by level, and collected on the way back."""
    check_ranks(num_ranks, root)
    blocks, places = begun(num_ranks, fanouts, 1, nested=True)
    inward = [scattered(blocks, place, way_at(ways, place)) for place in places]
    outward = [reversed_rounds(dealt(blocks, place, root), reduces=False) for place in reversed(places)]
    return serial_schedule(Op.REDUCE, name_of(ways), num_ranks, turning(inward, outward), root=root)


def scatter(num_ranks: int, root: int = 0, *, fanouts: Sequence[int] | None = None) -> Schedule:
    """From the innermost level outwards. What goes to one rank is not one range of chunks, so it is several."""
    check_ranks(num_ranks, root)
    blocks, places = begun(num_ranks, fanouts, 1, nested=False)
    phases = [dealt(blocks, place, root) for place in places]
    return serial_schedule(Op.SCATTER, LINEAR, num_ranks, phases, root=root)


def gather(num_ranks: int, root: int = 0, *, fanouts: Sequence[int] | None = None) -> Schedule:
    """A scatter backwards."""
    there = scatter(num_ranks, root, fanouts=fanouts)
    phases = [phase for channel in there.channels for phase in channel.phases]
    back = [reversed_rounds(phase, reduces=False) for phase in reversed(phases)]
    return serial_schedule(Op.GATHER, LINEAR, num_ranks, back, root=root)


def dealt(blocks: Blocks, place: int, root: int) -> tuple[Round, ...]:
    """What the root's bunch has by now goes to the other bunches of its level, one message each."""
    inner = inner_sizes(blocks.fanouts)
    fanout, digit = blocks.fanouts[place], blocks.digit(place)
    start = root // inner[place] * inner[place]
    rows = np.arange(start, start + inner[place])
    moves = []
    for by in reversed(range(1, fanout)):
        other = (digit[rows] + by) % fanout
        moves.append(Move(rows, other, other))
    return (blocks.round_of(place, moves, reduces=False),)


def outline(op: Op, nbytes: float, levels: Levels, *, ways: Sequence[Way] = RINGS) -> Outline | None:
    """Two levels or more, none of them a ring of more than two, over which nobody can deal."""
    spans = folds(levels)
    taken = [way_at(ways, place) for place in range(len(spans))]
    suiting = all(suits(way, level) for way, (level, _) in zip(taken, spans, strict=True))
    if len(spans) < 2 or not suiting or any(level.ring and level.fanout > 2 for level, _ in spans):
        return None
    deals = [stages(Way.DIRECT, nbytes / inner, level, inner) for level, inner in spans]
    gathers = [stages(way, nbytes / span[1], *span) for way, span in zip(taken, spans, strict=True)]
    phases = {
        Op.SCATTER: deals,
        Op.GATHER: deals[::-1],
        Op.BROADCAST: turning(deals, [each[::-1] for each in reversed(gathers)]),
        Op.REDUCE: turning(gathers, deals[::-1]),
    }[op]
    name = LINEAR if op in (Op.SCATTER, Op.GATHER) else name_of(ways)
    return Outline(name, tuple(phases), tuple(range(len(phases))))


SCHEDULES: Schedules = {
    **{
        name_of(ways): {
            **({Op.BROADCAST: broadcast} if ways == RINGS else {}),
            Op.REDUCE: partial(reduce, ways=ways),
        }
        for ways in MIXES
    },
    LINEAR: {Op.SCATTER: scatter, Op.GATHER: gather},
}
OUTLINES: Outlines = {
    **{
        name_of(ways): {op: partial(outline, op, ways=ways) for op in SCHEDULES[name_of(ways)]}
        for ways in MIXES
    },
    LINEAR: {op: partial(outline, op) for op in SCHEDULES[LINEAR]},
}
