"""verify: is the split run the same training as one chip's?

Both runs start from the same parameters and see the same batches. In float64 rounding differences are near 1e-15,
so equality within 1e-10 (per tensor, L2, against the larger of its norm and a floor) is a proof. In the job's own dtype
the difference is held against the noise of one-chip runs whose samples are merely re-ordered. A plan that cuts nothing
where it says it does is not accepted either. Where the runs differ, the first wrong instruction is named.
"""

from collections.abc import Callable, Mapping
from dataclasses import astuple, dataclass

import torch

from comms.errors import PlanError
from comms.selection.progress import Progress, quiet
from comms.units import format_scaled
from orchestrator.config.hardware.cluster import Cluster
from orchestrator.config.job_file import Dtype, Job
from orchestrator.planning.preparation import Prepared, build_model, prepare
from orchestrator.verbs.inputs.options import VerifyOptions
from orchestrator.verbs.inputs.planned_inputs import resolve
from orchestrator.verbs.plan import parameter_bytes, step_flops
from orchestrator.verbs.verify_runs import (
    Trajectory,
    compared_runs,
    first_difference,
    on_one_chip,
    reference_run,
    relative,
)
from orchestrator.views.console import Console, Table
from orchestrator.views.split_notes import say_split
from partitioner.layout.parallel_plan import Plan
from partitioner.program.program import Program

TOLERANCE = 1e-10  # relative, float64

# Smaller norms count as these. A gradient that is zero but for rounding (a key's bias) has no relative error, and Adam
# divides such a gradient by its own size: the parameter then drifts by lr times noise / eps.
GRAD_FLOOR = 1e-6
OWN_GRAD_FLOOR = 1e-3  # in the job's dtype, whose rounding is as much larger
PARAM_FLOOR = 1e-2
LOSS_FLOOR = 1e-6
STEPS = 10
NOISE_FACTOR = 10.0  # in the job's dtype, differences up to so many times the noise of re-ordering are noise
NUM_REORDERED = 2
REPLICATED = 0.95  # a plan that uses this share of what full replication over tp would cuts nothing
DIFFERS = 5  # exit code


@dataclass(frozen=True, slots=True)
class RelativeErrors:
    """Largest relative differences: of any loss, any gradient, any parameter after the last step."""

    loss: float
    grad: float
    param: float

    @property
    def worst(self) -> float:
        return max(astuple(self))

    def within(self, noise: "RelativeErrors") -> bool:
        """Whether each is so small that it may be noise."""
        both = zip(astuple(self), astuple(noise), strict=True)
        return all(error <= NOISE_FACTOR * other for error, other in both)

    def document(self) -> dict[str, float]:
        """As JSON values."""
        return {"loss_rel": self.loss, "grad_rel": self.grad, "param_rel": self.param}

    def __str__(self) -> str:
        return f"{self.loss:.1e}, {self.grad:.1e}, {self.param:.1e}"


@dataclass(frozen=True, slots=True)
class VerifyResult:
    """The verdict.

    `errors` are of the float64 proof; `own` and `noise` of the job's dtype (None if that is float64).
    """

    equal: bool
    errors: RelativeErrors
    own: RelativeErrors | None
    noise: RelativeErrors | None
    first_difference: str | None
    plan: str
    parameter_bytes_per_chip: tuple[int, ...]
    flops_per_chip: tuple[int, ...]
    one_chip_parameter_bytes: int
    one_chip_flops: int

    def document(self) -> dict[str, object]:
        """As JSON values."""
        return {
            "equal": self.equal, **self.errors.document(),
            "first_difference": self.first_difference, "tolerance": TOLERANCE,
            "grad_floor": GRAD_FLOOR, "param_floor": PARAM_FLOOR, "steps": STEPS, "plan": self.plan,
            "own_dtype": None if self.own is None else self.own.document(),
            "reordering_noise": None if self.noise is None else self.noise.document(),
            "parameter_bytes_per_chip": list(self.parameter_bytes_per_chip),
            "flops_per_chip": list(self.flops_per_chip),
            "one_chip_parameter_bytes": self.one_chip_parameter_bytes, "one_chip_flops": self.one_chip_flops,
        }  # fmt: skip


def main(options: VerifyOptions, console: Console) -> int:
    """The `verify` verb."""
    inputs = resolve(options)
    result = verify(
        inputs.cluster,
        inputs.job,
        inputs.plan,
        progress=console.phase,
        show=lambda made: say_split(made, console),
    )
    console.results(result.document(), [_table(result)])
    return 0 if result.equal else DIFFERS


