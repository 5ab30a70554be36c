import os
import random
import signal
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from comms.errors import ClusterError, HangError, RunError
from kernels.optimizers import OptimizerSpec
from orchestrator.models.builtin_gpt import GPT
from orchestrator.models.model_specs import GPTOptions
from orchestrator.runners.executing.chip_set import ChipSet
from orchestrator.runners.on_ray import ray_runner
from orchestrator.runners.on_ray.placement import ActorPlan
from orchestrator.runners.on_ray.ray_runner import RayRunner
from orchestrator.runners.on_ray.ray_start import RayStart, raise_slow, start_patience_s
from orchestrator.runners.runner import Batches, Settings, States, StepRequest, TensorRunner
from partitioner.capture.graph_units import capture_graph
from partitioner.layout.parallel_plan import Plan
from partitioner.lowering.lower import StepShape, lower
from partitioner.program.program import Program

LR = 1e-2
SPEC = OptimizerSpec(lr=LR)
SAMPLES, SEQ = 8, 16
PLAN = Plan(dp=2, tp=2, pp=2, zero=1, microbatches=2)
LIMIT_S = 10


@dataclass
class Case:
    program: Program
    values: dict[str, torch.Tensor]
    batches: Batches

    def request(self, **options: bool) -> StepRequest:
        return StepRequest("step", LR, self.batches, **options)

    def train(self, runner: TensorRunner, steps: int) -> list[float]:
        runner.load(self.values.__getitem__)
        stats = [runner.run(self.request()).stats for _ in range(steps)]
        return [s.loss for s in stats if s is not None]


