"""Timeline: canonical form, merge, codec, soundness, occupancy and the join of predicted with measured."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from comms.errors import TimelineFormatError
from orchestrator.runs.accuracy import join
from orchestrator.runs.occupancy import breakdown, union_ns
from orchestrator.runs.timeline import (
    LANES,
    Counter,
    Flow,
    Lane,
    Origin,
    Recorder,
    Span,
    Timeline,
    merge,
)
from orchestrator.runs.timeline_codec import decode, encode

INT = st.integers(0, 5)
spans = st.builds(
    lambda step, chip, lane, kind, name, instr, start, length, nbytes, flops, microbatch: Span(
        step, chip, lane, kind, name, instr, start, start + length, nbytes, flops, microbatch
    ),
    step=INT,
    chip=INT,
    lane=st.sampled_from(LANES),
    kind=st.sampled_from(("forward", "send", "all_reduce")),
    name=st.text(max_size=4),
    instr=st.integers(-1, 5),
    start=st.integers(-(2**40), 2**40),
    length=st.integers(0, 50),
    nbytes=st.integers(0, 2**62),
    flops=st.integers(0, 2**62),
    microbatch=st.integers(-1, 3),
)
flows = st.builds(
    Flow, step=INT, microbatch=INT, source_chip=INT, source_instr=INT, target_chip=INT, target_instr=INT
)
counters = st.builds(
    Counter,
    step=INT,
    chip=INT,
    name=st.text(max_size=4),
    at_ns=st.integers(0, 99),
    nbytes=st.integers(0, 2**60),
)
timelines = st.tuples(  # what `timeline_of` makes one of
    st.sampled_from(Origin),
    st.lists(spans, max_size=20),
    st.lists(flows, max_size=8),
    st.lists(counters, max_size=8),
    st.dictionaries(st.integers(0, 9), st.text(max_size=4), max_size=3),
)


def span(
    start: int, end: int, *, chip: int = 0, lane: Lane = Lane.COMPUTE, instr: int = 0, mb: int = -1
) -> Span:
    return Span(0, chip, lane, "forward", "fwd", instr, start, end, microbatch=mb)


@pytest.fixture(scope="session")
def measured(timeline_of: Callable[..., Timeline]) -> Callable[..., Timeline]:
    """A timeline of these spans."""
    return lambda *values: timeline_of(Origin.MEASURED, values)


@given(st.lists(spans, max_size=20), st.lists(flows, max_size=5), st.lists(counters, max_size=5))
def test_values_come_back_as_they_were_recorded(
    timeline_of: Callable[..., Timeline],
    given_spans: list[Span],
    given_flows: list[Flow],
    given_counters: list[Counter],
) -> None:
    timeline = timeline_of(Origin.PREDICTED, given_spans, given_flows, given_counters)
    assert sorted(map(repr, timeline.spans)) == sorted(map(repr, given_spans))
    assert set(timeline.flows) == set(given_flows)
    assert sorted(map(repr, timeline.counters)) == sorted(map(repr, given_counters))


@given(timelines)
def test_codec_round_trips_and_is_deterministic(
    timeline_of: Callable[..., Timeline], parts: Sequence[Any]
) -> None:
    timeline = timeline_of(*parts)
    data = encode(timeline)
    assert decode(data) == timeline
    assert encode(decode(data)) == data


@given(timelines, st.binary(min_size=1, max_size=3), st.integers(0, 10**6))
def test_damaged_bytes_are_refused_or_read_but_never_crash(
    timeline_of: Callable[..., Timeline], parts: Sequence[Any], junk: bytes, at: int
) -> None:
    data = bytearray(encode(timeline_of(*parts)))
    data[at % len(data) : at % len(data) + len(junk)] = junk
    with suppress(TimelineFormatError):
        decode(bytes(data))


@pytest.mark.parametrize("document", [[], {"format": "x"}, {"format": "orchestrate.timeline", "version": 99}])
def test_codec_refuses_what_is_not_its_format(document: object) -> None:
    with pytest.raises(TimelineFormatError):
        decode(msgpack.packb(document))


@given(st.lists(st.tuples(spans, st.integers(0, 3)), max_size=20), st.permutations(range(4)))
def test_merge_does_not_depend_on_who_recorded_what(
    timeline_of: Callable[..., Timeline], owned: list[tuple[Span, int]], order: list[int]
) -> None:
    whole = timeline_of(Origin.MEASURED, [value for value, _ in owned])
    parts = [
        timeline_of(Origin.MEASURED, [value for value, owner in owned if owner == actor]) for actor in order
    ]
    merged = merge([(part.shifted(-7 * number), 7 * number) for number, part in enumerate(parts)])
    assert merged == whole
    assert encode(merged) == encode(whole)


def test_merge_keeps_one_of_a_flow_that_both_ends_report(timeline_of: Callable[..., Timeline]) -> None:
    flow = Flow(0, 0, 0, 1, 1, 2)
    part = timeline_of(Origin.MEASURED, (), [flow])
    assert tuple(merge([(part, 0), (part, 5)]).flows) == (flow,)


def test_merge_refuses_two_names_for_one_chip_and_two_origins(timeline_of: Callable[..., Timeline]) -> None:
    one, other = (timeline_of(Origin.MEASURED, (), chips={0: name}) for name in "ab")
    with pytest.raises(ValueError, match="chip 0"):
        merge([(one, 0), (other, 0)])
    with pytest.raises(ValueError, match="one origin"):
        merge([(one, 0), (timeline_of(Origin.PREDICTED, ()), 0)])
    with pytest.raises(ValueError, match="at least one"):
        merge([])


def test_a_number_that_does_not_fit_its_column_is_an_error(timeline_of: Callable[..., Timeline]) -> None:
    with pytest.raises(ValueError, match="column step"):
        timeline_of(Origin.MEASURED, [Span(2**40, 0, Lane.COMPUTE, "forward", "f", 0, 0, 1)])


def test_at_step_and_from_zero_select_and_shift(timeline_of: Callable[..., Timeline]) -> None:
    values = [Span(step, 0, Lane.COMPUTE, "forward", "f", 0, 100 * step, 100 * step + 9) for step in (1, 2)]
    timeline = timeline_of(Origin.MEASURED, values, counters=[Counter(2, 0, "weights", 205, 1)])
    second = timeline.at_step(2).from_zero()
    assert timeline.steps == (1, 2)
    assert (second.start_ns, second.end_ns, second.counters[0].at_ns) == (0, 9, 5)
    assert second.texts == ("f", "forward", "weights")


def test_chips_without_a_name_are_named_by_number(timeline_of: Callable[..., Timeline]) -> None:
    timeline = timeline_of(Origin.MEASURED, [span(0, 1, chip=3)], chips={1: "host0/chip1"})
    assert timeline.chips == ((1, "host0/chip1"), (3, "chip 3"))


@given(st.lists(spans, max_size=12))
def test_overlaps_are_found_exactly_when_two_spans_share_a_nanosecond(
    violations: Callable[[Timeline], tuple[str, ...]], measured: Callable[..., Timeline], values: list[Span]
) -> None:
    def clash(a: Span, b: Span) -> bool:
        lower, upper = max(a.start_ns, b.start_ns), min(a.end_ns, b.end_ns)
        return (a.chip, a.lane) == (b.chip, b.lane) and lower < upper

    values = [
        span(v.start_ns % 90, v.start_ns % 90 + v.end_ns - v.start_ns, chip=v.chip, lane=v.lane)
        for v in values
    ]
    expected = any(clash(a, b) for i, a in enumerate(values) for b in values[:i])
    assert bool(violations(measured(*values))) == expected


def test_impossible_spans_and_flows_are_told(
    violations: Callable[[Timeline], tuple[str, ...]], timeline_of: Callable[..., Timeline]
) -> None:
    timeline = timeline_of(
        Origin.MEASURED,
        [
            span(5, 3),
            span(10, 20, lane=Lane.SEND, instr=1, mb=0),
            span(0, 9, chip=1, lane=Lane.RECV, instr=2, mb=0),
        ],
        [Flow(0, 0, 0, 1, 1, 2), Flow(0, 0, 0, 1, 7, 7)],
    )
    backwards, early, dangling = violations(timeline)
    assert "ends before it starts" in backwards
    assert "no span at one end" in dangling
    assert early.startswith("Span(step=0, chip=1")
    assert "ends before its send" in early


@given(st.lists(spans, max_size=15), st.sets(st.sampled_from(LANES), max_size=4))
def test_union_counts_each_busy_nanosecond_once(
    measured: Callable[..., Timeline], values: list[Span], lanes: set[Lane]
) -> None:
    values = [
        span(v.start_ns % 60, v.start_ns % 60 + v.end_ns - v.start_ns, chip=v.chip, lane=v.lane)
        for v in values
    ]
    busy = {(v.chip, ns) for v in values if v.lane in lanes for ns in range(v.start_ns, v.end_ns)}
    assert union_ns(measured(*values).span_rows, sorted(lanes)) == len(busy)


@given(st.lists(spans, max_size=15))
def test_breakdown_parts_sum_to_chip_time(measured: Callable[..., Timeline], values: list[Span]) -> None:
    parts = breakdown(measured(*values))
    known = parts.compute_ns + parts.optimizer_ns + parts.host_ns + parts.exposed_communication_ns
    assert known + parts.bubble_ns == parts.total_ns
    assert min(parts.compute_ns, parts.host_ns, parts.exposed_communication_ns, parts.bubble_ns) >= 0


def test_breakdown_counts_hidden_communication_as_compute(measured: Callable[..., Timeline]) -> None:
    timeline = measured(span(0, 10), span(5, 14, lane=Lane.DP), span(16, 20, lane=Lane.OPTIMIZER))
    parts = breakdown(timeline)
    assert (parts.compute_ns, parts.optimizer_ns, parts.exposed_communication_ns, parts.bubble_ns) == (
        10,
        4,
        4,
        2,
    )
    assert dict(parts.exposed_ns)[Lane.DP] == 4


def test_join_compares_matched_instructions_by_kind(
    timeline_of: Callable[..., Timeline], measured: Callable[..., Timeline]
) -> None:
    predicted = timeline_of(
        Origin.PREDICTED, [span(0, 8, instr=1), span(8, 10, instr=2), span(10, 11, instr=9)]
    )
    accuracy = join(
        predicted, measured(span(0, 5, instr=1), span(5, 10, instr=1), span(10, 14, instr=2), span(14, 15))
    )
    (row,) = accuracy.kinds
    assert (row.kind, row.num_matched, row.predicted_ns, row.measured_ns) == ("forward", 2, 10, 14)
    assert row.error == pytest.approx(-4 / 14)
    assert row.median_error == pytest.approx((0.2 + 0.5) / 2)
    assert (accuracy.only_predicted, accuracy.only_measured) == (1, 1)


@given(st.lists(spans, max_size=15))
def test_join_of_a_timeline_with_itself_has_no_error(
    timeline_of: Callable[..., Timeline], values: list[Span]
) -> None:
    timeline = timeline_of(Origin.MEASURED, values)
    accuracy = join(timeline, timeline)
    assert all(row.error == row.median_error == 0 for row in accuracy.kinds)
    assert (accuracy.only_predicted, accuracy.only_measured) == (0, 0)
    keys = {(v.step, v.chip, v.instr, v.microbatch) for v in values if v.instr >= 0}
    assert sum(row.num_matched for row in accuracy.kinds) == len(keys)


def test_one_predicted_step_can_stand_for_every_measured_one(measured: Callable[..., Timeline]) -> None:
    steps = [Span(step, 0, Lane.COMPUTE, "forward", "f", 4, 0, 20) for step in (3, 4)]
    (row,) = join(measured(span(0, 10, instr=4)), measured(*steps), every_step=True).kinds
    assert (row.num_matched, row.predicted_ns, row.measured_ns) == (2, 20, 40)
    with pytest.raises(ValueError, match="one step"):
        join(measured(*steps), measured(*steps), every_step=True)


def test_a_hundred_thousand_spans_stay_small_in_memory_and_on_disk() -> None:
    recorder = Recorder(Origin.MEASURED)
    for number in range(100_000):
        recorder.span(
            step=number // 4096, chip=number % 8, lane=Lane.COMPUTE, kind="forward",
            name=f"block {number % 32}", instr=number % 512, start_ns=number * 10, end_ns=number * 10 + 9,
        )  # fmt: skip
    timeline = recorder.timeline()
    assert timeline.span_rows.nbytes < 60 * 100_000
    assert len(encode(timeline)) < 20 * 100_000


def test_views_slice_and_spans_are_in_order_of_time(measured: Callable[..., Timeline]) -> None:
    timeline = measured(span(5, 6), span(0, 1), span(3, 4))
    assert [value.start_ns for value in timeline.spans[1:]] == [3, 5]
    assert "3 spans" in repr(timeline)
    assert timeline != "something else"
