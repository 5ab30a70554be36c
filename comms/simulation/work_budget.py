"""Work budget: how long a simulation at full fidelity goes on, and what is known where it was given up.

Both limits are of the simulation itself, simulated seconds and a count of what the event loop did, so that the same
question is given up at the same point on every machine.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import inf
from typing import TypeAlias

ENDLESS = 2**62
WATCHED_WORK = 2**21  # a few seconds between two looks at how far a simulation has come
FORECAST_SLACK = 1.25  # a forecast may be this many times the budget
FORECAST_AFTER = 8  # after one part in so many of the budget, a forecast decides

Watch: TypeAlias = Callable[[float], None]  # is called with the share of the messages moved so far


def unwatched(share: float) -> None:
    """Ignores the progress of a simulation."""
    del share


@dataclass(frozen=True, slots=True)
class WorkBudget:
    """A simulation is given up where a job that is waited for ends after `until_s`, or for too much work.

    Work is messages that arrive, flows that start or end, and rates solved anew (1 to 3 us each).
    """

    until_s: float = inf
    most_work: int = ENDLESS

    def before(self, seconds: float) -> "WorkBudget":
        """For what comes so long after its start."""
        return replace(self, until_s=self.until_s - seconds)

    def is_too_much(self, work: int, share: float) -> bool:
        """Whether it is, or by a forecast from the share of the messages moved so far surely will be.

        The first messages may be more work than the rest, so a forecast has some slack.
        """
        forecast_is_due = work >= self.most_work // FORECAST_AFTER
        return work > self.most_work or (forecast_is_due and work > FORECAST_SLACK * share * self.most_work)


UNLIMITED = WorkBudget()


@dataclass(frozen=True, slots=True)
class GivenUp:
    """What has not been timed to its end: it takes longer than `at_least_s`."""

    at_least_s: float
    is_late: bool  # not done by WorkBudget.until_s; else too much work
    work: int = 0  # that was done for it

    def after(self, seconds: float) -> "GivenUp":
        """With what came before it."""
        return replace(self, at_least_s=self.at_least_s + seconds)
