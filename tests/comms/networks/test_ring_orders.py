"""Ring orders against all orders of small networks, constructed rings against their definition, subgroups by hand."""

from itertools import pairwise, permutations, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from comms.networks.fabrics.dragonfly import Dragonfly
from comms.networks.fabrics.edge_list import Duplex, Edge, EdgeList, Rerouted
from comms.networks.fabrics.torus_mesh import FullMesh, Torus
from comms.networks.hamiltonian_cycles import disjoint_cycles, snake_path, torus_cycle
from comms.networks.links import Link
from comms.networks.ring_orders import hierarchy, ring_orders, shortest_cycle

LINK = Link(1e-6, 1e9)
NVLINK = 25e9
# Two NVLinks or one between the eight chips of a DGX-1 with V100 (a hybrid cube mesh)
DOUBLE = ((0, 3), (0, 4), (1, 2), (1, 5), (2, 3), (4, 7), (5, 6), (6, 7))
SINGLE = ((0, 1), (0, 2), (1, 3), (2, 6), (3, 7), (4, 5), (4, 6), (5, 7))


def hybrid_cube_mesh():
    edges = [Edge(a, b, Link(1e-6, 2 * NVLINK)) for a, b in DOUBLE]
    return EdgeList(8, tuple(edges + [Edge(a, b, Link(1e-6, NVLINK)) for a, b in SINGLE]))


def best_ring(topology):
    """The ring that is as if it were alone."""
    return ring_orders(topology, 1)[0]


def hops(topology, order):
    return np.diff(topology.routes(order, np.roll(order, -1)).offsets)


def links_of(cycle):
    return [frozenset(link) for link in zip(cycle.tolist(), np.roll(cycle, -1).tolist(), strict=True)]


def assert_rings_share_no_wire(topology, rings):
    wires = topology.wires()
    load = np.zeros(wires.num_wires)
    for ring in rings:
        assert sorted(ring.chips.tolist()) == list(range(topology.num_chips))
        routes = topology.routes(ring.chips, np.roll(ring.chips, -1))
        np.add.at(load, wires.shares[routes.wires], ring.bytes_per_s)
        assert ring.latency_s == pytest.approx(wires.latency_s[routes.wires].sum())
    assert (load <= wires.bytes_per_s * (1 + 1e-9)).all()


@given(st.lists(st.integers(1, 6), min_size=1, max_size=4))
def test_a_snake_goes_from_neighbour_to_neighbour(dims):
    path = snake_path(tuple(dims))
    assert sorted(path.tolist()) == list(range(int(np.prod(dims))))
    mesh = Torus(tuple(dims), (LINK,), (False,))
    assert (np.diff(mesh.routes(path[:-1], path[1:]).offsets) == 1).all()


@pytest.mark.parametrize("wraps", list(product([False, True], repeat=3)))
def test_every_mesh_and_torus_has_a_cycle_of_neighbours_but_those_of_odd_sides_without_wraps(wraps):
    for dims in product(range(1, 6), repeat=3):
        torus = Torus(dims, (LINK,), wraps)
        cycle = torus_cycle(dims, wraps)
        assert cycle[0] == 0 and sorted(cycle.tolist()) == list(range(torus.num_chips))
        used = np.bincount(torus.routes(cycle, np.roll(cycle, -1)).wires, minlength=1)
        long = [dim for dim, size in enumerate(dims) if size > 1]
        steps = sorted(hops(torus, cycle).tolist(), reverse=True)
        if len(long) == 1 and dims[long[0]] > 2 and not wraps[long[0]]:
            assert cycle.tolist() == sorted(cycle.tolist())  # a line
        elif len(long) > 1 and all(size % 2 for size in dims) and not any(wraps[dim] for dim in long):
            assert (steps[0], set(steps[1:])) == (2, {1})
        elif long:
            assert set(steps) == {1}
        assert used.max() <= 1


@pytest.mark.parametrize(
    "dims",
    [
        *product(range(3, 8), repeat=2),
        (16, 16),
        (3, 20),
        (16, 32),
        (64, 64),
        (3, 3, 3),
        (3, 4, 5),
        (4, 4, 4),
        (8, 8, 8),
        (3, 3, 3, 3),
    ],
)
def test_a_torus_falls_apart_into_cycles_that_share_no_link(dims):
    cycles = disjoint_cycles(dims)
    links = [link for cycle in cycles for link in links_of(cycle)]
    assert len(cycles) == len(dims)
    assert len(set(links)) == len(links) == len(dims) * int(np.prod(dims))
    assert all((hops(Torus(dims, (LINK,)), cycle) == 1).all() for cycle in cycles)


