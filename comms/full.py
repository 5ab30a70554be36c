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
from numpy.typing import NDArray

from comms.compiled import Compiled, Job, compile_jobs
from comms.errors import CommsError
from comms.events import ARRIVED, FLOW_EVENTS, JOB, JOBS_LEFT, PORT, RANK, SOLVED, Changes, Noise, World, run
from comms.heaps import TIMER, Timers, empty_finishes, empty_timers
from comms.queues import queues, received_at_first, still_to_come
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
    may_sweep = not conditions.changes and not any(job.repeats for job in jobs) and bool((rates > 0).all())
    if method is not Method.EVENTS and may_sweep:
        swept = _swept(compiled, rates, conditions, record)
        if swept is not None:
            return swept
    if method is Method.SWEEP:
        raise CommsError("messages meet on a wire", "sweep", "leave the method open")
    return _by_events(compiled, jobs, rates, conditions, record)


def _rates(compiled: Compiled, conditions: Conditions) -> FloatArray:
    rates = compiled.bytes_per_s.copy()
    for wire, factor in conditions.factors.items():
        if not 0 <= factor < np.inf:
            raise CommsError(f"a factor of {factor}", f"wire {wire}", "give a share of the rate, 0 or more")
        rates[wire] *= factor
    return rates


def _overheads(compiled: Compiled, conditions: Conditions) -> FloatArray:
    """[rank rows] What each sender adds before a message."""
    extra = [conditions.overhead_s.get(int(node), 0.0) for node in compiled.rank_node]
    return np.array(extra, dtype=np.float64) + conditions.every_overhead_s


def _swept(compiled: Compiled, rates: FloatArray, conditions: Conditions, record: bool) -> FullResult | None:
    recorded, record0 = _record_rows(compiled, record)
    state = Sweep(
        work=compiled.work,
        noise=Noise(conditions.noise_s, conditions.seed),
        overhead_s=_overheads(compiled, conditions),
        resource=empty_flows(rates, 0, 0).resource,
        ready=np.zeros(compiled.num_chains),
        staged=np.zeros(compiled.num_chains),
        free=np.zeros(compiled.num_ports),
        rate=np.zeros(len(compiled.work.edges)),
        busy_until=np.zeros(len(rates)),
        owner=np.full(len(rates), NONE),
        rank_end=np.zeros(len(compiled.rank_node)),
        job_end=_job_starts(compiled),
        starts=np.zeros(recorded),
        arrivals=np.zeros(recorded),
        record0=record0,
    )
    if not sweep(state):
        return None
    return FullResult(
        state.job_end - _job_starts(compiled),
        _chip_ends(compiled, state.rank_end),
        compiled.crossings,
        compiled.num_messages,
        0,
        0,
        Method.SWEEP,
        *(_spans(compiled, state.starts, state.arrivals, record0) if record else ((), ())),
    )


def _by_events(
    compiled: Compiled, jobs: Sequence[Job], rates: FloatArray, conditions: Conditions, record: bool
) -> FullResult:
    repeats = np.array([job.repeats for job in jobs], dtype=np.bool_)
    world = _first_world(compiled, rates, conditions, repeats, record)
    changes, next_change, stuck = _changes(compiled, conditions), 0, False
    while world.counters[JOBS_LEFT] > 0 and not stuck:
        next_change = run(world, changes, next_change)
        # It stops early for want of room, or because nothing can happen any more.
        stuck = world.timers.size[0] == 0
        world = world._replace(timers=_grown(world.timers))
    if world.counters[JOBS_LEFT] > 0:
        raise CommsError("a message can never arrive", "simulation", "a wire on its route stays at rate zero")
    return FullResult(
        np.where(repeats, np.nan, world.job["end_s"] - _job_starts(compiled)),
        _chip_ends(compiled, world.rank["end_s"]),
        compiled.crossings,
        int(world.counters[ARRIVED]),
        int(world.counters[FLOW_EVENTS]),
        int(world.counters[SOLVED]),
        Method.EVENTS,
        *(_spans(compiled, world.starts, world.arrivals, world.record0) if record else ((), ())),
    )


def _changes(compiled: Compiled, conditions: Conditions) -> Changes:
    changes = sorted(conditions.changes, key=lambda change: (change.at_s, change.wire))
    wire = np.array([change.wire for change in changes], dtype=np.int64)
    factor = np.array([change.factor for change in changes], dtype=np.float64)
    at_s = np.array([change.at_s for change in changes], dtype=np.float64)
    return Changes(at_s, wire, compiled.bytes_per_s[wire] * factor)


