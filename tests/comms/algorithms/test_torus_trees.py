"""Trees on tori and meshes: proved, over wires of their own, and as long as outlined at full fidelity and by hand."""

from dataclasses import replace
from math import prod

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from comms.algorithms import torus_rings, torus_trees
from comms.algorithms.catalog import algorithm_of
from comms.algorithms.rounds import Ranks
from comms.algorithms.torus_trees import (
    ALGORITHMS,
    MESH_TREE,
    QUEUING,
    ROTATED,
    ROTATED_MESH_TREE,
    ROTATED_TORUS_TREE,
    TORUS_TREE,
)
from comms.collectives.outline_time import closed_seconds, folded_seconds
from comms.collectives.proof import prove
from comms.collectives.schedule import Op
from comms.networks.fabrics.torus_mesh import Torus
from comms.networks.groups import Level
from comms.networks.links import Link
from comms.simulation.compiled import CollectiveJob
from comms.simulation.full import simulate

PATIENT = settings(max_examples=40)
EVERY = [(each.name, op) for each in ALGORITHMS for op in each.ops]
EVERY_OP = ALGORITHMS[0].ops
ROOTED = (Op.BROADCAST, Op.REDUCE, Op.SCATTER, Op.GATHER)
NBYTES = 6e4
each_algorithm = pytest.mark.parametrize(("name", "op"), EVERY, ids=[f"{n}-{op}" for n, op in EVERY])
shapes = st.lists(st.integers(1, 5), min_size=1, max_size=3).map(tuple).filter(lambda dims: prod(dims) <= 40)
links = st.builds(Link, st.sampled_from([0.0, 1e-6, 3e-6]), st.sampled_from([0.7e9, 1e9, 2e9]))


@st.composite
def tori(draw, wraps=None):
    """Rings and lines, over links that are all alike or differ by dimension."""
    dims = draw(shapes)
    some = draw(
        st.lists(links, min_size=len(dims), max_size=len(dims)) | st.lists(links, min_size=1, max_size=1)
    )
    closed = tuple(draw(st.booleans()) for _ in dims)
    return Torus(
        dims, tuple(some), draw(st.sampled_from([(True,), (False,), closed])) if wraps is None else wraps
    )


def full_seconds(topology, made, nbytes=NBYTES):
    places = np.arange(topology.num_chips)
    return float(simulate(topology, [CollectiveJob(made, places, nbytes)]).seconds[0])


def schedule(name, op, num_ranks, root=0, fanouts=(), wraps=(), pieces=1):
    return algorithm_of(op, name).make(op, Ranks(num_ranks, root, tuple(fanouts), wraps=wraps, pieces=pieces))


def outline(name, op, nbytes, levels, pieces=1):
    """In so many pieces, or None."""
    each = algorithm_of(op, name)
    return each.sketch(op, nbytes, levels, pieces) if each.suits(op, levels) else None


def level(fanout, wraps=True, latency=1.0, rate=1.0):
    return Level("wire", fanout, latency, rate, ring=True, wraps=wraps)


def check_time(topology, name, op, root=0, pieces=1):
    """None, or the seconds on which all fidelities agree; parts may take less over links of different rates."""
    levels = topology.levels(range(topology.num_chips))
    pieces = pieces if op in torus_trees.WHOLE else 1
    found = outline(name, op, NBYTES, levels, pieces)
    if found is None:
        return None
    fanouts, wraps = ([each.fanout for each in levels], tuple(each.wraps for each in levels))
    made = schedule(name, op, topology.num_chips, root, fanouts, wraps, pieces)
    assert found.algorithm == made.algorithm == name
    seconds = closed_seconds(found)
    assert folded_seconds(found) == pytest.approx(seconds, rel=1e-9)
    may_queue = name in ROTATED and op in torus_trees.IN_PARTS and len({e.bytes_per_s for e in levels}) > 1
    least = seconds / QUEUING if may_queue else seconds
    assert least * (1 - 1e-6) <= full_seconds(topology, made) <= seconds * (1 + 1e-6)
    return seconds


# What a schedule does


@each_algorithm
@settings(max_examples=12)
@given(data=st.data())
def test_every_tree_is_proved_for_any_shape_and_root(name, op, data):
    fanouts = data.draw(shapes)
    root = data.draw(st.integers(0, prod(fanouts) - 1)) if op in ROOTED else 0
    made = schedule(name, op, prod(fanouts), root, fanouts)
    assert (made.algorithm, made.op, made.num_ranks, made.root) == (name, op, prod(fanouts), root)
    prove(made)


