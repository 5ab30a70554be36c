"""Bandwidth plot: bus bandwidth over size, one line per algorithm, the chosen ones marked.

Of algorithms that are never chosen the few that come closest are drawn, the others are left out.
"""

from collections.abc import Mapping, Sequence

from comms.selection.pricing import busbw
from comms.selection.size_sweep import SizeSweep
from orchestrator.views.png_figures import COLOURS, INK, blank_figure, log_sizes, png_bytes

MOST_LINES = len(COLOURS)

Points = Sequence[tuple[float, float]]


def sweep_png(sweep: SizeSweep, cluster: str) -> bytes:
    """Bus bandwidth of every algorithm over the sizes of a sweep."""
    curves = algorithm_curves(sweep)
    chosen = [
        (answer.question.nbytes, answer.busbw_bytes_per_s)
        for answer in sweep.answers
        if answer.busbw_bytes_per_s > 0
    ]
    figure = blank_figure(9.0, 5.6)
    axes = figure.add_subplot()
    log_sizes(axes)
    for colour, (name, points) in zip(COLOURS, curves.items(), strict=False):
        sizes, rates = zip(*points, strict=True)
        axes.plot(sizes, rates, color=colour, linewidth=1.4, label=name, marker=".", markersize=4)
    if chosen:
        sizes, rates = zip(*chosen, strict=True)
        axes.plot(
            sizes, rates, "o", color=INK, markersize=6, fillstyle="none", label="chosen", linestyle="none"
        )
    first = sweep.answers[0]
    axes.set_title(
        f"{first.question.op} over {first.question.num_chips} chips of {cluster}, {first.fidelity}",
        loc="left",
        fontsize=12,
        fontweight="bold",
    )
    axes.set_xlabel("size")
    axes.set_ylabel("bus bandwidth (nccl-tests)")
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
            rate = busbw(question.op, question.nbytes, each.seconds, question.num_chips)
            if rate > 0:
                curves.setdefault(each.algorithm, []).append((question.nbytes, rate))
                ratio = each.seconds / answer.seconds
                behind[each.algorithm] = min(ratio, behind.get(each.algorithm, ratio))
    chosen = {answer.algorithm for answer in sweep.answers}
    names = sorted(curves, key=lambda name: (name not in chosen, behind[name], name))
    return {name: curves[name] for name in names[:MOST_LINES]}


def measured_png(title: str, measured: Mapping[str, Points], fitted: Mapping[str, Points]) -> bytes:
    """Measured points and fitted lines: (size, bandwidth) by name."""
    figure = blank_figure(9.0, 5.6)
    axes = figure.add_subplot()
    log_sizes(axes)
    for number, (name, points) in enumerate(measured.items()):
        colour = COLOURS[number % len(COLOURS)]
        sizes, rates = zip(*points, strict=True)
        axes.plot(sizes, rates, "o", color=colour, markersize=4.5, label=f"{name}, measured")
        sizes, rates = zip(*fitted[name], strict=True)
        axes.plot(sizes, rates, color=colour, linewidth=1.6, label=f"{name}, fitted")
    axes.set_title(title, loc="left", fontsize=12, fontweight="bold")
    axes.set_xlabel("size")
    axes.set_ylabel("bandwidth (nccl-tests)")
    axes.legend(frameon=False, loc="best", fontsize=9)
    return png_bytes(figure)
