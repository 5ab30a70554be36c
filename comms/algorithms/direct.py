"""Direct: every rank sends to every other one itself; the fewest rounds, and as many messages as pairs.

In one round a rank's messages leave one after another, first to rank + 1, then to rank + 2, ..., so that no two
ranks send to the same one at a time. With `fanouts` they count on digit by digit (`rounds.moved`): all ranks of
a host then go to different chips of the next host together. Pairwise exchange does the same in n - 1 rounds, each
of which waits for the one before (Thakur, Rabenseifner and Gropp, 2005, section 4.4).

Outlines take the schedule's fanouts to be those of the levels; levels with the same `port` share it.
"""

from collections.abc import Callable, Iterable, Sequence
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
    schedule_of,
)
from comms.collectives.outline import Hop, Outline, Stage
from comms.collectives.schedule import Op, Pattern, Round, Schedule
from comms.errors import CommsError
from comms.networks.levels import Levels, num_members
from comms.networks.topology import FloatArray, IntArray


def all_reduce(num_ranks: int, *, fanouts: Sequence[int] | None = None) -> Schedule:
    """Everyone sends all of the buffer to everyone, in one round."""
    rounds = _one_round(num_ranks, fanouts, lambda src, dst: 0 * src, reduces=True)
    return schedule_of(Op.ALL_REDUCE, "direct", num_ranks, 1, rounds)


def two_shot_all_reduce(num_ranks: int, *, fanouts: Sequence[int] | None = None) -> Schedule:
    """A direct reduce-scatter, then a direct all-gather."""
    scatter = _one_round(num_ranks, fanouts, lambda src, dst: dst, reduces=True)
    gather = tuple(Round(each.pattern, each.pattern.src, each.count, reduces=False) for each in scatter)
    return schedule_of(Op.ALL_REDUCE, "two-shot", num_ranks, num_ranks, (*scatter, *gather))


def reduce_scatter(num_ranks: int, *, fanouts: Sequence[int] | None = None) -> Schedule:
    """Everyone sends every chunk to whom it belongs, in one round."""
    rounds = _one_round(num_ranks, fanouts, lambda src, dst: dst, reduces=True)
    return schedule_of(Op.REDUCE_SCATTER, "direct", num_ranks, num_ranks, rounds)


def all_gather(num_ranks: int, *, fanouts: Sequence[int] | None = None) -> Schedule:
    """Everyone sends its chunk to everyone, in one round."""
    rounds = _one_round(num_ranks, fanouts, lambda src, dst: src, reduces=False)
    return schedule_of(Op.ALL_GATHER, "direct", num_ranks, num_ranks, rounds)


def all_to_all(num_ranks: int, *, fanouts: Sequence[int] | None = None) -> Schedule:
    """Everyone sends to everyone what is for them, in one round."""
    rounds = _one_round(num_ranks, fanouts, lambda src, dst: src * num_ranks + dst, reduces=False)
    return schedule_of(
        Op.ALL_TO_ALL, "direct", num_ranks, num_ranks**2, rounds, shares=1.0 / max(1, num_ranks)
    )


def all_to_allv(nbytes: FloatArray, *, fanouts: Sequence[int] | None = None) -> Schedule:
    """All-to-all with nbytes[s, d] from s to d; pairs with nothing send nothing.

    Its chunks' shares are of the most bytes that one rank sends: time it with `nbytes` = that.
    """
    table = np.asarray(nbytes, dtype=np.float64)
    if table.ndim != 2 or table.shape[0] != table.shape[1] or not len(table):
        raise CommsError(f"a table of {table.shape} bytes", "all_to_allv", "give one row and column per rank")
    if not np.isfinite(table).all() or (table < 0).any():
        raise CommsError("negative or unbounded bytes", "all_to_allv", "give 0 or more per pair")
    n, most = len(table), float(table.sum(axis=1).max())
    shares = table.ravel() / most if most > 0 else np.zeros(n * n)
    rounds = []
    for each in all_to_all(n, fanouts=fanouts).channels[0].rounds if n > 1 else ():
        sends = shares[each.first] > 0
        pattern = Pattern(each.pattern.src[sends], each.pattern.dst[sends])
        if sends.any():
            rounds.append(Round(pattern, each.first[sends], each.count[sends], reduces=False))
    return schedule_of(Op.ALL_TO_ALL, "direct", n, n * n, rounds, shares=shares)