def test_a_torus_that_defeats_the_search_still_has_its_snake_both_ways():
    torus = Torus((64, 64, 32), (LINK,))
    assert disjoint_cycles(torus.dims) == ()
    assert [ring.bytes_per_s for ring in ring_orders(torus)] == [1e9, 1e9]


@pytest.mark.parametrize(
    ("topology", "num_rings"),
    [
        (Torus((8,), (LINK,)), 2),
        (Torus((8,), (LINK,), one_way=True), 1),
        (Torus((8,), (LINK,), (False,)), 1),
        (Torus((4, 4), (LINK,)), 4),
        (Torus((4, 4), (LINK,), (False,)), 2),
        (Torus((3, 4, 5), (LINK,)), 6),
        (Torus((10, 12), (LINK,), one_way=True, num_networks=2), 4),
        (FullMesh(7, LINK), 6),
        (FullMesh(8, LINK), 4),
        (FullMesh(7, LINK, half_duplex=True), 3),
    ],
)
def test_regular_shapes_have_rings_at_the_full_rate_of_their_links(topology, num_rings):
    rings = ring_orders(topology)
    assert [ring.bytes_per_s for ring in rings] == [1e9] * num_rings
    assert_rings_share_no_wire(topology, rings)
    assert best_ring(topology).latency_s == min(ring.latency_s for ring in rings)


def test_a_line_takes_its_natural_order_and_comes_back_over_the_idle_wires():
    ring = best_ring(Torus((5,), (LINK,), (False,)))
    assert ring.chips.tolist() == [0, 1, 2, 3, 4]
    assert (ring.bytes_per_s, ring.latency_s) == (1e9, pytest.approx(8e-6))


def test_a_hybrid_cube_mesh_has_three_links_worth_of_rings_each_way():
    rings = ring_orders(hybrid_cube_mesh())
    assert [ring.bytes_per_s for ring in rings] == [2 * NVLINK] * 2 + [NVLINK] * 2
    assert_rings_share_no_wire(hybrid_cube_mesh(), rings)
    assert set(links_of(rings[0].chips)) == {frozenset(pair) for pair in DOUBLE}
    assert set(links_of(rings[2].chips)) == {frozenset(pair) for pair in SINGLE}


@given(st.integers(3, 6), st.data())
@settings(max_examples=30)
def test_small_graphs_get_the_widest_then_shortest_of_all_orders(num_chips, data):
    """Every two chips are joined, and none is reached sooner through a third."""
    rates, latencies = st.sampled_from([1e9, 2e9, 4e9]), st.sampled_from([2e-6, 3e-6])
    link = {pair: Link(1e-6, data.draw(rates)) for pair in permutations(range(num_chips), 2)}
    link = {pair: Link(data.draw(latencies), each.bytes_per_s) for pair, each in link.items()}
    graph = EdgeList(num_chips, tuple(Edge(a, b, each, Duplex.ONE_WAY) for (a, b), each in link.items()))
    laps = [[0, *rest, 0] for rest in permutations(range(1, num_chips))]
    widths = [
        (
            min(link[hop].bytes_per_s for hop in pairwise(lap)),
            -sum(link[hop].latency_s for hop in pairwise(lap)),
        )
        for lap in laps
    ]
    ring = best_ring(graph)
    assert (ring.bytes_per_s, -ring.latency_s) == pytest.approx(max(widths))


@given(st.integers(2, 7), st.integers(0, 2**32 - 1))
@settings(max_examples=30)
def test_the_shortest_cycle_is_that_of_all_orders(n, seed):
    rng = np.random.default_rng(seed)
    cost = rng.integers(1, 9, (n, n)).astype(float)
    cost[rng.random((n, n)) < 0.3] = np.inf
    laps = [[0, *rest, 0] for rest in permutations(range(1, n))]
    best = min(sum(cost[hop] for hop in pairwise(lap)) for lap in laps)
    order = shortest_cycle(cost)
    if order is None:
        assert best == np.inf
    else:
        assert sum(cost[hop] for hop in pairwise([*order.tolist(), 0])) == best


