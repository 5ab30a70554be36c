"""The seam between the verbs and what carries out a Program: the clock alone, one process, or Ray actors.

A runner is made for one Program and has one method that matters: `run` carries out a schedule once. `simulate`,
`train` and `verify` call it, and the conformance suite holds every runner to the same claims. Runners of chips that
hold tensors can also be given values, and give them back.

Values move as plain tensors: `batches[dp][microbatch, name]`, `states[chip][tensor name]`.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol, TypeAlias

from orchestrator.config.hardware.cluster import Cluster
from orchestrator.runs.timeline import Mark, Timeline
from partitioner.program.program import Program

if TYPE_CHECKING:
    import torch

    from comms.selection.progress import Progress
    from kernels.optimizers import StepStatistics
    from orchestrator.planning.preparation import Prepared

# Causes before effects: forward 0, backward 1, later 2; microbatch; stage along the flow; chip.
BadOrder: TypeAlias = tuple[int, int, int, int]
Batches: TypeAlias = "Mapping[int, Mapping[tuple[int, str], torch.Tensor]]"
States: TypeAlias = "Mapping[int, Mapping[str, torch.Tensor]]"


@dataclass(frozen=True, slots=True)
class StepRequest:
    """One execution of a schedule of the Program.

    `measure` records what every instruction took and what chips held; `check` looks for the first instruction with a
    non-finite result. Neither changes a result.
    """

    schedule: str = "step"
    lr: float = 0.0
    batches: Batches = field(default_factory=dict)
    measure: bool = False
    check: bool = False


class StepResult(Protocol):
    """What came of a request."""

    @property
    def step_ns(self) -> int:
        """How long it took, by the runner's own clock."""

    @property
    def stats(self) -> "StepStatistics | None":
        """Loss and norms; None where there are no tensors."""

    def timeline(self, step: int = 0) -> Timeline | None:
        """What every chip did, as step `step`; None where that was not recorded."""


class Runner(Protocol):
    """Carries out schedules of the Program that it was made for, one after the other."""

    def run(self, request: StepRequest) -> StepResult:
        """Carry out one schedule, once."""

    def close(self) -> None:
        """Give back processes and memory; nothing is run after that."""


@dataclass(frozen=True, slots=True)
class ExecutedStep:
    """What came of a request to chips that hold tensors; marks only where it was to be measured."""

    program: Program = field(repr=False)
    step_ns: int
    stats: "StepStatistics | None"
    marks: tuple[Mark, ...] = ()
    first_bad: tuple[BadOrder, str] | None = None

    def timeline(self, step: int = 0) -> Timeline | None:
        """See `StepResult`; on the clock of the chips."""
        from orchestrator.runners.step_timelines import measured_timeline  # actors do without

        return measured_timeline(self.program, self.marks, step) if self.marks else None


class TensorRunner(Runner, Protocol):
    """A runner whose chips hold tensors."""

    def run(self, request: StepRequest) -> ExecutedStep:
        """See `Runner`."""

    def load(self, values: "Callable[[str], torch.Tensor]") -> None:
        """Give parameters ("params:NAME") and buffers ("buffer:NAME") to the chips that need them."""

    def states(self) -> States:
        """What a checkpoint holds, by chip."""

    def restore(self, states: States) -> None:
        """Put a checkpoint back."""


class Launch(Protocol):
    """A runner that is coming up: what can begin before there is a Program has begun."""

    def connect(self, prepared: "Prepared", progress: "Progress") -> TensorRunner:
        """The runner of `prepared`; waits for what is still starting, showing its phases."""

    def close(self) -> None:
        """Give up what was started, if `connect` was never reached."""


def num_workers(cluster: Cluster) -> int:
    """Threads or actors that execute simulated chips: what the cluster file says, else one per core."""
    return cluster.actors or len(os.sched_getaffinity(0))
