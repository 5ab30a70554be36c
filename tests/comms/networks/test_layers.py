"""Folds of groups over trees, against the loads that their messages put on the wires."""

from math import inf, prod

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from comms.networks.fabrics.switch_tree import Tree
from comms.networks.groups import Lattice, mesh_group, sharing
from comms.networks.layers import Spread, Switch, Trunk
from comms.networks.links import Link
from comms.networks.topology import route_latencies

FEW = settings(max_examples=120)
PORT = Link(0.5e-6, 10e9)
AXES = ("c", "b", "a")


@st.composite
def full_trees(draw):
    """Trees whose groups are all full, as the fold assumes that chips are alike."""
    size, below, trunks = draw(st.integers(1, 3)), 1, []
    for number in range(draw(st.integers(0, 3))):
        group = size // (trunks[-1].size if trunks else 1) * below
        rails = draw(st.sampled_from([1, group])) if number == 0 else 1
        to = Switch(f"layer {number + 1}", oversubscription=draw(st.sampled_from([1.0, 1.5, 4.0])))
        link = Link(draw(st.integers(0, 3)) * 1e-6, draw(st.integers(1, 30)) * 1e9)
        trunks.append(Trunk(size, link, to, draw(st.integers(1, 2)), rails, duplex=draw(st.booleans())))
        below, size = rails, size * draw(st.integers(2, 4))
    size = size if trunks else max(2, size)
    switch = Switch("layer 0", oversubscription=draw(st.sampled_from([1.0, 2.0])))
    return Tree(size, PORT, switch, tuple(trunks), draw(st.booleans()))


