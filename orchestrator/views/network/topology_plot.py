"""Topology plot: chips, switches and links, coloured by rate or by how busy a collective keeps them.

Small networks are drawn whole, large ones as an excerpt. Thick and dark is much. Links that are down are dashed.
Switches that stand side by side are moved apart as far as their letters need on paper; where there is no room for
that, all but the first of a row have their number only.
"""

from collections import defaultdict
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from comms.selection.question import Answer
from comms.selection.site import busy_by_wire
from comms.units import format_percent, format_scaled
from orchestrator.views.network.topology_excerpt import excerpt
from orchestrator.views.network.topology_layout import Line, Node, NodeKind, Picture, layout, spread
from orchestrator.views.plots import FAINT, INK, TITLE, blank_figure, png_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WHOLE_CHIPS = 64
WHOLE_NODES = 160
CHIP, SWITCH, DOWN = "#F0E442", "#CFE3F2", "#D55E00"
THIN, THICK = 0.8, 4.5
_INCHES = 0.62  # per chip
_TITLE_INCHES = 0.125  # per letter
_MOST_TICKS = 6
_WIDEST = 22.0  # inches, of a figure
_BESIDE_INCHES = 3.0  # margins and the colour bar
_LETTER_INCHES = 0.011  # of a letter in a box, per point of its size


def topology_png(answer: Answer, cluster: str) -> bytes:
    """The network of an answer: by load where every message was moved, else by rate."""
    question = answer.question
    picture, by_load = picture_of(answer), answer.full is not None
    size = f"{question.num_chips} chips of {cluster}" if question.num_chips > 1 else f"one chip of {cluster}"
    title = f"{size}: load of {question.op} ({answer.algorithm})" if by_load else size
    xs, ys = [node.x for node in picture.nodes], [node.y for node in picture.nodes]
    width, height = max(xs) - min(xs), max(ys) - min(ys)
    values = {line.value for line in picture.lines if line.value}
    if not by_load and len(values) == 1:
        title = f"{title}: {format_scaled(max(values), 'B/s')} each way"
    inches = min(_WIDEST, max(4.0 + _INCHES * width, _TITLE_INCHES * len(title)))
    picture = apart(picture, (inches - _BESIDE_INCHES) / max(width, 1.0))
    xs = [node.x for node in picture.nodes]
    figure = blank_figure(inches, min(14.0, max(4.5, 2.4 + 0.95 * height)))
    axes = figure.add_subplot()
    axes.set_axis_off()
    _draw_lines(figure, axes, picture, by_load)
    _draw_nodes(axes, picture)
    axes.set_xlim(min(xs) - 1.2, max(xs) + 1.2)
    axes.set_ylim(min(ys) - 0.8, max(ys) + 0.8)
    axes.set_title(title, **TITLE)
    return png_bytes(figure)


def picture_of(answer: Answer) -> Picture:
    """What is drawn of an answer's network; lines have their rate, or the share of time that they are busy."""
    network, num_chips = answer.question.network, answer.question.num_chips
    topology = network.topology(num_chips) if num_chips <= WHOLE_CHIPS else None
    if topology is None or topology.num_nodes > WHOLE_NODES:
        busy = {load.tier: load.busiest.busy for load in answer.loads} if answer.full else None
        return excerpt(network, num_chips, busy)
    if answer.site is None or answer.full is None:
        value = dict(enumerate(topology.wires().bytes_per_s.tolist()))
    else:
        value = busy_by_wire(answer.site, answer.full)
    return layout(topology, answer.question.chips_per_host, value)


