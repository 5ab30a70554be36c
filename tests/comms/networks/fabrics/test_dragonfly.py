"""Dragonflies: every route a walk over wires, of the length that shortest paths and the paper say."""

import networkx as nx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from comms.errors import CommsError
from comms.networks.fabrics.dragonfly import Arrangement, Dragonfly, Routing
from comms.networks.links import Link
from comms.networks.topology import route_latencies

TERMINAL, LOCAL, LONG = Link(1e-7, 2e10), Link(3e-7, 2e10), Link(1e-6, 1e10)


def dragonfly(g, a, p, h, arrangement=Arrangement.PALMTREE, routing=Routing.MINIMAL):
    return Dragonfly(g, a, p, h, TERMINAL, LOCAL, LONG, arrangement, routing)


@st.composite
def dragonflies(draw, routing=Routing.MINIMAL):
    a, h = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    g = draw(st.integers(1, a * h + 1))
    return dragonfly(g, a, draw(st.integers(1, 3)), h, draw(st.sampled_from(Arrangement)), routing)


def all_pairs(num_chips):
    return tuple(
        grid.ravel() for grid in np.meshgrid(np.arange(num_chips), np.arange(num_chips), indexing="ij")
    )


def assert_walks(topology, src, dst, routes):
    wires = topology.wires()
    for i in range(routes.num_messages):
        node = src[i]
        for wire in routes.of(i):
            assert wires.tail[wire] == node
            node = wires.head[wire]
        assert node == dst[i]


def long_links(fly):
    """(tail group, head group) of every long wire."""
    wires = fly.wires()
    long = wires.tier == fly.tiers.index("long")
    ends = np.stack([wires.tail[long], wires.head[long]]) - fly.num_chips
    return ends // fly.routers_per_group


@given(dragonflies())
@settings(max_examples=40)
def test_every_two_groups_have_the_same_number_of_links_and_each_leads_back(fly):
    tail, head = long_links(fly)
    counts = np.zeros((fly.num_groups, fly.num_groups), dtype=int)
    np.add.at(counts, (tail, head), 1)
    assert (counts == fly.links_per_pair * (1 - np.eye(fly.num_groups, dtype=int))).all()
    wires = fly.wires()
    ends = sorted(zip(wires.tail.tolist(), wires.head.tolist(), strict=True))
    assert ends == sorted((head, tail) for tail, head in ends)
    routers, used = np.unique(wires.tail[wires.tier == 2], return_counts=True)
    assert used.max(initial=0) <= fly.long_links_per_router
    assert (routers >= fly.num_chips).all()


@given(dragonflies())
@settings(max_examples=40)
def test_minimal_routes_are_walks_with_one_long_link_and_at_most_two_local_ones(fly):
    src, dst = all_pairs(fly.num_chips)
    routes = fly.routes(src, dst)
    assert_walks(fly, src, dst, routes)
    tier = fly.wires().tier[routes.wires]
    message = np.repeat(np.arange(len(src)), np.diff(routes.offsets))
    counts = np.stack([np.bincount(message[tier == k], minlength=len(src)) for k in range(3)])
    per_group = fly.chips_per_router * fly.routers_per_group
    assert (counts[0] == 2 * (src != dst)).all()
    assert (counts[2] == (src // per_group != dst // per_group)).all()
    assert counts[1].max() <= 2


@given(dragonflies())
@settings(max_examples=25)
def test_minimal_routes_are_the_shortest_with_one_long_link_at_most(fly):
    """Dijkstra, with long links so dear that a second one never pays."""
    wires = fly.wires()
    graph = nx.DiGraph()
    for tail, head, tier in zip(wires.tail.tolist(), wires.head.tolist(), wires.tier.tolist(), strict=True):
        graph.add_edge(tail, head, weight=1001 if tier == 2 else 1)
    src, dst = all_pairs(fly.num_chips)
    hops = np.diff(fly.routes(src, dst).offsets)
    shortest = dict(nx.all_pairs_dijkstra_path_length(graph))
    expected = [shortest[s][d] % 1000 for s, d in zip(src.tolist(), dst.tolist(), strict=True)]
    assert hops.tolist() == expected


@given(dragonflies(routing=Routing.VALIANT))
@settings(max_examples=40)
def test_valiant_routes_go_by_a_third_group_exactly_where_two_groups_talk(fly):
    src, dst = all_pairs(fly.num_chips)
    routes = fly.routes(src, dst)
    assert_walks(fly, src, dst, routes)
    tier = fly.wires().tier[routes.wires]
    message = np.repeat(np.arange(len(src)), np.diff(routes.offsets))
    per_group = fly.chips_per_router * fly.routers_per_group
    apart = src // per_group != dst // per_group
    expected = apart * (2 if fly.num_groups > 2 else 1)
    assert np.bincount(message[tier == 2], minlength=len(src)).tolist() == expected.tolist()


def test_valiant_spreads_what_one_group_sends_to_one_other():
    minimal, valiant = (dragonfly(9, 4, 4, 2, routing=routing) for routing in Routing)
    src, dst = np.arange(16), np.arange(16, 32)
    wires = minimal.wires()
    loads = [
        np.bincount(fly.routes(src, dst).wires, minlength=wires.num_wires)[wires.tier == 2].max()
        for fly in (minimal, valiant)
    ]
    assert loads[0] == 16
    assert loads[1] <= 6


def test_the_largest_dragonfly_of_the_paper_has_its_sizes():
    fly = dragonfly(33, 8, 4, 4)  # p = h = 4, a = 2 h, g = a h + 1 (section 3.1)
    assert (fly.num_chips, fly.num_routers, fly.links_per_pair) == (1056, 264, 1)
    per_router = np.bincount(fly.wires().tail)[fly.num_chips :]
    assert set(per_router.tolist()) == {4 + 7 + 4}
    src = np.arange(1056)
    far = route_latencies(fly.wires(), fly.routes(src, (src + 500) % 1056))
    assert far.max() == pytest.approx(2e-7 + 6e-7 + 1e-6)


def test_palmtree_and_absolute_differ_in_who_holds_the_link_only():
    palm, absolute = (
        dragonfly(5, 2, 1, 2, arrangement) for arrangement in (Arrangement.PALMTREE, Arrangement.ABSOLUTE)
    )
    wires = palm.wires()
    first = wires.head[(wires.tier == 2) & (wires.tail == palm.num_chips)] - palm.num_chips
    assert (first // 2).tolist() == [4, 3]  # group 0, router 0: groups -1 and -2 modulo 5
    wires = absolute.wires()
    first = wires.head[(wires.tier == 2) & (wires.tail == absolute.num_chips)] - absolute.num_chips
    assert (first // 2).tolist() == [1, 2]


@pytest.mark.parametrize(
    ("sizes", "problem"),
    [
        ((2, 1, 1, 0), "do not reach"),
        ((10, 4, 2, 2), "8 long links per group do not reach 9"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(sizes, problem):
    with pytest.raises(CommsError, match=problem):
        dragonfly(*sizes)


def test_one_group_needs_no_long_links():
    fly = dragonfly(1, 3, 2, 0)
    src, dst = all_pairs(6)
    assert np.diff(fly.routes(src, dst).offsets).max() == 3
