"""Spread: where samples lie in a shape follows from how far it is from one to the next, and back."""

import operator
from math import prod

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from partitioner.capture.samples.rules import BY_NAME, FAMILIES, rule_of
from partitioner.capture.samples.spread import NeedsWhole, Place, Position, Split, place_of, split_at

aten = torch.ops.aten
SHAPES = st.lists(st.integers(1, 6), min_size=1, max_size=4).map(tuple)


def brute_force(weight: int, shape: tuple[int, ...], samples: int) -> Place | None:
    """By the entry that lies `weight` entries after the first: along which dim, and how far.

    All samples must lie in that dim, over and over again.
    """
    if weight >= prod(shape):
        return None
    at, rest = [], weight
    for size in reversed(shape):
        at.append(rest % size)
        rest //= size
    at.reverse()
    moved = [dim for dim, place in enumerate(at) if place]
    if len(moved) != 1 or shape[moved[0]] % (at[moved[0]] * samples):
        return None
    return Place(moved[0], at[moved[0]])


@given(SHAPES, st.integers(1, 40), st.integers(2, 6))
def test_samples_lie_where_a_step_leads(shape: tuple[int, ...], weight: int, samples: int) -> None:
    found = place_of(Split(weight), shape, samples)
    assert found == place_of(Position(weight), shape, samples) == brute_force(weight, shape, samples)


@given(SHAPES, st.integers(1, 4), st.integers(2, 5), st.integers(1, 3), st.data())
def test_a_place_is_found_again(
    shape: tuple[int, ...], outer: int, samples: int, inner: int, data: st.DataObject
) -> None:
    dim = data.draw(st.integers(0, len(shape)))
    whole = (*shape[:dim], outer * samples * inner, *shape[dim:])
    assert place_of(split_at(dim, inner, whole), whole, samples) == Place(dim, inner)


def test_samples_have_a_place_in_empty_tensors_too() -> None:
    for shape in ((8, 0), (8, 0, 3), (8, 3, 0)):
        assert place_of(split_at(0, 1, shape), shape, 8) == Place(0, 1)


@given(SHAPES)
def test_the_first_dim_holds_samples_of_all_that_follows(shape: tuple[int, ...]) -> None:
    assert split_at(0, 1, shape).weight == prod(shape[1:])


def test_what_needs_whole_operands_names_each_once() -> None:
    assert NeedsWhole(["a", "b", "a"]).operands == ["a", "b"]  # type: ignore[list-item]


def test_no_operator_has_two_rules() -> None:
    names = [name for family in FAMILIES.values() for name in family.split()]
    assert len(names) == len(set(names)) == len(BY_NAME)


@pytest.mark.parametrize(
    ("target", "name"),
    [
        (aten.relu.default, "relu"),
        (aten.mm.default, "mm"),
        (aten.cat.default, "cat"),
        (operator.getitem, "getitem"),
    ],
)
def test_a_rule_is_found_by_the_name_of_an_operator(target: object, name: str) -> None:
    assert rule_of(target) is BY_NAME[name]


def test_what_torch_calls_pointwise_needs_no_name() -> None:
    assert "erfinv" not in BY_NAME
    assert rule_of(aten.erfinv.default) is BY_NAME["where"]
    assert rule_of(aten.cdist.default) is rule_of(len) is None
