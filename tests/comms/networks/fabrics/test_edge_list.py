"""Networks edge by edge: best paths against every simple path, relabelling, bad input, dead and slow wires."""

import networkx as nx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from comms.errors import CommsError
from comms.networks.fabrics.dragonfly import Dragonfly
from comms.networks.fabrics.edge_list import Duplex, Edge, EdgeList, Rerouted
from comms.networks.fabrics.torus_mesh import FullMesh, Torus
from comms.networks.links import Link
from comms.networks.topology import ranges

LINK = Link(1e-6, 1e9)
RATES = (1e9, 2e9, 4e9)


def all_pairs(num_chips):
    return tuple(
        grid.ravel() for grid in np.meshgrid(np.arange(num_chips), np.arange(num_chips), indexing="ij")
    )


@st.composite
def graphs(draw, latencies=(0.0, 1e-6, 2e-6, 5e-6), most=5):
    """A random tree of chips and switches, and some edges more, all with ties of latency and rate."""
    num_chips, num_switches = draw(st.integers(1, most)), draw(st.integers(0, 3))
    num_nodes = num_chips + num_switches
    pairs = [(draw(st.integers(0, node - 1)), node) for node in range(1, num_nodes)]
    pairs += draw(
        st.lists(st.tuples(st.integers(0, num_nodes - 1), st.integers(0, num_nodes - 1)), max_size=9)
    )
    edges = tuple(
        Edge(a, b, Link(draw(st.sampled_from(latencies)), draw(st.sampled_from(RATES))))
        for a, b in pairs
        if a != b
    )
    return EdgeList(num_chips, edges, tuple(f"switch {i}" for i in range(num_switches)))


def best_by_brute_force(graph, src, dst):
    """(latency, hops, -width) of the best simple path, in whole microseconds."""
    wires = graph.wires()
    net = nx.MultiDiGraph()
    net.add_nodes_from(range(graph.num_nodes))
    for wire in range(wires.num_wires):
        net.add_edge(int(wires.tail[wire]), int(wires.head[wire]), key=wire)
    return min(
        (
            round(sum(wires.latency_s[w] for _, _, w in path) * 1e6),
            len(path),
            -min(wires.bytes_per_s[w] for _, _, w in path),
        )
        for path in nx.all_simple_edge_paths(net, src, dst)
    )


def measured(wires, path):
    return (round(wires.latency_s[path].sum() * 1e6), len(path), -wires.bytes_per_s[path].min())


def walk(wires, path):
    return [int(wires.tail[path[0]]), *wires.head[path].tolist()] if len(path) else []


@given(graphs())
@settings(max_examples=80)
def test_routes_are_the_quickest_then_shortest_then_widest_paths(graph):
    src, dst = all_pairs(graph.num_chips)
    routes, wires = graph.routes(src, dst), graph.wires()
    for i, (s, d) in enumerate(zip(src.tolist(), dst.tolist(), strict=True)):
        path = routes.of(i)
        if s == d:
            assert len(path) == 0
            continue
        assert walk(wires, path)[0] == s and walk(wires, path)[-1] == d
        assert (wires.tail[path[1:]] == wires.head[path[:-1]]).all()
        assert measured(wires, path) == best_by_brute_force(graph, s, d)


def redrawn(data, graph):
    """The same network: edges in another order, turned round, switches by other names and numbers."""
    names = data.draw(st.permutations([f"other {i}" for i in range(len(graph.switches))]))
    label = [*range(graph.num_chips), *names]
    turned = data.draw(st.lists(st.booleans(), min_size=len(graph.edges), max_size=len(graph.edges)))
    edges = [
        Edge(label[e.b], label[e.a], e.link) if turn else Edge(label[e.a], label[e.b], e.link)
        for e, turn in zip(graph.edges, turned, strict=True)
    ]
    return EdgeList(graph.num_chips, tuple(data.draw(st.permutations(edges))), tuple(sorted(names)))


