"""Latency tiers of a cluster: what a message takes from core to core up to through the data centre.

The chips' on-chip networks and host links go to `tier_table` as plain numbers: `comms` knows no chips.
"""

from comms.networks.links import Link
from comms.networks.tier_table import HostMemory, OnChip, Row, tier_table
from kernels.chips import Chip, NocShape
from orchestrator.config.hardware.cluster import Cluster


def latency_tiers(cluster: Cluster) -> tuple[Row, ...]:
    """The tier table of a cluster, one row for each way that two ends can stand to each other."""
    on_chip = tuple(_on_chip(chip) for chip in cluster.chip_types)
    return tier_table(cluster.network, on_chip, _host_memory(cluster), cluster.issue_s)


def _on_chip(chip: Chip) -> OnChip:
    noc = chip.noc
    if noc is None:
        return OnChip(chip.name, "none described", chip.cores)
    return OnChip(
        chip=chip.name,
        topology=noc.topology,
        cores=chip.cores,
        dims=noc.dims,
        wraps=noc.shape is not NocShape.MESH,
        one_way=noc.shape is NocShape.ONE_WAY_TORUS,
        networks=noc.networks,
        hop_s=noc.hop_latency_s,
        entry_s=noc.entry_latency_s,
        bytes_per_s=noc.hop_bytes_per_s,
        aggregate_bytes_per_s=noc.aggregate_bytes_per_s,
        memory_s=noc.memory_latency_s,
        loaded_factor=noc.loaded_latency_factor,
        multicasts=noc.multicasts,
        source=chip.sources.get("noc.hop_latency", ""),
        memory_source=chip.sources.get("noc.memory_latency", ""),
    )


def _host_memory(cluster: Cluster) -> HostMemory | None:
    """The host link of the first chip; None where the chip is the host's own processor."""
    chip = cluster.chip(0)
    port = chip.host_link
    if port is None:
        return None
    link = Link(port.latency_s, port.bytes_per_s * port.efficiency)
    figures = ("latency", "bandwidth", "efficiency")
    clauses = [c for figure in figures for c in chip.sources.get(f"host_link.{figure}", "").split("; ")]
    return HostMemory(port.name, link, "; ".join(dict.fromkeys(clause for clause in clauses if clause)))
