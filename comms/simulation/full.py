"""Full fidelity: every chip, every message, wires shared max-min fairly.

`simulate` times any number of jobs on one topology, under conditions: slow, dead and flapping wires, chips that
are late or slow to send, noise, other jobs in the background. A schedule in which no two messages meet is timed
by a sweep (sweep), everything else by events (events); the result says which. `simulate_within` gives
up what will not be done by some time, or only after more work than it is worth.

Assumes that a job's chips are ready at its start (plus their lateness). Not modelled: packets, queues and loss;
the time to add contributions is part of a wire's rate.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

import numpy as np

from comms.errors import CommsError
from comms.networks.topology import UNDISTURBED, Conditions, FloatArray, IntArray, Topology
from comms.simulation.compiled import CollectiveJob, Compiled, compile_jobs
from comms.simulation.events import MOST_RESTARTS, next_instant, run, work_done
from comms.simulation.lower_bound import end_lower_bound_s
from comms.simulation.sharing import empty_flows
from comms.simulation.sweep import NONE, SweepState, sweep
from comms.simulation.work_budget import (
    FORECAST_AFTER,
    UNLIMITED,
    WATCHED_WORK,
    GivenUp,
    Watch,
    WorkBudget,
    unwatched,
)
from comms.simulation.world import (
    ARRIVED,
    FLOW_EVENTS,
    MOST_WORK,
    RESTARTS,
    SOLVED,
    WAITED_FOR,
    Noise,
    first_world,
    grown,
    is_short_of_timers,
    overheads,
    rates_under,
    start_runs,
    timed_changes,
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
    wire_nbytes: FloatArray  # [wires] bytes that cross each capacity (Wires.shares),
    wire_load: FloatArray  # [wires] and how many of its bytes that keeps busy, as protocols leave some unused
    num_messages: int
    flow_events: int  # starts and ends of flows; 0 by sweep
    flows_solved: int  # how often a flow's rate was solved anew
    method: Method

    @property
    def work(self) -> int:
        """As a WorkBudget counts it."""
        return self.num_messages + self.flow_events + self.flows_solved


def simulate(
    topology: Topology,
    jobs: Sequence[CollectiveJob],
    conditions: Conditions = UNDISTURBED,
    *,
    method: Method | None = None,
) -> FullResult:
    """Time all jobs together. Raises CommsError where they cannot finish (a dead wire, and no way round)."""
    found = simulate_within(topology, jobs, conditions, UNLIMITED, method=method)
    assert isinstance(found, FullResult), "nothing limits it"
    return found


def simulate_within(
    topology: Topology,
    jobs: Sequence[CollectiveJob],
    conditions: Conditions,
    budget: WorkBudget,
    watch: Watch = unwatched,
    method: Method | None = None,
) -> FullResult | GivenUp:
    """The same as long as it is worth it. What is not given up is timed exactly, what is given up as late is late."""
    compiled = compile_jobs(topology, jobs)
    rates = rates_under(compiled, conditions)
    least_s = 0.0
    if budget != UNLIMITED:
        changes, highest = timed_changes(compiled, conditions), rates.copy()
        np.maximum.at(highest, changes.resource, changes.bytes_per_s)
        least_s = end_lower_bound_s(compiled, highest, budget.until_s) * (1 - ROUNDING)
        if least_s > budget.until_s:
            return GivenUp(least_s, is_late=True)
    found: FullResult | GivenUp | None = None
    if method is not Method.EVENTS and _may_sweep(compiled, rates, conditions):
        found = _swept(compiled, rates, conditions)
    if found is None and method is Method.SWEEP:
        raise CommsError("messages meet on a wire", "sweep", "leave the method open")
    if found is None:
        found = _by_events(compiled, rates, conditions, budget, watch)
    if isinstance(found, GivenUp):
        return replace(found, at_least_s=max(found.at_least_s, least_s))
    waited = compiled.runs[~compiled.runs["repeats"]]
    if waited["end_s"].max(initial=0.0) > budget.until_s:
        return GivenUp(budget.until_s, is_late=True, work=found.work)
    return found


def _may_sweep(compiled: Compiled, rates: FloatArray, conditions: Conditions) -> bool:
    repeats = bool(compiled.runs["repeats"].any())
    return not conditions.changes and not repeats and bool((rates > 0).all())


def _swept(compiled: Compiled, rates: FloatArray, conditions: Conditions) -> FullResult | None:
    state = SweepState(
        **compiled.work._asdict(),
        noise=Noise(conditions.noise_s, conditions.seed),
        overhead_s=overheads(compiled, conditions),
        resource=empty_flows(rates, 0, 0).resource,
        ready=np.zeros(compiled.num_chains),
        staged=np.zeros(compiled.num_chains),
        free=np.zeros(compiled.num_ports),
        rate=np.zeros(len(compiled.work.edges)),
        busy_until=np.zeros(len(rates)),
        owner=np.full(len(rates), NONE),
        run=compiled.runs,
    )
    if not sweep(state):
        compiled.runs["end_s"] = compiled.runs["start_s"]
        return None
    return _result(compiled, (int(compiled.runs["messages"].sum()), 0, 0), Method.SWEEP)


def _by_events(
    compiled: Compiled, rates: FloatArray, conditions: Conditions, budget: WorkBudget, watch: Watch
) -> FullResult | GivenUp:
    world = first_world(compiled, rates, conditions, again=bool(compiled.runs["repeats"].any()))
    start_runs(world, range(len(compiled.runs)))
    changes, next_change = timed_changes(compiled, conditions), 0
    counters = world.counters
    while counters[WAITED_FOR] > 0:
        counters[MOST_WORK] = work_done(world) + max(1, min(WATCHED_WORK, budget.most_work // FORECAST_AFTER))
        next_change = run(world, changes, next_change, budget.until_s, False)
        if counters[WAITED_FOR] == 0:
            break
        now = next_instant(world.timers, world.finishes, changes, next_change)
        if now == np.inf or counters[RESTARTS] > MOST_RESTARTS:
            hint = "a wire on its route stays at rate zero"
            raise CommsError("a message can never arrive", "simulation", hint)
        share = _share_done(compiled, counters)
        if now > budget.until_s:
            return GivenUp(budget.until_s, is_late=True, work=work_done(world))
        if budget.is_too_much(work_done(world), share):
            return GivenUp(now, is_late=False, work=work_done(world))
        if counters[MOST_WORK] <= work_done(world):
            watch(share)
        if is_short_of_timers(world):
            world = world._replace(timers=grown(world.timers))
    counted = int(counters[ARRIVED]), int(counters[FLOW_EVENTS]), int(counters[SOLVED])
    return _result(compiled, counted, Method.EVENTS)


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


def _result(compiled: Compiled, counted: tuple[int, int, int], method: Method) -> FullResult:
    runs = compiled.runs
    took = np.where(runs["repeats"], np.nan, runs["end_s"] - runs["start_s"])
    first = np.flatnonzero(runs["group"] == 0)
    seconds = np.maximum.reduceat(took, first) if len(first) else took
    nbytes, load = compiled.crossings
    return FullResult(seconds, nbytes, load, *counted, method)
