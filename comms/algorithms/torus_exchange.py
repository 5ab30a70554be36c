"""All-to-all on tori, dimension by dimension, with neighbours only.

Along a ring of f chips everything goes the shorter way, one chip a round: in round s of f // 2 every chip passes on
what still has that far to go, both ways at once. What goes to the far side of an even ring goes half each way. With
h = f // 2 and blocks of nbytes / f, a wire carries h - s + 1 blocks in round s, half a block less where f is even,
f / 8 of nbytes in all, which is what the halves of a ring have to exchange. (Lam, Huang and Sadayappan, Journal of
Parallel and Distributed Computing 43, 1997.)

Only one dimension's wires are busy at a time. Rotated, there are as many channels as dimensions, each beginning
with another one, so that all wires are busy.

All chips do the same, so outlines are exact for rings of chips with a wire of their own to each neighbour; there
is none for lines, whose middle carries most. Channels that meet on a dimension share it, which the outline has side
by side. Chunks are followed one by one, which takes memory for the square of the ranks.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import numpy as np

from comms.algorithms.catalog import Algorithm, Joined, Needs, spans
from comms.algorithms.rounds import Ranks, moved, round_of
from comms.algorithms.torus_rings import has_own_wires
from comms.collectives.outline import Hop, Outline, OutlineStage
from comms.collectives.schedule import Channel, Op, Pattern, Round, Schedule
from comms.errors import TooManyMessages
from comms.networks.groups import Level, Levels, inner_sizes
from comms.networks.topology import IntArray

SHIFT, ROTATED_SHIFT = "torus shift", "rotated torus shift"
MOST_CHUNKS = 2**23  # some 1 GB


def schedule(op: Op, ranks: Ranks, *, rotated: bool = False) -> Schedule:
    """From the outermost dimension inwards, as what goes to one subgroup is one range of chunks."""
    n, digits = ranks.num, ranks.digits
    orders = _orders(len(digits), rotated)
    halves = 2 if any(_has_far_side(fanout) for fanout in digits) else 1
    per_pair = max(1, halves * len(orders))
    num_chunks = n**2 * per_pair
    if num_chunks > MOST_CHUNKS:
        problem = f"{n} ranks exchange {num_chunks} chunks"
        raise TooManyMessages(
            problem, _name(rotated), "ask for folded, or for an algorithm that sends directly"
        )
    chunks = np.arange(num_chunks).reshape(n**2, -1, halves)
    channels = tuple(
        Channel(_phases(chunks[:, number], digits, order)) for number, order in enumerate(orders)
    )
    return Schedule(op, _name(rotated), n, num_chunks, 1.0 / (n * per_pair), channels)


def outline(op: Op, nbytes: float, levels: Levels, *, rotated: bool = False) -> Outline | None:
    """Over rings that close, with wires of the chips' own."""
    parts = spans(levels)
    if not all(has_own_wires(*each) and (each[0].wraps or each[0].fanout == 2) for each in parts):
        return None
    orders = _orders(len(parts), rotated)
    if len({(level.fanout, level.latency_s, level.bytes_per_s) for level, _ in parts}) == 1:
        orders = orders[:1]  # alike, they never meet
    part = nbytes / len(parts) if rotated else nbytes
    channels = [
        Outline(_name(rotated), tuple(_stages(part, parts[dim][0]) for dim in order), order)
        for order in orders
    ]
    return replace(channels[0], beside=tuple(channels[1:]))


def _name(rotated: bool) -> str:
    return ROTATED_SHIFT if rotated else SHIFT


def _has_far_side(fanout: int) -> bool:
    """Whether a chip is as far away one way round as the other, by different wires."""
    return fanout % 2 == 0 and fanout > 2


def _orders(num_dims: int, rotated: bool) -> tuple[tuple[int, ...], ...]:
    """Per channel the dimensions in order: from the outermost, or from another one, inwards and around."""
    dims = range(num_dims)
    orders = tuple(tuple((first - place) % num_dims for place in dims) for first in reversed(dims))
    return orders if rotated else orders[:1]


def _stages(nbytes: float, level: Level) -> tuple[OutlineStage, ...]:
    """What goes one way round, in each round what still has to go on."""
    hop = Hop(level.latency_s, level.bytes_per_s)
    last = 0.5 if _has_far_side(level.fanout) else 1.0
    blocks = [further + last for further in reversed(range(level.fanout // 2))]
    return tuple(OutlineStage(1, each * nbytes / level.fanout, (hop,)) for each in blocks)


def _phases(chunks: IntArray, fanouts: Sequence[int], order: Sequence[int]) -> tuple[tuple[Round, ...], ...]:
    """Chunks [pairs, halves]: the first half of what goes to the far side goes up, the second one down."""
    num_pairs, halves = chunks.shape
    num_ranks = round(num_pairs**0.5)
    here, target = (np.repeat(each, halves) for each in np.divmod(np.arange(num_pairs), num_ranks))
    goes_up = np.tile(np.arange(halves) == 0, num_pairs)
    patterns: dict[bytes, Pattern] = {}
    phases = []
    for dim in order:
        fanout, inner = fanouts[dim], inner_sizes(fanouts)[dim]
        up = (target // inner - here // inner) % fanout
        # The far side of an even ring is as near either way: half of it goes up. Two chips have one wire each way.
        rises = (2 * up < fanout) | ((2 * up == fanout) & (goes_up | (fanout == 2)))
        hops = np.where(rises, up, up - fanout)
        rounds = []
        for each in range(fanout // 2):
            going = np.flatnonzero(np.abs(hops) > each)
            there = moved(here[going], inner, fanout, np.sign(hops[going]))
            made = round_of(here[going], there, chunks.ravel()[going], reduces=False)
            ends = made.pattern.src.tobytes() + made.pattern.dst.tobytes()
            rounds.append(replace(made, pattern=patterns.setdefault(ends, made.pattern)))
            here[going] = there
        phases.append(tuple(rounds))
    return tuple(phases)


_SHIFT = Algorithm(
    name=SHIFT,
    rank=12,
    ops=(Op.ALL_TO_ALL,),
    make=schedule,
    sketch=outline,
    needs=Needs(Joined.IN_RING, Joined.IN_RING, min_levels=1),
)
ALGORITHMS = (
    _SHIFT,
    replace(
        _SHIFT,
        name=ROTATED_SHIFT,
        make=partial(schedule, rotated=True),
        sketch=partial(outline, rotated=True),
        needs=replace(_SHIFT.needs, min_levels=2),
    ),
)