@PATIENT
@given(st.data())
def test_dimensions_may_wrap_around_or_not_each_for_itself(data):
    fanouts = data.draw(shapes)
    wraps = tuple(data.draw(st.booleans()) for _ in fanouts)
    op, root = data.draw(st.sampled_from(ROOTED)), data.draw(st.integers(0, prod(fanouts) - 1))
    prove(schedule(data.draw(st.sampled_from(torus_trees.MESHES)), op, prod(fanouts), root, fanouts, wraps))


@each_algorithm
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 8, 16])
def test_ranks_without_dimensions_stand_in_one(name, op, num_ranks):
    made = schedule(name, op, num_ranks)
    prove(made)
    for channel in made.channels:
        found = {(e.pattern.src.tobytes(), e.pattern.dst.tobytes()): e.pattern for e in channel.rounds}
        assert len({id(each.pattern) for each in channel.rounds}) == len(found)


def wires_of(topology, channel):
    """[messages] The one wire that each crosses."""
    crossed = []
    for each in channel.rounds:
        routes = topology.routes(each.pattern.src, each.pattern.dst)
        assert (np.diff(routes.offsets) == 1).all()
        crossed.extend(routes.wires.tolist())
    return crossed


@each_algorithm
@settings(max_examples=12)
@given(data=st.data())
def test_a_tree_has_its_wires_to_itself_and_what_is_whole_crosses_them_once(name, op, data):
    rings = name in (TORUS_TREE, ROTATED_TORUS_TREE)
    topology = data.draw(tori(wraps=(rings,)))
    root = data.draw(st.integers(0, topology.num_chips - 1)) if op in ROOTED else 0
    made = schedule(name, op, topology.num_chips, root, topology.dims)
    crossed = [wires_of(topology, channel) for channel in made.channels]
    used = [set(wires) for wires in crossed]
    assert sum(map(len, used)) == len(set().union(*used))
    if op in torus_trees.WHOLE:
        assert [len(wires) for wires in used] == [len(wires) for wires in crossed]


@pytest.mark.parametrize(
    ("name", "dims", "trees"),
    [
        (ROTATED_TORUS_TREE, (3, 4, 5), 6),
        (ROTATED_TORUS_TREE, (4, 2), 2),
        (ROTATED_MESH_TREE, (4, 8), 2),
        (ROTATED_MESH_TREE, (2, 3, 4), 3),
        (ROTATED_MESH_TREE, (7,), 1),
    ],
)
def test_rotated_trees_are_as_many_as_the_root_can_feed(name, dims, trees):
    made = schedule(name, Op.BROADCAST, prod(dims), fanouts=dims)
    assert len(made.channels) == made.num_chunks == trees


# How long it takes


@each_algorithm
@settings(max_examples=25)
@given(data=st.data())
def test_trees_take_as_long_as_outlined_in_every_fidelity(name, op, data):
    topology = data.draw(tori())
    check_time(topology, name, op, pieces=data.draw(st.integers(1, 5)))


@pytest.mark.parametrize("op", EVERY_OP)
@settings(max_examples=12)
@given(tori(wraps=(True,)), st.data())
def test_rings_have_a_tree_that_takes_as_long_from_any_root(op, topology, data):
    root = data.draw(st.integers(0, topology.num_chips - 1)) if op in ROOTED else 0
    seconds = check_time(topology, TORUS_TREE, op, root, data.draw(st.integers(1, 5)))
    assert (seconds is None) == (topology.num_chips == 1)


@pytest.mark.parametrize("op", EVERY_OP)
@PATIENT
@given(tori(wraps=(False,)), st.data())
def test_lines_have_a_tree_that_takes_longest_from_a_corner(op, topology, data):
    seconds = check_time(topology, MESH_TREE, op)
    if seconds is None:
        assert max(topology.dims) < 3
        return
    root = data.draw(st.integers(0, topology.num_chips - 1)) if op in ROOTED else 0
    made = schedule(MESH_TREE, op, topology.num_chips, root, topology.dims)
    assert full_seconds(topology, made) <= seconds * (1 + 1e-9)


@pytest.mark.parametrize("op", [Op.SCATTER, Op.GATHER])
@pytest.mark.parametrize("name", ROTATED)
@PATIENT
@given(dims=shapes, link=links)
def test_over_links_alike_several_trees_take_as_long_as_outlined_with_parts(name, op, dims, link):
    topology = Torus(dims, (link,), (name == ROTATED_TORUS_TREE,))
    levels = topology.levels(range(topology.num_chips))
    is_one_tree = len(levels) == 1 and (name == ROTATED_MESH_TREE or levels[0].fanout == 2)
    assert (check_time(topology, name, op) is None) == (is_one_tree or not levels)


