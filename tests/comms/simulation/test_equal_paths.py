"""Equal paths: a message uses all of them, so k that share nothing carry it k times as fast."""

from dataclasses import replace
from itertools import combinations, pairwise, permutations

import networkx as nx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from comms.collectives.schedule import Channel, Op, Pattern, Round, Schedule
from comms.networks.fabrics.edge_list import Edge, EdgeList, Rerouted
from comms.networks.links import Link
from comms.networks.network import Network, Tier, TierKind, switched
from comms.networks.paths import EXACT_NODES, MOST_WAYS
from comms.selection.collective import estimate
from comms.selection.collective import simulate as move
from comms.simulation.full import CollectiveJob, simulate

LINK = Link(1e-6, 1e9)
NBYTES = 1e9
PAIR = np.array([0]), np.array([1])


def seconds(topology, pairs=((0, 1),)):
    """All messages at once, from chip to chip."""
    src, dst = (np.array(ends) for ends in zip(*pairs, strict=True))
    zero, one = np.zeros(len(src), dtype=np.int64), np.ones(len(src), dtype=np.int64)
    channel = Channel(((Round(Pattern(src, dst), zero, one, reduces=False),),), at_once=True)
    schedule = Schedule(Op.BROADCAST, "messages", topology.num_chips, 1, 1.0, (channel,))
    return simulate(topology, [CollectiveJob(schedule, np.arange(topology.num_chips), NBYTES)]).seconds[0]


def relays(count, link=LINK):
    """Chips 0 and 1, and between them switches that differ: each has one more chip of its own."""
    edges = [Edge(end, f"switch {k}", link) for k in range(count) for end in (0, 1)]
    edges += [Edge(2 + k, f"switch {k}", LINK) for k in range(count)]
    return EdgeList(2 + count, tuple(edges), tuple(f"switch {k}" for k in range(count)))


@pytest.mark.parametrize("count", [1, 2, 3, 4, 8, 16])
def test_k_equal_paths_carry_k_times_as_much(count):
    assert seconds(relays(count)) == pytest.approx(2 * LINK.latency_s + NBYTES / (count * LINK.bytes_per_s))


def test_no_more_than_so_many_are_used():
    ways = relays(MOST_WAYS + 3).ways(*PAIR)
    assert ways.share.tolist() == [1 / MOST_WAYS] * MOST_WAYS


def test_what_paths_have_in_common_is_shared():
    narrow = tuple(f"plane {k}" for k in range(4))
    edges = [Edge(0, "leaf", Link(1e-6, 4e9)), Edge("end", 1, Link(1e-6, 4e9))]
    for number, plane in enumerate(narrow):
        edges += [Edge("leaf", plane, LINK), Edge(plane, "end", LINK), Edge(2 + number, plane, LINK)]
    assert seconds(EdgeList(6, tuple(edges), ("leaf", "end", *narrow))) == pytest.approx(4e-6 + NBYTES / 4e9)


def test_a_branch_with_more_paths_carries_no_more_than_its_first_wire_can():
    edges = [Edge(0, 2, LINK), Edge(2, 3, LINK), Edge(3, 1, LINK), Edge(0, 4, LINK)]
    edges += [Edge(4, 5, LINK), Edge(5, 1, LINK), Edge(4, 6, LINK), Edge(6, 1, LINK)]
    graph = EdgeList(7, tuple(edges))
    assert sorted(graph.ways(*PAIR).share) == pytest.approx([0.25, 0.25, 0.5])
    assert seconds(graph) == pytest.approx(3e-6 + NBYTES / 2e9)


@pytest.mark.parametrize("dims", [2, 3, 4])
def test_opposite_corners_of_a_hypercube_have_a_path_for_each_of_its_dims(dims):
    far = 2**dims - 1
    edges = tuple(Edge(a, b, LINK) for a, b in combinations(range(far + 1), 2) if (a ^ b).bit_count() == 1)
    took = seconds(EdgeList(far + 1, edges), [(0, far)])
    assert took == pytest.approx(dims * 1e-6 + NBYTES / (dims * 1e9), rel=0.35 if dims == 4 else 1e-9)


def test_a_ring_of_four_sends_across_both_ways():
    ring = EdgeList(4, tuple(Edge(k, (k + 1) % 4, LINK) for k in range(4)))
    assert seconds(ring, [(0, 2)]) == pytest.approx(2e-6 + NBYTES / 2e9)
    assert seconds(ring, [(0, 2), (2, 0)]) == pytest.approx(2e-6 + NBYTES / 2e9)
    everyone = [(k, (k + 2) % 4) for k in range(4)]
    assert seconds(ring, everyone) == pytest.approx(2e-6 + NBYTES / 1e9), "each wire carries two halves"


