"""Line rates: what the links of a cluster file could carry if nothing were lost, as data sheets say.

A message by itself is held against one card, or one link of a ring, torus or mesh. A collective within a host is held
against the links of one chip; between hosts against all cards of a host together, because rings leave a host by each
of its cards, or against the links within the host where these are slower.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from pathlib import Path

from comms.errors import ConfigError
from comms.networks.network import Tier, TierKind
from orchestrator.config.hardware.cluster import Cluster
from orchestrator.config.hardware.cluster_file import ClusterFile, cluster_from
from orchestrator.config.hardware.network_links import ShapeDrawing, line_and_efficiency
from orchestrator.config.hardware.network_sections import LibrarySection, LinkSection, NicSection, PcieSection
from orchestrator.config.hardware.tiers import PCIE_ROOT
from orchestrator.config.schema import validate
from orchestrator.config.yaml_file import Document, read_yaml


@dataclass(frozen=True, slots=True)
class Rate:
    """A line rate, one direction."""

    bytes_per_s: float
    words: str  # how it comes about


@dataclass(frozen=True, slots=True)
class Sections:
    """The sections of a cluster file that say what a tier takes, and how their figures bound each other."""

    library: str  # has `setup` and `protocols`
    latency: str  # has that of a message by itself; empty where each link has its own
    rate: str  # has that of a message by itself, as `bandwidth`
    message_s: float  # latency of a message by itself as it is now; no stage of a protocol may take longer
    has_efficiency: bool = True  # `rate` knows a share of the bandwidth
    stage_s: float = 0.0  # longest latency of a protocol as it is now; no message by itself may be quicker
    most_share: float = 1.0  # of a protocol, as `efficiency` is now
    least_efficiency: float = 0.0  # as the shares of protocols are now
    switch_s: float | None = None  # of switches inside this tier, between whose chips protocols' figures are
    outer: str = ""  # has the latency of the next tier, if no figure inside may be above it:
    outer_s: float = inf


@dataclass(frozen=True, slots=True)
class LineRate:
    """What links can carry where some chips of a cluster meet."""

    together: Rate  # of a chip's share of the links, in a collective
    alone: Rate  # of one message
    sections: Sections
    tier: Tier
    reduces: bool  # switches of the tier add and copy
    cluster: Cluster


def line_rate(path: Path, num_chips: int) -> LineRate:
    """The line rate where the first `num_chips` chips of a cluster file meet. Raises UserError."""
    document = read_yaml(path)
    described = _FileRates(document, validate(document, ClusterFile), cluster_from(document).take(num_chips))
    tier = described.cluster.network.tier_for((0, num_chips - 1))
    match tier.kind:
        case TierKind.SCALE_OUT:
            return described.scale_out(tier)
        case TierKind.SCALE_UP:
            return described.scale_up(tier)
    return described.pcie(tier)


@dataclass(frozen=True, slots=True)
class _FileRates:
    document: Document
    file: ClusterFile
    cluster: Cluster

    def scale_up(self, tier: Tier) -> LineRate:
        section = self.file.scale_up
        assert section is not None, "there is a scale-up tier"
        together, alone = self._fabric()
        at, drawing = "scale_up", ShapeDrawing(section, self.document.inside("scale_up"))
        latency = at if drawing.longest_latency_s is None else ""
        sections = Sections(at, latency, at, _message_s(tier), stage_s=_most("latency", [section]))
        return LineRate(together, alone, sections, tier, section.reduces, self.cluster)

    def pcie(self, tier: Tier) -> LineRate:
        at, root, trees = "hosts, pcie", "hosts, pcie, root", self._pcie_sections()
        rate, stage_s, message_s = self._pcie_rate(tier.name), _most("latency", trees), _message_s(tier)
        roots = [each.root.latency for each in trees if each.root and each.root.latency is not None]
        sections = Sections(
            at, at, at, message_s, stage_s=stage_s, outer=root, outer_s=min(roots, default=inf)
        )
        if tier.name == PCIE_ROOT:
            inside = self.cluster.network.tier_for((0, 1))
            switch_s = None if inside is tier else _message_s(inside)
            if switch_s is None and not roots and any(each.latency is not None for each in trees):
                root += ", in place of the latency above it"
            stage_s = max(stage_s, switch_s or 0.0)
            sections = Sections(at, root, root, message_s, False, stage_s, switch_s=switch_s)
        return LineRate(rate, rate, sections, tier, False, self.cluster)

    def scale_out(self, tier: Tier) -> LineRate:
        levels = self.file.levels
        number = next((at for at, each in enumerate(levels) if each.name == tier.name), 0)
        level, place = levels[number], self.document.inside("scale_out", number)
        cards = [host.nics for host in self.file.hosts if host.nics is not None]
        card = min(cards, key=lambda each: each.count * each.bandwidth)
        together, alone = self._card_rates(card, ShapeDrawing(level, place))
        at, nics = f"scale_out, level {tier.name}", "hosts, nics"
        by_cards = number == 0 and level.latency is None
        same = [each for each in levels if each is level or (by_cards and each.latency is None)]
        sections = Sections(
            library=at,
            latency=nics if by_cards else at,
            rate=nics,
            message_s=max(each.latency for each in cards) if level.latency is None else level.latency,
            stage_s=_most("latency", same),
            most_share=min(each.efficiency for each in cards),
            least_efficiency=_most("share", levels),
        )
        return LineRate(together, alone, sections, tier, level.reduces, self.cluster)

    def _card_rates(self, card: NicSection, drawing: ShapeDrawing) -> tuple[Rate, Rate]:
        """Together and alone."""
        per_host = self.cluster.chips_per_host
        each = max(1.0, card.count / per_host)
        own = Rate(card.bandwidth * each, f"{each:g} cards of a chip" if each > 1 else "a card")
        if not drawing.is_switch:
            links = self._links(drawing, self.cluster.num_chips)
            return own, Rate(own.bytes_per_s / links, "a link of a chip")
        words = f"{card.count} cards of a host" if card.count > 1 else "the card of a host"
        cards = Rate(card.count * card.bandwidth, words)
        if per_host == 1:
            return cards, own
        inside = self._fabric()[0] if self.file.scale_up else self._pcie_rate("")
        if inside.bytes_per_s < cards.bytes_per_s:
            cards = Rate(inside.bytes_per_s, f"{inside.words}, slower than {words}")
        return cards, own

    def _fabric(self) -> tuple[Rate, Rate]:
        """Of the scale-up fabric, together and alone."""
        section = self.file.scale_up
        assert section is not None, "there is a scale-up fabric"
        drawing = ShapeDrawing(section, self.document.inside("scale_up"))
        links = self._links(drawing, section.domain or drawing.num_chips or self.cluster.chips_per_host)
        if section.bandwidth is None:
            ports = [chip.scaleup for chip in self.cluster.chip_types]
            whole = min(port.bytes_per_s for port in ports if port is not None)
        else:
            whole = section.bandwidth * links
        if links == 1:
            return Rate(whole, "links of a chip"), Rate(whole, "links of a chip")
        return Rate(whole, f"{links} links of a chip"), Rate(whole / links, "a link of a chip")

    def _links(self, drawing: ShapeDrawing, num_chips: int) -> int:
        """How many links of one rate a chip has. Raises ConfigError where they differ."""
        if drawing.has_own_rates:
            problem = "its links differ, so that a chip has no line rate"
            raise ConfigError(problem, drawing.place.where(), "calibrate without --cluster")
        return drawing.links_per_chip(num_chips)

    def _pcie_sections(self) -> list[PcieSection]:
        """Of each host of the unit; what a file leaves out is one switch and the chips' own links."""
        plain = PcieSection.model_validate({})
        given = [section.pcie or plain for section in self.file.hosts for _ in range(section.count)]
        return given[: len(self.cluster.unit)]

    def _pcie_rate(self, tier: str) -> Rate:
        """Of the PCIe links of a chip, or of what chips have that meet at the root complex."""
        rates: list[Rate] = []
        for section, host in zip(self._pcie_sections(), self.cluster.unit, strict=True):
            ports = [chip.host_link for chip in host.chips if chip.host_link is not None]
            line, efficiency = line_and_efficiency(section.bandwidth, section.efficiency, ports)
            rates.append(Rate(line, "PCIe link of a chip"))
            if tier == PCIE_ROOT:
                root = section.root or LinkSection()
                # `bandwidth` of the root is what it sustains, shares are of what it would be without loss.
                up = root.bandwidth / efficiency if root.bandwidth else section.uplink or line
                rates.append(Rate(up, "PCIe root complex"))
        return min(rates, key=lambda rate: rate.bytes_per_s)


def _message_s(tier: Tier) -> float:
    return tier.link.latency_s + tier.issue_s


def _most(figure: str, sections: Sequence[LibrarySection]) -> float:
    """Of the protocols that give this figure."""
    given = (getattr(each, figure) for section in sections for each in section.protocols)
    return max((each for each in given if each is not None), default=0.0)
