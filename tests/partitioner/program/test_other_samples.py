"""Other samples: what follows from two sizes is what lowering gives for a third; what does not follow is refused."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from comms.errors import PartitionError
from partitioner.layout.parallel_plan import Plan
from partitioner.lowering.lower import StepShape, lower
from partitioner.lowering.unit_roles import lower_units
from partitioner.program.other_samples import with_samples
from partitioner.program.peak_memory import peak_memory
from partitioner.program.program import Program
from partitioner.program.unit_table import UnitTable

Make = Callable[..., Any]
PLANS = [Plan(dp=2), Plan(dp=2, tp=2, zero=1), Plan(dp=2, pp=2, microbatches=3)]


def lowered(tiny_graph: Make, plan: Plan, samples: int) -> Program:
    shape = StepShape(samples * plan.dp * plan.microbatches, 16, "tiny", "fp32", 2)
    return lower(tiny_graph(samples=samples, dp=2), plan, shape, check=False)


def figures(program: Program) -> list[object]:
    """All that the clock reads."""
    ops = [
        (op.target, op.flops, op.read_bytes, op.write_bytes, op.outs)
        for s in program.segments
        for op in s.ops
    ]
    facts = {name: value for name, value in program.meta if isinstance(value, int)}
    return [ops, facts, peak_memory(program), [(r.tensors, r.bodies, r.schedules) for r in program.roles]]


@pytest.mark.parametrize("plan", PLANS, ids=str)
@pytest.mark.parametrize("bases", [(1, 2), (2, 3), (4, 2)])
def test_a_third_size_follows_from_two(plan: Plan, bases: tuple[int, int], tiny_graph: Make) -> None:
    first, second = (lowered(tiny_graph, plan, samples) for samples in bases)
    assert figures(with_samples(first, second, 5)) == figures(lowered(tiny_graph, plan, 5))


def test_units_follow_as_programs_do(tiny_graph: Make) -> None:
    shape = StepShape(8, 16, "tiny", "fp32", 2)
    one, two, four = (lower_units(tiny_graph(samples=n, dp=2), 2, shape) for n in (1, 2, 4))
    table = UnitTable(with_samples(one, two, 4))
    assert figures(table.program) == figures(four)
    assert (table.samples, table.weights) == (4, UnitTable(four).weights)


def test_equal_units_share_a_role_and_every_parameter_is_listed(tiny_graph: Make) -> None:
    graph = tiny_graph(samples=2, dp=2, layers=4)
    table = UnitTable(lower_units(graph, 1, StepShape(8, 16, "tiny", "fp32", 2)))
    assert table.role_of == (0, 1, 1, 1, 1, 2)
    assert {param.name for unit in table.params for param in unit} == set(graph.params)
    assert sum(p.spec.numel for unit in table.params for p in unit) == graph.param_numel()


@pytest.mark.parametrize("field", ["outs", "flops"])
def test_what_differs_in_more_than_numbers_is_refused(field: str, tiny_graph: Make) -> None:
    first, second = (lowered(tiny_graph, Plan(dp=2), samples) for samples in (2, 4))
    segment = second.segments[0]
    op = segment.ops[0]
    odd = replace(op, outs=()) if field == "outs" else replace(op, flops=op.flops + 1)
    changed = replace(second, segments=(replace(segment, ops=(odd, *segment.ops[1:])), *second.segments[1:]))
    with pytest.raises(PartitionError, match="3 samples is not between those of 2 and 4"):
        with_samples(first, changed, 3)