def apart(picture: Picture, inches_per_unit: float) -> Picture:
    """The same picture with no switch on its neighbour's letters."""
    rows: dict[float, list[int]] = defaultdict(list)
    for number, node in enumerate(picture.nodes):
        if node.kind is NodeKind.SWITCH:
            rows[node.y].append(number)
    nodes = list(picture.nodes)
    room = max(node.x for node in nodes) - min(node.x for node in nodes)
    for row in rows.values():
        row.sort(key=lambda number: (nodes[number].x, number))
        gap = _gap(nodes, row, inches_per_unit)
        if gap * (len(row) - 1) > room:
            for number in row[1:]:
                nodes[number] = replace(nodes[number], text=nodes[number].text.split()[-1])
            gap = _gap(nodes, row[1:], inches_per_unit)
        for number, x in zip(row, spread([nodes[number].x for number in row], gap), strict=True):
            nodes[number] = replace(nodes[number], x=x)
    return replace(picture, nodes=tuple(nodes))


def _gap(nodes: list[Node], row: list[int], inches_per_unit: float) -> float:
    """How far the middles of two boxes have to be from each other."""
    widest = max((len(line) for number in row for line in nodes[number].text.split("\n")), default=0)
    return (widest + 2) * _LETTER_INCHES * _points(len(nodes)) / inches_per_unit


def _points(num_nodes: int) -> float:
    """Size of letters."""
    return 7 if num_nodes > 40 else 8.5


def _draw_lines(figure: "Figure", axes: "Axes", picture: Picture, by_load: bool) -> None:
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LogNorm, Normalize
    from matplotlib.ticker import FuncFormatter, NullLocator

    values = [line.value for line in picture.lines if line.value]
    if by_load:
        norm: Normalize = Normalize(0.0, max(1.0, *values) if values else 1.0)
    else:
        low, high = (min(values), max(values)) if values else (1.0, 10.0)
        norm = LogNorm(low / 1.5, high * 1.5)
    colours = colormaps["viridis_r"]
    for line in picture.lines:
        share = 0.0 if not line.value else float(norm(line.value))
        _draw_line(axes, picture, line, colours(0.15 + 0.85 * share), THIN + (THICK - THIN) * share)
    if values and (by_load or len(set(values)) > 1):
        bar = figure.colorbar(ScalarMappable(norm, colours), ax=axes, shrink=0.7, pad=0.01)
        if by_load:
            bar.set_label("busy (the busier direction)")
            bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: format_percent(value)))
        else:
            bar.set_label("rate, one direction")
            bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: format_scaled(value, "B/s")))
            ticks = sorted(set(values))
            if len(ticks) <= _MOST_TICKS:
                bar.set_ticks(ticks)
            bar.ax.yaxis.set_minor_locator(NullLocator())


def _draw_line(axes: "Axes", picture: Picture, line: Line, colour: object, width: float) -> None:
    from matplotlib.patches import FancyArrowPatch

    look: dict[str, Any] = {"color": colour, "linewidth": width}
    if line.value is None:
        look = {"color": DOWN, "linewidth": 1.2, "linestyle": (0, (3, 3))}
    ends = [(node.x, node.y) for node in (picture.nodes[line.a], picture.nodes[line.b])]
    bend = f"arc3,rad={line.bend}"
    patch = FancyArrowPatch(
        *ends, arrowstyle="-", connectionstyle=bend, shrinkA=0, shrinkB=0, zorder=1, **look
    )
    axes.add_patch(patch)


def _draw_nodes(axes: "Axes", picture: Picture) -> None:
    looks = {
        NodeKind.CHIP: ("circle,pad=0.25", CHIP, INK, "-"),
        NodeKind.SWITCH: ("round,pad=0.3", SWITCH, INK, "-"),
        NodeKind.MORE: ("round,pad=0.4", "white", FAINT, "--"),
    }
    letters: dict[str, Any] = {
        "ha": "center",
        "va": "center",
        "fontsize": _points(len(picture.nodes)),
        "color": INK,
    }
    for node in picture.nodes:
        shape, face, edge, line = looks[node.kind]
        box = {"boxstyle": shape, "facecolor": face, "edgecolor": edge, "linestyle": line, "linewidth": 0.8}
        axes.text(node.x, node.y, node.text, bbox=box, zorder=3, **letters)
