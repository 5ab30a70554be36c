from collections import Counter
from math import prod

from hypothesis import given
from hypothesis import strategies as st

from orchestrator.runners.on_ray.assignment import assign, chips_of
from partitioner.program.program import Program

AXES = ("pp", "dp", "tp")


def program(sizes) -> Program:
    return Program(tuple(zip(AXES, sizes, strict=True)), 1, (), ())


meshes = st.tuples(*[st.integers(1, 4)] * 3)


@given(meshes, st.data())
def test_every_actor_has_chips_and_sizes_differ_by_at_most_one(sizes, data):
    num_actors = data.draw(st.integers(1, prod(sizes)))
    counts = Counter(assign(program(sizes), ["one"] * num_actors))
    assert set(counts) == set(range(num_actors))
    assert max(counts.values()) - min(counts.values()) <= 1


@given(meshes, st.data())
def test_actors_hold_whole_replicas_if_there_are_enough(sizes, data):
    made, dp = program(sizes), sizes[1]
    num_actors = data.draw(st.sampled_from([n for n in range(1, dp + 1) if dp % n == 0]))
    actor_of = assign(made, ["one"] * num_actors)
    for chip in range(made.num_chips):
        first = made.chip_at(made.coordinates(chip) | {"pp": 0, "tp": 0})
        assert actor_of[chip] == actor_of[first]


@given(st.integers(1, 4), st.integers(1, 4))
def test_without_replicas_actors_hold_whole_stages(pp, tp):
    made = program((pp, 1, tp))
    assert assign(made, ["one"] * pp) == tuple(made.coordinates(chip)["pp"] for chip in range(made.num_chips))


def test_one_chip_each_when_there_are_as_many_actors_as_chips():
    actor_of = assign(program((2, 2, 2)), ["one"] * 8)
    assert sorted(actor_of) == list(range(8))


def test_chips_of_an_actor_are_in_order():
    assert chips_of((0, 1, 0, 1), 1) == (1, 3)
