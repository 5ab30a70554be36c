"""Bisection against minimum cuts of every half and closed forms; bounds against what good algorithms reach."""

from itertools import combinations, product

import networkx as nx
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from comms.algorithms.catalog import algorithms
from comms.collectives.schedule import Op
from comms.errors import CommsError
from comms.networks.fabrics.dragonfly import Dragonfly
from comms.networks.fabrics.edge_list import Duplex, Edge, EdgeList, Rerouted
from comms.networks.fabrics.torus_mesh import FullMesh, Torus
from comms.networks.links import Link
from comms.simulation.compiled import CollectiveJob
from comms.simulation.full import simulate
from comms.synthesis.bisection import (
    Proof,
    bandwidth_bound,
    bisection,
    latency_bound,
    makespan_bound,
    narrow_cuts,
)

LINK = Link(1e-6, 1e9)


def bisection_by_brute_force(topology):
    """The least minimum cut (maximum flow) over all halves and both directions, in bytes per second."""
    wires, n = topology.wires(), topology.num_chips
    net = nx.DiGraph()
    net.add_nodes_from(range(topology.num_nodes))
    for tail, head, rate in zip(
        wires.tail.tolist(), wires.head.tolist(), wires.bytes_per_s.tolist(), strict=True
    ):
        have = net.get_edge_data(tail, head, {"capacity": 0.0})["capacity"]
        net.add_edge(tail, head, capacity=have + rate)
    best = float("inf")
    for size in {n // 2, -(-n // 2)}:
        for half in combinations(range(n), size):
            both = net.copy()
            both.add_edges_from(("from", chip) for chip in half)  # no capacity: infinite
            both.add_edges_from((chip, "to") for chip in range(n) if chip not in half)
            best = min(best, nx.minimum_cut_value(both, "from", "to"))
    return best


def passed(topology, cut):
    """What the wires of a cut carry, where there are no switches to place."""
    wires = topology.wires()
    return wires.bytes_per_s[cut.side[wires.tail] & ~cut.side[wires.head]].sum()


@st.composite
def graphs(draw, most=6):
    num_chips, num_switches = draw(st.integers(2, most)), draw(st.integers(0, 2))
    num_nodes = num_chips + num_switches
    rates = st.sampled_from([1e9, 2e9, 5e9])
    pairs = [(draw(st.integers(0, node - 1)), node) for node in range(1, num_nodes)]
    pairs += draw(
        st.lists(st.tuples(st.integers(0, num_nodes - 1), st.integers(0, num_nodes - 1)), max_size=6)
    )
    edges = tuple(
        Edge(a, b, Link(1e-6, draw(rates)), back=Link(1e-6, draw(rates))) for a, b in pairs if a != b
    )
    return EdgeList(num_chips, edges, tuple(f"switch {i}" for i in range(num_switches)))


@given(graphs())
@settings(max_examples=30)
def test_small_graphs_have_the_least_minimum_cut_of_all_halves(graph):
    cut = bisection(graph)
    assert cut.proof is Proof.EVERY_CUT
    assert cut.bytes_per_s == pytest.approx(bisection_by_brute_force(graph))
    assert abs(2 * int(cut.side.sum()) - graph.num_chips) <= 1


@pytest.mark.parametrize("dims", [(4,), (8,), (2, 4), (4, 2), (2, 2, 2), (2, 6)])
@pytest.mark.parametrize("wraps", [True, False])
@pytest.mark.parametrize("rates", [(1e9,), (1e9, 2e9, 8e9), (8e9, 1e9, 2e9)])
def test_even_tori_and_meshes_have_the_closed_form_that_brute_force_finds(dims, wraps, rates):
    links = tuple(Link(1e-6, rate) for rate in rates[: len(dims) if len(rates) > 1 else 1])
    torus = Torus(dims, links, (wraps,))
    cut = bisection(torus)
    wires = torus.wires()
    edges = tuple(
        Edge(int(a), int(b), Link(1e-6, float(rate)), Duplex.ONE_WAY)
        for a, b, rate in zip(wires.tail, wires.head, wires.bytes_per_s, strict=True)
    )
    by_every_cut = bisection(EdgeList(torus.num_chips, edges))
    assert cut.proof is Proof.CLOSED_FORM and by_every_cut.proof is Proof.EVERY_CUT
    assert cut.bytes_per_s == pytest.approx(by_every_cut.bytes_per_s)


@pytest.mark.parametrize(
    ("topology", "rate"),
    [
        (Torus((4, 4), (LINK,)), 8e9),
        (Torus((4, 4), (LINK,), (False,)), 4e9),
        (Torus((16, 20, 28), (Link(1e-6, 9e10),)), 2 * 16 * 20 * 9e10),  # a TPU v5p pod
        (Torus((10, 12), (LINK,), one_way=True, num_networks=2), 2 * 10 * 1e9),
        (FullMesh(8, LINK), 16e9),
        (FullMesh(5, LINK), 6e9),
        (Torus((2, 2), (LINK,)), 2e9),
        (Torus((1,), (LINK,)), 0.0),
        (EdgeList(1, ()), 0.0),
    ],
)
def test_regular_shapes_have_the_bisection_of_their_closed_form(topology, rate):
    cut = bisection(topology)
    assert cut.proof is Proof.CLOSED_FORM
    assert cut.bytes_per_s == rate == passed(topology, cut)


@pytest.mark.parametrize(
    ("topology", "rate"),
    [
        (Torus((3, 3), (LINK,), (False,)), 4e9),  # (k^2 - 1) / (k - 1): Leighton 1992
        (Torus((5, 5), (LINK,), (False,)), 6e9),
        (Torus((3, 3, 3), (LINK,), (False,)), 13e9),
        (Torus((7,), (LINK,)), 2e9),
        (Torus((5, 6), (LINK,)), 10e9),
    ],
)
def test_odd_meshes_are_cut_with_a_jog_in_every_layer(topology, rate):
    assert bisection(topology).bytes_per_s == pytest.approx(rate)


@given(st.integers(4, 10), st.integers(0, 2**32 - 1))
@settings(max_examples=15)
def test_exchanges_find_the_least_cut_of_two_clusters_whatever_their_numbers(half, seed):
    """Two dense halves of ten chips or more, joined by two thin links."""
    half += 6
    label = np.random.default_rng(seed).permutation(2 * half)
    edges = [(a, b, 1e9) for a, b in combinations(range(half), 2)]
    edges += [(a + half, b + half, rate) for a, b, rate in edges]
    edges += [(0, half, 1e8), (1, half + 1, 1e8)]
    graph = EdgeList(
        2 * half, tuple(Edge(int(label[a]), int(label[b]), Link(1e-6, rate)) for a, b, rate in edges)
    )
    cut = bisection(graph)
    assert cut.proof is Proof.BEST_FOUND
    assert cut.bytes_per_s == pytest.approx(2e8)


def leaf_spine(num_leaves, chips_per_leaf, uplinks, rate=1e9):
    leaves, spines = [f"leaf {k}" for k in range(num_leaves)], [f"spine {k}" for k in range(uplinks)]
    n = num_leaves * chips_per_leaf
    edges = [Edge(chip, leaves[chip // chips_per_leaf], Link(1e-6, rate)) for chip in range(n)]
    edges += [Edge(leaf, spine, Link(1e-6, rate)) for leaf, spine in product(leaves, spines)]
    return EdgeList(n, tuple(edges), (*leaves, *spines))


@pytest.mark.parametrize(("uplinks", "rate"), [(4, 8e9), (2, 4e9), (1, 2e9)])
def test_a_leaf_spine_network_is_cut_at_its_uplinks(uplinks, rate):
    assert bisection(leaf_spine(4, 4, uplinks)).bytes_per_s == pytest.approx(rate)
    assert bisection(leaf_spine(8, 8, 2 * uplinks)).bytes_per_s == pytest.approx(4 * rate)


def test_chips_on_one_switch_are_cut_at_their_ports():
    star = EdgeList(8, tuple(Edge(chip, "switch", LINK) for chip in range(8)), ("switch",))
    assert bisection(star).bytes_per_s == 4e9


def test_a_dragonfly_is_cut_between_groups():
    fly = Dragonfly(8, 4, 4, 2, Link(1e-7, 2e10), Link(3e-7, 2e10), Link(1e-6, 1e10))
    assert bisection(fly).bytes_per_s <= 16 * 1e10
    assert bisection(fly).proof is Proof.BEST_FOUND


def test_damage_lowers_the_bisection():
    ring = Torus((8,), (LINK,))
    assert bisection(Rerouted(ring, dead=(0,))).bytes_per_s == 1e9
    assert bisection(Rerouted(ring, slow={0: 0.5, 13: 0.5})).bytes_per_s == pytest.approx(1e9)


@pytest.mark.parametrize(
    ("op", "seconds"),
    [
        (Op.ALL_REDUCE, 2 * 7 / 8),
        (Op.ALL_GATHER, 7 / 8),
        (Op.REDUCE_SCATTER, 7 / 8),
        (Op.ALL_TO_ALL, 7 / 8),
        (Op.BROADCAST, 1.0),
        (Op.REDUCE, 1.0),
        (Op.GATHER, 7 / 8),
        (Op.SCATTER, 7 / 8),
        (Op.BARRIER, 0.0),
    ],
)
def test_on_one_switch_the_bounds_are_what_the_best_algorithms_take(op, seconds):
    star = EdgeList(8, tuple(Edge(chip, "switch", LINK) for chip in range(8)), ("switch",))
    assert bandwidth_bound(star, op, 1e9, cuts=[bisection(star)]) == pytest.approx(seconds)
    assert latency_bound(star, op) == pytest.approx(2e-6)


def test_switches_that_add_halve_the_bound_of_an_all_reduce():
    star = EdgeList(8, tuple(Edge(chip, "switch", LINK) for chip in range(8)), ("switch",))
    assert bandwidth_bound(star, Op.ALL_REDUCE, 1e9, switches_reduce=True) == pytest.approx(1.0)


def test_an_all_to_all_on_a_ring_is_bound_by_its_bisection():
    ring = Torus((16,), (LINK,))
    cut = bisection(ring)
    assert bandwidth_bound(ring, Op.ALL_TO_ALL, 1e9) == pytest.approx(15 / 16 / 2)
    assert bandwidth_bound(ring, Op.ALL_TO_ALL, 1e9, cuts=[cut]) == pytest.approx(8 * 8 / 16 / 2)


def test_an_unsymmetric_cut_is_used_in_the_direction_of_each_flow():
    pair = EdgeList(2, (Edge(0, 1, Link(1e-6, 1e9), back=Link(1e-6, 2e9)),))
    cut = bisection(pair)
    assert {cut.there_bytes_per_s, cut.back_bytes_per_s} == {1e9, 2e9}
    assert bandwidth_bound(pair, Op.BROADCAST, 1e9, root=0, cuts=[cut]) == pytest.approx(1.0)
    assert bandwidth_bound(pair, Op.BROADCAST, 1e9, root=1, cuts=[cut]) == pytest.approx(0.5)


def test_a_thin_bridge_between_unequal_islands_bounds_what_crosses_it():
    edges = [Edge(a, b, LINK) for a, b in [*combinations(range(3), 2), *combinations(range(3, 8), 2)]]
    islands = EdgeList(8, (*edges, Edge(0, 3, Link(1e-6, 1e7))))
    cuts = narrow_cuts(islands)
    for op, share in (
        (Op.ALL_REDUCE, 1.0),
        (Op.ALL_GATHER, 5 / 8),
        (Op.ALL_TO_ALL, 15 / 8),
        (Op.BROADCAST, 1.0),
    ):
        assert bandwidth_bound(islands, op, 1e7, cuts=cuts) == pytest.approx(share)


@given(graphs(), st.data())
@settings(max_examples=40)
def test_no_algorithm_beats_the_bounds_of_narrow_cuts(graph, data):
    op = data.draw(
        st.sampled_from([Op.ALL_REDUCE, Op.ALL_GATHER, Op.REDUCE_SCATTER, Op.BROADCAST, Op.ALL_TO_ALL])
    )
    algorithm = data.draw(st.sampled_from([each for each in algorithms(op).values() if each.by_default]))
    nbytes, n = data.draw(st.sampled_from([0.0, 1e3, 1e9])), graph.num_chips
    try:
        schedule = algorithm.schedule(op, n, nbytes, ())
    except CommsError:
        assume(False)
    assume(not schedule.num_helpers)
    seconds = simulate(graph, [CollectiveJob(schedule, np.arange(n), nbytes)]).seconds[0]
    assert seconds >= makespan_bound(graph, op, nbytes, cuts=narrow_cuts(graph)) * (1 - 1e-9)


def test_a_root_in_the_middle_is_near_all_others_and_one_chip_needs_nothing():
    line = Torus((5,), (LINK,), (False,))
    assert [latency_bound(line, Op.BROADCAST, root) for root in (0, 2)] == pytest.approx([4e-6, 2e-6])
    assert [latency_bound(line, Op.REDUCE, root) for root in (0, 2)] == pytest.approx([4e-6, 2e-6])
    assert bandwidth_bound(Torus((1,), (LINK,)), Op.ALL_REDUCE, 4e9) == 0.0


@given(graphs(), st.sampled_from(Op), st.floats(0, 1e9))
@settings(max_examples=40)
def test_more_bytes_never_lower_a_bound_and_it_is_never_below_latency(graph, op, nbytes):
    cut = bisection(graph)
    low = makespan_bound(graph, op, nbytes, cuts=[cut])
    assert low >= latency_bound(graph, op) > 0
    assert makespan_bound(graph, op, 2 * nbytes, cuts=[cut]) >= low
    assert makespan_bound(graph, op, nbytes) <= low


def test_the_latency_bound_is_the_diameter_of_the_quickest_paths():
    torus = Torus((5, 6, 7), (LINK,))
    assert latency_bound(torus, Op.ALL_TO_ALL) == pytest.approx((2 + 3 + 3) * 1e-6)
