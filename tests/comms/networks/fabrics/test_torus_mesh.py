"""Rings, meshes, tori and full meshes: routes against shortest paths, hand-made hop counts and Wormhole's figures."""

import networkx as nx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from comms.errors import CommsError
from comms.networks.fabrics.torus_mesh import FullMesh, Torus
from comms.networks.links import Link
from comms.networks.topology import route_latencies

LINK = Link(1e-6, 1e9)
CYCLE = 1e-9
NOC = Torus(
    (10, 12), (Link(9 * CYCLE, 32e9),), num_networks=2, one_way=True, access=Link(5 * CYCLE, 32e9)
)  # Wormhole: 5 cycles in, 9 per hop, 5 out


@st.composite
def tori(draw):
    dims = tuple(draw(st.lists(st.integers(1, 5), min_size=1, max_size=3)))
    one_way = draw(st.booleans())
    wraps = tuple(one_way or draw(st.booleans()) for _ in dims)
    links = tuple(Link((k + 1) * 1e-6, 1e9 / (k + 1)) for k in range(len(dims)))
    access = draw(st.sampled_from([None, Link(3e-6, 5e8)]))
    return Torus(dims, links, wraps, num_networks=draw(st.integers(1, 3)), one_way=one_way, access=access)


def all_pairs(num_chips):
    return tuple(
        grid.ravel() for grid in np.meshgrid(np.arange(num_chips), np.arange(num_chips), indexing="ij")
    )


def networks_of(torus):
    """The graph of each network: messages do not change over from one to another."""
    wires, n = torus.wires(), torus.num_chips
    ways = 0 if torus.access is None else n * torus.num_networks
    inside = (wires.num_wires - 2 * ways) // torus.num_networks
    for k in range(torus.num_networks):
        rows = list(range(k * inside, (k + 1) * inside))
        if ways:
            first = wires.num_wires - 2 * ways + k * n
            rows += [*range(first, first + n), *range(first + ways, first + ways + n)]
        graph = nx.DiGraph(zip(wires.tail[rows].tolist(), wires.head[rows].tolist(), strict=True))
        graph.add_nodes_from(range(n))
        yield graph


def assert_walks(topology, src, dst, routes):
    """Every route leads over its wires from its source to its destination."""
    wires = topology.wires()
    for i in range(routes.num_messages):
        node = src[i]
        for wire in routes.of(i):
            assert wires.tail[wire] == node
            node = wires.head[wire]
        assert node == dst[i]


@given(tori())
@settings(max_examples=60)
def test_every_route_is_a_walk_over_the_wires_of_one_network_with_the_fewest_hops(torus):
    src, dst = all_pairs(torus.num_chips)
    routes = torus.routes(src, dst)
    assert_walks(torus, src, dst, routes)
    networks = [dict(nx.all_pairs_shortest_path_length(each)) for each in networks_of(torus)]
    expected = [min(hops[s][d] for hops in networks) for s, d in zip(src.tolist(), dst.tolist(), strict=True)]
    assert np.diff(routes.offsets).tolist() == expected


@given(tori())
@settings(max_examples=60)
def test_wires_are_distinct_and_as_many_as_the_shape_has(torus):
    wires = torus.wires()
    lines = 0
    for dim, size in enumerate(torus.dims):
        if torus.one_way:
            per_line = size if size > 1 else 0
        elif torus.is_ring(dim):
            per_line = 2 * size
        else:
            per_line = 2 * (size - 1)
        lines += torus.num_chips // size * per_line
    ways = 0 if torus.access is None else 2 * torus.num_chips
    assert wires.num_wires == torus.num_networks * (lines + ways)
    assert (wires.tail != wires.head).all()
    assert wires.shares.tolist() == list(range(wires.num_wires))
    assert len(torus.tiers) > wires.tier.max(initial=0)


@given(tori())
@settings(max_examples=40)
def test_dimensions_are_crossed_in_order(torus):
    src, dst = all_pairs(torus.num_chips)
    routes, wires = torus.routes(src, dst), torus.wires()
    names = [torus.tiers[tier] for tier in wires.tier[routes.wires]]
    place = {name: k for k, name in enumerate(["access", *torus._names])}
    for i in range(routes.num_messages):
        crossed = [place[name] for name in names[routes.offsets[i] : routes.offsets[i + 1]]]
        inside = [k for k in crossed if k]
        assert inside == sorted(inside)
        assert len(crossed) - len(inside) in {0, 2}


def test_half_way_round_even_chips_go_up_and_odd_ones_down_and_load_a_ring_of_four_alike():
    ring = Torus((4,), (LINK,))
    src = np.arange(4)
    routes, wires = ring.routes(src, (src + 2) % 4), ring.wires()
    assert [wires.head[routes.of(i)].tolist() for i in range(4)] == [[1, 2], [0, 3], [3, 0], [2, 1]]
    assert np.bincount(routes.wires, minlength=8).tolist() == [1] * 8


def test_an_all_to_all_loads_every_wire_of_an_even_torus_alike():
    torus = Torus((4, 4, 4), (LINK,))
    load = np.bincount(torus.routes(*all_pairs(64)).wires, minlength=torus.wires().num_wires)
    assert set(load.tolist()) == {32}  # 64 chips times a mean distance of 1 per dimension over 2 wires


def test_a_ring_of_two_has_one_link():
    assert Torus((2,), (LINK,)).wires().num_wires == 2
    assert Torus((2, 2), (LINK,)).wires().num_wires == 8


