"""The step of a job: that of `distribute`, over what the job names and by the Program that was prepared."""

import torch

from comms.selection.progress import Progress, quiet
from orchestrator.config.job_file import Dtype
from orchestrator.planning.job_parts import JobParts
from orchestrator.planning.preparation import Prepared
from orchestrator.runners.runner import Launch
from orchestrator.verbs.distribute import DistributedStep


def step_of_job(
    prepared: Prepared, parts: JobParts, optimizer: torch.optim.Optimizer, launch: Launch, progress: Progress = quiet
) -> DistributedStep:  # fmt: skip
    """The step of a job, by the Program that was prepared; `optimizer` is over the parameters of its model."""
    job, model = prepared.job, parts.model
    is_watched = job.has_own_parts or job.has_own_model or job.lr_schedule.is_own
    step = DistributedStep(
        model.module, optimizer, prepared.cluster, prepared.plan, parts.loss_fn, job.clip_limit, job.seed, launch,
        is_watched=is_watched, exact=job.dtype is Dtype.FP64, has_masters=True, tp_plan=model.tp_plan,
        progress=progress,
    )  # fmt: skip
    step.wait_s = job.hang_timeout
    step.adopt(prepared.program, parts.example_batch())
    return step
