"""Plots: loss.png and timeline.png, as PNG bytes, without a display and without global state.

matplotlib is imported when a picture is drawn. No date and no version is stored: the same drawing gives the same
bytes. Colours are those of Okabe and Ito (2008), which colour-blind readers can tell apart.

A chip is a band of rows in the order of `runs.timeline.Lane`, only for lanes that are used; the optimizer shares
the row of compute, which is taller than the others and carries the microbatch numbers. Spans narrower than a pixel
are drawn as they are: what is dense looks dense.
"""

import io
import math
from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from comms.units import format_seconds
from orchestrator.runs.timeline import LANES, NONE, Lane, Origin, Timeline

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

KIND_COLOURS: dict[str, str] = {
    "forward": "#56B4E9",
    "backward": "#0072B2",
    "optimizer": "#CC79A7",
    "host": "#8C6BB1",
    "send": "#E69F00",
    "recv": "#F5CE62",
    "all_reduce": "#D55E00",
    "all_gather": "#009E73",
    "reduce_scatter": "#66C2A5",
    "all_to_all": "#A6761D",
    "broadcast": "#B2DF8A",
}
MAX_CHIPS = 16  # of one timeline
OTHER = ("#7F7F7F", "#BCBD22", "#17BECF", "#8C564B", "#E377C2", "#4D4D4D")  # for kinds that are not ours
_GAP = 0.8  # between two chips, in rows
_TALL = 1.9  # the compute row
_SHARES_ROW = {LANES.index(Lane.OPTIMIZER): LANES.index(Lane.COMPUTE)}
_WHOSE = {Origin.PREDICTED: ", on the chips described", Origin.MEASURED: ", simulated on this machine"}
_UNITS = ((1e9, "s"), (1e6, "ms"), (1e3, "us"), (1.0, "ns"))
_LABELLED = ("forward", "backward")
_GROUND, _EDGE = "#f2f2f2", "#12324d"
_MIN_SHARE = 0.010  # of the axis: below that a microbatch number does not fit into its span
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6BB1", "#A6761D")
_SMOOTHING = 0.05  # share of the steps in the window of the running mean
_LABEL_GAP = 0.045  # of the axis, between two baseline names


@dataclass(frozen=True)
class Gantt:
    """One panel: a timeline of one step that starts at 0."""

    timeline: Timeline

    @cached_property
    def rows(self) -> dict[tuple[int, int], tuple[float, float]]:
        """By (chip, row's lane): where it is drawn, top and bottom."""
        spans = self.timeline.span_rows
        pairs = set(zip(spans["chip"].tolist(), spans["lane"].tolist(), strict=True))
        used = sorted({(chip, _SHARES_ROW.get(lane, lane)) for chip, lane in pairs})
        shown = set(sorted({chip for chip, _ in used})[:MAX_CHIPS])
        rows: dict[tuple[int, int], tuple[float, float]] = {}
        at, previous = 0.0, None
        for chip, lane in (pair for pair in used if pair[0] in shown):
            top = at + (_GAP if previous not in (None, chip) else 0.0)
            at, previous = top + (_TALL if lane == 0 else 1.0), chip
            rows[chip, lane] = (top, at)
        return rows

    @property
    def kinds(self) -> frozenset[str]:
        """The kinds of work in the timeline."""
        return frozenset(self.timeline.texts[code] for code in np.unique(self.timeline.span_rows["kind"]))

    @property
    def height(self) -> float:
        """In rows."""
        return max(bottom for _, bottom in self.rows.values())

    @property
    def chips(self) -> tuple[int, ...]:
        """The chips that are drawn, top to bottom."""
        return tuple(dict.fromkeys(chip for chip, _ in self.rows))

    def row(self, chip: int, lane: int) -> tuple[float, float]:
        """Top and bottom of the row that this lane is drawn in."""
        return self.rows[chip, _SHARES_ROW.get(lane, lane)]


def colours_of(kinds: AbstractSet[str]) -> dict[str, str]:
    """A colour per kind: ours in the order of KIND_COLOURS, then the others by name."""
    known = {kind: colour for kind, colour in KIND_COLOURS.items() if kind in kinds}
    others = sorted(kinds - known.keys())
    return known | {kind: OTHER[number % len(OTHER)] for number, kind in enumerate(others)}


