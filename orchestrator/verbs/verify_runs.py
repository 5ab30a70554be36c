"""The two sides of a verification, and the search for the first instruction that differs.

The reference is the user's own module on one chip: eager autograd, `torch.optim`, the whole global batch at once. The
other side is the Program on all chips of the plan, in one process.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch

from kernels.reference import interpret_segment
from orchestrator.config.job import Dtype, Job
from orchestrator.models.model_builder import BuiltModel
from orchestrator.planning.preparation import Prepared, optimizer_factory, prepare
from orchestrator.runners.executing.chip import Chip, Settings, StepInput, op_codes
from orchestrator.runners.executing.chip_set import ChipSet
from orchestrator.runners.starting import chip_settings
from orchestrator.runs.batches import split_batch
from orchestrator.runs.lr_schedule import learning_rate
from partitioner.capture.exact_float64 import ExactFloat64
from partitioner.capture.tracing import scalar_loss
from partitioner.program.program import Compute, Program, TensorKind

IGNORED_LABEL = -100
IGNORED_SHARE = 0.1  # of the labels: makes the counts of microbatches differ

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Trajectory:
    """What is compared: every loss, the first step's gradients (clipped), the parameters at the end."""

    losses: tuple[float, ...]
    gradients: Tensors
    parameters: Tensors


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
    model: BuiltModel, job: Job, batches: Sequence[Tensors], order: torch.Tensor | None = None
) -> Trajectory:
    """Train the module itself; `order` permutes the samples of every batch. The module's parameters change."""
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
        with ExactFloat64() if job.dtype is Dtype.FP64 else nullcontext():
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
    job, chips = prepared.job, chips_of(prepared, values)
    losses, gradients = [], {}
    for step, batch in enumerate(batches):
        lr = learning_rate(step, peak=job.optimizer.lr, schedule=job.lr_schedule, steps=len(batches))
        outcome = chips.run("step", StepInput(lr), split_batch(batch, prepared.plan))
        assert outcome.stats is not None
        losses.append(outcome.stats.loss)
        if step == 0:
            gradients = whole_tensors(prepared.program, chips, TensorKind.GRAD)
    return Trajectory(tuple(losses), gradients, whole_tensors(prepared.program, chips, TensorKind.PARAM))


def on_one_chip(prepared: Prepared) -> Prepared:
    """The same job on one chip, with the microbatches that the replicas of the plan see one after another."""
    plan = prepared.plan
    microbatches = plan.dp * plan.microbatches
    one = replace(plan, dp=1, tp=1, pp=1, zero=0, stages=(), microbatches=microbatches)
    return prepare(prepared.cluster.take(1), prepared.job, one)


def chips_of(prepared: Prepared, values: Tensors, settings: Settings | None = None) -> ChipSet:
    """The plan's chips with the given parameters and buffers."""
    program = prepared.program
    chips = ChipSet(program, range(program.num_chips), settings or chip_settings(prepared), num_workers=1)
    chips.load(values.__getitem__)
    return chips


def module_values(model: BuiltModel) -> dict[str, torch.Tensor]:
    """Copies of a module's parameters and buffers, as chips ask for them."""
    values = {f"params:{k}": v.detach().clone() for k, v in model.module.named_parameters()}
    return values | {f"buffer:{k}": v.clone() for k, v in model.module.named_buffers()}


def whole_tensors(program: Program, chips: ChipSet, kind: TensorKind) -> dict[str, torch.Tensor]:
    """Parameters or gradients by global name, put together from the shards of replica 0 (ZeRO: of all replicas)."""
    found: dict[str, torch.Tensor] = {}
    for role in program.roles:
        for tensor in role.tensors:
            if (
                tensor.kind is not kind
                or not tensor.source
                or tensor.base is None
                or tensor.shards == ((0, "dp"),)
            ):
                continue
            param = next(t for t in role.tensors if t.kind is TensorKind.PARAM and t.source == tensor.source)
            pieces = []
            for tp in range(program.size("tp") if param.shards else 1):
                flat = _flat(program, chips, role.tensors[tensor.base].name, {"pp": role.stage, "tp": tp})
                pieces.append(flat.narrow(0, tensor.offset, tensor.spec.numel).view(tensor.spec.shape))
            found[tensor.source] = (
                torch.cat(pieces, param.shards[0][0]) if param.shards else pieces[0].clone()
            )
    return found


def _flat(program: Program, chips: ChipSet, name: str, at: dict[str, int]) -> torch.Tensor:
    """A whole flat buffer; a gradient buffer that ZeRO scattered is gathered from all replicas."""
    first = chips.chips[program.chip_at(at | {"dp": 0})]
    shard = name.replace(".grads", ".grad_shard")
    if shard == name or not any(t.name == shard for t in first.tensors):
        return _named(first, name)
    return torch.cat(
        [_named(chips.chips[program.chip_at(at | {"dp": dp})], shard) for dp in range(program.size("dp"))]
    )


def _named(chip: Chip, name: str) -> torch.Tensor:
    value = next(chip.fixed[t.id] for t in chip.tensors if t.name == name)
    assert value is not None
    return value


@dataclass(frozen=True, slots=True)
class Found:
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
    wrong: list[Found] = []
    seen: dict[tuple[int, int, str], tuple[Found, torch.Tensor]] = {}

    def watch(
        chip: Chip,
        ins: Compute,
        microbatch: int,
        operands: Sequence[torch.Tensor],
        results: Sequence[torch.Tensor],
    ) -> None:
        segment = chip.program.segments[ins.segment]
        expected = interpret_segment(op_codes(segment), segment.outputs, chip.settings.device, operands)
        error = max((relative(r, e, 1e-30) for r, e in zip(results, expected, strict=True)), default=0.0)
        if error > tolerance:
            wrong.append(Found(chip.index, microbatch, ins.id, segment.name, error))

    _observe(prepared, values, batch, lr, watch, seen)
    if wrong:
        return str(wrong[0])
    alone: dict[tuple[int, int, str], tuple[Found, torch.Tensor]] = {}
    _observe(on_one_chip(prepared), values, batch, lr, None, alone)
    known = {(microbatch, source): value for (_, microbatch, source), (_, value) in alone.items()}
    for (replica, microbatch, source), (found, value) in seen.items():
        expected = known.get((replica * prepared.plan.microbatches + microbatch, source))
        if expected is not None and (error := relative(value, expected, 1e-30)) > tolerance:
            return str(replace(found, error=error))
    return None


def _observe(
    prepared: Prepared, values: Tensors, batch: Tensors, lr: float, watch: Callable[..., None] | None,
    seen: dict[tuple[int, int, str], tuple[Found, torch.Tensor]],
) -> None:  # fmt: skip
    """Run one step, calling `watch` on every Compute and keeping every unit's results in `seen`."""
    chips = chips_of(prepared, values)

    def observer(
        chip: Chip,
        ins: Compute,
        microbatch: int,
        operands: Sequence[torch.Tensor],
        results: Sequence[torch.Tensor],
    ) -> None:
        if watch is not None:
            watch(chip, ins, microbatch, operands, results)
        for tensor, value in zip(ins.writes, results, strict=True):
            source = chip.tensors[tensor].source
            if source.startswith(("value:", "grad:")) and chip.coordinates["tp"] == 0:
                name = chip.program.segments[ins.segment].name
                seen[chip.coordinates["dp"], microbatch, source] = (
                    Found(chip.index, microbatch, ins.id, name, 0.0),
                    value.clone(),
                )

    for chip in chips.chips.values():
        chip.observer = observer
    chips.run("step", StepInput(lr), split_batch(batch, prepared.plan))


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
