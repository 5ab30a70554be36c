"""The first instruction of a plan whose result is wrong.

Every segment is run again operator by operator on the same operands (finds a wrong kernel); if all agree, every unit's
results are held against a one-chip Program's for the same samples (finds a wrong split).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from comms.errors import CaptureError
from kernels.reference import interpret_segment
from orchestrator.planning.job_parts import JobParts
from orchestrator.planning.preparation import Prepared, prepare
from orchestrator.runners.executing.chip import ExecutingChip, op_codes
from orchestrator.runners.runner import StepRequest
from orchestrator.runs.data import split_batch
from orchestrator.verbs.verification.job_sides import PlannedJob
from orchestrator.verbs.verification.outcome import Tensors
from orchestrator.verbs.verification.verdict import Step, relative
from partitioner.capture.batch_inputs import tensors_of
from partitioner.program.program import Compute


def on_one_chip(prepared: Prepared, parts: JobParts) -> Prepared:
    """The same job on one chip, with the microbatches that the replicas of the plan see one after another.

    A model that mixes samples has one microbatch there.
    """
    plan, cluster = prepared.plan, prepared.cluster.take(1)
    one = replace(plan, dp=1, tp=1, pp=1, zero=0, stages=(), microbatches=plan.dp * plan.microbatches)
    try:
        return prepare(cluster, prepared.job, one, parts=parts)
    except CaptureError:
        return prepare(cluster, prepared.job, replace(one, microbatches=1), parts=parts)


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
    prepared: Prepared, parts: JobParts, values: Tensors, step: Step, tolerance: float
) -> str | None:
    """The first instruction whose result is wrong in a step that starts from `values`, or None."""
    compared, seen, microbatches = _observed(prepared, parts, values, step)
    for found in compared:
        if found.error > tolerance:
            return str(found)
    _, alone, of_one = _observed(on_one_chip(prepared, parts), parts, values, step)
    if of_one != prepared.plan.dp * microbatches:
        return None
    known = {(microbatch, source): value for (_, microbatch, source), (_, value) in alone.items()}
    for (replica, microbatch, source), (found, value) in seen.items():
        expected = known.get((replica * microbatches + microbatch, source))
        if expected is not None and (error := relative(value, expected, 1e-30)) > tolerance:
            return str(replace(found, error=error))
    return None


def _observed(
    prepared: Prepared, parts: JobParts, values: Tensors, step: Step
) -> tuple[list[ComparedResult], dict[tuple[int, int, str], tuple[ComparedResult, torch.Tensor]], int]:
    """Of one step: every Compute held against its operators one by one, and every unit's results; microbatches.

    Results are by (replica, microbatch, source).
    """
    side = PlannedJob(prepared, parts, values).side(step.batch)
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

    for chip in side.runner.chips.values():
        chip.observer = observer
    batches = split_batch(tensors_of(step.batch), side.program, step.key)
    side.runner.run(StepRequest("step", batches=batches, settings=step.settings))
    return compared, seen, side.program.microbatches
