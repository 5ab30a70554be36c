"""Comparison: algorithms timed against each other at full fidelity, where closed forms cannot decide.

A candidate is given up as soon as it is later than the fastest so far; those that are quickly done go on to their end,
for the reader to compare. What would exceed the budget is left out, and the answer says what. Budgets count messages
and events, so that the same question has the same answer everywhere.

What an automatic choice would look at, but has no closed form for the levels that the group folds into (`unpriced`),
only full fidelity can time. Which of them may be faster than what has a closed form is seen before a message is moved,
and without the loops that move them: by how soon they can be done at all (`simulation.lower_bound`).
"""

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from math import inf

from comms.algorithms.catalog import algorithm_of
from comms.errors import CommsError, TooManyMessages
from comms.networks.tiered import TieredTopology
from comms.selection.candidate_jobs import MOST_MESSAGES, jobs_of, most_sends
from comms.selection.choice import Choice, choose, offered
from comms.selection.progress import Progress, moving
from comms.selection.question import Question
from comms.selection.site import FullTiming
from comms.simulation.compiled import CollectiveJob, compile_jobs
from comms.simulation.lower_bound import end_lower_bound_s
from comms.simulation.work_budget import ENDLESS, UNLIMITED, GivenUp, Watch, WorkBudget
from comms.units import format_seconds

FEW_MESSAGES = 2**14  # who has no more is timed to the end
TIE_TOLERANCE = 1e-8  # relative: what differs by less is equal, and the first in the catalog wins
FIDELITY_TOLERANCE = 1e-3  # relative: up to this full fidelity and closed forms agree on groups that fold
TRUSTED_RATIO = 1.1  # times faster, by which an estimate is believed rather than what was timed
RATIO_LIMIT = 2.0  # times the fastest: who is estimated to take longer gets a brief look only
GUESS_RATIO = 4.0  # a guess at what chips take that do not fold is rarely so many times too long
ASK_FOR_FULL = "--fidelity full takes the time"
ASK_FOR_ONE = "--algorithm times one alone"


@dataclass(frozen=True, slots=True)
class Budget:
    """How much of a comparison is simulated; work is as `simulation.work_budget` counts it."""

    messages: int  # of a candidate
    work: int  # of a candidate
    total: int  # work of all candidates

    def for_next(self, left: int, ratio: float) -> "Budget":
        """For a candidate that by its estimate takes `ratio` times as long as the fastest, with so much work left."""
        # Estimates may be wrong, so that nobody is left out unseen; but the less one promises, the less is spent.
        most = self if ratio < 1 else QUICK if ratio < RATIO_LIMIT else BRIEF
        messages = min(self.messages, most.messages) if left > 0 else 0
        return Budget(messages, min(self.work, most.work, left), left)


BRIEF = Budget(2**17, 2**18, 2**18)  # well under a second
QUICK = Budget(2**21, 3 * 2**21, 2**23)  # some 10 s
THOROUGH = Budget(MOST_MESSAGES, ENDLESS, ENDLESS)  # as long as it takes


@dataclass(frozen=True, slots=True, eq=False)
class Candidate:
    """An algorithm to time, `estimate_s` before it is.

    `run` is given the most messages and work (with the setup) that are worth it. It raises TooManyMessages.
    """

    name: str
    estimate_s: float
    messages: int  # about
    run: Callable[[int, WorkBudget, Watch], FullTiming | GivenUp]

    def timed(self, progress: Progress) -> FullTiming:
        """Alone, as long as it takes. Raises TooManyMessages."""
        with moving(self.name, progress) as watch:
            found = self.run(MOST_MESSAGES, UNLIMITED, watch)
        assert isinstance(found, FullTiming), "nothing limits it"
        return found

    def within(self, budget: Budget, best_s: float, progress: Progress) -> FullTiming | GivenUp:
        """As far as the budget goes, and unless it is quickly done no longer than the best so far took."""
        until_s = inf if self.messages <= FEW_MESSAGES else best_s * (1 + TIE_TOLERANCE)
        try:
            with moving(self.name, progress) as watch:
                return self.run(budget.messages, WorkBudget(until_s, budget.work), watch)
        except TooManyMessages:
            return GivenUp(0.0, is_late=False)


