"""The inline runner: all chips in this process.

With one worker everything happens in the calling thread (pdb works).
"""

from collections.abc import Callable

import torch

from orchestrator.runners.executing.chip import Settings, StepInput
from orchestrator.runners.executing.chip_set import ChipSet
from orchestrator.runners.executing.chip_state import restore_state, saved_state
from orchestrator.runners.executing.executor import Batches, Outcome, States
from partitioner.program.program import Program


class InlineExecutor:
    """Executes a Program on `num_workers` threads of this process."""

    def __init__(self, program: Program, settings: Settings, num_workers: int) -> None:
        self.chip_set = ChipSet(program, range(program.num_chips), settings, num_workers=num_workers)

    def load(self, values: Callable[[str], torch.Tensor]) -> None:
        """See `Executor`."""
        self.chip_set.load(values)

    def step(self, lr: float, batches: Batches, *, measure: bool = False, check: bool = False) -> Outcome:
        """See `Executor`."""
        return self.chip_set.run("step", StepInput(lr), batches, measure=measure, check=check)

    def evaluate(self, batches: Batches) -> Outcome:
        """See `Executor`."""
        return self.chip_set.run("evaluate", StepInput(0.0), batches)

    def states(self) -> States:
        """See `Executor`."""
        return {index: saved_state(chip) for index, chip in self.chip_set.chips.items()}

    def restore(self, states: States) -> None:
        """See `Executor`."""
        self.chip_set.prepare_optimizers()
        for chip in self.chip_set.chips.values():
            restore_state(chip, states.__getitem__)

    def close(self) -> None:
        """Nothing to release."""
