"""Plots: loss.png and timeline.png, as PNG bytes (`views.png_figures`)."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from orchestrator.runs.timeline import Timeline
from orchestrator.views.gantt import Gantt, colours_of, draw_gantt
from orchestrator.views.png_figures import COLOURS, FAINT, INK, blank_figure, png_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TRAIN, VALIDATION = COLOURS[:2]
_SMOOTHING = 0.05  # share of the steps in the window of the running mean
_LABEL_GAP = 0.045  # of the axis, between two baseline names


@dataclass(frozen=True, slots=True)
class LossCurves:
    """What loss.png shows: (step, loss) points, and baselines as name -> loss. `unit` is that of the loss."""

    train: tuple[tuple[int, float], ...]
    validation: tuple[tuple[int, float], ...] = ()
    baselines: Mapping[str, float] | None = None
    unit: str = "nats per token"
    title: str = "Loss"


def loss_png(curves: LossCurves) -> bytes:
    """Train loss (faint, and its running mean), validation points and baselines over steps."""
    figure = blank_figure(9.0, 5.2)
    axes = figure.add_subplot()
    _tidy(axes)
    _draw_train(axes, curves.train)
    if curves.validation:
        steps, losses = zip(*curves.validation, strict=True)
        label = f"validation, last {losses[-1]:.3f}"
        axes.plot(
            steps,
            losses,
            "o-",
            color=VALIDATION,
            markersize=5.5,
            linewidth=1.4,
            label=label,
            zorder=4,
            clip_on=False,
        )
    _draw_baselines(axes, curves.baselines or {})
    axes.set_xlabel("step")
    axes.set_ylabel(f"loss ({curves.unit})")
    axes.set_title(curves.title, loc="left", fontsize=12, fontweight="bold")
    axes.set_xlim(0, max((step for step, _ in (*curves.train, *curves.validation)), default=1))
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, loc="upper right")
    return png_bytes(figure)


def timeline_png(
    predicted: Timeline | None, measured: Timeline | None, *, max_chips: int = 16, by_shares: bool = False
) -> bytes:
    """Chips x lanes over the time of one step, predicted above measured where both are given.

    Of each timeline its last step is drawn, from its first span on, for the first `max_chips` chips. The
    panels share one scale where their durations are within a factor of three; otherwise each has its own, and
    says so. `by_shares`: the machine that was measured is not the one that is described, so that only shares of a
    step can be compared; each axis is in those, and the titles say whose step it is.
    """
    given = [timeline for timeline in (predicted, measured) if timeline is not None and timeline.steps]
    if not given:
        raise ValueError("timeline_png needs at least one timeline that has a span")
    gantts = [Gantt(timeline.at_step(timeline.steps[-1]).from_zero(), max_chips) for timeline in given]
    heights = [gantt.height for gantt in gantts]
    figure = blank_figure(15.0, min(30.0, 0.8 + sum(0.125 * height + 0.8 for height in heights)))
    panels = figure.subplots(len(gantts), 1, squeeze=False, height_ratios=heights)[:, 0]
    spans = [gantt.timeline.duration_ns for gantt in gantts]
    shared = max(spans) if max(spans) <= 3 * min(spans) else None
    colours = colours_of(frozenset().union(*(gantt.kinds for gantt in gantts)))
    for axes, gantt in zip(panels, gantts, strict=True):
        end_ns = gantt.timeline.duration_ns if by_shares else shared or gantt.timeline.duration_ns
        draw_gantt(axes, gantt, colours, end_ns=max(end_ns, 1), by_shares=by_shares)
    _gantt_legend(figure, colours)
    if by_shares or shared is None:
        said = "two machines: compare shares, not seconds" if by_shares else "the two time axes differ"
        figure.text(0.995, 0.995, said, ha="right", va="top", color=VALIDATION, fontsize=9)
    return png_bytes(figure)


def _gantt_legend(figure: "Figure", colours: Mapping[str, str]) -> None:
    from matplotlib.patches import Patch

    handles = [Patch(facecolor=colour, label=kind.replace("_", " ")) for kind, colour in colours.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 9), frameon=False)


def _tidy(axes: "Axes") -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color=FAINT, linewidth=0.6)
    axes.set_axisbelow(True)


def _draw_train(axes: "Axes", points: Sequence[tuple[int, float]]) -> None:
    import numpy as np

    points = [(step, loss) for step, loss in points if math.isfinite(loss)]
    if not points:
        return
    steps, losses = (np.array(column, dtype=float) for column in zip(*points, strict=True))
    half = round(_SMOOTHING * len(losses) / 2)
    faint = half > 0
    axes.plot(
        steps,
        losses,
        color=TRAIN,
        alpha=0.3 if faint else 1.0,
        linewidth=1.0,
        label=None if faint else "train",
    )
    if faint:
        # The window shrinks evenly towards both ends: it neither lags nor invents values.
        at = np.arange(len(losses))
        reach = np.minimum(half, np.minimum(at, len(losses) - 1 - at))
        sums = np.cumsum(np.insert(losses, 0, 0.0))
        means = (sums[at + reach + 1] - sums[at - reach]) / (2 * reach + 1)
        label = f"train, mean of {2 * half + 1} steps"
        axes.plot(steps, means, color=TRAIN, linewidth=1.8, label=label, zorder=3)


def _draw_baselines(axes: "Axes", baselines: Mapping[str, float]) -> None:
    """A dashed line each, named right of the axes; names that would collide are moved up."""
    ordered = sorted(baselines.items(), key=lambda pair: (pair[1], pair[0]))
    for _, loss in ordered:
        axes.axhline(loss, color=INK, linestyle=(0, (5, 4)), linewidth=0.9, alpha=0.6)
    low, high = axes.get_ylim()
    at = low - high
    for name, loss in ordered:
        at = max(loss, at + _LABEL_GAP * (high - low))
        axes.annotate(
            f"{name} {loss:.2f}",
            xy=(1.01, at),
            xycoords=("axes fraction", "data"),
            va="center",
            fontsize=9,
            color=INK,
        )
