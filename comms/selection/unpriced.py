"""Unpriced: what an automatic choice would look at, but has no closed form for the levels that the group folds into.

Only full fidelity can time these. Which of them may be faster than what has a closed form is seen before a message
is moved, and without the loops that move them: by how soon they can be done at all (`simulation.lower_bound`).
"""

from dataclasses import dataclass

from comms.errors import TooManyMessages
from comms.networks.tiered import TieredTopology
from comms.selection.candidate_jobs import jobs_of, most_sends
from comms.selection.choice import Choice
from comms.selection.comparison import suitable
from comms.selection.question import Question
from comms.simulation.compiled import CollectiveJob, compile_jobs
from comms.simulation.lower_bound import end_lower_bound_s

ROUGHLY = 4.0  # a guess at what chips take that do not fold is rarely so many times too long


@dataclass(frozen=True, slots=True)
class Rivals:
    """Algorithms that full fidelity alone can time."""

    hopeful: tuple[Choice, ...]  # may be faster than so much
    unknown: tuple[str, ...]  # perhaps, but with too many messages to look at


def rivals(question: Question, choice: Choice, to_beat_s: float, most_messages: int) -> Rivals:
    """Of a choice; looking at so many messages at most, all in all."""
    priced = {choice.algorithm, *(name for name, _ in choice.others)}
    every = [each for each in suitable(question, priced) if not each.is_folded]
    if not every:
        return Rivals((), ())
    whole = question.network.take(question.num_chips).topology()
    hopeful: list[Choice] = []
    unknown: list[str] = []
    left = most_messages
    for each in every:
        jobs = _jobs(each, question, whole, left)
        left -= max((job.schedule.num_messages for job in jobs), default=0)
        if not jobs and each.seconds < ROUGHLY * to_beat_s:
            unknown.append(each.algorithm)
        if any(each.setup_s + _least_seconds(job, whole, to_beat_s) < to_beat_s for job in jobs):
            hopeful.append(each)
    return Rivals(tuple(hopeful), tuple(unknown))


def _jobs(
    choice: Choice, question: Question, whole: TieredTopology, most_messages: int
) -> tuple[CollectiveJob, ...]:
    """What may be moved for a choice; nothing where that is too much."""
    if most_sends(choice)[0] > most_messages:  # not even made
        return ()
    try:
        return tuple(jobs_of(choice, question.members, whole, whole, most_messages))
    except TooManyMessages:
        return ()


def _least_seconds(job: CollectiveJob, whole: TieredTopology, until_s: float) -> float:
    """What a job takes at least on a network in perfect order, if that is not later than `until_s`."""
    compiled = compile_jobs(whole, [job])
    return end_lower_bound_s(compiled, compiled.bytes_per_s, until_s)
