"""Trees of switches: routes against shortest paths, figures against loads, and what rails and planes do."""

import tracemalloc
from dataclasses import replace
from math import inf

import networkx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from comms.errors import CommsError
from comms.networks.fabrics.switch_tree import Tree
from comms.networks.groups import Lattice
from comms.networks.layers import Spread, Switch, Trunk, half_latencies
from comms.networks.links import Link
from comms.networks.topology import route_latencies

FEW = settings(max_examples=60)
PORT = Link(0.5e-6, 10e9)
CORE = Switch("core")


@st.composite
def trees(draw, spreads=tuple(Spread)):
    spread = draw(st.sampled_from(spreads))
    size, below, paths, trunks = 1, 1, 1, []
    for number in range(draw(st.integers(0, 3))):
        size *= draw(st.integers(2, 4)) if number else draw(st.integers(1, 4))
        group = size // (trunks[-1].size if trunks else 1) * below
        rails = draw(st.sampled_from([r for r in (1, 2, 4) if group % r == 0]))
        paths *= draw(st.integers(1, 3))
        link = Link(draw(st.integers(0, 3)) * 1e-6, draw(st.integers(1, 9)) * 1e9)
        to = Switch(f"layer {number + 1}", oversubscription=draw(st.sampled_from([1.0, 3.0])))
        trunks.append(Trunk(size, link, to, paths, rails, duplex=draw(st.booleans())))
        below = rails
    num_chips = size + draw(st.integers(1, 3 * size))
    switch = Switch("layer 0", oversubscription=draw(st.sampled_from([1.0, 2.0])))
    return Tree(num_chips, PORT, switch, tuple(trunks), draw(st.booleans()), spread)


def pairs_of(tree, data, count=12):
    chip = st.integers(0, tree.num_chips - 1)
    drawn = data.draw(st.lists(st.tuples(chip, chip), min_size=1, max_size=count))
    return tuple(np.array(column) for column in zip(*drawn, strict=True))


def graph_of(wires):
    graph = networkx.DiGraph()
    graph.add_edges_from(zip(wires.tail.tolist(), wires.head.tolist(), strict=True))
    return graph


def shares_of(tree, src, dst):
    """What each message gets where all load their wires alike: the least share on its way."""
    wires, routes = tree.wires(), tree.routes(src, dst)
    users = np.bincount(wires.shares[routes.wires], minlength=wires.num_wires)
    each = wires.bytes_per_s / np.maximum(users[wires.shares], 1)
    return np.array([each[routes.of(i)].min(initial=inf) for i in range(routes.num_messages)])


@FEW
@given(trees(), st.data())
def test_a_route_leads_from_wire_to_wire_by_a_shortest_path(tree, data):
    src, dst = pairs_of(tree, data)
    wires, routes = tree.wires(), tree.routes(src, dst)
    graph = graph_of(wires)
    for message, (start, end) in enumerate(zip(src, dst, strict=True)):
        way = routes.of(message)
        nodes = [start, *wires.head[way]]
        assert nodes[-1] == end
        assert wires.tail[way].tolist() == nodes[:-1]
        assert len(way) == networkx.shortest_path_length(graph, start, end)


@FEW
@given(trees())
def test_wires_are_as_many_as_counted_and_none_leads_to_itself(tree):
    wires = tree.wires()
    assert wires.num_wires == tree.num_wires
    assert set(wires.tail) | set(wires.head) == set(range(tree.num_nodes))
    assert (wires.tail != wires.head).all()
    assert (wires.bytes_per_s == wires.bytes_per_s[wires.shares]).all()
    assert set(wires.tier) == set(range(len(tree.tiers)))


@FEW
@given(trees(), st.data())
def test_a_message_takes_as_long_there_as_back(tree, data):
    src, dst = pairs_of(tree, data)
    wires = tree.wires()
    there, back = tree.routes(src, dst), tree.routes(dst, src)
    assert route_latencies(wires, there) == pytest.approx(route_latencies(wires, back), abs=1e-15)


@given(st.lists(st.floats(0, 1e-3), min_size=1, max_size=5))
def test_halves_of_latencies_add_up_to_the_figure_of_each_tier_that_is_slower_than_those_inside(totals):
    halves = half_latencies(totals)
    assert min(halves) >= 0
    for at in range(len(totals)):
        assert 2 * sum(halves[: at + 1]) == pytest.approx(max(totals[: at + 1]))


@FEW
@given(trees(spreads=(Spread.ADAPTIVE,)), st.data())
def test_what_is_cut_off_changes_no_route_between_those_left(tree, data):
    num_chips = data.draw(st.integers(1, tree.num_chips))
    part = tree.cut(num_chips)
    src, dst = pairs_of(part, data)
    whole_wires, part_wires = tree.wires(), part.wires()
    whole, left = tree.routes(src, dst), part.routes(src, dst)
    for message in range(len(src)):
        before, after = whole.of(message), left.of(message)
        assert whole_wires.latency_s[before].tolist() == part_wires.latency_s[after].tolist()
    assert part.cut(num_chips) == part
    assert part.num_nodes <= tree.num_nodes


