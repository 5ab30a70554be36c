"""verify: is the split run the same training as one chip's?

Both runs start from the same parameters and see the same batches: the job's data, in turn with irregular ones. Every
step's loss and gradients, and what parameters and buffers are after it, are compared: in float64, where equality is a
proof, and in the job's own dtype against the noise of one-chip runs whose sums are merely re-ordered (`verification`).
A plan that cuts nothing where it says it does is not accepted either. Where the runs differ, the first step, tensor and
entry that does is named, and the first wrong instruction.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from comms.errors import DifferenceError, PlanError
from comms.selection.progress import Progress, quiet
from comms.units import format_scaled
from orchestrator.config.hardware.cluster import Cluster
from orchestrator.config.job_file import Dtype, Job
from orchestrator.planning.job_capture import JobCapture
from orchestrator.planning.job_parts import JobParts, job_parts
from orchestrator.planning.preparation import Prepared, module_values, prepare, require_same
from orchestrator.runners.timing.fastest_plan import fastest_plan
from orchestrator.verbs.inputs.options import VerifyOptions
from orchestrator.verbs.inputs.planned_inputs import resolve
from orchestrator.verbs.plan import parameter_bytes, step_flops
from orchestrator.verbs.verification.first_instruction import first_difference, on_one_chip
from orchestrator.verbs.verification.job_sides import PlannedJob, plain_job
from orchestrator.verbs.verification.job_steps import job_steps
from orchestrator.verbs.verification.verdict import (
    TOLERANCE,
    Lockstep,
    TrainingVerdict,
    proof,
    verdict,
    within_noise,
)
from orchestrator.views.console import Console, Table
from orchestrator.views.split_notes import say_split
from partitioner.layout.parallel_plan import Plan
from partitioner.program.program import Program

STEPS = 10  # unless it is said
REPLICATED = 0.95  # a plan that uses this share of what full replication over tp would cuts nothing
NO_INSTRUCTION = "no forward or backward instruction; look at reductions and the update"


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyResult(TrainingVerdict):
    """The verdict on a job's plan, the first instruction that is wrong, and what each chip holds and does."""

    first_difference: str | None
    plan: str
    parameter_bytes_per_chip: tuple[int, ...]
    flops_per_chip: tuple[int, ...]
    one_chip_parameter_bytes: int
    one_chip_flops: int

    def document(self) -> dict[str, object]:
        """As JSON values."""
        return {
            **TrainingVerdict.document(self), "first_difference": self.first_difference, "plan": self.plan,
            "parameter_bytes_per_chip": list(self.parameter_bytes_per_chip),
            "flops_per_chip": list(self.flops_per_chip),
            "one_chip_parameter_bytes": self.one_chip_parameter_bytes, "one_chip_flops": self.one_chip_flops,
        }  # fmt: skip


def main(options: VerifyOptions, console: Console) -> int:
    """The `verify` verb: as many steps as `--set steps` says, else the first ten of the job's."""
    inputs = resolve(options)
    is_said = any(override.partition("=")[0].strip() == "steps" for override in options.overrides)
    result = verify(
        inputs.cluster,
        inputs.job,
        inputs.plan,
        steps=inputs.job.steps if is_said else None,
        progress=console.phase,
        show=lambda made: say_split(made, console),
    )
    console.results(result.document(), [_table(result)])
    return 0 if result.equal else DifferenceError.exit_code


