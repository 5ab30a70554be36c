"""Cluster files: the schema, and the way from a file to a Cluster.

A file lists the hosts of one unit and how often it repeats, the scale-up fabric and the levels of the
scale-out network. Figures that a file leaves out come from the chip itself: link rates and latencies,
price, power. Network tiers are built from the inside out: on-chip network, scale-up fabric, PCIe switches
and root, scale-out levels; where hosts differ, each tier takes the slowest link among them.

Not modelled: several fabrics side by side (a tier is one kind of link), and NICs that only some chips may
use.
"""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from comms.links import Link
from kernels.chips import DEFAULT_HOST_LATENCY_S, Chip
from orchestrator.chip_file import ChipFigures, described_chip
from orchestrator.cluster import Cluster, Device, Host, Nics, Pcie
from orchestrator.errors import ClusterError
from orchestrator.schema import CountOr, DataRate, HourlyPrice, Power, Section, Time, validate
from orchestrator.tiers import Fabric, Level, build_network
from orchestrator.yaml_file import Document, read_yaml

Share = Annotated[float, Field(gt=0, le=1)]


class ChipSection(ChipFigures):
    """Chips of one type in a host: a catalog chip (`like`) with overrides, or all figures of a new one."""

    like: str | None = None
    count: Annotated[int | None, CountOr("auto")] = 1


class PcieSection(Section):
    """The PCIe tree of a host; rates and latencies are one chip's link to its switch, one direction."""

    switches: int = Field(1, ge=1)
    bandwidth: DataRate | None = None
    latency: Time | None = None
    efficiency: Share = 1.0


class NicSection(Section):
    """The network cards of a host; figures are one card's, one direction."""

    count: int = Field(1, ge=1)
    bandwidth: DataRate
    latency: Time
    efficiency: Share = 1.0


class HostSection(Section):
    """Hosts of one kind; power and price are what the host adds to its chips'."""

    count: int = Field(1, ge=1)
    chips: list[ChipSection] = Field(min_length=1)
    pcie: PcieSection | None = None
    nics: NicSection | None = None
    power: Power = 0.0
    price: HourlyPrice = 0.0


class ScaleUpSection(Section):
    """The fabric between chips; figures are one chip's, one direction, all its links together."""

    bandwidth: DataRate | None = None
    latency: Time | None = None
    efficiency: Share | None = None
    domain: int | None = Field(None, ge=2)
    source: str = ""


class LevelSection(Section):
    """One level of switches between hosts, from the inside out."""

    name: str
    hosts: Annotated[int | None, CountOr("any")] = None
    latency: Time | None = None
    oversubscription: float = Field(1.0, ge=1)
    source: str = ""


class ClusterFile(Section):
    """One cluster file."""

    kind: Literal["cluster"]
    version: Literal[1]
    name: str
    device: Literal["simulated", "cpu", "cuda"]
    actors: int | None = Field(None, ge=1)
    repeat: Annotated[int | None, CountOr("any")] = 1
    hosts: list[HostSection] = Field(min_length=1)
    scale_up: ScaleUpSection | None = None
    scale_out: list[LevelSection] = Field(default_factory=list)


def load_cluster(path: str | Path) -> Cluster:
    """The cluster that the file at `path` describes. Raises ConfigError or ClusterError."""
    return cluster_from(read_yaml(Path(path)))


def cluster_from(document: Document) -> Cluster:
    """The cluster that a document describes."""
    file = validate(document, ClusterFile)
    _check_auto(document, file)
    hosts = [_host(document, index, section) for index, section in enumerate(file.hosts)]
    unit = tuple(host for host, section in zip(hosts, file.hosts, strict=True) for _ in range(section.count))
    num_hosts = None if file.repeat is None else file.repeat * len(unit)
    _check_hosts(document, unit, num_hosts)
    return Cluster(
        name=file.name,
        device=Device(file.device),
        unit=unit,
        num_hosts=num_hosts,
        network=build_network(unit, num_hosts, _fabric(document, file, unit), _levels(file), document),
        actors=file.actors,
        origin=document.origin,
    )


