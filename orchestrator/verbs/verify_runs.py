"""The two runs of a verification, and the search for the first instruction that differs.

The reference is the user's own module on one chip: eager autograd, `torch.optim`, the whole global batch at once. The
other side is the Program on all chips of the plan, in one process.
"""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch

from kernels.reference import interpret_segment
from orchestrator.config.job_file import Dtype, Job
from orchestrator.models.builtin_gpt import IGNORED_LABEL
from orchestrator.models.model_builder import BuiltModel
from orchestrator.planning.preparation import Prepared, build_model, module_values, optimizer_factory, prepare
from orchestrator.runners.executing.chip import ExecutingChip, op_codes
from orchestrator.runners.executing.chip_set import ChipSet, chip_settings
from orchestrator.runners.executing.whole_state import whole_tensors
from orchestrator.runners.runner import StepRequest
from orchestrator.runs.data import split_batch, step_key
from orchestrator.runs.learning_rate import learning_rate
from partitioner.capture.exact_float64 import ExactFloat64
from partitioner.capture.forwards.keyed_random import keyed_random
from partitioner.capture.samples.batch_norms import normalised_per_part
from partitioner.capture.tracing import scalar_loss
from partitioner.program.program import Compute, TensorKind

IGNORED_SHARE = 0.1  # of the labels: makes the counts of microbatches differ

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Trajectory:
    """What is compared: every loss, the first step's gradients (clipped), the parameters at the end."""

    losses: tuple[float, ...]
    gradients: Tensors
    parameters: Tensors


@dataclass(frozen=True)
class ComparedRuns:
    """Both runs of a comparison, and what they started from."""

    values: Tensors
    batches: Sequence[Tensors]
    planned: Trajectory
    plain: Trajectory


def compared_runs(prepared: Prepared, steps: int) -> ComparedRuns:
    """The plan's run and one chip's, over the same random batches."""
    model = build_model(prepared.job, "cpu")
    # Copies: the reference trains the module itself.
    values = {name: value.clone() for name, value in module_values(model.module).items()}
    batches = make_batches(model, prepared.job, steps)
    planned = planned_run(prepared, values, batches)
    return ComparedRuns(
        values, batches, planned, reference_run(model, prepared.job, batches, prepared.plan.norm_parts)
    )


def make_batches(model: BuiltModel, job: Job, steps: int) -> list[dict[str, torch.Tensor]]:
    """Random inputs like the model's example, with a tenth of integer labels ignored where there are labels."""
    generator = torch.Generator().manual_seed(job.seed)
    batches = []
    for _ in range(steps):
        batch = {
            k: _random_like(v, model, generator)
            for k, v in model.example_batch(job.global_batch, job.seq).items()
        }
        if model.vocab_size is not None and "labels" in batch:
            ignored = torch.rand(batch["labels"].shape, generator=generator) < IGNORED_SHARE
            batch["labels"] = batch["labels"].masked_fill(ignored, IGNORED_LABEL)
        batches.append(batch)
    return batches


def _random_like(value: torch.Tensor, model: BuiltModel, generator: torch.Generator) -> torch.Tensor:
    if value.is_floating_point():
        return torch.randn(value.shape, generator=generator, dtype=torch.float64).to(value.dtype)
    high = model.vocab_size or int(value.max()) + 1
    return torch.randint(0, high, value.shape, generator=generator, dtype=value.dtype)


def reference_run(
    model: BuiltModel, job: Job, batches: Sequence[Tensors], parts: int, order: torch.Tensor | None = None
) -> Trajectory:
    """Train the module itself; its parameters change.

    `parts`: into how many a batch norm cuts a batch. `order` permutes the samples of every batch.
    """
    module, make = model.module, optimizer_factory(job)
    trained = [p for p in module.parameters() if p.requires_grad]
    optimizers = [
        make([p for p in trained if p.dim() >= 2]),
        make([p for p in trained if p.dim() < 2] or [torch.zeros(1, requires_grad=True)]),
    ]
    for group in optimizers[1].param_groups:
        group["weight_decay"] = 0.0
    losses, gradients = [], {}
    for step, batch in enumerate(batches):
        inputs = batch if order is None else {k: v[order] for k, v in batch.items()}
        key, first = torch.tensor(step_key(job.seed, step)), torch.tensor(0)
        exact = ExactFloat64() if job.dtype is Dtype.FP64 else nullcontext()
        with exact, keyed_random(key, first), normalised_per_part(parts):
            loss = scalar_loss(module(**inputs))
        module.zero_grad()
        loss.backward()
        if job.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(trained, job.clip_norm)
        if step == 0:
            gradients = {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}
        lr = learning_rate(step, peak=job.optimizer.lr, schedule=job.lr_schedule, steps=len(batches))
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
        losses.append(float(loss.detach()))
    return Trajectory(tuple(losses), gradients, {n: p.detach().clone() for n, p in module.named_parameters()})


