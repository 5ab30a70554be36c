"""The steps of a job that are verified: the batches that `train` would feed, in turn with irregular ones.

Irregular are values and counts: entries drawn anew from those of the model's example, numbers of very different size
from sample to sample, labels that are ignored here and there, or for whole samples. A split that only averages well
does not stand that.
"""

from collections.abc import Mapping

import torch

from orchestrator.config.job_file import Job
from orchestrator.models.builtin_gpt import IGNORED_LABEL
from orchestrator.models.model_builder import BuiltModel
from orchestrator.runs.data import NUM_BYTES, load_data, step_key
from orchestrator.runs.learning_rate import learning_rate
from orchestrator.verbs.verification.verdict import Step

IGNORED_SHARE = 0.1  # of the labels: makes the counts of microbatches differ
LARGEST = 3.0  # what numbers of the last sample are multiplied by
TEXT_INPUTS = ("input_ids", "labels")
NUM_GROUPS = 2  # of the job's optimizers: matrices, and the rest

Tensors = Mapping[str, torch.Tensor]


def job_steps(job: Job, model: BuiltModel, number: int) -> list[Step]:
    """The first `number` steps of the job, from its first learning rate and random numbers on."""
    batches = make_batches(job, model, number)
    rates = [
        learning_rate(k, peak=job.optimizer.lr, schedule=job.lr_schedule, steps=job.steps)
        for k in range(number)
    ]
    return [
        Step(batch, step_key(job.seed, k), ({"lr": rate},) * NUM_GROUPS)
        for k, (batch, rate) in enumerate(zip(batches, rates, strict=True))
    ]


def make_batches(job: Job, model: BuiltModel, number: int) -> list[Tensors]:
    """Every second one is the job's own data, if the model takes text."""
    example, size = model.example_batch(job.global_batch, job.seq), job.global_batch
    generator = torch.Generator().manual_seed(job.seed)
    takes_text = sorted(example) == sorted(TEXT_INPUTS) and (model.vocab_size or 0) >= NUM_BYTES
    data = load_data(job.data, seq=job.seq, seed=job.seed) if takes_text else None
    batches: list[Tensors] = []
    for step in range(number):
        if data is not None and step % 2 == 0:
            batches.append(data.batch(range(step * size, (step + 1) * size)))
        else:
            batches.append(_irregular(example, model, step, generator))
    return batches


def _irregular(example: Tensors, model: BuiltModel, step: int, generator: torch.Generator) -> Tensors:
    batch = {name: _drawn(value, generator) for name, value in example.items()}
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
