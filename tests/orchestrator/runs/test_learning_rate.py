"""Learning rate: its three shapes against closed forms, and the corners where a step could be lost."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.config.job_file import LrScheduleSection, LrShape
from orchestrator.runs.learning_rate import learning_rate

shapes = st.sampled_from(list(LrShape))


def rates(shape: LrShape, warmup: int, steps: int, floor: float = 0.1, peak: float = 2.0) -> list[float]:
    schedule = LrScheduleSection(name=shape, warmup_steps=warmup, min_lr_ratio=floor)
    return [learning_rate(step, peak=peak, schedule=schedule, steps=steps) for step in range(steps)]


def test_warmup_climbs_linearly_and_no_step_is_at_rate_zero() -> None:
    assert rates(LrShape.CONSTANT, 4, 6) == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0]


def test_linear_ends_at_the_floor_on_the_last_step() -> None:
    assert rates(LrShape.LINEAR, 0, 5, floor=0.0) == [2.0, 1.5, 1.0, 0.5, 0.0]


def test_cosine_is_halfway_in_the_middle_and_ends_at_the_floor() -> None:
    found = rates(LrShape.COSINE, 2, 13)
    assert found[2] == 2.0
    assert found[7] == pytest.approx((2.0 + 0.2) / 2)
    assert found[12] == pytest.approx(0.2)
    assert found[4] == pytest.approx(0.2 + 1.8 * (1 + math.cos(math.pi * 0.2)) / 2)


@given(shape=shapes, warmup=st.integers(0, 20), steps=st.integers(1, 40), floor=st.floats(0, 1))
def test_rate_rises_then_never_rises_again_and_stays_within_bounds(
    shape: LrShape, warmup: int, steps: int, floor: float
) -> None:
    found = rates(shape, warmup, steps, floor)
    climb, rest = found[:warmup], found[warmup:]
    assert climb == sorted(climb)
    assert rest == sorted(rest, reverse=True)
    assert all(0 <= rate <= 2.0 + 1e-12 for rate in found)


@given(shape=shapes, step=st.integers(10, 100))
def test_rate_stays_put_past_the_last_step(shape: LrShape, step: int) -> None:
    schedule = LrScheduleSection(name=shape, warmup_steps=2, min_lr_ratio=0.1)
    last = learning_rate(9, peak=1.0, schedule=schedule, steps=10)
    assert learning_rate(step, peak=1.0, schedule=schedule, steps=10) == last
