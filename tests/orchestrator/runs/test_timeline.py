"""Timeline: canonical form, codec, soundness and the join of predicted with measured."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from random import Random
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from comms.errors import TimelineFormatError
from orchestrator.runs.accuracy import Basis, Pair, compare
from orchestrator.runs.run_dir import decode, encode
from orchestrator.runs.timeline import (
    LANES,
    Counter,
    Flow,
    Lane,
    Origin,
    Recorder,
    Span,
    Timeline,
)

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


@given(st.lists(spans, max_size=20), st.randoms())
def test_the_order_of_recording_does_not_matter(
    timeline_of: Callable[..., Timeline], values: list[Span], random: Random
) -> None:
    shuffled = random.sample(values, len(values))
    whole, other = timeline_of(Origin.MEASURED, values), timeline_of(Origin.MEASURED, shuffled)
    assert other == whole
    assert encode(other) == encode(whole)


def test_one_of_a_flow_that_both_ends_report_is_kept(timeline_of: Callable[..., Timeline]) -> None:
    flow = Flow(0, 0, 0, 1, 1, 2)
    assert tuple(timeline_of(Origin.MEASURED, (), [flow, flow]).flows) == (flow,)


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


def test_join_compares_matched_instructions_by_kind(
    timeline_of: Callable[..., Timeline], measured: Callable[..., Timeline]
) -> None:
    predicted = timeline_of(
        Origin.PREDICTED, [span(0, 8, instr=1), span(8, 10, instr=2), span(10, 11, instr=9)]
    )
    ran = (span(0, 5, instr=1), span(5, 10, instr=1), span(10, 14, instr=2), span(14, 15))
    accuracy = compare(predicted, measured(*ran), Basis.SECONDS)
    (row,) = accuracy.kinds
    assert (row.kind, row.num_matched, row.predicted_ns, row.measured_ns) == ("forward", 2, 10, 14)
    assert row.error == pytest.approx(-4 / 14)
    assert row.median_error == pytest.approx((0.2 + 0.5) / 2)
    assert (accuracy.only_predicted, accuracy.only_measured) == (1, 1)


@given(st.lists(spans.map(lambda span: span._replace(step=2)), min_size=1, max_size=15))
def test_join_of_a_timeline_with_itself_has_no_error(
    timeline_of: Callable[..., Timeline], values: list[Span]
) -> None:
    timeline = timeline_of(Origin.MEASURED, values)
    accuracy = compare(timeline, timeline, Basis.SECONDS)
    assert all(row.error == row.median_error == 0 for row in accuracy.kinds)
    assert (accuracy.only_predicted, accuracy.only_measured) == (0, 0)
    keys = {(v.step, v.chip, v.instr, v.microbatch) for v in values if v.instr >= 0}
    assert sum(row.num_matched for row in accuracy.kinds) == len(keys)


def test_a_launch_that_lasts_longer_than_its_work_counts_instead_of_it(
    timeline_of: Callable[..., Timeline], measured: Callable[..., Timeline]
) -> None:
    work, launch = span(0, 4, instr=1), Span(0, 0, Lane.HOST, "host", "f", 1, 0, 9)
    predicted = timeline_of(Origin.PREDICTED, [launch, work])
    (row,) = compare(predicted, measured(span(0, 9, instr=1)), Basis.SECONDS).kinds
    assert (row.kind, row.predicted_ns, row.error) == ("forward", 9, 0)


@pytest.mark.parametrize("basis", list(Basis))
def test_errors_in_time_are_told_of_the_described_chips_only_and_the_rest_always(
    timeline_of: Callable[..., Timeline], measured: Callable[..., Timeline], basis: Basis
) -> None:
    def sized(step: int, chip: int, instr: int, start_ns: int) -> Span:
        return Span(step, chip, Lane.COMPUTE, "forward", "f", instr, start_ns, start_ns + 5, 8, 3)

    places = [(0, 1, 0), (0, 2, 5), (1, 1, 0), (1, 2, 5)]
    swapped = [(0, 1, 0), (0, 2, 5), (1, 1, 5), (1, 2, 0)]
    predicted = timeline_of(Origin.PREDICTED, [sized(0, *place) for place in places])
    ran = [sized(2, *place) for place in places] + [sized(3, *place) for place in swapped]
    found = compare(predicted, measured(*ran), basis, (Pair(90, 100),)).document()
    assert (found["basis"], found["steps"], found["chips"], found["chips_in_order"]) == (basis, 2, 2, 1)
    assert found["bytes"] == {"predicted": 32, "measured": 32}
    assert found["flops"] == {"predicted": 12, "measured": 12}
    assert found["memory_bytes"] == [{"predicted": 90, "measured": 100}]
    row = found["kinds"]["forward"]  # type: ignore[index]
    assert (row["instructions"], row["predicted_share"], row["measured_share"]) == (4, 1.0, 1.0)
    assert row["error"] == (0.0 if basis is Basis.SECONDS else None)


def test_one_predicted_step_can_stand_for_every_measured_one(measured: Callable[..., Timeline]) -> None:
    steps = [Span(step, 0, Lane.COMPUTE, "forward", "f", 4, 0, 20) for step in (3, 4)]
    (row,) = compare(measured(span(0, 10, instr=4)), measured(*steps), Basis.SECONDS).kinds
    assert (row.num_matched, row.predicted_ns, row.measured_ns) == (2, 20, 40)


def test_a_hundred_thousand_spans_stay_small_in_memory_and_on_disk() -> None:
    recorder = Recorder(Origin.MEASURED)
    for number in range(100_000):
        place, name = (number // 4096, number % 8, Lane.COMPUTE), f"block {number % 32}"
        recorder.span(*place, "forward", name, number % 512, number * 10, number * 10 + 9)
    timeline = recorder.timeline()
    assert timeline.span_rows.nbytes < 60 * 100_000
    assert len(encode(timeline)) < 20 * 100_000


def test_spans_are_in_order_of_time(measured: Callable[..., Timeline]) -> None:
    timeline = measured(span(5, 6), span(0, 1), span(3, 4))
    assert [value.start_ns for value in timeline.spans] == [0, 3, 5]
    assert "3 spans" in repr(timeline)
    assert timeline != "something else"
