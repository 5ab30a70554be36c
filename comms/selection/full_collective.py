"""Full collectives: answers by moving every message, on a network in the state that it is in (`site`).

What the library adds (setup, the price of handing pieces on) is that of the tier, as everywhere. A schedule that
nobody calibrated (a user's own, a synthesized one) is charged the same, with what it takes for no bytes as its
latencies. An algorithm may be laid out in several ways, and a schedule moved by several protocols: the fastest counts.

Importing this loads the compiled loops; who only wants closed forms leaves it alone.
"""

from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from math import inf
from typing import TypeAlias

import numpy as np

from comms.algorithms import ring
from comms.algorithms.rounds import Ranks
from comms.collectives.schedule import Op, Schedule
from comms.errors import TooManyMessages
from comms.networks.fabrics.torus_mesh import Torus
from comms.networks.links import Link, Protocol
from comms.networks.network import Tier
from comms.selection import comparison
from comms.selection.candidate_jobs import Laid, check_messages, expected_messages, jobs_of, laid_hierarchies
from comms.selection.choice import Choice, choose, is_limited, offered
from comms.selection.comparison import Budget, Candidate, Comparison, compare, rank, suitable
from comms.selection.progress import Progress, quiet
from comms.selection.question import SYNTHESIS_CHIPS, AlgorithmTime, Answer, Fidelity, Question
from comms.selection.site import FullTiming, Site, site_of
from comms.simulation.compiled import CollectiveJob
from comms.simulation.full import FullResult, Method, simulate, simulate_within
from comms.simulation.incremental import IncrementalSimulation
from comms.simulation.work_budget import UNLIMITED, GivenUp, Watch, WorkBudget, unwatched
from comms.synthesis.synthesis import TREES as SYNTHESIZED_OPS
from comms.synthesis.synthesis import WORTH, improve, synthesize

SEED = 0  # of what is synthesized: the same question, the same schedule

Attempt: TypeAlias = Callable[[WorkBudget], FullTiming | GivenUp]


def load_loops() -> None:
    """Have the loops compiled, or loaded if they were compiled before."""
    pair, jobs = (
        Torus((2,), (Link(1e-6, 1e9),)),
        [CollectiveJob(ring.schedule(Op.ALL_REDUCE, Ranks(2)), np.arange(2), 1.0)],
    )
    for method in Method:
        simulate(pair, jobs, method=method)
    simulation = IncrementalSimulation(pair, jobs)
    for at_s in (1.0, 2.0):  # the second time a job is wound back
        simulation.start(0, 0, at_s)
        simulation.advance(np.inf)


def by_choice(question: Question, choice: Choice, reason: str, progress: Progress) -> Answer:
    """What was chosen by name or by closed form, alone."""
    site = _site(question)
    timing = of_choice(site, choice).timed(progress)
    others = (AlgorithmTime(name, seconds, Fidelity.CLOSED) for name, seconds in choice.others)
    found = _answer(question, site, timing, reason, (*_times([timing]), *others))
    return replace(found, tiers=choice.tier_shares() if choice.is_folded else ())


def by_own_schedule(question: Question, usual: Choice, progress: Progress) -> Answer:
    """A schedule of the user's own or a synthesized one, and beside it what auto would have taken."""
    site = _site(question)
    if question.schedule is not None:
        timing = of_schedule(site, by_number(question.schedule), question.nbytes).timed(progress)
        what = "every part goes straight to its chip" if question.is_uneven else "your own schedule, proved"
    else:
        with progress("synthesis"):
            made = synthesize(question.op, site.seen, question.nbytes, seed=SEED).schedule
            timing = of_schedule(site, by_number(made), question.nbytes).timed(quiet)
        what = "made for this network"
    timings = [timing]
    if question.is_uneven:
        usual = choose(question.op, question.even_nbytes, question.members, question.network, usual.algorithm)
    with suppress(TooManyMessages):
        other = of_choice(site, usual).timed(progress)
        ratio = other.seconds / timing.seconds if timing.seconds else 1.0
        if question.is_uneven:
            what = f"{what}; even parts of as much in all ({other.algorithm}) take {ratio:.2f} times as long"
        else:
            timings.append(other)
            what = f"{what}; {other.algorithm} takes {ratio:.2f} times as long"
    return _answer(question, site, timing, what, _times(timings))


