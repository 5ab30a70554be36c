"""Claims about algorithms laid out as a topology suggests: proved, in groups, on wires of their own."""

import numpy as np
import pytest

from comms.algorithms.catalog import MOST_PEERS
from comms.algorithms.hierarchical import hierarchical
from comms.collectives.proof import prove
from comms.collectives.schedule import Op
from comms.networks.fabrics.edge_list import Edge, EdgeList
from comms.networks.fabrics.torus_mesh import FullMesh
from comms.networks.links import Link
from comms.selection.candidate_jobs import laid_hierarchies, laid_rings
from comms.simulation.compiled import CollectiveJob
from comms.simulation.full import simulate

EVERY = [each.name for each in hierarchical.ALGORITHMS]
FAST, SLOW = Link(1e-6, 50e9), Link(5e-6, 20e9)


def islands(chips_each: int, num: int) -> EdgeList:
    """Chips whose numbers go round the islands, each of which has a hub."""
    hubs = [f"island {island}" for island in range(num)]
    chips = [Edge(chip, chips_each * num + chip % num, FAST) for chip in range(chips_each * num)]
    between = [Edge(chips_each * num + a, chips_each * num + b, SLOW) for a in range(num) for b in range(a)]
    return EdgeList(chips_each * num, (*chips, *between), tuple(hubs), through_chips=False)


def seconds(topology, laid, nbytes):
    return simulate(topology, [CollectiveJob(laid.schedule, laid.chips, nbytes)]).seconds[0]


@pytest.mark.parametrize("op", Op)
def test_everything_that_is_laid_out_is_proved_and_has_all_chips(op):
    topology = islands(3, 3)
    for laid in (*laid_rings(op, topology), *laid_hierarchies(op, topology, EVERY)):
        assert laid.schedule.op is op
        prove(laid.schedule)
        assert sorted(laid.chips.tolist()) == list(range(9))


def test_a_hierarchy_has_the_chips_of_an_island_side_by_side():
    for laid in laid_hierarchies(Op.ALL_REDUCE, islands(4, 2), EVERY):
        assert {frozenset(half.tolist()) for half in np.split(laid.chips, 2)} == {
            frozenset({0, 2, 4, 6}),
            frozenset({1, 3, 5, 7}),
        }


def test_over_a_slow_link_a_hierarchy_is_faster_than_a_ring():
    topology = islands(4, 2)
    rings, groups = (
        min(seconds(topology, laid, 64e6) for laid in every)
        for every in (laid_rings(Op.ALL_REDUCE, topology), laid_hierarchies(Op.ALL_REDUCE, topology, EVERY))
    )
    assert groups < rings


def test_islands_of_different_sizes_have_no_hierarchy():
    links = [Edge(chip, 5 + (chip > 2), FAST) for chip in range(5)]
    uneven = EdgeList(5, (*links, Edge(5, 6, SLOW)), ("left", "right"), through_chips=False)
    assert laid_hierarchies(Op.ALL_REDUCE, uneven, EVERY) == ()


def test_only_hierarchies_that_are_asked_for_are_laid_out():
    (laid,) = laid_hierarchies(Op.ALL_REDUCE, islands(4, 2), ["hierarchical ring", "ring"])
    assert laid.schedule.algorithm == "hierarchical ring"


def test_no_hierarchy_has_a_chip_exchange_parts_with_more_others_than_libraries_do():
    topology = islands(MOST_PEERS + 2, 2)
    for op, is_laid in ((Op.ALL_REDUCE, False), (Op.ALL_TO_ALL, True)):
        found = {each.schedule.algorithm for each in laid_hierarchies(op, topology, EVERY)}
        assert ("hierarchical direct" in found) == is_laid


def test_several_rings_share_the_buffer_on_wires_of_their_own():
    n, nbytes = 5, 1e9
    one, several = laid_rings(Op.ALL_REDUCE, FullMesh(n, FAST))
    assert seconds(FullMesh(n, FAST), one, nbytes) == pytest.approx(8 * (1e-6 + nbytes / n / 50e9))
    assert seconds(FullMesh(n, FAST), several, nbytes) == pytest.approx(8 * (1e-6 + nbytes / n / 4 / 50e9))


def test_nothing_goes_round_for_operations_without_a_ring():
    assert laid_rings(Op.SCATTER, islands(2, 2)) == ()
    assert laid_rings(Op.BROADCAST, islands(2, 2)) == ()
