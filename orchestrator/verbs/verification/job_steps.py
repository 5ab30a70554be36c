"""The steps of a job that are verified: the batches that `train` would feed, text in turn with irregular ones.

Irregular are values and counts: entries drawn anew from those of the model's example, numbers of very different size
from sample to sample, labels that are ignored here and there, or for whole samples. A split that only averages well
does not stand that.
"""

import copy

import torch

from kernels.optimizers import group_settings
from orchestrator.models.builtin_gpt import IGNORED_LABEL
from orchestrator.models.model_builder import BuiltModel
from orchestrator.planning.job_parts import JobParts, LrSchedule
from orchestrator.runs.data import NUM_BYTES, load_data, step_key
from orchestrator.verbs.verification.verdict import Step
from partitioner.capture.batch_inputs import Batch

IGNORED_SHARE = 0.1  # of the labels: makes the counts of microbatches differ
LARGEST = 3.0  # what numbers of the last sample are multiplied by
TEXT_INPUTS = ("input_ids", "labels")


def job_steps(parts: JobParts, number: int) -> list[Step]:
    """The first `number` steps of the job, from its first settings of the optimizer and random numbers on."""
    job, optimizer = parts.job, parts.optimizer_anew()
    schedule, steps = LrSchedule(job, optimizer), list[Step]()
    optimizer._opt_called = True  # type: ignore[attr-defined]  # what schedulers ask for
    for k, batch in enumerate(make_batches(parts, number)):
        schedule.before(k)
        steps.append(Step(batch, step_key(job.seed, k), copy.deepcopy(group_settings(optimizer))))
        schedule.after()
    return steps


def make_batches(parts: JobParts, number: int) -> list[Batch]:
    """Batches of the user's data; else every second one is the job's text, if the model takes that."""
    if parts.data is not None:
        return [parts.data.batch(step) for step in range(number)]
    job, model, size = parts.job, parts.model, parts.job.global_batch
    example, generator = parts.example_batch(), torch.Generator().manual_seed(job.seed)
    takes_text = model.takes_text and sorted(example) == sorted(TEXT_INPUTS)
    takes_bytes = takes_text and (model.vocab_size or 0) >= NUM_BYTES
    data = load_data(job.data, seq=job.seq, seed=job.seed) if takes_bytes else None
    batches: list[Batch] = []
    for step in range(number):
        if data is not None and step % 2 == 0:
            batches.append(data.batch(range(step * size, (step + 1) * size)))
        else:
            batches.append(_irregular(example, model, step, generator))
    return batches


def _irregular(example: Batch, model: BuiltModel, step: int, generator: torch.Generator) -> Batch:
    batch = dict(example)
    batch |= {n: _drawn(v, generator) for n, v in example.items() if isinstance(v, torch.Tensor)}
    labels = batch.get("labels")
    if model.vocab_size is not None and labels is not None and not labels.is_floating_point():
        ignored = torch.rand(labels.shape, generator=generator) < IGNORED_SHARE
        if step % 4 > 1:  # nothing of the first half of the samples counts
            ignored[: len(labels) // 2] = True
        batch["labels"] = labels.masked_fill(ignored, IGNORED_LABEL)
    return batch


def _drawn(value: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Numbers are normal, the larger the later their sample; shares and whole numbers are drawn from the example's."""
    if not value.dim() or not value.numel():
        return value
    if value.is_floating_point() and not ((value >= 0) & (value <= 1)).all():
        sizes = torch.linspace(1.0, LARGEST, len(value), dtype=torch.float64)
        drawn = torch.randn(value.shape, generator=generator, dtype=torch.float64)
        return (drawn * sizes.view(-1, *[1] * (value.dim() - 1))).to(value.dtype)
    if len(torch.unique(value)) <= 2:  # a mask has a form
        return value[torch.randint(0, len(value), (len(value),), generator=generator)]
    return value.flatten()[torch.randint(0, value.numel(), value.shape, generator=generator)]