@pytest.fixture(scope="module")
def case() -> Case:
    torch.manual_seed(0)
    model = GPT(GPTOptions(layers=2, width=32, heads=2, vocab=64))
    ids = torch.randint(0, 64, (SAMPLES, SEQ))
    batch = {"input_ids": ids, "labels": ids.roll(-1, 1)}
    per = SAMPLES // (PLAN.dp * PLAN.microbatches)
    graph = capture_graph(
        model, batch, dp=PLAN.dp, microbatches=PLAN.microbatches, tp_plan=model.tp_plan, min_units=PLAN.pp
    )
    program = lower(graph, PLAN, StepShape(SAMPLES, SEQ, "gpt", "fp32", 2))
    values = {f"params:{k}": v.detach().clone() for k, v in model.named_parameters()}
    values |= {f"buffer:{k}": v for k, v in model.named_buffers()}
    pieces = {k: v.chunk(SAMPLES // per) for k, v in batch.items()}
    batches = {
        replica: {(m, k): v[replica * PLAN.microbatches + m] for k, v in pieces.items() for m in range(2)}
        for replica in range(PLAN.dp)
    }
    return Case(program, values, batches)


@pytest.fixture(scope="module")
def expected(case) -> tuple[list[float], States]:
    inline = ChipSet(case.program, Settings(SPEC, 1.0))
    return case.train(inline, 3), inline.states()


def connected(case: Case, num_actors: int) -> RayRunner:
    start = RayStart(ActorPlan(num_actors))
    try:
        return RayRunner(start, case.program, Settings(SPEC, 1.0))
    except BaseException:
        start.close()
        raise


@pytest.fixture(scope="module")
def two_actors(local_ray: None, case: Case) -> Iterator[RayRunner]:
    """Shared by the tests that start from parameters or a checkpoint, and ended by the last of them."""
    running = connected(case, 2)
    yield running
    running.close()


@pytest.fixture(scope="module")
def one_actor(local_ray: None, case: Case) -> Iterator[RayRunner]:
    """Shared by two tests, and ended by the second."""
    running = connected(case, 1)
    yield running
    running.close()


def assert_same_bytes(found: States, expected: States) -> None:
    assert found.keys() == expected.keys()
    for chip, state in expected.items():
        assert found[chip].keys() == state.keys()
        for name, tensor in state.items():
            assert torch.equal(found[chip][name], tensor), (chip, name)


def test_a_missing_ray_is_named_before_anything_starts(monkeypatch):
    """First, as threads of a Ray that runs would miss it."""
    monkeypatch.setitem(sys.modules, "ray", None)
    start = RayStart(ActorPlan(1))
    with pytest.raises(RunError, match="not installed"):
        start.wait()
    start.close()


@pytest.mark.ray
def test_ray_starts_without_drawing_from_what_users_code_draws_from():
    before = random.getstate(), np.random.get_state()[1].tobytes()
    start = RayStart(ActorPlan(1))
    try:
        start.wait()
        assert before == (random.getstate(), np.random.get_state()[1].tobytes())
    finally:
        start.close()


@pytest.mark.ray
def test_too_many_actors_are_refused_before_anything_is_created(local_ray):
    start = RayStart(ActorPlan(3))
    try:
        with pytest.raises(ClusterError, match="3 actors need 1 CPU each, Ray has room for 2") as caught:
            start.wait()
        assert "at most 2 actors" in caught.value.hint
        assert start.actors == []
    finally:
        start.close()


@pytest.mark.ray
def test_two_actors_give_the_bytes_of_one_process(two_actors, case, expected):
    assert case.train(two_actors, 3) == expected[0]
    assert_same_bytes(two_actors.states(), expected[1])


@pytest.mark.ray
def test_a_checkpoint_continues_and_evaluation_and_marks_come_back(two_actors, case, expected):
    inline = ChipSet(case.program, Settings(SPEC, 1.0))
    case.train(inline, 2)
    two_actors.load(case.values.__getitem__)
    two_actors.restore(inline.states())
    evaluation = StepRequest("evaluate", batches=case.batches)
    assert two_actors.run(evaluation).stats == inline.run(evaluation).stats
    outcome = two_actors.run(case.request(measure=True))
    assert outcome.stats is not None
    assert outcome.stats.loss == expected[0][2]
    assert {mark.chip for mark in outcome.marks} == set(range(8))
    assert {mark.chip for mark in outcome.marks if mark.held_bytes} == set(range(8))
    assert all(mark.start_ns <= mark.end_ns for mark in outcome.marks)
    assert_same_bytes(two_actors.states(), expected[1])


def process_of(running: RayRunner, actor: int) -> int:
    return running.start.facts[actor].address.process


def shared_files() -> set[str]:
    """But those of Python's own multiprocessing, which others may use meanwhile."""
    return {entry.name for entry in Path("/dev/shm").iterdir() if not entry.name.startswith("sem.mp-")}


def step_until(case: Case, running: RayRunner, killer: threading.Timer) -> None:
    while killer.is_alive():
        running.run(case.request())
    start = time.monotonic()
    try:
        running.run(case.request())
    finally:
        assert time.monotonic() - start < LIMIT_S


@pytest.mark.ray
def test_a_silent_actor_is_named_with_those_who_wait_for_it(two_actors, case, monkeypatch):
    monkeypatch.setattr(two_actors, "timeout_s", 0.2)
    monkeypatch.setattr(ray_runner, "ANSWER_S", 1.0)
    os.kill(process_of(two_actors, 1), signal.SIGSTOP)
    with pytest.raises(HangError) as caught:
        two_actors.run(case.request())
    assert "actor 1: does not answer" in caught.value.where
    assert "missing [2]" in caught.value.where
    two_actors.close()  # the tests after this one need its cores


@pytest.mark.ray
def test_one_actor_with_all_chips_gives_the_bytes_of_one_process(one_actor, case, expected):
    assert case.train(one_actor, 3) == expected[0]
    assert_same_bytes(one_actor.states(), expected[1])


@pytest.mark.ray
def test_an_error_in_an_actor_says_what_and_where_and_ends_all(one_actor, case):
    empty = {replica: {} for replica in case.batches}
    with pytest.raises(RunError, match=r"AssertionError|KeyError") as caught:
        one_actor.run(StepRequest("step", LR, empty))
    assert "chips" in caught.value.where
    with pytest.raises(RunError, match="have ended"):
        one_actor.states()
    one_actor.close()


@pytest.mark.ray
def test_a_killed_actor_ends_the_step_with_its_name(local_ray, case):
    before = shared_files()
    running = connected(case, 2)
    try:
        case.train(running, 1)
        killer = threading.Timer(0.5, os.kill, (process_of(running, 1), signal.SIGKILL))
        killer.start()
        with pytest.raises(RunError) as caught:
            step_until(case, running, killer)
        killer.join()
        assert caught.value.problem.startswith(
            "actor 1 has ended: its process was killed or crashed (SIGKILL"
        )
        assert "chips 2, 3, 6, 7" in caught.value.where
        with pytest.raises(RunError, match="have ended"):
            running.states()
    finally:
        running.close()
    assert shared_files() <= before


def test_actors_that_do_not_start_in_time_are_told_with_the_machines_load() -> None:
    assert [start_patience_s(load, 2) for load in (0.5, 2.0, 8.0, 1000.0)] == [60, 60, 240, 600]
    with pytest.raises(RunError, match="1 of 2 actors came up, and no other one in 240 s") as caught:
        raise_slow(1, 2, 8.0, 2)
    assert caught.value.where == "Ray at this machine: load 8.0 on 2 cores"
    assert caught.value.hint.startswith("try again") and "--runner inline" in caught.value.hint
