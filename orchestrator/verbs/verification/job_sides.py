"""The two sides of a job: its model and optimizer in plain PyTorch, and its step as `train` takes it, in this process.

Both start from given values (see `module_values`). They share the job's module, which the plain side only borrows.
"""

from functools import partial
from pathlib import Path

import torch

from comms.selection.progress import Progress
from orchestrator.config.job_file import Dtype
from orchestrator.planning.job_parts import JobParts
from orchestrator.planning.preparation import Prepared, module_values
from orchestrator.runners.executing.chip_set import ChipSet
from orchestrator.runners.runner import Settings
from orchestrator.verbs.training.job_step import step_of_job
from orchestrator.verbs.verification.one_chip import OneChip
from orchestrator.verbs.verification.outcome import Outcome, Tensors
from orchestrator.verbs.verification.sides import GroupSettings, PlannedSide
from orchestrator.verbs.verification.verdict import MakePlain
from partitioner.capture.batch_inputs import Batch
from partitioner.program.program import Program


def plain_job(prepared: Prepared, parts: JobParts, values: Tensors) -> MakePlain:
    """One chip that trains the job, with batch norms as the plan has them."""
    module, job = parts.model.module, prepared.job
    optimizer, norm_parts = parts.optimizer_anew(), prepared.plan.norm_parts
    chip = OneChip(module, optimizer, parts.loss_fn, job.clip_limit, norm_parts, has_masters=True)
    return partial(chip.side, values, {}, job.dtype is Dtype.FP64)


class KeptChips:
    """A launch in this process and thread that keeps the chips at hand."""

    chips: ChipSet

    def connect(self, program: Program, settings: Settings, progress: Progress) -> ChipSet:
        """See `Launch`."""
        del progress
        self.chips = ChipSet(program, settings)
        return self.chips

    def keep_logs(self, folder: Path) -> None:
        """There are no other processes."""

    def close(self) -> None:
        """Nothing was started."""


class PlannedJob:
    """All chips of the plan train the job's module, from `values` on; batches may differ in size, as in `train`."""

    def __init__(self, prepared: Prepared, parts: JobParts, values: Tensors) -> None:
        module = parts.model.module
        with torch.no_grad():
            for name, own in module_values(module).items():
                if not torch.equal(own, values[name]):
                    own.copy_(values[name])
        self.values, self.launch = values, KeptChips()
        self.optimizer = parts.optimizer_anew()
        self.one_step = step_of_job(prepared, parts, self.optimizer, self.launch)

    def step(self, batch: Batch, key: int, settings: GroupSettings) -> Outcome:
        """See `ComparedSide`; the key is that of the job's next step."""
        for group, own in zip(self.optimizer.param_groups, settings, strict=True):
            group.update(own)
        stats = self.one_step.execute(batch).stats
        assert stats is not None
        return self.side(batch).outcome(stats.loss)

    def side(self, batch: Batch) -> PlannedSide:
        """The chips that such a batch is for."""
        _, program = self.one_step.ready(batch)
        return PlannedSide(program, self.launch.chips, self.values)
