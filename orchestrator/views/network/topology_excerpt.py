"""Topology excerpt: a large network by one group of each tier, and how many more there are of it.

At the left stands a group of the innermost tier, of many chips only the first few; beside it a box for its like
under the next tier's switch, and so on outwards. Tori show a corner of their grid. Where several switches of a tier
stand side by side (rails, planes) one is drawn for all.
"""

from collections.abc import Mapping
from itertools import product

from comms.networks.fabrics.switch_tree import Tree
from comms.networks.fabrics.torus_mesh import Torus
from comms.networks.network import Network, Tier
from comms.units import Quantity, format_quantity
from orchestrator.views.network.topology_layout import RISE, Line, Node, NodeKind, Picture, grid_spots

FEW = 8  # chips that are drawn of a group
EDGE = 4  # chips along a dimension of a grid


def excerpt(network: Network, num_chips: int, busy: Mapping[str, float] | None = None) -> Picture:
    """One group of each tier of a network of so many chips.

    Lines have the rate between chips that meet in their tier, or how `busy` the busiest wire of that tier is.
    """
    drawing = _Excerpt(busy)
    tiers = [tier for tier in network.tiers if tier.size > 1]
    inner = 1
    for number, tier in enumerate(tiers):
        size = min(tier.size, num_chips)
        if number == 0:
            drawing.innermost(tier, size, below=len(tiers) > 1 and not tier.part_of_next)
        else:
            drawing.around(tier, size // inner, inner, tiers[number - 1])
        inner = size
    if not tiers:
        drawing.nodes.append(Node(0.0, 0.0, "chip 0", NodeKind.CHIP))
    return Picture(tuple(drawing.nodes), tuple(drawing.lines))


def figures_of(tier: Tier) -> str:
    """Latency and rate between chips that meet in a tier."""
    rate = format_quantity(tier.link.bytes_per_s, Quantity.DATA_RATE, 3)
    return f"{rate}, {format_quantity(tier.link.latency_s, Quantity.TIME, 3)}"


class _Excerpt:
    """A picture that grows from the inside out."""

    def __init__(self, busy: Mapping[str, float] | None) -> None:
        self.busy = busy
        self.nodes: list[Node] = []
        self.lines: list[Line] = []
        self.chips: list[int] = []  # nodes by which the group reaches outwards, where its switches do not
        self.top = 0.0
        self.switch: int | None = None  # of the tier before

    def add(self, x: float, y: float, text: str, kind: NodeKind) -> int:
        self.nodes.append(Node(x, y, text, kind))
        return len(self.nodes) - 1

    def value(self, tier: Tier) -> float:
        """What the lines of a tier are coloured by."""
        return tier.link.bytes_per_s if self.busy is None else self.busy.get(tier.name, 0.0)

    @property
    def right(self) -> float:
        return max(node.x for node in self.nodes)

    def innermost(self, tier: Tier, size: int, below: bool) -> None:
        """A group of chips, as the tier joins them."""
        if isinstance(tier.shape, Torus):
            self.corner(tier, tier.shape.dims)
            return
        shown = size if size <= FEW else FEW - 1
        self.chips = [self.add(float(chip), 0.0, str(chip), NodeKind.CHIP) for chip in range(shown)]
        if shown < size:
            self.chips.append(self.add(shown + 0.5, 0.0, f"{size - shown} more\nchips", NodeKind.MORE))
        self.switch = self.over(tier, self.chips, -RISE if below else RISE)
        self.top = 0.0 if below else RISE

    def corner(self, tier: Tier, dims: tuple[int, ...]) -> None:
        """A few chips of a grid, and their neighbours."""
        part = tuple(min(size, EDGE if at < 2 else 2) for at, size in enumerate(dims[:3]))
        spots = grid_spots(part)
        digits = [each[::-1] for each in product(*(range(size) for size in reversed(part)))]
        nodes = {
            each: self.add(*spot, ",".join(map(str, each)), NodeKind.CHIP)
            for each, spot in zip(digits, spots, strict=True)
        }
        self.chips = sorted(nodes.values(), key=lambda node: -self.nodes[node].y)  # the edge reaches outwards
        for each, node in nodes.items():
            for at, digit in enumerate(each):
                neighbour = nodes.get((*each[:at], digit + 1, *each[at + 1 :]))
                if neighbour is not None:
                    self.lines.append(Line(node, neighbour, self.value(tier)))
        words = " x ".join(map(str, dims))
        text = f"a corner of\n{words}\n{tier.name}\n{figures_of(tier)}"
        self.add(self.right + 2.2, max(y for _, y in spots) / 2, text, NodeKind.MORE)
        self.top = max(y for _, y in spots)

    def around(self, tier: Tier, groups: int, inner: int, before: Tier) -> None:
        """The next tier: a box for the other groups, and a switch over all."""
        own = [self.switch] if before.part_of_next and self.switch is not None else self.chips[:FEW]
        boxes = []
        if groups > 1:
            text = f"{groups - 1} more\nof {inner} chips"
            boxes.append(self.add(self.right + 2.4, self.top / 2, text, NodeKind.MORE))
        self.top += RISE
        self.switch = self.over(tier, own + boxes, self.top)

    def over(self, tier: Tier, below: list[int], y: float) -> int:
        """A switch over some nodes; what is no tree has its name only."""
        x = sum(self.nodes[node].x for node in below) / len(below)
        kind = f"\n({type(tier.shape).__name__.lower()})" if not isinstance(tier.shape, Tree) else ""
        switch = self.add(x, y, f"{tier.name}{kind}\n{figures_of(tier)}", NodeKind.SWITCH)
        self.lines += [Line(node, switch, self.value(tier)) for node in below]
        return switch
