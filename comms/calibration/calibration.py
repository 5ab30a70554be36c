"""Calibration: a fabric's few constants from what a collective or a message took on it, and what they predict.

A collective of an operation over n chips takes

    seconds = setup_s + min over algorithms and protocols of
        pipelined   (sqrt(stages * latency) + sqrt(wire_bytes / rate)) ** 2
        eager        stages * latency + wire_bytes / (rate * eager share)

The first is a chain of `stages` hops through which the buffer passes in pieces of the best size: m pieces take
(stages + m) * (latency + wire_bytes / (m * rate)), least at m = sqrt(stages * wire_bytes / (latency * rate));
linear pipelines and pipelined double trees alike have this form (Sanders, Speck, Traff, Two-tree algorithms for
full bandwidth broadcast, reduction and scan, Parallel Computing 35, 2009). The second sends everything at once:
it pays with bandwidth instead of waiting, as NCCL's LL. `setup_s` is what every collective costs whatever its
size: launch and synchronisation.

Stages and bytes on a chip's wire, for a buffer of B bytes:

    ring         all_reduce 2 (n-1) and 2 B (n-1) / n; all_gather, reduce_scatter, all_to_all n-1 and
                 B (n-1) / n; broadcast and reduce n-1 and B
    in network   a switch adds or copies: all_reduce B (n+1) / n (all send B and the sum of their own n-th comes
                 back, then that n-th goes up and B comes down), all else B; always IN_NETWORK_STAGES

The constants have no size in them: `share` is of the sheet's line rate, latencies are per stage. So they carry
over to another number of chips, another operation, and another fabric by its sheet (`transfer`).

Not modelled: where a library chooses a slower protocol than it could (steps down in measured curves), piece
sizes bounded by its buffers, several tiers in one curve (the slowest of them is what is fitted), contention.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import TypeAlias

import numpy as np
from scipy.optimize import least_squares

from comms.algorithms.in_network import IN_NETWORK_STAGES
from comms.calibration.measured_tables import MeasuredCurve, MeasuredPoint
from comms.collectives.schedule import Op
from comms.errors import CommsError
from comms.networks.links import Link, Protocol
from comms.networks.topology import FloatArray

LARGE_NBYTES = 2**20  # errors are stated from here up and below: where bandwidth and where latency rules

# What is believed before measuring, as (centre, width in ln): latency of all stages over setup, and the eager
# share. Wide, and worth no more than one point of a table each; it decides only what a table leaves open, such as
# the latency where no small sizes were measured.
_LATENCY_BELIEF = (0.2, 1.0)
_EAGER_BELIEF = (0.5, 1.5)
_MISFIT = 0.05  # what no curve is smoother than: the relative error of one point, on top of its rounding


@dataclass(frozen=True, slots=True)
class Sheet:
    """What a data sheet says of a fabric."""

    bytes_per_s: float | None  # line rate of a chip's links that the collective can use, one direction
    in_network_share: float | None = None  # of that rate through switches that reduce; none: they do not


@dataclass(frozen=True, slots=True)
class MeasuredRun:
    """A measured curve and the sheet of what it was measured on."""

    curve: MeasuredCurve
    sheet: Sheet


@dataclass(frozen=True, slots=True)
class CalibratedFabric:
    """A calibrated fabric, ready to predict. Of `link`, the rate is what a chip gets; protocols add to it."""

    setup_s: float
    link: Link
    pipelined: Protocol
    eager: Protocol | None = None
    in_network_share: float | None = None


@dataclass(frozen=True, slots=True)
class Constants:
    """All that is fitted: three numbers, or five with an eager protocol."""

    setup_s: float
    latency_s: float  # per stage
    share: float  # of the line rate
    eager_share: float | None = None  # of that, for the eager protocol
    handshake_s: float = 0.0  # per stage, on top of latency_s, for the pipelined protocol

    @property
    def num_constants(self) -> int:
        return 3 if self.eager_share is None else 5

    def on(self, sheet: Sheet) -> CalibratedFabric:
        """These constants on links of this line rate."""
        if sheet.bytes_per_s is None:
            raise CommsError(
                "the sheet has no line rate", hint="give the rate of a chip's links, like 450 GB/s"
            )
        eager = None if self.eager_share is None else Protocol("eager", share=self.eager_share)
        link = Link(self.latency_s, self.share * sheet.bytes_per_s)
        pipelined = Protocol("pipelined", latency_s=self.handshake_s)
        return CalibratedFabric(self.setup_s, link, pipelined, eager, sheet.in_network_share)


@dataclass(frozen=True, slots=True)
class Residual:
    """One measured size, and what the constants make of it."""

    nbytes: float
    measured_s: float
    predicted_s: float

    @property
    def error(self) -> float:
        """Relative, above zero where the prediction is too slow."""
        return self.predicted_s / self.measured_s - 1


@dataclass(frozen=True, slots=True)
class FabricFit:
    """Constants, the fabrics that they were fitted on, and what is left over, curve by curve."""

    constants: Constants
    fabrics: tuple[CalibratedFabric, ...]  # one per run
    residuals: tuple[tuple[Residual, ...], ...]
    knows_line_rate: bool  # if not, `share` is of the best rate seen, and says nothing of another fabric


@dataclass(frozen=True, slots=True)
class LinkFit:
    """Latency and rate of messages from chip to chip, and what is left over."""

    link: Link
    residuals: tuple[Residual, ...]


_Geometry: TypeAlias = tuple[float, float, float]  # stages, wire bytes per byte, share of the rate


def fit_fabric(runs: Sequence[MeasuredRun], eager: bool = False) -> FabricFit:
    """The constants that fit these runs of one fabric best, in mean relative error.

    Least squares on the logarithm of time with soft-L1 loss, from a fixed grid of starts: the same runs give the
    same constants. Three constants; five with `eager`, for a table with many sizes below a MiB, or with several
    numbers of chips. Runs differ in operation, number of chips and sheet as they like.
    """
    # Constants are fitted as logarithms: none can turn negative, and errors count relative to what was measured.
    _check(runs, eager)
    knows = runs[0].sheet.bytes_per_s is not None
    runs = runs if knows else [_with_best_rate(run) for run in runs]
    points = [point for run in runs for point in run.curve.points]
    shortest = min(point.seconds for point in points)
    stages = float(np.median([_geometries(run)[-1][0] for run in runs for _ in run.curve.points]))
    beliefs = [(math.log(stages), _LATENCY_BELIEF)] * (2 if eager else 1)
    targets, weights = np.log([point.seconds for point in points]), np.array(list(map(_weight, points)))

    # Beliefs are residuals like those of points, so that a table with small sizes overrules them and one without does
    # not leave the latency open.
    def left_over(logs: FloatArray) -> FloatArray:
        constants = _constants(logs)
        found = [predict(constants.on(run.sheet), *_what(run.curve)) for run in runs]
        prior = [
            (shift + log - logs[0] - math.log(centre)) / width
            for (shift, (centre, width)), log in zip(beliefs, (logs[1], logs[-1]), strict=False)
        ]
        if eager:
            prior.append((logs[3] - math.log(_EAGER_BELIEF[0])) / _EAGER_BELIEF[1])
        return np.concatenate([weights * (np.log(np.concatenate(found)) - targets), prior])

    # The least of several curves has more than one valley: from a few starts, and always the same, the best is kept.
    starts = [
        [setup * shortest, latency * shortest / stages, share, *rest]
        for setup, latency, share, rest in product(
            (0.3, 0.9), (0.03, 0.3), (0.6, 0.9), _eager_starts(shortest / stages) if eager else [[]]
        )
    ]
    # Nobody gets more than the line rate. Where that is only the best rate seen, a curve still rising may reach more.
    ceiling = 1.0 if knows else 2.0
    low = [1e-3 * shortest, 1e-6 * shortest, 0.01, 0.003, 1e-6 * shortest][: 5 if eager else 3]
    high = [2 * shortest, 10 * shortest, ceiling, 1.0, 10 * shortest][: 5 if eager else 3]
    constants = _constants(_best(left_over, starts, low, high))
    fabrics = tuple(constants.on(run.sheet) for run in runs)
    residuals = tuple(residuals_of(fabric, run.curve) for fabric, run in zip(fabrics, runs, strict=True))
    return FabricFit(constants, fabrics, residuals, knows)


def hold_out(
    runs: Sequence[MeasuredRun], eager: bool = False, first: int = 1
) -> tuple[tuple[Residual, ...], ...]:
    """What a fit to every second point (all but first, first + 2, ...) leaves at those it has not seen."""
    kept, unseen = [], []
    for run in runs:
        points = run.curve.points
        kept.append(MeasuredRun(replace(run.curve, points=points[1 - first :: 2]), run.sheet))
        unseen.append(replace(run.curve, points=points[first::2]))
    fit = fit_fabric(kept, eager)
    return tuple(residuals_of(fabric, curve) for fabric, curve in zip(fit.fabrics, unseen, strict=True))


def transfer(fit: FabricFit, sheet: Sheet) -> CalibratedFabric:
    """Another fabric, from this one's constants and its own sheet."""
    if not fit.knows_line_rate:
        raise CommsError(
            "the constants were fitted without a line rate, so they hold for that fabric only",
            hint="give the line rate of the fabric that was measured",
        )
    return fit.constants.on(sheet)


