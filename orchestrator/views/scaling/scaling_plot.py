"""Scaling plots: lines over the number of chips, as PNG and SVG bytes, without a display and without global state.

A predicted line is solid, the ideal one of its series dotted in the same colour, what was measured are points. No date
and no version is stored: the same lines give the same bytes. Both axes are logarithmic but for shares.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from orchestrator.views.plots import COLOURS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH_IN, HEIGHT_IN = 4.6, 3.6  # of a panel
DPI = 110
FEW_TICKS = 100  # a span below which powers of ten alone leave an axis almost without numbers
SALT = "orchestrate"  # names in an SVG follow from it and from what is drawn


class Stroke(StrEnum):
    """How a line was come by."""

    PREDICTED = "predicted"
    IDEAL = "ideal"
    MEASURED = "measured"


STYLES: dict[Stroke, dict[str, Any]] = {
    Stroke.PREDICTED: {"linestyle": "-", "marker": "o", "markersize": 3.5, "linewidth": 1.6},
    Stroke.IDEAL: {"linestyle": ":", "linewidth": 1.1, "alpha": 0.8},
    Stroke.MEASURED: {
        "linestyle": "--",
        "marker": "s",
        "markersize": 5.5,
        "linewidth": 1.0,
        "fillstyle": "none",
    },
}


@dataclass(frozen=True, slots=True)
class ChipLine:
    """A value by number of chips; lines of one `colour` belong together. Only labelled ones are in the legend."""

    label: str
    stroke: Stroke
    colour: int
    places: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class ChipPanel:
    """One picture: its lines, and what its axis and its values mean, in sentences under it."""

    title: str
    unit: str
    lines: tuple[ChipLine, ...]
    is_share: bool
    notes: tuple[str, ...]


def draw_panel(axes: "Axes", panel: ChipPanel) -> None:
    """Draw one panel."""
    from matplotlib.ticker import EngFormatter, LogLocator

    for line in panel.lines:
        chips, values = zip(*line.places, strict=True)
        axes.plot(chips, values, color=COLOURS[line.colour % len(COLOURS)], label=line.label or None,
                  **STYLES[line.stroke])  # fmt: skip
    axes.set_xscale("log", base=2)
    ticks = sorted({chips for line in panel.lines for chips, _ in line.places})
    axes.set_xticks(ticks, [f"{chips:,}" for chips in ticks], rotation=45 if len(ticks) > 6 else 0)
    if panel.is_share:
        axes.set_ylim(0, max([1.05, *(value * 1.05 for line in panel.lines for _, value in line.places)]))
        axes.yaxis.set_major_formatter("{x:.0%}")
    else:
        axes.set_yscale("log")
        span = [value for line in panel.lines for _, value in line.places]
        axes.yaxis.set_major_locator(
            LogLocator(subs=(1, 2, 5) if max(span) < min(span) * FEW_TICKS else (1,))
        )
        axes.yaxis.set_major_formatter(EngFormatter())
    axes.minorticks_off()
    axes.set_xlabel("chips")
    axes.set_ylabel(panel.unit)
    axes.set_title(panel.title, fontsize=10, loc="left")
    axes.grid(visible=True, which="major", color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    if any(line.label for line in panel.lines):
        axes.legend(fontsize=8, frameon=False)


def figure_of(panels: Sequence[ChipPanel], columns: int = 2) -> "Figure":
    """All panels in a grid. Raises ValueError for none."""
    from matplotlib.figure import Figure

    if not panels:
        raise ValueError("a figure of no panels")
    rows = -(-len(panels) // columns)
    wide = min(columns, len(panels))
    figure = Figure(figsize=(WIDTH_IN * wide, HEIGHT_IN * rows), layout="constrained")
    grid = figure.subplots(rows, wide, squeeze=False)
    for place, axes in enumerate(grid.flat):
        if place < len(panels):
            draw_panel(axes, panels[place])
        else:
            axes.set_axis_off()
    return figure


def panels_png(panels: Sequence[ChipPanel]) -> bytes:
    """A picture of all panels."""
    return _saved(panels, "png")


def panels_svg(panels: Sequence[ChipPanel]) -> bytes:
    """The same with lines that stay sharp, its texts as text."""
    return _saved(panels, "svg")


def _saved(panels: Sequence[ChipPanel], kind: str) -> bytes:
    import matplotlib as mpl

    file = io.BytesIO()
    metadata = {"Software": None} if kind == "png" else {"Date": None, "Creator": None}
    with mpl.rc_context({"svg.hashsalt": SALT, "svg.fonttype": "none"}):
        figure = figure_of(panels)
        # once: a figure that has an engine is laid out and drawn twice when it is saved
        if (layout := figure.get_layout_engine()) is not None:
            layout.execute(figure)
        figure.set_layout_engine("none")
        figure.savefig(file, format=kind, dpi=DPI, metadata=metadata)
    return file.getvalue()
