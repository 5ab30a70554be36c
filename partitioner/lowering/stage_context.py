"""What lowering knows of the whole model, and the parts of its side graphs that one stage needs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from torch.fx import Node

from partitioner.capture.captured_graph import Graph, Side, Unit, ancestors
from partitioner.layout.parallel_plan import Plan
from partitioner.layout.param_cuts import Cuts, ParamCut
from partitioner.lowering.pieces import TracedUnit, make_op
from partitioner.program.program import Operation

# a template, and how tp cuts its parameters
Cut: TypeAlias = tuple[int, tuple[ParamCut | None, ...]]


def cut_of(unit: Unit, cuts: Cuts) -> Cut:
    """What decides how a unit is traced."""
    return unit.template, tuple(cuts[name] for name in unit.params)


@dataclass(frozen=True)
class StageContext:
    """What lowering knows about the whole model."""

    graph: Graph
    plan: Plan
    traced: Mapping[Cut, TracedUnit]
    stage_of: tuple[int, ...]
    cuts: Cuts
    nominal_count: int
    reached: frozenset[str]  # parameters that some backward gives a gradient
    # by buffer: stages that read it and do not make what it becomes, as far as known
    abroad: dict[str, set[int]]

    def producer(self, value: str) -> int:
        """The stage that makes an activation."""
        return next(self.stage_of[i] for i, unit in enumerate(self.graph.units) if value in unit.outputs)

    def consumers(self, value: str) -> list[int]:
        """The stages that read an activation, in order."""
        found = {self.stage_of[i] for i, unit in enumerate(self.graph.units) if value in unit.activations}
        return sorted(found | ({self.last} if value in self.graph.summed else set()))

    @property
    def last(self) -> int:
        """The stage that makes the loss."""
        makers = (
            stage
            for stage, unit in zip(self.stage_of, self.graph.units, strict=True)
            if self.graph.loss in unit.outputs
        )
        return next(makers, self.stage_of[-1])


class NeededSide:
    """The part of a side graph that makes `wanted`: the values it reads, its ops, what it makes."""

    def __init__(self, side: Side, wanted: Sequence[str]) -> None:
        nodes = list(side.graph.graph.nodes)
        sources = dict(zip((n for n in nodes if n.op == "placeholder"), side.inputs, strict=True))
        results = dict(zip(side.outputs, nodes[-1].args[0], strict=True)) if side.outputs else {}
        kept = ancestors(results[v] for v in wanted)
        outer = [n for n in nodes if n in kept and n.op == "placeholder"]
        calls: list[Node] = [n for n in nodes if n in kept and n.op == "call_function"]
        number = {n: i for i, n in enumerate([*outer, *calls])}
        made = [v for v in wanted if results[v] not in sources]
        self.reads: tuple[str, ...] = tuple(sources[n] for n in outer)
        self.ops: tuple[Operation, ...] = tuple(make_op(n, number) for n in calls)
        self.made: tuple[str, ...] = tuple(made)
        self.outputs: tuple[int, ...] = tuple(number[results[v]] for v in made)
