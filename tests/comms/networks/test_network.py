"""Links and networks: which tier two chips meet in, what is left of fewer chips, and how groups fold over tiers."""

from dataclasses import replace
from typing import ClassVar

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from comms.errors import CommsError
from comms.networks.fabrics.edge_list import Edge, EdgeList
from comms.networks.fabrics.switch_tree import Tree
from comms.networks.fabrics.torus_mesh import Torus
from comms.networks.groups import Lattice, mesh_group, num_members
from comms.networks.layers import Switch, Trunk
from comms.networks.links import PLAIN, Link
from comms.networks.network import UNBOUNDED, Network, Tier, TierKind, layered, switched
from comms.networks.topology import route_latencies

FEW = settings(max_examples=60)
SLOW = Link(1e-5, 1e9)
FABRIC = switched("fabric", 8, Link(2e-6, 300e9), TierKind.SCALE_UP)
SPINE = Trunk(32, Link(0.5e-6, 200e9), Switch("spine"))
CARDS = Tree(128, Link(1e-6, 64e9), Switch("leaf"), (Trunk(4, Link(1e-6, 50e9), Switch("leaf")), SPINE))


def shaped(name, kind, topology):
    """A tier of any topology."""
    return Tier(name, kind, topology.num_chips, topology)


def network(*sizes: int) -> Network:
    return Network(tuple(switched(f"tier {size}", size, SLOW, TierKind.SCALE_OUT) for size in sizes))


@st.composite
def networks(draw):
    factors = draw(st.lists(st.integers(2, 5), min_size=1, max_size=4))
    sizes = [factors[0]]
    for factor in factors[1:]:
        sizes.append(sizes[-1] * factor)
    return network(*sizes)


def pod() -> Network:
    """Hosts of 8 chips with two cards each, 4 hosts to a leaf, 4 leaves."""
    return Network((FABRIC, *layered(CARDS, TierKind.SCALE_OUT, inner=8)))


def test_a_message_takes_latency_plus_bytes_over_rate():
    assert Link(2e-6, 1e9).seconds(1000) == pytest.approx(3e-6)
    assert Link(2e-6, 1e9).seconds(0) == 2e-6


@pytest.mark.parametrize("figures", [(-1.0, 1.0), (0.0, 0.0), (0.0, -1.0)])
def test_a_link_without_a_rate_is_refused(figures):
    with pytest.raises(ValueError, match="a link needs"):
        Link(*figures)


