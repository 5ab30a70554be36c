"""Collective: what one takes over all chips of a network, by which algorithm, and which links decide.

Timed by closed form, folded or full (`comms.pricing`). Nothing asked for, folded; but full, which moves every message,
where the chips do not fold into levels or the network is not in perfect order, for as many chips as that is quick
for. There fixed algorithms are compared at full fidelity too, and a schedule made for this network may win.
"""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, replace
from math import inf
from typing import TYPE_CHECKING

from comms.choice import AUTO, Choice, choose, is_limited, offered
from comms.errors import CommsError, TooManyMessages
from comms.pricing import Fidelity, tier_shares
from comms.synthesis import NAME as SYNTHESIZED
from comms.synthesis import TREES as SYNTHESIZED_OPS
from orchestrator.question import Answer, Candidate, Question, conditions_in_words

if TYPE_CHECKING:
    from orchestrator.full_collective import FullTiming, Site

QUICK_CHIPS = 1024  # up to here full fidelity is used without being asked for
SYNTHESIS_CHIPS = 64  # up to here a schedule of its own is looked for without being asked for
QUICK_MESSAGES = 2**18  # algorithms with fewer are all compared at full fidelity,
FEW = 3  # of others as many as promise most,
HOPELESS = 2.0  # and not those that by closed form take so many times as long as one that was timed
LOADING = "event loop of full fidelity (compiled on first use, then kept)"

Phase = Callable[[str], AbstractContextManager[None]]


def quiet(name: str) -> AbstractContextManager[None]:
    """A phase that nobody watches."""
    del name
    return nullcontext()


def time_collective(
    question: Question, phase: Phase = quiet, clock: Callable[[], float] = time.perf_counter
) -> Answer:
    """The answer to a question. Raises CommsError."""
    started = clock()
    is_fixed = question.schedule is None and question.algorithm != SYNTHESIZED
    name = question.algorithm if is_fixed else AUTO
    choice = choose(question.op, question.nbytes, question.members, question.network, name)
    way = _way(question, choice)
    loading_s = 0.0
    if way.fidelity is not Fidelity.FULL or question.num_chips == 1:
        answer = _by_levels(question, choice, way.fidelity)
    else:
        loading_s = _loaded(phase, clock)
        answer = _by_messages(question, choice, phase)
    return replace(
        answer,
        notes=(*way.notes, *answer.notes),
        warnings=way.warnings,
        loading_s=loading_s,
        elapsed_s=clock() - started - loading_s,
    )


@dataclass(frozen=True, slots=True)
class _Way:
    """The fidelity that is used, why, and what the reader may not expect of it."""

    fidelity: Fidelity
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


def _way(question: Question, choice: Choice) -> _Way:
    asked, described = question.fidelity, question.described
    if question.schedule is not None or question.algorithm == SYNTHESIZED:
        what = "a schedule of your own" if question.schedule is not None else "a synthesized schedule"
        what = "an uneven all-to-all" if question.is_uneven else what
        warning = f"{what} is timed message by message: --fidelity {asked} has no effect"
        return _Way(Fidelity.FULL, (), (warning,) if asked not in (None, Fidelity.FULL) else ())
    state = conditions_in_words(described)
    special = [f"conditions of the cluster file: {state}"] if state else []
    uneven = "" if choice.is_folded else _why_flat(question)
    if uneven:
        special.append(uneven)
    if asked is Fidelity.FULL or (asked is None and special and question.num_chips <= QUICK_CHIPS):
        why = () if asked else ("every message is moved, because of the above",)
        return _Way(Fidelity.FULL, (*special, *why) if special else ())
    warnings = []
    if uneven and question.algorithm != AUTO:
        raise CommsError(uneven, "--algorithm", "move every message: --fidelity full; or leave it to auto")
    if state:
        warnings.append(
            f"the conditions of the cluster file are left out ({state}); --fidelity full applies them"
        )
    if uneven:
        warnings.append(f"{uneven} and count as {choice.shape}; --fidelity full moves every message")
    return _Way(asked or Fidelity.FOLDED, (), tuple(warnings))


