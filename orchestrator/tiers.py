"""Tiers: the network of a cluster, built from its hosts, its scale-up fabric and its levels of switches.

From the inside out: the on-chip network (where all chips have the same, with known hops), the scale-up
fabric, PCIe (switches, then the root complex of the host), and the scale-out levels. A tier appears only
where it joins more chips than the one inside it.

On its way out of the host a message takes the chip's PCIe link, then the uplink of its PCIe switch (unless there are
cards behind every switch), then a card. Cards are dealt out evenly; where that is impossible, or where one card
serves the whole host, all chips share all of them: one chip that sends alone has a whole card. Where chips of a host
also meet over PCIe and one card serves them all, both are one tree of wires; else each has wires of its own.

Between levels, bandwidth shrinks by the `oversubscription` of each: 4 at the spine leaves every chip a quarter of its
share when all send through it, 2 above that an eighth. At the first level it is what its switches can pass.

Not modelled: PCIe traffic and network traffic of one chip in each other's way where they have wires of their own;
uplinks of PCIe switches wider or narrower than a chip's link.
"""

from dataclasses import dataclass, replace

from comms.errors import CommsError
from comms.layers import Switch, Trunk, half_latencies
from comms.links import Link
from comms.network import UNBOUNDED, Network, Tier, TierKind, layered, switched
from comms.tree import Tree
from orchestrator.cluster import Host, Nics
from orchestrator.errors import ClusterError
from orchestrator.yaml_file import Document


@dataclass(frozen=True, slots=True)
class Fabric:
    """The scale-up fabric: one chip's link, and how many chips one domain joins."""

    link: Link
    domain: int
    source: str
    reduces: bool = False  # its switches add and copy


@dataclass(frozen=True, slots=True)
class Level:
    """One level of switches between hosts; None: any number of hosts, or the NIC's own latency."""

    name: str
    hosts: int | None
    latency_s: float | None
    oversubscription: float
    source: str
    rails: bool = False  # one switch for each card of a host, those of equal place under one
    reduces: bool = False  # its switches add and copy


@dataclass(frozen=True, slots=True)
class _Step:
    """The wires into one layer of a tree, from each group of `size` chips below it."""

    tier: str
    size: int
    bytes_per_s: float
    latency_s: float | None  # between chips that meet in the layer; None where none do
    paths: int = 1
    rails: int = 1
    oversubscription: float = 1.0
    reduces: bool = False


PCIE_SOURCE = "the host links of the chips"


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
    levels = levels or (Level("scale-out", None, None, 1.0, "the NICs of the hosts"),)
    tiers = _on_chip(unit)
    if fabric is not None:
        tiers.append(_scale_up(fabric, total))
    inside = _pcie(unit, document)
    _check_joined(max(fabric.domain if fabric else 1, per_host if inside else 1), per_host, document)
    try:
        if num_hosts == 1:
            tiers += _tiers(_tree(per_host, inside), tiers, ()) if inside else []
        else:
            _check_levels(levels, num_hosts, document)
            tiers += _leaving(unit, tiers, inside, levels, total)
        return Network(tuple(tiers or [_alone(unit[0])]))
    except CommsError as error:
        hint = error.hint or "make each group a whole number of the groups inside it"
        where = document.where(("scale_up",) if fabric else ("scale_out",))
        raise ClusterError(str(error), where, hint) from error


def _check_joined(reach: int, per_host: int, document: Document) -> None:
    """Chips of one host need a link of their own: without this check they would meet through the NICs."""
    if reach < per_host:
        groups = f"in groups of {reach} only" if reach > 1 else "by nothing"
        problem = f"the {per_host} chips of a host are joined {groups}"
        hint = "add `pcie:` to the host, or `scale_up:` for what joins its chips"
        raise ClusterError(problem, document.where(("hosts",)), hint)


