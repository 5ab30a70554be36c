"""Parts of units: some hosts under one set of rails fold like a unit of just as many, and every fidelity agrees."""

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from comms.algorithms.catalog import names
from comms.collectives.schedule import Op
from comms.errors import CommsError
from comms.networks.fabrics.switch_tree import Tree
from comms.networks.groups import Lattice, mesh_group, num_members
from comms.networks.layers import Switch, Trunk
from comms.networks.links import Link
from comms.networks.network import UNBOUNDED, Network, TierKind, layered, switched
from comms.selection.choice import choose
from comms.simulation.full import simulate

FEW = settings(max_examples=60)
CLOSE = 1e-3
PORT = 10e9
AXES = ("pp", "dp", "tp")
EVERYONE = [Op.ALL_REDUCE, Op.ALL_GATHER, Op.REDUCE_SCATTER, Op.ALL_TO_ALL]


@dataclass(frozen=True)
class Pod:
    """Hosts on a fabric of their own, `unit` of them under one set of leaf switches, any number under the spine."""

    host: int = 8
    per_card: int = 1  # chips
    rails: bool = True
    leaf_taper: float = 1.0
    spine_taper: float = 1.0

    def network(self, unit, num_chips=UNBOUNDED):
        size, cards = unit * self.host, self.host // self.per_card
        leaf = Switch("leaf", oversubscription=self.leaf_taper)
        card = [Trunk(self.per_card, Link(0.2e-6, 0.8 * PORT), leaf)] if self.per_card > 1 else []
        trunks, rails = card, cards if self.rails else 1
        if size < num_chips or rails > 1:
            rate = size * PORT / self.leaf_taper / self.spine_taper / rails
            trunks = [*card, Trunk(size, Link(0.5e-6, rate), Switch("spine"), rails=rails)]
        tree = Tree(num_chips, Link(0.5e-6, PORT), Switch("card") if card else leaf, tuple(trunks))
        fabric = switched("fabric", self.host, Link(2e-6, 100e9), TierKind.SCALE_UP)
        return Network((fabric, *layered(tree, TierKind.SCALE_OUT, inner=self.host)))