def _why_flat(question: Question) -> str:
    """Why the levels of the chips are not what is timed."""
    chips = f"{question.num_chips} chips"
    if question.network.levels(question.members, aligned=True) is None:
        return f"{chips} do not fold into equal groups on this network"
    what = (
        f"no algorithm for {question.op} suits"
        if question.algorithm == AUTO
        else f"{question.algorithm} does not suit"
    )
    return f"{chips} fold into levels that {what}"


def _by_levels(question: Question, choice: Choice, fidelity: Fidelity) -> Answer:
    """By the levels of the group, or for one chip."""
    seconds = choice.seconds if fidelity is Fidelity.CLOSED else choice.setup_s + choice.folded_s()
    return Answer(
        question=question,
        algorithm=choice.algorithm,
        protocol=choice.protocol.name,
        fidelity=fidelity,
        seconds=seconds,
        setup_s=choice.setup_s,
        reason=_reason(question, choice),
        tiers=tier_shares(choice) if choice.is_folded else (),
        candidates=(Candidate(choice.algorithm, seconds, fidelity), *_others(choice)),
        notes=_advice(question, choice),
    )


def _advice(question: Question, choice: Choice) -> tuple[str, ...]:
    """What else may be faster: fixed algorithms leave links of most meshes and tori idle."""
    is_lattice = any(level.ring and level.fanout > 2 for level in choice.levels) and len(choice.levels) > 1
    if question.algorithm != AUTO or question.op not in SYNTHESIZED_OPS or not is_lattice:
        return ()
    if question.num_chips > SYNTHESIS_CHIPS:
        return ()
    return ("a schedule made for this network may be faster: --algorithm synthesized",)


def _reason(question: Question, choice: Choice) -> str:
    return choice.reason if question.algorithm == AUTO or not choice.levels else "asked for by name"


def _others(choice: Choice) -> tuple[Candidate, ...]:
    return tuple(Candidate(name, seconds, Fidelity.CLOSED) for name, seconds in choice.others)


def _loaded(phase: Phase, clock: Callable[[], float]) -> float:
    """Seconds until the event loop could be used."""
    started = clock()
    with phase(LOADING):
        # Imported here: what only wants closed forms need not load compiled loops.
        from orchestrator.full_collective import load_loops

        load_loops()
    return clock() - started


def _by_messages(question: Question, choice: Choice, phase: Phase) -> Answer:
    """By moving every message."""
    from orchestrator import full_collective as full

    site = full.site_of(question.network, question.num_chips, question.described)
    if question.schedule is not None or question.algorithm == SYNTHESIZED:
        return _against_fixed(question, site, choice, phase)
    if question.algorithm == AUTO and not (choice.is_folded and not conditions_in_words(question.described)):
        return _contest(question, site, choice, phase)
    with phase(f"every message of {choice.algorithm}"):
        timing = full.timed_choice(site, choice)
    own = Candidate(timing.algorithm, timing.seconds, Fidelity.FULL)
    found = _full_answer(question, site, timing, _reason(question, choice), (own, *_others(choice)))
    return replace(found, tiers=tier_shares(choice) if choice.is_folded else ())