@FEW
@given(trees(), st.data())
def test_chips_reach_the_switches_above_them_and_are_reached(tree, data):
    chips = np.array(data.draw(st.lists(st.integers(0, tree.num_chips - 1), min_size=1, max_size=5)))
    switch = tree.switch_over(chips)
    over = np.full(len(chips), switch)
    wires, graph = tree.wires(), graph_of(tree.wires())
    for there, (src, dst) in ((True, (chips, over)), (False, (over, chips))):
        routes = tree.routes(src, dst)
        for message, chip in enumerate(chips):
            way = routes.of(message)
            assert (wires.head[way[-1]] if there else wires.tail[way[0]]) == switch
            ends = (chip, switch) if there else (switch, chip)
            assert len(way) == networkx.shortest_path_length(graph, *ends)
            assert (wires.head[way[:-1]] == wires.tail[way[1:]]).all()


@FEW
@given(trees(spreads=(Spread.HASHED, Spread.BY_TARGET)))
def test_a_chip_reaches_every_plane_over_all_chips(tree):
    top = tree.switches(len(tree.trunks))
    routes = tree.routes(np.zeros(len(top), dtype=np.int64), top)
    assert tree.wires().head[routes.wires[routes.offsets[1:] - 1]].tolist() == top.tolist()


def leaf_spine(spread=Spread.ADAPTIVE, rails=1, **spine):
    trunk = Trunk(8, Link(1e-6, 20e9), Switch("spine"), paths=4, rails=rails)
    return Tree(32, PORT, Switch("leaf"), (replace(trunk, **spine),), spread=spread)


def test_adaptive_paths_are_one_pipe_and_others_are_wires_of_their_own():
    adaptive, hashed = leaf_spine().wires(), leaf_spine(Spread.HASHED).wires()
    assert adaptive.bytes_per_s[64:].tolist() == [80e9] * 8
    assert hashed.bytes_per_s[64:].tolist() == [20e9] * 32


def test_hashed_messages_use_all_paths_and_always_the_same_one_for_a_pair():
    tree = leaf_spine(Spread.HASHED)
    src, dst = (column.ravel() for column in np.meshgrid(np.arange(8), np.arange(8, 32)))
    first, again = tree.routes(src, dst), tree.routes(src[::-1], dst[::-1])
    ups = first.wires[first.offsets[:-1] + 1]
    assert (again.wires[again.offsets[:-1] + 1] == ups[::-1]).all()
    assert np.bincount(ups - 64, minlength=4)[:4].min() > len(ups) / 8


def test_by_target_a_shift_of_all_chips_loads_every_path_alike():
    tree = Tree(32, PORT, Switch("leaf"), (Trunk(8, PORT, CORE, paths=8),), spread=Spread.BY_TARGET)
    chips = np.arange(32)
    assert shares_of(tree, chips, (chips + 8) % 32).tolist() == [10e9] * 32


def test_on_one_rail_a_message_stays_under_its_leaf_and_else_it_passes_the_spine():
    tree = leaf_spine(rails=2)
    routes = tree.routes(np.array([0, 0, 0, 0]), np.array([2, 6, 1, 10]))
    assert np.diff(routes.offsets).tolist() == [2, 2, 4, 4]
    assert len(tree.switches(0)) == 8


def test_rails_of_shared_cards_follow_the_cards():
    card = Trunk(2, Link(0, 5e9), Switch("leaf"))
    tree = Tree(16, PORT, Switch("host"), (card, Trunk(8, PORT, CORE, rails=2)))
    routes = tree.routes(np.array([0, 0, 0]), np.array([1, 5, 2]))  # same card, same rail, other rail
    assert np.diff(routes.offsets).tolist() == [2, 4, 6]


@pytest.mark.parametrize("spread", Spread)
def test_a_chip_alone_gets_the_rate_of_its_port(spread):
    tree = leaf_spine(spread)
    assert shares_of(tree, np.array([0, 9]), np.array([31, 1])).tolist() == [10e9, 10e9]
    assert tree.link == Link(2 * (0.5e-6 + 1e-6), 10e9)


def test_four_to_one_oversubscription_leaves_a_quarter_when_all_leave_their_leaf_at_once():
    tree = leaf_spine(paths=1)  # 8 chips of 10 GB/s behind 20 GB/s
    chips = np.arange(32)
    assert shares_of(tree, chips, (chips + 8) % 32).tolist() == [2.5e9] * 32
    assert shares_of(tree, chips, chips ^ 1).tolist() == [10e9] * 32
    assert tree.loaded_link.bytes_per_s == 2.5e9
    crossbar = Tree(32, PORT, Switch(oversubscription=4.0))
    assert shares_of(crossbar, chips, chips ^ 1).tolist() == [2.5e9] * 32
    assert (crossbar.link.bytes_per_s, crossbar.loaded_link.bytes_per_s) == (10e9, 2.5e9)


