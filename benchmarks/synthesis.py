"""Synthesized schedules against the best fixed algorithm and against plain matching, all at full fidelity.

Fixed: all that the catalog has, in natural order, around the best ring and along the dimensions where there are any,
whole and in pieces; up to eight rings over different orders. Matching: chunks are given to wires as soon as both are
free, by lot (Won et al., TACOS, MICRO 2024), the best of several seeds and numbers of chunks; all-reduce is twice
that, as its first half is the same on reversed wires.

    python benchmarks/synthesis.py
"""

from collections.abc import Iterator
from dataclasses import replace
from heapq import heappop, heappush
from itertools import combinations

import numpy as np
from support.harness import report, seconds_of

from comms.algorithms import ring, torus_rings
from comms.algorithms.catalog import Algorithm, algorithms
from comms.algorithms.rounds import Ranks
from comms.collectives.proof import prove
from comms.collectives.schedule import Op, Schedule
from comms.errors import CommsError
from comms.networks.fabrics.edge_list import Edge, EdgeList, Rerouted
from comms.networks.fabrics.torus_mesh import Torus
from comms.networks.links import Link
from comms.networks.ring_orders import ring_orders
from comms.networks.topology import IntArray, Topology
from comms.simulation.compiled import CollectiveJob
from comms.simulation.full import simulate
from comms.synthesis.forest import Hops, hops_of
from comms.synthesis.synthesis import improve, synthesize

LINK = Link(1e-6, 50e9)
SIZES = (1e6, 64e6, 1e9)
OPS = (Op.ALL_REDUCE, Op.ALL_GATHER, Op.BROADCAST, Op.ALL_TO_ALL)
PIECES = (1, 4, 16, 64)
EFFORT = 4
MATCHED = ((1, 4), (2, 4), (4, 2))  # chunks of each chip, seeds
# Links between the eight chips of a first DGX-1 with V100, in pairs of 25 GB/s each way.
CUBE_MESH = {
    (0, 1): 1, (0, 2): 1, (0, 3): 2, (0, 4): 2, (1, 2): 2, (1, 3): 1, (1, 5): 2, (2, 3): 1,
    (2, 6): 2, (3, 7): 2, (4, 5): 1, (4, 6): 1, (4, 7): 2, (5, 6): 2, (5, 7): 1, (6, 7): 1,
}  # fmt: skip


def networks() -> dict[str, Topology]:
    """What is measured, by name."""
    whole = Torus((4, 4), (LINK,))
    wires = whole.wires()
    dead = np.flatnonzero(wires.tail + wires.head == 1).tolist()  # both ways between chips 0 and 1
    return {
        "mesh 3 x 3": Torus((3, 3), (LINK,), (False,)),
        "mesh 4 x 4": Torus((4, 4), (LINK,), (False,)),
        "mesh 5 x 4": Torus((5, 4), (LINK,), (False,)),
        "mesh 8 x 8": Torus((8, 8), (LINK,), (False,)),
        "torus 4 x 4": whole,
        "torus 4 x 4, one link dead": Rerouted(whole, tuple(dead)),
        "hybrid cube mesh": EdgeList(
            8, tuple(Edge(a, b, Link(1e-6, 25e9 * num)) for (a, b), num in CUBE_MESH.items())
        ),
        "islands of 3 and 5, thin bridge": islands(3, 5, Link(2e-6, 12.5e9)),
        "hosts of 3 and 5 on switches": hosts((3, 5), Link(1e-6, 300e9), Link(5e-6, 25e9)),
        "switch of 8": switch(8, 1.0),
        "switch of 8, one port at half": switch(8, 0.5),
        "ring of 8": Torus((8,), (LINK,)),
    }


def islands(a: int, b: int, bridge: Link) -> EdgeList:
    """Two full meshes with one link between them."""
    inside = [*combinations(range(a), 2), *combinations(range(a, a + b), 2)]
    return EdgeList(a + b, (*(Edge(i, j, LINK) for i, j in inside), Edge(0, a, bridge)))


def hosts(sizes: tuple[int, ...], inside: Link, card: Link) -> EdgeList:
    """Chips on the switch of their host, which has one network card."""
    names = [f"host {number}" for number, size in enumerate(sizes) for _ in range(size)]
    edges = [Edge(chip, name, inside) for chip, name in enumerate(names)]
    edges += [Edge(name, "network", card) for name in dict.fromkeys(names)]
    return EdgeList(len(names), tuple(edges), (*dict.fromkeys(names), "network"))


def switch(num_chips: int, last: float) -> EdgeList:
    """Chips on one switch; the last has a part of the rate."""
    rates = [LINK.bytes_per_s] * (num_chips - 1) + [LINK.bytes_per_s * last]
    edges = tuple(Edge(chip, "switch", Link(1e-6, rate)) for chip, rate in enumerate(rates))
    return EdgeList(num_chips, edges, ("switch",))


