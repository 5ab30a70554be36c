"""Lowering: a Program as small as its number of stages, with the communication that its plan asks for."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from comms.errors import PartitionError
from partitioner.layout.parallel_plan import Plan
from partitioner.lowering.lower import StepShape, lower, unit_cost
from partitioner.program.machine import Machine, Run
from partitioner.program.program import (
    Accumulate,
    Collective,
    Compute,
    Free,
    Program,
    Recv,
    Role,
    Send,
    TensorKind,
    Update,
)
from partitioner.program.static_check import check_program

PLANS = [
    {}, {"dp": 2}, {"dp": 2, "zero": 1}, {"tp": 2}, {"pp": 2, "microbatches": 3}, {"pp": 4, "microbatches": 4},
    {"dp": 2, "tp": 2, "pp": 2, "zero": 1, "microbatches": 2},
]  # fmt: skip
Make = Callable[..., Program]


def instructions(role: Role, kind: type) -> list[Any]:
    return [ins for body in role.bodies for ins in body.instructions if isinstance(ins, kind)]


def groups(role: Role, body: str) -> Counter[str]:
    return Counter(str(i.group) for i in role.body[body].instructions if isinstance(i, Collective))


@pytest.mark.parametrize("degrees", PLANS, ids=str)
def test_every_plan_gives_a_valid_program(tiny_program: Make, degrees: dict[str, int]) -> None:
    program = tiny_program(**degrees)
    assert check_program(program) == ()
    assert len(program.roles) == degrees.get("pp", 1)
    assert all({"start", "step", "evaluate"} == set(role.schedule) for role in program.roles)


def test_a_program_for_4096_replicas_is_as_small_as_one_for_two(tiny_program: Make) -> None:
    few, many = tiny_program(dp=2), tiny_program(dp=4096)
    assert many.num_chips == 4096
    assert [r.bodies for r in many.roles] == [r.bodies for r in few.roles]
    assert len(many.segments) == len(few.segments)


def test_microbatches_add_calls_but_no_instructions(tiny_program: Make) -> None:
    few, many = tiny_program(pp=2, microbatches=2), tiny_program(pp=2, microbatches=16)
    for one, other in zip(few.roles, many.roles, strict=True):
        assert [len(b.instructions) for b in one.bodies] == [len(b.instructions) for b in other.bodies]
        assert len(other.schedule["step"]) > 7 * len(one.schedule["step"])


def test_repeated_blocks_share_their_segments(tiny_program: Make) -> None:
    program = tiny_program((("layers", 8),))
    blocks = [s for s in program.segments if s.name.startswith("blocks")]
    assert len(blocks) == 2  # forward and backward
    used = Counter(i.segment for i in instructions(program.roles[0], Compute))
    assert used[blocks[0].id] == 8
    assert used[blocks[1].id] == 2 * 8  # backward, and backward of the last microbatch


def test_tensor_parallel_blocks_meet_twice_each_way(tiny_program: Make) -> None:
    role = tiny_program((("layers", 8),), tp=2).roles[0]
    assert groups(role, "forward") == {"tp": 1 + 8 * 2 + 2}  # embedding, blocks, cross entropy
    assert groups(role, "backward") == {"tp": 8 * 2 + 1}
    assert groups(role, "update") == {"pp*dp*tp": 1}


def test_coordinates_are_inputs(tiny_program: Make) -> None:
    role = tiny_program(tp=2).roles[0]
    kinds = [t.source for t in role.tensors if t.kind is TensorKind.COORDINATE]
    assert kinds == ["coordinate:tp"]


def test_gradients_are_reduced_once_and_start_in_the_last_backward(tiny_program: Make) -> None:
    role = tiny_program(dp=2).roles[0]
    trained = [t for t in role.tensors if t.kind is TensorKind.GRAD and t.base is None]
    assert groups(role, "backward") == {}
    assert groups(role, "backward_last") == {"dp": len(trained)}
    last = [c.body for c in role.schedule["step"] if c.body.startswith("backward")]
    assert last == ["backward_last"]


def test_zero_scatters_gradients_updates_shards_and_gathers_parameters(tiny_program: Make) -> None:
    role = tiny_program(dp=4, zero=1).roles[0]
    ops = Counter(str(i.op) for i in instructions(role, Collective) if i.group.axes == ("dp",))
    updates = instructions(role, Update)
    assert ops == {"reduce_scatter": len(updates), "all_gather": len(updates)}
    for update in updates:
        shard = role.tensors[update.param]
        assert shard.base is not None and shard.shards == ((0, "dp"),)
        assert shard.spec.numel * 4 == role.tensors[shard.base].spec.numel
        assert role.tensors[update.grad].spec == shard.spec
    states = sum(t.spec.numel for t in role.tensors if t.kind is TensorKind.STATE)
    assert states * 4 == pytest.approx(2 * tiny_program(dp=4).facts["params"], rel=0.01)


def test_without_a_cut_every_parameter_is_updated_exactly_once(tiny_program: Make) -> None:
    program = tiny_program()
    updates = instructions(program.roles[0], Update)
    assert sum(program.roles[0].tensors[u.param].spec.numel for u in updates) == program.facts["params"]
    assert {u.group for u in updates} == {0, 1}


def test_a_tied_table_is_reduced_over_the_stages_that_share_it(tiny_program: Make) -> None:
    program = tiny_program((("tied", True),), pp=4, microbatches=4)
    found = [groups(role, "update") for role in program.roles]
    assert [g["pp@0+3"] for g in found] == [1, 0, 0, 1]
    tied = [[t.name for t in role.tensors if t.source == "embed.weight"] for role in program.roles]
    assert [bool(names) for names in tied] == [True, False, False, True]


def test_neighbouring_stages_exchange_one_activation_and_one_gradient(tiny_program: Make) -> None:
    program = tiny_program(pp=4, microbatches=4)
    ways = [
        ({s.to for s in instructions(r, Send)}, {x.source for x in instructions(r, Recv)})
        for r in program.roles
    ]
    assert ways == [({1}, {1}), ({0, 2}, {0, 2}), ({1, 3}, {1, 3}), ({2}, {2})]


def chips_after(program: Program, schedule: str) -> set[tuple[int, int]]:
    """What chip 0 of a one-chip Program still holds per microbatch at the end of a schedule."""
    machine, role = Machine(program, 0, schedule), program.roles[0]
    alive: set[tuple[int, int]] = set()
    while (item := machine.ready()) is not None:
        if isinstance(item, Run):
            for ins in item.instructions:
                if isinstance(ins, Free):
                    alive -= {(t, item.microbatch) for t in ins.tensors}
                else:
                    touched = (*getattr(ins, "reads", ()), *getattr(ins, "writes", ()))
                    alive |= {(t, item.microbatch) for t in touched if role.tensors[t].is_per_microbatch}
        machine.complete(item)
        if not isinstance(item, Run):
            machine.arrive(item.key)
    return alive


@pytest.mark.parametrize("schedule", ["step", "evaluate"])
@pytest.mark.parametrize("degrees", [{}, {"microbatches": 3}, {"dp": 2, "zero": 1}], ids=str)
def test_nothing_of_a_microbatch_is_left_at_the_end(
    tiny_program: Make, degrees: dict[str, int], schedule: str
) -> None:
    assert chips_after(tiny_program(**degrees), schedule) == set()


def test_evaluation_runs_no_backward_and_no_update(tiny_program: Make) -> None:
    for role in tiny_program(pp=2, microbatches=3).roles:
        bodies = {call.body for call in role.schedule["evaluate"]}
        assert not any(word in body for body in bodies for word in ("backward", "update"))
        assert role.schedule["evaluate"][-1].body == "report"


def test_facts_say_what_a_step_does(tiny_program: Make, tiny_graph: Callable[..., Any]) -> None:
    facts, graph = tiny_program(dp=2, microbatches=3).facts, tiny_graph()
    assert (facts["samples"], facts["tokens"], facts["nominal_count"]) == (12, 12 * 16, 12 * 16)
    assert facts["params"] == graph.param_numel()
    assert facts["model_flops"] == sum(graph.templates[u.template].model_flops for u in graph.units) * 6
    assert facts["recomputed_flops"] == 0


def test_stages_of_the_plan_are_taken_or_refused_with_the_arithmetic(tiny_graph: Callable[..., Any]) -> None:
    graph, shape = tiny_graph(), StepShape(2, 16, "tiny", "f32", 2)
    assert lower(graph, Plan(pp=2, stages=(1, 3)), shape).facts["stages"] == "1+3"
    with pytest.raises(PartitionError, match="places 3 units, the model has 4"):
        lower(graph, Plan(pp=2, stages=(1, 2)), shape)
    with pytest.raises(PartitionError, match="4 pieces for 5 pipeline stages"):
        lower(graph, Plan(pp=5), shape)


def test_blocks_weigh_more_than_an_embedding_lookup(tiny_graph: Callable[..., Any]) -> None:
    costs = [unit_cost(tiny_graph(), i) for i in range(4)]
    assert min(costs) > 0
    assert costs[1] == costs[2] > costs[0]


def test_losses_are_accumulated_only_where_the_loss_is_made(tiny_program: Make) -> None:
    program = tiny_program(pp=2, microbatches=2)
    for role, expected in zip(program.roles, (0, 1), strict=True):
        sums = [
            a
            for a in instructions(role, Accumulate)
            if any(role.tensors[t].name == "step.loss" for t in a.writes)
        ]
        assert len(sums) == expected
