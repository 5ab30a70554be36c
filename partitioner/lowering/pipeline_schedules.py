"""Pipeline schedules: the order of forward and backward microbatches in one stage.

GPipe (Huang et al. 2019): all forwards, then all backwards. 1F1B (PipeDream-flush, Narayanan et al. 2021): the same
bubble, (p-1)/(m+p-1) with equal stages, but at most p - stage microbatches in flight. A schedule is a function;
register a new one in SCHEDULES.
"""

from collections.abc import Callable, Mapping
from typing import TypeAlias

from partitioner.layout.parallel_plan import Schedule
from partitioner.program.program import Call

Task: TypeAlias = tuple[str, int]  # ("forward" | "backward", microbatch)


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


SCHEDULES: Mapping[Schedule, Callable[[int, int, int], tuple[Task, ...]]] = {
    Schedule.GPIPE: gpipe,
    Schedule.ONE_F_ONE_B: one_f_one_b,
}


def with_transfers(tasks: tuple[Task, ...], bodies: frozenset[str], last: str) -> tuple[Call, ...]:
    """Calls of one stage: each task between its receives (posted one task ahead) and its sends.

    `bodies` are the bodies the role has (first and last stages lack some transfers); `last` replaces "backward" for
    the last microbatch, where gradient reduction starts.
    """
    final = next((i for i in reversed(range(len(tasks))) if tasks[i][0] == "backward"), None)
    calls: list[Call] = []

    def add(body: str, microbatch: int) -> None:
        if body in bodies:
            calls.append(Call(body, microbatch))

    for index, (kind, microbatch) in enumerate(tasks):
        if index == 0:
            add(f"recv_{kind}", microbatch)
        if index + 1 < len(tasks):
            next_kind, next_microbatch = tasks[index + 1]
            add(f"recv_{next_kind}", next_microbatch)
        calls.append(Call(last if index == final else kind, microbatch))
        add(f"send_{kind}", microbatch)
    return tuple(calls)
