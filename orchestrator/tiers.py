"""Tiers: the network of a cluster, built from its hosts, its scale-up fabric and its levels of switches.

From the inside out: the on-chip network (where all chips have the same, with known hops), the scale-up
fabric, PCIe (one switch, then the root complex of the host), and the scale-out levels. A tier appears only
where it joins more chips than the one inside it. Between hosts each chip has an equal share of its host's
NICs.
"""

from dataclasses import dataclass, replace

from comms.links import Link
from comms.network import UNBOUNDED, Network, Tier, TierKind
from orchestrator.cluster import Host
from orchestrator.errors import ClusterError
from orchestrator.yaml_file import Document


@dataclass(frozen=True, slots=True)
class Fabric:
    """The scale-up fabric: one chip's link, and how many chips one domain joins."""

    link: Link
    domain: int
    source: str


@dataclass(frozen=True, slots=True)
class Level:
    """One level of switches between hosts; None: any number of hosts, or the NIC's own latency."""

    name: str
    hosts: int | None
    latency_s: float | None
    oversubscription: float
    source: str


def build_network(
    unit: tuple[Host, ...],
    num_hosts: int | None,
    fabric: Fabric | None,
    levels: tuple[Level, ...],
    document: Document,
) -> Network:
    """The network of `num_hosts` hosts (None: any number). Raises ClusterError where groups do not nest."""
    per_host = len(unit[0].chips)
    total = UNBOUNDED if num_hosts is None else num_hosts * per_host
    tiers = _on_chip(unit)
    if fabric is not None:
        tiers.append(Tier("scale-up", fabric.domain, fabric.link, TierKind.SCALE_UP, source=fabric.source))
    tiers += _inside_host(unit, document)
    _check_joined(tiers, per_host, document)
    if num_hosts != 1:
        tiers += _between_hosts(unit, num_hosts, levels, document)
    tiers = _growing(tiers or [_alone(unit[0])], total)
    tiers[-1] = replace(tiers[-1], size=total)
    try:
        return Network(tuple(tiers))
    except ValueError as error:
        hint = "make each group a whole number of the groups inside it"
        raise ClusterError(str(error), document.where(("scale_up",)), hint) from error


def _check_joined(tiers: list[Tier], per_host: int, document: Document) -> None:
    """Chips of one host need a link of their own: without this check they would meet through the NICs."""
    reach = max((tier.size for tier in tiers), default=1)
    if reach < per_host:
        groups = f"in groups of {reach} only" if reach > 1 else "by nothing"
        problem = f"the {per_host} chips of a host are joined {groups}"
        hint = "add `pcie:` to the host, or `scale_up:` for what joins its chips"
        raise ClusterError(problem, document.where(("hosts",)), hint)


def _alone(host: Host) -> Tier:
    """What a cluster of one chip without an on-chip network has: its memory."""
    link = Link(0.0, host.chips[0].memory_bytes_per_s)
    return Tier("on-chip", 1, link, TierKind.ON_CHIP, source="the chip's own memory")


def _on_chip(unit: tuple[Host, ...]) -> list[Tier]:
    chips = [chip for host in unit for chip in host.chips]
    nocs = {chip.noc for chip in chips}
    noc = chips[0].noc
    if len(nocs) > 1 or noc is None or noc.hop_latency_s is None or noc.hop_bytes_per_s is None:
        return []
    source = chips[0].sources.get("noc.hop_bandwidth", "")
    return [Tier("on-chip", 1, Link(noc.hop_latency_s, noc.hop_bytes_per_s), TierKind.ON_CHIP, source=source)]


def _inside_host(unit: tuple[Host, ...], document: Document) -> list[Tier]:
    trees = [host.pcie for host in unit if host.pcie is not None]
    if len(trees) < len(unit):
        return []
    switches = {tree.switches for tree in trees}
    if len(switches) > 1:
        hint = "give every host the same number of PCIe switches"
        raise ClusterError("hosts differ in their PCIe switches", document.where(("hosts",)), hint)
    link = _slowest([tree.link for tree in trees])
    per_host, per_switch = len(unit[0].chips), len(unit[0].chips) // switches.pop()
    # Through the root complex a message crosses two switches: twice the latency, the same rate.
    root = Link(2 * link.latency_s, link.bytes_per_s) if per_switch < per_host else link
    source = "the host links of the chips"
    return [
        Tier("pcie switch", per_switch, link, TierKind.PCIE, source=source),
        Tier("pcie root", per_host, root, TierKind.PCIE, source=source),
    ]


def _between_hosts(
    unit: tuple[Host, ...], num_hosts: int | None, levels: tuple[Level, ...], document: Document
) -> list[Tier]:
    per_host = len(unit[0].chips)
    shares = [
        Link(host.nics.link.latency_s, host.nics.link.bytes_per_s * host.nics.count / per_host)
        for host in unit
        if host.nics is not None
    ]
    nic = _slowest(shares)
    tiers = []
    for level in levels or (Level("scale-out", None, None, 1.0, "the NICs of the hosts"),):
        hosts = UNBOUNDED // per_host if level.hosts is None else level.hosts
        size = UNBOUNDED if level.hosts is None else hosts * per_host
        latency = nic.latency_s if level.latency_s is None else level.latency_s
        link = Link(latency, nic.bytes_per_s)
        tiers.append(Tier(level.name, size, link, TierKind.SCALE_OUT, level.oversubscription, level.source))
    if num_hosts is not None and tiers[-1].size < num_hosts * per_host:
        problem = f"the outermost level joins {tiers[-1].size // per_host} hosts, but there are {num_hosts}"
        raise ClusterError(problem, document.where(("scale_out",)), "add a level with `hosts: any`")
    return tiers


def _growing(tiers: list[Tier], total: int) -> list[Tier]:
    """Only tiers that join more chips than those before, none beyond `total`."""
    kept: list[Tier] = []
    for tier in tiers:
        if kept and (tier.size <= kept[-1].size or kept[-1].size >= total):
            continue
        kept.append(tier if tier.size < total else replace(tier, size=total))
    return kept


def _slowest(links: list[Link]) -> Link:
    return Link(max(link.latency_s for link in links), min(link.bytes_per_s for link in links))
