"""Shapes: what topologies without a tree say of themselves, against their routes."""

from dataclasses import replace
from math import prod

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from comms.networks.fabrics.dragonfly import Dragonfly
from comms.networks.fabrics.edge_list import Edge, EdgeList
from comms.networks.fabrics.switch_tree import Tree
from comms.networks.fabrics.torus_mesh import FullMesh, Torus
from comms.networks.groups import Lattice, mesh_group
from comms.networks.links import Link
from comms.networks.network import Network, Tier, TierKind
from comms.networks.ring_orders import ring_orders
from comms.networks.topology import route_latencies
from comms.synthesis.bisection import bisection

FEW = settings(max_examples=60)
LINK = Link(1e-6, 10e9)


def shaped(name, kind, topology):
    """A tier of any topology."""
    return Tier(name, kind, topology.num_chips, topology)


@st.composite
def blocks(draw):
    """A torus, and a block of it: first corner and sizes."""
    dims = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=3)))
    wraps = tuple(draw(st.booleans()) for _ in dims)
    sub = tuple(draw(st.integers(1, size)) for size in dims)
    corner = tuple(draw(st.integers(0, size - part)) for size, part in zip(dims, sub, strict=True))
    return Torus(dims, (LINK,), wraps), corner, sub


@FEW
@given(blocks())
def test_a_block_of_a_torus_folds_into_its_sides(drawn):
    torus, corner, sub = drawn
    digits = torus.digits(np.arange(torus.num_chips))
    inside = [(row >= at) & (row < at + part) for row, at, part in zip(digits, corner, sub, strict=True)]
    chips = np.flatnonzero(np.all(inside, axis=0)).tolist()
    levels = torus.levels(chips)
    assert tuple(level.fanout for level in levels) == tuple(part for part in sub if part > 1)
    assert prod(level.fanout for level in levels) == len(chips)


def test_an_axis_of_a_mesh_over_a_torus_is_a_ring_of_neighbours():
    grid = Torus((4, 4), (LINK,))
    rows, columns = (grid.levels(mesh_group((("b", 4), ("a", 4)), (axis,))) for axis in ("a", "b"))
    assert [(level.tier, level.fanout, level.wraps) for level in (*rows, *columns)] == [
        ("x", 4, True),
        ("y", 4, True),
    ]


def test_groups_that_fill_no_block_do_not_fold():
    grid = Torus((4, 4), (LINK,))
    assert grid.levels((0, 2)) is None
    assert grid.levels((0, 1, 4)) is None
    assert Torus((6, 2), (LINK,)).levels(Lattice(((1, 4),))) is None  # the next copy turns a corner
    assert grid.levels(range(16), inner=2) is None


@FEW
@given(blocks(), st.data())
def test_a_group_alone_folds_like_the_same_chips_listed_and_one_with_copies_only_where_they_fit(drawn, data):
    torus, _, _ = drawn
    num_chips = data.draw(st.integers(1, torus.num_chips))
    group = Lattice(((1, num_chips),))
    listed = torus.levels(range(num_chips))
    assert torus.levels(replace(group, alone=True)) == listed
    sides = dict.fromkeys("xyz", 1) | {level.tier: level.fanout for level in listed or ()}
    copies_fit = all(size % side == 0 for size, side in zip(torus.dims, sides.values(), strict=False))
    assert torus.levels(group) == (listed if copies_fit else None)


def test_chips_that_meet_elsewhere_are_whole_dimensions():
    (level,) = Torus((4, 4), (LINK,)).levels(range(16), inner=4)
    assert (level.tier, level.fanout) == ("y", 4)
    assert Torus((4, 4), (LINK,)).levels(range(4), inner=4) == ()


def test_any_chips_of_a_full_mesh_meet_at_one_level():
    pairs = FullMesh(8, LINK)
    (level,) = pairs.levels((0, 3, 6))
    assert (level.fanout, level.rate(), level.rate(2), level.rate(4)) == (3, 10e9, 10e9, 5e9)
    assert pairs.levels(range(8), inner=2) is None
    assert pairs.levels((0, 1), inner=2) == ()
    shared = FullMesh(4, LINK, half_duplex=True)
    assert shared.levels(range(4)) is None
    assert (pairs.loaded_link.bytes_per_s, shared.loaded_link.bytes_per_s) == (10e9, 5e9)


def test_the_links_of_a_torus_are_those_of_neighbours():
    torus = Torus((4, 2), (LINK, Link(3e-6, 5e9)), access=Link(1e-7, 8e9))
    assert torus.link == torus.loaded_link == Link(3e-6 + 2e-7, 5e9)


def test_of_any_other_topology_the_routes_are_looked_at():
    shape = EdgeList(4, tuple(Edge(a, a + 1, LINK) for a in range(3)))
    assert (shape.link.latency_s, shape.link.bytes_per_s) == (pytest.approx(3e-6), 10e9)
    assert (shape.loaded_link.latency_s, shape.loaded_link.bytes_per_s) == (pytest.approx(2e-6), 5e9)
    assert shape.cut(2) is shape
    assert (shape.levels(range(4)), shape.levels((0,))) == (None, ())


@pytest.mark.parametrize(
    "shape",
    [Tree(4, LINK), Torus((2, 2), (LINK,)), FullMesh(4, LINK), Dragonfly(2, 1, 2, 1, LINK, LINK, LINK)],
    ids=lambda shape: type(shape).__name__,
)
def test_the_link_of_every_shape_is_no_slower_than_its_longest_routes(shape):
    src, dst = np.array([0, 1]), np.array([3, 3])
    longest = route_latencies(shape.wires(), shape.routes(src, dst)).max()
    assert LINK.latency_s <= shape.link.latency_s <= longest + 1e-15


@pytest.mark.parametrize(
    ("num_chips", "dims", "wraps"),
    [(4, (4, 1, 1), (True, False, False)), (3, (3, 1, 1), (False,) * 3), (20, (4, 5, 1), (True, True, False))]
    + [
        (8, (4, 2, 1), (True, False, False)),
        (40, (4, 5, 2), (True, True, False)),
        (60, (4, 5, 3), (True,) * 3),
    ],
)
def test_the_first_chips_of_a_torus_are_a_torus_or_a_mesh_where_they_fill_a_block(num_chips, dims, wraps):
    part = Torus((4, 5, 3), (LINK,)).first(num_chips)
    assert part.dims == dims
    assert [part.is_ring(dim) for dim, size in enumerate(dims) if size > 1] == [
        wrap for wrap, size in zip(wraps, dims, strict=True) if size > 1
    ]


@pytest.mark.parametrize("num_chips", [5, 18, 50])
def test_other_numbers_of_chips_fill_no_block(num_chips):
    assert Torus((4, 5, 3), (LINK,)).first(num_chips) is None


@pytest.mark.parametrize(("num_chips", "bytes_per_s"), [(2, 1), (4, 1), (8, 2), (16, 4), (32, 4)])
def test_part_of_a_mesh_is_cut_in_halves_of_its_own(num_chips, bytes_per_s):
    mesh = Network((shaped("board", TierKind.SCALE_UP, Torus((4, 8), (LINK,), (False,))),))
    part = mesh.take(num_chips).topology()
    assert bisection(part).bytes_per_s == bytes_per_s * LINK.bytes_per_s
    assert all(sorted(each.chips) == list(range(num_chips)) for each in ring_orders(part))
