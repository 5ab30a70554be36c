"""Pipeline time: when the stages of a pipeline are done, from what a microbatch takes in each and between them.

The order of tasks and transfers that lowering writes and the folded simulation drives, without their instructions:
a stage posts the receive of its next task before it works on the present one, a transfer starts when both ends have
posted and the one before is through, a task when what it needs is there. Beyond `STEADY` microbatches per stage every
further one takes a period, which is measured on the last stage.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from partitioner.layout.pipeline_schedules import PipelineSchedule, Task

STEADY, MORE = 2, 8  # microbatches that are followed: so many per stage, and some


@dataclass(frozen=True, slots=True)
class StageTimes:
    """Seconds of one microbatch in a stage, to the next stage, and back to the one before."""

    forward_s: float
    backward_s: float
    sends_s: float
    returns_s: float


def ends_of_stages(
    stages: Sequence[StageTimes], microbatches: int, schedule: PipelineSchedule
) -> list[float]:
    """Seconds until each stage has done its last backward."""
    followed = min(microbatches, STEADY * len(stages) + MORE)
    orders = [schedule.order(number, len(stages), followed) for number in range(len(stages))]
    pipeline = _Pipeline(stages, orders)
    pipeline.run()
    ends = [stream.now for stream in pipeline.streams]
    if followed == microbatches:
        return ends
    last, span = pipeline.streams[-1].done, followed // 2
    period = (last["backward", followed - 1] - last["backward", followed - 1 - span]) / span
    periods = [period] * len(stages)
    if schedule is PipelineSchedule.GPIPE:
        periods = [_period_of_gpipe(stages, number) for number in range(len(stages))]
    return [end + (microbatches - followed) * more for end, more in zip(ends, periods, strict=True)]


def _period_of_gpipe(stages: Sequence[StageTimes], number: int) -> float:
    """What every microbatch adds to the forwards of all stages, and to the backwards of a stage and those after it."""
    forward = max(max(stage.forward_s, stage.sends_s) for stage in stages)
    behind = [stage.backward_s for stage in stages[number:]] + [s.returns_s for s in stages[number + 1 :]]
    return forward + max(behind)


@dataclass(slots=True)
class _StageStream:
    """A stage on its way through its tasks; `posted`: since when it waits for what a task needs."""

    tasks: tuple[Task, ...]
    at: int = 0
    now: float = 0.0
    posted: dict[Task, float] = field(default_factory=dict)
    done: dict[Task, float] = field(default_factory=dict)
    arrived: dict[Task, float] = field(default_factory=dict)
    lanes: dict[str, float] = field(
        default_factory=dict
    )  # by kind of task: what arrives, one after the other


class _Pipeline:
    def __init__(self, stages: Sequence[StageTimes], orders: Sequence[tuple[Task, ...]]) -> None:
        self.stages = stages
        self.streams = [_StageStream(tasks) for tasks in orders]
        for stream in self.streams:
            stream.posted = dict.fromkeys(stream.tasks[:2], 0.0)

    def run(self) -> None:
        """Every stage goes as far as it can, in turn, until all are through."""
        moved = True
        while moved:
            moved = False
            for number in range(len(self.streams)):
                while self._advance(number):
                    moved = True

    def _advance(self, number: int) -> bool:
        stream, stage = self.streams[number], self.stages[number]
        if stream.at == len(stream.tasks):
            return False
        task = stream.tasks[stream.at]
        needed = self._needed(number, task)
        if needed is None:
            return False
        stream.now = max(stream.now, needed) + (stage.forward_s if task[0] == "forward" else stage.backward_s)
        stream.done[task] = stream.now
        stream.at += 1
        for later in stream.tasks[stream.at + 1 : stream.at + 2]:
            stream.posted[later] = stream.now
        return True

    def _needed(self, number: int, task: Task) -> float | None:
        """When what a task works on has arrived; None: not known yet."""
        source = number - 1 if task[0] == "forward" else number + 1
        if not 0 <= source < len(self.streams):
            return 0.0
        stream, other = self.streams[number], self.streams[source]
        if task not in other.done:
            return None
        if task not in stream.arrived:
            moves = self.stages[source].sends_s if source < number else self.stages[source].returns_s
            start = max(other.done[task], stream.posted[task], stream.lanes.get(task[0], 0.0))
            stream.arrived[task] = stream.lanes[task[0]] = start + moves
        return stream.arrived[task]