def draw_gantt(
    axes: "Axes", gantt: Gantt, colours: Mapping[str, str], end_ns: int, *, by_shares: bool = False
) -> None:
    """Draw one panel, its time axis from 0 to `end_ns` in a unit that suits, or in percent of `end_ns`."""
    scale, unit = next((pair for pair in _UNITS if end_ns >= pair[0]), _UNITS[-1])
    if by_shares:
        scale = end_ns / 100
    _draw_spans(axes, gantt, colours, scale)
    _draw_microbatches(axes, gantt, scale, end_ns)
    _label_rows(axes, gantt)
    axes.set_xlim(0, end_ns / scale)
    axes.set_ylim(gantt.height + 0.15, -0.15)
    axes.set_xlabel("share of the step (%)" if by_shares else f"time since the start of the step ({unit})")
    axes.set_title(_title(gantt, by_shares), **TITLE)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)


def _title(gantt: Gantt, by_shares: bool) -> str:
    timeline = gantt.timeline
    total = len(np.unique(timeline.span_rows["chip"]))
    chips = f"{len(gantt.chips)} of {total} chips" if total > len(gantt.chips) else f"{total} chips"
    step = f"step {timeline.steps[0]}"
    origin = f"{timeline.origin.capitalize()}{_WHOSE[timeline.origin] if by_shares else ''}"
    return f"{origin}: {format_seconds(timeline.duration_ns / 1e9)}   ({step}, {chips})"


def _draw_spans(axes: "Axes", gantt: Gantt, colours: Mapping[str, str], scale: float) -> None:
    """One collection per kind: a hundred thousand rectangles cost no more than a few objects."""
    from matplotlib.collections import PolyCollection

    spans, texts = gantt.timeline.span_rows, gantt.timeline.texts
    spans = spans[np.isin(spans["chip"], gantt.chips)]
    rows = np.array([gantt.row(chip, lane) for chip, lane in zip(spans["chip"], spans["lane"], strict=True)])
    left, right = spans["start_ns"] / scale, spans["end_ns"] / scale
    top, bottom = rows[:, 0] + 0.08, rows[:, 1] - 0.08
    corners = [(left, top), (right, top), (right, bottom), (left, bottom)]
    boxes = np.stack([np.stack(corner, axis=-1) for corner in corners], axis=1)
    for kind in sorted(gantt.kinds):
        chosen = boxes[spans["kind"] == texts.index(kind)]
        axes.add_collection(
            PolyCollection(chosen, facecolors=colours[kind], edgecolors="white", linewidths=0.2)
        )


def _draw_microbatches(axes: "Axes", gantt: Gantt, scale: float, end_ns: int) -> None:
    """The microbatch's number on each run of compute spans of one kind that is wide enough for it."""
    from matplotlib.patheffects import withStroke

    edge = [withStroke(linewidth=1.6, foreground=_EDGE)]
    for first, last in _runs(gantt):
        if last["end_ns"] - first["start_ns"] < _MIN_SHARE * end_ns:
            continue
        top, bottom = gantt.row(int(first["chip"]), int(first["lane"]))
        at = ((first["start_ns"] + last["end_ns"]) / 2 / scale, (top + bottom) / 2 + 0.05)
        axes.annotate(
            str(first["microbatch"]), at, ha="center", va="center", fontsize=7.5, fontweight="bold",
            color="white", path_effects=edge,
        )  # fmt: skip


def _runs(gantt: Gantt) -> Iterable[tuple[np.void, np.void]]:
    """First and last span of every unbroken sequence of one kind for one microbatch in a compute lane."""
    spans, texts = gantt.timeline.span_rows, gantt.timeline.texts
    wanted = [texts.index(kind) for kind in _LABELLED if kind in texts]
    compute = spans[(spans["lane"] == 0) & np.isin(spans["kind"], wanted) & (spans["microbatch"] != NONE)]
    compute = compute[np.isin(compute["chip"], gantt.chips)]
    if not len(compute):
        return ()
    compute = compute[np.lexsort((compute["start_ns"], compute["chip"]))]
    columns = [compute[name] for name in ("chip", "kind", "microbatch")]
    changed = np.any([column[1:] != column[:-1] for column in columns], axis=0)
    first = np.concatenate([[0], np.flatnonzero(changed) + 1])
    last = np.concatenate([first[1:] - 1, [len(compute) - 1]])
    return zip(compute[first], compute[last], strict=True)


