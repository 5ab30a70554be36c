"""Full fidelity: every chip, every message, wires shared max-min fairly.

`simulate` times any number of jobs on one topology, under conditions: slow, dead and flapping wires, chips that
are late or slow to send, noise, other jobs in the background. A schedule in which no two messages meet is timed
by a sweep (sweep), everything else by events (events); the result says which. `simulate_within` gives
up what will not be done by some time, or only after more work than it is worth.

Assumes that a job's chips are ready at its start (plus their lateness). Not modelled: packets, queues and loss;
the time to add contributions is part of a wire's rate.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

from comms.errors import CommsError
from comms.networks.conditions import UNDISTURBED, Conditions
from comms.networks.topology import FloatArray, IntArray, Topology
from comms.simulation.compiled import CollectiveJob, Compiled, compile_jobs
from comms.simulation.events import (
    ARRIVED,
    FLOW_EVENTS,
    MOST_RESTARTS,
    MOST_WORK,
    NUM_COUNTERS,
    PORT,
    RANK,
    RESTARTS,
    SOLVED,
    WAITED_FOR,
    Changes,
    Noise,
    World,
    next_instant,
    run,
    work_done,
)
from comms.simulation.heaps import TIMER, Timers, add_timer, empty_finishes, empty_timers
from comms.simulation.lower_bound import least_end_s
from comms.simulation.queues import queues, received_at_first, still_to_come
from comms.simulation.sharing import empty_flows
from comms.simulation.sweep import NONE, Sweep, sweep
from comms.simulation.work_budget import (
    ENDLESS,
    JUDGED,
    UNLIMITED,
    WATCHED_WORK,
    GivenUp,
    Watch,
    WorkBudget,
    unwatched,
)

ROUNDING = 1e-9  # relative: what adds up in another order may differ by as much


class Method(StrEnum):
    """How a full simulation was done."""

    SWEEP = "sweep"
    EVENTS = "events"


@dataclass(frozen=True, slots=True, eq=False)
class FullResult:
    """What was timed. `wire_nbytes` counts background jobs once."""

    seconds: FloatArray  # [jobs] from its start to the end of its last group; nan for background jobs
    group_seconds: tuple[FloatArray, ...]  # per job: [groups]
    chip_end_s: tuple[FloatArray, ...]  # per job: [groups * ranks] last byte in or out
    wire_nbytes: FloatArray  # [wires] bytes that cross each capacity (Wires.shares),
    wire_load: FloatArray  # [wires] and how many of its bytes that keeps busy, as protocols leave some unused
    num_messages: int
    flow_events: int  # starts and ends of flows; 0 by sweep
    flows_solved: int  # how often a flow's rate was solved anew
    method: Method
    starts: tuple[FloatArray, ...] = ()  # per stream (channel of a job): [messages, pieces], where recorded
    arrivals: tuple[FloatArray, ...] = ()

    @property
    def work(self) -> int:
        """As a WorkBudget counts it."""
        return self.num_messages + self.flow_events + self.flows_solved


def simulate(
    topology: Topology,
    jobs: Sequence[CollectiveJob],
    conditions: Conditions = UNDISTURBED,
    *,
    record: bool = False,
    method: Method | None = None,
) -> FullResult:
    """Time all jobs together. Raises CommsError where they cannot finish (a dead wire, and no way round)."""
    compiled = compile_jobs(topology, jobs)
    rates = rates_under(compiled, conditions)
    if method is not Method.EVENTS and _may_sweep(compiled, rates, conditions):
        swept = _swept(compiled, rates, conditions, record)
        if swept is not None:
            return swept
    if method is Method.SWEEP:
        raise CommsError("messages meet on a wire", "sweep", "leave the method open")
    found = _by_events(compiled, rates, conditions, record, UNLIMITED, unwatched)
    assert isinstance(found, FullResult), "nothing limits it"
    return found


def simulate_within(
    topology: Topology,
    jobs: Sequence[CollectiveJob],
    conditions: Conditions,
    limit: WorkBudget,
    watch: Watch = unwatched,
) -> FullResult | GivenUp:
    """The same as long as it is worth it. What is not given up is timed exactly, what is given up as late is late."""
    compiled = compile_jobs(topology, jobs)
    rates = rates_under(compiled, conditions)
    highest = _highest(rates, timed_changes(compiled, conditions))
    least_s = least_end_s(compiled, highest, limit.until_s) * (1 - ROUNDING)
    if least_s > limit.until_s:
        return GivenUp(least_s, is_late=True)
    found: FullResult | GivenUp | None = None
    if _may_sweep(compiled, rates, conditions):
        found = _swept(compiled, rates, conditions, False)
    if found is None:
        found = _by_events(compiled, rates, conditions, False, limit, watch)
    if isinstance(found, GivenUp):
        return replace(found, at_least_s=max(found.at_least_s, least_s))
    waited = compiled.runs[~compiled.runs["repeats"]]
    if waited["end_s"].max(initial=0.0) > limit.until_s:
        return GivenUp(limit.until_s, is_late=True, work=found.work)
    return found


def _may_sweep(compiled: Compiled, rates: FloatArray, conditions: Conditions) -> bool:
    repeats = bool(compiled.runs["repeats"].any())
    return not conditions.changes and not repeats and bool((rates > 0).all())


def _highest(rates: FloatArray, changes: Changes) -> FloatArray:
    """[resources] The most that each ever has."""
    highest = rates.copy()
    np.maximum.at(highest, changes.resource, changes.bytes_per_s)
    return highest


def rates_under(compiled: Compiled, conditions: Conditions) -> FloatArray:
    """[resources] Bytes per second."""
    lowest: dict[int, float] = {}
    for wire, factor in conditions.factors.items():
        resource = _resource(compiled, wire, factor)
        lowest[resource] = min(factor, lowest.get(resource, np.inf))
    rates = compiled.bytes_per_s.copy()
    for resource, factor in lowest.items():
        rates[resource] *= factor
    return rates


def _resource(compiled: Compiled, wire: int, factor: float) -> int:
    """What a condition on a wire changes. Raises CommsError for a wire or a factor that cannot be."""
    if not 0 <= wire < len(compiled.shares):
        raise CommsError(f"no wire {wire} among {len(compiled.shares)}", "conditions", "count wires from 0")
    if not 0 <= factor < np.inf:
        raise CommsError(f"a factor of {factor}", f"wire {wire}", "give a share of the rate, 0 or more")
    return int(compiled.shares[wire])


def _overheads(compiled: Compiled, conditions: Conditions) -> FloatArray:
    """[rank rows] What each sender adds before a message."""
    extra = [conditions.overhead_s.get(int(node), 0.0) for node in compiled.rank_node]
    return np.array(extra, dtype=np.float64)


def _swept(compiled: Compiled, rates: FloatArray, conditions: Conditions, record: bool) -> FullResult | None:
    recorded, record0 = _record_rows(compiled, record)
    state = Sweep(
        **compiled.work._asdict(),
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
        run=compiled.runs,
        record0=record0,
        starts=np.zeros(recorded),
        arrivals=np.zeros(recorded),
    )
    if not sweep(state):
        compiled.runs["end_s"] = compiled.runs["start_s"]
        return None
    spans = _spans(compiled, state.starts, state.arrivals, record0) if record else ((), ())
    counted = (compiled.num_messages, 0, 0)
    return _result(compiled, state.rank_end, counted, Method.SWEEP, spans)


def _by_events(
    compiled: Compiled,
    rates: FloatArray,
    conditions: Conditions,
    record: bool,
    limit: WorkBudget,
    watch: Watch,
) -> FullResult | GivenUp:
    world = first_world(
        compiled, rates, conditions, record=record, again=bool(compiled.runs["repeats"].any())
    )
    start_runs(world, range(len(compiled.runs)))
    changes, next_change = timed_changes(compiled, conditions), 0
    counters = world.counters
    while counters[WAITED_FOR] > 0:
        counters[MOST_WORK] = work_done(world) + max(1, min(WATCHED_WORK, limit.most_work // JUDGED))
        next_change = run(world, changes, next_change, limit.until_s, False)
        if counters[WAITED_FOR] == 0:
            break
        now = next_instant(world.timers, world.finishes, changes, next_change)
        if now == np.inf or counters[RESTARTS] > MOST_RESTARTS:
            hint = "a wire on its route stays at rate zero"
            raise CommsError("a message can never arrive", "simulation", hint)
        share = _share_done(compiled, counters)
        if now > limit.until_s:
            return GivenUp(limit.until_s, is_late=True, work=work_done(world))
        if limit.is_too_much(work_done(world), share):
            return GivenUp(now, is_late=False, work=work_done(world))
        if counters[MOST_WORK] <= work_done(world):
            watch(share)
        if is_short_of_timers(world):
            world = world._replace(timers=grown(world.timers))
    spans = _spans(compiled, world.starts, world.arrivals, world.record0) if record else ((), ())
    counted = int(counters[ARRIVED]), int(counters[FLOW_EVENTS]), int(counters[SOLVED])
    return _result(compiled, world.rank["end_s"], counted, Method.EVENTS, spans)


def _share_done(compiled: Compiled, counters: IntArray) -> float:
    """Of the messages that are waited for: what has arrived, or of flows, where all are waited for, what has happened.

    Messages may all be on their way before any arrives.
    """
    waited = compiled.runs[~compiled.runs["repeats"]]
    messages = max(1, int(waited["messages"].sum()))
    arrived = 1.0 - float(waited["left"].sum()) / messages
    return (
        max(arrived, counters[FLOW_EVENTS] / (2 * messages)) if len(waited) == len(compiled.runs) else arrived
    )


def _result(
    compiled: Compiled,
    rank_end: FloatArray,
    counted: tuple[int, int, int],
    method: Method,
    spans: tuple[tuple[FloatArray, ...], tuple[FloatArray, ...]],
) -> FullResult:
    runs = compiled.runs
    took = np.where(runs["repeats"], np.nan, runs["end_s"] - runs["start_s"])
    cut = np.flatnonzero(np.diff(runs["job"])) + 1
    by_group = tuple(np.split(took, cut)) if len(took) else ()
    seconds = np.array([group.max() for group in by_group])
    ends = _chip_ends(compiled, rank_end)
    nbytes, load = compiled.crossings
    return FullResult(seconds, by_group, ends, nbytes, load, *counted, method, *spans)


def timed_changes(compiled: Compiled, conditions: Conditions) -> Changes:
    """The changes of capacity, in order of time."""
    changes = sorted(conditions.changes, key=lambda change: (change.at_s, change.wire))
    if any(not 0 <= change.at_s < np.inf for change in changes):
        raise CommsError("a change before the start", "conditions", "give times of zero or more")
    wire = np.array([_resource(compiled, each.wire, each.factor) for each in changes], dtype=np.int64)
    factor = np.array([change.factor for change in changes], dtype=np.float64)
    at_s = np.array([change.at_s for change in changes], dtype=np.float64)
    return Changes(at_s, wire, compiled.bytes_per_s[wire] * factor)


def grown(timers: Timers) -> Timers:
    """The same timers with twice the room."""
    heap = np.zeros(2 * len(timers.heap), dtype=TIMER)
    heap[: len(timers.heap)] = timers.heap
    return Timers(heap, timers.size)


def timers_in_reserve(world: World) -> int:
    """As many as the loop keeps free for the events of one instant."""
    return 2 * len(world.port) + 2 * len(world.run) + 2


def is_short_of_timers(world: World) -> bool:
    """Whether the loop stopped for want of timers."""
    return bool(world.timers.size[0] >= len(world.timers.heap) - timers_in_reserve(world))


def first_world(
    compiled: Compiled, rates: FloatArray, conditions: Conditions, *, record: bool, again: bool
) -> World:
    """Nothing started yet. `again`: runs may be rewound."""
    work = compiled.work
    recorded, record0 = _record_rows(compiled, record)
    left = still_to_come(compiled)
    queue, first = queues(compiled)
    rank, ports_of_rank = _ranks(compiled, conditions)
    hops = int((work.edges["route1"] - work.edges["route0"]).max(initial=1))
    return World(
        **work._asdict(),
        flows=empty_flows(rates, compiled.num_ports, hops),
        timers=empty_timers(8 * compiled.num_ports + 4 * len(compiled.runs) + 1024),
        finishes=empty_finishes(compiled.num_ports),
        noise=Noise(conditions.noise_s, conditions.seed),
        queue=queue,
        port=_port_records(compiled, first),
        ports_of_rank=ports_of_rank,
        rank=rank,
        run=compiled.runs,
        ended=np.zeros(len(compiled.runs), dtype=np.int64),
        got=received_at_first(compiled, left),
        left=left,
        left_again=left.copy() if again else left[:0],
        record0=record0,
        starts=np.zeros(recorded),
        arrivals=np.zeros(recorded),
        counters=np.array([0] * (NUM_COUNTERS - 1) + [ENDLESS], dtype=np.int64),
    )


def start_runs(world: World, numbers: Iterable[int]) -> None:
    """Let runs start at their start_s. A run without messages ends there."""
    for number in numbers:
        its = world.run[number]
        if its["messages"] == 0:
            its["end_s"] = its["start_s"]
            continue
        add_timer(world.timers, float(its["start_s"]), -len(world.port) - 1 - number)
        world.counters[WAITED_FOR] += not its["repeats"]


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
    ends: list[FloatArray] = []
    for its in compiled.runs[compiled.runs["group"] == 0]:
        streams = compiled.work.streams[its["stream0"] : its["stream1"]]
        rows = [rank_end[each["rank0"] : each["rank0"] + each["ranks"]] for each in streams]
        ends.append(np.maximum.reduce(rows) if rows else np.zeros(0))
    return tuple(ends)
