"""Hierarchical, from everyone to everyone: level by level, so that fewer and larger messages leave a host.

What is for another subgroup goes first to the member of the own one that sits like its target, so that messages
between subgroups keep to their rails (PXN in NCCL). Levels that leave a chip by the same port are crossed in one
phase: to cross both would send bytes twice.

In a phase a chip's messages leave one after another, to near subgroups first, and digit by digit, as those of
`algorithms.direct` do: all of a subgroup send over the same level at a time. Outlines are exact.
"""

from collections.abc import Sequence
from functools import partial
from itertools import groupby
from math import prod
from operator import itemgetter

import numpy as np

from comms.algorithms.catalog import Algorithm, Joined, Needs, cut_by, spans
from comms.algorithms.direct import last_arrival
from comms.algorithms.hierarchical.hierarchical import Crossing, fastest_cut, most_peers, name_of, stages
from comms.algorithms.rounds import Ranks, moved, schedule_of
from comms.collectives.outline import Outline, OutlineStage
from comms.collectives.schedule import Op, Pattern, Round, Schedule
from comms.networks.groups import Level, Levels, inner_sizes

NAME = name_of((Crossing.DIRECT,))


def schedule(op: Op, ranks: Ranks) -> Schedule:
    """Outwards, each time directly to the one whose digits are those of the target. Without ports all differ."""
    n, digits = ranks.num, ranks.digits
    inner, phases = 1, []
    for places in _by_port(ranks.of_digits(ranks.ports, 0) if ranks.ports else range(len(digits))):
        crossed = tuple(digits[place] for place in places)
        phases.append((_exchanged(n, crossed, inner),))
        inner *= prod(crossed)
    return schedule_of(op, NAME, ranks, n * n, *phases, shares=1.0 / n, pieces=ranks.pieces)


def outline(op: Op, nbytes: float, levels: Levels, pieces: int = 1) -> Outline | None:
    """Two ports or more."""
    parts = spans(levels)
    ports = [level.port for level, _ in parts]
    if len(set(ports)) < 2:
        return None
    crossed = [[parts[place] for place in places] for places in _by_port(ports)]
    phases = tuple((_stage(nbytes, each),) for each in crossed)
    return Outline(NAME, phases, tuple(each[0][0].port for each in crossed), pieces)


def _by_port(ports: Sequence[int]) -> list[list[int]]:
    """Places of levels next to each other that have the same port."""
    return [[place for place, _ in alike] for _, alike in groupby(enumerate(ports), key=itemgetter(1))]


def _stage(nbytes: float, crossed: Sequence[tuple[Level, int]]) -> OutlineStage:
    """What leaves a chip in one phase, up to the message that arrives last, as one message."""
    if len(crossed) == 1:
        return stages(Crossing.DIRECT, nbytes, *crossed[0])[0]
    each, innermost = nbytes / prod(level.fanout for level, _ in crossed), crossed[0][1]
    # Near subgroups come first, so that a level ends when all before it have left; which is last depends on latencies.
    return last_arrival(
        (level, (level.fanout - 1) * inner // innermost * each, level.rate(inner)) for level, inner in crossed
    )


def _exchanged(num_ranks: int, digits: tuple[int, ...], inner: int) -> Round:
    """All chunks whose target has other digits here; their source is like the sender further out."""
    ranks, source, fanout = np.arange(num_ranks), np.arange(inner), prod(digits)
    target = np.arange(num_ranks // (inner * fanout))[:, np.newaxis] * inner * fanout
    columns = []
    for by in range(1, fanout):
        dst = ranks
        for digit, within in zip(digits, inner_sizes(digits), strict=True):
            dst = moved(dst, inner * within, digit, by // within % digit)
        to = dst % (inner * fanout)  # targets share the digits up to here
        sources = (ranks // inner * inner)[:, np.newaxis] + source
        chunk = sources[:, np.newaxis] * num_ranks + to[:, np.newaxis, np.newaxis] + target
        num = chunk[0].size
        columns.append((np.repeat(ranks, num), np.repeat(dst, num), chunk.ravel()))
    src, dst, chunk = (np.concatenate(column) for column in zip(*columns, strict=True))
    return Round(Pattern(src, dst), chunk, np.ones_like(chunk), reduces=False)


ALGORITHMS = (
    Algorithm(
        name=NAME,
        rank=6,
        ops=(Op.ALL_TO_ALL,),
        make=schedule,
        sketch=outline,
        cut=cut_by(fastest_cut, outline),
        needs=Needs(Joined.BY_SWITCH, Joined.BY_SWITCH),
        rail_aligned=True,
        is_hierarchy=True,
        peers=partial(most_peers, ways=(Crossing.DIRECT,)),
    ),
)
