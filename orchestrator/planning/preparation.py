"""Preparation: from a cluster, a job and perhaps a plan to a Program, with torch imported only if it must be.

What every verb starts with. A Program made before from the same content comes from the cache; then neither torch nor
the model is needed to simulate it.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from comms.errors import PartitionError, PlanError, ProgramError, located
from orchestrator.config.hardware.cluster import Cluster
from orchestrator.config.job import Dtype, Job
from orchestrator.models.model_specs import SourceKind, parse_model
from orchestrator.planning import program_cache
from orchestrator.planning.plan_choice import Refusal, choose_plan
from partitioner.layout.parallel_plan import Plan
from partitioner.program.program import Program

if TYPE_CHECKING:
    from kernels.optimizers import Factory
    from orchestrator.models.model_builder import BuiltModel
    from partitioner.capture.captured_graph import Graph

OPTIMIZER_STATES = {"adamw": 2}


class Progress(Protocol):
    """Where long phases are shown; `views.console.Console` is one."""

    def phase(self, name: str) -> AbstractContextManager[None]:
        """Show that `name` is going on while the block runs."""


class Quiet:
    """Progress that nobody watches."""

    def phase(self, name: str) -> AbstractContextManager[None]:
        """Show nothing."""
        del name
        return nullcontext()


@dataclass(frozen=True)
class Prepared:
    """A Program and all it came from. `was_cached`: nothing was captured this time."""

    cluster: Cluster
    job: Job
    plan: Plan
    program: Program
    was_cached: bool


def prepare(
    cluster: Cluster,
    job: Job,
    plan: Plan | None = None,
    *,
    progress: Progress | None = None,
    use_cache: bool = True,
) -> Prepared:
    """Make the Program of `job` on all chips of `cluster`. Raises PlanError, ModelError or CaptureError."""
    progress = progress or Quiet()
    spec = parse_model(job.model)
    cacheable = use_cache and spec.kind in (SourceKind.BUILTIN, SourceKind.HF) and not _is_file(spec.target)
    if plan is not None:
        return _prepared(cluster, job, plan, progress, cacheable)
    num_params = _num_params(job, progress, cacheable)
    refused: list[Refusal] = []
    while True:
        plan = choose_plan(job, cluster, num_params, refused)
        try:
            return _prepared(cluster, job, plan, progress, cacheable)
        except PartitionError as error:
            is_open = job.plan.tp is None or job.plan.pp is None
            if not is_open or isinstance(error, ProgramError):  # which is no refusal, but our bug
                raise
            refused.append(Refusal(plan.tp, plan.pp, error.problem))


def _prepared(cluster: Cluster, job: Job, plan: Plan, progress: Progress, cacheable: bool) -> Prepared:
    _check(plan, job, cluster)
    key = program_cache.key_of(_content(job, plan))
    program = program_cache.load_program(key) if cacheable else None
    if program is not None:
        return Prepared(cluster, job, plan, program, was_cached=True)
    program = _make(job, plan, progress)
    if cacheable:
        program_cache.store_program(key, program)
    return Prepared(cluster, job, plan, program, was_cached=False)


def samples_per_microbatch(job: Job, plan: Plan) -> int:
    """Sequences that one replica processes at a time."""
    return job.global_batch // (plan.dp * plan.microbatches)


def build_model(job: Job, device: str) -> "BuiltModel":
    """The job's model; "meta" for shapes only."""
    from orchestrator.models.model_builder import build
    from partitioner.capture.dtypes import TORCH

    return build(job.model, job.model_args, device=device, dtype=TORCH[short_dtype(job.dtype)], seed=job.seed)


def short_dtype(dtype: Dtype) -> str:
    """The Program's name of a job's dtype."""
    return {Dtype.FP32: "f32", Dtype.FP64: "f64", Dtype.BF16: "bf16"}[dtype]


