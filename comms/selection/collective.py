"""Collective: what one takes over all chips of a network, by which algorithm, and which links decide.

Timed by closed form, folded or full (`pricing`). Nothing asked for, folded; but full, which moves every message,
where the chips do not fold into levels or the network is not in perfect order, as far as that is quickly done. There
fixed algorithms are compared at full fidelity too (`comparison`), and a schedule made for this network may
win. Where the chips fold, that is left to algorithms without a closed form that may be faster (`.unpriced`).
"""

import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from comms.errors import CommsError, TooManyMessages
from comms.selection import comparison
from comms.selection.choice import AUTO, Choice, choose, is_limited
from comms.selection.pricing import Fidelity, tier_shares
from comms.selection.question import Answer, Candidate, Question, conditions_in_words
from comms.selection.unpriced import Rivals, rivals
from comms.selection.waiting import Phase, moving, quiet
from comms.synthesis.synthesis import NAME as SYNTHESIZED
from comms.synthesis.synthesis import TREES as SYNTHESIZED_OPS

if TYPE_CHECKING:
    from comms.selection.full_collective import FullTiming, Site

QUICK_CHIPS = 1024  # up to here full fidelity is tried without being asked for
SYNTHESIS_CHIPS = 64  # up to here a schedule of its own is looked for without being asked for
PATIENT = "--fidelity full takes the time"
LOADING = "event loop of full fidelity (compiled on first use, then kept)"


def time_collective(
    question: Question, phase: Phase = quiet, clock: Callable[[], float] = time.perf_counter
) -> Answer:
    """The answer to a question. Raises CommsError."""
    started = clock()
    is_fixed = question.schedule is None and question.algorithm != SYNTHESIZED
    name = question.algorithm if is_fixed else AUTO
    choice = choose(question.op, question.nbytes, question.members, question.network, name)
    way = _way(question, choice)
    loading_s, answer = 0.0, None
    if way.fidelity is Fidelity.FULL and question.num_chips > 1:
        loading_s += _loaded(phase, clock)
        answer = _by_messages(question, choice, phase)
    if answer is None:
        answer = _by_levels(question, choice, way.fidelity)
    elif answer.fidelity is not Fidelity.FULL:
        way = _without_messages(question, choice)
    if _has_rivals(question, choice):
        allowance = comparison.QUICK if question.fidelity is Fidelity.FULL else comparison.GLIMPSE
        beside = rivals(question, choice, answer.seconds * (1 - comparison.ALIKE), allowance.messages)
        if beside.hopeful and question.fidelity in (None, Fidelity.FULL):
            loading_s += 0.0 if answer.full else _loaded(phase, clock)
            answer = _against_rivals(question, answer, beside.hopeful, allowance, phase)
        answer = replace(answer, notes=(*answer.notes, *_rivals_not_met(question, beside)))
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
    if uneven and question.algorithm != AUTO:
        raise CommsError(uneven, "--algorithm", "move every message: --fidelity full; or leave it to auto")
    return _without_messages(question, choice)


def _without_messages(question: Question, choice: Choice) -> _Way:
    """By levels, although the state of the network or its chips may ask for more."""
    warnings = []
    state = conditions_in_words(question.described)
    if state:
        warnings.append(
            f"the conditions of the cluster file are left out ({state}); --fidelity full applies them"
        )
    if not choice.is_folded:
        uneven = _why_flat(question)
        warnings.append(f"{uneven} and count as {choice.shape}; --fidelity full moves every message")
    return _Way(question.fidelity or Fidelity.FOLDED, (), tuple(warnings))


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
        from comms.selection.full_collective import load_loops

        load_loops()
    return clock() - started


def _by_messages(question: Question, choice: Choice, phase: Phase) -> Answer:
    """By moving every message; by levels where nobody asked for that, and it would take long."""
    from comms.selection import full_collective as full

    site = full.site_of(question.network, question.num_chips, question.described)
    if question.schedule is not None or question.algorithm == SYNTHESIZED:
        return _against_fixed(question, site, choice, phase)
    if question.algorithm == AUTO and not (choice.is_folded and not conditions_in_words(question.described)):
        return _contest(question, site, choice, phase)
    with moving(choice.algorithm, phase) as watch:
        timing = full.timed_choice(site, choice, watch=watch)
    own = Candidate(timing.algorithm, timing.seconds, Fidelity.FULL)
    found = _full_answer(question, site, timing, _reason(question, choice), (own, *_others(choice)))
    return replace(found, tiers=tier_shares(choice) if choice.is_folded else ())


