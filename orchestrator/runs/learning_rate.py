"""Learning rate of every step, as a pure function: a resumed run needs nothing but its step number.

Linear warm-up to the peak over `warmup_steps`, then constant, or down to `min_lr_ratio` of the peak at the last step:
linearly, or along half a cosine (Loshchilov and Hutter, "SGDR", 2017, eq. 5, without restarts).
"""

import math
from typing import assert_never

from orchestrator.config.job_file import LrScheduleSection, LrShape


def learning_rate(step: int, *, peak: float, schedule: LrScheduleSection, steps: int) -> float:
    """The rate of step `step` (from 0) of `steps`; past the end it stays where the last step left it."""
    if step < schedule.warmup_steps:
        # One ahead: a step at rate zero would be a step for nothing.
        return peak * (step + 1) / schedule.warmup_steps
    progress = min((step - schedule.warmup_steps) / max(steps - 1 - schedule.warmup_steps, 1), 1.0)
    floor = peak * schedule.min_lr_ratio
    shape = LrShape(schedule.name)
    match shape:
        case LrShape.CONSTANT:
            return peak
        case LrShape.LINEAR:
            return peak + (floor - peak) * progress
        case LrShape.COSINE:
            return floor + (peak - floor) * (1 + math.cos(math.pi * progress)) / 2
        case _:
            assert_never(shape)