def predict(fabric: CalibratedFabric, op: Op, num_chips: int, nbytes: FloatArray) -> FloatArray:
    """[sizes] Seconds of one collective per size, by its fastest algorithm and protocol."""
    # A library is taken to choose the fastest of what it has at every size, which real ones do not quite.
    found = []
    for stages, wire, share in geometries(op, num_chips, fabric.in_network_share):
        link = fabric.pipelined.on(fabric.link)
        moving = nbytes * wire / (share * link.bytes_per_s)
        found.append((np.sqrt(stages * link.latency_s) + np.sqrt(moving)) ** 2)
        if fabric.eager is not None:
            link = fabric.eager.on(fabric.link)
            found.append(stages * link.latency_s + nbytes * wire / (share * link.bytes_per_s))
    fastest: FloatArray = np.minimum.reduce(found)
    return fabric.setup_s + fastest


def geometries(op: Op, num_chips: int, in_network_share: float | None) -> list[_Geometry]:
    """Per algorithm: stages, bytes on a chip's wire per byte of the buffer, and the share of the rate it gets."""
    n = num_chips
    if op is Op.ALL_REDUCE:
        found = [(2.0 * (n - 1), 2.0 * (n - 1) / n, 1.0)]
    elif op in (Op.BROADCAST, Op.REDUCE):
        found = [(n - 1.0, 1.0, 1.0)]
    elif op is Op.BARRIER:
        raise CommsError("a barrier moves no bytes", hint="calibrate with an all_reduce of 8 bytes and more")
    else:
        found = [(n - 1.0, (n - 1.0) / n, 1.0)]
    reduces = (Op.ALL_REDUCE, Op.ALL_GATHER, Op.REDUCE_SCATTER, Op.BROADCAST, Op.REDUCE)
    if in_network_share is not None and op in reduces:
        wire = (n + 1.0) / n if op is Op.ALL_REDUCE else 1.0
        found.append((IN_NETWORK_STAGES, wire, in_network_share))
    return found


