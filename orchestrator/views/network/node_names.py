"""Node names: what the chips and switches of a topology are called where people read about them.

Chips go by their number and, where there are several, their host. A switch belongs to the innermost tier that its
wires are in and is numbered within that tier; switches that a network of edges gave names keep them.
"""

from collections.abc import Iterator
from functools import lru_cache

import numpy as np

from comms.networks.fabrics.edge_list import EdgeList, Rerouted
from comms.networks.tiered import TieredTopology
from comms.networks.topology import IntArray, Topology, Wires

NO_CHIP = "place without a chip"


@lru_cache(maxsize=1)  # a report asks once for every wire that it names
def node_names(topology: Topology, chips_per_host: int) -> tuple[str, ...]:
    """[nodes] A name each."""
    while isinstance(topology, Rerouted):  # nodes are numbered as before
        topology = topology.topology
    several = topology.num_chips > chips_per_host
    names = [
        f"chip {chip} (host {chip // chips_per_host})" if several else f"chip {chip}"
        for chip in range(topology.num_chips)
    ]
    tier = switch_tiers(topology)
    given, missing = dict(_given(topology)), missing_places(topology)
    twins = ways_out(topology.wires(), topology.num_chips, tier)
    count = [0] * len(topology.tiers)
    for node in range(topology.num_chips, topology.num_nodes):
        if node in given:
            names.append(given[node])
        elif node in missing:
            names.append(NO_CHIP)
        elif node in twins:
            names.append(names[twins[node]])
        else:
            at = tier[node - topology.num_chips]
            names.append(f"{_kind(topology.tiers[at])} {count[at]}")
            count[at] += 1
    return tuple(names)


def _kind(tier: str) -> str:
    return tier if tier.endswith(("switch", "root", "router")) else f"{tier} switch"


def switch_tiers(topology: Topology) -> IntArray:
    """[nodes that are no chips] The innermost tier of the wires at each; 0 where there are none."""
    wires, chips = topology.wires(), topology.num_chips
    tiers = np.full(topology.num_nodes, len(topology.tiers), dtype=np.int64)
    for ends in (wires.tail, wires.head):
        np.minimum.at(tiers, ends, wires.tier)
    own: IntArray = tiers[chips:]
    return np.where(own < len(topology.tiers), own, 0)


def missing_places(topology: Topology) -> frozenset[int]:
    """Nodes of the last copy of a fabric at which there would be chips if there were more."""
    if not isinstance(topology, TieredTopology):
        return frozenset()
    places = (nodes[:, : fabric.size] for fabric, nodes in topology.copies())
    return frozenset(int(node) for own in places for node in own[own >= topology.num_chips])


def ways_out(wires: Wires, num_chips: int, tier: IntArray) -> dict[int, int]:
    """Nodes that stand for the way out of a switch whose capacity is limited, and the switch."""
    leaving, entering = np.bincount(wires.tail), np.bincount(wires.head)
    twins: dict[int, int] = {}
    inside = np.flatnonzero((wires.tail >= num_chips) & (wires.head >= num_chips))
    for tail, head in zip(wires.tail[inside].tolist(), wires.head[inside].tolist(), strict=True):
        only = leaving[tail] == 1 and entering[head] == 1 and tier[tail - num_chips] == tier[head - num_chips]
        if only and head > tail:
            twins[head] = tail
    return twins


def _given(topology: Topology) -> Iterator[tuple[int, str]]:
    """Nodes that have a name of their own."""
    if isinstance(topology, EdgeList):
        yield from ((topology.num_chips + i, name) for i, name in enumerate(topology.switches))
    elif isinstance(topology, TieredTopology):
        for fabric, copies in topology.copies():
            for number, nodes in enumerate(copies):
                for at, name in _given(fabric.shape):
                    yield int(nodes[at]), f"{name} of group {number}" if len(copies) > 1 else name