@pytest.mark.parametrize("spread", Spread)
def test_subgroups_that_sit_unevenly_have_what_the_fullest_switch_leaves_each(spread):
    tree = leaf_spine(spread, paths=1, to=Switch("spine", reduces=True))  # 20 GB/s from each leaf
    listed = tree.level_between(range(6, 16), 2, 5)  # two under one leaf, eight under the other
    assert (listed.tier, listed.fanout, listed.latency_s) == ("spine", 5, 3e-6)
    assert (listed.bytes_per_s, listed.pool_bytes_per_s) == (10e9, 2 * 20e9 / 8)
    assert not listed.reduces  # the leaves do not
    assert tree.level_between((0, 8, 9), 1, 3).pool_bytes_per_s == 20e9 / 2
    assert tree.level_between(range(16), 8, 2).reduces  # whole leaves, whose switches have nothing to add
    every_other = tree.level_between(Lattice(((2, 5),)), 1, 5)  # the chips between are busy too
    assert (every_other.bytes_per_s, every_other.pool_bytes_per_s) == (10e9, 20e9 / 8)


def test_subgroups_that_sit_unevenly_on_half_duplex_ports_have_half_and_share_it():
    level = replace(leaf_spine(), duplex=False).level_between(range(10), 2, 5)
    assert (level.bytes_per_s, level.pool_bytes_per_s, level.shared) == (5e9, 10e9, True)


def test_both_directions_of_half_duplex_wires_share_one_rate():
    tree = Tree(4, PORT, duplex=False)
    assert shares_of(tree, np.array([0, 1]), np.array([1, 0])).tolist() == [5e9, 5e9]
    assert shares_of(tree, np.array([0]), np.array([1])).tolist() == [10e9]
    assert tree.loaded_link.bytes_per_s == 5e9


def test_a_switch_that_forwards_whole_packets_says_so_on_the_wires_into_it():
    tree = Tree(4, PORT, Switch(forward_nbytes=4096), (Trunk(2, PORT, Switch("core")),))
    wires = tree.wires()
    into_lower = (wires.head >= 4) & (wires.head < 6)
    assert (wires.forward_nbytes == np.where(into_lower, 4096, 0)).all()


@FEW
@given(st.permutations(range(4)), st.permutations(range(8)), st.data())
def test_hosts_of_equal_place_can_change_names(pods, places, data):
    """Leaves may be swapped, and the places under one leaf: every message gets what it got before."""
    tree = leaf_spine(paths=1)
    renamed = np.array([pods[chip // 8] * 8 + places[chip % 8] for chip in range(32)])
    src, dst = pairs_of(tree, data, count=40)
    assert shares_of(tree, src, dst).tolist() == shares_of(tree, renamed[src], renamed[dst]).tolist()


def test_a_million_chips_need_no_tables():
    trunks = (Trunk(32, Link(0, 1e11), Switch("spine")), Trunk(2**14, Link(0, 1e12), CORE, paths=8))
    tracemalloc.start()
    tree = Tree(2**20, PORT, Switch("leaf"), trunks)
    tree.routes(np.arange(1000), np.arange(1000)[::-1] * 1000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2e6
    assert tree.num_wires == 2 * (2**20 + 2**15 + 2**6)


@pytest.mark.parametrize(
    ("num_chips", "trunks", "problem"),
    [
        (0, (), "0 chips"),
        (8, (Trunk(8, PORT),), "all below it"),
        (16, (Trunk(4, PORT), Trunk(6, PORT)), "not whole groups of 4"),
        (16, (Trunk(4, PORT, rails=3),), "do not spread over 3 rails"),
        (16, (Trunk(2, PORT, paths=2), Trunk(4, PORT, paths=3)), "do not spread over the 2 planes"),
    ],
)
def test_a_tree_that_cannot_be_is_refused(num_chips, trunks, problem):
    with pytest.raises(CommsError, match=problem):
        Tree(num_chips, PORT, trunks=trunks, spread=Spread.HASHED)


def test_chips_that_are_not_there_are_refused():
    with pytest.raises(CommsError, match="nodes are 0 to 4"):
        Tree(4, PORT).routes(np.array([0]), np.array([5]))


def test_switches_of_different_planes_have_no_route():
    tree = leaf_spine(Spread.HASHED)
    spine = tree.switches(1)
    with pytest.raises(CommsError, match="different planes"):
        tree.routes(spine[:1], spine[1:2])
