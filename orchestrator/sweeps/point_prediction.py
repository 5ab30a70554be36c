"""Point prediction: every point re-planned and simulated, with all that points have in common worked out once.

One predictor serves many points: a model is captured once for all its points (`planning.sketches`), its stages and a
cluster's prices are kept (`closed_form`). Figures are those of the simulation of the plan that is taken, as `simulate`
gives them. A point that cannot be is a result too, with the reason.

Which resource moves a knee: the plans that were taken at the fewest chips and beyond the knee, with one resource twice
as good at both, by the closed form.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from comms.errors import UserError
from comms.selection.progress import Progress, quiet
from comms.units import format_scaled
from orchestrator.config.hardware.cluster import Cluster
from orchestrator.config.job_file import Job
from orchestrator.planning.job_capture import JobCapture, model_content
from orchestrator.planning.plan_space import open_plans, samples_of
from orchestrator.planning.preparation import require_there
from orchestrator.planning.sketches import Sketches
from orchestrator.runners.timing.closed_form import ClosedForm, ClusterPrices
from orchestrator.runners.timing.fastest_plan import Chosen, search
from orchestrator.runners.timing.stage_units import StageBook
from orchestrator.sweeps.points import Point, PointResult, Status
from orchestrator.sweeps.what_if import Factors, scaled
from partitioner.layout.parallel_plan import BatchNorms, Plan
from partitioner.layout.pipeline_schedules import PipelineSchedule

SIZES = (1, 2, 4, 8)  # of parts, in samples: two that a model can be captured for give all others
DEGREES = ("dp", "tp", "pp", "zero", "microbatches")
LEVERS: Mapping[str, Factors] = {
    "bandwidth x2": Factors(bandwidth=2.0),
    "latency /2": Factors(latency=0.5),
    "compute x2": Factors(compute=2.0),
    "memory x2": Factors(memory=2.0),
}


@dataclass
class Predictor:
    """Predicts points one after the other."""

    progress: Progress = quiet
    _sketches: dict[str, tuple[Sketches, StageBook]] = field(default_factory=dict)
    _prices: dict[str, ClusterPrices] = field(default_factory=dict)

    def predict(self, point: Point) -> PointResult:
        """What a point comes to, whatever that is."""
        try:
            require_there(point.job)
            sketches, form = self._model(point.cluster, point.job)
            found = search(point.cluster, point.job, sketches, form)
        except UserError as error:
            place = f" ({error.where})" if error.where else ""
            reason = f"{error.problem}{place}"
            return PointResult(Status.REFUSED, point.chips, point.job.global_batch, reason)
        return result_of(point, found)

    def levers(self, first: Point, first_plan: Plan, last: Point, last_plan: Plan) -> dict[str, float]:
        """Efficiency at `last` against `first`, as it is and with each resource twice as good at both."""
        found = {}
        for name, factors in {"as it is": Factors(), **LEVERS}.items():
            few, many = (
                self._rate(replace(point, cluster=scaled(point.cluster, factors)), plan)
                for point, plan in ((first, first_plan), (last, last_plan))
            )
            found[name] = (many / last.chips) / (few / first.chips)
        return found

    def _rate(self, point: Point, plan: Plan) -> float:
        """Samples a second, whether it fits or not."""
        _, form = self._model(point.cluster, point.job)
        return point.job.global_batch / form.seconds(plan)

    def _model(self, cluster: Cluster, job: Job) -> tuple[Sketches, ClosedForm]:
        key = _local_key(job)
        capture = JobCapture(job, self.progress)
        if key is None or key not in self._sketches:
            sizes: Sequence[int] = SIZES
            if key is None:  # its batches are the user's: what is captured is cut from this one
                sizes = samples_of(open_plans(job, cluster, cluster.num_chips), job.global_batch)
            sketches = Sketches(capture, sizes)
            made = (sketches, StageBook(sketches.table))
            if key is None:
                return sketches, ClosedForm(made[1], self._price(cluster), job.global_batch)
            self._sketches[key] = made
        sketches, book = self._sketches[key]
        return sketches, ClosedForm(book, self._price(cluster), job.global_batch)

    def _price(self, cluster: Cluster) -> ClusterPrices:
        key = repr(cluster)
        if key not in self._prices:
            self._prices[key] = ClusterPrices(cluster)
        return self._prices[key]


def _local_key(job: Job) -> str | None:
    """What jobs have in common whose parts are the same: all but the batch. None where the batch is the user's."""
    if JobCapture(job).content is None:
        return None
    asked = {"tp": job.plan.tp, "pp": job.plan.pp, "batch_norm": str(job.plan.batch_norm)}
    return json.dumps(model_content(job) | asked, sort_keys=True)


def result_of(point: Point, found: Chosen) -> PointResult:
    """The figures of a plan; of one that does not fit its memory alone."""
    plan, result, memory = found.plan, found.result, min(c.memory_bytes for c in point.cluster.chip_types)
    degrees: dict[str, int | str] = {name: getattr(plan, name) for name in DEGREES}
    degrees |= {"schedule": str(plan.schedule), "batch_norm": str(plan.batch_norm)}
    made = PointResult(
        Status.TOO_LARGE, point.chips, point.job.global_batch, plan=str(plan), degrees=degrees,
        peak_memory_bytes=found.fullest.peak_bytes, memory_bytes=memory,
    )  # fmt: skip
    if result is None:
        needed, there = format_scaled(found.fullest.peak_bytes, "B"), format_scaled(memory, "B")
        reason = f"the smallest plan needs {needed} ({found.fullest.where}), a chip has {there}"
        return replace(made, reason=reason)
    parts = result.breakdown
    return replace(
        made, status=Status.OK, step_time_s=result.step_time_s, tokens_per_s=result.tokens_per_s,
        rate_unit=result.rate_unit, mfu=result.mfu, model_flops=result.model_flops, compute_s=parts.compute_s,
        optimizer_s=parts.optimizer_s, host_s=parts.host_s, bubble_s=parts.bubble_s,
        exposed_communication_s=dict(parts.exposed_communication_s), cost_usd_per_step=result.cost_usd_per_step,
        energy_j_per_step=result.energy_j_per_step,
    )  # fmt: skip


def plan_of(result: PointResult) -> Plan:
    """The plan that was taken."""
    dp, tp, pp, zero, microbatches = (int(result.degrees[name]) for name in DEGREES)
    schedule, norms = (result.degrees[name] for name in ("schedule", "batch_norm"))
    order = next(each for each in PipelineSchedule if each == schedule)
    return Plan(dp, tp, pp, zero, order, microbatches, batch_norm=BatchNorms(str(norms)))