def _job_starts(compiled: Compiled) -> FloatArray:
    starts = np.zeros(compiled.num_jobs)
    starts[compiled.work.streams["job"]] = compiled.work.streams["start_s"]
    return starts


def _grown(timers: Timers) -> Timers:
    heap = np.zeros(2 * len(timers.heap), dtype=TIMER)
    heap[: len(timers.heap)] = timers.heap
    return Timers(heap, timers.size)


def _first_timers(compiled: Compiled) -> Timers:
    """One timer per stream; put in sorted, they are a heap."""
    order = np.argsort(compiled.work.streams["start_s"], kind="stable")
    num = len(order)
    timers = empty_timers(8 * (compiled.num_ports + num) + 1024)
    timers.heap["time"][:num] = compiled.work.streams["start_s"][order]
    timers.heap["number"][:num] = -compiled.num_ports - 1 - order
    timers.size[0] = num
    return timers


def _first_world(
    compiled: Compiled,
    rates: FloatArray,
    conditions: Conditions,
    repeats: NDArray[np.bool_],
    record: bool,
) -> World:
    work = compiled.work
    recorded, record0 = _record_rows(compiled, record)
    left = still_to_come(compiled)
    queue, first = queues(compiled)
    rank, ports_of_rank = _ranks(compiled, conditions)
    job = np.zeros(compiled.num_jobs, dtype=JOB)
    np.add.at(job["messages"], work.streams["job"], compiled.messages_by_stream())
    job["left"], job["repeats"], job["end_s"] = job["messages"], repeats, _job_starts(compiled)
    foreground = int(np.count_nonzero(~repeats & (job["messages"] > 0)))
    route_lengths = work.edges["route1"] - work.edges["route0"]
    return World(
        work=work,
        flows=empty_flows(rates, compiled.num_ports, int(route_lengths.max(initial=1))),
        timers=_first_timers(compiled),
        finishes=empty_finishes(compiled.num_ports),
        noise=Noise(conditions.noise_s, conditions.seed),
        queue=queue,
        port=_port_records(compiled, first),
        ports_of_rank=ports_of_rank,
        rank=rank,
        job=job,
        got=received_at_first(compiled, left),
        left=left,
        left_again=left.copy() if repeats.any() else left[:0],
        record0=record0,
        starts=np.zeros(recorded),
        arrivals=np.zeros(recorded),
        counters=np.array([0, 0, 0, foreground], dtype=np.int64),
    )


def _port_records(compiled: Compiled, first: IntArray) -> NDArray[np.void]:
    streams = compiled.work.streams
    port = np.zeros(compiled.num_ports, dtype=PORT)
    stream = np.repeat(np.arange(len(streams)), streams["ranks"])[compiled.port_rank]
    port["row"], port["first"], port["last"] = first[:-1], first[:-1], first[1:]
    port["stream"], port["rank"] = stream, compiled.port_rank - streams["rank0"][stream]
    return port


def _ranks(compiled: Compiled, conditions: Conditions) -> tuple[NDArray[np.void], NDArray[np.int32]]:
    """Records of the ranks, and their ports one rank after another."""
    rank = np.zeros(len(compiled.rank_node), dtype=RANK)
    ends = np.cumsum(np.bincount(compiled.port_rank, minlength=len(rank)))
    rank["port0"][1:], rank["port1"] = ends[:-1], ends
    rank["overhead_s"] = _overheads(compiled, conditions)
    return rank, np.argsort(compiled.port_rank, kind="stable").astype(np.int32)


def _record_rows(compiled: Compiled, record: bool) -> tuple[int, IntArray]:
    sizes = compiled.messages_by_stream()
    return (int(sizes.sum()) if record else 0), np.cumsum(sizes) - sizes


def _spans(
    compiled: Compiled, starts: FloatArray, arrivals: FloatArray, record0: IntArray
) -> tuple[tuple[FloatArray, ...], tuple[FloatArray, ...]]:
    pieces, cut = compiled.work.streams["pieces"], record0[1:]
    return (
        tuple(part.reshape(-1, p) for part, p in zip(np.split(starts, cut), pieces, strict=True)),
        tuple(part.reshape(-1, p) for part, p in zip(np.split(arrivals, cut), pieces, strict=True)),
    )


def _chip_ends(compiled: Compiled, rank_end: FloatArray) -> tuple[FloatArray, ...]:
    """Per job, the latest over its channels."""
    ends: list[FloatArray] = [np.zeros(0)] * compiled.num_jobs
    for stream in compiled.work.streams:
        rows = rank_end[stream["rank0"] : stream["rank0"] + stream["ranks"]]
        known = ends[stream["job"]]
        ends[stream["job"]] = np.maximum(known, rows) if len(known) else rows.copy()
    return tuple(ends)