@dataclass(frozen=True, slots=True)
class Unfinished:
    """A candidate that exceeded its budget."""

    name: str
    seconds: float  # inf where nothing is known
    is_bound: bool  # it takes so long at least; else a guess

    def __str__(self) -> str:
        if self.seconds == inf:
            return self.name
        known = format_seconds(self.seconds)
        return f"{self.name} ({f'{known} or more' if self.is_bound else f'roughly {known}'})"


@dataclass(frozen=True, slots=True, eq=False)
class Comparison:
    """What came of the candidates."""

    timings: tuple[FullTiming, ...]  # fastest first, each algorithm once
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
        best_s = min((each.seconds for each in self.unfinished if not each.is_bound), default=inf)
        return bool(self.timings) and best_s * TRUSTED_RATIO < self.timings[0].seconds

    def notes(self, hint: str) -> tuple[str, ...]:
        """What was not looked at, and what to do about it."""
        if not self.unfinished:
            return ()
        names = ", ".join(map(str, self.unfinished))
        return (f"not compared, as to time them would take long: {names}; {hint}",)


def compare(
    candidates: Iterable[Candidate], budget: Budget, progress: Progress, to_beat_s: float = inf
) -> Comparison:
    """Every candidate timed that is worth it, in this order; who cannot beat `to_beat_s` is late from the start."""
    best: dict[str, FullTiming] = {}
    at_least: dict[str, float] = {}  # of those given up
    estimates: dict[str, float] = {}
    left, best_s = budget.total, to_beat_s
    for each in candidates:
        found = each.within(budget.for_next(left, each.estimate_s / best_s), best_s, progress)
        estimates[each.name] = each.estimate_s
        if isinstance(found, GivenUp):
            left -= found.work
            at_least[each.name] = found.at_least_s
            continue
        left -= found.result.work
        if each.name not in best or found.seconds < best[each.name].seconds:
            best[each.name] = found
            best_s = min(best_s, found.seconds)
    # An algorithm in several variants counts as timed when one of them was.
    lost = {name: seconds for name, seconds in at_least.items() if name not in best}
    unfinished = tuple(
        Unfinished(name, seconds or estimates[name], seconds > 0)
        for name, seconds in lost.items()
        if seconds < best_s
    )
    late = tuple(name for name, seconds in lost.items() if seconds >= best_s)
    return Comparison(tuple(sorted(best.values(), key=rank)), late, unfinished)


def rank(timed: FullTiming | Choice) -> float:
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


@dataclass(frozen=True, slots=True)
class Unpriced:
    """Algorithms that full fidelity alone can time."""

    promising: tuple[Choice, ...] = ()  # may be faster than so much
    unknown: tuple[str, ...] = ()  # perhaps, but with too many messages to look at


def unpriced(question: Question, choice: Choice, to_beat_s: float, most_messages: int) -> Unpriced:
    """Beside a choice by closed forms; looking at so many messages at most, all in all."""
    priced = {choice.algorithm, *(name for name, _ in choice.others)}
    every = [each for each in suitable(question, priced) if not each.is_folded]
    if not every:
        return Unpriced()
    whole = question.network.take(question.num_chips).topology()
    promising: list[Choice] = []
    unknown: list[str] = []
    left = most_messages
    for each in every:
        jobs = _jobs(each, question, whole, left)
        left -= max((job.schedule.num_messages for job in jobs), default=0)
        if not jobs and each.seconds < GUESS_RATIO * to_beat_s:
            unknown.append(each.algorithm)
        if any(each.setup_s + _least_seconds(job, whole, to_beat_s) < to_beat_s for job in jobs):
            promising.append(each)
    return Unpriced(tuple(promising), tuple(unknown))


def _jobs(
    choice: Choice, question: Question, whole: TieredTopology, most_messages: int
) -> Sequence[CollectiveJob]:
    """What may be moved for a choice; nothing where that is too much."""
    if most_sends(choice)[0] > most_messages:  # not even made
        return ()
    try:
        return tuple(jobs_of(choice, question.members, whole, whole, most_messages))
    except TooManyMessages:
        return ()


def _least_seconds(job: CollectiveJob, whole: TieredTopology, until_s: float) -> float:
    """What a job takes at least on a healthy network, if that is not later than `until_s`."""
    compiled = compile_jobs(whole, [job])
    return end_lower_bound_s(compiled, compiled.bytes_per_s, until_s)
