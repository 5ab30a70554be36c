"""Cluster files: the schema, and the way from a file to a Cluster.

A file lists the hosts of one unit and how often it repeats, the scale-up fabric and the levels of the
scale-out network. Figures that a file leaves out come from the chip itself: link rates and latencies,
price, power. Network tiers are built from the inside out: on-chip network, scale-up fabric, PCIe switches
and root, scale-out levels; where hosts differ, each tier takes the slowest link among them.

Not modelled: several fabrics side by side (a tier is one kind of link), NICs that only some chips may use.
"""

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from comms.errors import ConfigError, combined, located
from comms.networks.conditions import HEALTHY
from comms.networks.layers import Spread, Switch
from comms.networks.links import Link
from comms.networks.network import Tier, TierKind
from kernels.chips import DEFAULT_HOST_LATENCY_S, Chip
from orchestrator.config.hardware.chip_file import ChipFigures, described_chip
from orchestrator.config.hardware.cluster import Cluster, Device, Host, Pcie, unit_of
from orchestrator.config.hardware.conditions_file import ConditionsSection, described
from orchestrator.config.hardware.network_links import (
    ShapeDrawing,
    best_share,
    library_of,
    line_and_efficiency,
)
from orchestrator.config.hardware.network_sections import (
    LevelSection,
    LinkSection,
    NicSection,
    PcieSection,
    ScaleUpSection,
)
from orchestrator.config.hardware.tiers import SwitchLevel, build_network, own_rates
from orchestrator.config.schema import (
    WHOLE,
    HourlyPrice,
    Power,
    Section,
    count_or,
    nearest,
    validate,
    word_field,
)
from orchestrator.config.yaml_file import Document, Location, read_yaml

FRAME_NBYTES = 1500.0  # of a packet where switches store and forward: the payload of an Ethernet frame
MOST_CHIPS_OF_HOST = 2**16
FROM_FILE = "the cluster file"  # a source, in words
DEFAULT_CLUSTER = "laptop"  # where no command line says another
_PACKAGE = Path(__file__).parents[2]
CONFIGS = "cluster_configs"
# Installed, in a checkout, or on a machine that a checkout has travelled to, each of its folders by itself
_TRAVELLED = [Path(folder) for folder in sys.path if "_ray_pkg_" in folder]
_SHIPPED = tuple(folder / CONFIGS for folder in (_PACKAGE, _PACKAGE.parent, *_TRAVELLED))


class ChipSection(ChipFigures):
    """Chips of one type in a host: a catalog chip (`like`) with overrides, or all figures of a new one."""

    like: str | None = None
    count: Annotated[int | None, count_or("auto")] = 1


class HostSection(Section):
    """Hosts of one kind; power and price are what the host adds to its chips'."""

    count: int = Field(1, ge=1)
    chips: list[ChipSection] = Field(min_length=1)
    pcie: PcieSection | None = None
    nics: NicSection | None = None
    power: Power = 0.0
    price: HourlyPrice = 0.0


class ClusterFile(Section):
    """One cluster file."""

    kind: Literal["cluster"]
    version: Annotated[Literal[1], WHOLE]
    name: str
    device: Annotated[Device, word_field(Device)]
    actors: int | None = Field(None, ge=1)
    repeat: Annotated[int | None, count_or("any")] = 1
    hosts: list[HostSection] = Field(min_length=1)
    scale_up: ScaleUpSection | None = None
    scale_out: list[LevelSection] = Field(default_factory=list)
    conditions: ConditionsSection | None = None

    @property
    def levels(self) -> list[LevelSection]:
        """Those between hosts: of a file that says nothing, switches as good as the cards."""
        plain = {"name": "scale-out", "source": "the NICs of the hosts"}
        return self.scale_out or [LevelSection.model_validate(plain)]


