"""Topology layout: where the chips and switches of a small network are drawn, and the links between them.

Chips of the innermost fabric stand as its shape says: trees in a row, tori as a grid (a third dimension behind it),
full meshes in a circle, everything else by springs (Kamada and Kawai, Information Processing Letters 31, 1989).
Copies stand side by side. Switches of trees stand above what is below them, those of the innermost one under the
chips where there is another. Pure values: drawing is done by `topology_plot`.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import product
from math import cos, pi, prod, sin, sqrt

import numpy as np

from comms.networks.fabrics.switch_tree import Tree
from comms.networks.fabrics.torus_mesh import FullMesh, Torus
from comms.networks.shapes import Shape
from comms.networks.tiered import TieredTopology
from comms.networks.topology import FloatArray, IntArray, Wires
from orchestrator.views.network.node_names import missing_places, node_names, switch_tiers, ways_out

RISE = 1.6  # between two layers of switches
GAP = 1.0  # between two copies
BEHIND = (0.42, 0.34)  # where the next layer of a third dimension stands
BESIDE = 0.4  # how far a bent line is from the straight one
LETTER = 0.13  # width of a letter in a switch

Spot = tuple[float, float]


class NodeKind(StrEnum):
    """What a node is."""

    CHIP = "chip"
    SWITCH = "switch"
    MORE = "more"  # a box for what is not drawn


@dataclass(frozen=True, slots=True)
class Node:
    """One thing on the picture."""

    x: float
    y: float
    text: str
    kind: NodeKind


@dataclass(frozen=True, slots=True)
class Line:
    """Links between two nodes, by their numbers; `value` is that of the stronger direction, None is down."""

    a: int
    b: int
    value: float | None
    bend: float = 0.0


@dataclass(frozen=True, slots=True)
class Picture:
    """What is to be drawn."""

    nodes: tuple[Node, ...]
    lines: tuple[Line, ...]


def layout(topology: TieredTopology, chips_per_host: int, value: Mapping[int, float]) -> Picture:
    """Everything of a topology; `value` by wire, those without one are down."""
    names = node_names(topology, chips_per_host)
    places = _places(topology, names)
    twins = ways_out(topology.wires(), topology.num_chips, switch_tiers(topology))
    drawn = {node: index for index, node in enumerate(sorted(set(places) - set(twins)))}
    nodes = tuple(
        Node(*places[node], str(node), NodeKind.CHIP)
        if node < topology.num_chips
        else Node(*places[node], two_lines(names[node]), NodeKind.SWITCH)
        for node in drawn
    )
    index = drawn | {twin: drawn[of] for twin, of in twins.items() if of in drawn}
    return Picture(nodes, tuple(_lines(topology.wires(), nodes, index, value)))


def _lines(
    wires: Wires, nodes: tuple[Node, ...], index: Mapping[int, int], value: Mapping[int, float]
) -> Iterable[Line]:
    """One per pair of nodes that have links."""
    best: dict[tuple[int, int], float | None] = {}
    for wire, (tail, head) in enumerate(zip(wires.tail.tolist(), wires.head.tolist(), strict=True)):
        if tail in index and head in index and index[tail] != index[head]:
            pair = (min(index[tail], index[head]), max(index[tail], index[head]))
            found = value.get(wire)
            known = best.setdefault(pair, found)
            if found is not None and (known is None or found > known):
                best[pair] = found
    for (a, b), strongest in sorted(best.items()):
        chips = nodes[a].kind is nodes[b].kind is NodeKind.CHIP
        yield Line(a, b, strongest, bend=_bend(nodes[a], nodes[b]) if chips else 0.0)


def _bend(one: Node, other: Node) -> float:
    """Of a line that would hide behind the chips between the two: so that it passes beside them."""
    along_x, along_y = abs(one.x - other.x), abs(one.y - other.y)
    length = sqrt(along_x**2 + along_y**2)
    hides = length > 1.01 and min(along_x, along_y) < 1e-6
    return 2 * BESIDE / length if hides else 0.0


def two_lines(name: str) -> str:
    """A name of several words, the last two (`switch 3`) under the others."""
    words = name.split(" ")
    return name if len(words) < 3 else f"{' '.join(words[:-2])}\n{' '.join(words[-2:])}"


def _places(topology: TieredTopology, names: Sequence[str]) -> dict[int, Spot]:
    """Where each node is drawn."""
    fabrics = list(topology.copies())
    if not fabrics:
        return {chip: (float(chip), 0.0) for chip in range(topology.num_chips)}
    places: dict[int, Spot] = {}
    missing = missing_places(topology)
    innermost, copies = fabrics[0]
    # The chips of each copy, and its switches where it is no tree.
    spots, left = shape_spots(innermost.shape, innermost.size), 0.0
    for nodes in copies.tolist():
        for node, (x, y) in zip(nodes, spots, strict=False):
            if node not in missing:
                places[node] = (x + left, y)
        left += max((x for x, _ in spots), default=0.0) + 1.0 + GAP
    top = max((y for _, y in places.values()), default=0.0)
    for fabric, copies in fabrics:
        down = len(fabrics) > 1 and fabric is innermost
        if isinstance(fabric.shape, Tree):
            for nodes in copies:
                _stack(fabric.shape, nodes, places, names, 0.0 if down else top, -RISE if down else RISE)
    return places


def _stack(
    shape: Tree, nodes: IntArray, places: dict[int, Spot], names: Sequence[str], start: float, step: float
) -> None:
    """Put a tree's switches over what is below them, layer by layer."""
    wires = shape.wires()
    out = {switch: way for way, switch in ways_out(wires, shape.num_chips, switch_tiers(shape)).items()}
    for number, _ in enumerate(shape.layers):
        wanted: dict[int, float] = {}
        for switch in shape.switches(number).tolist():
            heads = wires.head[np.isin(wires.tail, [switch, out.get(switch, switch)])].tolist()
            below = [places[int(nodes[head])][0] for head in heads if int(nodes[head]) in places]
            if below:
                wanted[int(nodes[switch])] = sum(below) / len(below)
        widest = max((len(line) for node in wanted for line in two_lines(names[node]).split("\n")), default=0)
        order = sorted(wanted, key=lambda node: (wanted[node], node))
        xs = spread([wanted[node] for node in order], LETTER * widest + 0.4)
        places |= {node: (x, start + step * (number + 1)) for node, x in zip(order, xs, strict=True)}


