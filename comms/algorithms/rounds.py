"""Rounds: what the algorithms of this package build their schedules from.

Ranks have digits: with fanouts f1, f2, ... (innermost first) rank r has r % f1, r // f1 % f2, ..., as the members
of a group have in `networks.groups`. Algorithms that go digit by digit do the same on all ranks, wherever the tiers
of a network part them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from comms.collectives.schedule import Channel, Op, Pattern, PieceOrder, Round, Schedule
from comms.networks.groups import Levels
from comms.networks.topology import FloatArray, IntArray, run_starts

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Ranks:
    """For whom a schedule is made. Of each fanout may be known whether its subgroups stand in a ring and reach their
    neighbours only, whether the last of these is a neighbour of the first, and by which port messages between them
    leave.
    """

    num: int
    root: int = 0
    fanouts: tuple[int, ...] = ()  # innermost first; none: all ranks are one digit
    rings: tuple[bool, ...] = ()
    wraps: tuple[bool, ...] = ()
    ports: tuple[int, ...] = ()
    pieces: int = 1  # that the buffer is cut into

    @classmethod
    def over(cls, levels: Levels, num: int, pieces: int = 1) -> "Ranks":
        """The members of a group that folds into levels; one flat level if there are none."""
        return cls(
            num,
            fanouts=tuple(level.fanout for level in levels),
            # Of two in a ring each has the other for both neighbours: all reach each other.
            rings=tuple(level.ring and level.fanout > 2 for level in levels),
            wraps=tuple(level.wraps for level in levels),
            ports=tuple(level.port for level in levels),
            pieces=pieces,
        )

    @property
    def digits(self) -> tuple[int, ...]:
        """The fanouts that part anything."""
        return tuple(fanout for fanout in self.fanouts or (self.num,) if fanout > 1)

    def of_digits(self, given: Sequence[T], otherwise: T) -> tuple[T, ...]:
        """What is given of each of these; `otherwise` where nothing is."""
        known = given or (otherwise,) * len(self.fanouts or (self.num,))
        return tuple(
            each for each, fanout in zip(known, self.fanouts or (self.num,), strict=True) if fanout > 1
        )


def schedule_of(
    op: Op,
    algorithm: str,
    ranks: Ranks,
    num_chunks: int,
    *phases: Sequence[Round],
    shares: float | FloatArray | None = None,
    pieces: int = 1,
) -> Schedule:
    """A schedule of one channel; a piece crosses a phase before the next one does.

    Chunks are alike unless shares are given.
    """
    made = tuple(tuple(phase) for phase in phases if phase)
    channels = (Channel(made, pieces, PieceOrder.SERIAL),) if made else ()
    share = 1.0 / num_chunks if shares is None else shares
    return Schedule(op, algorithm, ranks.num, num_chunks, share, channels, ranks.root)


def round_of(src: IntArray, dst: IntArray, chunk: IntArray, reduces: bool) -> Round:
    """A round of single chunks; those that follow each other on the same way become one message."""
    order = np.lexsort((chunk, dst, src))
    src, dst, chunk = src[order], dst[order], chunk[order]
    first = run_starts(src, dst, chunk - np.arange(len(chunk)))
    count = np.diff(first, append=len(src))
    return Round(Pattern(src[first], dst[first]), chunk[first], count, reduces)


def reversed_rounds(rounds: Sequence[Round], reduces: bool) -> tuple[Round, ...]:
    """The same messages backwards: the last round first, each from its receiver to its sender.

    What gathers, backwards, scatters: whoever got a chunk once gives its part of it once.
    """
    patterns = {id(each.pattern): Pattern(each.pattern.dst, each.pattern.src) for each in rounds}
    return tuple(
        Round(patterns[id(each.pattern)], each.first, each.count, reduces) for each in reversed(rounds)
    )


def halves(op: Op, scatter: tuple[T, ...], gather: tuple[T, ...]) -> tuple[T, ...]:
    """What of both an all-reduce, or either half of it, is made of."""
    return (scatter if op is not Op.ALL_GATHER else ()) + (gather if op is not Op.REDUCE_SCATTER else ())


def moved(ranks: IntArray, inner: int, fanout: int, by: int | IntArray) -> IntArray:
    """Ranks whose one digit is `by` further on, around."""
    digit = ranks // inner % fanout
    there: IntArray = ranks + ((digit + by) % fanout - digit) * inner
    return there