def planned_run(prepared: Prepared, values: Tensors, batches: Sequence[Tensors]) -> Trajectory:
    """Train the Program on all chips of the plan, in this process."""
    job, runner = prepared.job, loaded_runner(prepared, values)
    losses, gradients = [], {}
    for step, batch in enumerate(batches):
        lr = learning_rate(step, peak=job.optimizer.lr, schedule=job.lr_schedule, steps=len(batches))
        stats = runner.run(
            StepRequest("step", lr, split_batch(batch, prepared.program, step_key(job.seed, step)))
        ).stats
        assert stats is not None
        losses.append(stats.loss)
        if step == 0:
            gradients = whole_tensors(prepared.program, TensorKind.GRAD, runner.buffer)
    untouched = {
        name.partition(":")[2]: value for name, value in values.items() if name.startswith("params:")
    }
    parameters = untouched | whole_tensors(prepared.program, TensorKind.PARAM, runner.buffer)
    return Trajectory(tuple(losses), gradients, parameters)


def on_one_chip(prepared: Prepared) -> Prepared:
    """The same job on one chip, with the microbatches that the replicas of the plan see one after another."""
    plan, cluster = prepared.plan, prepared.cluster.take(1)
    one = replace(plan, dp=1, tp=1, pp=1, zero=0, stages=(), microbatches=plan.dp * plan.microbatches)
    return prepare(cluster, prepared.job, one)


def loaded_runner(prepared: Prepared, values: Tensors) -> ChipSet:
    """The plan's chips with the given parameters and buffers."""
    runner = ChipSet(prepared.program, chip_settings(prepared))
    runner.load(values.__getitem__)
    return runner


@dataclass(frozen=True, slots=True)
class ComparedResult:
    """One compared result: where in the plan, and how far off."""

    chip: int
    microbatch: int
    instruction: int
    name: str
    error: float

    def __str__(self) -> str:
        where = f"chip {self.chip}, microbatch {self.microbatch}, instruction {self.instruction}"
        return f"{where} ({self.name}): off by {self.error:.1e}"


def first_difference(
    prepared: Prepared, values: Tensors, batch: Tensors, tolerance: float, lr: float
) -> str | None:
    """The first instruction whose result is wrong, or None.

    Every segment is run again operator by operator on the same operands (finds a wrong kernel); if all agree, every
    unit's results are held against a one-chip Program's for the same samples (finds a wrong split).
    """
    compared, seen = _observed(prepared, values, batch, lr)
    for found in compared:
        if found.error > tolerance:
            return str(found)
    single = on_one_chip(prepared)
    if single.plan.microbatches != prepared.plan.dp * prepared.plan.microbatches:
        return None
    _, alone = _observed(single, values, batch, lr)
    known = {(microbatch, source): value for (_, microbatch, source), (_, value) in alone.items()}
    for (replica, microbatch, source), (found, value) in seen.items():
        expected = known.get((replica * prepared.plan.microbatches + microbatch, source))
        if expected is not None and (error := relative(value, expected, 1e-30)) > tolerance:
            return str(replace(found, error=error))
    return None


def _observed(
    prepared: Prepared, values: Tensors, batch: Tensors, lr: float
) -> tuple[list[ComparedResult], dict[tuple[int, int, str], tuple[ComparedResult, torch.Tensor]]]:
    """Of one step: every Compute held against its operators one by one, and every unit's results.

    Those are by (replica, microbatch, source).
    """
    runner = loaded_runner(prepared, values)
    compared: list[ComparedResult] = []
    seen: dict[tuple[int, int, str], tuple[ComparedResult, torch.Tensor]] = {}

    def observer(
        chip: ExecutingChip,
        ins: Compute,
        microbatch: int,
        operands: Sequence[torch.Tensor],
        results: Sequence[torch.Tensor],
    ) -> None:
        segment = chip.program.segments[ins.segment]
        expected = interpret_segment(op_codes(segment), segment.outputs, chip.settings.device, operands)
        error = max((relative(r, e, 1e-30) for r, e in zip(results, expected, strict=True)), default=0.0)
        found = ComparedResult(chip.index, microbatch, ins.id, segment.name, error)
        compared.append(found)
        for tensor, value in zip(ins.writes, results, strict=True):
            source = chip.tensors[tensor].source
            if source.startswith(("value:", "grad:")) and chip.coordinates["tp"] == 0:
                seen[chip.coordinates["dp"], microbatch, source] = (found, value.clone())

    for chip in runner.chips.values():
        chip.observer = observer
    runner.run(StepRequest("step", lr, split_batch(batch, prepared.program, step_key(prepared.job.seed, 0))))
    return compared, seen


def relative(value: torch.Tensor, expected: torch.Tensor, floor: float) -> float:
    """L2 distance over the larger of the expected norm and `floor`.

    Infinite if shapes differ or numbers are not finite.
    """
    if value.shape != expected.shape:
        return float("inf")
    if not value.is_floating_point():
        return 0.0 if torch.equal(value, expected) else float("inf")
    distance = (value.double() - expected.double()).norm().item()
    if not distance < float("inf"):
        return float("inf")
    return distance / max(expected.double().norm().item(), floor)
