"""The two sides of a verification, a step at a time: plain PyTorch on one chip, and a Program on all chips of a plan.

The plain side is the caller's own module: eager autograd, the whole batch at once, its own optimizer, random numbers
by the same keys. Its tensors are exchanged for the side's for the length of a step, so what closes over the module sees
them too; afterwards it is what it was, after an exception too.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from typing import Any, Protocol, TypeAlias
from unittest.mock import patch

import torch
from torch import nn
from torch.utils import checkpoint

from orchestrator.runners.executing.chip_set import ChipSet
from orchestrator.runners.executing.whole_state import (
    MASTER,
    whole_buffers,
    whole_states,
    whole_tensors,
)
from orchestrator.runners.runner import StepRequest
from orchestrator.runs.data import split_batch
from orchestrator.verbs.verification.chip_copies import differing_copies
from orchestrator.verbs.verification.outcome import Outcome, Tensors, named_states
from orchestrator.verbs.verification.reordering import Reordered
from partitioner.capture.batch_inputs import Batch, rebuilt, tensors_of
from partitioner.capture.exact_float64 import ExactFloat64
from partitioner.capture.forwards.borrowed_module import borrowed
from partitioner.capture.forwards.library_forms import keyed_draws
from partitioner.capture.forwards.step_loss import LossFunction, loss_of_step
from partitioner.capture.samples.batch_norms import normalised_per_part
from partitioner.program.program import Program, TensorKind

GroupSettings: TypeAlias = Sequence[Mapping[str, Any]]  # of the optimizer's groups
States: TypeAlias = Mapping[str, Mapping[str, Any]]  # of the optimizer, by parameter and key
MakeOptimizer: TypeAlias = Callable[[Mapping[str, nn.Parameter]], torch.optim.Optimizer]


class ComparedSide(Protocol):
    """Takes steps."""

    def step(self, batch: Batch, key: int, settings: GroupSettings) -> Outcome:
        """One optimizer step; `key`: see `step_key`."""


class PlainSide:
    """One chip in plain PyTorch, starting from `values` (see `module_values`) of any floating dtype."""

    def __init__(
        self, module: nn.Module, values: Tensors, optimizer: MakeOptimizer, loss_fn: LossFunction | None = None,
        *, clip_norm: float | None = None, norm_parts: int = 1, has_masters: bool = False,
        exact: bool = False, order: int | None = None,
    ) -> None:  # fmt: skip
        """`norm_parts`: see `Plan`, `has_masters`: `OneChip`, `exact`: `ExactFloat64`.

        `order`: the number of a re-ordering of all sums (see `Reordered`).
        """
        self.module, self.loss_fn, self.clip_norm = module, loss_fn, clip_norm
        self.norm_parts, self.exact, self.order = norm_parts, exact, order
        held = _at_least_float32 if has_masters else _copied
        self.params = {
            name: nn.Parameter(held(values[f"params:{name}"]), requires_grad=own.requires_grad)
            for name, own in module.named_parameters()
        }
        self.dtypes = {name: values[f"params:{name}"].dtype for name in self.params}
        self.buffers = {name: values[f"buffer:{name}"].clone() for name, _ in module.named_buffers()}
        self.optimizer = optimizer(self.params)

    def step(self, batch: Batch, key: int, settings: GroupSettings) -> Outcome:
        """See `ComparedSide`."""
        groups = self.optimizer.param_groups
        for group, own in zip(groups, settings, strict=True):
            group.update({name: value for name, value in own.items() if name in group})
        loss, gradients = self._backward(batch, key)
        for name, param in self.params.items():
            param.grad = gradients[name].to(param.dtype) if name in gradients else None
        stepped = {id(param) for group in groups for param in group["params"]}
        trained = {n: p for n, p in self.params.items() if id(p) in stepped and p.grad is not None}
        if self.clip_norm is not None:
            nn.utils.clip_grad_norm_(trained.values(), self.clip_norm)
        self.optimizer.step()
        after = {name: param.detach().to(self.dtypes[name]) for name, param in self.params.items()}
        own_gradients = {name: p.grad for name, p in trained.items() if p.grad is not None}
        return Outcome(loss, own_gradients, after | self.buffers, self._states(trained))

    def _states(self, trained: Tensors) -> dict[str, torch.Tensor]:
        """Copied, as the next step writes into them."""
        held = self.optimizer.state
        states = {name: dict(held[param]) for name, param in trained.items() if param in held}
        for name, own in states.items():
            if self.dtypes[name] is not self.params[name].dtype:
                own[MASTER] = self.params[name].detach()
        return {name: value.clone() for name, value in named_states(states).items()}

    def _backward(self, batch: Batch, key: int) -> tuple[float, Tensors]:
        values = {f"params:{n}": p.detach().to(self.dtypes[n]) for n, p in self.params.items()}
        values |= {f"buffer:{n}": b for n, b in self.buffers.items()}
        numbers = torch.tensor(key), torch.tensor(0)
        with placed(self.module, values), ExitStack() as modes:
            modes.enter_context(Reordered(self.order) if self.order is not None else nullcontext())
            modes.enter_context(_without_recompute())
            samples = {v.shape[0] for v in tensors_of(batch).values() if v.dim()}
            modes.enter_context(normalised_per_part(self.norm_parts, samples))
            with ExactFloat64() if self.exact else nullcontext(), keyed_draws(*numbers):
                loss = loss_of_step(self.module, self.loss_fn, batch)
            loss.backward()
            self.buffers = {name: b.detach() for name, b in self.module.named_buffers()}
            self.buffers = {name: b.clone() for name, b in self.buffers.items()}
            found = {n: p.grad for n, p in self.module.named_parameters() if p.grad is not None}
        return loss.item(), found


def _copied(value: torch.Tensor) -> torch.Tensor:
    return value.detach().clone()


def _at_least_float32(value: torch.Tensor) -> torch.Tensor:
    return value.detach().to(torch.promote_types(value.dtype, torch.float32), copy=True)


@contextmanager
def _without_recompute() -> Iterator[None]:
    """Checkpoints of torch keep what they would compute again: it would draw other random numbers."""

    def kept(*_: object, **__: object) -> Iterator[None]:
        yield

    def applied(function: Callable[..., object], _: bool, *args: object) -> object:
        return function(*args)

    with (
        patch.object(checkpoint, "_checkpoint_without_reentrant_generator", kept),
        patch.object(checkpoint.CheckpointFunction, "apply", applied),
    ):
        yield


@contextmanager
def placed(module: nn.Module, values: Tensors) -> Iterator[None]:
    """Inside the block the module's tensors hold these values, of other dtypes if need be; no trace is left."""
    own: list[tuple[str, torch.Tensor]] = [(f"params:{n}", p) for n, p in module.named_parameters()]
    own += [(f"buffer:{n}", b) for n, b in module.named_buffers()]
    before = [(tensor, tensor.data, tensor.grad) for _, tensor in own]
    tensors, versions = tuple(t for _, t in own), tuple(t._version for _, t in own)
    with borrowed(module):
        try:
            for name, tensor in own:
                tensor.grad = None
                tensor.data = values[name]
            yield
        finally:
            for tensor, data, grad in before:
                tensor.grad = None
                tensor.data = data
                tensor.grad = grad
            torch._C._autograd._unsafe_set_version_counter(tensors, versions)  # by which writes are seen


