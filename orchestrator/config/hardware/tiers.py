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

Instead of levels of switches, one shape may join all chips by their cards: a torus, a dragonfly.

Where the chips or hosts differ, rates here are those of the slowest, and full fidelity has what the others have more
(`own_rates`): at the chips' own ports and cards, not at cards that chips share, and not in latencies.

Not modelled: PCIe traffic and network traffic of one chip in each other's way where they have wires of their own.
"""

from dataclasses import dataclass, replace
from itertools import pairwise
from math import inf

from comms.networks.conditions import OwnRates
from comms.networks.fabrics.switch_tree import Tree
from comms.networks.layers import Spread, Switch, Trunk, half_latencies
from comms.networks.links import Link
from comms.networks.network import UNBOUNDED, Network, Tier, TierKind, layered, switched
from orchestrator.config.hardware.cluster import PLAIN_LIBRARY, Host, Library
from orchestrator.config.hardware.network_links import ShapeDrawing, described
from orchestrator.config.hardware.network_sections import LevelSection, NicSection, ScaleUpSection
from orchestrator.config.yaml_file import Document


@dataclass(frozen=True, slots=True)
class SwitchLevel:
    """One level of switches between hosts: what the file says of it, and what else that means."""

    section: LevelSection
    switch: Switch
    latency_s: float
    source: str
    spread: Spread
    library: Library
    drawing: ShapeDrawing | None  # a shape over all chips instead of switches


@dataclass(frozen=True, slots=True)
class _LayerWires:
    """The wires into one layer of a tree, from each group of `size` chips below it."""

    to: Switch
    size: int
    bytes_per_s: float  # of all its paths together
    latency_s: float | None  # between chips that meet in the layer; None where none do
    paths: int = 1
    rails: int = 1
    duplex: bool = True


@dataclass(frozen=True, slots=True)
class _Inside:
    """The wires of a host's PCIe tree: between its chips, and on their way out (chip first, then uplinks)."""

    steps: tuple[_LayerWires, ...] = ()
    way_out: tuple[_LayerWires, ...] = ()
    library: Library = PLAIN_LIBRARY
    source: str = ""


PCIE_SOURCE = "the host links of the chips"
PCIE_SWITCH, PCIE_ROOT = "pcie switch", "pcie root"


def build_network(
    unit: tuple[Host, ...],
    num_hosts: int | None,
    fabric: Tier | None,
    levels: tuple[SwitchLevel, ...],
    document: Document,
) -> Network:
    """The network of `num_hosts` hosts (None: any number). Raises ClusterError where groups do not nest."""
    per_host = len(unit[0].chips)
    total = UNBOUNDED if num_hosts is None else num_hosts * per_host
    tiers = _on_chip(unit)
    if fabric is not None:
        size = min(fabric.size, total)
        tiers.append(replace(fabric, size=size, shape=fabric.shape.cut(size)))
    inside = _pcie(unit, document)
    reach = fabric.size if fabric else 1
    _check_joined(max(reach, per_host if inside.steps else 1), per_host, document)
    where = document.where("scale_up" if fabric else "scale_out")
    with described(where, "make each group a whole number of the groups inside it"):
        if num_hosts == 1:
            tiers += _tiers(_tree(per_host, inside.steps), tiers, inside, ()) if inside.steps else []
        elif reach < total:
            _check_levels(levels, num_hosts, document)
            tiers += _leaving(unit, tiers, inside, levels, total)
        return Network(tuple(tiers or [_alone(unit[0])]))


def own_rates(
    network: Network, scale_up: ScaleUpSection | None, levels: tuple[SwitchLevel, ...], unit: tuple[Host, ...]
) -> tuple[OwnRates, ...]:
    """What chips and hosts that bring more than the slowest have more, where the file does not say rates itself."""
    tiers = {tier.name for tier in network.tiers}
    found: list[OwnRates] = []
    ports = [chip.scaleup for host in unit for chip in host.chips]
    if scale_up is not None and not _says_rates(scale_up):
        rates = [port.bytes_per_s * (scale_up.efficiency or port.efficiency) for port in ports if port]
        found.append(_over_slowest("scale-up", rates))
    inside = [rate for host in unit for rate in _inside_rates(host, inf)]
    found.append(_over_slowest(PCIE_SWITCH, inside))
    at_root = [rate for host in unit if host.pcie for rate in _inside_rates(host, host.pcie.root.bytes_per_s)]
    found.append(_over_slowest(PCIE_ROOT, at_root))
    per_host = len(unit[0].chips)
    if levels and all(host.nics and host.nics.count >= per_host for host in unit):
        cards = [_card_rate(host.nics) * host.nics.count / per_host for host in unit if host.nics]
        ways = [[min(card, rate) for rate in _inside_rates(host, inf) or [card] * per_host]
                for host, card in zip(unit, cards, strict=True)]  # fmt: skip
        found.append(_over_slowest(levels[0].section.name, [rate for way in ways for rate in way]))
    return tuple(rates for rates in found if rates.tier in tiers and rates.differ(len(rates.factors)))