def _check_levels(levels: tuple[Level, ...], num_hosts: int | None, document: Document) -> None:
    where = document.where(("scale_out",))
    hosts = levels[-1].hosts
    if num_hosts is not None and hosts is not None and hosts < num_hosts:
        problem = f"the outermost level joins {hosts} hosts, but there are {num_hosts}"
        raise ClusterError(problem, where, "add a level with `hosts: any`")
    if num_hosts is None and hosts is not None:
        problem = f"the outermost level joins {hosts} hosts, but there may be any number"
        raise ClusterError(problem, where, "add a level with `hosts: any`")
    railed = [at for at, level in enumerate(levels) if level.rails]
    if railed and (railed != [0] or len(levels) == 1):
        hint = "give `rails` to the first of several levels"
        raise ClusterError("only the first level can have rails, with one above it", where, hint)


def _alone(host: Host) -> Tier:
    """What a cluster of one chip without an on-chip network has: its memory."""
    link = Link(0.0, host.chips[0].memory_bytes_per_s)
    return switched("on-chip", 1, link, TierKind.ON_CHIP, source="the chip's own memory")


def _on_chip(unit: tuple[Host, ...]) -> list[Tier]:
    chips = [chip for host in unit for chip in host.chips]
    nocs = {chip.noc for chip in chips}
    noc = chips[0].noc
    if len(nocs) > 1 or noc is None or noc.hop_latency_s is None or noc.hop_bytes_per_s is None:
        return []
    source = chips[0].sources.get("noc.hop_bandwidth", "")
    return [
        switched("on-chip", 1, Link(noc.hop_latency_s, noc.hop_bytes_per_s), TierKind.ON_CHIP, 1.0, source)
    ]


def _scale_up(fabric: Fabric, total: int) -> Tier:
    step = _Step("scale-up", 1, fabric.link.bytes_per_s, fabric.link.latency_s, reduces=fabric.reduces)
    size = min(fabric.domain, total)
    return Tier("scale-up", TierKind.SCALE_UP, size, _tree(size, [step]), fabric.source)


def _pcie(unit: tuple[Host, ...], document: Document) -> list[_Step]:
    """The wires from a chip to the root complex of its host; none where a host has no PCIe tree."""
    trees = [host.pcie for host in unit if host.pcie is not None]
    if len(trees) < len(unit):
        return []
    switches = {tree.switches for tree in trees}
    if len(switches) > 1:
        hint = "give every host the same number of PCIe switches"
        raise ClusterError("hosts differ in their PCIe switches", document.where(("hosts",)), hint)
    link = _slowest([tree.link for tree in trees])
    per_switch = len(unit[0].chips) // switches.pop()
    # Through the root complex a message crosses two switches: twice the latency of one.
    root = 2 * link.latency_s
    if per_switch == len(unit[0].chips):
        return [_Step("pcie switch", 1, link.bytes_per_s, link.latency_s)]
    if per_switch == 1:
        return [_Step("pcie root", 1, link.bytes_per_s, root)]
    return [
        _Step("pcie switch", 1, link.bytes_per_s, link.latency_s),
        _Step("pcie root", per_switch, link.bytes_per_s, root),
    ]


def _leaving(
    unit: tuple[Host, ...], before: list[Tier], inside: list[_Step], levels: tuple[Level, ...], total: int
) -> list[Tier]:
    """The tiers from PCIe outwards; those of PCIe are part of the next where the whole host shares its cards."""
    per_host = len(unit[0].chips)
    nics = _slowest_nics(unit)
    latencies = [nics.link.latency_s if level.latency_s is None else level.latency_s for level in levels]
    card = _card(nics, per_host, levels[0], latencies[0])
    meets = max((tier.size for tier in before), default=1) < per_host  # over PCIe, or nowhere
    one_tree = meets and card.size == per_host and latencies[0] >= (inside[-1].latency_s or 0.0)
    steps = [*inside, card] if one_tree else _way_out(inside, card, nics, per_host)
    per_chip = min(step.bytes_per_s * step.paths / step.size for step in steps) / levels[0].oversubscription
    for level, latency_s, below in zip(levels[1:], latencies[1:], levels, strict=False):
        if below.hosts is None:
            break
        per_chip /= level.oversubscription
        size, rails = below.hosts * per_host, per_host // card.size if below.rails else 1
        rate = size * per_chip / rails
        steps.append(_Step(level.name, size, rate, latency_s, rails=rails, reduces=level.reduces))
    own = [] if one_tree or not (inside and meets) else _tiers(_tree(per_host, inside), before, levels)
    return own + _tiers(_tree(total, steps), before + own, levels)