def _label_rows(axes: "Axes", gantt: Gantt) -> None:
    """Lane names as tick labels, the chip's name left of its band, a light ground behind every band."""
    names = dict(gantt.timeline.chips)
    middles = [(top + bottom) / 2 for top, bottom in gantt.rows.values()]
    axes.set_yticks(middles, [str(LANES[lane]) for _, lane in gantt.rows], fontsize=6.5, color="#444444")
    for chip in gantt.chips:
        edges = [edge for (owner, _), row in gantt.rows.items() if owner == chip for edge in row]
        axes.axhspan(min(edges), max(edges), facecolor=_GROUND, zorder=0)
        axes.annotate(
            names[chip], xy=(0, (min(edges) + max(edges)) / 2), xycoords=("axes fraction", "data"),
            xytext=(-48, 0), textcoords="offset points", ha="right", va="center",
            fontsize=9, fontweight="bold",
        )  # fmt: skip


INK, FAINT = "#222222", "#d9d9d9"
TITLE: dict[str, Any] = {"loc": "left", "fontsize": 12, "fontweight": "bold"}


def blank_figure(width: float, height: float) -> "Figure":
    """A white sheet of so many inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=130, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def ruled_sheet(
    inches: tuple[float, float], title: str, labels: tuple[str, str], grid: Literal["both", "y"] = "both"
) -> "tuple[Figure, Axes]":
    """A figure with one pair of axes, and lines across it; `labels` of x and y."""
    figure = blank_figure(*inches)
    axes = figure.add_subplot(xlabel=labels[0], ylabel=labels[1])
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis=grid, color=FAINT, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.set_title(title, **TITLE)
    return figure, axes


def png_bytes(figure: "Figure") -> bytes:
    """The picture as a PNG file."""
    target = io.BytesIO()
    figure.savefig(target, format="png", metadata={"Software": None})
    return target.getvalue()


TRAIN, VALIDATION = COLOURS[:2]
Points = Sequence[tuple[int, float]]  # (step, loss)


def loss_png(train: Points, validation: Points, baselines: Mapping[str, float]) -> bytes:
    """Train loss (faint, and its running mean), validation points and baselines (by name) over steps."""
    figure, axes = ruled_sheet((9.0, 5.2), "Loss", ("step", "loss (nats per byte)"), grid="y")
    _draw_train(axes, train)
    if validation:
        steps, losses = zip(*validation, strict=True)
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
    _draw_baselines(axes, baselines)
    axes.set_xlim(0, max((step for step, _ in (*train, *validation)), default=1))
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, loc="upper right")
    return png_bytes(figure)


def timeline_png(timelines: Sequence[Timeline], *, by_shares: bool = False) -> bytes:
    """Chips x lanes over the time of one step, the first timeline on top.

    Of each timeline its last step is drawn, from its first span on, for the first MAX_CHIPS chips. The
    panels share one scale where their durations are within a factor of three; otherwise each has its own, and
    says so. `by_shares`: the machine that was measured is not the one that is described, so that only shares of a
    step can be compared; each axis is in those, and the titles say whose step it is.
    """
    from matplotlib.patches import Patch

    steps = [timeline.at_step(timeline.steps[-1]) for timeline in timelines if timeline.steps]
    gantts = [Gantt(step.from_zero()) for step in steps]
    heights = [gantt.height for gantt in gantts]
    figure = blank_figure(15.0, min(30.0, 0.8 + sum(0.125 * height + 0.8 for height in heights)))
    panels = figure.subplots(len(gantts), 1, squeeze=False, height_ratios=heights)[:, 0]
    spans = [gantt.timeline.duration_ns for gantt in gantts]
    shared = max(spans) if max(spans) <= 3 * min(spans) else None
    colours = colours_of(frozenset().union(*(gantt.kinds for gantt in gantts)))
    for axes, gantt in zip(panels, gantts, strict=True):
        end_ns = gantt.timeline.duration_ns if by_shares else shared or gantt.timeline.duration_ns
        draw_gantt(axes, gantt, colours, end_ns=max(end_ns, 1), by_shares=by_shares)
    handles = [Patch(facecolor=colour, label=kind.replace("_", " ")) for kind, colour in colours.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 9), frameon=False)
    if by_shares or shared is None:
        said = "two machines: compare shares, not seconds" if by_shares else "the two time axes differ"
        figure.text(0.995, 0.995, said, ha="right", va="top", color=VALIDATION, fontsize=9)
    return png_bytes(figure)


def _draw_train(axes: "Axes", points: Points) -> None:
    points = [(step, loss) for step, loss in points if math.isfinite(loss)]
    if not points:
        return
    steps, losses = (np.array(column, dtype=float) for column in zip(*points, strict=True))
    half = round(_SMOOTHING * len(losses) / 2)
    (line,) = axes.plot(steps, losses, color=TRAIN, linewidth=1.0)
    if not half:
        line.set_label("train")
    else:
        line.set_alpha(0.3)
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
