"""A set of chips: the same bytes for any number of workers, the one-chip result for any plan, and hangs explained."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from orchestrator.runners.executing.chip import saved_state
from orchestrator.runners.executing.chip_set import ChipSet, Stuck
from orchestrator.runners.executing.whole_state import whole_parameters
from orchestrator.runners.runner import StepRequest
from partitioner.program.program import Body, Compute, Program, Role, Send, TensorKind

Make = Callable[..., Any]
PLAN = {"dp": 2, "tp": 2, "pp": 2, "zero": 1, "microbatches": 2}


def train(chips: ChipSet, batches_of: Make, steps: int = 3) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses, and the parameters at the end."""
    losses = []
    for step in range(steps):
        outcome = chips.run(StepRequest("step", 0.01, batches_of(chips.program, step)))
        assert outcome.stats is not None
        losses.append(outcome.stats.loss)
    states = {index: saved_state(chip) for index, chip in chips.chips.items()}
    return losses, whole_parameters(chips.program, states.__getitem__)


def test_one_head_on_two_chips_is_the_one_chip_result(
    tiny_program: Make, running_chips: Make, batches_of: Make
) -> None:
    options = (("heads", 1), ("dtype", torch.float64))
    programs = [tiny_program(options, **degrees) for degrees in ({}, {"tp": 2})]
    (losses, one), (others, two) = (train(running_chips(p, dict(options)), batches_of) for p in programs)
    assert others == pytest.approx(losses, rel=1e-12)
    for name, value in one.items():
        torch.testing.assert_close(two[name].view_as(value), value, rtol=1e-8, atol=1e-9)