def verify(
    cluster: Cluster, job: Job, plan: Plan | None = None, *, steps: int | None = None, progress: Progress = quiet,
    show: Callable[[Prepared], None] | None = None,
) -> VerifyResult:  # fmt: skip
    """Compare the job's first `steps` (ten, or all if they are fewer) with one chip. Raises UserError.

    `show` is given what will run. There must be something to compare.
    """
    require_same(job, plan)
    number = steps or min(job.steps, STEPS)
    exact = job.model_copy(update={"dtype": Dtype.FP64})
    plan = plan or fastest_plan(cluster, JobCapture(job, progress))  # what would be trained
    parts = job_parts(exact, "cpu")
    prepared = prepare(cluster, exact, plan, progress=progress, parts=parts)
    if show is not None:
        show(prepared)
    alone = on_one_chip(prepared, parts)
    nbytes, flops = _per_chip(prepared.program)
    (whole_bytes,), (whole_flops,) = _per_chip(alone.program)
    plan, chips = prepared.plan, prepared.plan.dp * prepared.plan.tp
    _require_cut(plan, sum(nbytes) * plan.tp, sum(flops) * chips, whole_bytes, whole_flops)
    with progress("compare in fp64"):
        proved, instruction = _proof(prepared, parts, number)
    own = None
    if job.dtype is not Dtype.FP64:
        with progress(f"compare in {job.dtype}"):
            parts = job_parts(job, "cpu")
            own = _own_dtype(prepare(cluster, job, prepared.plan, parts=parts), parts, number)
    found = verdict(proved, own, number)
    return VerifyResult(
        **{name: getattr(found, name) for name in TrainingVerdict.__dataclass_fields__}, first_difference=instruction,
        plan=str(prepared.plan), parameter_bytes_per_chip=nbytes, flops_per_chip=flops,
        one_chip_parameter_bytes=whole_bytes, one_chip_flops=whole_flops,
    )  # fmt: skip


def _proof(prepared: Prepared, parts: JobParts, number: int) -> tuple[Lockstep, str | None]:
    steps, values = job_steps(parts, number), _values(parts)
    found = proof(partial(PlannedJob, prepared, parts, values), plain_job(prepared, parts, values), steps)
    if found.at is None:
        return found, None
    return found, first_difference(prepared, parts, values, steps[found.at], TOLERANCE) or NO_INSTRUCTION


def _own_dtype(prepared: Prepared, parts: JobParts, number: int) -> Lockstep:
    steps, values = job_steps(parts, number), _values(parts)
    planned, plain = partial(PlannedJob, prepared, parts, values), plain_job(prepared, parts, values)
    return within_noise(planned, plain, steps, torch.finfo(parts.model.dtype).eps)


def _values(parts: JobParts) -> dict[str, torch.Tensor]:
    """Copies, as the planned side trains the module itself."""
    return {name: value.clone() for name, value in module_values(parts.model.module).items()}


def _per_chip(program: Program) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """By stage: bytes of parameters, and FLOPs in a step."""
    roles = program.roles
    return tuple(map(parameter_bytes, roles)), tuple(step_flops(program, role) for role in roles)


def _require_cut(plan: Plan, held: int, work: int, whole_bytes: int, whole_work: int) -> None:
    """Refuse a plan whose tensor parallelism cuts neither parameters nor work."""
    least = REPLICATED * plan.tp
    if plan.tp > 1 and (held >= least * whole_bytes or work >= least * whole_work):
        parts = f"{held / whole_bytes:.2f} times the parameters and do {work / whole_work:.2f} times the work"
        problem = f"tp {plan.tp} only replicates: all chips together hold {parts}"
        raise PlanError(problem, str(plan), "use tp 1, or give the model a tp_plan")


def _table(result: VerifyResult) -> Table:
    rows = [
        ("equal", "yes" if result.equal else "NO"),
        (
            "fp64: loss, gradients, parameters, states differ by",
            f"{result.errors} (limit {TOLERANCE:.0e}, or ten times the noise of re-ordered sums)",
        ),
        ("differs first", result.differs or "nothing"),
    ]
    if result.own is not None and result.noise is not None:
        rows += [("the job's dtype: plan against one chip", str(result.own)),
                 ("the job's dtype: one chip against itself with sums re-ordered", str(result.noise)),
                 ("beyond ten times that, by rounding that grows", result.grown or "nothing")]  # fmt: skip
    rows.append(("first wrong instruction", result.first_difference or "none"))
    for stage, (nbytes, flops) in enumerate(
        zip(result.parameter_bytes_per_chip, result.flops_per_chip, strict=True)
    ):
        held = f"{format_scaled(nbytes, 'B')} of {format_scaled(result.one_chip_parameter_bytes, 'B')} parameters"
        work = f"{format_scaled(flops, 'FLOP')} of {format_scaled(result.one_chip_flops, 'FLOP')} per step"
        rows.append((f"each chip of stage {stage}", f"{held}, {work}"))
    return Table(f"{result.plan} against one chip, {result.steps} steps", rows)
