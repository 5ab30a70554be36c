"""Full fidelity: every chip, every message, wires shared max-min fairly.

`simulate` times any number of jobs on one topology, under conditions: slow, dead and flapping wires, chips that
are late or slow to send, noise, other jobs in the background. A schedule in which no two messages meet is timed
by a sweep (comms.sweep), everything else by events (comms.events); the result says which.

Assumes that a job's chips are ready at its start (plus their lateness). Not modelled: packets, queues and loss;
the time to add contributions is part of a wire's rate.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

import numpy as np

from comms.compiled import Compiled, Job, compile_jobs
from comms.errors import CommsError
from comms.events import (
    ARRIVED,
    FLOW_EVENTS,
    JOBS_LEFT,
    SOLVED,
    Changes,
    Noise,
    Ports,
    State,
    World,
    run,
)
from comms.heaps import Timers, empty_finishes, empty_timers
from comms.sharing import empty_flows
from comms.sweep import NONE, Sweep, sweep
from comms.topology import FloatArray, IntArray, Topology


class Method(StrEnum):
    """How a full simulation was done."""

    SWEEP = "sweep"
    EVENTS = "events"


@dataclass(frozen=True, slots=True)
class Change:
    """From `at_s` on, a wire runs at `factor` of its rate: 0 is down, 1 is as it was."""

    at_s: float
    wire: int
    factor: float


@dataclass(frozen=True, slots=True, eq=False)
class Conditions:
    """How a network differs from its data sheet while it is timed."""

    factors: Mapping[int, float] = field(default_factory=dict)  # wire -> share of its rate
    changes: tuple[Change, ...] = ()
    overhead_s: Mapping[int, float] = field(default_factory=dict)  # node -> before each message it sends
    every_overhead_s: float = 0.0  # the same for all nodes
    noise_s: float = 0.0  # mean of an exponential delay before each message
    seed: int = 0


CALM = Conditions()


@dataclass(frozen=True, slots=True, eq=False)
class FullResult:
    """What was timed. `wire_nbytes` counts background jobs once."""

    seconds: FloatArray  # [jobs] from its start to its end; nan for background jobs
    chip_end_s: tuple[FloatArray, ...]  # per job and rank: last byte in or out
    wire_nbytes: FloatArray  # [wires] bytes that cross each capacity (Wires.shares)
    num_messages: int
    flow_events: int  # starts and ends of flows; 0 by sweep
    flows_solved: int  # how often a flow's rate was solved anew
    method: Method
    starts: tuple[FloatArray, ...] = ()  # per stream (channel of a job): [messages, pieces], where recorded
    arrivals: tuple[FloatArray, ...] = ()


def simulate(
    topology: Topology,
    jobs: Sequence[Job],
    conditions: Conditions = CALM,
    *,
    record: bool = False,
    method: Method | None = None,
) -> FullResult:
    """Time all jobs together. Raises CommsError where they cannot finish (a dead wire, and no way round)."""
    compiled = compile_jobs(topology, jobs)
    rates = _rates(compiled, conditions)
    noise = _noise(compiled, conditions)
    may_sweep = not conditions.changes and not any(job.repeats for job in jobs) and bool((rates > 0).all())
    if method is not Method.EVENTS and may_sweep:
        swept = _swept(compiled, rates, noise, record)
        if swept is not None:
            return swept
    if method is Method.SWEEP:
        raise CommsError("messages meet on a wire", "sweep", "leave the method open")
    return _by_events(compiled, jobs, rates, noise, conditions, record)


def _rates(compiled: Compiled, conditions: Conditions) -> FloatArray:
    rates = compiled.bytes_per_s.copy()
    for wire, factor in conditions.factors.items():
        if not 0 <= factor < np.inf:
            raise CommsError(f"a factor of {factor}", f"wire {wire}", "give a share of the rate, 0 or more")
        rates[wire] *= factor
    return rates


def _noise(compiled: Compiled, conditions: Conditions) -> Noise:
    extra = [conditions.overhead_s.get(int(node), 0.0) for node in compiled.rank_node]
    overhead = np.array(extra, dtype=np.float64) + conditions.every_overhead_s
    return Noise(overhead, conditions.noise_s, conditions.seed)


def _swept(compiled: Compiled, rates: FloatArray, noise: Noise, record: bool) -> FullResult | None:
    recorded, record0 = _record_rows(compiled, record)
    state = Sweep(
        ready=np.zeros(compiled.num_chains),
        staged=np.zeros(compiled.num_chains),
        free=np.zeros(compiled.num_ports),
        rate=np.zeros(len(compiled.messages.src)),
        busy_until=np.zeros(len(rates)),
        owner=np.full(len(rates), NONE),
        rank_end=np.zeros(len(compiled.rank_node)),
        job_end=_job_starts(compiled),
        starts=np.zeros(recorded),
        arrivals=np.zeros(recorded),
        record0=record0,
    )
    if not sweep(compiled.streams, compiled.messages, rates, noise, state):
        return None
    seconds = state.job_end - _job_starts(compiled)
    spans = _spans(compiled, state.starts, state.arrivals, record0) if record else ((), ())
    ends = _chip_ends(compiled, state.rank_end)
    num = compiled.num_messages
    return FullResult(seconds, ends, compiled.crossings, num, 0, 0, Method.SWEEP, *spans)


def _by_events(
    compiled: Compiled,
    jobs: Sequence[Job],
    rates: FloatArray,
    noise: Noise,
    conditions: Conditions,
    record: bool,
) -> FullResult:
    m = compiled.messages
    hops = int(np.diff(m.route0).max(initial=1))
    flows = empty_flows(rates, compiled.num_ports, hops)
    ports = _ports(compiled)
    recorded, record0 = _record_rows(compiled, record)
    repeats = np.array([job.repeats for job in jobs], dtype=np.bool_)
    state = _first_state(compiled, ports, repeats, recorded, record0)
    changes = sorted(conditions.changes, key=lambda change: (change.at_s, change.wire))
    wire = np.array([change.wire for change in changes], dtype=np.int64)
    factor = np.array([change.factor for change in changes], dtype=np.float64)
    at_s = np.array([change.at_s for change in changes], dtype=np.float64)
    changing = Changes(at_s, wire, compiled.bytes_per_s[wire] * factor)
    timers = _with_starts(compiled, empty_timers(8 * compiled.num_ports + 1024))
    world = World(compiled.streams, m, ports, flows, timers, empty_finishes(compiled.num_ports), state, noise)
    next_change, stuck = 0, False
    while state.counters[JOBS_LEFT] > 0 and not stuck:
        next_change = run(world, changing, next_change)
        # It stops early for want of room, or because nothing can happen any more.
        stuck = world.timers.size[0] == 0
        world = world._replace(timers=_grown(world.timers))
    if state.counters[JOBS_LEFT] > 0:
        raise CommsError("a message can never arrive", "simulation", "a wire on its route stays at rate zero")
    seconds = np.where(repeats, np.nan, state.job_end - _job_starts(compiled))
    spans = _spans(compiled, state.starts, state.arrivals, record0) if record else ((), ())
    return FullResult(
        seconds,
        _chip_ends(compiled, state.rank_end),
        compiled.crossings,
        int(state.counters[ARRIVED]),
        int(state.counters[FLOW_EVENTS]),
        int(state.counters[SOLVED]),
        Method.EVENTS,
        *spans,
    )


def _job_starts(compiled: Compiled) -> FloatArray:
    starts = np.zeros(compiled.num_jobs)
    starts[compiled.streams.job] = compiled.streams.start_s
    return starts


def _grown(timers: Timers) -> Timers:
    size = len(timers.time)
    return Timers(np.resize(timers.time, 2 * size), np.resize(timers.number, 2 * size), timers.size)


def _with_starts(compiled: Compiled, timers: Timers) -> Timers:
    """One timer per stream. They are few, so putting them in sorted makes the heap."""
    order = np.argsort(compiled.streams.start_s, kind="stable")
    num = len(order)
    if num > len(timers.time):
        timers = empty_timers(2 * num + 1024)
    timers.time[:num] = compiled.streams.start_s[order]
    timers.number[:num] = -compiled.num_ports - 1 - order
    timers.size[0] = num
    return timers


def _ports(compiled: Compiled) -> Ports:
    """The messages of each port in the order they leave, and the segments in which pieces follow each other."""
    m, streams = compiled.messages, compiled.streams
    rows = m.pattern0[m.round] + np.arange(len(m.round)) - m.first[m.round]
    port = m.port[rows]
    order = np.argsort(port, kind="stable").astype(np.int32)
    first = np.zeros(compiled.num_ports + 1, dtype=np.int64)
    np.cumsum(np.bincount(port, minlength=compiled.num_ports), out=first[1:])
    each = m.round[order]
    serial = streams.serial[m.stream[each]]
    phase = m.phase_start[each] + streams.round0[m.stream[each]]
    segment = np.where(serial, phase, each)
    start, end = _runs(port[order], segment)
    rank = compiled.port_rank
    stream_of_rank = np.repeat(np.arange(len(streams.ranks)), streams.ranks)
    stream = stream_of_rank[rank] if len(rank) else np.zeros(0, dtype=np.int64)
    of_rank_first = np.zeros(len(compiled.rank_node) + 1, dtype=np.int64)
    np.cumsum(np.bincount(rank, minlength=len(compiled.rank_node)), out=of_rank_first[1:])
    return Ports(
        first=first,
        message=order,
        segment_start=start,
        segment_end=end,
        stream=stream.astype(np.int32),
        rank=(rank - streams.rank0[stream]).astype(np.int32) if len(rank) else rank,
        of_rank_first=of_rank_first,
        of_rank=np.argsort(rank, kind="stable").astype(np.int32),
    )


def _runs(port: IntArray, segment: IntArray) -> tuple[IntArray, IntArray]:
    """For each row, where its run of equal (port, segment) starts and ends."""
    num = len(port)
    new = np.ones(num, dtype=np.bool_)
    new[1:] = (port[1:] != port[:-1]) | (segment[1:] != segment[:-1])
    firsts = np.flatnonzero(new)
    run_of = np.cumsum(new) - 1
    ends = np.append(firsts[1:], num)
    return firsts[run_of].astype(np.int32), ends[run_of].astype(np.int32)


def _first_state(
    compiled: Compiled, ports: Ports, repeats: np.ndarray, recorded: int, record0: IntArray
) -> State:
    left = _still_to_come(compiled)
    got = _received_at_first(compiled, left)
    streams, m = compiled.streams, compiled.messages
    per_stream = np.zeros(len(streams.job), dtype=np.int64)
    np.add.at(per_stream, m.stream, np.diff(m.first) * streams.pieces[m.stream])
    messages = np.zeros(compiled.num_jobs, dtype=np.int64)
    np.add.at(messages, streams.job, per_stream)
    foreground = int(np.count_nonzero(~repeats & (messages > 0)))
    return State(
        got=got,
        left=left,
        row=ports.first[:-1].copy(),
        piece=np.zeros(compiled.num_ports, dtype=np.int64),
        state=np.zeros(compiled.num_ports, dtype=np.int8),
        nbytes=np.zeros(compiled.num_ports),
        since=np.zeros(compiled.num_ports),
        job_left=messages.copy(),
        job_messages=messages,
        repeats=repeats,
        left_again=left.copy() if repeats.any() else left[:0],
        job_end=_job_starts(compiled),
        rank_end=np.zeros(len(compiled.rank_node)),
        starts=np.zeros(recorded),
        arrivals=np.zeros(recorded),
        record0=record0,
        counters=np.array([0, 0, 0, foreground], dtype=np.int64),
    )


def _still_to_come(compiled: Compiled) -> np.ndarray:
    """[chains and rounds] Messages that each chain gets in each round."""
    left = np.zeros(compiled.num_left, dtype=np.uint16)
    m, streams = compiled.messages, compiled.streams
    for index in range(len(streams.job)):
        pieces, ranks, groups = streams.pieces[index], streams.ranks[index], streams.groups[index]
        rounds, first = streams.rounds[index], streams.round0[index]
        block = left[streams.left0[index] : streams.left0[index] + pieces * ranks * groups * rounds]
        table = block.reshape(pieces, ranks, groups, rounds)
        for each in range(rounds):
            begin, end = m.first[first + each], m.first[first + each + 1]
            row = m.pattern0[first + each]
            dst = m.dst[row : row + end - begin].astype(np.int64)
            if streams.by_chunk[index]:
                num = m.num_chunks[begin:end]
                within = np.arange(num.sum()) - np.repeat(np.cumsum(num) - num, num)
                chunk = (np.repeat(m.chunk[begin:end], num) + within) % groups
                counts = np.bincount(np.repeat(dst, num) * groups + chunk, minlength=ranks * groups)
                table[:, :, :, each] = counts.reshape(ranks, groups)
            else:
                table[:, :, 0, each] = np.bincount(dst, minlength=ranks)
    return left


def _received_at_first(compiled: Compiled, left: np.ndarray) -> np.ndarray:
    """[chains] Rounds at the start in which a chain gets nothing: it need not wait for them."""
    got = np.zeros(compiled.num_chains, dtype=np.int32)
    streams = compiled.streams
    for index in range(len(streams.job)):
        chains = streams.pieces[index] * streams.ranks[index] * streams.groups[index]
        rounds = streams.rounds[index]
        table = left[streams.left0[index] : streams.left0[index] + chains * rounds].reshape(chains, rounds)
        waits = table > 0
        first = np.where(waits.any(axis=1), waits.argmax(axis=1), rounds)
        got[streams.chain0[index] : streams.chain0[index] + chains] = first
    return got


def _record_rows(compiled: Compiled, record: bool) -> tuple[int, IntArray]:
    streams, m = compiled.streams, compiled.messages
    sizes = np.zeros(len(streams.job), dtype=np.int64)
    np.add.at(sizes, m.stream, np.diff(m.first) * streams.pieces[m.stream])
    starts = np.cumsum(sizes) - sizes
    return (int(sizes.sum()) if record else 0), starts


def _spans(
    compiled: Compiled, starts: FloatArray, arrivals: FloatArray, record0: IntArray
) -> tuple[tuple[FloatArray, ...], tuple[FloatArray, ...]]:
    pieces = compiled.streams.pieces
    cut = record0[1:]
    return (
        tuple(part.reshape(-1, p) for part, p in zip(np.split(starts, cut), pieces, strict=True)),
        tuple(part.reshape(-1, p) for part, p in zip(np.split(arrivals, cut), pieces, strict=True)),
    )


def _chip_ends(compiled: Compiled, rank_end: FloatArray) -> tuple[FloatArray, ...]:
    """Per job, the latest over its channels."""
    streams = compiled.streams
    ends: list[FloatArray] = [np.zeros(0)] * compiled.num_jobs
    for index, job in enumerate(streams.job):
        rows = rank_end[streams.rank0[index] : streams.rank0[index] + streams.ranks[index]]
        ends[job] = np.maximum(ends[job], rows) if len(ends[job]) else rows
    return tuple(ends)