def pairwise_all_to_all(
    num_ranks: int, *, fanouts: Sequence[int] | None = None, exchange: bool = False
) -> Schedule:
    """All-to-all in n - 1 rounds: in round k to the rank k further on, or with rank xor k where `exchange`."""
    check_ranks(num_ranks)
    ranks = np.arange(num_ranks)
    if exchange and num_ranks & (num_ranks - 1):
        raise CommsError(f"{num_ranks} ranks", "pairwise exchange", "a power of two, or leave exchange off")
    if exchange:
        partners: Iterable[IntArray] = (ranks ^ k for k in range(1, num_ranks))
    else:
        partners = _shifted(num_ranks, fanouts)
    one = np.ones(num_ranks, dtype=np.int64)
    rounds = [Round(Pattern(ranks, dst), ranks * num_ranks + dst, one, reduces=False) for dst in partners]
    return schedule_of(Op.ALL_TO_ALL, "pairwise", num_ranks, num_ranks**2, rounds, shares=1.0 / num_ranks)


def gather(num_ranks: int, root: int = 0) -> Schedule:
    """Everyone sends its chunk to the root, in one round."""
    check_ranks(num_ranks, root)
    others = (root + np.arange(1, num_ranks)) % num_ranks
    each = Round(Pattern(others, np.full_like(others, root)), others, np.ones_like(others), reduces=False)
    rounds = (each,) if len(others) else ()
    return schedule_of(Op.GATHER, "direct", num_ranks, num_ranks, rounds, root=root)


def scatter(num_ranks: int, root: int = 0) -> Schedule:
    """The root sends everyone its chunk, one after another."""
    check_ranks(num_ranks, root)
    others = (root + np.arange(1, num_ranks)) % num_ranks
    each = Round(Pattern(np.full_like(others, root), others), others, np.ones_like(others), reduces=False)
    rounds = (each,) if len(others) else ()
    return schedule_of(Op.SCATTER, "direct", num_ranks, num_ranks, rounds, root=root)


def one_round_outline(op: Op, nbytes: float, levels: Levels) -> Outline | None:
    """One message from everyone to everyone: the port that is done last."""
    spans = folds(levels)
    if any(level.ring for level, _ in spans):
        return None
    each = nbytes if op is Op.ALL_REDUCE else nbytes / num_members(levels)
    stages = (_last_port(levels, each, all_send=True),) if spans else ()
    return Outline("direct", (stages,), (0,))


def two_shot_outline(nbytes: float, levels: Levels) -> Outline | None:
    """Both rounds, where all of a chip's messages take as long; else it is not said which the second waits for."""
    spans = folds(levels)
    if len(spans) > 1 or any(level.ring for level, _ in spans):
        return None
    stages = (_last_port(levels, nbytes / num_members(levels), all_send=True),) * 2 if spans else ()
    return Outline("two-shot", (stages,), (0,))


def pairwise_outline(nbytes: float, levels: Levels) -> Outline | None:
    """n - 1 rounds, in each of which everyone's message crosses the same level."""
    spans = folds(levels)
    if any(level.ring for level, _ in spans):
        return None
    each = nbytes / num_members(levels)
    stages = tuple(
        Stage((level.fanout - 1) * inner, each, (Hop(level.latency_s, level.rate(inner)),))
        for level, inner in spans
    )
    return Outline("pairwise", (stages,), (0,))


