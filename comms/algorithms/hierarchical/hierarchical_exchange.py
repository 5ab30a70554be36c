"""Hierarchical, from everyone to everyone: level by level, so that fewer and larger messages leave a host.

What is for another bunch goes first to the member of the own bunch that sits like its target, so that messages between
bunches keep to their rails (PXN in NCCL). Levels that leave a chip by the same port are crossed in one phase: to cross
both would send bytes twice.

In a phase a chip's messages leave one after another, to near bunches first, and digit by digit, as those of
`algorithms.direct` do: all of a bunch send over the same level at a time. Outlines are exact.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from math import prod
from operator import itemgetter

import numpy as np

from comms.algorithms.hierarchical.hierarchical import Way, fastest_cut, name_of, stages
from comms.algorithms.rounds import (
    Outlines,
    Schedules,
    check_ranks,
    checked_fanouts,
    folds,
    inner_sizes,
    moved,
)
from comms.collectives.outline import Hop, Outline, Stage
from comms.collectives.schedule import Channel, Op, Order, Pattern, Round, Schedule
from comms.networks.levels import Level, Levels

NAME = name_of((Way.DIRECT,))


def all_to_all(
    num_ranks: int,
    *,
    fanouts: Sequence[int] | None = None,
    ports: Sequence[int] | None = None,
    pieces: int = 1,
) -> Schedule:
    """Outwards, each time directly to the one whose digits are those of the target. Without ports all differ."""
    check_ranks(num_ranks, pieces=pieces)
    parts = checked_fanouts(num_ranks, fanouts)
    given = (
        range(len(parts))
        if ports is None
        else [p for p, f in zip(ports, fanouts or (), strict=True) if f > 1]
    )
    inner, phases = 1, []
    for places in _by_port(given):
        digits = tuple(parts[place] for place in places)
        phases.append((_exchanged(num_ranks, digits, inner),))
        inner *= prod(digits)
    channels = (Channel(tuple(phases), pieces, Order.SERIAL),) if phases else ()
    return Schedule(Op.ALL_TO_ALL, NAME, num_ranks, num_ranks * num_ranks, 1.0 / num_ranks, channels)


def outline(nbytes: float, levels: Levels, *, pieces: int = 1) -> Outline | None:
    """Two ports or more; none of the levels a ring."""
    spans = folds(levels)
    ports = [level.port for level, _ in spans]
    if len(set(ports)) < 2 or any(level.ring for level, _ in spans):
        return None
    groups = [[spans[place] for place in places] for places in _by_port(ports)]
    phases = tuple((_stage(nbytes, group),) for group in groups)
    return Outline(NAME, phases, tuple(group[0][0].port for group in groups), pieces)


def best_pieces(nbytes: float, levels: Levels) -> int:
    """The best power of two of pieces."""
    return fastest_cut(lambda pieces: outline(nbytes, levels, pieces=pieces))


def _by_port(ports: Sequence[int]) -> list[list[int]]:
    """Places of levels next to each other that have the same port."""
    return [[place for place, _ in group] for _, group in groupby(enumerate(ports), key=itemgetter(1))]


def _stage(nbytes: float, group: Sequence[tuple[Level, int]]) -> Stage:
    """What leaves a chip in one phase, up to the message that arrives last, as one message."""
    if len(group) == 1:
        return stages(Way.DIRECT, nbytes, *group[0])[0]
    each, innermost = nbytes / prod(level.fanout for level, _ in group), group[0][1]
    sent, busy, ends = 0.0, 0.0, []
    for level, inner in group:
        num = (level.fanout - 1) * inner // innermost
        sent, busy = sent + num * each, busy + num * each / level.rate(inner)
        hop = Hop(level.latency_s, sent / busy if busy > 0 else level.rate(inner))
        ends.append((level.latency_s + busy, Stage(1, sent, (hop,))))
    return max(ends, key=itemgetter(0))[1]


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


SCHEDULES: Schedules = {NAME: {Op.ALL_TO_ALL: all_to_all}}
OUTLINES: Outlines = {NAME: {Op.ALL_TO_ALL: outline}}
PIECES: Mapping[str, Mapping[Op, Callable[[float, Levels], int]]] = {NAME: {Op.ALL_TO_ALL: best_pieces}}
