"""Groups by arithmetic against the same groups listed."""

import itertools
from dataclasses import replace
from math import prod

import pytest
from hypothesis import given
from hypothesis import strategies as st

from comms.networks.groups import Lattice, group_size, mesh_group, sharing

AXES = ("pp", "dp", "tp")
sizes = st.tuples(st.integers(1, 6), st.integers(1, 6), st.integers(1, 6))


def copies_of(axes, along):
    groups: dict[tuple[int, ...], list[int]] = {}
    for chip, at in enumerate(itertools.product(*(range(size) for _, size in axes))):
        fixed = tuple(c for (axis, _), c in zip(axes, at, strict=True) if axis not in along)
        groups.setdefault(fixed, []).append(chip)
    return list(groups.values())


@given(sizes, st.sets(st.sampled_from(AXES)))
def test_a_lattice_is_the_first_of_its_copies(shape, along):
    axes = tuple(zip(AXES, shape, strict=True))
    lattice = mesh_group(axes, along)
    first = copies_of(axes, along)[0]
    assert sorted(lattice.chips().tolist()) == first
    assert (group_size(lattice), lattice.highest) == (len(first), first[-1])


@given(sizes, st.sets(st.sampled_from(AXES)), st.integers(1, 40))
def test_members_share_a_block_as_in_every_copy_or_not_at_all(shape, along, size):
    axes = tuple(zip(AXES, shape, strict=True))
    lattice = mesh_group(axes, along)
    count = sharing(lattice, size)
    if count is not None:
        assert {sharing(copy, size) for copy in copies_of(axes, along)} == {count}
        assert group_size(lattice.within(size)) == count


@given(sizes, st.sets(st.sampled_from(AXES)), st.integers(1, 40))
def test_being_alone_changes_neither_members_nor_who_shares_a_block(shape, along, size):
    lattice = mesh_group(tuple(zip(AXES, shape, strict=True)), along)
    only = replace(lattice, alone=True)
    assert not lattice.alone
    assert only != lattice
    assert (only.num_chips, only.highest) == (lattice.num_chips, lattice.highest)
    assert only.chips().tolist() == lattice.chips().tolist()
    assert sharing(only, size) == sharing(lattice, size)


@given(sizes)
def test_a_group_along_all_axes_has_no_other_copies(shape):
    axes = tuple(zip(AXES, shape, strict=True))
    everyone = mesh_group(axes, AXES)
    assert everyone.copies(prod(shape)).tolist() == [everyone.chips().tolist()]


@given(st.integers(1, 6), st.integers(1, 6))
def test_what_lies_in_a_block_has_copies_in_the_other_blocks(size, blocks):
    assert Lattice(((1, size * blocks),), alone=True).within(size) == mesh_group((("a", size),), ("a",))


def test_neighbouring_axes_are_one_longer_step():
    assert mesh_group((("pp", 2), ("dp", 4), ("tp", 8)), ("dp", "tp")) == Lattice(((1, 32),))


@pytest.mark.parametrize(("chips", "count"), [((0, 1, 4, 5), 2), ((0, 1, 4), None), ((3, 7), 1)])
def test_listed_members_are_counted_block_by_block(chips, count):
    assert sharing(chips, 4) == count