def _slowest_nics(unit: tuple[Host, ...]) -> Nics:
    """The cards of the host that has the least bandwidth, at the longest latency."""
    all_nics = [host.nics for host in unit if host.nics is not None]
    least = min(all_nics, key=lambda nics: nics.count * nics.link.bytes_per_s)
    latency_s = max(nics.link.latency_s for nics in all_nics)
    return replace(least, link=replace(least.link, latency_s=latency_s))


def _card(nics: Nics, per_host: int, level: Level, latency_s: float) -> _Step:
    """From the chips behind one card to the first switch between hosts; see the module for how they share."""
    size, rate, paths = 1, nics.link.bytes_per_s * nics.count / per_host, 1
    if nics.count < per_host:
        even = per_host % nics.count == 0
        size, paths = (per_host // nics.count, 1) if even else (per_host, nics.count)
        rate = nics.link.bytes_per_s
    over = level.oversubscription
    return _Step(level.name, size, rate, latency_s, paths, oversubscription=over, reduces=level.reduces)


def _way_out(inside: list[_Step], card: _Step, nics: Nics, per_host: int) -> list[_Step]:
    """From a chip to the first switch between hosts, on wires that are not used within the host."""
    port = inside[0].bytes_per_s if inside else nics.link.bytes_per_s
    if card.size == 1:
        return [replace(card, bytes_per_s=min(card.bytes_per_s, port) if inside else card.bytes_per_s)]
    steps = [_Step(card.tier, 1, port, None)]
    for uplink in inside[1:]:
        behind_each = nics.count % (per_host // uplink.size) == 0
        if not behind_each and card.size % uplink.size == 0:
            steps.append(replace(uplink, tier=card.tier, latency_s=None))
    return [*steps, card]


def _tree(num_chips: int, steps: list[_Step]) -> Tree:
    """The tree of these wires; of layers in which no chips meet, the one outside them has the latency."""
    totals: list[float] = []
    for step in reversed(steps):
        totals.insert(0, totals[0] if step.latency_s is None else step.latency_s)
    trunks: list[Trunk] = []
    for step, latency_s in zip(steps, half_latencies(totals), strict=True):
        if trunks and step.size >= num_chips and step.rails == 1:
            break
        switch = Switch(step.tier, step.reduces, oversubscription=step.oversubscription)
        trunks.append(Trunk(step.size, Link(latency_s, step.bytes_per_s), switch, step.paths, step.rails))
    return Tree(num_chips, trunks[0].link, trunks[0].to, tuple(trunks[1:]))


def _tiers(tree: Tree, before: list[Tier], levels: tuple[Level, ...]) -> list[Tier]:
    """The tiers of a tree that join more chips than those before."""
    sources = {level.name: level.source for level in levels}
    reach = max((tier.size for tier in before), default=1)
    return [
        replace(tier, source=sources[tier.name])
        if tier.name in sources
        else replace(tier, kind=TierKind.PCIE, source=PCIE_SOURCE)
        for tier in layered(tree, TierKind.SCALE_OUT, reach)
    ]


def _slowest(links: list[Link]) -> Link:
    return Link(max(link.latency_s for link in links), min(link.bytes_per_s for link in links))
