"""Link calibration: from measured tables to the constants of links, how well they fit, and how well they predict.

Tables of collectives are fitted together as runs on one fabric (`calibration`), with three constants, or five
where the two more predict better what was not fitted. Tables of messages from chip to chip are fitted as one link.
Every point is also predicted from a fit to the others (every second point held out, both ways), where there are
enough of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf, nan

from comms.calibration.calibration import (
    LARGE_NBYTES,
    FabricFit,
    LinkFit,
    MeasuredRun,
    Residual,
    Sheet,
    fit_fabric,
    fit_link,
    hold_out,
    mean_error,
)
from comms.calibration.measured_tables import MeasuredCurve
from comms.errors import CommsError
from comms.networks.groups import mesh_group
from comms.networks.links import Link
from comms.selection.choice import choose
from orchestrator.config.hardware.line_rates import LineRate, Rate

BETTER = 0.9  # five constants must lower the error at points not fitted to this part of it
# Of the rate of the wires through switches that reduce, as NCCL assumes of Hopper's (src/graph/tuning.cc). A table
# fixes the product of this and the fitted share.
REDUCING_SHARE = 0.85


@dataclass(frozen=True, slots=True)
class MeasuredTable:
    """One measured table."""

    name: str
    curve: MeasuredCurve


@dataclass(frozen=True, slots=True)
class Calibration:
    """Constants, and what is left over at each point of each table."""

    tables: tuple[MeasuredTable, ...]
    fabric: FabricFit | None  # of collectives
    link: LinkFit | None  # of messages from chip to chip
    line: LineRate | None  # of the first table
    residuals: tuple[tuple[Residual, ...], ...]  # per table
    held_out: tuple[tuple[Residual, ...], ...] | None  # the same points, predicted from fits to others
    as_it_is: tuple[tuple[Residual, ...], ...] | None  # the same points, as the cluster file has them now

    @property
    def line_rate(self) -> Rate | None:
        """What the rates found are a share of."""
        if self.line is None:
            return None
        return self.line.together if self.link is None else self.line.alone

    @property
    def num_constants(self) -> int:
        return 2 if self.fabric is None else self.fabric.constants.num_constants


def calibrate_links(tables: Sequence[MeasuredTable], lines: Sequence[LineRate] = ()) -> Calibration:
    """The constants of the links that all these tables were measured on; `lines` one per table, or none.

    Raises CommsError.
    """
    pairs = [table for table in tables if table.curve.op is None]
    if pairs and len(pairs) < len(tables):
        problem = "messages from chip to chip and collectives do not have the same constants"
        raise CommsError(problem, f"{pairs[0].name} and others", "calibrate with one kind at a time")
    line = lines[0] if lines else None
    as_it_is = None
    if lines:
        as_it_is = tuple(_as_it_is(table.curve, own) for table, own in zip(tables, lines, strict=True))
    if pairs:
        link = fit_link([point for table in tables for point in table.curve.points])
        residuals = tuple(_on(link.link, table.curve) for table in tables)
        return Calibration(tuple(tables), None, link, line, residuals, _held_out_pairs(tables), as_it_is)
    sheets = [Sheet(own.together.bytes_per_s, REDUCING_SHARE if own.reduces else None) for own in lines]
    if not lines:
        sheets = [Sheet(None)] * len(tables)
    runs = [MeasuredRun(table.curve, sheet) for table, sheet in zip(tables, sheets, strict=True)]
    plain, eager = _held_out(runs, eager=False), _held_out(runs, eager=True)
    has_eager = eager is not None and plain is not None and _mean(eager) < BETTER * _mean(plain)
    fit = fit_fabric(runs, has_eager)
    return Calibration(tuple(tables), fit, None, line, fit.residuals, eager if has_eager else plain, as_it_is)


def errors(residuals: Sequence[Sequence[Residual]] | None) -> tuple[float, float]:
    """Mean absolute relative errors over all tables, from LARGE_NBYTES up, and below; NaN where there is no point."""
    every = [each for of_table in residuals or () for each in of_table]
    if not every:
        return nan, nan
    return mean_error(every, LARGE_NBYTES, inf), mean_error(every, 0.0, LARGE_NBYTES)


def _held_out(runs: Sequence[MeasuredRun], eager: bool) -> tuple[tuple[Residual, ...], ...] | None:
    """Each point predicted from a fit to every second other; None where too few are left to fit."""
    try:
        odd, even = hold_out(runs, eager, first=1), hold_out(runs, eager, first=0)
    except CommsError:
        return None
    return tuple(_by_size([*one, *other]) for one, other in zip(odd, even, strict=True))


def _by_size(residuals: Sequence[Residual]) -> tuple[Residual, ...]:
    return tuple(sorted(residuals, key=lambda each: each.nbytes))


def _mean(residuals: Sequence[Sequence[Residual]]) -> float:
    return mean_error(each for of_table in residuals for each in of_table)


def _held_out_pairs(tables: Sequence[MeasuredTable]) -> tuple[tuple[Residual, ...], ...] | None:
    found: list[list[Residual]] = [[] for _ in tables]
    for first in (0, 1):
        kept = [point for table in tables for point in table.curve.points[1 - first :: 2]]
        if len({point.nbytes for point in kept}) < 2:
            return None
        link = fit_link(kept).link
        for table, left in zip(tables, found, strict=True):
            left += _on(link, table.curve)[first::2]
    return tuple(_by_size(left) for left in found)


def _on(link: Link, curve: MeasuredCurve) -> tuple[Residual, ...]:
    return tuple(Residual(p.nbytes, p.seconds, link.seconds(p.nbytes)) for p in curve.points)


def _as_it_is(curve: MeasuredCurve, line: LineRate) -> tuple[Residual, ...]:
    """What the cluster file predicts before anything is calibrated."""
    if curve.op is None:
        link = line.tier.link
        return _on(Link(link.latency_s + line.tier.issue_s, link.bytes_per_s), curve)
    members = mesh_group((("all", curve.num_chips),), ("all",))
    network = line.cluster.network
    return tuple(
        Residual(p.nbytes, p.seconds, choose(curve.op, p.nbytes, members, network).seconds)
        for p in curve.points
    )
