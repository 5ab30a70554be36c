"""Plans survive their file, bad ones say what is wrong, and stages are balanced as well as can be."""

from itertools import combinations, pairwise

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from comms.errors import PartitionError
from partitioner.layout.parallel_plan import Plan, balance, plan_from_yaml, plan_to_yaml
from partitioner.layout.pipeline_schedules import PipelineSchedule

DEGREES = st.integers(1, 64)
COSTS = st.lists(st.integers(0, 20).map(float), min_size=1, max_size=9)


@given(data=st.data())
def test_a_plan_reads_back_equal(data):
    pp = data.draw(st.integers(1, 6))
    plan = Plan(
        dp=data.draw(DEGREES),
        tp=data.draw(DEGREES),
        pp=pp,
        zero=data.draw(st.integers(0, 1)),
        schedule=data.draw(st.sampled_from(PipelineSchedule)),
        microbatches=data.draw(DEGREES),
        stages=data.draw(st.sampled_from([(), tuple(range(1, pp + 1))])),
        bucket_bytes=data.draw(st.integers(1, 10**9)),
    )
    assert plan_from_yaml(plan_to_yaml(plan)) == plan


def test_the_file_is_a_flat_mapping_people_can_edit():
    raw = yaml.safe_load(plan_to_yaml(Plan(dp=2, tp=4)))
    assert (raw["kind"], raw["dp"], raw["tp"], raw["schedule"]) == ("plan", 2, 4, "1f1b")


def test_keys_left_out_have_defaults():
    assert plan_from_yaml("{kind: plan, version: 1, tp: 2}") == Plan(tp=2)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("dp: 2", "not a plan file"),
        ("{kind: plan, version: 99}", "a plan file of version 99"),
        ("{kind: plan, version: true}", "not a plan file"),
        ("{kind: plan, version: 1, 5: 2}", "unknown key 5"),
        ("{kind: plan, version: 1, dp: !!int ''}", "not YAML"),
        ("{kind: plan, version: 1, dp: !!timestamp x}", "not YAML"),
        ("{kind: plan, version: 1, dp: 0x" + "f" * 5000 + "}", "a number of thousands of digits"),
        ("{kind: plan, version: 1, dp: 1000000000000000}", "dp must be from 0 to 1099511627776"),
        ("{kind: plan, version: 1, schedule: [1f1b]}", "schedule cannot be"),
        ("{kind: plan, version: 1, stages: [1.0]}", "stages must be a whole number"),
        ("[1, 2]", "not a plan file"),
        ("", "not a plan file"),
        ("a: [", "not YAML"),
        ("a: " + "[" * 3000, "not YAML"),
        ("{kind: plan, version: 1, dq: 2}", "unknown key 'dq'"),
        ("{kind: plan, version: 1, dp: two}", "dp must be a whole number"),
        ("{kind: plan, version: 1, dp: true}", "dp must be a whole number"),
        ("{kind: plan, version: 1, dp: 2.5}", "dp must be a whole number"),
        ("{kind: plan, version: 1, dp: 0}", "dp is 0"),
        ("{kind: plan, version: 1, microbatches: -1}", "microbatches must be from 0 to"),
        ("{kind: plan, version: 1, zero: 3}", "zero is 3"),
        ("{kind: plan, version: 1, schedule: zigzag}", "zigzag"),
        ("{kind: plan, version: 1, pp: 3, stages: [1, 2]}", "2 stages listed for pp = 3"),
        ("{kind: plan, version: 1, stages: 5}", "stages must be a list of whole numbers, not 5"),
    ],
)
def test_bad_plans_say_what_is_wrong(text, said):
    with pytest.raises(PartitionError, match=said):
        plan_from_yaml(text, where="my.yaml")


def test_axes_are_slowest_first_and_multiply_to_the_chips():
    plan = Plan(dp=3, tp=4, pp=2)
    assert plan.axes == (("pp", 2), ("dp", 3), ("tp", 4))
    assert plan.num_chips == 24


@given(costs=COSTS, data=st.data())
def test_balance_is_as_good_as_trying_every_cut(costs, data):
    stages = data.draw(st.integers(1, len(costs)))
    sizes = balance(costs, stages)
    assert sum(sizes) == len(costs)
    assert len(sizes) == stages
    assert min(sizes) >= 1
    assert worst(costs, sizes) == min(worst(costs, cuts) for cuts in every_cut(len(costs), stages))


def worst(costs: list[float], sizes: tuple[int, ...]) -> float:
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    return max(sum(costs[end - size : end]) for end, size in zip(ends, sizes, strict=True))


def every_cut(count: int, stages: int) -> list[tuple[int, ...]]:
    found = []
    for inner in combinations(range(1, count), stages - 1):
        borders = (0, *inner, count)
        found.append(tuple(b - a for a, b in pairwise(borders)))
    return found


def test_more_stages_than_pieces_is_refused():
    with pytest.raises(PartitionError, match="2 pieces for 3 pipeline stages"):
        balance([1.0, 1.0], 3)