def _host(document: Document, index: int, section: HostSection) -> Host:
    chips: list[Chip] = []
    for number, entry in enumerate(section.chips):
        chip = described_chip(document, ("hosts", index, "chips", number), entry.like)
        count = len(os.sched_getaffinity(0)) if entry.count is None else entry.count
        chips += [chip] * count
    nics = section.nics
    return Host(
        chips=tuple(chips),
        pcie=_pcie(document, index, section.pcie, chips),
        nics=None if nics is None else Nics(nics.count, Link(nics.latency, nics.bandwidth * nics.efficiency)),
        watts=section.power,
        usd_per_hour=section.price,
    )


def _pcie(document: Document, index: int, section: PcieSection | None, chips: list[Chip]) -> Pcie | None:
    """The tree that the file describes, or else one switch with the links that the chips bring."""
    ports = [chip.host_link for chip in chips if chip.host_link is not None]
    where = document.where(("hosts", index, "pcie"))
    if section is None:
        if len(ports) < len(chips):
            return None
        return Pcie(
            1, Link(max(port.latency_s for port in ports), min(p.bytes_per_s * p.efficiency for p in ports))
        )
    if section.bandwidth is None and len(ports) < len(chips):
        raise ClusterError("a chip has no host link of its own", where, "give `bandwidth:` under `pcie:`")
    if len(chips) % section.switches:
        problem = f"{len(chips)} chips do not spread evenly over {section.switches} PCIe switches"
        raise ClusterError(problem, where, "make `switches` a divisor of the chips in the host")
    own = section.bandwidth and section.bandwidth * section.efficiency
    rate = own or min(port.bytes_per_s * port.efficiency for port in ports)
    latency = section.latency
    if latency is None:
        latency = max((port.latency_s for port in ports), default=DEFAULT_HOST_LATENCY_S[0])
    return Pcie(section.switches, Link(latency, rate))


def _check_auto(document: Document, file: ClusterFile) -> None:
    for index, host in enumerate(file.hosts):
        for number, entry in enumerate(host.chips):
            if entry.count is None and file.device != "cpu":
                where = document.where(("hosts", index, "chips", number, "count"))
                hint = "write the number of chips, or `device: cpu`"
                raise ClusterError("`count: auto` can count only CPU cores", where, hint)


def _check_hosts(document: Document, unit: tuple[Host, ...], num_hosts: int | None) -> None:
    sizes = {len(host.chips) for host in unit}
    if len(sizes) > 1:
        problem = f"hosts have different numbers of chips ({', '.join(map(str, sorted(sizes)))})"
        hint = "give every host the same number of chips, or describe two clusters"
        raise ClusterError(problem, document.where(("hosts",)), hint)
    if num_hosts != 1 and any(host.nics is None for host in unit):
        many = "any number of" if num_hosts is None else str(num_hosts)
        hint = "add `nics:` to each host, or make it one host"
        raise ClusterError(f"{many} hosts, but a host without NICs", document.where(("hosts",)), hint)


def _fabric(document: Document, file: ClusterFile, unit: tuple[Host, ...]) -> Fabric | None:
    """The scale-up fabric; what the file leaves out comes from the chips' own ports."""
    section = file.scale_up
    if section is None:
        return None
    ports = [chip.scaleup for chip in _chips(unit) if chip.scaleup is not None]
    if section.bandwidth is None and len(ports) < sum(1 for _ in _chips(unit)):
        hint = "give `bandwidth:` and `latency:` under `scale_up:`"
        raise ClusterError("a chip has no scale-up links of its own", document.where(("scale_up",)), hint)
    if section.latency is None and not ports:
        raise ClusterError(
            "the latency is not known", document.where(("scale_up",)), "add `latency:`, such as 2 us"
        )
    latency = max(port.latency_s for port in ports) if section.latency is None else section.latency
    share = 1.0 if section.efficiency is None else section.efficiency
    if section.bandwidth is not None:
        rate = section.bandwidth * share
    else:
        rate = min(port.bytes_per_s * (section.efficiency or port.efficiency) for port in ports)
    return Fabric(Link(latency, rate), section.domain or len(unit[0].chips), section.source)


def _levels(file: ClusterFile) -> tuple[Level, ...]:
    return tuple(Level(s.name, s.hosts, s.latency, s.oversubscription, s.source) for s in file.scale_out)


def _chips(unit: tuple[Host, ...]) -> Iterable[Chip]:
    return (chip for host in unit for chip in host.chips)