def shipped_clusters() -> dict[str, Path]:
    """Name to file of every shipped cluster, sorted by name."""
    folder = next((folder for folder in _SHIPPED if folder.is_dir()), None)
    return {} if folder is None else {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def cluster_path(text: str) -> Path:
    """The file that `--cluster` means: a path, or the bare name of a shipped cluster. A file of that name wins."""
    path = Path(text)
    if path.is_file():
        return path
    shipped = shipped_clusters()
    if text in shipped:
        return shipped[text]
    if path.suffix or len(path.parts) > 1:
        problem = "there is no such cluster file"
        raise ConfigError(problem, text, f"give a file, or one of {', '.join(shipped)}")
    raise ConfigError("no shipped cluster has this name", f"--cluster {text}", nearest(text, tuple(shipped)))


def load_cluster(path: str | Path) -> Cluster:
    """The cluster that the file at `path` describes. Raises ConfigError or ClusterError."""
    return cluster_from(read_yaml(Path(path)))


def cluster_from(document: Document) -> Cluster:
    """The cluster that a document describes."""
    file = validate(document, ClusterFile)
    _check_auto(document, file)
    hosts = [_host(document.inside("hosts", index), section) for index, section in enumerate(file.hosts)]
    with located(document.where("hosts")):
        unit, num_hosts = unit_of(hosts, [section.count for section in file.hosts], file.repeat)
    fabric = _fabric(document, file, unit, num_hosts)
    num_chips = None if num_hosts is None else num_hosts * len(unit[0].chips)
    reach = fabric.size if fabric else 1
    alone = num_hosts == 1 or (num_chips is not None and reach >= num_chips)
    _check_hosts(document, unit, num_hosts, alone)
    levels = _levels(document, file)
    network = build_network(unit, num_hosts, fabric, levels, document)
    _check_used(document, file, alone, meet_over_pcie=reach < len(unit[0].chips))
    given = HEALTHY
    if file.conditions is not None:
        given = described(file.conditions, network, num_chips, document.inside("conditions"))
    return Cluster(
        name=file.name,
        device=file.device,
        unit=unit,
        num_hosts=num_hosts,
        network=network,
        actors=file.actors,
        origin=document.origin,
        conditions=replace(given, rates=own_rates(network, file.scale_up, levels, unit)),
    )


def _host(place: Document, section: HostSection) -> Host:
    chips: list[Chip] = []
    for number, entry in enumerate(section.chips):
        here = place.inside("chips", number)
        chip = described_chip(here, entry.like)
        count = len(os.sched_getaffinity(0)) if entry.count is None else entry.count
        if len(chips) + count > MOST_CHIPS_OF_HOST:
            hint = f"up to {MOST_CHIPS_OF_HOST}; give the hosts that there are, with `count` or `repeat`"
            raise here.error(f"{count} chips in one host", hint)
        chips += [chip] * count
    return Host(
        chips=tuple(chips),
        pcie=_pcie(place.inside("pcie"), section.pcie, chips),
        nics=section.nics,
        watts=section.power,
        usd_per_hour=section.price,
    )


def _pcie(place: Document, section: PcieSection | None, chips: list[Chip]) -> Pcie | None:
    """The tree that the file describes, or else one switch with the links that the chips bring."""
    ports = [chip.host_link for chip in chips if chip.host_link is not None]
    if section is None:
        if len(ports) < len(chips):
            return None
        section = PcieSection.model_validate({})
    _check_pcie(place, section, len(chips), len(ports))
    has_switches = _has_switches(section, len(chips))
    line, alone = line_and_efficiency(section.bandwidth, section.efficiency, ports)
    best = best_share(alone, section.protocols)
    latency = section.latency
    if latency is None:
        latency = max((port.latency_s for port in ports), default=DEFAULT_HOST_LATENCY_S[0])
    root = section.root or LinkSection()
    # Through the root complex a message crosses two switches: twice the latency of one.
    root_s = 2 * latency if root.latency is None else root.latency
    if has_switches and root_s < latency:
        problem = "the way through the root complex is quicker than the one through a single switch"
        hint = "raise the root's `latency`, or lower that of the switches"
        raise place.error(problem, hint, "root", "latency")
    library = library_of(section, latency if has_switches else root_s, alone, best, place)
    uplink = (section.uplink or line) * best
    return Pcie(
        section.switches,
        Link(max(0.0, latency - library.issue_s), line * best),
        uplink,
        Link(root_s - library.issue_s, root.bandwidth or uplink),
        section.duplex == "full",
        library,
        section.source,
        tuple(
            port.bytes_per_s * (section.efficiency or port.efficiency) / (line * alone) * line * best
            for port in ports
        )
        if section.bandwidth is None
        else (line * best,) * len(chips),
    )


def _check_pcie(place: Document, section: PcieSection, num_chips: int, num_ports: int) -> None:
    """Raises ClusterError for a tree that cannot be, and for keys that would have no effect."""
    if section.bandwidth is None and num_ports < num_chips:
        raise place.error("a chip has no host link of its own", "give `bandwidth:` under `pcie:`")
    if section.switches and num_chips % section.switches:
        problem = f"{num_chips} chips do not spread evenly over {section.switches} PCIe switches"
        raise place.error(problem, "make `switches` a divisor of the chips in the host")
    if section.uplink is not None and not 1 < section.switches < num_chips:
        problem = "`uplink` has no effect without several switches of several chips"
        raise place.error(problem, "remove it, or raise `switches`", "uplink")
    if section.root is not None and section.switches == 1:
        problem = "`root` has no effect where all chips are behind one switch"
        raise place.error(problem, "remove it, or change `switches`", "root")
    has_both = section.root is not None and None not in (section.root.latency, section.latency)
    if has_both and not _has_switches(section, num_chips):
        problem = "`latency` has no effect where chips meet at the root complex only, which has its own"
        raise place.error(problem, "remove it, or change `switches`", "latency")


def _has_switches(section: PcieSection, num_chips: int) -> bool:
    """Whether chips meet below the root complex."""
    return section.switches == 1 or 1 < section.switches < num_chips


def _check_auto(document: Document, file: ClusterFile) -> None:
    for index, host in enumerate(file.hosts):
        for number, entry in enumerate(host.chips):
            if entry.count is None and file.device is not Device.CPU:
                hint = "write the number of chips, or `device: cpu`"
                problem = "`count: auto` can count only CPU cores"
                raise document.error(problem, hint, "hosts", index, "chips", number, "count")


def _check_hosts(document: Document, unit: tuple[Host, ...], num_hosts: int | None, alone: bool) -> None:
    """Raises ClusterError for hosts that differ in size or cannot reach each other."""
    sizes = {len(host.chips) for host in unit}
    if len(sizes) > 1:
        problem = f"hosts have different numbers of chips ({', '.join(map(str, sorted(sizes)))})"
        hint = "give every host the same number of chips, or describe two clusters"
        raise document.error(problem, hint, "hosts")
    if not alone and any(host.nics is None for host in unit):
        many = "any number of" if num_hosts is None else str(num_hosts)
        hint = "add `nics:` to each host, or make it one host"
        raise document.error(f"{many} hosts, but a host without NICs", hint, "hosts")


def _check_used(document: Document, file: ClusterFile, alone: bool, *, meet_over_pcie: bool) -> None:
    """Raises ClusterError for links, and figures of links, that no message between chips uses.

    `alone`: nothing leaves the host, or the scale-up domain that holds them all.
    """
    unused: list[Location] = [("scale_out",)] if alone and file.scale_out else []
    for index, host in enumerate(file.hosts):
        at = ("hosts", index)
        if alone and host.nics is not None:
            unused.append((*at, "nics"))
        if host.pcie is not None and not meet_over_pcie:  # then it is the way out at most
            given = host.pcie.model_fields_set
            keys = [(key,) for key in ("latency", "setup", "protocols", "root") if key in given]
            unused += [(*at, "pcie", *key) for key in ([()] if alone else keys)]
    hint = "remove it, or raise `repeat`" if alone else "remove it"
    problem = "`{}` has no effect, as no chips meet there"
    if unused:
        raise combined([document.error(problem.format(at[-1]), hint, *at) for at in unused])


def _fabric(
    document: Document, file: ClusterFile, unit: tuple[Host, ...], num_hosts: int | None
) -> Tier | None:
    """The scale-up fabric; what the file leaves out comes from the chips' own ports."""
    section, place = file.scale_up, document.inside("scale_up")
    if section is None:
        return None
    drawing = ShapeDrawing(section, place)
    domain = section.domain or drawing.num_chips or len(unit[0].chips)
    _check_domain(drawing, domain, len(unit[0].chips), num_hosts)
    chips = [chip for host in unit for chip in host.chips]
    ports = [chip.scaleup for chip in chips if chip.scaleup is not None]
    latency = section.latency if section.latency is not None else drawing.longest_latency_s
    if latency is None:
        latency = max((port.latency_s for port in ports), default=None)
    own_rates = section.bandwidth is not None or drawing.has_own_rates
    if not own_rates and len(ports) < len(chips):
        hint = "give `bandwidth:` and `latency:` under `scale_up:`"
        raise place.error("a chip has no scale-up links of its own", hint)
    if latency is None:
        raise place.error("the latency is not known", "add `latency:`, such as 2 us")
    bandwidth = section.bandwidth or (1.0 if own_rates else None)
    line, alone = line_and_efficiency(bandwidth, section.efficiency, ports)
    best = best_share(alone, section.protocols)
    library = library_of(section, latency, alone, best, place)
    each = line * best / (1 if own_rates else drawing.links_per_chip(domain))
    shape = drawing.shape(domain, Link(latency - library.issue_s, each), best, "scale-up", library.issue_s)
    source = _fabric_source(section, chips[0], own_rates=own_rates)
    return library.on(Tier("scale-up", TierKind.SCALE_UP, domain, shape, source))


def _fabric_source(section: ScaleUpSection, chip: Chip, *, own_rates: bool) -> str:
    """Where the figures of a fabric come from: its words for it, this file, the chip."""
    sources = {
        "bandwidth": FROM_FILE if own_rates else chip.sources.get("scale_up.bandwidth", ""),
        "latency": FROM_FILE if section.latency is not None else chip.sources.get("scale_up.latency", ""),
    }
    rate, latency = sources.values()
    is_mixed = rate != latency and FROM_FILE in (rate, latency)
    return section.source or (f"{rate}; latency: {latency}" if is_mixed else rate)


def _check_domain(drawing: ShapeDrawing, domain: int, per_host: int, num_hosts: int | None) -> None:
    """Raises ClusterError for a domain of another size than the cluster can have."""
    drawing.check_size(domain)
    total = None if num_hosts is None else num_hosts * per_host
    if not drawing.is_switch and total is not None and total % domain:
        dims = " x ".join(map(str, drawing.section.dims or (domain,)))
        problem = f"the {total} chips are not whole domains of {dims} = {domain} chips"
        key = "dims" if drawing.section.dims else "domain"
        hint = f"choose a size that divides {total}, or change the number of hosts"
        raise drawing.place.error(problem, hint, key)


def _levels(document: Document, file: ClusterFile) -> tuple[SwitchLevel, ...]:
    cards = [host.nics for host in file.hosts if host.nics is not None]
    if not cards:
        return ()
    efficiency = min(card.efficiency for card in cards)
    cards_latency_s = max(card.latency for card in cards)
    sources = [card.source for card in cards if card.source]
    spread = _spread(document, file.scale_out)
    levels: list[SwitchLevel] = []
    for number, section in enumerate(file.levels):
        place = document.inside("scale_out", number)
        _check_level(place, section, number, len(file.scale_out))
        latency = cards_latency_s if section.latency is None else section.latency
        library = library_of(section, latency, efficiency, efficiency, place)
        drawing = ShapeDrawing(section, place)
        packet = FRAME_NBYTES if section.packet is None else section.packet
        forward_nbytes = packet if section.forwarding == "store-and-forward" else 0.0
        levels.append(
            SwitchLevel(
                section=section,
                switch=Switch(section.name, section.reduces, forward_nbytes),
                latency_s=latency - library.issue_s,
                source=section.source or "; ".join(sources),
                spread=spread,
                library=library,
                drawing=None if drawing.is_switch else drawing,
            )
        )
    return tuple(levels)


def _spread(document: Document, levels: list[LevelSection]) -> Spread:
    """How messages keep to the paths between all levels: one way for the whole network."""
    spreads = {section.spread for section in levels if section.paths is not None}
    if len(spreads) > 1:
        hint = "give every level with `paths` the same `spread`"
        raise document.error("levels differ in their spread", hint, "scale_out")
    word = spreads.pop() if spreads else None
    return Spread(word.replace(" ", "_")) if word else Spread.ADAPTIVE


def _check_level(place: Document, section: LevelSection, number: int, num_levels: int) -> None:
    """Raises ClusterError for keys that would have no effect."""
    if section.paths is not None and number == 0:
        hint = "give `paths` to a level above"
        raise place.error("the paths into the first level are the cards", hint, "paths")
    if (section.paths is None) != (section.spread is None):
        key, other = ("paths", "spread") if section.spread is None else ("spread", "paths")
        hint = f"add `{other}:`, or remove it: messages that use all paths at once have one pipe"
        raise place.error(f"`{key}` has no effect without `{other}`", hint, key)
    if section.packet is not None and section.forwarding == "cut-through":
        hint = "add `forwarding: store-and-forward`"
        raise place.error("`packet` has no effect on cut-through switches", hint, "packet")
    if section.shape not in (None, "switch"):
        of_switches = ("hosts", "oversubscription", "rails", "paths", "spread", "forwarding", "packet")
        for key in of_switches:
            if key in section.model_fields_set:
                raise place.error(f"`{key}` has no effect on a {section.shape}", "remove it", key)
        if num_levels > 1:
            problem = f"a {section.shape} joins all chips by itself"
            raise place.error(problem, "make it the only level", "shape")
