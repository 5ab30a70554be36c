"""Bruck: ranks exchange with those 1, 2, 4, ... further on, around; few rounds for any number of ranks.

All-gather and all-to-all after Bruck, Ho, Kipnis, Upfal and Weathersby (IEEE Transactions on Parallel and
Distributed Systems 8, 1997), with ceil(log2 n) rounds. Backwards, the all-gather is a reduce-scatter, and both are
an all-reduce of 2 ceil(log2 n) rounds that moves every byte twice, powers of two or not (Traff, 2024, "Optimal,
Non-pipelined Reduce-scatter and Allreduce Algorithms"). With nothing to send, it is the dissemination barrier
(Hensgen, Finkel and Manber, International Journal of Parallel Programming 17, 1988).

With `fanouts` they go digit by digit, the outermost first where they gather, so that all ranks cross the same
tier of a network in every round and what crosses the outer ones is least. The all-to-all moves what has furthest
to go first, which keeps what goes together in one piece. Outlines take the fanouts to be those of the levels.
"""

from collections.abc import Sequence
from functools import partial

import numpy as np

from comms.algorithms.rounds import (
    Outlines,
    Schedules,
    check_ranks,
    checked_fanouts,
    folds,
    inner_sizes,
    moved,
    reversed_rounds,
    round_of,
    schedule_of,
)
from comms.collectives.outline import Hop, Outline, Stage
from comms.collectives.schedule import Op, Pattern, Round, Schedule
from comms.networks.levels import Levels, num_members


def all_gather(num_ranks: int, *, fanouts: Sequence[int] | None = None) -> Schedule:
    """In each round a rank gets as much again as it has."""
    return schedule_of(Op.ALL_GATHER, "bruck", num_ranks, num_ranks, _gather(num_ranks, fanouts))


def reduce_scatter(num_ranks: int, *, fanouts: Sequence[int] | None = None) -> Schedule:
    """The all-gather backwards."""
    rounds = reversed_rounds(_gather(num_ranks, fanouts), reduces=True)
    return schedule_of(Op.REDUCE_SCATTER, "bruck", num_ranks, num_ranks, rounds)


def all_reduce(num_ranks: int, *, fanouts: Sequence[int] | None = None) -> Schedule:
    """The reduce-scatter, then the all-gather."""
    gather = _gather(num_ranks, fanouts)
    rounds = (*reversed_rounds(gather, reduces=True), *gather)
    return schedule_of(Op.ALL_REDUCE, "bruck", num_ranks, num_ranks, rounds)


def barrier(num_ranks: int, *, fanouts: Sequence[int] | None = None) -> Schedule:
    """After the last round everyone has heard of everyone."""
    rounds = _gather(num_ranks, fanouts)
    return schedule_of(Op.BARRIER, "dissemination", num_ranks, num_ranks, rounds, shares=0.0)


