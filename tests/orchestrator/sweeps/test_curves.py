"""Curves: efficiency, gain and knee by closed forms."""

from math import isclose

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.sweeps.curves import GAIN, curve, knee

COUNTS = [1 << power for power in range(15)]


def amdahl(serial: float, chips: int) -> float:
    return chips / (1 + serial * (chips - 1))


@given(st.floats(1.0, 1e9), st.lists(st.sampled_from(COUNTS), min_size=2, unique=True).map(sorted))
def test_ideal_throughput_is_full_efficiency_and_has_no_knee(rate: float, counts: list[int]) -> None:
    points = curve([(chips, rate * chips) for chips in counts])
    assert all(isclose(point.efficiency, 1.0) for point in points)
    assert all(isclose(point.gain or 0.0, 1.0) for point in points[1:])
    assert knee(points) is None


@given(st.floats(1e-4, 0.5))
def test_the_knee_of_amdahls_law_is_where_the_formula_has_it(serial: float) -> None:
    points = curve([(chips, amdahl(serial, chips)) for chips in COUNTS])
    small = [n for n in COUNTS[:-1] if amdahl(serial, 2 * n) / amdahl(serial, n) - 1 < GAIN]
    assert knee(points) == (small[0] if small else None)


@given(st.floats(1e-4, 0.5), st.integers(1, 3))
def test_the_gain_of_a_doubling_does_not_depend_on_how_far_apart_points_are(
    serial: float, apart: int
) -> None:
    steady = [(chips, chips**0.7) for chips in COUNTS[::apart]]
    assert all(isclose(point.gain or 0.0, 2**0.7 - 1, rel_tol=1e-9) for point in curve(steady)[1:])


def test_speed_up_is_against_the_first_point_and_efficiency_per_chip() -> None:
    first, second = curve([(8, 100.0), (32, 300.0)])
    assert (first.speed_up, first.efficiency, first.gain) == (1.0, 1.0, None)
    assert (second.speed_up, second.efficiency) == (3.0, 0.75)
    assert second.gain == pytest.approx(3**0.5 - 1)


def test_a_dip_before_a_rise_is_no_knee() -> None:
    assert knee(curve([(1, 1.0), (2, 1.01), (4, 2.0), (8, 2.01)])) == 4
    assert knee(curve([(1, 1.0), (2, 1.01), (4, 2.0)])) is None