def test_a_broadcast_on_a_small_torus_by_hand():
    square, mesh = (level(4), level(4)), (level(4, False), level(8, False))
    assert closed_seconds(outline(TORUS_TREE, Op.BROADCAST, 6.0, square)) == 4 * (6 + 1)
    assert closed_seconds(outline(TORUS_TREE, Op.BROADCAST, 6.0, square, pieces=3)) == 4 * (2 + 1) + 2 * 2
    assert outline(TORUS_TREE, Op.BROADCAST, 6.0, mesh) is None
    assert closed_seconds(outline(MESH_TREE, Op.REDUCE, 6.0, mesh)) == (3 + 7) * (6 + 1)
    uneven = (level(4), level(3, latency=5.0, rate=0.5))
    assert (
        closed_seconds(outline(TORUS_TREE, Op.BROADCAST, 6.0, uneven, pieces=3))
        == 2 * (2 + 1) + 1 * (4 + 5) + 2 * 4
    )


def test_what_goes_through_the_middle_by_hand():
    ring, line = (level(8),), (level(5, False), level(3, False))
    assert closed_seconds(outline(TORUS_TREE, Op.ALL_REDUCE, 6.0, ring)) == 8 * (6 + 1)
    assert closed_seconds(outline(TORUS_TREE, Op.ALL_REDUCE, 6.0, ring, pieces=6)) == 8 * (1 + 1) + 5
    assert closed_seconds(outline(MESH_TREE, Op.ALL_REDUCE, 6.0, line)) == (4 + 2) * (6 + 1)
    assert closed_seconds(outline(TORUS_TREE, Op.BARRIER, 6.0, ring)) == 8
    assert closed_seconds(outline(MESH_TREE, Op.BARRIER, 6.0, line)) == 4 + 2


def test_parts_by_hand():
    for op in (Op.SCATTER, Op.GATHER):
        assert closed_seconds(outline(TORUS_TREE, op, 30.0, (level(5),))) == 2 * (6 + 1)
        assert closed_seconds(outline(MESH_TREE, op, 30.0, (level(5, False),))) == 4 * (6 + 1)
        assert closed_seconds(outline(TORUS_TREE, op, 32.0, (level(2), level(4)))) == 2 * (8 + 1) + 1 * (
            4 + 1
        )


def test_rotated_trees_by_hand():
    square = (level(2, False), level(2, False))
    # Two trees of four parts: to the far corner of the line 1 hop, across 2, back to the root's line 3.
    assert closed_seconds(outline(ROTATED_MESH_TREE, Op.SCATTER, 8.0, square)) == 3 * (1 + 1)
    assert closed_seconds(outline(ROTATED_MESH_TREE, Op.BROADCAST, 8.0, square)) == 3 * (4 + 1)
    rings = (level(4), level(4))  # four trees, once around in each dimension
    assert closed_seconds(outline(ROTATED_TORUS_TREE, Op.REDUCE, 8.0, rings)) == 6 * (2 + 1)
    # 15 parts leave by each wire, the last with one hop to go. The 14th, with two, is there one second later.
    assert closed_seconds(outline(ROTATED_TORUS_TREE, Op.GATHER, 64.0, rings)) == (14 + 2 - 1) + 2


def test_on_a_pod_all_wires_of_the_root_are_busy():
    nbytes, rate = 1 << 30, 90e9
    levels = tuple(level(fanout, latency=1e-6, rate=rate) for fanout in (16, 20, 28))
    for op in (Op.BROADCAST, Op.REDUCE, Op.SCATTER, Op.GATHER):
        seconds = closed_seconds(algorithm_of(op, ROTATED_TORUS_TREE).outline(op, nbytes, levels))
        assert nbytes / 6 / rate * (1 - 1 / prod((16, 20, 28))) < seconds < 1.07 * nbytes / 6 / rate


@pytest.mark.parametrize("op", [Op.SCATTER, Op.GATHER])
@settings(max_examples=25)
@given(
    st.sampled_from([(3, 4), (4, 2), (6, 6), (5, 3, 2)]),
    st.lists(st.integers(1000, 1040), min_size=3, max_size=3),
)
def test_with_links_nearly_alike_several_trees_take_nearly_as_long_as_outlined(op, dims, rates):
    some = tuple(Link(1e-6, rate * 1e6) for rate in rates[: len(dims)])
    assert check_time(Torus(dims, some, (True,)), ROTATED_TORUS_TREE, op) is not None


