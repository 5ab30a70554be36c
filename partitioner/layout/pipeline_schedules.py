"""Pipeline schedules: the order of forward and backward microbatches in one stage.

A schedule is a function, entered under its name in `PipelineSchedule`; plan files, job files and the command line take
every name that stands there. GPipe (Huang et al. 2019): all forwards, then all backwards. 1F1B (PipeDream-flush,
Narayanan et al. 2021): the same bubble, (p-1)/(m+p-1) with equal stages, but at most p - stage microbatches in flight.
"""

from collections.abc import Callable
from enum import StrEnum
from typing import Self, TypeAlias

Task: TypeAlias = tuple[str, int]  # ("forward" | "backward", microbatch)
# from (stage, number of stages, number of microbatches)
Order: TypeAlias = Callable[[int, int, int], tuple[Task, ...]]


def gpipe(stage: int, num_stages: int, num_microbatches: int) -> tuple[Task, ...]:
    """All forwards, then all backwards in the same order."""
    del stage, num_stages
    tasks = [("forward", mb) for mb in range(num_microbatches)]
    return (*tasks, *(("backward", mb) for mb in range(num_microbatches)))


def one_f_one_b(stage: int, num_stages: int, num_microbatches: int) -> tuple[Task, ...]:
    """Warm up with num_stages - stage - 1 forwards, alternate, drain."""
    warmup = min(num_stages - stage - 1, num_microbatches)
    tasks: list[Task] = [("forward", mb) for mb in range(warmup)]
    for mb in range(num_microbatches - warmup):
        tasks += [("forward", warmup + mb), ("backward", mb)]
    return (*tasks, *(("backward", mb) for mb in range(num_microbatches - warmup, num_microbatches)))


class PipelineSchedule(StrEnum):
    """Order of microbatches in a pipeline: its name, and the function that gives `order` its tasks."""

    order: Order

    def __new__(cls, name: str, order: Order) -> Self:
        """A name that knows its order."""
        member = str.__new__(cls, name)
        member._value_, member.order = name, order
        return member

    GPIPE = "gpipe", gpipe
    ONE_F_ONE_B = "1f1b", one_f_one_b