def all_to_all(num_ranks: int, *, fanouts: Sequence[int] | None = None) -> Schedule:
    """What has 2^j in the distance it still has to go moves on by 2^j."""
    check_ranks(num_ranks)
    parts = checked_fanouts(num_ranks, fanouts)
    chunk = np.arange(num_ranks**2)
    here, target, rounds = chunk // num_ranks, chunk % num_ranks, []
    for fanout, inner in reversed(list(zip(parts, inner_sizes(parts), strict=True))):
        distance = (target // inner - here // inner) % fanout
        for step in reversed(_steps(fanout)):
            moves = np.flatnonzero(distance & step)
            there = moved(here[moves], inner, fanout, step)
            rounds.append(round_of(here[moves], there, chunk[moves], reduces=False))
            here[moves] = there
    return schedule_of(Op.ALL_TO_ALL, "bruck", num_ranks, num_ranks**2, rounds, shares=1.0 / num_ranks)


def gather_outline(op: Op, nbytes: float, levels: Levels) -> Outline | None:
    """All-gather, reduce-scatter, all-reduce or barrier."""
    spans = folds(levels)
    if any(level.ring for level, _ in spans):
        return None
    held = 0.0 if op is Op.BARRIER else nbytes / num_members(levels)
    gather: list[Stage] = []
    for level, inner in reversed(spans):
        hop = Hop(level.latency_s, level.rate(inner))
        windows = [min(step, level.fanout - step) for step in _steps(level.fanout)]
        gather.extend(Stage(1, held * window, (hop,)) for window in windows)
        held *= level.fanout
    stages = {Op.REDUCE_SCATTER: gather[::-1], Op.ALL_REDUCE: gather[::-1] + gather}.get(op, gather)
    return Outline("dissemination" if op is Op.BARRIER else "bruck", (tuple(stages),), (0,))


def all_to_all_outline(nbytes: float, levels: Levels) -> Outline | None:
    """In the round of 2^j everyone sends what has 2^j in its distance."""
    spans = folds(levels)
    if any(level.ring for level, _ in spans):
        return None
    stages = []
    for level, inner in reversed(spans):
        hop = Hop(level.latency_s, level.rate(inner))
        for step in reversed(_steps(level.fanout)):
            moving = sum(1 for distance in range(level.fanout) if distance & step)
            stages.append(Stage(1, nbytes * moving / level.fanout, (hop,)))
    return Outline("bruck", (tuple(stages),), (0,))


def _steps(fanout: int) -> tuple[int, ...]:
    return tuple(1 << bit for bit in range((fanout - 1).bit_length()))


def _gather(num_ranks: int, fanouts: Sequence[int] | None) -> tuple[Round, ...]:
    """Everyone sends what it has of the current digit to the rank `step` before it."""
    check_ranks(num_ranks)
    parts = checked_fanouts(num_ranks, fanouts)
    if len(parts) == 1:
        return _around(num_ranks)
    ranks, rounds = np.arange(num_ranks), []
    for fanout, inner in reversed(list(zip(parts, inner_sizes(parts), strict=True))):
        size = inner * fanout  # bunches of this size are done with; everyone has the same of each of them
        for step in _steps(fanout):
            window = np.arange(min(step, fanout - step))
            own = ranks[:, np.newaxis, np.newaxis]
            bunches = np.arange(0, num_ranks, size)[np.newaxis, :, np.newaxis]
            chunk = bunches + moved(own, inner, fanout, window) % size
            src = np.broadcast_to(own, chunk.shape).ravel()
            rounds.append(round_of(src, moved(src, inner, fanout, -step), chunk.ravel(), reduces=False))
    return tuple(rounds)


def _around(num_ranks: int) -> tuple[Round, ...]:
    """One digit: all that a rank has is its own chunk and those that follow, in one message."""
    ranks = np.arange(num_ranks)
    return tuple(
        Round(
            Pattern(ranks, (ranks - step) % num_ranks),
            ranks,
            np.full(num_ranks, min(step, num_ranks - step)),
            reduces=False,
        )
        for step in _steps(num_ranks)
    )


SCHEDULES: Schedules = {
    "bruck": {
        Op.ALL_GATHER: all_gather,
        Op.REDUCE_SCATTER: reduce_scatter,
        Op.ALL_REDUCE: all_reduce,
        Op.ALL_TO_ALL: all_to_all,
    },
    "dissemination": {Op.BARRIER: barrier},
}
OUTLINES: Outlines = {
    "bruck": {
        Op.ALL_GATHER: partial(gather_outline, Op.ALL_GATHER),
        Op.REDUCE_SCATTER: partial(gather_outline, Op.REDUCE_SCATTER),
        Op.ALL_REDUCE: partial(gather_outline, Op.ALL_REDUCE),
        Op.ALL_TO_ALL: all_to_all_outline,
    },
    "dissemination": {Op.BARRIER: partial(gather_outline, Op.BARRIER)},
}
