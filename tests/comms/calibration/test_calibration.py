"""Calibration: constants are found again, predict what they have not seen, and carry over to other fabrics."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from comms.calibration.calibration import (
    LARGE_NBYTES,
    Constants,
    MeasuredRun,
    Sheet,
    fit_fabric,
    fit_link,
    geometries,
    hold_out,
    mean_error,
    predict,
    residuals_of,
    transfer,
)
from comms.calibration.measured_tables import MeasuredCurve, MeasuredPoint, bus_factor, read_csv
from comms.collectives.schedule import Op
from comms.errors import CommsError
from comms.networks.links import Link
from comms.units import Quantity, parse

PUBLISHED = yaml.safe_load((Path(__file__).parent / "nccl_curves.yaml").read_text())
SHEET = Sheet(300e9)
SIZES = 2.0 ** np.arange(10, 34)
CONSTANTS = Constants(setup_s=30e-6, latency_s=0.6e-6, share=0.8)


def error_of(fit):
    """Over all curves of a fit."""
    return mean_error(each for curve in fit.residuals for each in curve)


def published_sheet(row) -> Sheet:
    rate = parse(row["line_rate"], Quantity.DATA_RATE) if "line_rate" in row else None
    return Sheet(rate, row.get("in_network_share"))


RUNS = {
    row["name"]: MeasuredRun(
        read_csv(row["table"], row["name"], Op(row["op"]), row["num_chips"]), published_sheet(row)
    )
    for row in PUBLISHED["curves"]
}


def measured(
    constants: Constants, sheet: Sheet, op: Op = Op.ALL_REDUCE, num_chips: int = 8, sizes=SIZES
) -> MeasuredRun:
    seconds = predict(constants.on(sheet), op, num_chips, sizes)
    points = tuple(MeasuredPoint(float(n), float(s)) for n, s in zip(sizes, seconds, strict=True))
    return MeasuredRun(MeasuredCurve(op, num_chips, points), sheet)


@given(st.floats(1e-8, 1e-4), st.floats(1.0, 1e12), st.integers(2, 64))
def test_the_pipelined_form_is_that_of_the_best_number_of_pieces(latency, nbytes, num_chips):
    ((stages, wire, _),) = geometries(Op.ALL_REDUCE, num_chips, None)
    moving = nbytes * wire / 300e9
    pieces = np.geomspace(1e-6, 1e9, 40001)
    brute = np.min((stages + pieces) * (latency + moving / pieces))
    fabric = Constants(0.0, latency, 1.0).on(SHEET)
    assert predict(fabric, Op.ALL_REDUCE, num_chips, np.array([nbytes]))[0] == pytest.approx(brute, rel=1e-6)


@pytest.mark.parametrize("op", [op for op in Op if op is not Op.BARRIER])
@pytest.mark.parametrize("switch", [None, 0.8])
def test_large_messages_go_at_the_fitted_rate_and_small_ones_at_the_setup(op, switch):
    fabric = CONSTANTS.on(Sheet(300e9, switch))
    small, large = predict(fabric, op, 8, np.array([1.0, 1e15]))
    assert small == pytest.approx(
        30e-6 + 0.6e-6 * min(stages for stages, _, _ in geometries(op, 8, switch)), rel=1e-2
    )
    assert large == pytest.approx(
        min(1e15 * wire / (0.8 * 300e9 * share) for _, wire, share in geometries(op, 8, switch)), rel=1e-2
    )
    if switch is None:
        assert 1e15 / large * bus_factor(op, 8) == pytest.approx(0.8 * 300e9, rel=1e-2)


def test_a_reducing_switch_beats_the_ring_and_two_chips_need_none():
    ring, switch = CONSTANTS.on(SHEET), CONSTANTS.on(Sheet(300e9, 0.85))
    large = np.array([1e12])
    assert predict(switch, Op.ALL_REDUCE, 8, large) < 0.8 * predict(ring, Op.ALL_REDUCE, 8, large)
    assert predict(switch, Op.ALL_REDUCE, 2, large) == predict(ring, Op.ALL_REDUCE, 2, large)
    assert predict(switch, Op.ALL_TO_ALL, 8, large) == predict(ring, Op.ALL_TO_ALL, 8, large)


@settings(max_examples=15)
@given(
    st.floats(2e-6, 1e-3), st.floats(0.05, 0.8), st.floats(0.3, 0.9), st.sampled_from([2, 4, 8, 32]),
    st.sampled_from([1e9, 300e9]),
)  # fmt: skip
def test_constants_are_found_again(setup, latency_over_setup, share, num_chips, rate):
    latency = latency_over_setup * setup / (2 * (num_chips - 1))
    true = Constants(setup, latency, share)
    knee = setup * rate * share
    fit = fit_fabric(
        [measured(true, Sheet(rate), num_chips=num_chips, sizes=knee * 2.0 ** np.arange(-12, 12))]
    )
    assert error_of(fit) < 0.01
    found = fit.constants.setup_s + fit.constants.latency_s * 2 * (num_chips - 1)
    assert found == pytest.approx(setup * (1 + latency_over_setup), rel=0.03)  # beliefs pull a little
    assert fit.constants.share == pytest.approx(share, rel=0.05)


def test_an_eager_protocol_is_found_again_and_only_where_asked_for():
    true = Constants(20e-6, 1e-6, 0.85, eager_share=0.1, handshake_s=2e-6)
    runs = [measured(true, SHEET, num_chips=n) for n in (2, 8)]
    plain, both = fit_fabric(runs), fit_fabric(runs, eager=True)
    assert (plain.constants.num_constants, both.constants.num_constants) == (3, 5)
    assert error_of(both) < 0.01 < error_of(plain)
    assert both.constants.eager_share == pytest.approx(0.1, rel=0.1)
    assert both.constants.latency_s == pytest.approx(1e-6, rel=0.2)


@settings(max_examples=10)
@given(st.floats(0.01, 100.0))
def test_scaling_all_times_scales_the_constants(factor):
    run = RUNS["a100-8"]
    points = tuple(replace(point, seconds=point.seconds * factor) for point in run.curve.points)
    slower = MeasuredRun(replace(run.curve, points=points), Sheet(300e9 / factor))
    before, after = fit_fabric([run]).constants, fit_fabric([slower]).constants
    assert after.setup_s == pytest.approx(before.setup_s * factor, rel=1e-3)
    assert after.latency_s == pytest.approx(before.latency_s * factor, rel=1e-2)
    assert after.share == pytest.approx(before.share, rel=1e-3)


@given(
    st.sampled_from(sorted(set(Op) - {Op.BARRIER})), st.integers(2, 64), st.booleans(), st.floats(1.0, 1e12)
)
def test_more_bytes_less_rate_or_more_latency_are_never_faster(op, num_chips, eager, nbytes):
    constants = replace(CONSTANTS, eager_share=0.3 if eager else None, handshake_s=1e-6 if eager else 0.0)
    sizes = np.array([nbytes, 1.5 * nbytes])
    base = predict(constants.on(SHEET), op, num_chips, sizes)
    assert base[0] < base[1]
    for worse in (replace(constants, latency_s=1e-6), replace(constants, share=0.5)):
        assert np.all(predict(worse.on(SHEET), op, num_chips, sizes) >= base)


def test_the_same_runs_give_the_same_constants():
    assert fit_fabric([RUNS["h100-8"]], eager=True) == fit_fabric([RUNS["h100-8"]], eager=True)


def test_what_is_held_out_is_not_seen():
    run = RUNS["a100-8"]
    points = tuple(
        replace(point, seconds=point.seconds * 7) if i % 2 else point
        for i, point in enumerate(run.curve.points)
    )
    (honest,), (spoilt,) = (
        hold_out([run]),
        hold_out([MeasuredRun(replace(run.curve, points=points), run.sheet)]),
    )
    assert [each.predicted_s for each in honest] == [each.predicted_s for each in spoilt]
    assert [each.nbytes for each in honest] == [point.nbytes for point in points[1::2]]


def test_coarsely_printed_points_weigh_less():
    run = measured(CONSTANTS, SHEET)
    off = tuple(
        replace(p, seconds=p.seconds * 1.12, rounding=0.0 if p.nbytes >= 8192 else 0.125)
        if p.nbytes < 8192 else p for p in run.curve.points
    )  # fmt: skip
    trusted = tuple(replace(point, rounding=0.0) for point in off)
    careful, naive = (
        fit_fabric([MeasuredRun(replace(run.curve, points=each), SHEET)]) for each in (off, trusted)
    )
    wrong = [abs(fit.constants.setup_s / CONSTANTS.setup_s - 1) for fit in (careful, naive)]
    assert wrong[0] < 0.6 * wrong[1]


@pytest.mark.parametrize(
    ("name", "first"),
    [
        (name, first)
        for name, run in RUNS.items()
        for first in (1, 0)
        if len(run.curve.points[1 - first :: 2]) > 3
    ],
)
def test_three_constants_predict_every_second_point_of_a_published_curve(name, first):
    run = RUNS[name]
    (left,) = hold_out([run], first=first)
    large, small = mean_error(left, LARGE_NBYTES), mean_error(left, below=LARGE_NBYTES)
    assert not large > 0.10
    assert not small > 0.25


@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize("names", [("a100-2", "a100-4"), ("v100-2", "v100-4", "v100-8")])
def test_one_set_of_constants_holds_for_all_numbers_of_chips(names, eager):
    for left in hold_out([RUNS[name] for name in names], eager=eager):
        assert mean_error(left) < 0.10


@pytest.mark.parametrize(
    ("known", "other"),
    [(("a100-8",), "h100-8"), (("a100-8",), "b200-8"), (("h100-8",), "a100-8"), (("a100-4",), "a100-8"),
     (("a100-2",), "a100-8"), (("a100-8",), "a100-2"), (("v100-2", "v100-4", "v100-8"), "a100-8"),
     (("v100-2", "v100-4", "v100-8"), "a100-4"), (("a100-8",), "v100-8"), (("v100-4",), "v100-8")],
)  # fmt: skip
def test_one_fabric_follows_from_another_and_its_sheet(known, other):
    fit = fit_fabric([RUNS[name] for name in known])
    left = residuals_of(transfer(fit, RUNS[other].sheet), RUNS[other].curve)
    assert mean_error(left) < 0.20


def test_without_a_line_rate_a_fit_predicts_but_does_not_carry_over():
    run = MeasuredRun(RUNS["a100-8"].curve, Sheet(None))
    fit = fit_fabric([run])
    assert error_of(fit) == pytest.approx(error_of(fit_fabric([RUNS["a100-8"]])), abs=0.01)
    with pytest.raises(CommsError, match="without a line rate"):
        transfer(fit, SHEET)


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        ([measured(CONSTANTS, SHEET, sizes=SIZES[:3])], "4 sizes or more"),
        ([measured(CONSTANTS, SHEET), replace(measured(CONSTANTS, SHEET), sheet=Sheet(None))], "some sheets"),
        ([replace(measured(CONSTANTS, SHEET), sheet=Sheet(-1.0))], "above 0"),
        ([replace(measured(CONSTANTS, SHEET), sheet=Sheet(1.0, 2.0))], "in-network share"),
        ([MeasuredRun(MeasuredCurve(None, 2, RUNS["a100-8"].curve.points), SHEET)], "chip to chip"),
        ([MeasuredRun(MeasuredCurve(Op.BARRIER, 8, RUNS["a100-8"].curve.points), SHEET)], "moves no bytes"),
    ],
)
def test_what_cannot_be_fitted_says_why(runs, message):
    with pytest.raises(CommsError, match=message) as error:
        fit_fabric(runs)
    assert error.value.hint


@given(st.floats(1e-8, 1e-2), st.floats(1e6, 1e12))
def test_a_link_is_found_again(latency, rate):
    link = Link(latency, rate)
    knee = latency * rate
    points = [MeasuredPoint(knee * 2.0**k, link.seconds(knee * 2.0**k)) for k in range(-6, 7)]
    fit = fit_link(points)
    assert fit.link.latency_s == pytest.approx(latency, rel=1e-3)
    assert fit.link.bytes_per_s == pytest.approx(rate, rel=1e-3)
    assert mean_error(fit.residuals) < 1e-3


def test_a_link_needs_two_sizes():
    with pytest.raises(CommsError, match="two sizes"):
        fit_link([MeasuredPoint(8, 1e-6), MeasuredPoint(8, 1.1e-6)])


def test_errors_are_relative_and_split_by_size():
    fit = fit_fabric([RUNS["a100-8"]])
    (left,) = fit.residuals
    assert all(each.error == each.predicted_s / each.measured_s - 1 for each in left)
    below, above = (
        [each for each in left if each.nbytes < 2**20],
        [each for each in left if each.nbytes >= 2**20],
    )
    assert mean_error(left) == pytest.approx(
        (mean_error(below) * len(below) + mean_error(above) * len(above)) / len(left)
    )
    assert math.isnan(mean_error([]))