def verify(
    cluster: Cluster, job: Job, plan: Plan | None = None, *, progress: Progress = quiet,
    show: Callable[[Prepared], None] | None = None,
) -> VerifyResult:  # fmt: skip
    """Compare `STEPS` steps of the plan with one chip; `show` is given what will run. Raises UserError.

    There must be something to compare.
    """
    exact = job.model_copy(update={"dtype": Dtype.FP64})
    prepared = prepare(cluster, exact, plan, progress=progress)
    if show is not None:
        show(prepared)
    alone = on_one_chip(prepared)
    nbytes, flops = _per_chip(prepared.program)
    (whole_bytes,), (whole_flops,) = _per_chip(alone.program)
    plan, chips = prepared.plan, prepared.plan.dp * prepared.plan.tp
    _require_cut(plan, sum(nbytes) * plan.tp, sum(flops) * chips, whole_bytes, whole_flops)
    with progress("compare in fp64"):
        errors, difference = _proof(prepared)
    own = noise = None
    if job.dtype is not Dtype.FP64:
        with progress(f"compare in {job.dtype}"):
            own, noise = _own_dtype(cluster, job, prepared.plan)
    is_noise = own is None or noise is None or own.within(noise)
    return VerifyResult(
        equal=errors.worst <= TOLERANCE and is_noise, errors=errors, own=own, noise=noise, first_difference=difference,
        plan=str(prepared.plan),
        parameter_bytes_per_chip=nbytes, flops_per_chip=flops,
        one_chip_parameter_bytes=whole_bytes, one_chip_flops=whole_flops,
    )  # fmt: skip


def _proof(prepared: Prepared) -> tuple[RelativeErrors, str | None]:
    runs = compared_runs(prepared, STEPS)
    errors = compare(runs.planned, runs.plain, GRAD_FLOOR)
    if errors.worst <= TOLERANCE:
        return errors, None
    found = first_difference(prepared, runs.values, runs.batches[0], TOLERANCE, prepared.job.optimizer.lr)
    return errors, found or "no forward or backward instruction; look at reductions and the update"


def _own_dtype(cluster: Cluster, job: Job, plan: Plan) -> tuple[RelativeErrors, RelativeErrors]:
    """(plan against one chip, largest difference between one chip and itself re-ordered)."""
    runs = compared_runs(prepare(cluster, job, plan), STEPS)
    floor = torch.finfo(torch.bfloat16 if job.dtype is Dtype.BF16 else torch.float32).eps
    noises = [RelativeErrors(floor, floor, floor)]
    for number in range(NUM_REORDERED):
        order = torch.randperm(job.global_batch, generator=torch.Generator().manual_seed(number))
        reordered = reference_run(build_model(job, "cpu"), job, runs.batches, plan.norm_parts, order)
        noises.append(compare(reordered, runs.plain, OWN_GRAD_FLOOR))
    largest = RelativeErrors(*(max(of_kind) for of_kind in zip(*map(astuple, noises), strict=True)))
    return compare(runs.planned, runs.plain, OWN_GRAD_FLOOR), largest


def compare(one: Trajectory, other: Trajectory, grad_floor: float) -> RelativeErrors:
    """Largest relative differences between two trajectories; tensors that one side lacks count as infinite."""
    loss = max(abs(a - b) / max(abs(b), LOSS_FLOOR) for a, b in zip(one.losses, other.losses, strict=True))
    grad = _largest(one.gradients, other.gradients, grad_floor)
    return RelativeErrors(loss, grad, _largest(one.parameters, other.parameters, PARAM_FLOOR))


def _largest(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor], floor: float) -> float:
    if set(one) != set(other):
        return float("inf")
    return max(relative(one[name].reshape(other[name].shape), other[name], floor) for name in other)


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
        ("fp64: loss, gradients, parameters differ by", f"{result.errors} (limit {TOLERANCE:.0e})"),
    ]
    if result.own is not None and result.noise is not None:
        rows += [("job's dtype: the same", str(result.own)), ("noise of re-ordering", str(result.noise))]
    rows.append(("first difference", result.first_difference or "none"))
    for stage, (nbytes, flops) in enumerate(
        zip(result.parameter_bytes_per_chip, result.flops_per_chip, strict=True)
    ):
        held = f"{format_scaled(nbytes, 'B')} of {format_scaled(result.one_chip_parameter_bytes, 'B')} parameters"
        work = f"{format_scaled(flops, 'FLOP')} of {format_scaled(result.one_chip_flops, 'FLOP')} per step"
        rows.append((f"each chip of stage {stage}", f"{held}, {work}"))
    return Table(f"{result.plan} against one chip, {STEPS} steps", rows)
