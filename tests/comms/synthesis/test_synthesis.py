"""Schedules made for one network: proved, as fast as planned, never faster than wires allow, taken if worth it."""

from collections.abc import Iterator
from itertools import combinations, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from comms.algorithms import ring, torus_rings
from comms.algorithms.catalog import algorithms
from comms.algorithms.rounds import Ranks
from comms.collectives.proof import prove
from comms.collectives.schedule import Op, Schedule
from comms.errors import CommsError
from comms.networks.fabrics.edge_list import Duplex, Edge, EdgeList, Rerouted
from comms.networks.fabrics.torus_mesh import Torus
from comms.networks.links import Link
from comms.networks.ring_orders import ring_orders
from comms.networks.topology import IntArray, Topology
from comms.simulation.compiled import CollectiveJob
from comms.simulation.full import Method, simulate
from comms.synthesis.forest import NONE, Hops, Wanted, fullest_seconds, hops_of, pack
from comms.synthesis.synthesis import TREES, improve, synthesize
from comms.synthesis.timetable import sends_of, timetable

LINK = Link(1e-6, 50e9)
NBYTES = 64e6
OPS = tuple(TREES)


def mesh(*dims: int, wraps: bool = False) -> Torus:
    return Torus(dims, (LINK,), (wraps,))


def islands(sizes: tuple[int, int], bridge: Link) -> EdgeList:
    a, b = sizes
    inside = [Edge(i, j, LINK) for i, j in combinations(range(a), 2)]
    inside += [Edge(i, j, LINK) for i, j in combinations(range(a, a + b), 2)]
    return EdgeList(a + b, (*inside, Edge(0, a, bridge)))


def cube_mesh() -> EdgeList:
    """Eight chips in two squares with their diagonals, joined corner to corner; half of the links are double."""
    double = {(0, 3), (0, 4), (1, 2), (1, 5), (2, 6), (3, 7), (4, 7), (5, 6)}
    single = {(0, 1), (0, 2), (1, 3), (2, 3), (4, 5), (4, 6), (5, 7), (6, 7)}
    rates = {**dict.fromkeys(single, 25e9), **dict.fromkeys(double, 50e9)}
    return EdgeList(8, tuple(Edge(*pair, Link(1e-6, rate)) for pair, rate in sorted(rates.items())))


def switch(num_chips: int, slow: dict[int, float] | None = None) -> EdgeList:
    rates = {chip: LINK.bytes_per_s * (slow or {}).get(chip, 1.0) for chip in range(num_chips)}
    return EdgeList(
        num_chips, tuple(Edge(c, "switch", Link(1e-6, rate)) for c, rate in rates.items()), ("switch",)
    )


def without(topology: Topology, a: int, b: int) -> Rerouted:
    """Both directions of one link are dead."""
    wires = topology.wires()
    ends = zip(wires.tail.tolist(), wires.head.tolist(), strict=True)
    return Rerouted(topology, tuple(w for w, pair in enumerate(ends) if set(pair) == {a, b}))


def ring_of(num_chips: int, duplex: Duplex = Duplex.FULL) -> EdgeList:
    return EdgeList(num_chips, tuple(Edge(c, (c + 1) % num_chips, LINK, duplex) for c in range(num_chips)))


@st.composite
def networks(draw: st.DrawFn) -> EdgeList:
    """Any few chips in a tree with more edges here and there, of any speeds, some half-duplex, maybe a switch."""
    chips = draw(st.integers(2, 4))
    nodes: list[int | str] = [*range(chips), *(["switch"] if draw(st.booleans()) else [])]
    pairs = [(nodes[draw(st.integers(0, i - 1))], nodes[i]) for i in range(1, len(nodes))]
    more = [pair for pair in combinations(nodes, 2) if pair not in pairs]
    pairs += draw(st.lists(st.sampled_from(more), unique=True, max_size=3)) if more else []
    links = st.builds(Link, st.sampled_from([1e-6, 5e-6]), st.sampled_from([5e9, 10e9, 50e9]))
    duplex = st.sampled_from([Duplex.FULL, Duplex.FULL, Duplex.HALF])
    edges = tuple(Edge(a, b, draw(links), draw(duplex)) for a, b in pairs)
    return EdgeList(chips, edges, ("switch",) if "switch" in nodes else ())


