"""Collective: what one takes over all chips of a network, by which algorithm, and which links decide.

Timed by closed form, folded or full (`Fidelity`). Nothing asked for, folded; but full, which moves every message,
where the chips do not fold into levels or the network is not healthy, as far as that is quickly done. There
fixed algorithms are compared at full fidelity too (`comparison`), and a schedule made for this network may
win. Where the chips fold, that is left to algorithms without a closed form that may be faster (`comparison.unpriced`).
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from comms.collectives.schedule import Op, Schedule
from comms.errors import CommsError
from comms.networks.conditions import HEALTHY, Described
from comms.networks.network import Network
from comms.selection import comparison
from comms.selection.choice import AUTO, Choice, choose
from comms.selection.comparison import ASK_FOR_FULL, ASK_FOR_ONE, Comparison, unpriced
from comms.selection.progress import LOADING, Progress, quiet
from comms.selection.question import (
    SYNTHESIS_CHIPS,
    AlgorithmTime,
    Answer,
    Fidelity,
    Question,
    conditions_in_words,
)
from comms.synthesis.synthesis import TREES as SYNTHESIZED_OPS

QUICK_CHIPS = 1024  # up to here full fidelity is tried without being asked for


def estimate(
    op: Op | str,
    nbytes: float,
    network: Network,
    algorithm: str | Schedule = AUTO,
    fidelity: Fidelity | str | None = None,
    conditions: Described = HEALTHY,
) -> Answer:
    """What a collective over all chips of a network takes, by the fastest algorithm or the one that is named.

    `nbytes` is what it is in `collectives.schedule`. A schedule of your own is moved message by message.
    Raises UserError.
    """
    question = Question(
        network=network,
        num_chips=network.tiers[-1].size,
        op=Op(op),
        nbytes=nbytes,
        algorithm=algorithm if isinstance(algorithm, str) else AUTO,
        schedule=None if isinstance(algorithm, str) else algorithm,
        fidelity=None if fidelity is None else Fidelity(fidelity),
        described=conditions,
    )
    return answer_to(question)


def simulate(
    op: Op | str,
    nbytes: float,
    network: Network,
    algorithm: str | Schedule = AUTO,
    conditions: Described = HEALTHY,
) -> Answer:
    """The same by moving every message, in the state that the network is in; `Answer.loads` has the busiest wires."""
    return estimate(op, nbytes, network, algorithm, Fidelity.FULL, conditions)


def answer_to(
    question: Question, progress: Progress = quiet, clock: Callable[[], float] = time.perf_counter
) -> Answer:
    """The answer to a question. Raises UserError."""
    started = clock()
    name = AUTO if question.has_own_schedule else question.algorithm
    choice = choose(question.op, question.nbytes, question.members, question.network, name)
    way = _way(question, choice)
    if way.fidelity is Fidelity.FULL and question.num_chips > 1:
        answer = _by_messages(question, choice, progress, clock)
        if answer.fidelity is not Fidelity.FULL:
            way = _without_messages(question, choice)
    else:
        answer = _by_levels(question, choice, way.fidelity)
    if question.is_auto and not _needs_messages(question, choice):
        answer = _with_unpriced(answer, choice, progress, clock)
    return replace(
        answer,
        notes=(*way.notes, *answer.notes),
        warnings=way.warnings,
        elapsed_s=clock() - started - answer.loading_s,
    )


def _needs_messages(question: Question, choice: Choice) -> bool:
    """Whether the levels of the group do not tell what it has: it does not fold, or not all is healthy."""
    return not choice.is_folded or bool(conditions_in_words(question.described))


def _by_messages(
    question: Question, choice: Choice, progress: Progress, clock: Callable[[], float]
) -> Answer:
    """By moving every message; by levels where nobody asked for that, and it would take long."""
    loading_s = _loaded(progress, clock)
    from comms.selection import full_collective as full

    found: Answer | Comparison
    if question.has_own_schedule:
        found = full.by_own_schedule(question, choice, progress)
    elif question.is_auto and _needs_messages(question, choice):
        found = full.by_comparison(question, choice, progress)
    else:
        found = full.by_choice(question, choice, _reason(question, choice), progress)
    if isinstance(found, Comparison):
        notes = found.notes(ASK_FOR_FULL)
        found = replace(_by_levels(question, choice, Fidelity.FOLDED), notes=notes)
    return replace(found, loading_s=loading_s)


def _with_unpriced(answer: Answer, choice: Choice, progress: Progress, clock: Callable[[], float]) -> Answer:
    """Beside what was chosen by levels, what has no closed form: timed where that is quick, else named."""
    question = answer.question
    budget = comparison.QUICK if question.fidelity is Fidelity.FULL else comparison.BRIEF
    beside = unpriced(question, choice, answer.seconds * (1 - comparison.FIDELITY_TOLERANCE), budget.messages)
    if question.fidelity in (None, Fidelity.FULL):
        named, hint = beside.unknown, ASK_FOR_ONE
        why = "not compared, as to move every message would take long"
        if beside.promising:
            loading_s = answer.loading_s or _loaded(progress, clock)
            from comms.selection.full_collective import against_closed_forms

            answer = against_closed_forms(answer, beside.promising, budget, progress)
            answer = replace(answer, loading_s=loading_s)
    else:
        named = (*(each.algorithm for each in beside.promising), *beside.unknown)
        why, hint = "has no closed form here, and may be faster", "--fidelity full moves every message"
    return replace(answer, notes=(*answer.notes, f"{why}: {', '.join(named)}; {hint}")) if named else answer


def _loaded(progress: Progress, clock: Callable[[], float]) -> float:
    """Seconds until the event loop could be used."""
    started = clock()
    with progress(LOADING):
        # Imported here: what only wants closed forms need not load compiled loops.
        from comms.selection.full_collective import load_loops

        load_loops()
    return clock() - started


@dataclass(frozen=True, slots=True)
class _FidelityUsed:
    """The fidelity that is used, why, and what the reader may not expect of it."""

    fidelity: Fidelity
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


def _way(question: Question, choice: Choice) -> _FidelityUsed:
    asked, described = question.fidelity, question.described
    if question.has_own_schedule:
        what = "a schedule of your own" if question.schedule is not None else "a synthesized schedule"
        what = "an uneven all-to-all" if question.is_uneven else what
        warning = f"{what} is timed message by message: --fidelity {asked} has no effect"
        return _FidelityUsed(Fidelity.FULL, (), (warning,) if asked not in (None, Fidelity.FULL) else ())
    state = conditions_in_words(described)
    special = [f"conditions of the cluster file: {state}"] if state else []
    uneven = "" if choice.is_folded else _why_flat(question)
    if uneven:
        special.append(uneven)
    if asked is Fidelity.FULL or (asked is None and special and question.num_chips <= QUICK_CHIPS):
        why = () if asked else ("every message is moved, because of the above",)
        return _FidelityUsed(Fidelity.FULL, (*special, *why) if special else ())
    if uneven and question.algorithm != AUTO:
        raise CommsError(uneven, "--algorithm", "move every message: --fidelity full; or leave it to auto")
    return _without_messages(question, choice)


def _without_messages(question: Question, choice: Choice) -> _FidelityUsed:
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
    return _FidelityUsed(question.fidelity or Fidelity.FOLDED, (), tuple(warnings))


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
    others = (AlgorithmTime(name, seconds, Fidelity.CLOSED) for name, seconds in choice.others)
    return Answer(
        question=question,
        algorithm=choice.algorithm,
        protocol=choice.protocol.name,
        fidelity=fidelity,
        seconds=seconds,
        setup_s=choice.setup_s,
        reason=_reason(question, choice),
        tiers=choice.tier_shares() if choice.is_folded else (),
        candidates=(AlgorithmTime(choice.algorithm, seconds, fidelity), *others),
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