def residuals_of(fabric: CalibratedFabric, curve: MeasuredCurve) -> tuple[Residual, ...]:
    """Measured against predicted, size by size."""
    found = predict(fabric, *_what(curve))
    pairs = zip(curve.points, found, strict=True)
    return tuple(Residual(point.nbytes, point.seconds, float(seconds)) for point, seconds in pairs)


def mean_error(residuals: Iterable[Residual], from_nbytes: float = 0.0, below: float = math.inf) -> float:
    """Mean absolute relative error over sizes in [from_nbytes, below); NaN where there are none."""
    errors = [abs(each.error) for each in residuals if from_nbytes <= each.nbytes < below]
    return math.fsum(errors) / len(errors) if errors else math.nan


def fit_link(points: Sequence[MeasuredPoint]) -> LinkFit:
    """Latency and rate of point-to-point messages: Hockney's two numbers, in least relative error."""
    if len({point.nbytes for point in points}) < 2:
        raise CommsError("latency and rate need two sizes", hint="measure from a few bytes to some MiB")
    nbytes = np.array([point.nbytes for point in points])
    seconds = np.array([point.seconds for point in points])
    weights = np.array([_weight(point) for point in points])
    # Scales of the problem, from which it starts and which bound it: the fastest message, and the best rate of any.
    fastest, rate = float(seconds.min()), float((nbytes / seconds).max())

    def left_over(logs: FloatArray) -> FloatArray:
        found: FloatArray = np.log(np.exp(logs[0]) + nbytes / np.exp(logs[1])) - np.log(seconds)
        return weights * found

    starts = [[share * fastest, factor * rate] for share in (0.1, 0.9) for factor in (1.0, 1.2)]
    logs = _best(left_over, starts, [1e-6 * fastest, 0.1 * rate], [2 * fastest, 100 * rate])
    link = Link(float(np.exp(logs[0])), float(np.exp(logs[1])))
    return LinkFit(link, tuple(Residual(p.nbytes, p.seconds, link.seconds(p.nbytes)) for p in points))


