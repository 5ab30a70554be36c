"""Schedules: every microbatch once, bounded in flight, and the bubble that the papers state."""

from collections import Counter
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from partitioner.layout.pipeline_schedules import PipelineSchedule
from partitioner.lowering.lower import with_transfers
from partitioner.program.machine import Key, Machine, Post
from partitioner.program.program import Compute, Program

STAGES, MICROBATCHES = st.integers(1, 8), st.integers(1, 12)
ALL_BODIES = frozenset({"recv_forward", "send_forward", "recv_backward", "send_backward"})


@given(schedule=st.sampled_from(PipelineSchedule), stages=STAGES, microbatches=MICROBATCHES, data=st.data())
def test_every_microbatch_runs_forward_once_then_backward_once(schedule, stages, microbatches, data):
    stage = data.draw(st.integers(0, stages - 1))
    tasks = schedule.order(stage, stages, microbatches)
    assert Counter(tasks) == {(kind, mb): 1 for kind in ("forward", "backward") for mb in range(microbatches)}
    assert all(tasks.index(("forward", mb)) < tasks.index(("backward", mb)) for mb in range(microbatches))


@given(stages=STAGES, microbatches=MICROBATCHES, data=st.data())
def test_1f1b_keeps_no_more_microbatches_in_flight_than_stages_follow(stages, microbatches, data):
    stage = data.draw(st.integers(0, stages - 1))
    flying = most = 0
    for kind, _ in PipelineSchedule.ONE_F_ONE_B.order(stage, stages, microbatches):
        flying += 1 if kind == "forward" else -1
        most = max(most, flying)
    assert most == min(stages - stage, microbatches)


@given(schedule=st.sampled_from(PipelineSchedule), stages=STAGES, microbatches=MICROBATCHES, data=st.data())
def test_receives_are_posted_before_use_and_sends_follow(schedule, stages, microbatches, data):
    tasks = schedule.order(data.draw(st.integers(0, stages - 1)), stages, microbatches)
    calls = [(c.body, c.microbatch) for c in with_transfers(tasks, ALL_BODIES, "backward_last")]
    assert len(calls) == 3 * len(tasks)
    last = [call for call in calls if call[0] == "backward_last"]
    assert last == [("backward_last", [mb for kind, mb in tasks if kind == "backward"][-1])]
    for index, (kind, mb) in enumerate(tasks):
        body = "backward_last" if (kind, mb) == ("backward", last[0][1]) else kind
        at = calls.index((body, mb))
        assert calls.index((f"recv_{kind}", mb)) < at
        assert calls[at + 1] == (f"send_{kind}", mb)
        if index:
            assert calls[at - 1][0].startswith("recv") or index == len(tasks) - 1


def test_bodies_that_a_role_lacks_are_left_out():
    calls = with_transfers((("forward", 0), ("backward", 0)), frozenset({"send_backward"}), "backward")
    assert [call.body for call in calls] == ["forward", "backward", "send_backward"]


def makespan(program: Program) -> int:
    """Unit time for each forward and each backward, everything else free; transfers wait for both sides."""
    machines = [Machine(program, chip, "step") for chip in range(program.num_chips)]
    clock = [0] * len(machines)
    posted: dict[Key, dict[int, int]] = {}
    while not all(machine.done for machine in machines):
        before = [(machine.call, machine.index) for machine in machines]
        for chip, machine in enumerate(machines):
            while (item := machine.ready()) is not None:
                if isinstance(item, Post):
                    posted.setdefault(item.key, {})[chip] = clock[chip]
                else:
                    work = (ins.segment for ins in item.instructions if isinstance(ins, Compute))
                    clock[chip] += sum(segment in (0, 1) for segment in work)
                machine.complete(item)
            for key in machine.blocked_on():
                if len(posted[key]) == len(key.chips):
                    machine.arrive(key)
                    clock[chip] = max(clock[chip], *posted[key].values())
                    before[chip] = (-1, -1)
        assert before != [(machine.call, machine.index) for machine in machines], "stuck"
    return max(clock)


@pytest.mark.parametrize("schedule", list(PipelineSchedule))
@given(stages=st.integers(1, 4), microbatches=st.integers(1, 6))
@settings(max_examples=25)
def test_equal_stages_leave_the_known_bubble(toy, schedule, stages, microbatches):
    total = makespan(toy(stages, microbatches, schedule=schedule))
    bubble = 1 - Fraction(2 * microbatches, total)
    assert bubble == Fraction(stages - 1, microbatches + stages - 1)
