"""Fastest plan: what `--plan auto` takes where a job leaves its plan open, the same for every verb.

All plans that the job allows are ranked by the closed form; the best are simulated, until none that follows could win.
Of plans that fit the fastest is taken; where none does, the smallest, so that what is said of it is of use. A model
that cannot be split by some degrees is split by others. What was searched before is remembered with all that decided
it.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from comms.errors import PlanError
from comms.selection.progress import Progress, quiet
from orchestrator.config.hardware.cluster import Cluster
from orchestrator.config.job_file import Job
from orchestrator.planning import preparation
from orchestrator.planning.job_capture import JobCapture
from orchestrator.planning.plan_space import Ranking, Scored, open_plans, ranked, samples_of
from orchestrator.planning.preparation import Prepared, key_of, remembered
from orchestrator.planning.sketches import Capture, Sketches
from orchestrator.runners.timing.closed_form import ClosedForm, closed_form
from orchestrator.runners.timing.prediction import SimulationResult, simulate, smallest_chip
from partitioner.layout.parallel_plan import Plan, plan_from_yaml, plan_to_yaml
from partitioner.program.peak_memory import RoleMemory, peak_memory

if TYPE_CHECKING:
    from orchestrator.planning.job_parts import JobParts

ROOMS = ("comms", "kernels", "partitioner", "orchestrator")  # whose code decides what is fastest
PRECISION = 0.002  # what the closed form leaves open: another plan must promise more than that
# plans that are simulated at least where chips or links are not all alike, of which the closed form does not know
UNEVEN_TRIES = 4
MOST_TRIES = 12
NAMED = 3  # reasons in an error


@dataclass(frozen=True, slots=True)
class Chosen:
    """A plan, what its fullest role needs, and the simulation of its sketch; None where it does not fit."""

    plan: Plan
    fullest: RoleMemory
    result: SimulationResult | None


def prepare(
    cluster: Cluster, job: Job, plan: Plan | None = None, *, progress: Progress = quiet,
    parts: "JobParts | None" = None,
) -> Prepared:  # fmt: skip
    """The Program of `job` by `plan`, or by the fastest one that fits. Raises PlanError, ModelError or CaptureError."""
    preparation.require_there(job)
    capture = JobCapture(job, progress, parts)
    if plan is None:
        plan = fastest_plan(cluster, capture)
    return preparation.prepare(cluster, job, plan, progress=progress, capture=capture)


def fastest_plan(cluster: Cluster, capture: Capture) -> Plan:
    """The plan that a job gets on all chips of a cluster. Raises PlanError where the model cannot be split so."""
    job = capture.job
    plans = open_plans(job, cluster, cluster.num_chips)
    if len(plans) == 1:
        return plans[0]

    def searched() -> Plan:
        with capture.progress("search for the fastest plan"):
            return search(cluster, job, Sketches(capture, samples_of(plans, job.global_batch))).plan

    if capture.content is None:
        return searched()
    facts = {
        "fastest": capture.content, "batch": job.global_batch, "microbatches": job.microbatches,
        "asked": repr(job.plan), "set": sorted(job.plan.model_fields_set),
        "cluster": repr(replace(cluster, origin="")),
    }  # fmt: skip
    entry = f"{key_of(facts, ROOMS)}.plan"
    return remembered(entry, lambda data: plan_from_yaml(data.decode()), searched, _written)[0]


def _written(plan: Plan) -> bytes:
    return plan_to_yaml(plan).encode()


def search(cluster: Cluster, job: Job, sketches: Sketches, form: ClosedForm | None = None) -> Chosen:
    """The fastest plan that fits, simulated, else the smallest. Raises PlanError where no plan splits the model."""
    form = form or closed_form(sketches.table, cluster, job.global_batch)
    ranking = ranked(open_plans(job, cluster, sketches.num_units), form)
    if not ranking.plans:
        raise _nothing(ranking, job, cluster)

    def chosen(plan: Plan) -> Chosen:
        program = sketches.program(plan, job.global_batch // (plan.dp * plan.microbatches))
        memory = peak_memory(program)
        fits = all(r.peak_bytes <= smallest_chip(program, cluster, r.stage).memory_bytes for r in memory)
        fullest = max(memory, key=lambda role: role.peak_bytes)
        return Chosen(plan, fullest, simulate(program, cluster) if fits else None)

    return best_of(ranking.plans, chosen, _least_tries(cluster))


def best_of(plans: Sequence[Scored], chosen: Callable[[Plan], Chosen], least_tries: int = 1) -> Chosen:
    """The best of a ranking by what `chosen` says: the fastest that fits, else the smallest."""
    best: Chosen | None = None
    for tries, scored in enumerate(plans):
        if best is not None and tries >= least_tries and _is_settled(best, scored, tries):
            break
        found = chosen(scored.plan)
        if best is None or _rank(found) < _rank(best):
            best = found
    assert best is not None, "a ranking of no plans"
    return best


def _is_settled(best: Chosen, scored: Scored, tries: int) -> bool:
    """Whether what is left, of which `scored` is the best, cannot win."""
    if tries > MOST_TRIES:
        return True
    if best.result is None:
        return not scored.score.fits and scored.score.peak_bytes > best.fullest.peak_bytes
    return not scored.score.fits or scored.score.seconds >= best.result.step_time_s * (1 - PRECISION)


def _rank(found: Chosen) -> tuple[bool, float]:
    if found.result is None:
        return True, found.fullest.peak_bytes
    return False, found.result.step_time_s


def _least_tries(cluster: Cluster) -> int:
    return 1 if cluster.conditions.is_healthy and not cluster.is_mixed else UNEVEN_TRIES


def _nothing(ranking: Ranking, job: Job, cluster: Cluster) -> PlanError:
    given = "change the degrees that are asked for, " if job.plan.tp or job.plan.pp or job.plan.dp else ""
    problem = f"the model cannot be split over {cluster.num_chips} chips: {'; '.join(_reasons(ranking))}"
    hint = f"{given}take fewer chips, or a batch of more than {job.global_batch}"
    return PlanError(problem, f"{cluster.num_chips} chips", hint)


def _reasons(ranking: Ranking) -> Iterator[str]:
    """The first few different ones, those of the least parallelism first."""
    by_cut = sorted(ranking.refused, key=lambda pair: pair[0].tp * pair[0].pp)
    yield from list(dict.fromkeys(problem for _, problem in by_cut))[:NAMED]