def seconds_of(topology: Topology, schedule: Schedule, places: IntArray, nbytes: float) -> float:
    return float(simulate(topology, [CollectiveJob(schedule, places, nbytes)]).seconds[0])


def fixed_schedules(topology: Topology, op: Op, dims: tuple[int, ...]) -> Iterator[tuple[Schedule, IntArray]]:
    """All that the catalog has, in natural order and around the best ring; several rings; by dimension."""
    n, orders = topology.num_chips, [each.chips for each in ring_orders(topology)]
    for each in algorithms(op).values():
        for pieces in (1, 16, 64):
            try:
                schedule = each.make(op, Ranks(n, pieces=pieces))
            except CommsError:
                continue  # not for so many ranks
            if pieces > 1 and schedule.num_messages == each.make(op, Ranks(n)).num_messages:
                continue  # it goes in one piece
            if not schedule.num_helpers:  # switches that reduce are another matter
                yield from ((schedule, np.arange(n)), (schedule, orders[0]))
    if op in torus_rings.OPS:
        for num in range(2, len(orders) + 1):
            yield ring.schedule(op, Ranks(n), orders=orders[:num]), np.arange(n)
        for wraps, rotated in product((False, True), repeat=2) if dims else ():
            rotations = torus_rings.rotations(len(dims))
            taken, around = rotations if rotated else rotations[:1], (wraps,) * len(dims)
            schedule = torus_rings.scattering_and_gathering(op, "torus", dims, taken, around, not rotated)
            yield schedule, np.arange(n)


def best_fixed(topology: Topology, op: Op, nbytes: float, dims: tuple[int, ...] = ()) -> float:
    return min(seconds_of(topology, *each, nbytes) for each in fixed_schedules(topology, op, dims))


@settings(max_examples=6)
@given(networks(), st.sampled_from(OPS), st.sampled_from([0.0, 1.0, 1e5]), st.integers(0, 3))
def test_every_schedule_is_proved_and_not_faster_than_wires_allow(
    network: EdgeList, op: Op, nbytes: float, seed: int
) -> None:
    root = seed % network.num_chips
    found = synthesize(op, network, nbytes, seed=seed, root=root)
    prove(found.schedule)
    assert found.seconds == seconds_of(network, found.schedule, np.arange(network.num_chips), nbytes)
    assert found.seconds >= found.least_s * (1 - 1e-9)


@pytest.mark.parametrize(
    ("op", "topology"),
    [
        *((op, mesh(3, 3)) for op in OPS),
        (Op.ALL_REDUCE, ring_of(5, Duplex.ONE_WAY)),
        (Op.ALL_REDUCE, without(mesh(3, 3), 3, 4)),
        (Op.ALL_GATHER, islands((3, 4), Link(2e-6, 10e9))),
        (Op.ALL_TO_ALL, islands((3, 4), Link(2e-6, 10e9))),
    ],
)
def test_where_hops_are_wires_full_fidelity_plays_the_timetable(op: Op, topology: Topology) -> None:
    found = synthesize(op, topology, 1e6, seed=1)
    prove(found.schedule)
    played = simulate(topology, [CollectiveJob(found.schedule, np.arange(topology.num_chips), 1e6)])
    assert played.method is Method.SWEEP  # no two messages meet on a wire
    assert found.planned_s == pytest.approx(found.seconds, rel=1e-9)


