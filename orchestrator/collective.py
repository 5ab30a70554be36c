"""Collective: what one takes over all chips of a network, by which algorithm, and which links decide.

Timed by closed form, folded or full (`comms.pricing`). Nothing asked for, folded; but full, which moves every message,
where the chips do not fold into levels or the network is not in perfect order, for as many chips as that is quick
for. There fixed algorithms are compared at full fidelity too, and a schedule made for this network may win.

Assumes that all chips take part, rank r on chip r, and are ready at once. Not modelled: see LEFT_OUT.
"""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING

from comms.algorithms.catalog import considered
from comms.bisection import Cut, bisection
from comms.choice import AUTO, Choice, choose
from comms.conditions import CALM, Described
from comms.errors import CommsError
from comms.groups import Lattice, mesh_group
from comms.network import Network
from comms.pricing import Fidelity, TierShare, algbw, busbw, tier_shares
from comms.schedule import Op, Schedule
from comms.synthesis import NAME as SYNTHESIZED
from comms.synthesis import TREES as SYNTHESIZED_OPS

if TYPE_CHECKING:
    from orchestrator.full_collective import FullTiming, Site, TierLoad

QUICK_CHIPS = 1024  # up to here full fidelity is used without being asked for
SYNTHESIS_CHIPS = 64  # up to here a schedule of its own is looked for without being asked for
QUICK_MESSAGES = 2**18  # algorithms with fewer are all compared at full fidelity,
FEW = 3  # of others as many as promise most
BISECTION_CHIPS = 16_384  # up to here the halves of a network are looked at
LOADING = "event loop of full fidelity (compiled on first use, then kept)"

_NEVER = ("packets, queues and loss in switches", "what chips do beside the collective")
_CALM = ("contention with other jobs, degraded links and late chips",)
LEFT_OUT = {Fidelity.CLOSED: (*_CALM, *_NEVER), Fidelity.FOLDED: (*_CALM, *_NEVER), Fidelity.FULL: _NEVER}

Phase = Callable[[str], AbstractContextManager[None]]


def quiet(name: str) -> AbstractContextManager[None]:
    """A phase that nobody watches."""
    del name
    return nullcontext()


@dataclass(frozen=True, slots=True, eq=False)
class Question:
    """One collective over all chips of a network."""

    network: Network  # of exactly num_chips
    num_chips: int
    op: Op
    nbytes: float
    algorithm: str = AUTO  # or a name of the catalog, or SYNTHESIZED
    schedule: Schedule | None = None  # used instead of an algorithm
    fidelity: Fidelity | None = None
    described: Described = CALM
    chips_per_host: int = 1
    looks_for_better: bool = True  # auto may take long to look for a schedule of its own

    @property
    def members(self) -> Lattice:
        """All chips."""
        return mesh_group((("all", self.num_chips),), ("all",))

    @property
    def is_uneven(self) -> bool:
        """Whether chips send parts of all sizes to each other."""
        return (
            self.schedule is not None
            and self.op is Op.ALL_TO_ALL
            and not isinstance(self.schedule.shares, float)
        )

    @property
    def even_nbytes(self) -> float:
        """What one chip sends on average."""
        if self.schedule is None or isinstance(self.schedule.shares, float):
            return self.nbytes
        return self.nbytes * float(self.schedule.shares.sum()) / self.num_chips


@dataclass(frozen=True, slots=True)
class Candidate:
    """An algorithm that was looked at, and what it takes by which fidelity."""

    algorithm: str
    seconds: float
    fidelity: Fidelity