def _against_fixed(question: Question, site: "Site", choice: Choice, phase: Phase) -> Answer:
    """A schedule of the user's own or a synthesized one, and beside it what auto would have taken."""
    from orchestrator import full_collective as full

    if question.schedule is not None:
        with phase(f"every message of {question.schedule.algorithm}"):
            timing = full.timed_schedule(site, full.by_number(question.schedule), question.nbytes)
        what = "every part goes straight to its chip" if question.is_uneven else "your own schedule, proved"
    else:
        with phase("synthesis"):
            timing = full.synthesized(site, question.op, question.nbytes)
        what = "made for this network"
    candidates = [Candidate(timing.algorithm, timing.seconds, Fidelity.FULL)]
    if question.is_uneven:
        choice = choose(
            question.op, question.even_nbytes, question.members, question.network, choice.algorithm
        )
    with suppress(TooManyMessages), phase(f"every message of {choice.algorithm}"):
        rival = full.timed_choice(site, choice)
        ratio = rival.seconds / timing.seconds if timing.seconds else 1.0
        if question.is_uneven:
            what = f"{what}; even parts of as much in all ({rival.algorithm}) take {ratio:.2f} times as long"
        else:
            candidates.append(Candidate(rival.algorithm, rival.seconds, Fidelity.FULL))
            what = f"{what}; {rival.algorithm} takes {ratio:.2f} times as long"
    return _full_answer(question, site, timing, what, tuple(candidates))


def _contest(question: Question, site: "Site", usual: Choice, phase: Phase) -> Answer:
    """Fixed algorithms against each other at full fidelity, and the best against a schedule of its own."""
    from orchestrator import full_collective as full

    timings: list[FullTiming] = []
    skipped: list[TooManyMessages] = []
    choices = _suitable(question) or [usual]
    for choice in choices:
        best_s = min((each.seconds for each in timings), default=inf)
        promises = len(timings) < FEW and choice.seconds < HOPELESS * best_s
        most = full.MOST_MESSAGES if promises else QUICK_MESSAGES
        try:
            with phase(f"every message of {choice.algorithm}"):
                timings.append(full.timed_choice(site, choice, most))
        except TooManyMessages as too_many:
            skipped.append(too_many)
    limited = is_limited(question.members, question.network)
    if not (choices[0].is_folded or limited):
        with phase("every message of hierarchies found on the network"):
            timings += full.timed_hierarchies(site, question.op, question.nbytes, QUICK_MESSAGES)
    if not timings:
        raise skipped[0]
    best = min(timings, key=_rank)
    reason = (
        f"fastest of {len(timings)} when every message is moved" if len(timings) > 1 else "nothing else suits"
    )
    notes = (
        [f"{len(skipped)} algorithms with many messages are left out of the comparison"] if skipped else []
    )
    if limited:
        notes.append("only what the library offers is compared (`algorithms` of the tier's protocols)")
    elif question.looks_for_better and question.op in SYNTHESIZED_OPS:
        if question.num_chips <= SYNTHESIS_CHIPS:
            with phase("synthesis of a schedule for this network"):
                better, verdict = full.improved(site, question.op, question.nbytes, best)
            reason = f"{reason}; a schedule made for this network: {verdict}"
            if better is not None:
                best, reason = better, f"made for this network: {verdict}"
                timings.append(better)
        else:
            notes.append(
                "a schedule made for this network is tried only when asked for: --algorithm synthesized"
            )
    ranked = sorted(timings, key=_rank)
    candidates = tuple(Candidate(each.algorithm, each.seconds, Fidelity.FULL) for each in ranked)
    return replace(_full_answer(question, site, best, reason, candidates), notes=tuple(notes))


def _rank(timed: "FullTiming | Choice") -> float:
    """Seconds to nine digits: what differs by rounding only stays in the order of the catalog."""
    return float(f"{timed.seconds:.8e}")


def _suitable(question: Question) -> list[Choice]:
    """Every fixed algorithm that suits, the most promising first; guesses last."""
    choices = []
    for name in offered(question.op, question.members, question.network):
        try:
            choices.append(choose(question.op, question.nbytes, question.members, question.network, name))
        except CommsError:  # it does not suit these levels
            continue
    return sorted(choices, key=lambda choice: (not choice.is_folded, _rank(choice)))


def _full_answer(
    question: Question, site: "Site", timing: "FullTiming", reason: str, candidates: tuple[Candidate, ...]
) -> Answer:
    from orchestrator.full_collective import tier_loads

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
        loads=tier_loads(site, timing, question.chips_per_host),
    )
