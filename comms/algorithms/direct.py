"""Direct: every rank sends to every other one itself; the fewest rounds, and as many messages as pairs.

In one round a rank's messages leave one after another, first to rank + 1, then to rank + 2, ..., so that no two
ranks send to the same one at a time. With `fanouts` they count on digit by digit (`rounds.moved`): all ranks of
a host then go to different chips of the next host together. Pairwise exchange does the same in n - 1 rounds, each
of which waits for the one before (Thakur, Rabenseifner and Gropp, 2005, section 4.4).

Outlines take the schedule's fanouts to be those of the levels; levels with the same `port` share it.
"""

from collections.abc import Callable, Iterable
from dataclasses import replace
from operator import itemgetter

import numpy as np

from comms.algorithms.catalog import Algorithm, Joined, Needs, spans
from comms.algorithms.rounds import Ranks, moved, schedule_of
from comms.collectives.outline import Hop, Outline, OutlineStage
from comms.collectives.schedule import Op, Pattern, Round, Schedule
from comms.networks.groups import Level, Levels, inner_sizes, num_members
from comms.networks.topology import FloatArray, IntArray

DIRECT, TWO_SHOT, PAIRWISE = "direct", "two-shot", "pairwise"


def schedule(op: Op, ranks: Ranks) -> Schedule:
    """Everyone sends everyone what is theirs in one round; from or to a root, who is not the root nothing."""
    n = ranks.num
    if op in (Op.GATHER, Op.SCATTER):
        others = (ranks.root + np.arange(1, n)) % n
        ends = (others, np.full_like(others, ranks.root))
        pattern = Pattern(*(ends if op is Op.GATHER else ends[::-1]))
        each = Round(pattern, others, np.ones_like(others), reduces=False)
        return schedule_of(op, DIRECT, ranks, n, (each,) if len(others) else ())
    if op is Op.ALL_TO_ALL:
        rounds = _one_round(ranks, lambda src, dst: src * n + dst, reduces=False)
        return schedule_of(op, DIRECT, ranks, n**2, rounds, shares=1.0 / n)
    if op is Op.ALL_REDUCE:  # all of the buffer
        rounds = _one_round(ranks, lambda src, dst: 0 * src, reduces=True)
        return schedule_of(op, DIRECT, ranks, 1, rounds)
    scatters = op is Op.REDUCE_SCATTER
    rounds = _one_round(ranks, lambda src, dst: dst if scatters else src, reduces=scatters)
    return schedule_of(op, DIRECT, ranks, n, rounds)


def two_shot_schedule(op: Op, ranks: Ranks) -> Schedule:
    """A direct reduce-scatter, then a direct all-gather."""
    scatter = _one_round(ranks, lambda src, dst: dst, reduces=True)
    gather = tuple(Round(each.pattern, each.pattern.src, each.count, reduces=False) for each in scatter)
    return schedule_of(op, TWO_SHOT, ranks, ranks.num, (*scatter, *gather))


def all_to_allv(nbytes: FloatArray) -> Schedule:
    """All-to-all with nbytes[s, d] from s to d; pairs with nothing send nothing.

    Its chunks' shares are of the most bytes that one rank sends: time it with `nbytes` = that.
    """
    ranks, most = Ranks(len(nbytes)), float(nbytes.sum(axis=1).max())
    shares = nbytes.ravel() / most if most > 0 else np.zeros(nbytes.size)
    rounds = []
    for each in _one_round(ranks, lambda src, dst: src * ranks.num + dst, reduces=False):
        sends = shares[each.first] > 0
        pattern = Pattern(each.pattern.src[sends], each.pattern.dst[sends])
        if sends.any():
            rounds.append(Round(pattern, each.first[sends], each.count[sends], reduces=False))
    return schedule_of(Op.ALL_TO_ALL, DIRECT, ranks, nbytes.size, rounds, shares=shares)


def pairwise_schedule(op: Op, ranks: Ranks) -> Schedule:
    """All-to-all in n - 1 rounds: in round k to the rank k further on."""
    n, every = ranks.num, np.arange(ranks.num)
    one = np.ones_like(every)
    rounds = [Round(Pattern(every, dst), every * n + dst, one, reduces=False) for dst in _shifted(ranks)]
    return schedule_of(op, PAIRWISE, ranks, n**2, rounds, shares=1.0 / n)


