"""Job: what is trained and how, as one frozen value; which hardware runs it is the cluster's business.

None stands for `auto` where the job file says so: a number that a later step derives. Global batches are in
sequences; a step reads `global_batch` sequences of `seq` tokens. Not here: defaults and checks of single
fields (job_file.py), and whether the plan fits a cluster (the planner).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from partitioner.layout.parallel_plan import PipelineSchedule


class Dtype(StrEnum):
    """The type of parameters and activations; optimizer state is at least fp32."""

    FP32 = "fp32"
    BF16 = "bf16"
    FP64 = "fp64"


class LrShape(StrEnum):
    """How the learning rate moves after the warm-up."""

    CONSTANT = "constant"
    COSINE = "cosine"
    LINEAR = "linear"


@dataclass(frozen=True, slots=True)
class Optimizer:
    """Optimizer and its numbers; `name` is adamw, sgd or `pkg.module:factory`."""

    name: str
    lr: float
    weight_decay: float
    betas: tuple[float, float]
    eps: float
    momentum: float


@dataclass(frozen=True, slots=True)
class LrSchedule:
    """Linear warm-up from zero, then `name` down to `min_lr_ratio` of the peak at the last step."""

    name: LrShape
    warmup_steps: int
    min_lr_ratio: float


@dataclass(frozen=True, slots=True)
class PlanChoice:
    """Degrees of parallelism asked for; None is auto. Their product must be the number of chips."""

    dp: int | None
    tp: int | None
    pp: int | None
    zero: int  # 0: whole optimizer state on each chip; 1: sharded over dp
    schedule: PipelineSchedule


@dataclass(frozen=True, slots=True)
class Validation:
    """Every how many steps to validate (0: never), and on how many global batches."""

    every: int
    batches: int


@dataclass(frozen=True, slots=True)
class Checkpoints:
    """Every how many steps to save (0: only at the end), and how many to keep."""

    every: int
    keep: int


@dataclass(frozen=True, slots=True)
class Job:
    """One training run."""

    model: str  # builtin:NAME, hf:NAME, path.py:factory, pkg.module:factory
    model_args: Mapping[str, object] = field(hash=False)
    data: str  # builtin:NAME, or a file or folder
    seq: int
    global_batch: int
    microbatches: int | None  # per step and data-parallel replica
    steps: int
    seed: int
    dtype: Dtype
    optimizer: Optimizer
    clip_norm: float | None  # None: gradients are not clipped
    lr_schedule: LrSchedule
    plan: PlanChoice
    validation: Validation
    checkpoints: Checkpoints
