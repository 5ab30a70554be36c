"""Hierarchical, over tori: all wires of a torus are busy while shares of the buffer cross between tori.

As many pairs of channels as a torus has dimensions share the buffer out. Each scatters along the dimensions of its
torus, starting with another one and both ways round (`algorithms.torus_rings`), then around a ring of the chips that
sit alike in other tori, and gathers all the way back. TPU pods over a data-centre network are joined so.

Outlines have all channels side by side: they are exact where chips have their wires to themselves.
"""

from collections.abc import Sequence
from dataclasses import replace

from comms.algorithms.catalog import Algorithm, Joined, Needs, spans
from comms.algorithms.hierarchical.hierarchical import is_ring
from comms.algorithms.rounds import Ranks
from comms.algorithms.torus_rings import BOTH_WAYS, halves, has_own_wires, rotations, scattering_and_gathering
from comms.collectives.outline import Hop, Outline, OutlineStage
from comms.collectives.schedule import Op, Schedule
from comms.networks.levels import Level, Levels

NAME = "hierarchical rotated torus"
OPS = (Op.ALL_REDUCE, Op.REDUCE_SCATTER, Op.ALL_GATHER)


def schedule(op: Op, ranks: Ranks) -> Schedule:
    """One of OPS; the last fanout joins tori, the others are their dimensions."""
    digits = ranks.digits
    outermost = len(digits) - 1
    orders = [(*order, outermost) for order in rotations(outermost)] or rotations(len(digits))
    return scattering_and_gathering(op, NAME, digits, orders)


def outline(op: Op, nbytes: float, levels: Levels) -> Outline | None:
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
            stages = _scattering(part, [parts[place] for place in places])
            ports = tuple(_port(place, side, parts) for place in places)
            there_and_back = halves(op, stages, stages[::-1]), halves(op, ports, ports[::-1])
            channels.append(Outline(NAME, *there_and_back))
    return replace(channels[0], beside=tuple(channels[1:]))


def _port(place: int, side: int, parts: Sequence[tuple[Level, int]]) -> int:
    """Rings have wires for either way round, but of two chips one; what joins tori is used both ways round."""
    ring = is_ring(parts[place][0])
    return len(BOTH_WAYS) * place + (side if ring else 0)


def _scattering(part: float, parts: Sequence[tuple[Level, int]]) -> tuple[tuple[OutlineStage, ...], ...]:
    """What a chip sends along one level after another."""
    phases = []
    for level, inner in parts:
        part /= level.fanout
        rate = min(level.bytes_per_s, level.rate(inner))
        phases.append((OutlineStage(level.fanout - 1, part, (Hop(level.latency_s, rate),)),))
    return tuple(phases)


ALGORITHMS = (
    Algorithm(
        name=NAME,
        rank=9,
        ops=OPS,
        make=schedule,
        sketch=outline,
        needs=Needs(Joined.IN_RING, least=3, most_shared=0),
        rail_aligned=True,
    ),
)
