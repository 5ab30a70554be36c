"""The seam between training and what executes a Program with real tensors: `inline` and `ray` look the same.

Values move as plain tensors: `batches[dp][microbatch, name]`, `states[chip][tensor name]`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import torch

from kernels.optimizers import StepStatistics
from orchestrator.runners.executing.chip import BadOrder, Mark

Batches: TypeAlias = Mapping[int, Mapping[tuple[int, str], torch.Tensor]]
States: TypeAlias = Mapping[int, Mapping[str, torch.Tensor]]


@dataclass(frozen=True, slots=True)
class Outcome:
    """Result of one schedule: reduced statistics, measured intervals, first non-finite instruction if looked for."""

    stats: StepStatistics | None
    marks: tuple[Mark, ...] = ()
    first_bad: tuple[BadOrder, str] | None = None


class Executor(Protocol):
    """All chips of a Program, wherever they are."""

    def load(self, values: Callable[[str], torch.Tensor]) -> None:
        """Give parameters ("params:NAME") and buffers ("buffer:NAME") to the chips that need them."""

    def step(self, lr: float, batches: Batches, *, measure: bool = False, check: bool = False) -> Outcome:
        """One training step."""

    def evaluate(self, batches: Batches) -> Outcome:
        """Forward only: loss over the batches."""

    def states(self) -> States:
        """What a checkpoint holds, by chip."""

    def restore(self, states: States) -> None:
        """Put a checkpoint back."""

    def close(self) -> None:
        """Release processes and memory."""