def rooted_outline(op: Op, nbytes: float, levels: Levels) -> Outline | None:
    """Scatter from the first member or gather to it.

    What is gathered shares the root's ports: over more than one level, at rates that change as the near are done,
    so there is no outline.
    """
    spans = folds(levels)
    if any(level.ring for level, _ in spans) or (op is Op.GATHER and len(spans) > 1):
        return None
    each = nbytes / num_members(levels)
    stages = (_last_port(levels, each, all_send=False),) if spans else ()
    return Outline("direct", (stages,), (0,))


def _one_round(
    num_ranks: int,
    fanouts: Sequence[int] | None,
    chunk_of: Callable[[IntArray, IntArray], IntArray],
    reduces: bool,
) -> tuple[Round, ...]:
    """Everyone to everyone; chunk_of(src, dst) is what goes between them."""
    check_ranks(num_ranks)
    if num_ranks == 1:
        return ()
    dst = np.concatenate(_shifted(num_ranks, fanouts))
    src = np.tile(np.arange(num_ranks), num_ranks - 1)
    return (Round(Pattern(src, dst), chunk_of(src, dst), np.ones_like(src), reduces),)


def _shifted(num_ranks: int, fanouts: Sequence[int] | None) -> list[IntArray]:
    """For k = 1 .. n - 1, whom each rank sends to: all its digits are further on by those of k."""
    parts = checked_fanouts(num_ranks, fanouts)
    columns = []
    for k in range(1, num_ranks):
        dst = np.arange(num_ranks)
        for fanout, inner in zip(parts, inner_sizes(parts), strict=True):
            dst = moved(dst, inner, fanout, k // inner % fanout)
        columns.append(dst)
    return columns


def _last_port(levels: Levels, each: float, all_send: bool) -> Stage:
    """What leaves a port (or, gathered, enters it) up to the message that arrives last, as one message."""
    spans = folds(levels)
    used = [level.port for level, _ in spans]
    nbytes, seconds = dict.fromkeys(used, 0.0), dict.fromkeys(used, 0.0)
    stages = []
    for port, (level, inner) in zip(used, spans, strict=True):
        rate, messages = (
            level.rate(inner if all_send else 1),
            inner * (1 if level.pairs else level.fanout - 1),
        )
        nbytes[port] += messages * each
        seconds[port] += messages * each / rate
        hop = Hop(level.latency_s, nbytes[port] / seconds[port] if seconds[port] > 0 else rate)
        stages.append((level.latency_s + seconds[port], Stage(1, nbytes[port], (hop,))))
    return max(stages, key=lambda stage: stage[0])[1]


SCHEDULES: Schedules = {
    "direct": {
        Op.ALL_REDUCE: all_reduce,
        Op.REDUCE_SCATTER: reduce_scatter,
        Op.ALL_GATHER: all_gather,
        Op.ALL_TO_ALL: all_to_all,
        Op.GATHER: gather,
        Op.SCATTER: scatter,
    },
    "two-shot": {Op.ALL_REDUCE: two_shot_all_reduce},
    "pairwise": {Op.ALL_TO_ALL: pairwise_all_to_all},
}
OUTLINES: Outlines = {
    "direct": {
        Op.ALL_REDUCE: partial(one_round_outline, Op.ALL_REDUCE),
        Op.REDUCE_SCATTER: partial(one_round_outline, Op.REDUCE_SCATTER),
        Op.ALL_GATHER: partial(one_round_outline, Op.ALL_GATHER),
        Op.ALL_TO_ALL: partial(one_round_outline, Op.ALL_TO_ALL),
        Op.GATHER: partial(rooted_outline, Op.GATHER),
        Op.SCATTER: partial(rooted_outline, Op.SCATTER),
    },
    "two-shot": {Op.ALL_REDUCE: two_shot_outline},
    "pairwise": {Op.ALL_TO_ALL: pairwise_outline},
}
