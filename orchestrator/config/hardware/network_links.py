"""Links of a cluster file, from what its sections say to what `comms` reckons with: shapes, rates and protocols.

    switch      one switch over all chips; figures are a chip's, all its links together
    ring        each chip has a link to the one before and the one after; figures are one link's, here and below
    torus, mesh `dims` from the inside out; `links` where dimensions differ
    full mesh   a link from each chip to each other
    dragonfly   `dims` are chips per router, routers per group, groups; `links` to a router, in a group, between groups

A rate that the file leaves out is what the chips bring, spread evenly over the links that a chip has in the shape.

A file gives two sets of figures: of a message by itself (latency, efficiency) and of a stage of a collective, in place
of them (a protocol's latency and share, both as `orchestrate calibrate links` prints them). A collective runs as one
kernel and pays its setup once; a message by itself pays for being issued each time. So the link gets the better of
both, protocols what they lack of it, and what issuing a message adds (`issue_s`) stands apart: no cost counts twice.
A stage may take longer, too, where a library's kernels have a thread of the host send over a network card.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod

from comms.algorithms.catalog import names as algorithm_names
from comms.collectives.schedule import Op
from comms.errors import ClusterError, CommsError
from comms.networks.fabrics.dragonfly import Arrangement, Dragonfly, Routing
from comms.networks.fabrics.edge_list import Duplex, Edge, EdgeList
from comms.networks.fabrics.switch_tree import Tree
from comms.networks.fabrics.torus_mesh import FullMesh, Torus
from comms.networks.layers import Switch
from comms.networks.links import PLAIN, Link, Protocol
from comms.networks.shapes import Shape
from kernels.chips import Port
from orchestrator.config.hardware.cluster import Library
from orchestrator.config.hardware.network_sections import (
    MOST_CHIPS,
    EdgeSection,
    LibrarySection,
    LinkSection,
    ProtocolSection,
    ScaleUpSection,
    ShapeSection,
)
from orchestrator.config.schema import nearest
from orchestrator.config.yaml_file import Document

SWITCH = "switch"
# What each shape makes use of besides latency and bandwidth; anything else would have no effect.
USES: dict[str, frozenset[str]] = {
    SWITCH: frozenset({"reduces", "duplex"}),
    "ring": frozenset(),
    "torus": frozenset({"dims", "links"}),
    "mesh": frozenset({"dims", "links"}),
    "full mesh": frozenset({"duplex"}),
    "dragonfly": frozenset({"dims", "links", "long_links", "arrangement", "routing"}),
    "edges": frozenset({"edges", "through_chips"}),
}
OPTIONAL = ("dims", "links", "long_links", "arrangement", "routing", "reduces", "duplex", "through_chips")
DRAGONFLY_DIMS = 3
MOST_WIRES = 2**21  # a full mesh of 1,448 chips; a dragonfly of 279,000 has 1.4 million


@contextmanager
def described(where: str, hint: str) -> Iterator[None]:
    """What is wrong with a network, where a file describes it: what the network calls the part goes before the rest."""
    try:
        yield
    except CommsError as error:
        part = f"{error.where}: " if error.where else ""
        raise ClusterError(f"{part}{error.problem}", where, error.hint or hint) from error


@dataclass(frozen=True, slots=True)
class ShapeDrawing:
    """A shape section of a document, checked for keys that would have no effect."""

    section: ShapeSection
    place: Document

    @property
    def kind(self) -> str:
        """One of USES."""
        edges = isinstance(self.section, ScaleUpSection) and self.section.edges
        return "edges" if edges else self.section.shape or SWITCH

    @property
    def is_switch(self) -> bool:
        return self.kind == SWITCH

    @property
    def num_chips(self) -> int | None:
        """As many as `dims` make; None where the section does not say."""
        return prod(self.section.dims) if self.section.dims else None

    @property
    def longest_latency_s(self) -> float | None:
        """Of links that all have latencies of their own; None where some do not."""
        latencies = [link.latency for link in self._own_links]
        known = [latency for latency in latencies if latency is not None]
        return max(known) if known and len(known) == len(latencies) else None

    @property
    def has_own_rates(self) -> bool:
        """Whether all links have rates of their own."""
        links = self._own_links
        return bool(links) and all(link.bandwidth is not None for link in links)

    @property
    def _own_links(self) -> tuple[LinkSection | EdgeSection, ...]:
        """Those that may have figures of their own."""
        edges = self.section.edges if isinstance(self.section, ScaleUpSection) else None
        return (*(self.section.links or ()), *(edges or ()))

    def links_per_chip(self, num_chips: int) -> int:
        """Over how many links a chip spreads what it has."""
        match self.kind:
            case "ring":
                return 2 if num_chips > 2 else 1
            case "torus" | "mesh":
                return sum(min(size - 1, 2) for size in self.section.dims or ())
            case "full mesh":
                return num_chips - 1
        return 1

    def __post_init__(self) -> None:
        """Raises ClusterError for keys without effect, and for those that the shape needs."""
        given, uses = self.section.model_fields_set, USES[self.kind]
        if self.kind == "edges" and self.section.shape is not None:
            raise self.place.error("a fabric of edges has no shape", "give `shape:` or `edges:`", "shape")
        for key in OPTIONAL:
            if key in given and key not in uses:
                problem = f"`{key}` has no effect on {self._name}"
                raise self.place.error(problem, "remove it, or choose another shape", key)
        if "dims" in uses and not self.section.dims:
            raise self.place.error(f"{self._name} needs `dims`", "add `dims:`, such as [4, 8]", "shape")
        if (made := self.num_chips or 1) > MOST_CHIPS:
            raise self.place.error(f"{made} chips in one {self.kind}", f"give up to {MOST_CHIPS}", "dims")
        num_dims = len(self.section.dims or ())
        if self.kind == "dragonfly" and num_dims != DRAGONFLY_DIMS:
            hint = "give chips per router, routers per group and groups"
            raise self.place.error(f"{num_dims} dims for a dragonfly", hint, "dims")
        if self.section.links and len(self.section.links) != num_dims:
            count = len(self.section.links)
            raise self.place.error(f"{count} links for {num_dims} dims", "give one for each", "links")
        self._check_used(self.section.links or ())

    def _check_used(self, links: Sequence[LinkSection]) -> None:
        """What all links say for themselves, nobody reads from the section around them."""
        for key in ("bandwidth", "latency"):
            everywhere = links and all(getattr(link, key) is not None for link in links)
            if everywhere and getattr(self.section, key, None) is not None:
                problem = f"`{key}` has no effect, as each of the links has its own"
                raise self.place.error(problem, "remove it", key)

    def check_size(self, num_chips: int) -> None:
        """Raises ClusterError where the dims make another number of chips."""
        made = self.num_chips
        if made is not None and made != num_chips:
            dims = " x ".join(map(str, self.section.dims or ()))
            hint = f"choose dims whose product is {num_chips}"
            problem = f"dims of {dims} make {made} chips, but there are {num_chips}"
            raise self.place.error(problem, hint, "dims")

    def _check_wires(self, num_chips: int) -> None:
        """Raises ClusterError for more wires than are kept one by one."""
        wires = num_chips**2 if self.kind == "full mesh" else 0
        if self.kind == "dragonfly" and self.section.dims:
            _, routers, groups = self.section.dims
            wires = groups * routers**2 + groups**2 + 2 * num_chips
        if wires > MOST_WIRES:
            hint = f"choose another shape, or up to {MOST_WIRES} wires"
            raise self.place.error(f"a {self.kind} of {num_chips} chips has {wires} wires", hint, "shape")

    def shape(self, num_chips: int, link: Link, efficiency: float, name: str, earlier_s: float) -> Shape:
        """The shape over so many chips; `link` is the section's, `earlier_s` what all latencies are quicker by."""
        self._check_wires(num_chips)
        key = "edges" if self.kind == "edges" else "dims"
        with described(self.place.where(key), "change the shape"):
            return self._shape(num_chips, link, efficiency, name, earlier_s)

    def _shape(self, num_chips: int, link: Link, efficiency: float, name: str, earlier_s: float) -> Shape:
        section = self.section
        half = isinstance(section, ScaleUpSection) and section.duplex == "half"
        given = section.links or [LinkSection()] * len(section.dims or ())
        links = tuple(self._link(each, link, efficiency, earlier_s) for each in given)
        match self.kind:
            case "ring":
                return Torus((num_chips,), (link,))
            case "torus" | "mesh":
                return Torus(tuple(section.dims or ()), links, (self.kind == "torus",))
            case "full mesh":
                return FullMesh(num_chips, link, half_duplex=half)
            case "dragonfly":
                return self._dragonfly(links)
            case "edges":
                return self._graph(num_chips, link, efficiency, earlier_s)
        port = Link(link.latency_s / 2, link.bytes_per_s)
        return Tree(num_chips, port, Switch(name, section.reduces), duplex=not half)

    def _dragonfly(self, links: tuple[Link, ...]) -> Dragonfly:
        section, dims = self.section, tuple(self.section.dims or ())
        return Dragonfly(
            num_groups=dims[2],
            routers_per_group=dims[1],
            chips_per_router=dims[0],
            long_links_per_router=section.long_links or -(-(dims[2] - 1) // dims[1]),
            terminal=links[0],
            local=links[1],
            long=links[2],
            arrangement=Arrangement(section.arrangement or Arrangement.PALMTREE),
            routing=Routing(section.routing or Routing.MINIMAL),
        )

    def _graph(self, num_chips: int, link: Link, efficiency: float, earlier_s: float) -> EdgeList:
        section = self.section
        assert isinstance(section, ScaleUpSection)
        given = section.edges or ()
        names = dict.fromkeys(node for edge in given for node in (edge.a, edge.b) if isinstance(node, str))
        edges: list[Edge] = []
        for number, edge in enumerate(given):
            _check_edge(edge, num_chips, self.place.inside("edges", number))
            own = self._link(edge, link, efficiency, earlier_s)
            back = None if edge.back is None else self._link(edge.back, own, efficiency, earlier_s)
            edges.append(Edge(edge.a, edge.b, own, Duplex(edge.duplex.replace(" ", "_")), back))
        relay = section.through_chips if section.through_chips is not None else not names
        return EdgeList(num_chips, tuple(edges), tuple(names), relay)

    def _link(
        self, own: LinkSection | EdgeSection, around: Link, efficiency: float, earlier_s: float
    ) -> Link:
        """A link's own figures, else those around it, which are already what links reach."""
        latency = around.latency_s if own.latency is None else own.latency - earlier_s
        rate = around.bytes_per_s if own.bandwidth is None else own.bandwidth * efficiency
        if latency < 0:
            hint = "leave the protocols' latency out, or raise that of the link"
            raise self.place.error("a protocol's stage is quicker than one of the links", hint, "protocols")
        return Link(latency, rate)

    @property
    def _name(self) -> str:
        return "links given edge by edge" if self.kind == "edges" else f"a {self.kind}"


def _check_edge(edge: EdgeSection, num_chips: int, place: Document) -> None:
    for node in (edge.b, edge.a):
        if isinstance(node, int) and not 0 <= node < num_chips:
            hint = f"chips are 0 to {num_chips - 1}; switches have names"
            raise place.error(f"there is no chip {node} in a domain of {num_chips}", hint)
    if edge.a == edge.b:
        raise place.error(f"a link from {edge.a!r} to itself", "remove it, or name two nodes")


def line_and_efficiency(
    bandwidth: float | None, efficiency: float | None, ports: list[Port]
) -> tuple[float, float]:
    """A chip's line rate and what a message by itself reaches of it: as the file says, else the slowest port's."""
    if bandwidth is not None:
        return bandwidth, efficiency or 1.0
    port = min(ports, key=lambda port: port.bytes_per_s * (efficiency or port.efficiency))
    return port.bytes_per_s, efficiency or port.efficiency


def best_share(efficiency: float, sections: Sequence[ProtocolSection]) -> float:
    """What the links reach at best, alone or in a collective."""
    return max([efficiency, *(each.share for each in sections if each.share is not None)])


def library_of(
    section: LibrarySection, latency_s: float, efficiency: float, best: float, place: Document
) -> Library:
    """A tier's library, where a message by itself has this latency and efficiency, and its links reach `best`."""
    base = min([latency_s, *(each.latency for each in section.protocols if each.latency is not None)])
    protocols: list[Protocol] = []
    for number, each in enumerate(section.protocols):
        here, latency = place.inside("protocols", number), each.latency
        share = efficiency if each.share is None else each.share
        _check_protocol(each, here)
        if each.name in [other.name for other in protocols]:
            raise here.error(f"two protocols are named {each.name!r}", "give each its own name")
        if share > best:
            problem = f"protocol {each.name!r} has a share of {share}, above the efficiency of {best}"
            raise here.error(problem, "raise the `efficiency` of the links")
        later_s = (latency_s if latency is None else latency) - base
        only = tuple(each.algorithms), tuple(each.ops)
        protocols.append(Protocol(each.name, later_s, share / best, each.pipelined, *only))
    return Library(section.setup, tuple(protocols) or (PLAIN,), latency_s - base)


def _check_protocol(section: ProtocolSection, here: Document) -> None:
    """Raises ClusterError for algorithms and operations that there are not."""
    algorithms = tuple(dict.fromkeys(known for op in Op for known in algorithm_names(op)))
    ops = tuple(map(str, Op))
    for what, given, known in (
        ("algorithm", section.algorithms, algorithms),
        ("operation", section.ops, ops),
    ):
        for name in given:
            if name not in known:
                raise here.error(f"there is no {what} {name!r}", nearest(name, known))
