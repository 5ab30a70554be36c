"""Plan space: every plan that a job leaves open on so many chips, and the best of them by a score.

What a job fixes stays as it is: degrees, microbatches, ZeRO, the schedule. Tensor parallelism stays inside a host
unless asked for wider. Whether a model can be split so, and how fast that is, is the business of the score: a pure
function from a plan to a `Scored`, so that the closed form, a simulation or anything else can be asked, and the same
search serves them all.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Protocol

from comms.errors import PartitionError, PlanError
from orchestrator.config.hardware.cluster import Cluster
from orchestrator.config.job_file import Job
from partitioner.layout.parallel_plan import Plan
from partitioner.layout.pipeline_schedules import PipelineSchedule


class Score(Protocol):
    """What a plan is ranked by."""

    @property
    def seconds(self) -> float: ...
    @property
    def peak_bytes(self) -> int: ...
    @property
    def fits(self) -> bool: ...


@dataclass(frozen=True, slots=True)
class Scored:
    """A plan and its score."""

    plan: Plan
    score: Score


@dataclass(frozen=True, slots=True)
class Ranking:
    """Plans that fit, the fastest first, then those that do not, the smallest first; and why others are not among them.

    `refused`: problems by plan, of what the model cannot be split by.
    """

    plans: tuple[Scored, ...]
    refused: tuple[tuple[Plan, str], ...]


def ranked(plans: Iterable[Plan], score: Callable[[Plan], Score]) -> Ranking:
    """All plans by their scores. What raises PartitionError is refused; ties go to less model parallelism."""
    scored, refused = list[Scored](), list[tuple[Plan, str]]()
    for plan in plans:
        try:
            scored.append(Scored(plan, score(plan)))
        except PartitionError as error:
            refused.append((plan, error.problem))
    return Ranking(tuple(sorted(scored, key=_rank)), tuple(refused))


def _rank(scored: Scored) -> tuple[object, ...]:
    plan, score = scored.plan, scored.score
    by = score.seconds if score.fits else score.peak_bytes
    is_gpipe = plan.schedule is PipelineSchedule.GPIPE
    return not score.fits, by, plan.tp * plan.pp, plan.pp, plan.zero, is_gpipe, plan.microbatches


def open_plans(job: Job, cluster: Cluster, most_stages: int) -> list[Plan]:
    """What a job leaves open on all chips of a cluster. Raises PlanError with the arithmetic where that is nothing."""
    return [plan for degrees in _degrees(job, cluster, most_stages) for plan in _plans(job, *degrees)]


def samples_of(plans: Iterable[Plan], global_batch: int) -> list[int]:
    """The sizes of microbatches that plans have, in samples, ascending."""
    return sorted({global_batch // (plan.dp * plan.microbatches) for plan in plans})


def _degrees(job: Job, cluster: Cluster, most_stages: int) -> list[tuple[int, int, int]]:
    """(dp, tp, pp), each with a batch that divides."""
    chips, asked = cluster.num_chips, job.plan
    sizes = [size for size in range(1, chips + 1) if chips % size == 0]
    candidates = [
        (chips // (tp * pp), tp, pp)
        for tp in ([asked.tp] if asked.tp else sizes)
        for pp in ([asked.pp] if asked.pp else sizes)
        if chips % (tp * pp) == 0 and asked.dp in (None, chips // (tp * pp))
    ]
    if not candidates:
        given = {"dp": asked.dp, "tp": asked.tp, "pp": asked.pp}
        known = " x ".join(f"{axis} {size}" for axis, size in given.items() if size)
        raise PlanError(f"{known} does not multiply to {chips} chips", "plan",
                        "change a degree, leave one out (auto), or take other --chips")  # fmt: skip
    within = [c for c in candidates if (asked.tp or c[1] <= cluster.chips_per_host)]
    within = [c for c in within if asked.pp or c[2] <= most_stages] or candidates
    if found := [c for c in within if job.global_batch % c[0] == 0]:
        return found
    if not any(job.global_batch % dp == 0 for dp, _, _ in candidates):
        dp = min(dp for dp, _, _ in candidates)
        raise PlanError(f"global_batch {job.global_batch} is not a multiple of dp {dp}", "plan",
                        f"use --global-batch {ceil(job.global_batch / dp) * dp}, or a smaller dp")  # fmt: skip
    dp = min(dp for dp, _, _ in within)
    hint = f"take fewer chips, or a batch that is a multiple of {dp}"
    problem = (
        f"the model cannot be split over {chips} chips: {most_stages} pieces for pipeline stages, "
        f"{cluster.chips_per_host} chips in a host for tp, and a batch of {job.global_batch} for the rest"
    )
    raise PlanError(problem, f"{chips} chips", hint)


def _plans(job: Job, dp: int, tp: int, pp: int) -> Iterator[Plan]:
    asked = job.plan
    schedules: Sequence[PipelineSchedule] = tuple(PipelineSchedule) if pp > 1 else (asked.schedule,)
    if "schedule" in asked.model_fields_set:
        schedules = (asked.schedule,)
    zeros = (0, 1) if dp > 1 and "zero" not in asked.model_fields_set else (asked.zero,)
    for microbatches in _microbatches(job, dp):
        for zero in zeros:
            for schedule in schedules if microbatches > 1 else schedules[-1:]:
                yield Plan(dp, tp, pp, zero, schedule, microbatches, batch_norm=asked.batch_norm)


def _microbatches(job: Job, dp: int) -> list[int]:
    """Per step and replica: as asked, else all that divide."""
    per_replica = job.global_batch // dp
    if job.microbatches is None:
        return [m for m in range(1, per_replica + 1) if per_replica % m == 0]
    if per_replica % job.microbatches:
        raise PlanError(
            f"{per_replica} sequences per replica (global_batch {job.global_batch} / dp {dp}) do not split into "
            f"{job.microbatches} microbatches", "microbatches", "use a divisor, or leave microbatches at auto",
        )  # fmt: skip
    return [job.microbatches]