def _against_fixed(question: Question, site: "Site", choice: Choice, phase: Phase) -> Answer:
    """A schedule of the user's own or a synthesized one, and beside it what auto would have taken."""
    from comms.selection import full_collective as full

    if question.schedule is not None:
        with moving(question.schedule.algorithm, phase) as watch:
            timing = full.timed_schedule(site, full.by_number(question.schedule), question.nbytes, watch)
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
    with suppress(TooManyMessages), moving(choice.algorithm, phase) as watch:
        rival = full.timed_choice(site, choice, watch=watch)
        ratio = rival.seconds / timing.seconds if timing.seconds else 1.0
        if question.is_uneven:
            what = f"{what}; even parts of as much in all ({rival.algorithm}) take {ratio:.2f} times as long"
        else:
            candidates.append(Candidate(rival.algorithm, rival.seconds, Fidelity.FULL))
            what = f"{what}; {rival.algorithm} takes {ratio:.2f} times as long"
    return _full_answer(question, site, timing, what, tuple(candidates))


def _contest(question: Question, site: "Site", usual: Choice, phase: Phase) -> Answer:
    """Fixed algorithms against each other at full fidelity, and the best against a schedule of its own.

    By levels where nobody asked for full fidelity, and nothing is timed quickly.
    """
    from comms.selection import full_collective as full

    choices = comparison.suitable(question) or (usual,)
    every = comparison.fixed(site, choices)
    if not choices[0].is_folded and not is_limited(question.members, question.network):
        every += comparison.hierarchies(question, site, choices)
    outcome = comparison.held(every, comparison.ASKED if question.fidelity else comparison.QUICK, phase)
    notes = list(outcome.notes("--algorithm times one alone" if question.fidelity else PATIENT))
    if question.fidelity is None and (outcome.is_misleading or not outcome.timings):
        return replace(_by_levels(question, usual, Fidelity.FOLDED), notes=tuple(notes))
    if not outcome.timings:
        raise TooManyMessages(
            f"every algorithm for {question.op} sends too many messages to move them one by one",
            "--fidelity full",
            "ask for folded, or for fewer chips",
        )
    timings = list(outcome.timings)
    best, reason = timings[0], _fastest_of(outcome)
    if is_limited(question.members, question.network):
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
    candidates = _timed(sorted(timings, key=comparison.rank))
    return replace(_full_answer(question, site, best, reason, candidates), notes=tuple(notes))


def _has_rivals(question: Question, choice: Choice) -> bool:
    """Whether algorithms without a closed form may be faster: an automatic choice by levels, in perfect order."""
    is_auto = question.algorithm == AUTO and question.schedule is None and question.num_chips > 1
    return is_auto and choice.is_folded and not conditions_in_words(question.described)


def _against_rivals(
    question: Question,
    answer: Answer,
    hopeful: Sequence[Choice],
    allowance: comparison.Allowance,
    phase: Phase,
) -> Answer:
    """What closed forms chose against what has none here."""
    from comms.selection.full_collective import site_of

    site = answer.site or site_of(question.network, question.num_chips, question.described)
    to_beat_s = answer.seconds * (1 - comparison.ALIKE)
    outcome = comparison.held(comparison.fixed(site, hopeful), allowance, phase, to_beat_s)
    first, *others = answer.candidates
    others = sorted((*others, *_timed(outcome.timings)), key=lambda each: each.seconds)
    notes = (*answer.notes, *outcome.notes("--algorithm times one alone"))
    best = outcome.timings[0] if outcome.timings else None
    if best is None or best.seconds >= to_beat_s:
        return replace(answer, candidates=(first, *others), notes=notes)
    ratio = answer.seconds / best.seconds
    reason = (
        f"fastest of {len(others) + 1}, by moving every message, as it has no closed form here; "
        f"{answer.algorithm}, fastest by closed form, takes {ratio:.2f} times as long"
    )
    candidates = tuple(sorted((first, *others), key=lambda each: each.seconds))
    return replace(_full_answer(question, site, best, reason, candidates), notes=notes)


def _rivals_not_met(question: Question, beside: Rivals) -> tuple[str, ...]:
    """What nobody timed although it may be faster."""
    if question.fidelity in (None, Fidelity.FULL):
        names, why = beside.unknown, "not compared, as to move every message would take long"
        hint = "--algorithm times one alone"
    else:
        names = (*(each.algorithm for each in beside.hopeful), *beside.unknown)
        why, hint = "has no closed form here, and may be faster", "--fidelity full moves every message"
    return (f"{why}: {', '.join(names)}; {hint}",) if names else ()


def _fastest_of(outcome: comparison.Outcome) -> str:
    doubt = "" if outcome.is_sure else "; of those not compared one may be faster"
    if outcome.num_compared > 1:
        late = f" ({len(outcome.late)} of them only until they were later)" if outcome.late else ""
        return f"fastest of {outcome.num_compared} when every message is moved{late}{doubt}"
    return f"the only one that was timed{doubt}" if outcome.unfinished else "nothing else suits"


def _timed(timings: "Iterable[FullTiming]") -> tuple[Candidate, ...]:
    return tuple(Candidate(each.algorithm, each.seconds, Fidelity.FULL) for each in timings)


def _full_answer(
    question: Question, site: "Site", timing: "FullTiming", reason: str, candidates: tuple[Candidate, ...]
) -> Answer:
    from comms.selection.full_collective import tier_loads

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