class PlannedSide:
    """All chips of a Program, in this process, which hold `values` already; what it does not know stays as it is."""

    def __init__(self, program: Program, runner: ChipSet, values: Tensors) -> None:
        self.program, self.runner = program, runner
        self.untouched = {name.partition(":")[2]: value for name, value in values.items()}

    def step(self, batch: Batch, key: int, settings: GroupSettings) -> Outcome:
        """See `ComparedSide`."""
        batches = split_batch(tensors_of(batch), self.program, key)
        stats = self.runner.run(StepRequest("step", batches=batches, settings=settings)).stats
        assert stats is not None
        return self.outcome(stats.loss)

    def outcome(self, loss: float) -> Outcome:
        """What the last step left."""
        gradients = whole_tensors(self.program, TensorKind.GRAD, self.runner.buffer)
        values = self.untouched | whole_tensors(self.program, TensorKind.PARAM, self.runner.buffer)
        held = self.runner.states()
        values |= whole_buffers(self.program, held)
        outcome = Outcome(loss, gradients, values, named_states(whole_states(self.program, held)))
        return replace(outcome, copies=differing_copies(self.program, self.runner.chips, outcome))


def widened(value: torch.Tensor) -> torch.Tensor:
    """The tensor in float64 (or complex128), if it holds such numbers."""
    wide = torch.complex128 if value.is_complex() else torch.float64
    return value.to(wide) if value.is_complex() or value.is_floating_point() else value


def widened_batch(batch: Batch) -> dict[str, Any]:
    """The batch with all its tensors widened."""
    return rebuilt(batch, {name: widened(value) for name, value in tensors_of(batch).items()})
