"""Line rates: what the links of a cluster file could carry if nothing were lost, as data sheets say.

A collective within a host is held against the links of one chip; between hosts against all cards of a host together,
because rings leave a host by each of its cards, or against the links within the host where these are slower.
"""

from dataclasses import dataclass
from pathlib import Path

from comms.network import Tier, TierKind
from kernels.chips import Port
from orchestrator.cluster import Cluster
from orchestrator.cluster_file import ClusterFile, cluster_from
from orchestrator.errors import ConfigError
from orchestrator.fabric_shapes import Drawing
from orchestrator.schema import validate
from orchestrator.yaml_file import Document, read_yaml


@dataclass(frozen=True, slots=True)
class LineRate:
    """What one chip's share of a tier's links carries at most, one direction."""

    bytes_per_s: float
    words: str  # how it comes about
    section: str  # of the cluster file that describes the tier
    tier: Tier
    reduces: bool  # switches of the tier add and copy
    cluster: Cluster


def line_rate(path: Path, num_chips: int) -> LineRate:
    """The line rate where the first `num_chips` chips of a cluster file meet. Raises UserError."""
    document = read_yaml(path)
    file, cluster = validate(document, ClusterFile), cluster_from(document)
    cluster = cluster.take(num_chips)
    tier = cluster.network.tier_for((0, num_chips - 1))
    match tier.kind:
        case TierKind.SCALE_OUT:
            rate, words = _cards(document, file, cluster)
            section = f"scale_out, level {tier.name}"
            reduces = any(level.reduces for level in file.scale_out if level.name == tier.name)
        case TierKind.SCALE_UP:
            rate, words = _fabric(document, file, cluster)
            section, reduces = "scale_up", file.scale_up is not None and file.scale_up.reduces
        case _:
            rate, words = _pcie(file, cluster, document)
            section, reduces = "hosts, pcie", False
    return LineRate(rate, words, section, tier, reduces, cluster)


def _cards(document: Document, file: ClusterFile, cluster: Cluster) -> tuple[float, str]:
    cards = [host.nics for host in file.hosts if host.nics is not None]
    least = min(cards, key=lambda each: each.count * each.bandwidth)
    rate = least.count * least.bandwidth
    words = f"{least.count} cards of a host" if least.count > 1 else "the card of a host"
    if cluster.chips_per_host == 1:
        return rate, words
    inside, told = _fabric(document, file, cluster) if file.scale_up else _pcie(file, cluster, document)
    return (rate, words) if rate <= inside else (inside, f"{told}, slower than {words}")


def _fabric(document: Document, file: ClusterFile, cluster: Cluster) -> tuple[float, str]:
    section = file.scale_up
    assert section is not None, "there is a scale-up tier"
    drawing = Drawing(section, document, ("scale_up",))
    if drawing.has_own_rates:
        raise ConfigError(
            "its links differ, so that a chip has no line rate",
            document.where(("scale_up",)),
            "calibrate without --cluster",
        )
    if section.bandwidth is None:
        return _least([chip.scaleup for host in cluster.unit for chip in host.chips]), "links of a chip"
    count = drawing.links_per_chip(section.domain or drawing.num_chips or cluster.chips_per_host)
    return section.bandwidth * count, "links of a chip" if count == 1 else f"{count} links of a chip"


def _pcie(file: ClusterFile, cluster: Cluster, document: Document) -> tuple[float, str]:
    told = [host.pcie.bandwidth for host in file.hosts if host.pcie and host.pcie.bandwidth]
    if told:
        return min(told), "PCIe link of a chip"
    ports = [chip.host_link for host in cluster.unit for chip in host.chips]
    if any(port is None for port in ports):
        raise ConfigError("no line rate is known", document.origin, "calibrate without --cluster")
    return _least(ports), "PCIe link of a chip"


def _least(ports: list[Port | None]) -> float:
    return min(port.bytes_per_s for port in ports if port is not None)