def by_comparison(question: Question, usual: Choice, progress: Progress) -> Answer | Comparison:
    """Fixed algorithms against each other, and the best against a schedule of its own.

    What came of the comparison only where nobody asked for full fidelity, and nothing is timed quickly.
    """
    site = _site(question)
    limited = is_limited(question.members, question.network)
    choices = suitable(question) or (usual,)
    candidates = [of_choice(site, each) for each in choices]
    if not choices[0].is_folded and not limited:
        candidates += hierarchies(question, site, choices)
    found = compare(candidates, comparison.THOROUGH if question.fidelity else comparison.QUICK, progress)
    if question.fidelity is None and (found.is_misleading or not found.timings):
        return found
    if not found.timings:
        raise TooManyMessages(
            f"every algorithm for {question.op} sends too many messages to move them one by one",
            "--fidelity full",
            "ask for folded, or for fewer chips",
        )
    timings, reason = list(found.timings), _fastest_of(found)
    notes = list(found.notes(comparison.ASK_FOR_ONE if question.fidelity else comparison.ASK_FOR_FULL))
    if limited:
        notes.append("only what the library offers is compared (`algorithms` of the tier's protocols)")
    elif question.looks_for_better and question.op in SYNTHESIZED_OPS:
        if question.num_chips <= SYNTHESIS_CHIPS:
            with progress("synthesis of a schedule for this network"):
                better, verdict = _improved(question, site, timings[0])
            reason = f"{reason}; a schedule made for this network: {verdict}"
            if better is not None:
                timings, reason = [better, *timings], f"made for this network: {verdict}"
        else:
            notes.append(
                "a schedule made for this network is tried only when asked for: --algorithm synthesized"
            )
    answer = _answer(question, site, timings[0], reason, _times(sorted(timings, key=rank)))
    return replace(answer, notes=tuple(notes))


def against_closed_forms(
    answer: Answer, promising: Iterable[Choice], budget: Budget, progress: Progress
) -> Answer:
    """What closed forms chose against what has none here."""
    question = answer.question
    site = answer.site or _site(question)
    # The two kinds of figures differ by up to that tolerance, and what is faster by less would win by rounding.
    to_beat_s = answer.seconds * (1 - comparison.FIDELITY_TOLERANCE)
    found = compare([of_choice(site, each) for each in promising], budget, progress, to_beat_s)
    first, *others = answer.candidates
    others = sorted((*others, *_times(found.timings)), key=lambda each: each.seconds)
    notes = (*answer.notes, *found.notes(comparison.ASK_FOR_ONE))
    best = found.timings[0] if found.timings else None
    if best is None or best.seconds >= to_beat_s:
        return replace(answer, candidates=(first, *others), notes=notes)
    ratio = answer.seconds / best.seconds
    reason = (
        f"fastest of {len(others) + 1}, by moving every message, as it has no closed form here; "
        f"{answer.algorithm}, fastest by closed form, takes {ratio:.2f} times as long"
    )
    candidates = tuple(sorted((first, *others), key=lambda each: each.seconds))
    return replace(_answer(question, site, best, reason, candidates), notes=notes)


def of_choice(site: Site, choice: Choice) -> Candidate:
    """A fixed algorithm, by the fastest of its jobs."""

    def attempt(job: CollectiveJob, watch: Watch, limit: WorkBudget) -> FullTiming | GivenUp:
        found = _moved(site, job, limit.before(choice.setup_s), watch)
        if isinstance(found, GivenUp):
            return found.after(choice.setup_s)
        seconds = choice.setup_s + float(found.seconds[0])
        return FullTiming(choice.algorithm, seconds, choice.setup_s, choice.protocol, found)

    def run(most_messages: int, limit: WorkBudget, watch: Watch) -> FullTiming | GivenUp:
        jobs = jobs_of(choice, site.members, site.whole, site.seen, most_messages)
        return _fastest((partial(attempt, job, watch) for job in jobs), limit)

    return Candidate(choice.algorithm, choice.seconds, expected_messages(choice), run)


def of_schedule(site: Site, laid: Laid, nbytes: float, estimate_s: float = inf) -> Candidate:
    """Any schedule over all chips, by the fastest protocol of the outermost tier."""
    schedule, tier = laid.schedule, site.network.tier_for((0, site.num_chips - 1))

    def run(most_messages: int, limit: WorkBudget, watch: Watch) -> FullTiming | GivenUp:
        check_messages(schedule.num_messages, schedule.algorithm, most_messages)
        attempts = (
            partial(_by_protocol, site, laid, nbytes, tier, protocol, watch) for protocol in tier.protocols
        )
        return _fastest(attempts, limit)

    return Candidate(schedule.algorithm, estimate_s, schedule.num_messages, run)


def hierarchies(question: Question, site: Site, choices: Iterable[Choice]) -> list[Candidate]:
    """What of these choices goes over groups of chips, over those found on the network."""
    estimates = {each.algorithm: each.seconds for each in choices}
    named = offered(question.op, question.members, question.network)
    found = laid_hierarchies(question.op, site.seen, named)
    return [
        of_schedule(site, laid, question.nbytes, estimates.get(laid.schedule.algorithm, inf))
        for laid in found
    ]


