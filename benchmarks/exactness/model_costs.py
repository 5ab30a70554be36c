"""FLOPs and saved activations of many models: what a Program counts on one chip against eager torch.

cd benchmarks; python -m exactness.model_costs [--only llama] [--dtype float32]

FLOPs: `model_flops` against `torch.utils.flop_counter` over an eager forward and backward with attention written out
(and grouped products counted, which torch leaves out). Activations: the most that a Program's forward keeps, against
the storages that eager autograd holds when its forward has ended, each counted once, without parameters, buffers and
the batch. "read": without what torch's gather keeps of its operand, of which its backward asks the size alone, and what
its bags of embeddings note of lengths and places; "kept": of a Program that would keep operands of gather as torch does
(see `docs/limits.md`). "again": the same with checkpointing, where a model offers it; "hardware": FLOPs with what is
then computed twice, which is more in torch where the last value that is saved comes late. Models run in float64, for
which CPUs have no kernels of their own that keep other things.
"""

import argparse
import gc
import logging
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
from support.harness import report
from support.model_list import model_cases
from support.models.model_case import ModelCase
from torch import nn
from torch.fx import Node
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from orchestrator.exceptions import UserError
from partitioner.capture.batch_inputs import tensors_of
from partitioner.capture.forwards.grouped_products import GROUPED, grouped_flops
from partitioner.layout.joint_trace import Joint
from partitioner.layout.parallel_plan import Plan
from partitioner.lowering import lower
from partitioner.lowering.lower import partition
from partitioner.lowering.pieces import TracedUnit, split_joint
from partitioner.program.peak_memory import peak_memory

SAMPLES = 4
FLOPS, ACTIVATIONS = (0.98, 1.02), (0.95, 1.10)
TARGETS = {"flops": FLOPS, "activations": ACTIVATIONS, "flops again": FLOPS, "activations again": ACTIVATIONS}


def main() -> None:
    """Run and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", action="append", default=[])
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float64")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL)
    rows = []
    for case in [in_dtype(case, getattr(torch, options.dtype)) for case in model_cases()]:
        if not options.only or any(part in case.name for part in options.only):
            rows.append(row_of(case))
            print(rows[-1], flush=True)
    report("model_costs", rows)
    for name, (low, high) in TARGETS.items():
        found = [row[name] for row in rows if isinstance(row.get(name), float)]
        print(f"{name}: {sum(low <= x <= high for x in found)} of {len(found)} within {low} to {high}")


def in_dtype(case: ModelCase, dtype: torch.dtype) -> ModelCase:
    """The case with float64 parameters and inputs in another dtype."""
    if dtype == torch.float64:
        return case

    def batch(samples: int) -> dict[str, Any]:
        wide = {n: v for n, v in case.batch(samples).items() if getattr(v, "dtype", None) == torch.float64}
        return case.batch(samples) | {name: value.to(dtype) for name, value in wide.items()}

    return replace(case, make=lambda: case.make().to(dtype), batch=batch)


def row_of(case: ModelCase) -> dict[str, object]:
    """Of one model the ratios of ours to eager torch's."""
    row: dict[str, object] = {"name": case.name, "kind": case.kind}
    try:
        flops = eager_flops(case, is_again=False)
        row |= costs(case, flops, is_again=False)
        if getattr(case.make(), "supports_gradient_checkpointing", False):
            row |= {f"{name} again": value for name, value in costs(case, flops, is_again=True).items()}
    except UserError as error:
        row["refused"] = error.text[:100]
    except Exception as error:  # whatever a model raises
        row["fails"] = f"{type(error).__name__}: {error}"[:100]
    return row


def costs(case: ModelCase, flops: int, *, is_again: bool) -> dict[str, object]:
    """FLOPs and bytes of activations of a Program, by those of an eager run; `flops`: of one without checkpoints."""
    program = partition(made(case, is_again=is_again), case.batch(SAMPLES), Plan())
    (memory,) = peak_memory(program)
    saved, read = saved_nbytes(made(case, is_again=is_again), case.batch(SAMPLES))
    model, twice = (int(program.facts[name]) for name in ("model_flops", "recomputed_flops"))
    found: dict[str, object] = {
        "flops": model / max(flops, 1), "activations": memory.activation_bytes / max(saved, 1), "saved bytes": saved,
        "read": memory.activation_bytes / max(read, 1),
    }  # fmt: skip
    if read < saved:
        with patch.object(lower, "split_joint", keeping_operands):
            (keeping,) = peak_memory(partition(made(case, is_again=is_again), case.batch(SAMPLES), Plan()))
        found["kept"] = keeping.activation_bytes / max(saved, 1)
    if is_again:
        found["hardware"] = (model + twice) / max(eager_flops(case, is_again=True), 1)
    return found


