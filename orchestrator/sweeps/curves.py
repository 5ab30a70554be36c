"""Curves: what the points of a series say of scaling. Pure functions of chips and throughput.

Throughput is what is processed a second, over all chips. Against the smallest number of chips n0 of a series:

- speed-up of n chips: throughput(n) / throughput(n0); ideal n / n0.
- efficiency: speed-up / (n / n0), which is throughput per chip over that on n0 chips.
- gain of a doubling from n to n': (throughput(n') / throughput(n)) ** (1 / log2(n' / n)) - 1; ideal 100 %.
- knee: the fewest chips from which on a doubling gains less than `GAIN`.

They read the same for weak and for strong scaling, as throughput counts work: with the batch per chip fixed efficiency
is T(n0) / T(n), with the batch fixed it is T(n0) n0 / (T(n) n). Where Amdahl's law holds (1967), f being the serial
share of the work on one chip, speed-up is n / (1 + f (n - 1)), and the knee follows from f.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import log2

GAIN = 0.10


@dataclass(frozen=True, slots=True)
class CurvePoint:
    """A point of a series that fits."""

    chips: int
    rate: float  # throughput
    speed_up: float
    efficiency: float
    gain: float | None  # of a doubling from the point before; None at the first


def curve(rates: Sequence[tuple[int, float]]) -> tuple[CurvePoint, ...]:
    """The curve through (chips, throughput), few chips first."""
    found: list[CurvePoint] = []
    for chips, rate in rates:
        first, first_rate = rates[0]
        speed_up = rate / first_rate
        gain = doubling_gain(found[-1].chips, found[-1].rate, chips, rate) if found else None
        found.append(CurvePoint(chips, rate, speed_up, speed_up * first / chips, gain))
    return tuple(found)


def doubling_gain(chips: int, rate: float, more: int, faster: float) -> float:
    """What a doubling adds on the way from a number of chips to more."""
    return float((faster / rate) ** (1 / log2(more / chips))) - 1.0


def knee(points: Sequence[CurvePoint], gain: float = GAIN) -> int | None:
    """Chips beyond which every doubling gains less than `gain`; None: the last one still gained as much."""
    found: int | None = None
    for before, point in pairwise(points):
        if point.gain is not None and point.gain < gain:
            found = before.chips if found is None else found
        else:
            found = None
    return found