def spread(wanted: Sequence[float], gap: float) -> list[float]:
    """Ascending places, moved until neighbours are `gap` apart; their middle stays where it is."""
    xs: list[float] = []
    for place in wanted:
        xs.append(max(place, xs[-1] + gap) if xs else place)
    shift = sum(place - x for place, x in zip(wanted, xs, strict=True)) / max(len(xs), 1)
    return [x + shift for x in xs]


def shape_spots(shape: Shape, num_chips: int) -> list[Spot]:
    """Where the chips of a shape stand: [chips], or of networks of edges [nodes]."""
    if isinstance(shape, Tree) or num_chips < 3:
        return [(float(chip), 0.0) for chip in range(num_chips)]
    if isinstance(shape, Torus):
        return grid_spots(shape.dims)[:num_chips]
    if isinstance(shape, FullMesh):
        return _circle(num_chips)
    return _springs(shape)


def grid_spots(dims: tuple[int, ...]) -> list[Spot]:
    """A grid of the first two dimensions; a third stands behind it, further ones beside it."""
    columns, rows, layers = (*dims, 1, 1)[:3]
    upright = rows > 2 * columns  # pictures are wider than high
    width = (rows if upright else columns) + BEHIND[0] * (layers - 1) + GAP
    spots = []
    for beside, z, y, x in product(range(prod(dims[3:])), range(layers), range(rows), range(columns)):
        across, up = (y, x) if upright else (x, y)
        spots.append((across + BEHIND[0] * z + width * beside, up + BEHIND[1] * z))
    return spots


def _circle(count: int) -> list[Spot]:
    radius = max(0.8, count / (2 * pi))
    return [
        (radius - radius * cos(2 * pi * i / count), radius * sin(2 * pi * i / count)) for i in range(count)
    ]


def _springs(shape: Shape) -> list[Spot]:
    """As springs between linked nodes would pull them."""
    import networkx

    wires = shape.wires()
    graph = networkx.Graph()
    graph.add_nodes_from(range(shape.num_nodes))
    graph.add_edges_from(zip(wires.tail.tolist(), wires.head.tolist(), strict=True))
    found = networkx.kamada_kawai_layout(graph)
    spots: FloatArray = np.array([found[node] for node in range(shape.num_nodes)])
    spots = (spots - spots.min(axis=0)) * sqrt(shape.num_nodes)
    return [(float(x), float(y)) for x, y in spots]
