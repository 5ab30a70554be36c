"""Contest: algorithms against each other at full fidelity, where closed forms cannot decide.

Who promises most comes first, and the others are given up as soon as they are later than the fastest so far; those
that are quickly done go on to their end, for the reader to compare. What would take too long is left out, and the
answer says what. All limits count messages and events, so that the same question has the same answer everywhere.
"""

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from math import inf
from typing import TYPE_CHECKING

from comms import wording
from comms.algorithms.catalog import algorithm_of
from comms.errors import CommsError, TooManyMessages
from comms.selection.candidate_jobs import MOST_MESSAGES, expected_messages
from comms.selection.choice import Choice, choose, offered
from comms.selection.question import Question
from comms.selection.topology_aware import laid_hierarchies
from comms.selection.waiting import Phase, moving
from comms.simulation.work_budget import ENDLESS, GivenUp, Limit

if TYPE_CHECKING:
    from comms.selection.full_collective import Effort, FullTiming, Site

FEW_MESSAGES = 2**14  # who has no more is timed to the end
TIED = 1e-8  # relative: what differs by less is equal, and the first in the catalog wins
ALIKE = 1e-3  # relative: up to this full fidelity and closed forms agree on groups that fold
WORTH = 1.1  # times faster, by which an estimate is believed rather than what was timed
HOPELESS = (
    2.0  # who by closed form takes so many times as long as one that was timed is left out where that costs
)


@dataclass(frozen=True, slots=True)
class Allowance:
    """How much may be moved, and how much work that may be (`simulation.work_budget`)."""

    messages: int  # of a candidate,
    work: int
    total: int  # and of all

    def within(self, left: int, ratio: float) -> "Allowance":
        """For a candidate that by its estimate takes `ratio` times as long as the best, with so much work left."""
        most = self if ratio < 1 else QUICK if ratio < HOPELESS else GLIMPSE
        messages = min(self.messages, most.messages) if left > 0 else 0
        return Allowance(messages, min(self.work, most.work, left), left)


QUICK = Allowance(2**21, 3 * 2**21, 2**23)  # some 10 s
GLIMPSE = Allowance(2**17, 2**18, 2**18)  # well under a second
ASKED = Allowance(MOST_MESSAGES, ENDLESS, ENDLESS)


@dataclass(frozen=True, slots=True, eq=False)
class Entrant:
    """One who takes part."""

    name: str
    estimate_s: float
    messages: int  # about
    run: "Callable[[Effort], FullTiming | GivenUp]"


@dataclass(frozen=True, slots=True)
class Unfinished:
    """One who was too much work."""

    name: str
    seconds: float  # inf where nothing is known
    is_bound: bool  # it takes so long at least; else a guess

    def __str__(self) -> str:
        if self.seconds == inf:
            return self.name
        known = wording.seconds(self.seconds)
        return f"{self.name} ({f'{known} or more' if self.is_bound else f'roughly {known}'})"


@dataclass(frozen=True, slots=True, eq=False)
class Outcome:
    """What came of a contest."""

    timings: "tuple[FullTiming, ...]"  # fastest first, each algorithm once
    late: tuple[str, ...]  # given up when they were later
    unfinished: tuple[Unfinished, ...]

    @property
    def num_compared(self) -> int:
        return len(self.timings) + len(self.late)

    @property
    def is_sure(self) -> bool:
        """Whether nobody who is not finished promises more than the fastest."""
        return all(each.seconds > self.timings[0].seconds for each in self.unfinished)

    @property
    def is_misleading(self) -> bool:
        """Whether someone who is not finished is estimated to be much faster than all who are."""
        least = min((each.seconds for each in self.unfinished if not each.is_bound), default=inf)
        return bool(self.timings) and least * WORTH < self.timings[0].seconds

    def notes(self, hint: str) -> tuple[str, ...]:
        """What was not looked at, and what to do about it."""
        if not self.unfinished:
            return ()
        names = ", ".join(map(str, self.unfinished))
        return (f"not compared, as to time them would take long: {names}; {hint}",)


def rank(timed: "FullTiming | Choice") -> float:
    """Seconds to nine digits: what differs by rounding only stays in the order of the catalog."""
    return float(f"{timed.seconds:.8e}")


def suitable(question: Question, without: Collection[str] = ()) -> tuple[Choice, ...]:
    """Whatever an automatic choice looks at and suits, the most promising first; guesses last."""
    choices = []
    for name in offered(question.op, question.members, question.network):
        if name in without:
            continue
        try:
            choice = choose(question.op, question.nbytes, question.members, question.network, name)
        except CommsError:  # it does not suit these levels
            continue
        if not algorithm_of(question.op, name).has_many_peers(question.op, choice.levels):
            choices.append(choice)
    return tuple(sorted(choices, key=lambda choice: (not choice.is_folded, rank(choice))))


def fixed(site: "Site", choices: Iterable[Choice]) -> tuple[Entrant, ...]:
    """Fixed algorithms, in order."""
    from comms.selection.full_collective import tried_choice

    return tuple(
        Entrant(each.algorithm, each.seconds, expected_messages(each), partial(tried_choice, site, each))
        for each in choices
    )


def hierarchies(question: Question, site: "Site", choices: Iterable[Choice]) -> tuple[Entrant, ...]:
    """What of them goes over bunches of chips, over those found on the network."""
    from comms.selection.full_collective import tried_schedule

    estimates = {each.algorithm: each.seconds for each in choices}
    named = offered(question.op, question.members, question.network)
    found = []
    for laid in laid_hierarchies(question.op, site.seen, named):
        name, run = laid.schedule.algorithm, partial(tried_schedule, site, laid, question.nbytes)
        found.append(Entrant(name, estimates.get(name, inf), laid.schedule.num_messages, run))
    return tuple(found)


def held(every: Sequence[Entrant], allowance: Allowance, phase: Phase, to_beat_s: float = inf) -> Outcome:
    """Everyone timed that is worth it."""
    best: dict[str, FullTiming] = {}
    given_up: dict[str, float] = {}
    left, best_s = allowance.total, to_beat_s
    for each in every:
        found = _run(each, allowance.within(left, each.estimate_s / best_s), best_s, phase)
        left -= found.work
        if isinstance(found, GivenUp):
            given_up[each.name] = found.at_least_s
        elif each.name not in best or found.seconds < best[each.name].seconds:
            best[each.name] = found
            best_s = min(best_s, found.seconds)
    lost = {name: at_least_s for name, at_least_s in given_up.items() if name not in best}
    late = tuple(name for name, at_least_s in lost.items() if at_least_s >= best_s)
    estimates = {each.name: each.estimate_s for each in every}
    unfinished = tuple(
        Unfinished(name, at_least_s or estimates[name], at_least_s > 0)
        for name, at_least_s in lost.items()
        if name not in late
    )
    return Outcome(tuple(sorted(best.values(), key=rank)), late, unfinished)


def _run(each: Entrant, allowance: Allowance, best_s: float, phase: Phase) -> "FullTiming | GivenUp":
    from comms.selection.full_collective import Effort

    until_s = inf if each.messages <= FEW_MESSAGES else best_s * (1 + TIED)
    try:
        with moving(each.name, phase) as watch:
            return each.run(Effort(allowance.messages, Limit(until_s, allowance.work), watch))
    except TooManyMessages:
        return GivenUp(0.0, is_late=False)