def _best(
    left_over: Callable[[FloatArray], FloatArray],
    starts: Sequence[Sequence[float]],
    low: Sequence[float],
    high: Sequence[float],
) -> FloatArray:
    """Logarithms of the constants with the least loss; of equal ones those from the first start."""
    bounds = np.log(low), np.log(high)
    # soft_l1: points off the curve, as where a library changes its algorithm, count by their distance, not its square.
    tried = [
        least_squares(
            left_over,
            np.clip(np.log(start), bounds[0] + 1e-6, bounds[1] - 1e-6),
            bounds=bounds,
            loss="soft_l1",
        )
        for start in starts
    ]
    found: FloatArray = min(tried, key=lambda each: float(each.cost)).x
    return found


def _eager_starts(latency: float) -> list[list[float]]:
    return [[share, 0.1 * latency] for share in (0.02, 0.2, 0.5, 0.95)]


def _constants(logs: FloatArray) -> Constants:
    return Constants(*(float(value) for value in np.exp(logs)))


def _weight(point: MeasuredPoint) -> float:
    # Rounding spreads evenly over its half width, whose deviation is the width over sqrt 3.
    return 1 / math.hypot(_MISFIT, point.rounding / math.sqrt(3))


def _what(curve: MeasuredCurve) -> tuple[Op, int, FloatArray]:
    assert curve.op is not None  # checked when the fit starts
    return curve.op, curve.num_chips, np.array([point.nbytes for point in curve.points])


def _geometries(run: MeasuredRun) -> list[_Geometry]:
    assert run.curve.op is not None
    return geometries(run.curve.op, run.curve.num_chips, run.sheet.in_network_share)


def _with_best_rate(run: MeasuredRun) -> MeasuredRun:
    """Without a line rate, shares are of the best rate that the wires of a chip were seen at."""
    _, wire, share = _geometries(run)[-1]
    best = max(point.nbytes / point.seconds for point in run.curve.points) * wire / share
    return MeasuredRun(run.curve, replace(run.sheet, bytes_per_s=best))


def _check(runs: Sequence[MeasuredRun], eager: bool) -> None:
    if any(run.curve.op is None for run in runs):
        raise CommsError("a table of messages from chip to chip is no collective", hint="fit it as a link")
    needed = 6 if eager else 4
    if len({(run.curve.num_chips, point.nbytes) for run in runs for point in run.curve.points}) < needed:
        raise CommsError(
            f"a fabric needs {needed} sizes or more", hint="measure from 1 KiB to 1 GiB, doubling"
        )
    if len({run.sheet.bytes_per_s is None for run in runs}) > 1:
        raise CommsError(
            "some sheets have a line rate and some have none", hint="give it for all or for none"
        )
    for run in runs:
        rate, share = run.sheet.bytes_per_s, run.sheet.in_network_share
        if (rate is not None and not rate > 0) or (share is not None and not 0 < share <= 1):
            raise CommsError(
                f"a line rate must be above 0 and an in-network share in (0, 1], got {run.sheet}",
                hint="take both from the fabric's data sheet",
            )
