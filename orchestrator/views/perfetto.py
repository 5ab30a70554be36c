"""Perfetto: timelines as one Chrome trace (JSON, gzipped) for https://ui.perfetto.dev.

A process is a chip, a thread is a lane; predicted and measured are two groups of processes, predicted on top,
whose clocks both start at their own first span, since the two need not run at the same speed. `X` events are
spans with their bytes, FLOPs, microbatch and instruction; `s`/`f` pairs are transfers; `C` events are
counters. Format: "Trace Event Format" (Google, 2016). Times are microseconds with three decimals, so no
nanosecond is lost. Same timelines, same bytes (the gzip header carries no time).
"""

import gzip
import io
import json
from collections.abc import Iterator
from itertools import islice

import numpy as np

from orchestrator.runs.timeline import LANES, NONE, Ints, Span, Timeline, group_ids

_PAGE = 20_000  # events per write to the compressor


def trace_gz(*timelines: Timeline) -> bytes:
    """The gzipped trace of these timelines, the first on top."""
    target = io.BytesIO()
    with gzip.GzipFile(filename="", mode="wb", compresslevel=6, fileobj=target, mtime=0) as file:
        file.write(b'{"displayTimeUnit":"ns","traceEvents":[\n')
        events, separator = _events(timelines), ""
        while page := list(islice(events, _PAGE)):
            file.write((separator + ",\n".join(page)).encode())
            separator = ",\n"
        file.write(b"\n]}\n")
    return target.getvalue()


def _events(timelines: tuple[Timeline, ...]) -> Iterator[str]:
    widest = max((chip for timeline in timelines for chip, _ in timeline.chips), default=0)
    # Chip 3 of the second group reads 13, or 1003 where there are 1,000 chips.
    stride = 10 ** len(str(widest))
    flow_id = 0
    for group, timeline in enumerate(timelines):
        first_pid = group * stride
        zero = timeline.start_ns
        yield from _names(timeline, first_pid)
        for span in timeline.spans:
            yield _span(span, first_pid, zero)
        yield from _flows(timeline, first_pid, zero, flow_id)
        flow_id += len(timeline.flows)
        for counter in timeline.counters:
            head = f'{{"ph":"C","pid":{first_pid + counter.chip},"ts":{_us(counter.at_ns - zero)},"name":'
            yield f'{head}{json.dumps(counter.name)},"args":{{"bytes":{counter.nbytes}}}}}'


def _names(timeline: Timeline, first_pid: int) -> Iterator[str]:
    """Names and the order of processes and threads, only for lanes that are used."""
    rows = timeline.span_rows
    used = sorted(set(zip(rows["chip"].tolist(), rows["lane"].tolist(), strict=True)))
    for chip, name in timeline.chips:
        pid = first_pid + chip
        yield _meta("process_name", pid, {"name": f"{timeline.origin} | {name}"})
        yield _meta("process_sort_index", pid, {"sort_index": pid})
    for chip, lane in used:
        pid = first_pid + chip
        yield _meta("thread_name", pid, {"name": str(LANES[lane])}, lane)
        yield _meta("thread_sort_index", pid, {"sort_index": lane}, lane)


def _meta(name: str, pid: int, args: dict[str, object], tid: int = 0) -> str:
    return json.dumps({"ph": "M", "pid": pid, "tid": tid, "name": name, "args": args}, separators=(",", ":"))


def _span(span: Span, first_pid: int, zero: int) -> str:
    where = f'"pid":{first_pid + span.chip},"tid":{LANES.index(span.lane)}'
    when = f'"ts":{_us(span.start_ns - zero)},"dur":{_us(span.end_ns - span.start_ns)}'
    args = f'"step":{span.step},"bytes":{span.nbytes},"flops":{span.flops}'
    if span.instr != NONE:
        args += f',"instr":{span.instr}'
    if span.microbatch != NONE:
        args += f',"microbatch":{span.microbatch}'
    what = f'"name":{json.dumps(span.name)},"cat":{json.dumps(span.kind)}'
    return f'{{"ph":"X",{where},{when},{what},"args":{{{args}}}}}'


def _flows(timeline: Timeline, first_pid: int, zero: int, first_id: int) -> Iterator[str]:
    """Arrows bind to the span that encloses their time: the send's start and the recv's last nanosecond."""
    spans = timeline.spans
    for number, (source, target) in enumerate(zip(*flow_ends(timeline), strict=True), start=first_id):
        if NONE in (source, target):
            continue
        send, recv = spans[int(source)], spans[int(target)]
        arrival = max(recv.start_ns, recv.end_ns - 1)
        yield f'{{"ph":"s",{_flow_end(number, send, send.start_ns - zero, first_pid)}}}'
        yield f'{{"ph":"f","bp":"e",{_flow_end(number, recv, arrival - zero, first_pid)}}}'


def _flow_end(number: int, span: Span, at_ns: int, first_pid: int) -> str:
    where = f'"pid":{first_pid + span.chip},"tid":{LANES.index(span.lane)},"ts":{_us(at_ns)}'
    return f'"id":{number},"cat":"transfer","name":"transfer",{where}'


def _us(ns: int) -> str:
    """Microseconds with three decimals, exact where a float would round."""
    sign = "-" if ns < 0 else ""
    return f"{sign}{abs(ns) // 1000}.{abs(ns) % 1000:03d}"


def flow_ends(timeline: Timeline) -> tuple[Ints, Ints]:
    """For each flow the row of its send span and the row of its recv span.

    NONE where there is no such span.
    """
    spans, flows = timeline.span_rows, timeline.flow_rows
    ids = group_ids(
        np.concatenate([spans["step"], flows["step"], flows["step"]]),
        np.concatenate([spans["microbatch"], flows["microbatch"], flows["microbatch"]]),
        np.concatenate([spans["chip"], flows["source_chip"], flows["target_chip"]]),
        np.concatenate([spans["instr"], flows["source_instr"], flows["target_instr"]]),
    )
    row_of = np.full(len(ids), NONE, dtype=np.int64)
    row_of[ids[: len(spans)][::-1]] = np.arange(len(spans))[::-1]  # the earliest span of an instruction wins
    sources, targets = np.split(row_of[ids[len(spans) :]], 2)
    return sources, targets
