"""Perfetto: the trace is valid JSON, exact to the nanosecond, and the same every time."""

import gzip
import json
from collections import Counter as Count
from collections.abc import Callable
from typing import Any

import pytest

from orchestrator.runs.timeline import Counter, Flow, Lane, Origin, Span, Timeline
from orchestrator.views.perfetto import trace_gz

SPANS = (
    Span(0, 0, Lane.COMPUTE, "forward", 'block "0"', 1, 1_000_001, 1_002_500, 10, 20, 3),
    Span(0, 0, Lane.SEND, "send", "send h", 2, 1_002_500, 1_003_000, 64, 0, 3),
    Span(0, 11, Lane.RECV, "recv", "recv h", 7, 1_002_600, 1_003_100, 64, 0, 3),
)


@pytest.fixture
def timeline(timeline_of: Callable[..., Timeline]) -> Callable[..., Timeline]:
    """Of the spans above, with a flow, a counter and a name."""
    counters = [Counter(0, 0, "weights", 1_000_001, 99)]
    return lambda origin: timeline_of(origin, SPANS, [Flow(0, 3, 0, 2, 11, 7)], counters, {0: "host0/chip0"})


def events(*timelines: Timeline) -> list[dict[str, Any]]:
    document = json.loads(gzip.decompress(trace_gz(*timelines)))
    return list(document["traceEvents"])


def test_same_timelines_give_the_same_bytes(timeline: Callable[..., Timeline]) -> None:
    both = (timeline(Origin.PREDICTED), timeline(Origin.MEASURED))
    assert trace_gz(*both) == trace_gz(*both)


def test_spans_carry_their_facts_in_microseconds_from_the_first_start(
    timeline: Callable[..., Timeline],
) -> None:
    (event,) = (event for event in events(timeline(Origin.MEASURED)) if event.get("cat") == "forward")
    assert (event["pid"], event["tid"], event["ts"], event["dur"]) == (0, 0, 0, 2.499)
    assert event["name"] == 'block "0"'
    assert event["args"] == {"step": 0, "bytes": 10, "flops": 20, "instr": 1, "microbatch": 3}


def test_no_nanosecond_is_lost_after_a_day(timeline_of: Callable[..., Timeline]) -> None:
    day = 86_400 * 10**9
    late = timeline_of(
        Origin.MEASURED, [SPANS[0], Span(0, 0, Lane.COMPUTE, "loss", "l", -1, day + 1, day + 2)]
    )
    text = gzip.decompress(trace_gz(late)).decode()
    assert f'"ts":{(day - 1_000_000) // 1000}.000,"dur":0.001' in text
    assert '"instr"' not in text.split('"cat":"loss"')[1]


def test_a_transfer_is_a_pair_of_flow_events_inside_its_spans(timeline: Callable[..., Timeline]) -> None:
    trace = events(timeline(Origin.MEASURED))
    (start,), (finish,) = ([event for event in trace if event["ph"] == phase] for phase in "sf")
    assert start["id"] == finish["id"]
    assert (start["pid"], finish["pid"], finish["bp"]) == (0, 11, "e")
    send, recv = (next(event for event in trace if event.get("cat") == kind) for kind in ("send", "recv"))
    assert send["ts"] <= start["ts"] < send["ts"] + send["dur"]
    assert recv["ts"] <= finish["ts"] < recv["ts"] + recv["dur"]


def test_predicted_is_above_measured_in_processes_of_its_own(timeline: Callable[..., Timeline]) -> None:
    trace = events(timeline(Origin.PREDICTED), timeline(Origin.MEASURED))
    names = {event["pid"]: event["args"]["name"] for event in trace if event["name"] == "process_name"}
    assert names == {
        0: "predicted | host0/chip0",
        11: "predicted | chip 11",
        100: "measured | host0/chip0",
        111: "measured | chip 11",
    }
    order = {
        event["pid"]: event["args"]["sort_index"] for event in trace if event["name"] == "process_sort_index"
    }
    assert sorted(order, key=lambda pid: order[pid]) == [0, 11, 100, 111]
    assert Count(event["ph"] for event in trace if event["ph"] in "XsfC") == {"X": 6, "s": 2, "f": 2, "C": 2}
    assert len({event["id"] for event in trace if event["ph"] == "s"}) == 2


def test_threads_are_lanes_that_are_used_and_counters_are_bytes(timeline: Callable[..., Timeline]) -> None:
    trace = events(timeline(Origin.MEASURED))
    threads = {(event["pid"], event["args"]["name"]) for event in trace if event["name"] == "thread_name"}
    assert threads == {(0, "compute"), (0, "send"), (11, "recv")}
    (counter,) = (event for event in trace if event["ph"] == "C")
    assert (counter["name"], counter["args"], counter["ts"]) == ("weights", {"bytes": 99}, 0)


def test_a_flow_without_a_span_draws_no_arrow(timeline_of: Callable[..., Timeline]) -> None:
    broken = timeline_of(Origin.MEASURED, SPANS[:1], [Flow(0, 0, 0, 1, 5, 5)])
    assert not [event for event in events(broken) if event["ph"] in "sf"]


def test_an_empty_trace_is_valid_and_long_ones_are_paged(timeline_of: Callable[..., Timeline]) -> None:
    assert events() == []
    many = timeline_of(Origin.MEASURED, [Span(0, 0, Lane.TP, "k", "n", i, i, i + 1) for i in range(45_000)])
    assert sum(event["ph"] == "X" for event in events(many)) == 45_000