def _says_rates(section: ScaleUpSection) -> bool:
    links = (*(section.links or ()), *(section.edges or ()))
    return section.bandwidth is not None or any(link.bandwidth is not None for link in links)


def _inside_rates(host: Host, most: float) -> list[float]:
    """Of each chip's PCIe link."""
    return [min(rate, most) for rate in host.pcie.chip_bytes_per_s] if host.pcie else []


def _over_slowest(tier: str, rates: list[float]) -> OwnRates:
    slowest = min(rates, default=1.0)
    return OwnRates(tier, tuple(rate / slowest for rate in rates))


def _check_joined(reach: int, per_host: int, document: Document) -> None:
    """Chips of one host need a link of their own: without this check they would meet through the NICs."""
    if reach < per_host:
        groups = f"in groups of {reach} only" if reach > 1 else "by nothing"
        problem = f"the {per_host} chips of a host are joined {groups}"
        hint = "add `pcie:` to the host, or `scale_up:` for what joins its chips"
        raise document.error(problem, hint, "hosts")


def _check_levels(levels: tuple[SwitchLevel, ...], num_hosts: int | None, document: Document) -> None:
    hosts = levels[-1].section.hosts
    if levels[0].drawing is not None:
        return
    if hosts is not None and (num_hosts is None or hosts < num_hosts):
        there = "may be any number" if num_hosts is None else f"are {num_hosts}"
        problem = f"the outermost level joins {hosts} hosts, but there {there}"
        raise document.error(problem, "add a level with `hosts: any`", "scale_out")
    railed = [at for at, level in enumerate(levels) if level.section.rails]
    if railed and (railed != [0] or len(levels) == 1):
        hint = "give `rails` to the first of several levels"
        problem = "only the first level can have rails, with one above it"
        raise document.error(problem, hint, "scale_out")


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