def capture(model: "BuiltModel", job: Job, plan: Plan) -> "Graph":
    """The model's graph for one microbatch of one replica."""
    from partitioner.capture.exact_float64 import ExactFloat64
    from partitioner.capture.graph_units import build_graph
    from partitioner.capture.tracing import trace_module

    samples = samples_per_microbatch(job, plan)
    batch = model.example_batch(samples, job.seq)
    with ExactFloat64() if job.dtype is Dtype.FP64 else nullcontext():
        captured = trace_module(model.module, batch, None, model.tp_plan)
    return build_graph(captured, num_samples=samples, min_units=plan.pp)


def lower_graph(graph: "Graph", job: Job, plan: Plan, say: Callable[[str], None] = lambda _: None) -> Program:
    """The Program of a captured graph, proved free of hangs."""
    from partitioner.lowering.lower import StepShape, lower
    from partitioner.program.static_check import require_valid

    shape = StepShape(job.global_batch, job.seq, job.model, str(job.dtype), optimizer_states(job))
    program = lower(graph, plan, shape, say)
    require_valid(program)
    return program


def optimizer_states(job: Job) -> int:
    """State tensors per parameter that the job's optimizer keeps."""
    name = job.optimizer.name
    if name in OPTIMIZER_STATES:
        return OPTIMIZER_STATES[name]
    if name == "sgd":
        return 1 if job.optimizer.momentum else 0
    from kernels.optimizers import states_per_element

    return states_per_element(optimizer_factory(job))


def optimizer_factory(job: Job) -> "Factory":
    """What makes the job's optimizer from a list of tensors."""
    from kernels.optimizers import OptimizerSpec, require_elementwise

    wanted = job.optimizer
    if wanted.name in ("adamw", "sgd"):
        return OptimizerSpec(
            wanted.name, wanted.lr, wanted.weight_decay, wanted.betas, wanted.eps, wanted.momentum
        )
    module, _, name = wanted.name.partition(":")
    try:
        factory: Factory = getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise PlanError(
            f"there is no {name} in {module}", "optimizer.name", "write pkg.module:factory"
        ) from error
    hint = "flat buffers need an elementwise optimizer (adamw, sgd, lion, ...)"
    with located(f"optimizer {wanted.name}", hint):
        require_elementwise(factory)
    return factory


def _is_file(target: str) -> bool:
    return target.endswith(".json") or Path(target).exists()


def _content(job: Job, plan: Plan) -> dict[str, object]:
    return {
        "model": job.model, "model_args": {k: repr(v) for k, v in sorted(job.model_args.items())}, "seq": job.seq,
        "global_batch": job.global_batch, "dtype": str(job.dtype), "plan": repr(plan),
        "optimizer": job.optimizer.name, "optimizer_states": optimizer_states(job),
    }  # fmt: skip


def _num_params(job: Job, progress: Progress, cacheable: bool) -> int:
    key = program_cache.key_of(
        {"params": job.model, "args": {k: repr(v) for k, v in sorted(job.model_args.items())}}
    )
    known = program_cache.load_number(key) if cacheable else None
    if known is not None:
        return known
    with progress.phase("count parameters"):
        count = sum(p.numel() for p in build_model(job, "meta").module.parameters())
    if cacheable:
        program_cache.store_number(key, count)
    return count


def _check(plan: Plan, job: Job, cluster: Cluster) -> None:
    if plan.num_chips != cluster.num_chips:
        raise PlanError(
            f"dp {plan.dp} x tp {plan.tp} x pp {plan.pp} = {plan.num_chips} chips, the cluster has {cluster.num_chips}",
            "plan", f"change a degree, or take --chips {plan.num_chips}",
        )  # fmt: skip
    parts = plan.dp * plan.microbatches
    if job.global_batch % parts:
        raise PlanError(
            f"global_batch {job.global_batch} does not split into dp {plan.dp} x {plan.microbatches} microbatches",
            "plan",
            f"use a multiple of {parts}",
        )


def _make(job: Job, plan: Plan, progress: Progress) -> Program:
    with progress.phase("import torch"):
        import_module("partitioner.lowering.lower")
    with progress.phase("build model"):
        model = build_model(job, "meta")
    with located(job.model, "simplify the model"), progress.phase("capture"):
        graph = capture(model, job, plan)
    with located("plan", "see the plan"), progress.phase("partition"):
        return lower_graph(graph, job, plan)