def same_bytes(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return set(one) == set(other) and all(torch.equal(one[name], other[name]) for name in one)


def test_two_workers_give_the_bytes_of_one(tiny_program: Make, running_chips: Make, batches_of: Make) -> None:
    program = tiny_program(**PLAN)
    alone = train(running_chips(program), batches_of)
    for workers in (2, 3):
        losses, parameters = train(running_chips(program, workers=workers), batches_of)
        assert losses == alone[0]
        assert same_bytes(parameters, alone[1])


def test_evaluation_changes_nothing_and_gives_the_loss_of_the_next_step(
    tiny_program: Make, running_chips: Make, batches_of: Make
) -> None:
    program = tiny_program(**PLAN)
    chips, batches = running_chips(program), batches_of(program)
    before = {
        i: {t.id: chip.fixed[t.id].clone() for t in chip.tensors if t.kind is TensorKind.FLAT}
        for i, chip in chips.chips.items()
    }
    seen = chips.run(StepRequest("evaluate", 0.0, batches)).stats
    assert all(torch.equal(chips.chips[i].fixed[t], v) for i, kept in before.items() for t, v in kept.items())
    assert seen.loss == chips.run(StepRequest("step", 0.01, batches)).stats.loss


@pytest.mark.parametrize("schedule", ["step", "evaluate"])
def test_no_tensor_of_a_microbatch_survives(
    schedule: str, tiny_program: Make, running_chips: Make, batches_of: Make
) -> None:
    program = tiny_program(**PLAN)
    chips = running_chips(program)
    chips.run(StepRequest(schedule, 0.01, batches_of(program)))
    assert {i: len(chip.instances) for i, chip in chips.chips.items()} == dict.fromkeys(range(8), 0)
    assert not chips.communications.open


def test_the_statistics_are_the_same_on_every_chip(
    tiny_program: Make, running_chips: Make, batches_of: Make
) -> None:
    program = tiny_program(**PLAN)
    chips = running_chips(program)
    chips.run(StepRequest("step", 0.01, batches_of(program)))
    assert len({chip.stats for chip in chips.chips.values()}) == 1


def test_marks_name_every_instruction_that_works_or_meets(
    tiny_program: Make, running_chips: Make, batches_of: Make
) -> None:
    program = tiny_program(pp=2, microbatches=2)
    chips = running_chips(program)
    assert chips.run(StepRequest("step", 0.01, batches_of(program))).marks == ()
    marks = chips.run(StepRequest("step", 0.01, batches_of(program), measure=True)).marks
    assert {m.chip for m in marks} == {0, 1}
    assert all(m.end_ns >= m.start_ns for m in marks)
    sends = {i.id for i in program.roles[0].body["send_forward"].instructions if isinstance(i, Send)}
    assert sends <= {m.instruction for m in marks if m.chip == 0}


@pytest.mark.parametrize("broken", [0, 1])
def test_the_first_result_that_is_not_finite_is_named_and_the_step_is_skipped(
    broken: int, tiny_program: Make, running_chips: Make, batches_of: Make
) -> None:
    program = tiny_program(dp=2)
    chips = running_chips(program)
    weight = next(t for t in program.roles[0].tensors if t.name == "blocks.1.mlp.up.weight")
    chips.chips[broken].fixed[weight.id].fill_(float("inf"))
    states = {i: {k: v.clone() for k, v in saved_state(c).items()} for i, c in chips.chips.items()}
    outcome = chips.run(StepRequest("step", 0.01, batches_of(program), check=True))
    assert not outcome.stats.is_finite
    for index, chip in chips.chips.items():
        assert same_bytes(saved_state(chip), states[index])
    _, said = outcome.first_bad
    assert said.startswith(f"chip {broken} (stage 0), microbatch 0, instruction ")
    assert "(blocks.0)" in said  # both blocks run the segment that was first made for blocks.0


@pytest.mark.parametrize("microbatch", [0, 1])
def test_a_gradient_that_is_not_finite_is_named_before_what_it_spreads_to(
    microbatch: int, tiny_program: Make, running_chips: Make, batches_of: Make
) -> None:
    program = tiny_program(dp=2, microbatches=2)
    chips = running_chips(program)
    body = program.roles[0].body["backward_last" if microbatch else "backward"]
    wrong = next(i.id for i in body.instructions if isinstance(i, Compute))

    def spoil(chip: Any, ins: Any, number: int, operands: Any, results: Any) -> None:
        if (ins.id, number) == (wrong, microbatch):
            results[0].fill_(float("nan"))

    chips.chips[1].observer = spoil
    _, said = chips.run(StepRequest("step", 0.01, batches_of(program), check=True)).first_bad
    assert said.startswith(f"chip 1 (stage 0), microbatch {microbatch}, instruction {wrong} (")


def tampered(program: Program, stage: int, body: str, drop: type) -> Program:
    """The Program without the first `drop` instruction of one role's body."""

    def without(found: Body) -> Body:
        position = next(i for i, ins in enumerate(found.instructions) if isinstance(ins, drop))
        return replace(
            found, instructions=(*found.instructions[:position], *found.instructions[position + 1 :])
        )

    role = program.roles[stage]
    bodies = tuple(without(b) if b.name == body else b for b in role.bodies)
    changed = Role(role.stage, role.tensors, bodies, role.schedules)
    return replace(program, roles=tuple(changed if r.stage == stage else r for r in program.roles))


@pytest.mark.parametrize("workers", [1, 2])
def test_a_send_that_never_comes_is_explained(
    workers: int, tiny_program: Make, running_chips: Make, batches_of: Make
) -> None:
    program = tampered(tiny_program(pp=2, microbatches=2), 0, "send_forward", Send)
    chips = running_chips(program, workers=workers)
    with pytest.raises(Stuck) as caught:
        chips.run(StepRequest("step", 0.01, batches_of(program)))
    message = str(caught.value)
    assert "chip 1 (stage 1): forward(0)" in message
    assert "waits for p2p (0, 1) #0, missing [0]" in message


def test_a_collective_that_one_stage_skips_is_explained(
    tiny_program: Make, running_chips: Make, batches_of: Make
) -> None:
    program = tiny_program(pp=2, microbatches=2)
    first, last = program.roles
    shorter = tuple((name, tuple(c for c in calls if c.body != "update")) for name, calls in last.schedules)
    program = replace(program, roles=(first, Role(last.stage, last.tensors, last.bodies, shorter)))
    chips = running_chips(program)
    with pytest.raises(Stuck, match=r"chip 0 \(stage 0\): update\(0\).*group \(0, 1\) #0, missing \[1\]"):
        chips.run(StepRequest("step", 0.01, batches_of(program)))


def test_an_error_in_a_worker_reaches_the_caller(
    tiny_program: Make, running_chips: Make, batches_of: Make
) -> None:
    program = tiny_program(dp=2)

    def fail(*_: object) -> None:
        raise ZeroDivisionError("in a kernel")

    for workers in (1, 2):
        chips = running_chips(program, workers=workers)
        chips.chips[1].observer = fail
        with pytest.raises(ZeroDivisionError, match="in a kernel"):
            chips.run(StepRequest("step", 0.01, batches_of(program)))


@pytest.mark.parametrize("degrees", [{"dp": 2}, {"tp": 2}, {"pp": 2, "microbatches": 2}, PLAN], ids=str)
def test_a_plan_gives_the_losses_of_one_chip_on_the_same_samples(
    degrees: dict[str, int], tiny_program: Make, running_chips: Make, batches_of: Make
) -> None:
    options = {"dtype": torch.float64}
    program = tiny_program(tuple(options.items()), **degrees)
    alone = tiny_program(tuple(options.items()), microbatches=program.size("dp") * program.microbatches)
    losses, parameters = train(running_chips(program, options), batches_of)
    expected, whole = train(running_chips(alone, options), batches_of)
    assert losses == pytest.approx(expected, rel=1e-12)
    for name, value in whole.items():
        torch.testing.assert_close(parameters[name].view_as(value), value, rtol=1e-8, atol=1e-9)
