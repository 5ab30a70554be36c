"""Hierarchical, over tori: all wires of a torus are busy while shares of the buffer cross between tori.

As many pairs of channels as a torus has dimensions share the buffer out. Each scatters along the dimensions of its
torus, starting with another one and both ways round (`algorithms.torus_rings`), then around a ring of the chips that
sit alike in other tori, and gathers all the way back. TPU pods over a data-centre network are joined so.

Outlines have all channels side by side: they are exact where chips have their wires to themselves.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from comms.algorithms.rounds import Outlines, Schedules, check_ranks, checked_fanouts, folds
from comms.algorithms.torus_rings import BOTH_WAYS, halves, has_own_wires, rotations, scattering_and_gathering
from comms.collectives.outline import Hop, Outline, Stage
from comms.collectives.schedule import Op, Schedule
from comms.networks.levels import Level, Levels

NAME = "hierarchical rotated torus"
OPS = (Op.ALL_REDUCE, Op.REDUCE_SCATTER, Op.ALL_GATHER)


def schedule(op: Op, num_ranks: int, *, fanouts: Sequence[int] | None = None) -> Schedule:
    """One of OPS; the last fanout joins tori, the others are their dimensions."""
    check_ranks(num_ranks)
    parts = checked_fanouts(num_ranks, fanouts)
    outermost = len(parts) - 1
    orders = [(*order, outermost) for order in rotations(outermost)] or rotations(len(parts))
    return scattering_and_gathering(op, NAME, parts, orders)


def outline(op: Op, nbytes: float, levels: Levels) -> Outline | None:
    """Rings whose wires are a chip's own, two or more, and one level further out that is none."""
    spans = folds(levels)
    dims, outer = spans[:-1], spans[-1:]
    goes_round = all(has_own_wires(*each) and (each[0].wraps or each[0].fanout == 2) for each in dims)
    if len(dims) < 2 or not goes_round or any(level.ring for level, _ in outer):
        return None
    part, channels = nbytes / (2 * len(dims)), []
    for order in rotations(len(dims)):
        for side in range(len(BOTH_WAYS)):
            places = (*order, len(dims))
            stages = _scattering(part, [spans[place] for place in places])
            ports = tuple(_port(place, side, spans) for place in places)
            there_and_back = halves(op, stages, stages[::-1]), halves(op, ports, ports[::-1])
            channels.append(Outline(NAME, *there_and_back))
    return replace(channels[0], beside=tuple(channels[1:]))


def _port(place: int, side: int, spans: Sequence[tuple[Level, int]]) -> int:
    """Rings have wires for either way round, but of two chips one; what joins tori is used both ways round."""
    ring = spans[place][0].ring and spans[place][0].fanout > 2
    return len(BOTH_WAYS) * place + (side if ring else 0)


def _scattering(part: float, spans: Sequence[tuple[Level, int]]) -> tuple[tuple[Stage, ...], ...]:
    """What a chip sends along one level after another."""
    phases = []
    for level, inner in spans:
        part /= level.fanout
        rate = min(level.bytes_per_s, level.rate(inner))
        phases.append((Stage(level.fanout - 1, part, (Hop(level.latency_s, rate),)),))
    return tuple(phases)


SCHEDULES: Schedules = {NAME: {op: partial(schedule, op) for op in OPS}}
OUTLINES: Outlines = {NAME: {op: partial(outline, op) for op in OPS}}
