"""Pipeline time: closed forms where there are some, and the followed start of a long pipeline tells its end."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.runners.timing import pipeline_time
from orchestrator.runners.timing.pipeline_time import StageTimes, ends_of_stages
from partitioner.layout.pipeline_schedules import PipelineSchedule

STAGES, MICROBATCHES = st.integers(1, 6), st.integers(1, 24)
SECONDS = st.floats(0.1, 3.0)
SCHEDULES = st.sampled_from(PipelineSchedule)


@given(STAGES, MICROBATCHES, SECONDS, SECONDS, SCHEDULES)
def test_equal_stages_without_transfers_have_the_bubble_of_the_books(
    stages: int, microbatches: int, forward: float, backward: float, schedule: PipelineSchedule
) -> None:
    ends = ends_of_stages([StageTimes(forward, backward, 0.0, 0.0)] * stages, microbatches, schedule)
    assert max(ends) == pytest.approx((microbatches + stages - 1) * (forward + backward))
    assert ends == sorted(ends, reverse=True)


@given(MICROBATCHES, SECONDS, SECONDS, SECONDS, SECONDS, SECONDS)
def test_two_stages_under_gpipe(
    m: int, one: float, two: float, back: float, other: float, move: float
) -> None:
    stages = [StageTimes(one, back, move, 0.0), StageTimes(two, other, 0.0, move)]
    ends = ends_of_stages(stages, m, PipelineSchedule.GPIPE)
    forwards = one + move + two + (m - 1) * max(one, two, move)
    assert max(ends) == pytest.approx(
        forwards + other + move + back + (m - 1) * max(back, other, move), rel=0.35
    )
    assert max(ends) >= m * max(one + back, two + other) - 1e-9


@settings(max_examples=30)
@given(st.lists(st.tuples(SECONDS, SECONDS, SECONDS, SECONDS), min_size=2, max_size=3), SCHEDULES)
def test_what_is_followed_tells_the_rest(
    rows: list[tuple[float, float, float, float]], schedule: PipelineSchedule
) -> None:
    stages = [StageTimes(f, b, s / 10, r / 10) for f, b, s, r in rows]
    with pytest.MonkeyPatch.context() as patch:
        quick = ends_of_stages(stages, 48, schedule)
        patch.setattr(pipeline_time, "MORE", 48)
        whole = ends_of_stages(stages, 48, schedule)
    assert quick == pytest.approx(whole, rel=0.03)
