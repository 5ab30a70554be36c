"""Bandwidth plot: bus bandwidth over size, of what was chosen for each size, or measured and fitted."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from comms.collectives.schedule import bus_factor
from comms.selection.size_sweep import SizeSweep
from comms.units import format_scaled
from orchestrator.config.hardware.link_calibration import Calibration
from orchestrator.views.network.comms_report import size_in_words
from orchestrator.views.plots import COLOURS, INK, png_bytes, ruled_sheet

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_LINES = len(COLOURS)

Points = Sequence[tuple[float, float]]


def sweep_png(sweep: SizeSweep, cluster: str) -> bytes:
    """One line per algorithm over the sizes of a sweep, the chosen ones marked.

    Of algorithms that are never chosen the few that come closest are drawn, the others are left out.
    """
    first = sweep.answers[0]
    title = f"{first.question.op} over {first.question.num_chips} chips of {cluster}, {first.fidelity}"
    figure, axes = _sheet(title, "bus bandwidth (nccl-tests)")
    for colour, (name, points) in zip(COLOURS, algorithm_curves(sweep).items(), strict=False):
        axes.plot(
            *zip(*points, strict=True), color=colour, linewidth=1.4, label=name, marker=".", markersize=4
        )
    rates = ((each.question.nbytes, each.busbw_bytes_per_s) for each in sweep.answers)
    if chosen := [point for point in rates if point[1] > 0]:
        axes.plot(*zip(*chosen, strict=True), "o", color=INK, markersize=6, fillstyle="none", label="chosen")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, loc="best", fontsize=9)
    return png_bytes(figure)


def algorithm_curves(sweep: SizeSweep) -> Mapping[str, Points]:
    """Per algorithm its (size, bus bandwidth); those chosen somewhere first, then by how close they come."""
    curves: dict[str, list[tuple[float, float]]] = {}
    behind: dict[str, float] = {}
    for answer in sweep.answers:
        question = answer.question
        for each in answer.candidates:
            rate = question.busbw(each.seconds)
            if rate > 0:
                curves.setdefault(each.algorithm, []).append((question.nbytes, rate))
                ratio = each.seconds / answer.seconds
                behind[each.algorithm] = min(ratio, behind.get(each.algorithm, ratio))
    chosen = {answer.algorithm for answer in sweep.answers}
    names = sorted(curves, key=lambda name: (name not in chosen, behind[name], name))
    return {name: curves[name] for name in names[:MOST_LINES]}


def calibration_png(calibration: Calibration) -> bytes:
    """Per table measured points and the fitted line."""
    figure, axes = _sheet("measured and fitted", "bandwidth (nccl-tests)")
    pairs = zip(calibration.tables, calibration.residuals, strict=True)
    for number, (table, residuals) in enumerate(pairs):
        colour = COLOURS[number % len(COLOURS)]
        factor = bus_factor(table.curve.op, table.curve.num_chips)
        measured = [(each.nbytes, each.nbytes / each.measured_s * factor) for each in residuals]
        fitted = [(each.nbytes, each.nbytes / each.predicted_s * factor) for each in residuals]
        axes.plot(
            *zip(*measured, strict=True), "o", color=colour, markersize=4.5, label=f"{table.name}, measured"
        )
        axes.plot(*zip(*fitted, strict=True), color=colour, linewidth=1.6, label=f"{table.name}, fitted")
    axes.legend(frameon=False, loc="best", fontsize=9)
    return png_bytes(figure)


def _sheet(title: str, rates: str) -> "tuple[Figure, Axes]":
    """Sizes in bytes along x and rates along y, both logarithmic, with units."""
    from matplotlib.ticker import FuncFormatter, LogLocator

    figure, axes = ruled_sheet((9.0, 5.6), title, ("size", rates))
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.xaxis.set_major_locator(LogLocator(base=2, numticks=12))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: size_in_words(round(value))))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: format_scaled(value, "B/s")))
    axes.tick_params(axis="x", labelrotation=35)
    return figure, axes