@given(graphs(), st.data())
@settings(max_examples=120)
def test_the_same_network_has_the_same_wires_and_ways_however_it_is_written(graph, data):
    other = redrawn(data, graph)
    src, dst = all_pairs(graph.num_chips)
    here, there = graph.ways(src, dst), other.ways(src, dst)
    assert here.routes.wires.tolist() == there.routes.wires.tolist()
    assert here.share.tolist() == there.share.tolist() and here.message.tolist() == there.message.tolist()
    assert graph.routes(src, dst).wires.tolist() == other.routes(src, dst).wires.tolist()
    for column in ("latency_s", "bytes_per_s", "shares"):
        assert getattr(graph.wires(), column).tolist() == getattr(other.wires(), column).tolist()


@given(graphs(), st.sampled_from([1e-3, 0.5, 3.0, 1e6]))
@settings(max_examples=40)
def test_scaled_latencies_leave_the_paths_alone(graph, k):
    edges = tuple(Edge(e.a, e.b, Link(e.link.latency_s * k, e.link.bytes_per_s)) for e in graph.edges)
    src, dst = all_pairs(graph.num_chips)
    scaled = EdgeList(graph.num_chips, edges, graph.switches).routes(src, dst)
    assert scaled.wires.tolist() == graph.routes(src, dst).wires.tolist()


def test_routes_do_not_depend_on_what_was_asked_before():
    torus = Torus((4, 4), (LINK,))
    wires = torus.wires()
    edges = tuple(
        Edge(a, b, LINK, Duplex.ONE_WAY)
        for a, b in zip(wires.tail.tolist(), wires.head.tolist(), strict=True)
    )
    src, dst = all_pairs(16)
    at_once = EdgeList(16, edges).routes(src, dst)
    graph = EdgeList(16, edges)
    for i in np.random.default_rng(0).permutation(len(src)):
        assert graph.routes(src[i : i + 1], dst[i : i + 1]).wires.tolist() == at_once.of(i).tolist()