def fixed_schedules(topology: Topology, op: Op, nbytes: float) -> Iterator[tuple[str, Schedule, IntArray]]:
    """All fixed algorithms for so many chips, and where to place their ranks."""
    n = topology.num_chips
    natural, orders = np.arange(n), [each.chips for each in ring_orders(topology)]
    whole = topology.topology if isinstance(topology, Rerouted) else topology
    for each in algorithms(op).values():
        for pieces in PIECES if each.by_default else ():
            said = each.name if pieces == 1 else f"{each.name} in {pieces} pieces"
            flat = _made(each, op, Ranks(n, pieces=pieces))
            if flat is not None:
                yield said, flat, natural
                yield f"{said}, ring order", flat, orders[0]
            if isinstance(whole, Torus) and len(whole.dims) > 1:
                along = _made(each, op, Ranks(n, fanouts=whole.dims, pieces=pieces))
                if along is not None:
                    yield said, along, natural
    if op in torus_rings.OPS:
        for num in range(2, len(orders) + 1):
            for pieces in PIECES:
                made = ring.schedule(op, Ranks(n, pieces=pieces), orders=orders[:num])
                yield f"{num} rings in {pieces} pieces", made, natural


def _made(algorithm: Algorithm, op: Op, ranks: Ranks) -> Schedule | None:
    """None if it is not for so many ranks, not in pieces, or needs a switch that reduces."""
    try:
        schedule, whole = (algorithm.make(op, each) for each in (ranks, replace(ranks, pieces=1)))
    except CommsError:
        return None
    in_pieces = ranks.pieces == 1 or schedule.num_messages > whole.num_messages
    return schedule if in_pieces and not schedule.num_helpers else None


def best_fixed(topology: Topology, op: Op, nbytes: float) -> tuple[float, str]:
    """Seconds and name of the fastest."""
    return min(
        (float(simulate(topology, [CollectiveJob(schedule, places, nbytes)]).seconds[0]), name)
        for name, schedule, places in fixed_schedules(topology, op, nbytes)
    )


def matched_seconds(hops: Hops, nbytes: float) -> float:
    """An all-gather by plain matching, the best of several."""
    return min(
        _matched(hops, nbytes, chunks, np.random.default_rng(seed))
        for chunks, seeds in MATCHED
        for seed in range(seeds)
    )


def _matched(hops: Hops, nbytes: float, chunks: int, rng: np.random.Generator) -> float:
    n = hops.num_chips
    owner = np.repeat(np.arange(n), chunks)
    has = owner == np.arange(n)[:, np.newaxis]
    promised = has.copy()
    moving_s = nbytes / len(owner) / hops.bytes_per_s
    held = np.zeros(len(hops.capacity), dtype=np.bool_)
    events: list[tuple[float, int, int]] = [
        (0.0, -1, 0)
    ]  # time, hop, chunk that arrives or -1: wires fall free
    now = 0.0
    while events:
        now = events[0][0]
        while events and events[0][0] == now:
            _, hop, chunk = heappop(events)
            if hop >= 0 and chunk >= 0:
                has[hops.dst[hop], chunk] = True
            elif hop >= 0:
                held[hops.routes.of(hop)] = False
        for hop in np.lexsort((rng.random(hops.num_hops), moving_s)).tolist():
            route = hops.routes.of(hop)
            if held[route].any():
                continue
            wanted = np.flatnonzero(has[hops.src[hop]] & ~promised[hops.dst[hop]])
            if len(wanted):
                chunk = int(rng.choice(wanted))
                promised[hops.dst[hop], chunk] = True
                held[route] = True
                heappush(events, (now + moving_s[hop], hop, -1))
                heappush(events, (now + moving_s[hop] + hops.latency_s[hop], hop, chunk))
    assert has.all()
    return now


def row(name: str, topology: Topology, op: Op, nbytes: float) -> dict[str, object]:
    """One network, operation and size."""
    fixed_s, fixed = best_fixed(topology, op, nbytes)
    verdict = improve(op, topology, nbytes, fixed, fixed_s, seed=0, effort=EFFORT)
    found = verdict.found or synthesize(op, topology, nbytes, seed=0, effort=EFFORT)
    prove(found.schedule)
    matching = {Op.ALL_GATHER: 1, Op.ALL_REDUCE: 2}.get(op)
    halves = matched_seconds(hops_of(topology), nbytes) if matching else 0.0
    return {
        "network": name,
        "op": op.value,
        "nbytes": nbytes,
        "fixed": fixed,
        "fixed_s": fixed_s,
        "matching_s": halves * matching if matching else "",
        "synthesized_s": found.seconds,
        "planned_s": found.planned_s,
        "least_s": found.least_s,
        "fixed_over_synthesized": fixed_s / found.seconds,
        "chunks": found.schedule.num_chunks,
        "messages": found.schedule.num_messages,
        "verdict": verdict.reason,
    }


def growth() -> Iterator[dict[str, object]]:
    """How long it takes to find one, by chips."""
    for side in (4, 6, 8, 12, 16):
        mesh = Torus((side, side), (LINK,), (False,))
        for op in (Op.ALL_REDUCE, Op.ALL_GATHER):
            taken = seconds_of(lambda op=op, mesh=mesh: synthesize(op, mesh, 64e6, seed=0))
            yield {"network": f"mesh {side} x {side}", "op": op.value, "chips": side**2, "to_find_s": taken}


def main() -> None:
    """Measure and report."""
    synthesize(Op.ALL_REDUCE, networks()["ring of 8"], 1e6, seed=0)  # compiles
    rows = [row(*each, op, nbytes) for each in networks().items() for op in OPS for nbytes in SIZES]
    report("synthesis", [*rows, *growth()])


if __name__ == "__main__":
    main()
