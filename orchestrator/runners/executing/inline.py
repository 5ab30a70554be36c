"""The inline runner: all chips in this process.

With one worker everything happens in the calling thread (pdb works).
"""

from collections.abc import Callable

import torch

from comms.errors import ClusterError
from comms.selection.progress import Progress
from orchestrator.config.hardware.cluster import Cluster, Device
from orchestrator.planning.preparation import Prepared, optimizer_factory
from orchestrator.runners.executing.chip import Settings, restore_state, saved_state
from orchestrator.runners.executing.chip_set import ChipSet
from orchestrator.runners.runner import ExecutedStep, States, StepRequest, num_workers
from partitioner.program.program import Program


class InlineRunner:
    """Executes a Program on `num_workers` threads of this process."""

    def __init__(self, program: Program, settings: Settings, num_workers: int) -> None:
        self.chip_set = ChipSet(program, range(program.num_chips), settings, num_workers=num_workers)

    def load(self, values: Callable[[str], torch.Tensor]) -> None:
        """See `TensorRunner`."""
        self.chip_set.load(values)

    def run(self, request: StepRequest) -> ExecutedStep:
        """See `Runner`."""
        return self.chip_set.run(request)

    def states(self) -> States:
        """See `TensorRunner`."""
        return {index: saved_state(chip) for index, chip in self.chip_set.chips.items()}

    def restore(self, states: States) -> None:
        """See `TensorRunner`."""
        self.chip_set.prepare_optimizers()
        for chip in self.chip_set.chips.values():
            restore_state(chip, states.__getitem__)

    def close(self) -> None:
        """Nothing to release."""


class InlineLaunch:
    """Nothing to start ahead: the chips live in this process."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster

    def connect(self, prepared: Prepared, progress: Progress) -> InlineRunner:
        """See `Launch`."""
        if self.cluster.device is Device.CUDA:
            raise ClusterError("CUDA chips need a process each", self.cluster.origin, "use --runner ray")

        with progress("start chips"):
            return InlineRunner(prepared.program, chip_settings(prepared), num_workers(self.cluster))

    def close(self) -> None:
        """Nothing was started."""


def chip_settings(prepared: Prepared) -> Settings:
    """What every chip of the run needs to know."""
    return Settings(optimizer_factory(prepared.job), prepared.job.clip_norm)