def test_equal_paths_share_the_load():
    spines = tuple(f"spine {k}" for k in range(4))
    leaves = ("leaf 0", "leaf 1")
    edges = [Edge(chip, leaves[chip // 32], LINK) for chip in range(64)]
    # Each spine has a neighbour of its own, so that no two are alike.
    edges += [Edge(leaf, spine, LINK) for leaf in leaves for spine in spines]
    edges += [Edge(spine, f"own {k}", LINK) for k, spine in enumerate(spines)]
    graph = EdgeList(64, tuple(edges), (*leaves, *spines, *(f"own {k}" for k in range(4))))
    src, dst = all_pairs(64)
    load = np.bincount(graph.routes(src, dst).wires, minlength=graph.wires().num_wires)[128:144]
    assert load.sum() == 2 * 2 * 32 * 32
    assert load.min() > 0.9 * 256 and load.max() < 1.1 * 256


def test_parallel_edges_and_switches_that_are_alike_carry_as_one_of_their_summed_rate():
    planes = tuple(f"plane {k}" for k in range(4))
    edges = [Edge(chip, plane, LINK) for chip in range(8) for plane in planes]
    hub = [Edge(chip, "plane 0", Link(LINK.latency_s, 4 * LINK.bytes_per_s)) for chip in range(8)]
    found, expected = EdgeList(8, tuple(edges), planes), EdgeList(8, tuple(hub), planes[:1])
    src, dst = all_pairs(8)
    assert found.routes(src, dst).wires.tolist() == expected.routes(src, dst).wires.tolist()
    assert found.wires().bytes_per_s.tolist() == expected.wires().bytes_per_s.tolist()
    parallel = EdgeList(2, (Edge(0, 1, LINK),) * 3 + (Edge(0, 1, Link(2e-6, 1e9)),))
    assert parallel.wires().bytes_per_s.tolist() == [3e9, 3e9, 1e9, 1e9]


@pytest.mark.parametrize("how", [Duplex.HALF, Duplex.ONE_WAY])
def test_half_duplex_edges_add_up_to_one_medium_and_one_way_ones_to_one_wire(how):
    wires = EdgeList(2, (Edge(0, 1, LINK, how), Edge(0, 1, LINK, how), Edge(1, 0, LINK))).wires()
    if how is Duplex.HALF:
        assert wires.bytes_per_s[wires.shares].tolist() == [1e9, 1e9, 2e9, 2e9]
        assert wires.shares.tolist() == [0, 1, 2, 2]
    else:
        assert wires.bytes_per_s.tolist() == [3e9, 1e9]


def test_chips_pass_messages_on_only_where_they_may():
    line = (Edge(0, 1, LINK), Edge(1, 2, LINK))
    assert len(EdgeList(3, line).routes(np.array([0]), np.array([2])).wires) == 2
    with pytest.raises(CommsError, match="no way from chip 0 to chip 2"):
        EdgeList(3, line, through_chips=False)
    slow = tuple(Edge(chip, "host", Link(9e-6, 1e9)) for chip in range(3))
    both = EdgeList(3, (*line, *slow), ("host",), through_chips=False)
    assert both.routes(np.array([0, 0]), np.array([1, 2])).wires.tolist() == [0, 2, 9]


def test_a_pair_that_meets_only_through_a_chip_that_passes_nothing_on_is_named():
    edges = (Edge(0, 1, LINK), Edge(0, 2, LINK))
    graph = EdgeList(3, edges, through_chips=False)
    with pytest.raises(CommsError, match="no way from node 1 to node 2"):
        graph.routes(np.array([1]), np.array([2]))


def test_half_duplex_edges_share_one_rate_and_one_way_edges_have_no_way_back():
    edges = (
        Edge(0, 1, LINK, Duplex.HALF),
        Edge(1, 2, LINK, Duplex.ONE_WAY),
        Edge(2, 0, LINK, back=Link(1e-6, 5e8)),
    )
    wires = EdgeList(3, edges).wires()
    assert wires.tail.tolist() == [0, 1, 0, 2, 1]
    assert wires.shares.tolist() == [0, 0, 2, 3, 4]
    assert wires.bytes_per_s.tolist() == [1e9, 1e9, 5e8, 1e9, 1e9]


@pytest.mark.parametrize(
    ("make", "problem", "where"),
    [
        (lambda: EdgeList(2, ()), "no way from chip 0 to chip 1", "network"),
        (
            lambda: EdgeList(4, (Edge(0, 1, LINK), Edge(2, 3, LINK))),
            "no way from chip 0 to chip 2",
            "network",
        ),
        (lambda: EdgeList(2, (Edge(0, 1, LINK, Duplex.ONE_WAY),)), "no way from chip 1 to chip 0", "network"),
        (lambda: EdgeList(2, (Edge(0, 1, LINK, Duplex.HALF, back=LINK),)), "no other rate back", "edge 0"),
        (lambda: EdgeList(1, ()).routes(np.array([0]), np.array([1])), "no node 1", "network"),
    ],
)
def test_graphs_that_make_no_sense_are_refused(make, problem, where):
    with pytest.raises(CommsError, match=problem) as error:
        make()
    assert where in error.value.where
    assert error.value.hint


@pytest.mark.parametrize("rate", [0.0, -1e9])
def test_rates_of_zero_or_less_are_refused(rate):
    with pytest.raises(ValueError, match="bytes_per_s > 0"):
        Edge(0, 1, Link(0.0, rate))


def test_one_chip_needs_no_edges():
    graph = EdgeList(1, ())
    assert graph.routes(np.array([0]), np.array([0])).wires.tolist() == []
    assert graph.wires().num_wires == 0


def damage(data, topology):
    wires = st.integers(0, topology.wires().num_wires - 1)
    dead = tuple(data.draw(st.lists(wires, max_size=3, unique=True)))
    return dead, data.draw(st.dictionaries(wires, st.sampled_from([0.5, 0.1]), max_size=3))


def can_reach(topology, dead):
    """Which chips reach which without the dead wires; through switches only where there are any."""
    whole, net = topology.wires(), nx.DiGraph()
    chips = range(topology.num_chips)
    net.add_nodes_from([*chips, *((chip, "in") for chip in chips)])
    for wire in range(whole.num_wires):
        head = int(whole.head[wire])
        if wire not in dead:
            net.add_edge(int(whole.tail[wire]), (head, "in") if head in chips else head)
    if topology.num_nodes == topology.num_chips:
        net.add_edges_from(((chip, "in"), chip) for chip in chips)
    return {
        chip: {end for end in chips if end == chip or nx.has_path(net, chip, (end, "in"))} for chip in chips
    }


SHAPES = (
    Torus((4, 3), (LINK,)),
    Torus((3, 3), (LINK,), (False,)),
    FullMesh(5, LINK),
    Torus((3, 3), (LINK,), one_way=True, num_networks=2, access=LINK),
    Dragonfly(3, 2, 2, 2, LINK, LINK, LINK),
)


@given(st.sampled_from(SHAPES), st.data())
@settings(max_examples=80)
def test_only_routes_over_dead_wires_change_and_none_crosses_one(topology, data):
    dead, slow = damage(data, topology)
    src, dst = all_pairs(topology.num_chips)
    if any(len(ends) < topology.num_chips for ends in can_reach(topology, dead).values()):
        with pytest.raises(CommsError, match="no way"):
            Rerouted(topology, dead, slow).routes(src, dst)
        return
    left = Rerouted(topology, dead, slow)
    before, after, wires = topology.routes(src, dst), left.routes(src, dst), left.wires()
    for i in range(len(src)):
        path = left.kept[after.of(i)].tolist()
        assert not set(path) & set(dead)
        if not set(before.of(i).tolist()) & set(dead):
            assert path == before.of(i).tolist()
        elif src[i] != dst[i]:
            assert walk(wires, after.of(i))[0] == src[i] and walk(wires, after.of(i))[-1] == dst[i]
    whole = topology.wires()
    factor = np.array([slow.get(wire, 1.0) for wire in left.kept.tolist()])
    assert wires.bytes_per_s == pytest.approx(whole.bytes_per_s[left.kept] * factor)
    assert wires.tail.tolist() == whole.tail[left.kept].tolist()


def test_a_ring_with_a_dead_wire_goes_the_other_way_round():
    ring = Torus((8,), (LINK,))
    left = Rerouted(ring, dead=(0,))
    path = left.routes(np.array([0]), np.array([1]))
    assert left.wires().head[path.wires].tolist() == [7, 6, 5, 4, 3, 2, 1]
    with pytest.raises(CommsError, match="no way from chip 0 to chip"):
        Rerouted(ring, dead=(0, 8))


def test_what_is_left_of_a_half_duplex_pair_has_the_rate_for_itself():
    mesh = FullMesh(3, LINK, half_duplex=True)
    wires = Rerouted(mesh, dead=(0,)).wires()
    assert wires.tail.tolist() == [0, 1, 1, 2, 2]
    assert wires.shares.tolist() == [0, 1, 2, 0, 2]


def test_ways_round_lead_through_chips_only_where_there_are_no_switches():
    assert Rerouted(Torus((4,), (LINK,))).through_chips
    assert not Rerouted(SHAPES[4]).through_chips
    assert Rerouted(Rerouted(EdgeList(2, (Edge(0, 1, LINK),)))).through_chips


def test_damage_may_come_in_steps():
    ring = Torus((6,), (LINK,))
    once = Rerouted(ring, dead=(0, 2))
    twice = Rerouted(Rerouted(ring, dead=(0,)), dead=(1,))
    src, dst = all_pairs(6)
    assert once.routes(src, dst).wires.tolist() == twice.routes(src, dst).wires.tolist()
    assert once.kept.tolist() == np.delete(np.arange(12), [0, 2]).tolist()


def test_smallest_latencies_are_those_of_dijkstra():
    graph = EdgeList(
        4, (Edge(0, 1, Link(1e-6, 1e9)), Edge(1, 2, Link(2e-6, 1e9)), Edge(2, 3, Link(4e-6, 1e9)))
    )
    rows = graph.paths.latencies(np.array([0, 3]))
    assert rows == pytest.approx(np.array([[0, 1, 3, 7], [7, 6, 4, 0]]) * 1e-6)


def test_ranges_are_laid_end_to_end():
    assert ranges(np.array([5, 0, 9]), np.array([2, 0, 3])).tolist() == [5, 6, 9, 10, 11]
