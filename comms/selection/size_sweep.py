"""Size sweep: one collective over a range of sizes, doubling, each with the algorithm that is fastest there."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import groupby

from comms.errors import CommsError
from comms.selection.collective import answer_to
from comms.selection.progress import Progress, quiet
from comms.selection.question import Answer, Fidelity, Question
from comms.synthesis.synthesis import TREES as SYNTHESIZED_OPS

FACTOR = 2
NOT_SYNTHESIZED = (
    "schedules made for this network are not looked for at each size, though one may be faster: "
    "ask for one size, or for --algorithm synthesized"
)


@dataclass(frozen=True, slots=True)
class SizeRange:
    """Neighbouring sizes with the same choice."""

    algorithm: str
    protocol: str
    from_nbytes: float
    to_nbytes: float


@dataclass(frozen=True, slots=True, eq=False)
class SizeSweep:
    """Answers by size, ascending."""

    answers: tuple[Answer, ...]
    loading_s: float  # for the event loop, not in elapsed_s
    elapsed_s: float

    @property
    def ranges(self) -> tuple[SizeRange, ...]:
        """Where the choice changes."""
        by_choice = groupby(self.answers, key=lambda answer: (answer.algorithm, answer.protocol))
        sizes = ((choice, [answer.question.nbytes for answer in group]) for choice, group in by_choice)
        return tuple(SizeRange(*choice, nbytes[0], nbytes[-1]) for choice, nbytes in sizes)

    @property
    def notes(self) -> tuple[str, ...]:
        """What any of the answers notes, once, and what a single answer would have looked at."""
        own = (NOT_SYNTHESIZED,) if any(map(_may_be_synthesized, self.answers)) else ()
        return tuple(dict.fromkeys((*(note for each in self.answers for note in each.notes), *own)))

    @property
    def left_out(self) -> tuple[str, ...]:
        """What any of the answers does not model, once."""
        return tuple(dict.fromkeys(left for each in self.answers for left in each.left_out))

    @property
    def warnings(self) -> tuple[str, ...]:
        """What any of the answers warns of, once."""
        return tuple(dict.fromkeys(warning for each in self.answers for warning in each.warnings))


def _may_be_synthesized(answer: Answer) -> bool:
    """Whether a schedule made for the network would have been looked for: fixed algorithms met message by message."""
    compared = answer.fidelity is Fidelity.FULL and not answer.tiers
    return compared and answer.question.is_auto and answer.question.op in SYNTHESIZED_OPS


def sizes_between(low: float, high: float) -> tuple[float, ...]:
    """low, 2 low, 4 low, ... up to high."""
    if not 0 < low <= high:
        raise CommsError(
            f"no sizes from {low:g} to {high:g} bytes",
            "--sweep",
            "give two sizes above zero, the smaller first",
        )
    sizes = [low]
    while sizes[-1] * FACTOR <= high:
        sizes.append(sizes[-1] * FACTOR)
    return tuple(sizes)


def sweep_sizes(
    question: Question,
    sizes: tuple[float, ...],
    progress: Progress = quiet,
    clock: Callable[[], float] = time.perf_counter,
) -> SizeSweep:
    """Ask the same for every size. Schedules made for this network are not looked for at each: that takes long."""
    started = clock()
    question = replace(question, looks_for_better=False)
    with progress(f"{len(sizes)} sizes"):
        answers = tuple(answer_to(replace(question, nbytes=nbytes), progress, clock) for nbytes in sizes)
    loading_s = sum(answer.loading_s for answer in answers)
    return SizeSweep(answers, loading_s, clock() - started - loading_s)
