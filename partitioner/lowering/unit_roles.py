"""Unit roles: every distinct unit of a graph lowered as a pipeline stage of its own, to be priced by itself.

A stage of any plan is a row of units, so the costs of a few units give those of every pipeline: see `unit_table`, which
what comes out here is read through. Units that are lowered alike share one role, so that a model of a hundred equal
blocks has as many roles as one of three. Not known here: the buffers that a whole stage shares.
"""

import json
from collections.abc import Hashable
from dataclasses import replace

from partitioner.capture.captured_graph import Graph
from partitioner.layout.parallel_plan import Plan
from partitioner.lowering.lower import StepShape, groups_of, params_of, role_of_stage, staged, unit_cost
from partitioner.lowering.role_builder import SegmentPool
from partitioner.lowering.stage_context import StageContext, cut_of
from partitioner.program.program import Program
from partitioner.program.unit_table import COST, UNITS


def lower_units(graph: Graph, tp: int, shape: StepShape) -> Program:
    """The distinct units as roles, which no machine runs. Raises PartitionError for what tp cannot cut."""
    count = len(graph.units)
    plan = Plan(dp=2, tp=tp, pp=count, stages=(1,) * count)
    context, _ = staged(graph, plan, shape)
    kinds: dict[Hashable, int] = {}
    role_of = [kinds.setdefault(_kind(context, index), len(kinds)) for index in range(count)]
    firsts = [role_of.index(number) for number in range(len(kinds))]
    pool = SegmentPool()
    roles = tuple(
        replace(role_of_stage(context, first, pool, shape), stage=number)
        for number, first in enumerate(firsts)
    )
    described = {
        "role_of": role_of, "params": _params(context, shape), "states": shape.optimizer_states,
        "masters": shape.has_masters, "whole": shape.whole_tensors,
        "has_tail": graph.tail is not None,
    }  # fmt: skip
    costs = {f"{COST}{number}": unit_cost(graph, first) for number, first in enumerate(firsts)}
    meta: dict[str, str | int | float] = {
        "samples_per_part": graph.samples,
        "dtype": shape.dtype,
        UNITS: json.dumps(described),
        **costs,
    }
    axes = (("pp", len(roles)), ("dp", plan.dp), ("tp", tp))
    return Program(axes, 1, tuple(pool.segments), roles, tuple(meta.items()))


def _kind(context: StageContext, index: int) -> Hashable:
    """What decides how a unit is lowered by itself."""
    unit = context.graph.units[index]
    consumers = tuple(len(context.consumers(value)) for value in unit.outputs)
    reached = tuple(name in context.reached for name in unit.params)
    return cut_of(unit, context.cuts), index == 0, index == context.last, consumers, reached, len(unit.frees)


def _params(context: StageContext, shape: StepShape) -> list[list[list[object]]]:
    """Of every unit its parameters, as `unit_table.UnitParam` takes them."""
    settings, apart = groups_of(context.graph, shape), dict[object, int]()
    return [
        [
            [p.name, list(p.spec.shape), p.spec.dtype, p.is_cut, p.group,
             apart.setdefault(p.apart, len(apart)), p.is_frozen]
            for p in params_of(context, unit, settings)
        ]
        for unit in range(len(context.graph.units))
    ]  # fmt: skip