def pcie_tree():
    """Four chips behind each of two switches, chip c behind switch c % 2, joined by the host bridge."""
    edges = [Edge(chip, f"switch {chip % 2}", Link(5e-7, 2e10)) for chip in range(8)]
    edges += [Edge(f"switch {k}", "bridge", Link(1e-6, 2e10)) for k in range(2)]
    return EdgeList(8, tuple(edges), ("switch 0", "switch 1", "bridge"))


def test_a_tree_numbered_badly_is_crossed_once_each_way():
    ring = best_ring(pcie_tree())
    sides = [chip % 2 for chip in ring.chips.tolist()]
    assert sum(a != b for a, b in pairwise([*sides, sides[0]])) == 2
    assert ring.bytes_per_s == 2e10
    assert ring.latency_s == pytest.approx(8 * 1e-6 + 2 * 2e-6)


def test_a_ring_with_a_dead_link_still_has_a_ring_over_the_way_back():
    left = Rerouted(Torus((4, 4), (LINK,)), dead=(0,))
    rings = ring_orders(left)
    assert rings[0].bytes_per_s == 1e9 and len(rings) >= 3
    assert_rings_share_no_wire(left, rings)


def test_larger_graphs_get_a_ring_of_neighbours():
    torus = Torus((6, 6), (LINK,))
    label = np.random.default_rng(1).permutation(36)
    wires = torus.wires()
    edges = tuple(
        Edge(int(a), int(b), LINK) for a, b in zip(label[wires.tail], label[wires.head], strict=True) if a < b
    )
    graph = EdgeList(36, edges)
    ring = best_ring(graph)
    assert hops(graph, ring.chips).mean() < 1.2
    assert ring.bytes_per_s >= 0.5e9


def test_one_chip_and_two_chips_have_a_ring():
    one = ring_orders(EdgeList(1, ()))
    assert (len(one), one[0].chips.tolist(), one[0].latency_s) == (1, [0], 0.0)
    two = ring_orders(EdgeList(2, (Edge(0, 1, LINK),)))
    assert (len(two), two[0].bytes_per_s) == (1, 1e9)


def test_subgroups_of_a_tree_are_its_switches_whatever_the_numbers_of_their_chips():
    inner, outer = hierarchy(pcie_tree())
    assert inner == ((0, 2, 4, 6), (1, 3, 5, 7))
    assert outer == (tuple(range(8)),)


def test_tiers_are_told_apart_by_rate_and_by_latency_and_not_by_jitter():
    rng = np.random.default_rng(2)
    edges = []
    for chip in range(16):
        edges.append(Edge(chip, f"nvswitch {chip // 4}", Link(1e-6, 4e11 * rng.uniform(0.95, 1.05))))
        edges.append(Edge(chip, f"leaf {chip // 8}", Link(3e-6, 5e10 * rng.uniform(0.95, 1.05))))
    edges += [Edge(f"leaf {k}", "spine", Link(3e-6, 4e11)) for k in range(2)]
    names = (*(f"nvswitch {k}" for k in range(4)), "leaf 0", "leaf 1", "spine")
    hosts, pods, everyone = hierarchy(EdgeList(16, tuple(edges), names, through_chips=False))
    assert [len(level) for level in (hosts, pods, everyone)] == [4, 2, 1]
    assert hosts[1] == (4, 5, 6, 7) and pods[1] == tuple(range(8, 16))


def test_dragonflies_have_routers_in_groups():
    fly = Dragonfly(3, 2, 2, 1, Link(1e-7, 2e10), Link(3e-7, 2e10), Link(1e-6, 2e10))
    routers, groups, everyone = hierarchy(fly)
    assert (len(routers), len(groups), len(everyone)) == (6, 3, 1)
    assert best_ring(fly).bytes_per_s == 2e10


def test_where_all_chips_are_alike_there_is_one_subgroup():
    assert hierarchy(FullMesh(4, LINK)) == (((0, 1, 2, 3),),)
    assert hierarchy(Torus((4, 4), (LINK,))) == ((tuple(range(16)),),)
    assert hierarchy(EdgeList(1, ())) == (((0,),),)
