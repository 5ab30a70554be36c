"""Batches: which sequences of a step go to which replica and microbatch.

The position in the data is one integer, the index of the step's first sample; replicas and microbatches take
contiguous slices in order, so that any split of the same global batch sees the same sequences.
"""

from collections.abc import Mapping

import torch

from partitioner.layout.parallel_plan import Plan


def split_batch(
    batch: Mapping[str, torch.Tensor], plan: Plan
) -> dict[int, dict[tuple[int, str], torch.Tensor]]:
    """Cut a global batch along dim 0: {replica: {(microbatch, name): tensor}}."""
    parts = plan.dp * plan.microbatches
    assert all(len(tensor) % parts == 0 for tensor in batch.values()), "the batch does not divide"
    cut = {name: tensor.chunk(parts) for name, tensor in batch.items()}
    return {
        replica: {
            (microbatch, name): pieces[replica * plan.microbatches + microbatch]
            for name, pieces in cut.items()
            for microbatch in range(plan.microbatches)
        }
        for replica in range(plan.dp)
    }
