"""Rounds: what the algorithms of this package build theirs from.

Ranks have digits: with fanouts f1, f2, ... (innermost first) rank r has r % f1, r // f1 % f2, ..., as the members
of a group have in `networks.levels`. Algorithms that go digit by digit do the same on all ranks, wherever the tiers
of a network part them.
"""

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import TypeAlias

import numpy as np

from comms.collectives.outline import Outline
from comms.collectives.schedule import Channel, Op, Order, Pattern, Round, Schedule
from comms.errors import CommsError
from comms.networks.levels import Level, Levels
from comms.networks.topology import FloatArray, IntArray

Schedules: TypeAlias = Mapping[str, Mapping[Op, Callable[..., Schedule]]]
Outlines: TypeAlias = Mapping[str, Mapping[Op, Callable[..., Outline | None]]]


def check_ranks(num_ranks: int, root: int = 0, pieces: int = 1) -> None:
    """Raise CommsError unless there are ranks, the root is one, and the buffer has pieces."""
    if num_ranks < 1:
        raise CommsError(f"{num_ranks} ranks", "schedule", "a collective needs at least one rank")
    if not 0 <= root < num_ranks:
        raise CommsError(f"root {root} of {num_ranks} ranks", "schedule", "count ranks from 0")
    if pieces < 1:
        raise CommsError(f"{pieces} pieces", "schedule", "cut a buffer into at least one piece")


def schedule_of(
    op: Op,
    algorithm: str,
    num_ranks: int,
    num_chunks: int,
    rounds: Sequence[Round],
    *,
    shares: float | FloatArray | None = None,
    root: int = 0,
) -> Schedule:
    """A schedule of one channel in one phase, in one piece. Chunks are alike unless shares are given."""
    channels = (Channel((tuple(rounds),), 1, Order.SERIAL),) if rounds else ()
    share = 1.0 / num_chunks if shares is None else shares
    return Schedule(op, algorithm, num_ranks, num_chunks, share, channels, root)


def round_of(src: IntArray, dst: IntArray, chunk: IntArray, reduces: bool) -> Round:
    """A round of single chunks; those that follow each other on the same way become one message."""
    order = np.lexsort((chunk, dst, src))
    src, dst, chunk = src[order], dst[order], chunk[order]
    starts = np.ones(len(src), dtype=np.bool_)
    starts[1:] = (np.diff(src) != 0) | (np.diff(dst) != 0) | (np.diff(chunk) != 1)
    first = np.flatnonzero(starts)
    count = np.diff(np.append(first, len(src)))
    return Round(Pattern(src[first], dst[first]), chunk[first], count, reduces)


def reversed_rounds(rounds: Sequence[Round], reduces: bool) -> tuple[Round, ...]:
    """The same messages backwards: the last round first, each from its receiver to its sender.

    What gathers, backwards, scatters: whoever got a chunk once gives its part of it once.
    """
    patterns = {id(each.pattern): Pattern(each.pattern.dst, each.pattern.src) for each in rounds}
    return tuple(
        Round(patterns[id(each.pattern)], each.first, each.count, reduces) for each in reversed(rounds)
    )


def checked_fanouts(num_ranks: int, fanouts: Sequence[int] | None) -> tuple[int, ...]:
    """The fanouts above 1, or all ranks as one; CommsError where they do not make up the ranks."""
    if fanouts is None:
        return (num_ranks,) if num_ranks > 1 else ()
    if any(fanout < 1 for fanout in fanouts) or prod(fanouts) != num_ranks:
        raise CommsError(
            f"fanouts {tuple(fanouts)} do not make {num_ranks} ranks",
            "schedule",
            "their product is the ranks",
        )
    return tuple(fanout for fanout in fanouts if fanout > 1)


def inner_sizes(fanouts: Sequence[int]) -> tuple[int, ...]:
    """Per fanout, how many ranks one bunch inside it has: 1, f1, f1 * f2, ..."""
    return tuple(prod(fanouts[:index]) for index in range(len(fanouts)))


def moved(ranks: IntArray, inner: int, fanout: int, by: int | IntArray) -> IntArray:
    """Ranks whose one digit is `by` further on, around."""
    digit = ranks // inner % fanout
    there: IntArray = ranks + ((digit + by) % fanout - digit) * inner
    return there


def folds(levels: Levels) -> tuple[tuple[Level, int], ...]:
    """The levels that part anything, each with the members of one bunch inside it."""
    sizes = inner_sizes([level.fanout for level in levels])
    return tuple((level, inner) for level, inner in zip(levels, sizes, strict=True) if level.fanout > 1)