def outline(op: Op, nbytes: float, levels: Levels) -> Outline | None:
    """One message from everyone to everyone, or from or to the first member: the port that is done last.

    What is gathered shares the root's ports: over more than one level, at rates that change as the near are done,
    so there is no outline.
    """
    parts = spans(levels)
    if op is Op.GATHER and len(parts) > 1:
        return None
    each = nbytes if op is Op.ALL_REDUCE else nbytes / num_members(levels)
    all_send = op not in (Op.GATHER, Op.SCATTER)
    return Outline(DIRECT, ((_last_port(levels, each, all_send),) if parts else (),), (0,))


def two_shot_outline(op: Op, nbytes: float, levels: Levels) -> Outline:
    """Both rounds, of one level: of several it is not said which message the second one waits for."""
    stages = (_last_port(levels, nbytes / num_members(levels), all_send=True),) * 2 if spans(levels) else ()
    return Outline(TWO_SHOT, (stages,), (0,))


def pairwise_outline(op: Op, nbytes: float, levels: Levels) -> Outline:
    """n - 1 rounds, in each of which everyone's message crosses the same level."""
    each = nbytes / num_members(levels)
    stages = tuple(
        OutlineStage((level.fanout - 1) * inner, each, (Hop(level.latency_s, level.rate(inner)),))
        for level, inner in spans(levels)
    )
    return Outline(PAIRWISE, (stages,), (0,))


def _one_round(
    ranks: Ranks, chunk_of: Callable[[IntArray, IntArray], IntArray], reduces: bool
) -> tuple[Round, ...]:
    """Everyone to everyone; chunk_of(src, dst) is what goes between them."""
    if ranks.num == 1:
        return ()
    dst = np.concatenate(_shifted(ranks))
    src = np.tile(np.arange(ranks.num), ranks.num - 1)
    return (Round(Pattern(src, dst), chunk_of(src, dst), np.ones_like(src), reduces),)


def _shifted(ranks: Ranks) -> list[IntArray]:
    """For k = 1 .. n - 1, whom each rank sends to: all its digits are further on by those of k."""
    digits = list(zip(ranks.digits, inner_sizes(ranks.digits), strict=True))
    columns = []
    for k in range(1, ranks.num):
        dst = np.arange(ranks.num)
        for fanout, inner in digits:
            dst = moved(dst, inner, fanout, k // inner % fanout)
        columns.append(dst)
    return columns


def _last_port(levels: Levels, each: float, all_send: bool) -> OutlineStage:
    """What leaves a port (or, gathered, enters it) up to the message that arrives last, as one message."""
    return last_arrival(
        (level, inner * (1 if level.pairs else level.fanout - 1) * each, level.rate(inner if all_send else 1))
        for level, inner in spans(levels)
    )


def last_arrival(sent: Iterable[tuple[Level, float, float]]) -> OutlineStage:
    """Of what leaves over one level after another (bytes, at a rate), all up to the message that arrives last, as one.

    Levels with the same port wait for each other.
    """
    before: dict[int, tuple[float, float]] = {}
    ends = []
    for level, nbytes, rate in sent:
        all_nbytes, busy_s = before.get(level.port, (0.0, 0.0))
        all_nbytes, busy_s = all_nbytes + nbytes, busy_s + nbytes / rate
        before[level.port] = all_nbytes, busy_s
        # One message that takes as long as all so far by this port, at their mean rate.
        hop = Hop(level.latency_s, all_nbytes / busy_s if busy_s > 0 else rate)
        ends.append((level.latency_s + busy_s, OutlineStage(1, all_nbytes, (hop,))))
    return max(ends, key=itemgetter(0))[1]


_SWITCHED = Needs(Joined.BY_SWITCH, Joined.BY_SWITCH, most_shared=1)
ALGORITHMS = (
    Algorithm(
        name=DIRECT,
        rank=2,
        ops=(Op.ALL_REDUCE, Op.REDUCE_SCATTER, Op.ALL_GATHER, Op.ALL_TO_ALL, Op.GATHER, Op.SCATTER),
        make=schedule,
        sketch=outline,
        needs=_SWITCHED,
        to_all_at_once=True,
    ),
    Algorithm(
        name=TWO_SHOT,
        rank=2,
        ops=(Op.ALL_REDUCE,),
        make=two_shot_schedule,
        sketch=two_shot_outline,
        needs=replace(_SWITCHED, max_levels=1),
        to_all_at_once=True,
    ),
    Algorithm(
        name=PAIRWISE,
        rank=2,
        ops=(Op.ALL_TO_ALL,),
        make=pairwise_schedule,
        sketch=pairwise_outline,
        needs=_SWITCHED,
    ),
)
