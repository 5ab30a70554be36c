"""How a batch is cut: which of its entries hold samples is found out by what the model does with them.

An entry whose first dim is as long as the batch is tried as samples, and as something that all samples share where that
does not work out. Either is right once the rules accept it: the parts then compute what the whole batch does.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from itertools import combinations, islice

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from comms.errors import CaptureError, PlanError
from partitioner.capture.batch_inputs import Batch, rebuilt, tensors_of
from partitioner.capture.samples.loss_form import LossForm, split_loss
from partitioner.capture.samples.split_samples import Parts
from partitioner.capture.tracing import Captured

MAX_GUESSES = 40
MAX_SHARED = 2  # entries as long as the batch that turn out to hold no samples
Trace = Callable[[Batch, FakeTensorMode], Captured]


def cut_batch(
    trace: Trace, batch: Batch, dp: int, microbatches: int, *, norms_per_part: bool
) -> tuple[Captured, LossForm, frozenset[str]]:
    """The capture of one part, its loss, and the entries that hold samples. Raises CaptureError or PlanError."""
    tensors = tensors_of(batch)
    first: CaptureError | None = None
    guesses = list(islice(_guesses(tensors, dp * microbatches), MAX_GUESSES))
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    whole = trace(batch, mode)  # raises what no guess would mend
    for size, split in guesses:
        try:
            parts = Parts(dp, microbatches, size // (dp * microbatches))
            whole = whole if first is None else trace(batch, mode)  # a try changes it
            part = _part(trace, batch, split, parts, mode)
            _require_samples(part, split, tensors)
            return part, split_loss(part, whole, parts, split, norms_per_part=norms_per_part), split
        except CaptureError as error:
            first = first or error
    assert first is not None
    raise first


def _guesses(tensors: Mapping[str, torch.Tensor], parts: int) -> Iterator[tuple[int, frozenset[str]]]:
    """(number of samples, entries that hold them), the likeliest first. Raises PlanError."""
    lengths = Counter(v.shape[0] for v in tensors.values() if v.dim() and v.shape[0])
    sizes = [size for size, _ in lengths.most_common()]
    fitting = [size for size in sizes if size % parts == 0]
    if not tensors:
        problem = f"no entry of the batch is a tensor with samples, to be cut into {parts} parts (dp x microbatches)"
        raise PlanError(
            problem, "batch", "pass tensors whose first dim is the samples, or use dp 1 and 1 microbatch"
        )
    if not fitting:
        shapes = ", ".join(f"{name} {list(v.shape)}" for name, v in tensors.items())
        later = {size for v in tensors.values() for size in v.shape[1:2] if size % parts == 0}
        hint = next((h for size in sorted(later) if (h := _samples_first(tensors, size))), "")
        raise PlanError(f"the batch does not divide into {parts} parts (dp x microbatches): {shapes}", "batch",
                        f"use a multiple of {parts} samples{', ' * bool(hint)}{hint}")  # fmt: skip
    for size in fitting:
        long = [name for name, v in tensors.items() if v.dim() and v.shape[0] == size]
        for number in range(min(MAX_SHARED, len(long) - 1) + 1):
            for shared in combinations(reversed(long), number):
                yield size, frozenset(long) - set(shared)


def _samples_first(tensors: Mapping[str, torch.Tensor], size: int) -> str:
    """What to do if samples lie in the second dim of an entry."""
    names = [n for n, v in tensors.items() if v.dim() > 1 and v.shape[1] == size != v.shape[0]]
    return (
        f"with samples in the first dim of {', '.join(names)} (transpose it in the forward)" if names else ""
    )


def _part(trace: Trace, batch: Batch, split: frozenset[str], parts: Parts, mode: FakeTensorMode) -> Captured:
    """The capture of a part."""
    tensors, size = tensors_of(batch), parts.samples * parts.number
    small = {n: v[: parts.samples] if n in split else v for n, v in tensors.items()}
    try:
        return trace(rebuilt(batch, small), mode)
    except CaptureError as error:
        problem = f"{parts.samples} of {size} samples cannot be run by themselves: {error.problem}"
        other = "take sizes from the inputs (x.shape[0]), or use dp 1 and 1 microbatch"
        raise CaptureError(problem, error.where, _samples_first(tensors, size) or other) from error


def _require_samples(part: Captured, split: frozenset[str], tensors: Mapping[str, torch.Tensor]) -> None:
    placeholders = [n for n in part.graph_module.graph.nodes if n.op == "placeholder" and n.users]
    if not {part.names[n.name].partition(":")[2] for n in placeholders} & split:
        problem = "no input that the model reads holds samples in its first dim"
        raise CaptureError(problem, ", ".join(sorted(tensors)), "use dp 1 and 1 microbatch")
