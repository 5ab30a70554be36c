"""Whole states: what chips hold in shards is put together and cut again without losing a bit, for every plan."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch

from orchestrator.runners.executing.whole_state import (
    chip_states,
    step_groups,
    whole_buffers,
    whole_parameters,
    whole_states,
)
from orchestrator.runners.runner import StepRequest
from partitioner.program.program import Program, TensorKind

Make = Callable[..., Any]
Values = dict[str, torch.Tensor]
DOUBLE = (("dtype", torch.float64),)
PLANS = [
    {}, {"dp": 2}, {"dp": 3, "zero": 1}, {"tp": 2}, {"pp": 2, "microbatches": 2}, {"dp": 2, "tp": 2, "zero": 1},
    {"dp": 2, "tp": 2, "pp": 2, "zero": 1, "microbatches": 2}, {"dp": 2, "bucket_bytes": 1, "zero": 1},
]  # fmt: skip
each_plan = pytest.mark.parametrize("degrees", PLANS, ids=str)


def random_values(program: Program, seed: int) -> Values:
    """Every parameter of the Program as a whole tensor, in the dims that the Program sees it with."""
    generator = torch.Generator().manual_seed(seed)
    found: Values = {}
    for role in program.roles:
        for tensor in role.tensors:
            if tensor.kind is TensorKind.PARAM and tensor.base is not None:
                shape = list(tensor.spec.shape)
                for dim, axis in tensor.shards:
                    shape[dim] *= program.size(axis)
                found.setdefault(tensor.source, torch.randn(shape, generator=generator, dtype=torch.float64))
    return found


def states_of(values: Values, *keys: str) -> dict[str, Values]:
    """A state of every parameter under each key, and a count of steps."""
    return {
        name: {key: value * (index + 2) for index, key in enumerate(keys)} | {"step": torch.tensor(7.0)}
        for name, value in values.items()
    }


def reading(values: Values) -> Callable[[str], torch.Tensor]:
    return lambda name: values[name.partition(":")[2]]


def require_equal(mine: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor]) -> None:
    assert mine.keys() == theirs.keys()
    for name, value in theirs.items():
        assert torch.equal(mine[name], value), name


@each_plan
def test_parameters_and_states_come_back_from_their_shards(
    degrees: dict[str, Any], tiny_program: Make
) -> None:
    program = tiny_program(DOUBLE, **degrees)
    values = random_values(program, 1)
    own = states_of(values, "exp_avg", "exp_avg_sq")
    states = chip_states(program, reading(values), own)
    assert len(states) == program.num_chips
    require_equal(whole_parameters(program, states.__getitem__), values)
    found = whole_states(program, states)
    assert found.keys() == own.keys()
    for name, state in own.items():
        require_equal(found[name], state)


def test_before_a_step_there_are_no_states(tiny_program: Make) -> None:
    program = tiny_program(DOUBLE, dp=2, zero=1)
    values = random_values(program, 1)
    states = chip_states(program, reading(values), {})
    assert whole_states(program, states) == {}
    require_equal(whole_parameters(program, states.__getitem__), values)


@each_plan
def test_shards_of_a_state_lie_like_those_of_the_parameter(
    degrees: dict[str, Any], tiny_program: Make
) -> None:
    """A state that equals its parameter is, on every chip, what the optimizer steps on."""
    program = tiny_program(DOUBLE, **degrees)
    values = random_values(program, 2)
    states = chip_states(program, reading(values), {name: {"same": value} for name, value in values.items()})
    for chip, state in states.items():
        at = program.coordinates(chip)
        for group in step_groups(program, program.role_of(chip)):
            shard = at["dp"] * group.shard if group.is_sharded else 0
            expected = state[group.flat.name].narrow(0, shard, group.shard)
            assert torch.equal(state[f"{group.name}.optimizer.same"], expected)


@each_plan
def test_what_trained_chips_hold_is_cut_as_they_hold_it(
    degrees: dict[str, Any], tiny_program: Make, running_chips: Make, batches_of: Make
) -> None:
    program = tiny_program(DOUBLE, **degrees)
    chips = running_chips(program, dict(DOUBLE))
    for step in range(2):
        chips.run(StepRequest("step", 0.01, batches_of(program, step)))
    held = chips.states()
    values, own = whole_parameters(program, held.__getitem__), whole_states(program, held)
    made = chip_states(program, reading(values), own)
    for chip, state in held.items():
        assert state.keys() <= made[chip].keys()
        require_equal({name: made[chip][name] for name in state}, state)


@pytest.mark.parametrize(
    "other",
    [
        {"dp": 3, "zero": 1, "microbatches": 2},
        {"tp": 2, "microbatches": 6},
        {"pp": 2, "microbatches": 6},
        {"dp": 2, "tp": 2, "pp": 2, "zero": 1, "microbatches": 3},
    ],
    ids=str,
)
def test_training_goes_on_under_another_plan(
    other: dict[str, Any], tiny_program: Make, running_chips: Make, batches_of: Make
) -> None:
    """The whole states of one plan become the shards of another, on the same samples."""
    first, second = tiny_program(DOUBLE, dp=2, microbatches=3), tiny_program(DOUBLE, **other)
    chips, moved = running_chips(first, dict(DOUBLE)), running_chips(second, dict(DOUBLE))
    chips.run(StepRequest("step", 0.01, batches_of(first, 0)))
    held, seen_as = chips.states(), random_values(second, 0)
    values = {n: v.view(seen_as[n].shape) for n, v in whole_parameters(first, held.__getitem__).items()}
    own = {
        name: {key: v.view(seen_as[name].shape) if v.dim() else v for key, v in state.items()}
        for name, state in whole_states(first, held).items()
    }
    moved.restore(chip_states(second, reading(values), own))
    for step in range(1, 3):
        expected = chips.run(StepRequest("step", 0.01, batches_of(first, step))).stats
        found = moved.run(StepRequest("step", 0.01, batches_of(second, step))).stats
        assert found.loss == pytest.approx(expected.loss, rel=1e-12)
        assert found.grad_norm == pytest.approx(expected.grad_norm, rel=1e-9)


def test_master_copies_are_the_parameters_in_full_precision(tiny_program: Make) -> None:
    for degrees in ({}, {"dp": 2, "zero": 1}):
        program = tiny_program((("dtype", torch.bfloat16),), **degrees)
        values = {name: value.bfloat16() for name, value in random_values(program, 3).items()}
        states = chip_states(program, reading(values), {})
        require_equal(whole_parameters(program, states.__getitem__), values)
        for chip, state in states.items():
            role, at = program.role_of(chip), program.coordinates(chip)
            for master in (t for t in role.tensors if t.kind is TensorKind.MASTER):
                flat = next(g.flat for g in step_groups(program, role) if g.name == master.name)
                start = at["dp"] * master.spec.numel if degrees else 0
                whole = state[flat.name].narrow(0, start, master.spec.numel)
                assert state[master.name].dtype is torch.float32
                assert torch.equal(state[master.name], whole.float())


def test_numbers_that_every_parameter_has_stay_numbers(tiny_program: Make) -> None:
    """Counts and running products: not cut, however many parameters share a step."""
    program = tiny_program(DOUBLE, dp=2, zero=1)
    values = random_values(program, 4)
    own = {
        name: {"step": torch.tensor(3.0), "mu_product": torch.tensor(0.5), "eta": torch.ones(1)}
        for name in values
    }
    found = whole_states(program, chip_states(program, reading(values), own))
    for name, state in own.items():
        require_equal(found[name], state)


def test_a_model_without_buffers_that_change_has_none(tiny_program: Make) -> None:
    program = tiny_program(DOUBLE, dp=2)
    states = chip_states(program, reading(random_values(program, 5)), {})
    assert whole_buffers(program, states) == {}