def test_switches_of_unlike_rates_add_up_too():
    planes = [(f"plane {k}", Link(1e-6, rate)) for k, rate in enumerate((1e9, 2e9, 5e8))]
    edges = tuple(Edge(chip, name, link) for name, link in planes for chip in range(4))
    assert seconds(EdgeList(4, edges, tuple(name for name, _ in planes))) == pytest.approx(
        2e-6 + NBYTES / 3.5e9
    )


def test_paths_that_are_longer_or_slower_are_left_alone():
    slow = EdgeList(2, (Edge(0, 1, LINK), Edge(0, 1, Link(2e-6, 1e9))))
    assert seconds(slow) == pytest.approx(1e-6 + NBYTES / 1e9)
    direct = EdgeList(3, (Edge(0, 1, LINK), Edge(0, 2, Link(5e-7, 1e9)), Edge(2, 1, Link(5e-7, 1e9))))
    assert seconds(direct) == pytest.approx(1e-6 + NBYTES / 1e9)


def test_of_several_paths_those_that_are_left_carry_the_rest():
    graph = relays(4)
    wires = graph.wires()
    first = [w for w in range(wires.num_wires) if wires.tail[w] == 0]
    assert seconds(Rerouted(graph, dead=(first[1],))) == pytest.approx(2e-6 + NBYTES / 3e9)
    left = Rerouted(graph, dead=tuple(first[:3]))
    assert left.ways(*PAIR).share.tolist() == [1.0]


def test_copies_of_a_fabric_have_the_same_paths():
    inside = Tier("board", TierKind.SCALE_UP, 5, relays(3))
    network = Network((inside, switched("switch", 10, Link(1e-5, 1e8), TierKind.SCALE_OUT)))
    topology = network.topology()
    for pair in ((0, 1), (5, 6)):
        assert seconds(topology, [pair]) == pytest.approx(2e-6 + NBYTES / 3e9)
    assert seconds(topology, [(0, 5)]) == pytest.approx(1e-5 + NBYTES / 1e8)


def test_a_collective_over_equal_switches_takes_what_one_wide_one_does():
    def network(edges, *switches):
        shape = EdgeList(8, tuple(edges), switches)
        return Network((Tier("scale-up", TierKind.SCALE_UP, 8, shape),))

    four = [f"s{k}" for k in range(4)]
    planes = network((Edge(chip, s, LINK) for s in four for chip in range(8)), *four)
    hub = network((Edge(chip, "s", Link(1e-6, 4e9)) for chip in range(8)), "s")
    for op in ("all_reduce", "all_to_all", "barrier"):
        assert move(op, NBYTES, planes).seconds == pytest.approx(move(op, NBYTES, hub).seconds)
        assert estimate(op, NBYTES, planes).seconds == pytest.approx(estimate(op, NBYTES, hub).seconds)


def test_what_a_chip_has_of_a_shape_counts_all_paths():
    ring = EdgeList(4, tuple(Edge(k, (k + 1) % 4, LINK) for k in range(4)))
    for link in (ring.link, ring.loaded_link):
        assert (link.latency_s, link.bytes_per_s) == pytest.approx((2e-6, 1e9))
    far = EdgeList(2, tuple(Edge(end, f"s{k}", LINK) for k in range(3) for end in (0, 1)), ("s0", "s1", "s2"))
    assert (far.link.latency_s, far.link.bytes_per_s) == pytest.approx((2e-6, 3e9))


@st.composite
def graphs(draw):
    """Chips and switches, with ties of latency and rate."""
    num_chips, num_switches = draw(st.integers(2, 5)), draw(st.integers(0, 3))
    nodes = num_chips + num_switches
    pairs = [(draw(st.integers(0, node - 1)), node) for node in range(1, nodes)]
    pairs += draw(st.lists(st.tuples(*[st.integers(0, nodes - 1)] * 2), max_size=9))
    rates = st.sampled_from([1e9, 2e9])
    edges = tuple(Edge(a, b, Link(1e-6, draw(rates))) for a, b in pairs if a != b)
    return EdgeList(num_chips, edges, tuple(f"switch {k}" for k in range(num_switches)))