def by_number(schedule: Schedule) -> Laid:
    """Rank r on chip r."""
    return Laid(schedule, np.arange(schedule.num_ranks))


def background_jobs(site: Site) -> list[CollectiveJob]:
    """The jobs of others, each again and again from the start."""
    jobs = []
    for each in site.resolved.background:
        chips = tuple(sorted(each.chips))
        job = choose(Op(each.op), each.nbytes, chips, site.network).job(np.array([chips]), site.whole)
        jobs.append(replace(job, repeats=True))
    return jobs


def _fastest(attempts: Iterable[Attempt], limit: WorkBudget) -> FullTiming | GivenUp:
    """Of several ways; each is given up when it is later than one before."""
    best: FullTiming | None = None
    given_up: list[GivenUp] = []
    for attempt in attempts:
        found = attempt(limit)
        if isinstance(found, GivenUp):
            given_up.append(found)
        elif best is None or found.seconds < best.seconds:
            best, limit = found, replace(limit, until_s=min(limit.until_s, found.seconds))
    if best is not None:
        return best
    at_least_s = min(each.at_least_s for each in given_up)
    work = sum(each.work for each in given_up)
    return GivenUp(at_least_s, all(each.is_late for each in given_up), work)


def _by_protocol(
    site: Site, laid: Laid, nbytes: float, tier: Tier, protocol: Protocol, watch: Watch, limit: WorkBudget
) -> FullTiming | GivenUp:
    inside, setup_s = site.network.inside(tier, protocol), tier.setup_s
    job = CollectiveJob(laid.schedule, laid.chips, nbytes, protocol=protocol, inside=inside)
    result = _moved(site, job, limit.before(setup_s), watch)
    if isinstance(result, GivenUp):
        return result.after(setup_s)
    seconds = float(result.seconds[0])
    if protocol.pipelined:
        # Fixed algorithms know their latencies by their outlines; of any other schedule they are what no bytes take.
        empty = _moved(site, replace(job, nbytes=0.0), UNLIMITED, unwatched)
        assert isinstance(empty, FullResult), "nothing limits it"
        latency_s = float(empty.seconds[0])
        setup_s += protocol.pipeline_fill_s(latency_s, max(0.0, seconds - latency_s))
    return FullTiming(laid.schedule.algorithm, setup_s + seconds, setup_s, protocol, result)


def _moved(site: Site, job: CollectiveJob, limit: WorkBudget, watch: Watch) -> FullResult | GivenUp:
    """A job among those of others, under the conditions of the site."""
    jobs = [job, *background_jobs(site)]
    return simulate_within(site.topology, jobs, site.resolved.conditions, limit, watch)


def _improved(question: Question, site: Site, fixed: FullTiming) -> tuple[FullTiming | None, str]:
    """A schedule for this site that beats a fixed algorithm, or None where that is kept; and why."""
    moving_s = fixed.seconds - fixed.setup_s
    verdict = improve(question.op, site.seen, question.nbytes, fixed.algorithm, moving_s, seed=SEED)
    if verdict.found is None:
        return None, verdict.reason
    timing = of_schedule(site, by_number(verdict.found.schedule), question.nbytes).timed(quiet)
    ratio = timing.seconds / fixed.seconds
    if ratio * WORTH >= 1:
        return None, f"keeps {fixed.algorithm}: the best found takes {ratio:.2f} times as long"
    return timing, f"{1 / ratio:.2f} times faster than {fixed.algorithm}"


def _fastest_of(found: Comparison) -> str:
    doubt = "" if found.is_sure else "; of those not compared one may be faster"
    if found.num_compared > 1:
        late = f" ({len(found.late)} of them only until they were later)" if found.late else ""
        return f"fastest of {found.num_compared} when every message is moved{late}{doubt}"
    return f"the only one that was timed{doubt}" if found.unfinished else "nothing else suits"


def _site(question: Question) -> Site:
    return site_of(question.network, question.num_chips, question.described)


def _times(timings: Iterable[FullTiming]) -> tuple[AlgorithmTime, ...]:
    return tuple(AlgorithmTime(each.algorithm, each.seconds, Fidelity.FULL) for each in timings)


def _answer(
    question: Question,
    site: Site,
    timing: FullTiming,
    reason: str,
    candidates: tuple[AlgorithmTime, ...],
) -> Answer:
    return Answer(
        question=question,
        algorithm=timing.algorithm,
        protocol=timing.protocol.name,
        fidelity=Fidelity.FULL,
        seconds=timing.seconds,
        setup_s=timing.setup_s,
        reason=reason,
        tiers=(),
        candidates=candidates,
        full=timing,
        site=site,
    )
