"""Conditions on networks small enough to see what each of them should do."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from comms.collectives.schedule import Channel, Op, Pattern, PieceOrder, Round, Schedule
from comms.errors import CommsError
from comms.networks.conditions import (
    HEALTHY,
    Background,
    Between,
    ChipFault,
    Described,
    Flaps,
    Jitter,
    LinkFault,
    Reach,
    resolve,
)
from comms.networks.fabrics.edge_list import Duplex, Edge, EdgeList
from comms.networks.fabrics.switch_tree import Tree
from comms.networks.fabrics.torus_mesh import FullMesh, Torus
from comms.networks.layers import Spread, Switch, Trunk
from comms.networks.links import Link
from comms.networks.network import Network, Tier, TierKind, switched
from comms.networks.topology import Change
from comms.simulation.compiled import CollectiveJob
from comms.simulation.full import simulate

LINK = Link(1e-6, 10e9)
RING = Torus((6,), (LINK,))
HOSTS = Network(
    (
        switched("fast", 4, Link(1e-6, 100e9), TierKind.SCALE_UP),
        switched("net", 16, Link(5e-6, 10e9), TierKind.SCALE_OUT),
    )
).topology()


def shaped(name, kind, topology):
    """A tier of any topology."""
    return Tier(name, kind, topology.num_chips, topology)


def on(topology, *links, **others):
    return resolve(Described(links=links, **others), topology)


def down(which):
    return LinkFault(which, 0.0, where="c.yaml:9")


def message(topology, src, dst, nbytes=1e6):
    """Seconds of one message."""
    pattern = Pattern(np.array([0]), np.array([1]))
    whole = Round(pattern, np.zeros(1, dtype=np.int64), np.ones(1, dtype=np.int64), False)
    schedule = Schedule(Op.BROADCAST, "test", 2, 1, 1.0, (Channel(((whole,),), 1, PieceOrder.SERIAL),), 0)
    return lambda conditions: simulate(
        topology, [CollectiveJob(schedule, np.array([src, dst]), nbytes)], conditions
    ).seconds[0]


def hops(topology, src, dst):
    return len(topology.routes(np.array([src]), np.array([dst])).wires)


def test_nothing_described_is_nothing_changed():
    found = resolve(HEALTHY, RING)
    assert found.topology is RING
    assert (found.conditions.factors, found.conditions.changes) == ({}, ())
    assert (found.background, found.work_factors, HEALTHY.is_healthy) == ((), {}, True)


def test_a_slow_link_is_slow_both_ways_and_only_there():
    found = on(RING, LinkFault(Between(2, 3), 0.5))
    wires = RING.wires()
    ends = {(int(wires.tail[wire]), int(wires.head[wire])) for wire in found.conditions.factors}
    assert ends == {(2, 3), (3, 2)}
    assert set(found.conditions.factors.values()) == {0.5}
    assert message(RING, 2, 3)(found.conditions) == pytest.approx(1e-6 + 1e6 / 5e9)
    assert message(RING, 3, 4)(found.conditions) == pytest.approx(1e-6 + 1e6 / 10e9)


def test_one_way_is_one_way():
    found = on(RING, LinkFault(Between(2, 3, both_ways=False), 0.5))
    assert message(RING, 3, 2)(found.conditions) == pytest.approx(1e-6 + 1e6 / 10e9)


def test_two_faults_of_one_link_multiply():
    found = on(RING, LinkFault(Between(2, 3), 0.5), LinkFault(Between(2, 3), 0.5))
    assert set(found.conditions.factors.values()) == {0.25}


def test_the_two_directions_of_a_shared_medium_slow_down_once():
    topology = FullMesh(3, LINK, half_duplex=True)
    found = on(topology, LinkFault(Between(0, 1), 0.5))
    assert list(found.conditions.factors.values()) == [0.5]
    assert message(topology, 1, 0)(found.conditions) == pytest.approx(1e-6 + 1e6 / 5e9)


def test_around_a_dead_link_messages_take_the_long_way():
    found = on(RING, down(Between(2, 3)))
    assert hops(found.topology, 2, 3) == 5
    assert hops(found.topology, 0, 1) == 1
    assert found.topology.wires().num_wires == RING.wires().num_wires - 2


def test_other_faults_keep_their_links_when_dead_ones_are_gone():
    found = on(RING, down(Between(0, 1)), LinkFault(Between(4, 5), 0.5))
    wires = found.topology.wires()
    ends = {(int(wires.tail[wire]), int(wires.head[wire])) for wire in found.conditions.factors}
    assert ends == {(4, 5), (5, 4)}
    assert message(found.topology, 0, 1)(found.conditions) == pytest.approx(5e-6 + 1e6 / 5e9)


def test_a_chip_without_links_is_named():
    with pytest.raises(CommsError, match="chip 2 cut off") as error:
        on(RING, down(Between(1, 2)), down(Between(2, 3)))
    assert error.value.hint


def test_a_half_of_the_chips_cut_off_is_named():
    with pytest.raises(CommsError, match="chips 1, 2 cut off"):
        on(RING, down(Between(0, 1)), down(Between(2, 3)))
    with pytest.raises(CommsError, match="chips 0, 1 cut off"):  # chip 0 is among the few
        on(RING, down(Between(5, 0)), down(Between(1, 2)))


def test_a_dead_card_sends_through_a_neighbour():
    found = on(HOSTS, down(Reach((1,), "net")))
    assert hops(found.topology, 1, 8) == 4  # two to a neighbour, two from there
    assert hops(found.topology, 0, 8) == 2
    assert hops(found.topology, 1, 2) == 2


def test_chips_that_pass_nothing_on_are_cut_off_instead():
    edges = [Edge(chip, "a", LINK) for chip in range(3)] + [Edge(chip, "b", LINK) for chip in (1, 2)]
    graph = EdgeList(3, tuple(edges), ("a", "b"), through_chips=False)
    to_a = down(Reach((1,), "link", path=0))
    with pytest.raises(CommsError, match="chip 0 cut off"):
        on(graph, down(Reach((0,), "link")))
    with pytest.raises(CommsError, match="chip 1 cut off"):  # chip 2 is joined to both switches
        on(graph, to_a)
    relays = on(replace(graph, through_chips=True), to_a).topology
    assert hops(relays, 0, 1) == 4


def spine(paths, spread):
    top = Switch("spine")
    return Tree(8, Link(1e-6, 10e9), Switch("leaf"), (Trunk(4, Link(1e-6, 10e9), top, paths),), spread=spread)


def test_a_dead_path_to_the_spine_leaves_the_others():
    tree = spine(2, Spread.BY_TARGET)
    routes = tree.routes(np.zeros(2, dtype=np.int64), np.array([4, 5]))
    assert routes.of(0)[1] != routes.of(1)[1]
    found = on(tree, down(Reach((0,), "spine", path=0)))
    again = found.topology.routes(np.zeros(2, dtype=np.int64), np.array([4, 5]))
    assert [len(again.of(i)) for i in range(2)] == [4, 4]
    assert again.of(0)[1] == again.of(1)[1]
    with pytest.raises(CommsError, match="chips 4, 5, 6, 7 cut off"):
        on(tree, down(Reach((0,), "spine")))
    with pytest.raises(CommsError, match="no path 2 of 2"):
        on(tree, down(Reach((0,), "spine", path=2)))


def test_what_a_chip_shares_is_found_on_its_way_out():
    tree = spine(1, Spread.ADAPTIVE)
    found = on(tree, LinkFault(Reach((6,), "spine"), 0.5))
    wires = tree.wires()
    assert len(found.conditions.factors) == 2
    assert {tree.tiers[wires.tier[wire]] for wire in found.conditions.factors} == {"spine"}
    assert message(tree, 0, 4)(found.conditions) == pytest.approx(4e-6 + 1e6 / 5e9)
    assert message(tree, 4, 5)(found.conditions) == pytest.approx(2e-6 + 1e6 / 10e9)


def test_a_flapping_link_makes_messages_wait():
    flaps = Flaps(1e-3, 2e-3)
    found = on(RING, LinkFault(Between(2, 3, both_ways=False), flaps=flaps))
    assert found.conditions.changes[:2] == (
        Change(0.0, found.conditions.changes[0].wire, 0.0),
        Change(1e-3, found.conditions.changes[0].wire, 1.0),
    )
    sent = 1e6 / 10e9
    assert message(RING, 2, 3)(found.conditions) == pytest.approx(1e-3 + 1e-6 + sent)
    long = message(RING, 2, 3, nbytes=15e6)(found.conditions)
    assert long == pytest.approx(1.5e-3 + 1e-6 + 2e-3)  # two outages


def test_after_an_outage_a_slow_link_is_slow_again():
    slow = LinkFault(Between(2, 3), 0.5)
    found = on(RING, slow, LinkFault(Between(2, 3), flaps=Flaps(1e-3, 2e-3)))
    assert {change.factor for change in found.conditions.changes} == {0.0, 0.5}


def test_flapping_ends_with_the_horizon():
    described = Described(links=(LinkFault(Between(2, 3, both_ways=False), flaps=Flaps(1e-3, 1e-2)),))
    assert len(resolve(described, RING, horizon_s=0.1).conditions.changes) == 20


def test_late_and_slow_chips():
    faults = (ChipFault((1, 2), slowdown=1.5, delay_s=2e-6), ChipFault((2,), slowdown=2.0, delay_s=1e-6))
    found = on(RING, chips=faults)
    assert found.work_factors == {1: 1.5, 2: 3.0}
    assert found.conditions.overhead_s == pytest.approx({1: 2e-6, 2: 3e-6})
    assert message(RING, 2, 3)(found.conditions) == pytest.approx(4e-6 + 1e6 / 10e9)


def test_jitter_is_bounded_drawn_once_and_follows_the_seed():
    found = [on(RING, jitter=Jitter(0.05, 1e-6), seed=seed).conditions for seed in (1, 1, 2)]
    assert found[0].factors == found[1].factors != found[2].factors
    assert all(0.95 <= factor <= 1.05 for factor in found[0].factors.values())
    assert len(set(found[0].factors.values())) == RING.wires().num_wires
    assert (found[0].noise_s, found[0].seed) == (1e-6, 1)


def test_a_dead_link_does_not_change_the_jitter_of_others():
    whole = on(RING, jitter=Jitter(0.05)).conditions
    found = on(RING, down(Between(0, 1)), jitter=Jitter(0.05))
    kept = found.topology.kept
    assert {int(kept[wire]): factor for wire, factor in found.conditions.factors.items()} == {
        wire: whole.factors[wire] for wire in kept.tolist()
    }


def test_background_is_handed_on():
    job = Background(Op.ALL_TO_ALL, (0, 1, 2), 1e6)
    assert on(RING, background=(job,)).background == (job,)


@pytest.mark.parametrize(
    ("described", "problem"),
    [
        (Described(links=(down(Between(0, 3)),)), "no link from chip 0 to chip 3"),
        (Described(links=(down(Between(0, 9)),)), "chip 9 is named, but there are 6 chips"),
        (Described(links=(down(Reach((0,), "nvlink")),)), "no tier 'nvlink'"),
        (Described(links=(down(Reach((), "x")),)), "no chip"),
        (Described(chips=(ChipFault((6,), 2.0, where="c.yaml:3"),)), "chip 6 is named"),
        (Described(background=(Background(Op.REDUCE, (0, 7), 1.0),)), "chip 7 is named"),
        (
            Described(links=(LinkFault(Between(0, 1), flaps=Flaps(1e-3, 1)),) * 2),
            "flaps in two ways",
        ),
    ],
)
def test_what_is_not_there_is_told(described, problem):
    with pytest.raises(CommsError, match=problem):
        resolve(described, RING)


def test_an_error_says_where_it_was_described():
    with pytest.raises(CommsError) as error:
        on(RING, down(Reach((0,), "nvlink")))
    assert (error.value.where, error.value.hint) == ("c.yaml:9", "tiers are x")


def test_a_tier_that_a_chip_never_crosses_is_told():
    two = Network((switched("a", 2, LINK, TierKind.SCALE_UP), shaped("b", TierKind.SCALE_OUT, RING)))
    topology = two.take(2).topology()
    with pytest.raises(CommsError, match="no tier 'b'"):
        on(topology, down(Reach((0,), "b")))
    alone = Network((Tier("a", TierKind.SCALE_UP, 6, two.tiers[1].shape),)).topology()
    assert on(alone, LinkFault(Reach((0,), "a"), 0.5)).conditions.factors


@pytest.mark.parametrize(
    "make",
    [
        lambda: LinkFault(Between(0, 1), 1.5),
        lambda: LinkFault(Between(0, 1), -0.1),
        lambda: Flaps(2.0, 1.0),
        lambda: Flaps(0.0, 1.0),
        lambda: Jitter(1.0),
        lambda: Jitter(0.1, -1.0),
    ],
)
def test_figures_that_cannot_be_are_refused(make):
    with pytest.raises(CommsError):
        make()


def test_half_duplex_edges_draw_one_jitter():
    graph = EdgeList(2, (Edge(0, 1, LINK, Duplex.HALF),))
    assert len(on(graph, jitter=Jitter(0.1)).conditions.factors) == 1


@settings(max_examples=40)
@given(
    st.sampled_from([RING, Torus((3, 4), (LINK,)), FullMesh(5, LINK), HOSTS]),
    st.data(),
)
def test_what_is_left_still_joins_all_chips_or_names_those_cut_off(topology, data):
    wires = topology.wires()
    between = [
        (int(a), int(b)) for a, b in zip(wires.tail, wires.head, strict=True) if a < b < topology.num_chips
    ]
    faults = (
        [down(Between(*pair)) for pair in data.draw(st.lists(st.sampled_from(between), max_size=4))]
        if (between)
        else [down(Reach((data.draw(st.integers(0, 15)),), "net"))]
    )
    try:
        left = on(topology, *faults).topology
    except CommsError as error:
        assert "cut off" in error.problem  # noqa: PT017
        return
    src, dst = np.divmod(np.arange(topology.num_chips**2), topology.num_chips)
    routes, now = left.routes(src, dst), left.wires()
    for message in range(len(src)):
        way = routes.of(message)
        nodes = [int(src[message]), *now.head[way].tolist()]
        assert now.tail[way].tolist() == nodes[:-1]
        assert nodes[-1] == dst[message]


def test_described_is_a_value():
    described = Described(links=(down(Between(0, 1)),))
    assert described == Described(links=(down(Between(0, 1)),))
    assert not described.is_healthy
    assert replace(HEALTHY, seed=3).is_healthy
