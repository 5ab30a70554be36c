"""Site: a network with its conditions, and what a collective that moved every message did to its wires.

Conditions are links that are gone or slow, chips that are late, noise, jobs of others in the background. Importing
this loads no compiled loops: they are needed to move messages, not to read what came of it.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from comms.networks.conditions import HEALTHY, Described, Resolved, may_relay, resolve
from comms.networks.fabrics.edge_list import Rerouted
from comms.networks.groups import Lattice, mesh_group
from comms.networks.links import Protocol
from comms.networks.network import Network
from comms.networks.tiered import TieredTopology
from comms.networks.topology import FloatArray, Topology

if TYPE_CHECKING:
    from comms.simulation.full import FullResult


@dataclass(frozen=True, slots=True, eq=False)
class Site:
    """A network of exactly `num_chips`, and the state it is in."""

    network: Network
    num_chips: int
    whole: TieredTopology
    resolved: Resolved

    @property
    def members(self) -> Lattice:
        """All chips."""
        return all_chips(self.num_chips)

    @property
    def topology(self) -> Topology:
        """Without what is down."""
        return self.resolved.topology

    @property
    def seen(self) -> Topology:
        """The topology with rates as they are, for those who look at wires only."""
        rates = {wire: factor for wire, factor in self.resolved.conditions.factors.items() if factor > 0}
        return Rerouted(self.topology, (), rates, may_relay(self.whole)) if rates else self.topology


@dataclass(frozen=True, slots=True, eq=False)
class FullTiming:
    """What a collective took; `seconds` is with `setup_s`."""

    algorithm: str
    seconds: float
    setup_s: float
    protocol: Protocol
    result: "FullResult"


@dataclass(frozen=True, slots=True)
class WireLoad:
    """A wire by the nodes at its ends, and for which part of the time it was busy."""

    tier: str
    tail: int
    head: int
    nbytes: float
    bytes_per_s: float
    busy: float


@dataclass(frozen=True, slots=True)
class TierLoad:
    """What crossed the wires of a tier in all, and the busiest of them."""

    tier: str
    nbytes: float
    busiest: WireLoad


def all_chips(num_chips: int) -> Lattice:
    """All chips of a network as a group."""
    return mesh_group((("all", num_chips),), ("all",))


def site_of(network: Network, num_chips: int, described: Described = HEALTHY) -> Site:
    """The site of the first `num_chips` chips. Raises UserError for conditions that it cannot have."""
    own = network.take(num_chips)
    whole = own.topology()
    return Site(own, num_chips, whole, resolve(described, whole))


def tier_loads(site: Site, timing: FullTiming) -> tuple[TierLoad, ...]:
    """Per tier that bytes crossed, from the inside; the share of time is of the whole collective."""
    wires, nbytes = site.topology.wires(), timing.result.wire_nbytes
    rate, busy = _rates(site), _busy(site, timing)
    loads: list[TierLoad] = []
    for number, tier in enumerate(site.topology.tiers):
        own = np.flatnonzero((wires.tier == number) & (nbytes > 0))
        if len(own):
            wire = int(own[busy[own].argmax()])
            # Sums of pieces differ in their last digits by the order in which they came.
            moved, ends = round(float(nbytes[wire]), 3), (int(wires.tail[wire]), int(wires.head[wire]))
            worst = WireLoad(tier, *ends, moved, float(rate[wire]), float(busy[wire]))
            loads.append(TierLoad(tier, round(float(nbytes[own].sum()), 3), worst))
    return tuple(loads)


def busy_by_wire(site: Site, timing: FullTiming) -> dict[int, float]:
    """By number in the whole network the share of time that each wire moves bytes; none for those that are down."""
    wires = site.topology.wires()
    busy = _busy(site, timing)[wires.shares]
    kept = site.topology.kept if isinstance(site.topology, Rerouted) else range(wires.num_wires)
    return {int(wire): float(share) for wire, share in zip(kept, busy, strict=True)}


def _busy(site: Site, timing: FullTiming) -> FloatArray:
    """[wires] Share of the collective's time."""
    rate = _rates(site)
    return timing.result.wire_load / rate / timing.seconds if timing.seconds else np.zeros(len(rate))


def _rates(site: Site) -> FloatArray:
    """[wires] Bytes per second as they are at the start."""
    rate = site.topology.wires().bytes_per_s.copy()
    for wire, factor in site.resolved.conditions.factors.items():
        rate[wire] *= factor
    return rate
