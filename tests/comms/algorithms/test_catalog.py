"""The catalog: found by listing the package, in a fixed order, and nothing of what cannot suit is called."""

from dataclasses import replace

import pytest

from comms.algorithms.catalog import Joined, Needs, algorithms, considered, names
from comms.collectives.schedule import Op
from comms.networks.groups import Level

SWITCH = Level("switch", 4, 1e-6, 1e9)
RING = Level("wire", 4, 1e-6, 1e9, 2e9, ring=True)


@pytest.mark.parametrize(
    ("op", "expected"),
    [
        (Op.ALL_TO_ALL, "direct, pairwise, bruck, hierarchical direct, torus shift, rotated torus shift"),
        (Op.BARRIER, "dissemination, torus tree, mesh tree, in-network"),
    ],
)
def test_of_equally_fast_algorithms_always_the_same_comes_first(op, expected):
    assert ", ".join(names(op)) == expected


def test_several_rings_over_hosts_come_last_and_are_left_to_libraries():
    assert names(Op.ALL_REDUCE)[0] == "ring"
    assert names(Op.ALL_REDUCE)[-1] == "rail rings"
    assert "rail rings" not in considered(Op.ALL_REDUCE, 8)


def test_many_chips_do_not_all_send_to_all_others_where_there_is_another_way():
    assert "direct" in considered(Op.ALL_REDUCE, 65)
    assert not {"direct", "two-shot"} & {*considered(Op.ALL_REDUCE, 66)}
    assert "direct" in considered(Op.ALL_TO_ALL, 66)


@pytest.mark.parametrize("op", Op)
@pytest.mark.parametrize("levels", [(SWITCH,), (SWITCH, SWITCH), (RING,), (RING, RING)])
def test_of_algorithms_that_do_not_suit_nothing_is_called(op, levels):
    def called(*_):
        raise AssertionError

    for each in algorithms(op).values():
        if not each.suits(op, levels):
            assert replace(each, sketch=called, cut=called).outline(op, 1.0, levels) is None


@pytest.mark.parametrize(
    ("needs", "levels", "is_met"),
    [
        (Needs(), (SWITCH, RING), True),
        (Needs(min_levels=2), (SWITCH, replace(SWITCH, fanout=1)), False),  # which parts nothing
        (Needs(max_levels=1), (SWITCH, SWITCH), False),
        (Needs(Joined.IN_RING), (RING, SWITCH), True),
        (Needs(Joined.IN_RING, Joined.IN_RING), (RING, SWITCH), False),
        (Needs(Joined.BY_SWITCH, Joined.BY_SWITCH), (SWITCH, RING), False),
        (Needs(Joined.BY_ADDING_SWITCH), (SWITCH,), False),
        (Needs(Joined.BY_ADDING_SWITCH), (replace(SWITCH, reduces=True),), True),
        (Needs(most_shared=1), (replace(SWITCH, shared=True),), True),
        (Needs(most_shared=1), (replace(SWITCH, shared=True), SWITCH), False),
    ],
)
def test_what_is_needed_of_levels_is_what_is_declared(needs, levels, is_met):
    ring = replace(algorithms(Op.ALL_REDUCE)["ring"], needs=needs)
    assert ring.suits(Op.ALL_REDUCE, levels) == is_met
    assert not ring.suits(Op.BROADCAST, (replace(SWITCH, shared=True),))