def keeping_operands(joint: Joint) -> TracedUnit:
    """What `split_joint` makes, after each gather's operand was made one that the last gradient reads, times 0."""
    output = next(iter(reversed(joint.graph.nodes)))
    results: list[Any] = list(output.args[0])
    ends = [place for place, each in enumerate(results) if place >= joint.num_outputs and each is not None]
    for node in [n for n in joint.graph.nodes if n.target is torch.ops.aten.gather.default and ends]:
        value = node
        with joint.graph.inserting_before(output):
            for target, *others in (
                (torch.ops.aten.slice.Tensor, node.args[0], 0, 0, 1), (torch.ops.aten.sum.default,),
                (torch.ops.aten.mul.Tensor, 0), (torch.ops.aten.add.Tensor, results[ends[-1]]),
            ):  # fmt: skip
                args = tuple(others) if target is torch.ops.aten.slice.Tensor else (value, *others)
                value = joint.graph.call_function(target, args)
                value.meta = {"val": target(*(a.meta["val"] if isinstance(a, Node) else a for a in args))}
        results[ends[-1]] = value
    output.args = (results,)
    return split_joint(joint)


def made(case: ModelCase, *, is_again: bool) -> nn.Module:
    """A new module, checkpointed or not."""
    module = case.make()
    if is_again:
        module.gradient_checkpointing_enable({"use_reentrant": False})
    return module


def eager_flops(case: ModelCase, *, is_again: bool) -> int:
    """FLOPs of a forward and backward as torch counts them."""
    grouped = {GROUPED: grouped_flops}
    with FlopCounterMode(display=False, custom_mapping=grouped) as counter, sdpa_kernel(SDPBackend.MATH):
        made(case, is_again=is_again)(**case.batch(SAMPLES)).loss.backward()
    return int(counter.get_total_flops())


class Packed:
    """A saved tensor, which lives as long as autograd holds it; `is_read`: by the backward, not its size alone."""

    def __init__(self, value: torch.Tensor, *, is_read: bool) -> None:
        self.value, self.is_read = value.detach(), is_read


class Running(TorchFunctionMode):
    """Knows the gather, or the bags of embeddings, that run."""

    operand: torch.Tensor | None = None  # of a gather
    is_bag = False

    def __torch_function__(
        self, func: Callable[..., object], _types: object, args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> object:  # fmt: skip
        self.is_bag = func is torch.nn.functional.embedding_bag
        if func in (torch.gather, torch.Tensor.gather):
            self.operand = args[0] if args else (kwargs or {})["input"]
        try:
            return func(*args, **(kwargs or {}))
        finally:
            self.operand, self.is_bag = None, False

    def reads(self, value: torch.Tensor) -> bool:
        """Whether a backward of what runs reads `value`, which it saves."""
        if self.is_bag:
            return value.is_floating_point()
        return self.operand is None or not torch._C._is_alias_of(value, self.operand)


def saved_nbytes(model: nn.Module, batch: dict[str, Any]) -> tuple[int, int]:
    """The bytes of the distinct storages that autograd holds between forward and backward; of these, what it reads."""
    held: weakref.WeakSet[Packed] = weakref.WeakSet()
    running = Running()

    def pack(value: torch.Tensor) -> Packed:
        held.add(packed := Packed(value, is_read=running.reads(value)))
        return packed

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda packed: packed.value), running:
        loss = model(**batch).loss
    gc.collect()  # branches that do not lead to the loss
    given = (*model.parameters(), *model.buffers(), *tensors_of(batch).values())
    apart = {value.untyped_storage().data_ptr() for value in given}
    storages: dict[int, tuple[int, bool]] = {}
    for packed in held:
        storage = packed.value.untyped_storage()
        _, is_read = storages.get(storage.data_ptr(), (0, False))
        storages[storage.data_ptr()] = storage.nbytes(), is_read or packed.is_read
    del loss
    found = [sizes for place, sizes in storages.items() if place not in apart]
    return sum(nbytes for nbytes, _ in found), sum(nbytes for nbytes, is_read in found if is_read)


if __name__ == "__main__":
    main()