@dataclass(frozen=True, eq=False)
class Answer:
    """What a collective takes. `setup_s` is part of `seconds`."""

    question: Question = field(repr=False)
    algorithm: str
    protocol: str
    fidelity: Fidelity
    seconds: float
    setup_s: float
    reason: str
    tiers: tuple[TierShare, ...]  # of a group that folds
    candidates: tuple[Candidate, ...]  # with the algorithm itself, fastest first
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    full: "FullTiming | None" = None
    site: "Site | None" = None
    loads: "tuple[TierLoad, ...]" = ()  # of full fidelity
    loading_s: float = 0.0  # for the event loop, not in elapsed_s
    elapsed_s: float = 0.0

    @property
    def algbw_bytes_per_s(self) -> float:
        return algbw(self.question.op, self.question.nbytes, self.seconds)

    @property
    def busbw_bytes_per_s(self) -> float:
        return busbw(self.question.op, self.question.nbytes, self.seconds, self.question.num_chips)

    @cached_property
    def bisection(self) -> Cut | None:
        """The narrowest cut of the network into halves; None for one chip, and where it is too large to look at."""
        if not 1 < self.question.num_chips <= BISECTION_CHIPS:
            return None
        return bisection(self.site.seen if self.site else self.question.network.topology())

    @property
    def left_out(self) -> tuple[str, ...]:
        """What this fidelity does not model."""
        return LEFT_OUT[self.fidelity]

    @property
    def limiting_tier(self) -> TierShare | None:
        """The tier that would save most if it cost nothing."""
        best = max(self.tiers, key=lambda share: share.saved_s, default=None)
        return best if best is not None and best.saved_s > 0 else None


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
        warnings.append(f"{uneven} and count as one flat level; --fidelity full moves every message")
    return _Way(asked or Fidelity.FOLDED, (), tuple(warnings))


def _why_flat(question: Question) -> str:
    """Why the levels of the chips are not what is timed."""
    chips = f"{question.num_chips} chips"
    if question.network.levels(question.members) is None:
        return f"{chips} do not fold into equal groups on this network"
    what = (
        f"no algorithm for {question.op} suits"
        if question.algorithm == AUTO
        else f"{question.algorithm} does not suit"
    )
    return f"{chips} fold into levels that {what}"


def conditions_in_words(described: Described) -> str:
    """What of the conditions touches a collective; empty where nothing does."""
    flapping = sum(fault.flaps is not None for fault in described.links)
    down = sum(fault.factor == 0 and fault.flaps is None for fault in described.links)
    slow = sum(0 < fault.factor < 1 for fault in described.links)
    late = sum(len(fault.chips) for fault in described.chips if fault.delay_s)
    counted = (
        (down, "link down", "links down"),
        (slow, "slow link", "slow links"),
        (flapping, "flapping link", "flapping links"),
        (late, "late chip", "late chips"),
        (len(described.background), "job in the background", "jobs in the background"),
    )
    parts = [f"{count} {one if count == 1 else many}" for count, one, many in counted if count]
    if described.jitter.rate or described.jitter.delay_s:
        parts.append("jitter")
    return ", ".join(parts)


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
    )


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
    if full.expected_messages(choice) <= full.MOST_MESSAGES:
        with phase(f"every message of {choice.algorithm}"):
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
    skipped = 0
    choices = _suitable(question) or [usual]
    counts = [full.expected_messages(choice) for choice in choices]
    full.check_messages(min(counts), choices[counts.index(min(counts))].algorithm)
    for choice, count in zip(choices, counts, strict=True):
        if count > (full.MOST_MESSAGES if len(timings) < FEW else QUICK_MESSAGES):
            skipped += 1
            continue
        with phase(f"every message of {choice.algorithm}"):
            timings.append(full.timed_choice(site, choice))
    if not choices[0].is_folded:
        with phase("every message of hierarchies found on the network"):
            timings += full.timed_hierarchies(site, question.op, question.nbytes, QUICK_MESSAGES)
    best = min(timings, key=_rank)
    reason = (
        f"fastest of {len(timings)} when every message is moved" if len(timings) > 1 else "nothing else suits"
    )
    notes = [f"{skipped} algorithms with many messages are left out of the comparison"] if skipped else []
    if question.looks_for_better and question.op in SYNTHESIZED_OPS:
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
    """Every fixed algorithm that suits, the most promising first."""
    choices = []
    for name in considered(question.op, question.num_chips):
        try:
            choices.append(choose(question.op, question.nbytes, question.members, question.network, name))
        except CommsError:  # it does not suit these levels
            continue
    exact = [choice for choice in choices if choice.is_folded]
    return sorted(exact or choices, key=_rank)


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
