"""Idle keys: those of a job that were written and change nothing of its plan, its time and its training, and why.

Warned of, as a file may serve several plans and optimizers; what nobody can mean is refused where it is read
(`job_file`). Not known here: what the user's code makes of its arguments.
"""

from collections.abc import Callable
from functools import partial
from typing import TypeAlias

from kernels.builtin_optimizers import BUILT_IN
from orchestrator.config.job_file import Job, LrShape
from partitioner.layout.parallel_plan import Plan

IsIdle: TypeAlias = Callable[[Job, Plan], bool]


def idle_keys(job: Job, plan: Plan) -> list[str]:
    """A sentence for each."""
    return [f"{key} has no effect: {why}" for key, is_idle, why in _RULES
            if _is_written(job, key) and is_idle(job, plan)]  # fmt: skip


def _lacks(setting: str, job: Job, plan: Plan) -> bool:
    return not job.optimizer.is_own and setting not in BUILT_IN[job.optimizer.name].settings


def _warms_up_only(job: Job, plan: Plan) -> bool:
    return not job.lr_schedule.is_own and job.lr_schedule.warmup_steps >= job.steps


def _is_flat(job: Job, plan: Plan) -> bool:
    return job.lr_schedule.name == LrShape.CONSTANT and not _warms_up_only(job, plan)


def _is_never_validated(job: Job, plan: Plan) -> bool:
    return job.validation.every == 0 and (job.validation.data is not None or not job.has_own_data)


def _has_nothing_held_out(job: Job, plan: Plan) -> bool:
    return job.has_own_data and job.validation.data is None and job.validation.every > 0


def _has_one_stage(job: Job, plan: Plan) -> bool:
    return plan.pp == 1


def _has_one_replica(job: Job, plan: Plan) -> bool:
    return plan.dp == 1 and job.plan.zero > 0


_RULES: tuple[tuple[str, IsIdle, str], ...] = (
    *((f"optimizer.{name}", partial(_lacks, name), "this optimizer has none")
      for name in sorted({name for known in BUILT_IN.values() for name in known.settings})),
    ("lr_schedule.name", _warms_up_only, "the warm-up takes all steps"),
    ("lr_schedule.min_lr_ratio", _warms_up_only, "the warm-up takes all steps"),
    ("lr_schedule.min_lr_ratio", _is_flat, "a constant rate stays at its peak"),
    ("validation.data", _is_never_validated, "validation.every is 0: never"),
    ("validation.batches", _is_never_validated, "validation.every is 0: never"),
    ("validation.batches", _has_nothing_held_out, "there is no validation.data"),
    ("validation.every", _has_nothing_held_out, "there is no validation.data"),
    ("plan.schedule", _has_one_stage, "there is one pipeline stage"),
    ("plan.zero", _has_one_replica, "there is one replica, dp 1"),
)  # fmt: skip


def _is_written(job: Job, key: str) -> bool:
    section, _, name = key.rpartition(".")
    return section in job.model_fields_set and name in getattr(job, section).model_fields_set