@pytest.mark.parametrize(
    ("topology", "dims", "op", "nbytes"),
    [
        (mesh(4, 4), (4, 4), Op.ALL_REDUCE, NBYTES),
        (mesh(4, 4), (4, 4), Op.ALL_TO_ALL, NBYTES),
        (mesh(4, 4), (4, 4), Op.ALL_GATHER, 1e6),
        (without(mesh(4, 4, wraps=True), 0, 1), (4, 4), Op.ALL_GATHER, 1e6),
        (cube_mesh(), (), Op.ALL_TO_ALL, NBYTES),
    ],
)
def test_it_wins_by_three_tenths_where_nothing_fixed_fits(
    topology: Topology, dims: tuple[int, ...], op: Op, nbytes: float
) -> None:
    fixed = best_fixed(topology, op, nbytes, dims)
    verdict = improve(op, topology, nbytes, "the best fixed", fixed, seed=0)
    assert verdict.found is not None
    prove(verdict.found.schedule)
    assert fixed / verdict.found.seconds >= 1.3
    assert "times faster than the best fixed" in verdict.reason


@pytest.mark.parametrize(
    ("topology", "op"),
    [
        (ring_of(8), Op.ALL_REDUCE),
        (ring_of(8), Op.ALL_GATHER),
        (switch(8), Op.ALL_REDUCE),
        (switch(8), Op.ALL_TO_ALL),
        (switch(6, {5: 0.25}), Op.ALL_REDUCE),
        (mesh(3, 3, wraps=True), Op.ALL_REDUCE),
    ],
)
def test_it_keeps_what_is_fixed_where_that_fits(topology: Topology, op: Op) -> None:
    dims = topology.dims if isinstance(topology, Torus) else ()
    verdict = improve(op, topology, 1e9, "the ring", best_fixed(topology, op, 1e9, dims), seed=0)
    assert verdict.found is None
    assert verdict.reason.startswith("keeps the ring")


def test_it_says_how_much_slower_the_best_found_is() -> None:
    planned_s = synthesize(Op.ALL_REDUCE, mesh(3, 3), 1e6, seed=0).planned_s
    verdict = improve(Op.ALL_REDUCE, mesh(3, 3), 1e6, "magic", planned_s / 1.02, seed=0)
    assert verdict.found is None
    assert verdict.reason == "keeps magic: the best plan found takes 1.02 times as long"


@pytest.mark.parametrize("op", OPS)
def test_the_same_seed_gives_the_same_schedule(op: Op) -> None:
    one, other = (synthesize(op, mesh(3, 2), 1e6, seed=5) for _ in range(2))
    assert one.seconds == other.seconds
    for mine, yours in zip(one.schedule.channels, other.schedule.channels, strict=True):
        assert len(mine.rounds) == len(yours.rounds)
        for a, b in zip(mine.rounds, yours.rounds, strict=True):
            assert a.first.tobytes() == b.first.tobytes()
            assert a.pattern.dst.tobytes() == b.pattern.dst.tobytes()


@pytest.mark.parametrize("op", OPS)
def test_without_latency_twice_the_bytes_take_twice_as_long(op: Op) -> None:
    fast = Torus((3, 2), (Link(0.0, 1e9),), (False,))
    once, twice = (synthesize(op, fast, nbytes, seed=0).seconds for nbytes in (2.0**20, 2.0**21))
    assert twice == pytest.approx(2 * once, rel=1e-9)


def test_all_reduce_beats_a_reduce_scatter_followed_by_an_all_gather() -> None:
    both, scatter, gather = (
        synthesize(op, mesh(4, 4), NBYTES, seed=0).seconds
        for op in (Op.ALL_REDUCE, Op.REDUCE_SCATTER, Op.ALL_GATHER)
    )
    assert both < 0.75 * (scatter + gather)


def test_more_effort_is_never_slower_where_the_timetable_is_exact() -> None:
    dead = without(mesh(3, 3, wraps=True), 0, 1)
    little, much = (synthesize(Op.BROADCAST, dead, NBYTES, seed=0, effort=e).seconds for e in (1, 3))
    assert much <= little


def all_gather_cut_s(hops: Hops, nbytes: float) -> float:
    """The least time of an all-gather: over all sets of chips, what they bring over the wires that leave them."""
    n, worst = hops.num_chips, 0.0
    for mask in range(1, 2**n - 1):
        inside = (mask >> np.arange(n)) & 1 == 1
        out = inside[hops.src] & ~inside[hops.dst]
        worst = max(worst, inside.sum() / hops.bytes_per_s[out].sum())
    return float(worst) * nbytes / n