@st.composite
def meshes(draw, num_chips):
    """Axes of a row-major mesh over all chips, and those that a group runs along."""
    outer = draw(st.sampled_from([n for n in range(1, num_chips + 1) if num_chips % n == 0]))
    rest = num_chips // outer
    middle = draw(st.sampled_from([n for n in range(1, rest + 1) if rest % n == 0]))
    along = draw(st.sets(st.sampled_from(AXES), min_size=1))
    return tuple(zip(AXES, (outer, middle, rest // middle), strict=True)), along


@st.composite
def railed_trees(draw):
    """Whole units of hosts under a switch for each card of a host, or some hosts of one; and the size of a host."""
    per_card, cards = draw(st.sampled_from([1, 2])), draw(st.sampled_from([2, 4]))
    host = per_card * cards
    unit = draw(st.integers(2, 6))
    num_hosts = draw(st.one_of(st.integers(2, unit), st.just(2 * unit), st.just(3 * unit)))
    leaf = Switch("leaf", oversubscription=draw(st.sampled_from([1.0, 3.0])))
    trunk = Trunk(unit * host, Link(1e-6, draw(st.integers(5, 60)) * 1e9), Switch("spine"), rails=cards)
    cards_of_host = [Trunk(per_card, Link(0.1e-6, 8e9), leaf)] if per_card > 1 else []
    switch = Switch("card") if per_card > 1 else leaf
    return Tree(num_hosts * host, PORT, switch, (*cards_of_host, trunk)), host


def copies_of(axes, along):
    """[copies, members] All groups along these axes."""
    numbers = np.arange(prod(size for _, size in axes)).reshape([size for _, size in axes])
    fixed = [i for i, (axis, _) in enumerate(axes) if axis not in along]
    moving = [i for i, (axis, _) in enumerate(axes) if axis in along]
    members = prod(axes[i][1] for i in moving)
    return numbers.transpose(fixed + moving).reshape(-1, members)


def played(tree, groups, inside, fanout):
    """Latencies and shares when each member sends to the same one of the next subgroup of its level."""
    members = np.arange(groups.shape[1])
    digit = members // inside % fanout
    target = members + ((digit + 1) % fanout - digit) * inside
    routes = tree.routes(groups.ravel(), groups[:, target].ravel())
    wires = tree.wires()
    users = np.bincount(wires.shares[routes.wires], minlength=wires.num_wires)
    each = wires.bytes_per_s / np.maximum(users[wires.shares], 1)
    shares = [each[routes.of(i)].min() for i in range(routes.num_messages)]
    return route_latencies(wires, routes), np.array(shares)


def check(tree, groups, levels, inside=1):
    for level in levels:
        latencies, shares = played(tree, groups, inside, level.fanout)
        assert latencies == pytest.approx(np.full(len(latencies), level.latency_s), rel=1e-9, abs=1e-15)
        assert shares == pytest.approx(np.full(len(shares), level.rate(inside)))
        inside *= level.fanout
    assert inside == groups.shape[1]


@FEW
@given(full_trees(), st.data())
def test_a_level_gives_each_message_of_all_copies_what_the_wires_give_it(tree, data):
    axes, along = data.draw(meshes(tree.num_chips))
    levels = tree.levels(mesh_group(axes, along), aligned=True)
    if levels is not None:
        check(tree, copies_of(axes, along), levels)


@FEW
@given(full_trees(), st.data())
def test_a_level_gives_each_message_of_a_listed_group_what_the_wires_give_it(tree, data):
    axes, along = data.draw(meshes(tree.num_chips))
    group = data.draw(st.sampled_from(copies_of(axes, along).tolist()))
    levels = tree.levels(group, aligned=True)
    if levels is not None:
        check(tree, np.array([group]), levels)


@FEW
@given(railed_trees(), st.booleans(), st.booleans(), st.data())
def test_a_level_over_rails_gives_each_message_of_units_and_parts_of_one_what_the_wires_give_it(
    drawn, by_arithmetic, aligned, data
):
    tree, host = drawn
    axes, along = data.draw(meshes(tree.num_chips))
    groups = copies_of(axes, along)
    groups = groups if by_arithmetic else np.array([data.draw(st.sampled_from(groups.tolist()))])
    members = mesh_group(axes, along) if by_arithmetic else groups[0].tolist()
    subgroup = sharing(members, host)
    levels = tree.levels(members, host, aligned)
    if levels is not None:
        check(tree, groups, levels, subgroup)


@pytest.mark.parametrize("num_chips", [24, 48, 72])
def test_every_twelfth_chip_of_hosts_of_eight_is_on_other_rails(num_chips):
    tree = Tree(num_chips, PORT, Switch("leaf"), (Trunk(24, PORT, Switch("spine"), rails=8),))
    for members in (Lattice(((12, num_chips // 12),)), range(0, num_chips, 12)):
        assert tree.levels(members, inner=8, aligned=True) is None
    assert tree.levels(Lattice(((8, num_chips // 8),)), inner=8) is not None


def test_a_tree_of_part_of_a_block_has_layers_of_as_many_chips_as_there_are():
    trunks = (Trunk(4, PORT, Switch("leaf", oversubscription=2.0)), Trunk(64, PORT, Switch("spine"), rails=4))
    part, whole = (Tree(num_chips, PORT, trunks=trunks).layers for num_chips in (48, 256))
    assert [layer.size for layer in part] == [4, 48, 48]
    assert [layer.size for layer in whole] == [4, 64, 256]
    assert [layer.backplane for layer in part] == [inf, 3 * 10e9 / 2, inf]  # three wires from below
    assert [layer.backplane for layer in whole] == [inf, 4 * 10e9 / 2, inf]
    assert [layer.chips for layer in part] == [4, 12, 48]


def test_chips_that_meet_elsewhere_need_not_fill_the_last_host():
    tree = Tree(20, PORT, Switch("leaf"), (Trunk(32, PORT, Switch("spine"), rails=8),))
    assert [(level.tier, level.fanout) for level in tree.levels((0, 8, 16), inner=8)] == [("leaf", 3)]
    assert tree.levels(range(20), inner=8, aligned=True) is None


def test_chips_that_meet_elsewhere_count_as_one_subgroup():
    card = Trunk(2, Link(1e-6, 5e9), Switch("leaf"))
    tree = Tree(32, PORT, Switch("host"), (card, Trunk(16, Link(1e-6, 10e9), Switch("spine"))))
    everyone = mesh_group((("a", 32),), ("a",))
    levels = tree.levels(everyone, inner=8)
    assert [(level.tier, level.fanout) for level in levels] == [("leaf", 2), ("spine", 2)]
    assert [level.pool_bytes_per_s for level in levels] == [8 * 2.5e9, 10e9]
    check(tree, np.arange(32).reshape(1, 32), levels, inside=8)


@pytest.mark.parametrize("spread", [Spread.HASHED, Spread.BY_TARGET])
def test_messages_that_keep_to_one_path_do_not_fold(spread):
    tree = Tree(8, PORT, Switch("leaf"), (Trunk(4, PORT, Switch("spine"), paths=2),), spread=spread)
    assert tree.levels(range(8)) is None
    assert len(tree.levels(range(4))) == 1


def test_packets_that_are_taken_in_do_not_fold():
    assert Tree(4, PORT, Switch(forward_nbytes=1500)).levels(range(4)) is None


def test_uneven_groups_do_not_fold():
    tree = Tree(8, PORT, Switch("leaf"), (Trunk(4, PORT, Switch("spine")),))
    assert tree.levels((0, 1, 4)) is None
    assert tree.levels(mesh_group((("b", 4), ("a", 3)), ("a",))) is None


def test_members_on_several_rails_fold_only_where_messages_keep_to_their_rail():
    railed = Tree(64, PORT, Switch("leaf"), (Trunk(32, PORT, Switch("spine"), paths=8, rails=8),))
    everyone = mesh_group((("a", 64),), ("a",))
    assert railed.levels(everyone, inner=8) is None
    assert railed.levels(everyone, inner=4, aligned=True) is None
    folded = railed.levels(everyone, inner=8, aligned=True)
    assert [(level.tier, level.fanout) for level in folded] == [("leaf", 4), ("spine", 2)]
    check(railed, np.arange(64).reshape(1, 64), folded, inside=8)
    one_rail = railed.levels(mesh_group((("b", 8), ("a", 8)), ("b",)))
    assert [(level.tier, level.fanout) for level in one_rail] == [("leaf", 4), ("spine", 2)]
    assert railed.levels((0, 8, 17, 25), inner=8) is None


def test_a_level_reduces_where_its_switch_does():
    tree = Tree(8, PORT, Switch("leaf"), (Trunk(4, PORT, Switch("spine", reduces=True)),))
    assert [level.reduces for level in tree.levels(range(8))] == [False, True]
