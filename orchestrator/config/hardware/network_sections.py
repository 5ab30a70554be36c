"""Sections of a cluster file that describe links: of a host, of a scale-up fabric, of the levels between hosts.

What they mean is said in `network_links` (shapes, what a library adds) and `tiers` (who shares what).
"""

from typing import Annotated, Literal

from pydantic import Field

from orchestrator.config.schema import DataRate, Section, Size, Time, count_or

MOST_CHIPS = (
    2**20
)  # of a cluster: several times the largest that anyone builds; a slip of the pen lies beyond
MOST_DIMS = 8
MOST_PORTS, MOST_PATHS = 256, 1024  # of a router; side by side from a group of hosts
Share = Annotated[float, Field(ge=1e-6, le=1)]
Duplex = Literal["full", "half"]


class ProtocolSection(Section):
    """How a library moves the pieces of a collective: figures in place of the links' latency and efficiency."""

    name: str
    latency: Time | None = None
    share: Share | None = None
    pipelined: bool = False
    algorithms: list[str] = Field(default_factory=list)
    ops: list[str] = Field(default_factory=list)


class LinkSection(Section):
    """Figures of one link, one direction, where they differ from those around it."""

    bandwidth: DataRate | None = None
    latency: Time | None = None


class EdgeSection(Section):
    """A link between two nodes: chips by number, switches by any name."""

    a: int | str
    b: int | str
    bandwidth: DataRate | None = None
    latency: Time | None = None
    duplex: Literal["full", "half", "one way"] = "full"
    back: LinkSection | None = None


class LibrarySection(Section):
    """What a communication library adds to a tier: a fixed cost of each collective, ways to move its pieces."""

    setup: Time = 0.0
    protocols: list[ProtocolSection] = Field(default_factory=list)
    source: str = ""


class ShapeSection(LibrarySection):
    """How what a tier joins is joined; `dims` from the inside out, neighbours in number first."""

    shape: Literal["switch", "ring", "torus", "mesh", "full mesh", "dragonfly"] | None = None
    dims: list[Annotated[int, Field(ge=1)]] | None = Field(None, min_length=1, max_length=MOST_DIMS)
    links: list[LinkSection] | None = Field(None, min_length=1, max_length=MOST_DIMS)
    long_links: int | None = Field(None, ge=1, le=MOST_PORTS)
    arrangement: Literal["palmtree", "absolute"] | None = None
    routing: Literal["minimal", "valiant"] | None = None
    reduces: bool = False


class ScaleUpSection(ShapeSection):
    """The fabric between chips, one direction: of a switch all links of a chip together, else one link."""

    bandwidth: DataRate | None = None
    latency: Time | None = None
    efficiency: Share | None = None
    duplex: Duplex = "full"
    domain: int | None = Field(None, ge=2, le=MOST_CHIPS)
    edges: list[EdgeSection] | None = Field(None, min_length=1)
    through_chips: bool | None = None


class LevelSection(ShapeSection):
    """One level of switches between hosts, from the inside out; or one shape over all chips, by their cards."""

    name: str
    hosts: Annotated[int | None, count_or("any")] = None
    latency: Time | None = None
    oversubscription: float = Field(1.0, ge=1, le=1e6)
    rails: bool = False
    paths: int | None = Field(None, ge=2, le=MOST_PATHS)
    spread: Literal["hashed", "by target"] | None = None
    forwarding: Literal["cut-through", "store-and-forward"] = "cut-through"
    packet: Size | None = None


class PcieSection(LibrarySection):
    """The PCIe tree of a host: one chip's link to its switch, a switch's to the root complex, one direction.

    With no switches, chips hang on the root complex. `root` is what chips have that meet there.
    """

    switches: int = Field(1, ge=0)
    bandwidth: DataRate | None = None
    latency: Time | None = None
    efficiency: Share | None = None
    duplex: Duplex = "full"
    uplink: DataRate | None = None
    root: LinkSection | None = None


class NicSection(Section):
    """The network cards of a host; figures are one card's, one direction."""

    count: int = Field(1, ge=1)
    bandwidth: DataRate
    latency: Time
    efficiency: Share = 1.0
    duplex: Duplex = "full"
    source: str = ""