@pytest.mark.parametrize("slow", range(3))
def test_a_dimension_a_little_slower_costs_a_little(slow):
    def seconds(rate):
        levels = [level(fanout, latency=1e-6, rate=90e9) for fanout in (16, 20, 2)]
        levels[slow] = replace(levels[slow], bytes_per_s=rate)
        return closed_seconds(outline(ROTATED_TORUS_TREE, Op.GATHER, 1 << 30, tuple(levels)))

    assert 1.0 <= seconds(89e9) / seconds(90e9) <= 90 / 89


# What outlines promise


@pytest.mark.parametrize("nbytes", [0.0, 1e3, 1e6, 1e9])
@pytest.mark.parametrize("fanouts", [(3,), (16,), (4, 8), (16, 20, 28)])
def test_pipelines_get_enough_pieces_and_not_many_more(nbytes, fanouts):
    for each in ALGORITHMS:
        wraps = each.name in (TORUS_TREE, ROTATED_TORUS_TREE)
        levels = tuple(level(fanout, wraps, 5e-6, 5e10) for fanout in fanouts)
        for op in set(each.ops) & set(torus_trees.WHOLE):
            pieces = each.cut(op, nbytes, levels)
            if each.outline(op, nbytes, levels) is None:
                assert (each.name, len(fanouts), pieces) == (ROTATED_MESH_TREE, 1, 1)
                continue
            best = closed_seconds(each.sketch(op, nbytes, levels, 1 << 20))
            assert closed_seconds(each.sketch(op, nbytes, levels, pieces)) <= best * 1.04
            fewer = max(1, pieces // 2)
            assert pieces == 1 or closed_seconds(each.sketch(op, nbytes, levels, fewer)) > best * 1.03


@pytest.mark.parametrize("name", [TORUS_TREE, MESH_TREE])
def test_trees_that_one_root_feeds_beat_rings_of_all_chips_when_small_and_are_beaten_when_large(name):
    wraps, op = name == TORUS_TREE, Op.ALL_REDUCE
    levels = tuple(level(8, wraps, 1e-6, 50e9) for _ in range(3))
    around = algorithm_of(op, torus_rings.ROTATED if wraps else torus_rings.MESH)
    for nbytes, is_better in ((1e3, True), (1e9, not wraps)):
        tree_s = closed_seconds(algorithm_of(op, name).outline(op, nbytes, levels))
        assert (tree_s < closed_seconds(around.outline(op, nbytes, levels))) == is_better


def test_outlines_are_none_where_trees_do_not_apply():
    ring, line, pair = level(6), level(6, False), level(2, False)
    narrow = Level("wire", 6, 1.0, 1.0, 1.0, ring=True)  # both ways by one port
    switch = Level("switch", 6, 1.0, 1.0, 1.0)
    for op in EVERY_OP:
        for none in ((), (switch,), (narrow,), (line,), (ring, line), (ring, switch)):
            assert outline(TORUS_TREE, op, 1.0, none) is None
        for none in ((), (switch,), (narrow,), (ring, switch)):
            assert outline(MESH_TREE, op, 1.0, none) is None
        assert outline(TORUS_TREE, op, 1.0, (ring, pair)) is not None
        assert outline(MESH_TREE, op, 1.0, (line, pair)) is not None
        assert outline(MESH_TREE, op, 1.0, (line, ring)) is not None  # it need not be closed
        assert outline(MESH_TREE, op, 1.0, (line, ring)) is not None
    assert outline(MESH_TREE, Op.BARRIER, 1.0, (ring, pair)) is None  # the same as with rings
    for op in torus_trees.ONCE:
        assert outline(ROTATED_MESH_TREE, op, 1.0, (line,)) is None  # one tree
        assert outline(ROTATED_TORUS_TREE, op, 1.0, (ring,)) is not None
        assert outline(ROTATED_TORUS_TREE, op, 1.0, (ring, line)) is None
    for op in (Op.SCATTER, Op.GATHER):
        assert outline(TORUS_TREE, op, 1.0, (ring,), pieces=2) is None
        assert outline(ROTATED_TORUS_TREE, op, 1.0, (ring, replace(ring, latency_s=2.0))) is not None
        # All that leaves by the fast pair, the slow ring takes up at its own rate.
        fast_pair = replace(pair, bytes_per_s=2.0)
        assert outline(ROTATED_TORUS_TREE, op, 1e3, (ring, fast_pair)) is None
        assert (
            outline(ROTATED_TORUS_TREE, op, 1.0, (level(64), level(64), level(64))) is None
        )  # many ways to look at
