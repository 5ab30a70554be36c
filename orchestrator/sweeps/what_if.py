"""What if: a cluster whose links, arithmetic or memory are some times faster, everything else the same.

Bandwidth multiplies the rate of every link of the network, from those inside a host to those between racks; latency
multiplies theirs and what a library takes to start a collective, a stage or a message. Compute multiplies the peaks of
chips, memory the rate of theirs.
"""

from dataclasses import dataclass, fields, is_dataclass, replace
from enum import Enum
from typing import Any

from comms.networks.links import Link, Protocol
from comms.networks.network import Tier
from kernels.chips import Chip
from orchestrator.config.hardware.cluster import Cluster, Host


@dataclass(frozen=True, slots=True)
class Factors:
    """By how much each is multiplied."""

    bandwidth: float = 1.0
    latency: float = 1.0
    compute: float = 1.0
    memory: float = 1.0


AS_IT_IS = Factors()


def scaled(cluster: Cluster, factors: Factors) -> Cluster:
    """The cluster with these factors."""
    if factors == AS_IT_IS:
        return cluster
    network = cluster.network
    if (factors.bandwidth, factors.latency) != (1.0, 1.0):
        network = _changed(network, factors)
    unit = tuple(_host(host, factors) for host in cluster.unit)
    return replace(cluster, network=network, unit=unit)


def _host(host: Host, factors: Factors) -> Host:
    return replace(host, chips=tuple(_chip(chip, factors) for chip in host.chips))


def _chip(chip: Chip, factors: Factors) -> Chip:
    peaks = {dtype: rate * factors.compute for dtype, rate in chip.peak_flops_per_s.items()}
    return replace(chip, peak_flops_per_s=peaks, memory_bytes_per_s=chip.memory_bytes_per_s * factors.memory)


def _changed(value: Any, factors: Factors) -> Any:  # noqa: ANN401  # whatever a network consists of
    """A value of the network with every link, protocol and tier in it changed."""
    if isinstance(value, Link):
        return Link(value.latency_s * factors.latency, value.bytes_per_s * factors.bandwidth)
    if isinstance(value, tuple):
        return tuple(_changed(part, factors) for part in value)
    if isinstance(value, dict):
        return {key: _changed(part, factors) for key, part in value.items()}
    if not is_dataclass(value) or isinstance(value, type | Enum):
        return value
    made = {each.name: _changed(getattr(value, each.name), factors) for each in fields(value) if each.init}
    if isinstance(value, Tier):
        made |= {name: getattr(value, name) * factors.latency for name in ("setup_s", "issue_s")}
    if isinstance(value, Protocol):
        made["latency_s"] = value.latency_s * factors.latency
    return replace(value, **made)
