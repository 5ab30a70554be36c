"""Plots: legible facts are in the picture, the same input gives the same bytes, odd input is drawn."""

import io
import math
from collections.abc import Callable
from itertools import pairwise

import pytest

from orchestrator.runs.timeline import Lane, Origin, Span, Timeline
from orchestrator.views.plots import (
    KIND_COLOURS,
    Gantt,
    blank_figure,
    colours_of,
    draw_gantt,
    loss_png,
    timeline_png,
)

TRAIN = tuple((step, 2 + 3 * math.exp(-step / 20)) for step in range(1, 61))
CURVES = (TRAIN, ((30, 3.0), (60, 2.4)), {"unigram": 3.1, "bigram": 2.5, "trigram": 2.49})


@pytest.fixture
def step(timeline_of: Callable[..., Timeline]) -> Callable[..., Timeline]:
    """One step of some chips."""

    def make(origin: Origin, *, chips: int = 2, scale: int = 1000, kind: str = "forward") -> Timeline:
        spans = []
        for chip in range(chips):
            spans += [
                Span(4, chip, Lane.COMPUTE, kind, "f", 0, 50 * scale, 80 * scale, microbatch=0),
                Span(4, chip, Lane.DP, "all_reduce", "g", 1, 80 * scale, 99 * scale),
                Span(4, chip, Lane.OPTIMIZER, "optimizer", "o", 2, 99 * scale, 100 * scale),
            ]
        return timeline_of(origin, spans)

    return make


def size(png: bytes) -> tuple[int, int]:
    from matplotlib.image import imread

    height, width, _ = imread(io.BytesIO(png)).shape
    return width, height


def test_the_same_curves_give_the_same_bytes_without_a_date() -> None:
    first = loss_png(*CURVES)
    assert first == loss_png(*CURVES)
    assert size(first)[0] > 1000
    assert b"tEXt" not in first


@pytest.mark.parametrize("curve", [(), ((1, 5.0),), ((1, 5.0), (2, math.nan), (3, math.inf))])
def test_short_and_broken_runs_are_drawn(curve: tuple[tuple[int, float], ...]) -> None:
    assert loss_png(curve, (), {}).startswith(b"\x89PNG")


def test_predicted_above_measured_is_taller_than_one_and_deterministic(step: Callable[..., Timeline]) -> None:
    one = timeline_png([step(Origin.PREDICTED)])
    two = timeline_png([step(Origin.PREDICTED), step(Origin.MEASURED, scale=90_000)])
    assert size(two)[1] > 1.4 * size(one)[1]
    assert two == timeline_png([step(Origin.PREDICTED), step(Origin.MEASURED, scale=90_000)])


@pytest.mark.parametrize("origin", list(Origin))
def test_of_two_machines_each_panel_is_in_shares_of_its_own_step(
    step: Callable[..., Timeline], origin: Origin
) -> None:
    axes = blank_figure(5.0, 5.0).add_subplot()
    gantt = Gantt(step(origin, scale=90_000).from_zero())
    draw_gantt(axes, gantt, colours_of(gantt.kinds), gantt.timeline.duration_ns, by_shares=True)
    assert axes.get_xlim() == pytest.approx((0, 100))
    assert axes.get_xlabel() == "share of the step (%)"
    whose = "on the chips described" if origin is Origin.PREDICTED else "simulated on this machine"
    assert whose in axes.get_title(loc="left")


def test_zero_long_spans_and_unknown_kinds_are_drawn(step: Callable[..., Timeline]) -> None:
    assert timeline_png([step(Origin.MEASURED, scale=0), step(Origin.PREDICTED, kind="scan")]).startswith(
        b"\x89PNG"
    )


def test_rows_are_used_lanes_and_the_optimizer_shares_the_row_of_compute(
    step: Callable[..., Timeline],
) -> None:
    gantt = Gantt(step(Origin.MEASURED, chips=20))
    assert gantt.chips == tuple(range(16))
    assert len(gantt.rows) == 2 * 16
    lanes = list(Lane)
    assert gantt.row(3, lanes.index(Lane.OPTIMIZER)) == gantt.row(3, lanes.index(Lane.COMPUTE))
    edges = sorted(gantt.rows.values())
    assert all(upper[1] <= lower[0] for upper, lower in pairwise(edges))


def test_kinds_that_are_not_ours_get_colours_of_their_own() -> None:
    colours = colours_of({"forward", "scan", "sort"})
    assert list(colours) == ["forward", "scan", "sort"]
    assert colours["forward"] == KIND_COLOURS["forward"]
    assert len(set(colours.values())) == 3