def _pcie(unit: tuple[Host, ...], document: Document) -> _Inside:
    """The wires from a chip to the root complex of its host; none where a host has no PCIe tree."""
    trees = [host.pcie for host in unit if host.pcie is not None]
    if len(trees) < len(unit):
        return _Inside()
    for what, values in (
        ("PCIe switches", {tree.switches for tree in trees}),
        ("PCIe setup or protocols", {tree.library for tree in trees}),
    ):
        if len(values) > 1:
            hint = "give every host the same"
            raise document.error(f"hosts differ in their {what}", hint, "hosts")
    link, root = _slowest([tree.link for tree in trees]), _slowest([tree.root for tree in trees])
    uplink = min(tree.uplink_bytes_per_s for tree in trees)
    duplex = all(tree.duplex for tree in trees)
    switches, per_host = trees[0].switches, len(unit[0].chips)
    port = _LayerWires(Switch(PCIE_SWITCH), 1, link.bytes_per_s, link.latency_s, duplex=duplex)
    steps: tuple[_LayerWires, ...] = (port,)
    way_out = steps
    if switches == 0 or switches == per_host > 1:
        rate = min(link.bytes_per_s, root.bytes_per_s)
        steps = (_LayerWires(Switch(PCIE_ROOT), 1, rate, root.latency_s, duplex=duplex),)
    elif switches > 1:
        up = _LayerWires(Switch(PCIE_ROOT), per_host // switches, uplink, root.latency_s, duplex=duplex)
        steps, way_out = (port, replace(up, bytes_per_s=min(uplink, root.bytes_per_s))), (port, up)
    return _Inside(steps, way_out, trees[0].library, trees[0].source or PCIE_SOURCE)


def _leaving(
    unit: tuple[Host, ...], before: list[Tier], inside: _Inside, levels: tuple[SwitchLevel, ...], total: int
) -> list[Tier]:
    """The tiers from PCIe outwards; those of PCIe are part of the next where the whole host shares its cards."""
    per_host, steps = len(unit[0].chips), list(inside.steps)
    cards = [host.nics for host in unit if host.nics is not None]
    nics = min(cards, key=lambda each: each.count * _card_rate(each))  # of the host that has least
    meets = max((tier.size for tier in before), default=1) < per_host  # over PCIe, or nowhere
    own = _tiers(_tree(per_host, inside.steps), before, inside, levels) if steps and meets else []
    if levels[0].drawing is not None:
        return [*own, _drawn(levels[0], levels[0].drawing, nics, inside, per_host, total)]
    card = _card(nics, per_host, levels[0])
    slowest_s = max([step.latency_s or 0.0 for step in steps], default=0.0)
    one_tree = meets and card.size == per_host and levels[0].latency_s >= slowest_s
    steps = [*steps, card] if one_tree else _way_out(inside, card, nics, per_host)
    per_chip = min(step.bytes_per_s / step.size for step in steps) / levels[0].section.oversubscription
    for below, level in pairwise(levels):
        if below.section.hosts is None:
            break
        per_chip /= level.section.oversubscription
        size, rails = below.section.hosts * per_host, per_host // card.size if below.section.rails else 1
        rate, paths = size * per_chip / rails, level.section.paths or 1
        steps.append(_LayerWires(level.switch, size, rate, level.latency_s, paths, rails))
    own = [] if one_tree else own
    return own + _tiers(_tree(total, tuple(steps), levels[0].spread), before + own, inside, levels)


def _drawn(
    level: SwitchLevel, drawing: ShapeDrawing, nics: NicSection, inside: _Inside, per_host: int, total: int
) -> Tier:
    """A shape over all chips, each by cards of its own."""
    if nics.count % per_host:
        cards = f"{nics.count} cards are not the same number for each of {per_host} chips"
        problem = f"{cards}, which a {drawing.kind} needs"
        raise drawing.place.error(problem, "give each chip its cards", "shape")
    size = drawing.num_chips or total
    if size == UNBOUNDED:
        problem = f"a {drawing.kind} of any number of chips"
        raise drawing.place.error(problem, "give `repeat` a number", "shape")
    rate = _card_rate(nics) * nics.count / per_host
    rate = min([rate, *(step.bytes_per_s for step in inside.way_out)])
    drawing.check_size(size if total == UNBOUNDED else total)
    spread, name = Link(level.latency_s, rate / drawing.links_per_chip(size)), level.section.name
    shape = drawing.shape(size, spread, 1.0, name, level.library.issue_s)
    return level.library.on(Tier(name, TierKind.SCALE_OUT, size, shape, level.source))


def _card_rate(nics: NicSection) -> float:
    """What a message gets of one card."""
    return nics.bandwidth * nics.efficiency


def _card(nics: NicSection, per_host: int, level: SwitchLevel) -> _LayerWires:
    """From the chips behind one card to the first switch between hosts; see the module for how they share."""
    size, rate, paths = 1, _card_rate(nics) * nics.count / per_host, 1
    if nics.count < per_host:
        even = per_host % nics.count == 0
        size, paths = (per_host // nics.count, 1) if even else (per_host, nics.count)
        rate = _card_rate(nics) * paths
    switch = replace(level.switch, oversubscription=level.section.oversubscription)
    return _LayerWires(switch, size, rate, level.latency_s, paths, duplex=nics.duplex == "full")


def _way_out(inside: _Inside, card: _LayerWires, nics: NicSection, per_host: int) -> list[_LayerWires]:
    """From a chip to the first switch between hosts, on wires that are not used within the host."""
    port = inside.way_out[0].bytes_per_s if inside.way_out else _card_rate(nics)
    if card.size == 1:
        slowest = min(card.bytes_per_s, port) if inside.way_out else card.bytes_per_s
        return [replace(card, bytes_per_s=slowest)]
    switch = Switch(card.to.tier)
    steps = [_LayerWires(switch, 1, port, None)]
    for uplink in inside.way_out[1:]:
        behind_each = nics.count % (per_host // uplink.size) == 0
        if not behind_each and card.size % uplink.size == 0:
            steps.append(replace(uplink, to=switch, latency_s=None))
    return [*steps, card]


def _tree(num_chips: int, steps: tuple[_LayerWires, ...], spread: Spread = Spread.ADAPTIVE) -> Tree:
    """The tree of these wires; of layers in which no chips meet, the one outside them has the latency."""
    totals: list[float] = []
    for step in reversed(steps):
        totals.insert(0, totals[0] if step.latency_s is None else step.latency_s)
    trunks: list[Trunk] = []
    for step, latency_s in zip(steps, half_latencies(totals), strict=True):
        if trunks and step.size >= num_chips and step.rails == 1:
            break
        link = Link(latency_s, step.bytes_per_s / step.paths)
        trunks.append(Trunk(step.size, link, step.to, step.paths, step.rails, step.duplex))
    port = trunks[0]
    return Tree(num_chips, port.link, port.to, tuple(trunks[1:]), port.duplex, spread)


def _tiers(tree: Tree, before: list[Tier], inside: _Inside, levels: tuple[SwitchLevel, ...]) -> list[Tier]:
    """The tiers of a tree that join more chips than those before."""
    known = {level.section.name: level for level in levels}
    reach = max((tier.size for tier in before), default=1)
    tiers: list[Tier] = []
    for tier in layered(tree, TierKind.SCALE_OUT, reach):
        if (level := known.get(tier.name)) is not None:
            tiers.append(level.library.on(replace(tier, source=level.source)))
        else:
            tiers.append(inside.library.on(replace(tier, kind=TierKind.PCIE, source=inside.source)))
    return tiers


def _slowest(links: list[Link]) -> Link:
    return Link(max(link.latency_s for link in links), min(link.bytes_per_s for link in links))