@settings(max_examples=20)
@given(st.integers(0, 1000), st.sampled_from([Op.ALL_GATHER, Op.REDUCE_SCATTER]))
def test_packed_trees_come_close_to_the_tightest_cut(seed: int, op: Op) -> None:
    rng = np.random.default_rng(seed)
    n = int(rng.integers(3, 8))
    pairs = [(int(rng.integers(0, i)), i) for i in range(1, n)]
    pairs += [pair for pair in combinations(range(n), 2) if pair not in pairs and rng.random() < 0.4]
    edges = tuple(Edge(a, b, Link(0.0, float(rng.choice([1e9, 2e9])))) for a, b in pairs)
    network = EdgeList(n, edges)
    cut_s = all_gather_cut_s(hops_of(network), NBYTES)  # the same both ways, as the wires are
    found = synthesize(op, network, NBYTES, seed=0)
    assert cut_s * (1 - 1e-9) <= found.seconds <= 1.15 * cut_s
    assert found.least_s <= cut_s * (1 + 1e-9)


def test_trees_of_a_mesh_fill_all_its_wires() -> None:
    hops = hops_of(mesh(4, 4))
    forest = pack(hops, Wanted((5,) * 48, 1e6, up=True), lean=0.2, sweeps=30, seed=0)
    every = 30 * 48 * 1e6 / (hops.capacity.sum())  # 15 hops up and 15 down for each tree, spread evenly
    assert every <= fullest_seconds(hops, forest, 1e6) <= 1.05 * every
    for tree in range(forest.num_trees):
        assert (forest.down[tree] == NONE).nonzero()[0].tolist() == [5]
        assert (hops.dst[forest.down[tree][np.arange(16) != 5]] == np.delete(np.arange(16), 5)).all()


@pytest.mark.parametrize("topology", [mesh(3, 3), switch(5, {2: 0.25}), ring_of(4, Duplex.HALF)])
def test_a_timetable_never_puts_two_messages_on_a_wire_or_one_before_what_it_needs(
    topology: Topology,
) -> None:
    hops = hops_of(topology)
    wanted = Wanted(tuple(range(topology.num_chips)), 1e6, up=True)
    sends = sends_of(hops, pack(hops, wanted, lean=0.2, sweeps=3, seed=0), 3)
    planned = timetable(hops, sends, 1e6 / 3, 1e-5, seed=0)
    leaves = planned.start_s + 1e6 / 3 / hops.bytes_per_s[sends.hop]
    arrives = leaves + hops.latency_s[sends.hop]
    late, early = sends.needs
    assert (planned.start_s[late] >= arrives[early] - 1e-15).all()
    assert planned.seconds == pytest.approx(arrives.max(), rel=1e-12)
    for wire in range(len(hops.capacity)):
        users = [send for send, hop in enumerate(sends.hop) if wire in hops.routes.of(hop)]
        users.sort(key=lambda send: planned.start_s[send])
        assert (planned.start_s[users[1:]] >= leaves[users[:-1]] - 1e-15).all()


def test_one_chip_has_all_it_needs() -> None:
    found = synthesize(Op.ALL_REDUCE, mesh(1), NBYTES, seed=0)
    prove(found.schedule)
    assert (found.seconds, found.schedule.num_chunks) == (0.0, 1)
    assert improve(Op.ALL_REDUCE, mesh(1), NBYTES, "nothing", 0.0, seed=0).reason.startswith("keeps nothing")


@pytest.mark.parametrize(
    ("op", "nbytes", "root", "problem"),
    [
        (Op.BARRIER, 0.0, 0, "cannot synthesize barrier"),
        (Op.BROADCAST, -1.0, 0, "-1.0 bytes"),
        (Op.BROADCAST, 1.0, 4, "there is no chip 4"),
    ],
)
def test_what_makes_no_sense_is_refused(op: Op, nbytes: float, root: int, problem: str) -> None:
    with pytest.raises(CommsError, match=problem):
        synthesize(op, ring_of(4), nbytes, seed=0, root=root)
