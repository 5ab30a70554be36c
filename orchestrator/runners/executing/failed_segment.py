"""A segment that raises: told with the operator, which is found by running it once more one by one, and where it is."""

from collections.abc import Sequence

import torch

from comms.errors import RunError
from kernels.backend import OpCode
from kernels.reference import failing_operator
from partitioner.program.program import Tensor, TensorKind

OUTSIDE = (
    "out of bounds",
    "out of range",
    "Class values",
)  # how torch tells of labels and rows that are not there
WHOLE_NUMBERS = "iu"


class FailedOperationError(RunError):
    """An operation that raised."""


FailedOperationError.__module__ = __name__  # where it is found by who gets it from another process


def failed_segment(
    ops: Sequence[OpCode],
    operands: Sequence[torch.Tensor],
    tensors: Sequence[Tensor],
    place: str,
    error: BaseException,
) -> FailedOperationError:
    """What to raise for a segment of `ops` that raised `error`; `tensors`: the chip's, `place`: where it is."""
    device = str(operands[0].device) if operands else "cpu"
    name, said = failing_operator(ops, device, operands)
    said = said or str(error).strip().rpartition("\n")[2] or type(error).__name__
    entries = sorted(
        {
            t.source.rpartition(":")[2]
            for t in tensors
            if t.kind is TensorKind.BATCH and t.spec.dtype[0] in WHOLE_NUMBERS and "random." not in t.source
        }
    )
    hint = "see whether plain PyTorch takes this batch"
    if any(words in said for words in OUTSIDE) and entries:
        hint = f"see whether all numbers in {' or '.join(entries)} name classes or rows that the model has"
    return FailedOperationError(f"{name or 'an operation'} failed: {said}", place, hint)
