"""Job capture: the graphs of a job's model, one for each size of its parts, and the Programs that they become.

torch is imported, and the model built, when the first graph is asked for: what the cache knows needs neither.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from comms.selection.progress import Progress, quiet
from kernels.builtin_optimizers import BUILT_IN
from orchestrator.config.job_file import Dtype, Job
from orchestrator.models.model_specs import SourceKind, parse_model
from partitioner.layout.parallel_plan import BatchNorms, Plan
from partitioner.program.program import Program

if TYPE_CHECKING:
    from orchestrator.planning.job_parts import JobParts
    from partitioner.capture.batch_inputs import Batch
    from partitioner.capture.captured_graph import Graph
    from partitioner.lowering.lower import StepShape


@dataclass
class JobCapture:
    """One job, captured as often as it has to be. `given`: its parts, if they are there already."""

    job: Job
    progress: Progress = quiet
    given: "JobParts | None" = None

    @cached_property
    def parts(self) -> "JobParts":
        """What the job names; shapes only where that does."""
        if self.given is not None:
            return self.given
        with self.progress("import torch"):
            from orchestrator.planning.job_parts import job_parts
        with self.progress("build model"):
            return job_parts(self.job, "meta")

    @cached_property
    def batch(self) -> "Batch":
        """A batch of a whole step."""
        return self.parts.example_batch()

    @cached_property
    def _shape(self) -> "tuple[StepShape, frozenset[str]]":
        """What a step processes, and parameters that no optimizer steps on."""
        from orchestrator.planning.job_parts import optimized_shape
        from orchestrator.planning.optimizer_checks import checked_traits
        from partitioner.lowering.lower import StepShape, step_shape

        job, parts, frozen = self.job, self.parts, frozenset[str]()
        if job.optimizer.is_own:
            scope = checked_traits(parts.optimizer).scope
            shape, frozen = optimized_shape(
                parts.model.module, self.batch, parts.optimizer, scope, job.clip_limit, {}
            )
        elif self._is_text:
            shape = StepShape(job.global_batch, job.seq, job.model, str(job.dtype), optimizer_states(job))
        else:
            shape = step_shape(parts.model.module, self.batch, optimizer_states(job))
        return replace(shape, model=job.model, dtype=str(job.dtype)), frozen

    @cached_property
    def content(self) -> dict[str, object] | None:
        """What decides a part of its graph, batch and plan left out, for the key of a cache.

        None where that is not all: code of the user's, or a file.
        """
        job, spec = self.job, parse_model(self.job.model)
        is_known = spec.kind in (SourceKind.BUILTIN, SourceKind.HF)
        is_file = spec.target.endswith(".json") or Path(spec.target).exists()
        if not is_known or is_file or job.has_own_parts:
            return None
        return model_content(job)

    @property
    def shape(self) -> "StepShape":
        """What a step processes."""
        return self._shape[0]

    @property
    def _is_text(self) -> bool:
        return not self.job.has_own_data and self.parts.model.example is None

    def program(self, plan: Plan) -> Program:
        """The checked Program of a plan. Raises PartitionError or CaptureError."""
        parts = self.parts
        from partitioner.lowering.lower import capture_and_lower

        def graph(microbatches: int) -> "Graph":
            if (found := _same_parts(parts.graphs, plan, microbatches)) is None:
                found = self._captured(self.batch, plan, microbatches)
                parts.graphs[plan, microbatches] = found
            return found

        return capture_and_lower(graph, plan, self.shape, self.progress)

    def graph_of(self, samples: int) -> "Graph":
        """The graph of a part of so many samples. Raises CaptureError.

        Text is made for two parts, as many samples as there are; data of the user's is cut as the job's batch is.
        """
        parts, job = self.parts, self.job
        batch, count, kind = self.batch, job.global_batch // samples, parse_model(job.model).kind
        plan = Plan(dp=max(count, 1), pp=job.plan.pp or 1, batch_norm=job.plan.batch_norm)
        is_made = kind in (SourceKind.BUILTIN, SourceKind.HF) and self._is_text
        if is_made:
            batch = parts.model.example_batch(2 * samples, job.seq)
        with self.progress(f"capture for parts of {samples} samples"):
            found = self._captured(batch, replace(plan, dp=2) if is_made else plan, 1)
        if not is_made or (kind is SourceKind.BUILTIN and count > 1):
            parts.graphs[plan, 1] = found
        return found

    def _captured(self, batch: "Batch", plan: Plan, microbatches: int) -> "Graph":
        from partitioner.capture.graph_units import capture_graph

        job, parts = self.job, self.parts
        return capture_graph(
            parts.model.module, batch, dp=plan.dp, microbatches=microbatches, loss_fn=parts.loss_fn,
            tp_plan=parts.model.tp_plan, frozen=self._shape[1], min_units=plan.pp, exact=job.dtype is Dtype.FP64,
            norms_per_part=plan.batch_norm is BatchNorms.PER_PART,
            repeats=parse_model(job.model).kind is SourceKind.BUILTIN and job.loss is None,
        )  # fmt: skip


@dataclass(frozen=True)
class ModuleCapture:
    """A module that somebody holds, captured by `graph` for a plan and microbatches; `job` says the batch alone."""

    job: Job
    shape: "StepShape"
    graph: "Callable[[Plan, int], Graph]"
    progress: Progress = quiet
    content: None = None  # nothing of it is kept

    def graph_of(self, samples: int) -> "Graph":
        """The graph of a part of so many samples. Raises CaptureError."""
        return self.graph(Plan(dp=max(self.job.global_batch // samples, 1)), 1)


def _same_parts(graphs: "Mapping[tuple[Plan, int], Graph]", plan: Plan, microbatches: int) -> "Graph | None":
    """What was captured for another plan that sees the same parts, in other places or one after another.

    Where parts need all others, only one chip's (which sees them one after another) are the same as one replica's. A
    graph that was cut into more pieces than this plan asks for is another.
    """
    for (other, others), graph in graphs.items():
        if other.dp * others != plan.dp * microbatches or other.batch_norm is not plan.batch_norm:
            continue
        is_one_chip = plan.num_chips == 1 and (other.dp == 1 or not graph.needs_whole_batch)
        is_cut_alike = not graph.needs_whole_batch and other.pp <= plan.pp <= len(graph.units)
        if is_one_chip or is_cut_alike:
            return graph
    return None


def model_content(job: Job) -> dict[str, object]:
    """What of a job decides a part of its model's graph."""
    return {
        "model": job.model, "model_args": {k: repr(v) for k, v in sorted(job.model_args.items())}, "seq": job.seq,
        "dtype": str(job.dtype), "optimizer": job.optimizer.name, "optimizer_states": optimizer_states(job),
    }  # fmt: skip


def optimizer_states(job: Job) -> int:
    """State tensors per parameter that the job's optimizer, a built-in one, keeps."""
    known = BUILT_IN[job.optimizer.name]
    return known.states if job.optimizer.momentum else known.states_without_momentum
