"""All-to-all on tori: proved, with no more on the wires than must be, and as long as outlined at full fidelity."""

from dataclasses import replace
from math import prod

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from comms.algorithms.catalog import algorithm_of
from comms.algorithms.rounds import Ranks
from comms.algorithms.torus_exchange import ROTATED_SHIFT, SHIFT
from comms.collectives.outline_time import closed_seconds, folded_seconds
from comms.collectives.proof import prove
from comms.collectives.schedule import Op
from comms.errors import CommsError
from comms.networks.fabrics.torus_mesh import Torus
from comms.networks.groups import Level
from comms.networks.links import Link
from comms.simulation.compiled import CollectiveJob
from comms.simulation.full import simulate
from comms.synthesis.bisection import makespan_bound

PATIENT = settings(max_examples=40)
NBYTES = 6e4
each_name = pytest.mark.parametrize("name", [SHIFT, ROTATED_SHIFT])
shapes = st.lists(st.integers(1, 5), min_size=1, max_size=3).map(tuple).filter(lambda dims: prod(dims) <= 40)
links = st.builds(Link, st.sampled_from([0.0, 1e-6, 3e-6]), st.sampled_from([0.7e9, 1e9, 2e9]))


def ring(fanout, latency=1.0, rate=1.0):
    return Level("wire", fanout, latency, rate, ring=True, wraps=fanout > 2)


def all_to_all(name, num_ranks, fanouts=()):
    return algorithm_of(Op.ALL_TO_ALL, name).make(Op.ALL_TO_ALL, Ranks(num_ranks, fanouts=tuple(fanouts)))


def outline(nbytes, levels, name=SHIFT):
    return algorithm_of(Op.ALL_TO_ALL, name).outline(Op.ALL_TO_ALL, nbytes, levels)


def full_seconds(topology, made):
    return float(simulate(topology, [CollectiveJob(made, np.arange(topology.num_chips), NBYTES)]).seconds[0])


@each_name
@PATIENT
@given(fanouts=shapes)
def test_everyone_gets_what_everyone_has_for_it(name, fanouts):
    made = all_to_all(name, prod(fanouts), fanouts=fanouts)
    assert (made.algorithm, made.op, made.num_ranks) == (name, Op.ALL_TO_ALL, prod(fanouts))
    prove(made)
    for channel in made.channels:
        found = {(e.pattern.src.tobytes(), e.pattern.dst.tobytes()): e.pattern for e in channel.rounds}
        assert len({id(each.pattern) for each in channel.rounds}) == len(found)


@each_name
@pytest.mark.parametrize("num_ranks", [*range(1, 10), 16])
def test_ranks_without_dimensions_stand_in_one_ring(name, num_ranks):
    made = all_to_all(name, num_ranks)
    prove(made)
    assert len(made.channels) == (num_ranks > 1)


@each_name
@PATIENT
@given(fanouts=shapes)
def test_every_wire_of_a_dimension_carries_alike_and_no_more_than_the_shortest_ways(name, fanouts):
    topology = Torus(fanouts, (Link(1e-6, 1e9),))
    made = all_to_all(name, topology.num_chips, fanouts=fanouts)
    crossed = np.zeros(topology.wires().num_wires)
    for each in (each for channel in made.channels for each in channel.rounds):
        routes = topology.routes(each.pattern.src, each.pattern.dst)
        assert (np.diff(routes.offsets) == 1).all()
        np.add.at(crossed, routes.wires, made.message_shares(each))
    wires = topology.wires()
    along = np.abs(topology.digits(wires.head) - topology.digits(wires.tail)).argmax(axis=0)
    for dim, fanout in enumerate(fanouts):
        ways = 1 if fanout == 2 else 2
        expected = sum(min(up, fanout - up) for up in range(fanout)) / fanout / ways
        np.testing.assert_allclose(crossed[along == dim], expected)


@each_name
@PATIENT
@given(dims=shapes, some=st.lists(links, min_size=3, max_size=3), alike=st.booleans())
def test_it_takes_as_long_as_outlined_in_every_fidelity(name, dims, some, alike):
    topology = Torus(dims, tuple(some[:1] if alike else some[: len(dims)]))
    levels = topology.levels(range(topology.num_chips))
    found = outline(NBYTES, levels, name)
    assert (found is None) == (len(levels) < 1 + (name == ROTATED_SHIFT))
    if found is None:
        return
    made = all_to_all(name, topology.num_chips, fanouts=[level.fanout for level in levels])
    assert found.algorithm == name
    seconds = closed_seconds(found)
    assert folded_seconds(found) == pytest.approx(seconds, rel=1e-9)
    assert full_seconds(topology, made) == pytest.approx(seconds, rel=1e-6)
    assert seconds >= makespan_bound(topology, Op.ALL_TO_ALL, NBYTES) * (1 - 1e-9)


def test_rounds_by_hand():
    # Blocks of 10 bytes: on a ring of 4 one neighbour's and half of the opposite chip's, then that half.
    assert closed_seconds(outline(40.0, (ring(4),))) == (15 + 1) + (5 + 1)
    assert closed_seconds(outline(50.0, (ring(5),))) == (20 + 1) + (10 + 1)
    assert closed_seconds(outline(20.0, (ring(2),))) == 10 + 1
    assert closed_seconds(outline(30.0, (ring(3), ring(2)))) == (10 + 1) + (15 + 1)
    assert closed_seconds(outline(60.0, (ring(3), ring(3)), ROTATED_SHIFT)) == 2 * (10 + 1)


def test_a_large_exchange_takes_an_eighth_of_it_times_the_longest_ring_and_rotated_a_third_of_that():
    levels = tuple(ring(8, 1e-6, 50e9) for _ in range(3))
    one, rotated = (closed_seconds(outline(2.0**33, levels, name)) for name in (SHIFT, ROTATED_SHIFT))
    assert one == pytest.approx(3 * 2.0**33 * 8 / 8 / 50e9, rel=1e-3)
    assert rotated == pytest.approx(one / 3, rel=1e-3)
    pod = tuple(ring(fanout, 1e-6, 90e9) for fanout in (16, 20, 28))
    one, rotated = (closed_seconds(outline(2.0**33, pod, name)) for name in (SHIFT, ROTATED_SHIFT))
    assert one / 3 < 28 / 8 * 2.0**33 / 90e9 <= rotated < one / 2


def test_outlines_are_none_where_there_are_no_rings():
    narrow = Level("wire", 6, 1.0, 1.0, 1.0, ring=True)  # both ways by one port
    for levels in ((), (Level("switch", 6, 1.0, 1.0),), (narrow,), (replace(ring(6), wraps=False),)):
        assert outline(1.0, levels) is None
        assert outline(1.0, (*levels, ring(4)), ROTATED_SHIFT) is None
    assert outline(1.0, (ring(4),), ROTATED_SHIFT) is None


def test_what_cannot_be_is_refused():
    with pytest.raises(CommsError, match="8960 ranks exchange 160563200 chunks"):
        all_to_all(SHIFT, 8960, (16, 20, 28))
