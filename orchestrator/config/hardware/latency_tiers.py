"""Latency tiers: what a small message takes and what a large one gets, from core to core up to through the data
centre.

One row for each way that two ends can stand to each other: a core and its memory, neighbouring cores, cores furthest
apart, a chip and its host's memory, then for every tier of a network chips that meet in it, and on tori and graphs
neighbours and chips furthest apart. A row's latency is that of a message by itself, with what issuing it takes where
the tier has such a figure; a figure that is not known is None, never a guess.

On-chip networks are grids of routers: entry + hops + exit, one hop after another (Dally and Towles, Principles and
Practices of Interconnection Networks, 2004, chapter 3). `sum_over_cores_s` is the sum of one number over a mesh whose
routers pass a word on each cycle and whose cores add as it comes: rows to the middle, the middle column to its middle,
and back (Rocki and others, SC20, measured it on a wafer).

With all cores sending half way round at once, a wire of a line of n cores carries n / 2 messages, of a ring n / 4.
Not modelled: what header flits take off a rate, and cores that are fused off.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import fsum, prod

import numpy as np

from comms.networks.fabrics.switch_tree import Tree
from comms.networks.fabrics.torus_mesh import FullMesh, Torus
from comms.networks.links import Link
from comms.networks.network import Network, Tier, TierKind
from comms.networks.topology import IntArray
from kernels.chips import Chip, Noc, NocShape, Port

FEW_CORES = 4096  # up to here the furthest core is searched among all
FEW_NEIGHBOURS = 64  # the nearest where those one step away are in tiers further inside
SAME = 1e-9  # relative: chips as far as this from each other are equally far


@dataclass(frozen=True, slots=True)
class Row:
    """One way that two ends can stand to each other."""

    tier: str
    between: str
    latency_s: float | None  # of a small message alone
    bytes_per_s: float | None  # of a large message alone
    loaded_bytes_per_s: float | None  # of each, when all send so at once
    hops: int | None  # wires crossed; on a chip, from router to router
    source: str
    loaded_factor: float | None = None  # latency when all send over latency alone, where measured
    ratio: float | None = None  # latency over that of the row before that has one


def latency_tiers(network: Network, chips: Sequence[Chip]) -> tuple[Row, ...]:
    """All rows, from the inside out; the memory of a host is reached from the first chip, unless it is the host's own
    processor."""
    rows = [row for chip in chips for row in _chip_rows(chip)]
    rows += [_host_memory(chip, chip.host_link) for chip in chips[:1] if chip.host_link is not None]
    inner = 1
    for tier in network.tiers:
        if tier.size > 1:
            rows += _tier_rows(network, tier, inner)
            inner = tier.size
    return tuple(_with_ratios(rows))


def sum_over_cores_s(noc: Noc) -> float | None:
    """One number from each core of a mesh, summed and known to all of them; None where it is not such a mesh."""
    if not noc.dims or noc.hop_latency_s is None or noc.shape is not NocShape.MESH or noc.entry_latency_s:
        return None
    return 2 * sum(size // 2 for size in noc.dims) * noc.hop_latency_s


def _host_memory(chip: Chip, port: Port) -> Row:
    rate = port.bytes_per_s * port.efficiency
    figures = ("latency", "bandwidth", "efficiency")
    clauses = [c for figure in figures for c in chip.sources.get(f"host_link.{figure}", "").split("; ")]
    source = "; ".join(dict.fromkeys(clause for clause in clauses if clause))
    return Row(port.name, "chip to the memory of its host", port.latency_s, rate, rate, 1, source)


def _chip_rows(chip: Chip) -> Iterator[Row]:
    where, noc = f"on {chip.name}", chip.noc or Noc("none described")
    if noc.memory_latency_s is not None:
        between, source = f"core to its own memory, {where}", chip.sources.get("noc.memory_latency", "")
        yield Row("core", between, noc.memory_latency_s, None, None, 0, source)
    if not noc.dims or noc.hop_latency_s is None:
        share = noc.aggregate_bytes_per_s / chip.cores if noc.aggregate_bytes_per_s else None
        source = f"not known: no latency is published of its network ({noc.topology})"
        factor = noc.loaded_latency_factor
        yield Row("on-chip", f"core to core, {where}", None, None, share, None, source, factor)
        return
    source = chip.sources.get("noc.hop_latency", "")
    torus, rate, cores = _grid(noc, noc.hop_latency_s), noc.hop_bytes_per_s, prod(noc.dims)
    for core, who in ((1, "neighbouring core"), (_furthest(torus), f"the furthest of {cores} cores")):
        hops = len(torus.routes(np.array([0]), np.array([core])).wires) - 2
        latency_s = fsum([2 * noc.entry_latency_s, hops * noc.hop_latency_s])
        loaded = None if rate is None else rate if core == 1 else rate / _load(torus)
        yield Row("on-chip", f"core to {who}, {where}", latency_s, rate, loaded, hops, source)
    if noc.multicasts:
        between = f"core to all {cores} cores at once, {where}"
        yield Row("on-chip multicast", between, *_multicast(noc, noc.hop_latency_s, torus), source)
    everywhere = sum_over_cores_s(noc)
    if everywhere is not None:
        hops = 2 * sum(size // 2 for size in noc.dims)
        between = f"a number summed over {cores} cores, {where}"
        yield Row("on-chip sum", between, everywhere, None, None, hops, source)


def _multicast(noc: Noc, hop_s: float, torus: Torus) -> tuple[float, float | None, float | None, int]:
    """(latency, rate alone, rate when all send, hops) from core 0 to all others; routers copy.

    When all do, a core has to take in what every other one sends, by the networks that it is on.
    """
    hops = sum(_longest(torus, dim) for dim in range(len(torus.dims)))
    rate, others = noc.hop_bytes_per_s, torus.num_chips - 1
    loaded = None if rate is None else rate * noc.networks / others
    return fsum([2 * noc.entry_latency_s, hops * hop_s]), rate, loaded, hops


def _grid(noc: Noc, hop_s: float) -> Torus:
    rate = noc.hop_bytes_per_s or 1.0
    link, entry = Link(hop_s, rate), Link(noc.entry_latency_s, rate)
    wraps, one_way = noc.shape is not NocShape.MESH, noc.shape is NocShape.ONE_WAY_TORUS
    return Torus(noc.dims, (link,), (wraps,), noc.networks, one_way, entry)


def _furthest(torus: Torus) -> int:
    """The core furthest from core 0, which stands in a corner."""
    if torus.num_chips <= FEW_CORES:
        everywhere = np.arange(torus.num_chips)
        return int(np.diff(torus.routes(np.zeros_like(everywhere), everywhere).offsets).argmax())
    stride, core = 1, 0
    for dim, size in enumerate(torus.dims):
        core, stride = core + _longest(torus, dim) * stride, stride * size
    return core


def _longest(torus: Torus, dim: int) -> int:
    """Most hops along a dimension from a core in a corner."""
    size = torus.dims[dim]
    return size // 2 if torus.is_ring(dim) and not torus.one_way else size - 1


def _load(torus: Torus) -> float:
    """Most messages on a wire between routers when all chips send half way round in every dimension."""
    loads = [1.0]
    for dim, size in enumerate(torus.dims):
        around = torus.is_ring(dim) and not torus.one_way
        loads.append(size / (4 if around else 2) / torus.num_networks)
    return max(loads)


def _tier_rows(network: Network, tier: Tier, inner: int) -> Iterator[Row]:
    shape, source = tier.shape, tier.source
    if isinstance(shape, Tree | FullMesh):
        hops = _crossed(network, tier, inner)
        link, loaded = shape.link, shape.loaded_link.bytes_per_s
        between = _between(network, tier)
        latency_s = link.latency_s + tier.issue_s
        yield Row(tier.name, between, latency_s, link.bytes_per_s, loaded, hops, source)
        return
    others = _others(tier, inner)
    wires, routes = shape.wires(), shape.routes(np.zeros_like(others), others)
    rates = np.minimum.reduceat(wires.bytes_per_s[routes.wires], routes.offsets[:-1])
    latencies = np.add.reduceat(wires.latency_s[routes.wires], routes.offsets[:-1])
    near, far = int(np.lexsort((rates, latencies))[0]), int(np.lexsort((rates, -latencies))[0])
    ends = [(near, "the nearest chip", float(rates[near]))]
    if latencies[far] > latencies[near] * (1 + SAME):
        alone, every = float(rates[far]), shape.loaded_link.bytes_per_s
        loaded = alone / _load(shape) if isinstance(shape, Torus) else min(alone, every)
        ends.append((far, f"the furthest of {tier.size} chips", loaded))
    for at, who, loaded in ends:
        crossed, between = routes.of(at), f"chip to {who}, {tier.name}"
        latency_s = fsum(wires.latency_s[crossed].tolist()) + tier.issue_s
        yield Row(tier.name, between, latency_s, float(rates[at]), loaded, len(crossed), source)


def _others(tier: Tier, inner: int) -> IntArray:
    """Chips among which are the nearest and the furthest from chip 0: all; of a large torus, those straight ahead."""
    if tier.size <= FEW_CORES or not isinstance(tier.shape, Torus):
        return np.arange(inner, tier.size)
    found, stride = np.zeros(1, dtype=np.int64), 1
    for dim, size in enumerate(tier.shape.dims):
        steps = {0, 1, _longest(tier.shape, dim)} if size > 1 else {0}
        found = (found[:, None] + stride * np.array(sorted(steps))).ravel()
        stride *= size
    near = np.arange(inner, inner + FEW_NEIGHBOURS)
    return np.unique(np.concatenate([near[near < tier.size], found[found >= inner]]))


def _crossed(network: Network, tier: Tier, inner: int) -> int:
    """Wires between chip 0 and the first chip that it meets in a tier."""
    topology = network.take(min(tier.size, 2 * inner)).topology()
    return len(topology.routes(np.array([0]), np.array([inner])).wires)


def _between(network: Network, tier: Tier) -> str:
    """Two chips that meet in a tier, in words."""
    if tier.kind is TierKind.PCIE:
        if "switch" in tier.name:
            return "chip to chip behind one PCIe switch"
        return "chip to chip through the host bridge"
    if tier.kind is TierKind.SCALE_UP:
        ways = "by a wire of their own" if isinstance(tier.shape, FullMesh) else "through a switch"
        return f"chip to chip {ways}, {tier.name}"
    outer = [each for each in network.tiers if each.kind is TierKind.SCALE_OUT]
    if len(outer) > 1 and tier is outer[0]:
        return f"host to host under one switch, {tier.name}"
    return f"host to host through {tier.name}"


def _with_ratios(rows: Sequence[Row]) -> Iterator[Row]:
    before: float | None = None
    for row in rows:
        yield row if not before or row.latency_s is None else replace(row, ratio=row.latency_s / before)
        before = row.latency_s or before