def test_a_mesh_goes_the_long_way_where_a_ring_goes_round():
    ends = np.array([0]), np.array([7])
    assert len(Torus((8,), (LINK,), (False,)).routes(*ends).wires) == 7
    assert len(Torus((8,), (LINK,), (True,)).routes(*ends).wires) == 1


def test_dimensions_may_differ_in_link_and_wrap():
    torus = Torus((4, 3), (Link(1e-6, 4e9), Link(5e-6, 1e9)), (True, False))
    routes = torus.routes(np.array([0]), np.array([11]))
    assert route_latencies(torus.wires(), routes)[0] == pytest.approx(11e-6)  # once round the ring, twice up
    assert torus.wires().bytes_per_s[routes.wires].tolist() == [4e9, 1e9, 1e9]


def test_a_wormhole_message_costs_nine_cycles_a_hop_and_five_at_either_end():
    src = np.array([0, 0, 0, 11])
    dst = np.array([1, 10, 57, 0])  # right, down, 7 right and 5 down (or 3 left and 7 up), left and up
    routes, wires = NOC.routes(src, dst), NOC.wires()
    cycles = route_latencies(wires, routes) / CYCLE
    assert cycles == pytest.approx([19, 19, 10 + 9 * 10, 10 + 9 * 2])
    assert NOC.num_nodes == 3 * 120


def test_one_network_of_wormhole_goes_right_and_down_only():
    single = Torus((10, 12), (Link(9e-9, 32e9),), one_way=True)
    routes = single.routes(np.array([1]), np.array([0]))
    assert len(routes.wires) == 9
    assert single.levels(range(120)) is None  # one way round is longer than the other


def test_equal_networks_are_used_in_turn():
    torus = Torus((4,), (LINK,), num_networks=2)
    src = np.arange(4)
    routes = torus.routes(src, (src + 1) % 4)
    assert sorted((routes.wires >= 8).tolist()) == [False, False, True, True]


def test_levels_are_rings_of_whole_dimensions_and_lines_of_parts():
    torus = Torus((4, 8), (Link(1e-6, 4e9), Link(2e-6, 2e9)))
    x, y = torus.levels(range(32))
    assert (x.fanout, x.latency_s, x.bytes_per_s, x.pool_bytes_per_s, x.wraps) == (4, 1e-6, 4e9, 8e9, True)
    assert (y.fanout, y.hop_latency_s, y.pool_bytes_per_s, y.ring) == (8, 2e-6, 4 * 2 * 2e9, True)
    (part,) = torus.levels(range(0, 16, 4))
    assert (part.fanout, part.wraps, part.pool_bytes_per_s) == (4, False, 4e9)


def test_a_level_of_a_network_with_access_counts_both_ends():
    x, _ = NOC.levels(range(120))
    assert (x.latency_s, x.hop_latency_s) == (pytest.approx(19e-9), pytest.approx(9e-9))
    assert x.pool_bytes_per_s == 64e9


@given(tori())
@settings(max_examples=40)
def test_a_message_to_the_neighbour_costs_what_its_level_says(torus):
    if torus.one_way:
        return
    strides = np.cumprod([1, *torus.dims])
    dims = [k for k, size in enumerate(torus.dims) if size > 1]
    for k, level in zip(dims, torus.levels(range(torus.num_chips)), strict=True):
        routes = torus.routes(np.array([0]), np.array([strides[k]]))
        assert route_latencies(torus.wires(), routes)[0] == pytest.approx(level.latency_s)
        assert torus.wires().bytes_per_s[routes.wires].min() == level.bytes_per_s


@given(st.integers(1, 9), st.booleans())
def test_a_full_mesh_has_a_wire_between_every_two(num_chips, half_duplex):
    mesh = FullMesh(num_chips, LINK, half_duplex=half_duplex)
    src, dst = all_pairs(num_chips)
    routes, wires = mesh.routes(src, dst), mesh.wires()
    assert_walks(mesh, src, dst, routes)
    assert np.diff(routes.offsets).tolist() == (src != dst).astype(int).tolist()
    assert wires.num_wires == num_chips * (num_chips - 1)
    owners = len(set(wires.shares.tolist()))
    assert owners == wires.num_wires // (2 if half_duplex else 1)
    assert (wires.tail[wires.shares] + wires.head[wires.shares] == wires.tail + wires.head).all()


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (lambda: Torus((), (LINK,)), "at least one chip"),
        (lambda: Torus((4, 0), (LINK,)), "at least one chip"),
        (lambda: Torus((4,), (LINK,), num_networks=0), "0 networks"),
        (lambda: Torus((4,), (LINK,)).routes(np.array([0]), np.array([4])), "no node 4"),
        (lambda: FullMesh(4, LINK).routes(np.array([-1]), np.array([0])), "no node -1"),
    ],
)
def test_shapes_that_make_no_sense_are_refused(make, problem):
    with pytest.raises(CommsError, match=problem) as error:
        make()
    assert error.value.where
    assert error.value.hint


def test_the_memory_of_a_large_torus_is_that_of_its_wires():
    torus = Torus((64, 64, 32), (LINK,))
    assert torus.wires().num_wires == 6 * 131072
    src = np.arange(131072)
    routes = torus.routes(src, np.roll(src, 5))
    assert routes.num_messages == 131072