@given(networks(), st.data())
def test_tier_for_is_the_innermost_with_all_chips_in_one_group(net, data):
    chips = data.draw(st.lists(st.integers(0, net.tiers[-1].size - 1), min_size=1, max_size=6))
    brute = next(t for t in net.tiers if len({chip // t.size for chip in chips}) == 1)
    assert net.tier_for(chips) == brute


def test_a_chip_outside_the_network_is_refused():
    with pytest.raises(CommsError, match="outside the network of 8 chips"):
        network(4, 8).tier_for([3, 8])
    with pytest.raises(CommsError, match="outside the network of 8 chips"):
        network(4, 8).levels([3, 8])
    with pytest.raises(CommsError, match="outside the network of 8 chips"):
        network(4, 8).levels(Lattice(((4, 3),)))


@given(networks(), st.data())
def test_a_part_of_a_network_keeps_the_tier_of_every_pair(net, data):
    num_chips = data.draw(st.integers(2, net.tiers[-1].size))
    pair = data.draw(st.lists(st.integers(0, num_chips - 1), min_size=2, max_size=2))
    part = net.take(num_chips)
    assert part.tiers[-1].size == num_chips
    assert part.tier_for(pair).name == net.tier_for(pair).name


def test_an_unbounded_network_ends_at_what_is_taken():
    net = network(8, UNBOUNDED)
    assert [tier.size for tier in net.take(1024).tiers] == [8, 1024]
    assert [tier.size for tier in net.take(4).tiers] == [4]
    assert net.tier_for([0, 10**9]).size == UNBOUNDED
    assert net.topology(1024).num_chips == 1024
    with pytest.raises(CommsError, match="any number of chips"):
        net.topology()


def test_a_network_cannot_give_more_chips_than_it_has():
    with pytest.raises(CommsError, match="9 chips do not fit"):
        network(4, 8).take(9)
    with pytest.raises(CommsError, match="0 chips do not fit"):
        network(4, 8).take(0)


def test_groups_that_do_not_nest_are_refused():
    with pytest.raises(CommsError, match="does not hold whole groups"):
        network(4, 6, 12)
    with pytest.raises(CommsError, match="does not hold whole groups"):
        network(8, 4)
    with pytest.raises(CommsError, match="at least one tier"):
        Network(())


def test_tiers_that_make_no_sense_are_refused():
    with pytest.raises(CommsError, match="one name"):
        Network((FABRIC, replace(FABRIC, size=16, shape=Tree(16, SLOW))))
    with pytest.raises(CommsError, match="cannot join 16"):
        replace(FABRIC, size=16)
    with pytest.raises(CommsError, match="no next tier"):
        Network((replace(FABRIC, part_of_next=True),))
    with pytest.raises(CommsError, match="not what tier 'tier 16' has"):
        Network((replace(FABRIC, part_of_next=True), network(16).tiers[0]))
    with pytest.raises(CommsError, match="no negative time"):
        replace(FABRIC, setup_s=-1.0)


def test_oversubscription_divides_the_loaded_rate_only():
    tier = switched("spine", 64, Link(1e-6, 40e9), TierKind.SCALE_OUT, oversubscription=4.0)
    assert tier.link == Link(1e-6, 40e9)
    assert tier.loaded_link == Link(1e-6, 10e9)
    assert tier.protocols == (PLAIN,)


def test_one_chip_alone_has_the_whole_card_and_four_at_once_a_quarter_each():
    leaf, spine = pod().tiers[1:]
    assert (leaf.name, leaf.size, leaf.part_of_next) == ("leaf", 32, True)
    assert leaf.link == Link(4e-6, 50e9)
    assert leaf.loaded_link.bytes_per_s == 12.5e9
    assert (spine.link.latency_s, spine.link.bytes_per_s) == (pytest.approx(5e-6), 50e9)
    assert spine.loaded_link.bytes_per_s == 200e9 / 32


@FEW
@given(st.lists(st.tuples(st.integers(0, 127), st.integers(0, 127)), min_size=1, max_size=30))
def test_a_message_takes_the_latency_of_the_innermost_tier_that_holds_both_ends(pairs):
    net = pod()
    topology = net.topology()
    src, dst = (np.array(column) for column in zip(*pairs, strict=True))
    latencies = route_latencies(topology.wires(), topology.routes(src, dst))
    expected = [0.0 if a == b else net.tier_for(pair).link.latency_s for pair in pairs for a, b in [pair]]
    assert latencies == pytest.approx(expected, abs=1e-15)


@FEW
@given(st.sampled_from([1, 2, 4, 8, 16, 32, 40, 96, 128]), st.data())
def test_what_is_taken_times_messages_as_the_whole_does(num_chips, data):
    whole, part = pod().topology(), pod().topology(num_chips)
    chip = st.integers(0, num_chips - 1)
    src, dst = (np.array(data.draw(st.lists(chip, min_size=4, max_size=4))) for _ in range(2))
    there, here = whole.routes(src, dst), part.routes(src, dst)
    assert part.num_chips == num_chips
    assert route_latencies(whole.wires(), there) == pytest.approx(route_latencies(part.wires(), here))


AXES = ("pp", "dp", "tp")


@FEW
@given(st.sampled_from([1, 2, 4, 8, 16]), st.sampled_from([1, 2, 4, 8]), st.sets(st.sampled_from(AXES)))
def test_levels_are_what_the_wires_of_the_whole_network_give_each_message(tp, dp, along):
    net = pod()
    axes = tuple(zip(AXES, (128 // tp // dp, dp, tp), strict=True))
    levels = net.levels(mesh_group(axes, along))
    assert levels is not None
    groups = copies_of(axes, along)
    inside = 1
    for level in levels:
        latencies, shares = played(net.topology(), groups, inside, level.fanout)
        assert latencies == pytest.approx(np.full(128, level.latency_s))
        assert shares == pytest.approx(np.full(128, level.rate(inside)))
        inside *= level.fanout
    assert inside == groups.shape[1]


def copies_of(axes, along):
    """[copies, members] All groups along these axes."""
    sizes = [size for _, size in axes]
    fixed = [i for i, (axis, _) in enumerate(axes) if axis not in along]
    moving = [i for i, (axis, _) in enumerate(axes) if axis in along]
    members = int(np.prod([sizes[i] for i in moving], dtype=np.int64))
    return np.arange(np.prod(sizes)).reshape(sizes).transpose(fixed + moving).reshape(-1, members)


def played(topology, groups, inside, fanout):
    """Latencies and shares when each member sends to the same one of the next subgroup of its level."""
    members = np.arange(groups.shape[1])
    digit = members // inside % fanout
    target = members + ((digit + 1) % fanout - digit) * inside
    return sent(topology, groups.ravel(), groups[:, target].ravel())


def sent(topology, src, dst):
    """Latency and share of each message, where all load their wires alike."""
    routes = topology.routes(src, dst)
    wires = topology.wires()
    users = np.bincount(wires.shares[routes.wires], minlength=wires.num_wires)
    each = wires.bytes_per_s / np.maximum(users[wires.shares], 1)
    shares = [each[routes.of(i)].min() for i in range(routes.num_messages)]
    return route_latencies(wires, routes), np.array(shares)


def test_a_listed_group_has_the_card_to_itself_and_the_copies_of_a_lattice_share_it():
    one_per_host = range(0, 128, 8)
    listed, all_copies = pod().levels(one_per_host), pod().levels(Lattice(((8, 16),)))
    assert [level.rate() for level in listed] == [50e9, 50e9]
    assert [level.rate(flows) for level, flows in zip(all_copies, (1, 4), strict=True)] == [
        12.5e9,
        200e9 / 32,
    ]


def test_groups_without_an_even_fold_have_no_levels():
    net = pod()
    assert net.levels((5, 6, 7, 8, 9)) is None
    assert net.levels((1, 0)) is None  # its first member is not its first chip
    assert net.levels(mesh_group((("dp", 8), ("tp", 6)), ("tp",))) is None
    assert net.levels((5,)) == ()
    assert net.levels(Lattice(())) == ()
    with pytest.raises(CommsError, match="at least one chip"):
        net.levels(())
    with pytest.raises(CommsError, match="names a chip twice"):
        net.levels((1, 1))


def test_a_torus_of_hosts_folds_by_dimension_and_its_levels_carry_the_tier_of_the_network():
    torus = Torus((4, 4), (Link(1e-6, 40e9),))
    net = Network((shaped("ici", TierKind.SCALE_UP, torus), switched("dcn", 64, SLOW, TierKind.SCALE_OUT)))
    levels = net.levels(mesh_group((("dp", 16), ("tp", 4)), ("dp", "tp")))
    assert [(level.tier, level.fanout, level.ring) for level in levels] == [
        ("ici", 4, True),
        ("ici", 4, True),
        ("dcn", 4, False),
    ]
    assert net.topology().tiers == ("ici", "dcn")


def test_a_network_of_any_graph_has_routes_but_no_levels():
    edges = tuple(Edge(a, (a + 1) % 5, Link(1e-6, 1e9)) for a in range(5))
    net = Network((shaped("ring", TierKind.SCALE_UP, EdgeList(5, edges)),))
    assert net.levels(range(5)) is None
    assert np.diff(net.topology().routes(np.array([0]), np.array([2])).offsets).tolist() == [2]
    part = net.topology(3)  # the other chips still pass messages on
    assert (part.num_chips, part.num_nodes) == (3, 5)
    assert net.tiers[0].link.latency_s == pytest.approx(2e-6)


@pytest.mark.parametrize(("num_chips", "sides"), [(8, [4, 2]), (12, [4, 3]), (20, [4, 5]), (40, [4, 5, 2])])
def test_a_group_of_all_chips_may_fill_any_block_of_a_torus_as_it_has_no_copies(num_chips, sides):
    pod = Network((shaped("pod", TierKind.SCALE_UP, Torus((4, 5, 3), (Link(1e-6, 1e9),))),))
    whole = Lattice(((1, num_chips),))
    assert [level.fanout for level in pod.take(num_chips).levels(whole)] == sides
    if num_chips != 20:  # copies of the others would turn corners
        assert pod.levels(whole) is None


class Asked(Tree):
    """A tree that keeps which groups it is asked about."""

    asked: ClassVar[list[Lattice]] = []

    def levels(self, members, inner=1, aligned=False):
        self.asked.append(members)
        return super().levels(members, inner, aligned)


@FEW
@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4), st.sets(st.sampled_from(("pp", "dp", "tp"))))
def test_only_a_group_of_all_chips_is_told_to_be_alone_and_only_by_the_outermost_tier(pp, dp, tp, along):
    num_chips = 4 * pp * dp * tp
    Asked.asked.clear()
    inner = () if num_chips == 4 else (Tier("host", TierKind.SCALE_UP, 4, Asked(4, SLOW)),)
    net = Network((*inner, Tier("net", TierKind.SCALE_OUT, num_chips, Asked(num_chips, SLOW))))
    group = mesh_group((("pp", pp), ("dp", dp), ("tp", 4 * tp)), {*along, "tp"})
    net.levels(group)
    *within, last = Asked.asked
    assert not any(each.alone for each in within)
    assert last == replace(group, alone=group.num_chips == num_chips)


@st.composite
def hosts_on_leaves(draw):
    """Hosts of 2 or 4 chips under two or three layers of switches, cut to some number of whole hosts."""
    host = draw(st.sampled_from([2, 4]))
    rails = draw(st.sampled_from([1, host]))
    sizes = [host]
    for _ in range(draw(st.integers(1, 2))):
        sizes.append(sizes[-1] * draw(st.integers(2, 4)))
    trunks = [
        Trunk(
            size,
            Link(draw(st.integers(0, 3)) * 1e-6, draw(st.integers(1, 9)) * 1e9),
            Switch(f"layer {number}"),
            rails=rails if number == 1 else 1,
        )
        for number, size in enumerate(sizes[1:], 1)
    ]
    tree = Tree(sizes[-1] * 4, Link(1e-6, 5e9), Switch("leaf"), tuple(trunks))
    fabric = switched("fabric", host, Link(2e-6, 300e9), TierKind.SCALE_UP)
    num_hosts = draw(st.integers(2, sizes[-1] * 4 // host))
    return Network((fabric, *layered(tree, TierKind.SCALE_OUT, inner=host))).take(num_hosts * host)


@FEW
@given(hosts_on_leaves(), st.booleans())
def test_what_folds_is_the_same_further_in_and_has_as_many_members_when_taken_to_be_even(net, aligned):
    num_chips = net.tiers[-1].size
    exact, taken = net.levels(range(num_chips), aligned), net.levels_as_if_even(range(num_chips), aligned)
    assert taken is not None
    assert num_members(taken) == num_chips
    if exact is not None:
        assert taken[:-1] == exact[: len(taken) - 1]
        assert len(taken) <= len(exact)
        assert (taken[-1].tier, taken[-1].port) == (exact[-1].tier, exact[-1].port)


@FEW
@given(hosts_on_leaves(), st.booleans(), st.booleans(), st.data())
def test_no_message_between_subgroups_taken_to_be_even_is_slower_than_said(net, by_arithmetic, aligned, data):
    num_chips, host = net.tiers[-1].size, net.tiers[0].size
    levels = net.levels_as_if_even(Lattice(((1, num_chips),)) if by_arithmetic else range(num_chips), aligned)
    assert (levels[0].tier, levels[0].fanout, levels[0].latency_s) == ("fabric", host, 2e-6)
    subgroup, between = num_members(levels[:-1]), levels[-1]
    turn = data.draw(st.integers(1, between.fanout - 1)) * subgroup
    src = np.arange(num_chips)
    latencies, shares = sent(net.topology(), src, (src + turn) % num_chips)
    assert latencies.max() <= between.latency_s * (1 + 1e-9)
    assert shares.min() >= between.rate(subgroup) * (1 - 1e-9)


def test_a_unit_and_one_host_more_are_hosts_that_meet_over_the_spine():
    leaf, spine = Link(0.65e-6, 47.5e9), Link(0.35e-6, 1.52e12)
    tree = Tree(2048, leaf, Switch("unit"), (Trunk(256, spine, Switch("spine"), rails=8),))
    net = Network((FABRIC, *layered(tree, TierKind.SCALE_OUT, inner=8)))
    for num_chips in (264, 520, 1032, 2000):
        assert net.take(num_chips).levels(range(num_chips), aligned=True) is None
        for members in (range(num_chips), Lattice(((1, num_chips),))):
            host, between = net.take(num_chips).levels_as_if_even(members)
            assert (host.tier, host.fanout) == ("fabric", 8)
            assert (between.tier, between.fanout) == ("spine", num_chips // 8)
            assert between.latency_s == pytest.approx(2e-6)
            assert (between.rate(), between.rate(8), between.rate(16)) == (47.5e9, 47.5e9, 23.75e9)
    assert [each.fanout for each in net.levels_as_if_even(Lattice(((4, 66),)))] == [2, 33]
    assert [each.fanout for each in net.levels_as_if_even(range(512), aligned=True)] == [8, 32, 2]


def test_levels_that_share_ports_still_do_when_taken_to_be_even():
    levels = pod().levels_as_if_even(range(72), aligned=True)
    assert [(level.tier, level.fanout, level.port > 0) for level in levels] == [
        ("fabric", 8, False),
        ("spine", 9, True),
    ]
    half = pod().levels_as_if_even([chip for chip in range(72) if chip % 4 < 2])
    assert [level.fanout for level in half] == [4, 9]
    assert (levels[1].pool_bytes_per_s, half[1].pool_bytes_per_s) == (200e9 / 4, 200e9 / 4)
    assert [level.fanout for level in pod().levels_as_if_even(range(64))] == [8, 4, 2]


def test_groups_without_even_hosts_or_with_nobody_in_them_are_not_taken_to_be_even():
    net = pod()
    assert net.levels_as_if_even((5, 6, 7, 8, 9)) is None
    assert net.levels_as_if_even((1, 0)) is None
    assert net.levels_as_if_even((5,)) is None
    assert net.levels_as_if_even(range(8)) is None  # one level
    assert net.levels_as_if_even(range(0, 72, 8)) is None  # no two members in a host
    assert net.levels_as_if_even(Lattice(((8, 9),))) is None
    assert net.levels_as_if_even(Lattice(((3, 9),))) is None
    with pytest.raises(CommsError, match="outside the network"):
        net.levels_as_if_even((3, 128))
    ring = EdgeList(16, tuple(Edge(a, (a + 1) % 16, Link(1e-6, 1e9)) for a in range(16)))
    assert Network((FABRIC, shaped("ring", TierKind.SCALE_OUT, ring))).levels_as_if_even(range(16)) is None