@st.composite
def pods(draw):
    host = draw(st.sampled_from([2, 4, 8]))
    tapers = st.sampled_from([1.0, 2.0, 4.0])
    per_card = draw(st.sampled_from([1, host // 2]))
    return Pod(host, per_card, draw(st.booleans()), draw(tapers), draw(tapers))


@st.composite
def meshes(draw, num_chips):
    """Axes of a row-major mesh over all chips, and those that a group runs along."""
    outer = draw(st.sampled_from([n for n in range(1, num_chips + 1) if num_chips % n == 0]))
    rest = num_chips // outer
    middle = draw(st.sampled_from([n for n in range(1, rest + 1) if rest % n == 0]))
    along = draw(st.sets(st.sampled_from(AXES), min_size=1))
    return tuple(zip(AXES, (outer, middle, rest // middle), strict=True)), along


@FEW
@given(pods(), st.integers(2, 33), st.booleans(), st.data())
def test_some_hosts_of_a_unit_fold_as_a_unit_of_so_many_hosts(pod, unit, aligned, data):
    num_hosts = data.draw(st.integers(2, unit))
    num_chips = num_hosts * pod.host
    part, own = pod.network(unit).take(num_chips), pod.network(num_hosts).take(num_chips)
    group = mesh_group(*data.draw(meshes(num_chips)))
    for members in (group, group.chips().tolist()):
        assert part.levels(members, aligned) == own.levels(members, aligned)
    everyone = part.levels(Lattice(((1, num_chips),)), aligned=True)
    assert num_members(everyone) == num_chips


@pytest.mark.parametrize("num_hosts", [3, 5, 6, 7, 9, 10, 12, 24])
def test_any_number_of_hosts_of_a_unit_folds_with_all_copies_of_its_groups(num_hosts):
    net = Pod().network(32).take(num_hosts * 8)
    everyone = net.levels(Lattice(((1, num_hosts * 8),)), aligned=True)
    one_per_host = net.levels(Lattice(((8, num_hosts),)))
    assert [(level.tier, level.fanout) for level in everyone] == [("fabric", 8), ("leaf", num_hosts)]
    assert [(level.tier, level.fanout) for level in one_per_host] == [("leaf", num_hosts)]
    assert {level.rate(8) for level in everyone[1:]} == {level.rate() for level in one_per_host} == {PORT}


def test_copies_in_one_unit_fold_and_copies_astride_two_do_not():
    unit = Pod().network(32)
    along_dp = Lattice(((8, 9),))  # 72 chips with its copies next to it
    for num_stages in (1, 2, 3):
        assert [each.fanout for each in unit.take(72 * num_stages).levels(along_dp)] == [9]
    assert unit.take(288).levels(along_dp) is None  # the fourth stage is hosts 27 to 35
    along_pp = Lattice(((72, 3),))
    assert [(each.tier, each.fanout) for each in unit.take(216).levels(along_pp)] == [("leaf", 3)]
    assert unit.take(288).levels(Lattice(((72, 4),))) is None
    assert [each.fanout for each in unit.take(320).levels(Lattice(((8, 8),)))] == [
        8
    ]  # five of them, four in one


@pytest.mark.parametrize("num_hosts", [33, 34, 40, 48, 63, 65, 80])
def test_a_unit_and_a_part_of_one_sit_unevenly(num_hosts):
    net = Pod().network(32).take(num_hosts * 8)
    for members in (Lattice(((1, num_hosts * 8),)), Lattice(((8, num_hosts),)), range(num_hosts * 8)):
        assert net.levels(members, aligned=True) is None


@pytest.mark.parametrize("rails", [False, True])
def test_a_tapered_leaf_leaves_a_part_of_its_hosts_the_same_share_with_rails_and_without(rails):
    net = Pod(rails=rails, leaf_taper=2.0).network(32)
    for num_hosts in (2, 3, 31, 32):
        (level,) = net.take(num_hosts * 8).levels(Lattice(((8, num_hosts),)))
        assert (level.bytes_per_s, level.rate()) == (PORT, PORT / 2)


def timed(pod, unit, num_hosts, members, op, nbytes):
    """By name, what rings and hierarchical algorithms take in closed form and in full, where the group folds.

    Not double trees, whose closed forms are bounds.
    """
    network = pod.network(unit).take(num_hosts * pod.host)
    topology = network.topology()
    for name in names(op):
        if not name.startswith(("ring", "hierarchical")) or "tree" in name:
            continue
        try:
            choice = choose(op, nbytes, members, network, name)
        except CommsError:  # halving an odd number
            continue
        if choice.is_folded:
            groups = members.copies(topology.num_chips) if isinstance(members, Lattice) else [members]
            job = choice.job(np.array(groups), topology)
            yield name, choice.transfer_s, simulate(topology, [job]).seconds[0]


@pytest.mark.parametrize("op", EVERYONE)
@given(st.data())
@settings(max_examples=12)
def test_closed_forms_are_full_fidelity_on_parts_of_units(op, data):
    pod, unit = data.draw(pods()), data.draw(st.integers(3, 9))
    num_hosts = data.draw(st.integers(2, unit))
    num_chips = num_hosts * pod.host
    nbytes = data.draw(st.sampled_from([0.0, 2.0**20, 2.0**28]))
    copies = [Lattice(((1, num_chips),)), Lattice(((pod.host, num_hosts),)), Lattice(((2, num_chips // 2),))]
    members = data.draw(st.sampled_from([*copies, tuple(range(num_chips))]))
    for name, closed, full in timed(pod, unit, num_hosts, members, op, nbytes):
        assert full == pytest.approx(closed, rel=CLOSE), name


@pytest.mark.parametrize("num_hosts", [3, 5, 9])
def test_all_reduce_over_a_few_of_32_hosts_takes_in_full_what_the_closed_form_says(num_hosts):
    for members, fewest in ((Lattice(((1, num_hosts * 8),)), 6), (Lattice(((8, num_hosts),)), 1)):
        times = list(timed(Pod(), 32, num_hosts, members, Op.ALL_REDUCE, 2.0**26))
        assert len(times) >= fewest
        for name, closed, full in times:
            assert full == pytest.approx(closed, rel=CLOSE), name
