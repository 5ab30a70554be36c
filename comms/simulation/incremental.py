"""Incremental simulation: full fidelity driven from outside, for communication that starts when chips get there.

All jobs that may ever run are given at first; each of their groups is started when its time has come, as often as
needed, and the caller is given what has ended since. Time goes forward only. Jobs that repeat are in the
background: they start by themselves, and their ends are not reported.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from comms.errors import CommsError
from comms.networks.topology import UNDISTURBED, Conditions, Topology
from comms.simulation.compiled import CollectiveJob, compile_jobs
from comms.simulation.events import MOST_RESTARTS, rewind, run
from comms.simulation.world import (
    ENDED,
    RESTARTS,
    WAITED_FOR,
    first_world,
    grown,
    is_short_of_timers,
    rates_under,
    start_runs,
    timed_changes,
)


class Ended(NamedTuple):
    """One group of one job, and when its last message arrived."""

    at_s: float
    job: int
    group: int


class IncrementalSimulation:
    """Jobs on a topology, started one by one."""

    def __init__(
        self, topology: Topology, jobs: Sequence[CollectiveJob], conditions: Conditions = UNDISTURBED
    ) -> None:
        compiled = compile_jobs(topology, jobs)
        rates = rates_under(compiled, conditions)
        self._world = first_world(compiled, rates, conditions, again=True)
        self._changes, self._next_change = timed_changes(compiled, conditions), 0
        self._first = np.flatnonzero(compiled.runs["group"] == 0)
        self._used = np.zeros(len(compiled.runs), dtype=np.bool_)
        start_runs(self._world, np.flatnonzero(compiled.runs["repeats"]).tolist())

    def start(self, job: int, group: int, at_s: float) -> float | None:
        """Start a group, not before anything that has happened; its end at once where it sends nothing."""
        number = int(self._first[job]) + group
        its = self._world.run[number]
        assert not self._used[number] or its["left"] == 0, "the group is under way"
        if self._used[number]:
            rewind(self._world, number)
        self._used[number] = True
        its["start_s"] = at_s
        if its["messages"] == 0:
            return at_s
        start_runs(self._world, (number,))
        return None

    def advance(self, until_s: float) -> tuple[Ended, ...]:
        """On to the first instant at which a group ends, or to `until_s`; the groups that ended there.

        Raises CommsError where nothing can happen any more although groups are under way.
        """
        counters = self._world.counters
        while counters[WAITED_FOR] > 0 and counters[ENDED] == 0:
            self._next_change = run(self._world, self._changes, self._next_change, until_s, True)
            if counters[ENDED] > 0 or not is_short_of_timers(self._world):
                break
            self._world = self._world._replace(timers=grown(self._world.timers))
        if until_s == np.inf and counters[WAITED_FOR] > 0 and counters[ENDED] == 0:
            hint = "a wire on its route stays at rate zero"
            if counters[RESTARTS] > MOST_RESTARTS:
                hint = "jobs in the background leave it no room, or are so short that they start too often"
            raise CommsError("a message can never arrive", "simulation", hint)
        found = []
        for number in self._world.ended[: counters[ENDED]]:
            its = self._world.run[number]
            found.append(Ended(float(its["end_s"]), int(its["job"]), int(its["group"])))
        counters[ENDED] = 0
        return tuple(found)