def best_flow(graph, source, target):
    """Of a pair alone: the maximum flow over its paths of the fewest wires (all have one latency here)."""
    wires, passes = graph.wires(), nx.DiGraph()
    for tail, head, rate in zip(
        wires.tail.tolist(), wires.head.tolist(), wires.bytes_per_s.tolist(), strict=True
    ):
        passes.add_edge(tail, head, capacity=rate)
    best = nx.DiGraph()
    for path in nx.all_shortest_paths(passes, source, target):
        best.add_edges_from((a, b, passes[a][b]) for a, b in pairwise(path))
    return nx.maximum_flow_value(best, source, target), nx.maximum_flow_value(passes, source, target)


@given(graphs())
@settings(max_examples=80)
def test_a_pair_has_all_that_its_shortest_paths_can_carry_and_no_more_than_a_cut(graph):
    wires = graph.wires()
    for pair in permutations(range(graph.num_chips), 2):
        ways = graph.ways(*(np.array([end]) for end in pair))
        load = np.bincount(ways.routes.wires, weights=np.repeat(ways.share, np.diff(ways.routes.offsets)))
        rate = 1 / (load / wires.bytes_per_s[: len(load)]).max()
        over_the_best, over_all = best_flow(graph, *pair)
        assert ways.share.sum() == pytest.approx(1) and rate == pytest.approx(over_the_best)
        assert rate <= over_all * (1 + 1e-9)


@given(graphs(), st.data())
@settings(max_examples=60)
def test_a_wider_link_or_one_more_beside_it_makes_no_pair_slower(graph, data):
    at = data.draw(st.integers(0, len(graph.edges) - 1))
    edge = graph.edges[at]
    wider = replace(edge, link=Link(edge.link.latency_s, edge.link.bytes_per_s * data.draw(st.floats(1, 9))))
    for edges in ((*graph.edges[:at], wider, *graph.edges[at + 1 :]), (*graph.edges, edge)):
        better = replace(graph, edges=edges)
        for pair in permutations(range(graph.num_chips), 2):
            assert seconds(better, [pair]) <= seconds(graph, [pair]) * (1 + 1e-9)


@given(st.lists(st.tuples(*[st.sampled_from([1e9, 3e9, 7e9, 2e10])] * 2), min_size=1, max_size=MOST_WAYS + 4))
@settings(max_examples=60)
def test_planes_that_share_nothing_carry_in_proportion_to_their_rates(planes):
    edges = [
        Edge(end, f"s{k}", Link(1e-6, rate)) for k, pair in enumerate(planes) for end, rate in enumerate(pair)
    ]
    edges += [Edge(2 + k, f"s{k}", LINK) for k in range(len(planes))]  # so that no two are alike
    graph = EdgeList(2 + len(planes), tuple(edges), tuple(f"s{k}" for k in range(len(planes))))
    best = sorted((min(pair) for pair in planes), reverse=True)[:MOST_WAYS]
    shares = sorted(graph.ways(*PAIR).share.tolist(), reverse=True)
    assert shares == pytest.approx([rate / sum(best) for rate in best])
    assert seconds(graph) == pytest.approx(2e-6 + NBYTES / sum(best))


def test_a_way_that_crosses_two_others_takes_nothing_from_them():
    pairs = [(0, 2), (0, 3), (2, 4), (3, 5), (4, 1), (5, 1)]
    apart = EdgeList(6, tuple(Edge(a, b, LINK) for a, b in pairs))
    crossed = EdgeList(6, tuple(Edge(a, b, LINK) for a, b in [*pairs, (2, 5)]))
    assert seconds(crossed) == pytest.approx(seconds(apart)) == pytest.approx(3e-6 + NBYTES / 2e9)


def test_where_nodes_are_too_many_for_all_that_wires_can_carry_it_is_no_less_than_the_widest_path():
    pairs = [(0, 2), (0, 3), (2, 4), (3, 5), (4, 1), (5, 1), (2, 5)]
    tail = [(k, k + 1) for k in range(5, 5 + EXACT_NODES)]
    wide = Link(1e-6, 9e9)
    edges = [Edge(a, b, wide if (a, b) in ((0, 2), (2, 4), (4, 1)) else LINK) for a, b in [*pairs, *tail]]
    graph = EdgeList(6 + EXACT_NODES, tuple(edges))
    assert 1e-6 + NBYTES / 1e10 <= seconds(graph) <= (3e-6 + NBYTES / 9e9) * (1 + 1e-9)
