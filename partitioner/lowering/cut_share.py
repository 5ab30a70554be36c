"""How much of a model tensor parallelism cuts: the share of its parameters, and of its matrix multiplications' FLOPs.

A share of 1 means that each of `tp` chips has 1/tp. What is not cut is copied: every chip holds and does all of it.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from comms.errors import PartitionError
from partitioner.capture.captured_graph import Graph, op_name
from partitioner.capture.products.tp_styles import REPLICATE
from partitioner.layout.cut_products import PRODUCT_RULES
from partitioner.layout.parallel_plan import Plan
from partitioner.layout.param_cuts import Cuts, ParamCut
from partitioner.layout.vocabulary import VOCABULARY_RULES
from partitioner.lowering.pieces import TracedUnit, line_of_reader
from partitioner.lowering.stage_context import Cut, cut_of

NAMED = 5  # of the copied parameters, the largest


@dataclass(frozen=True, slots=True)
class CutShare:
    """Shares from 0 to 1, and what is copied: the largest parameters, and products, with the reason."""

    parameters: float
    flops: float
    copied: tuple[str, ...]


def cut_share(
    graph: Graph, plan: Plan, cuts: Cuts, wanted: Cuts, traced: Mapping[Cut, TracedUnit]
) -> CutShare:
    """What a plan cuts along tp. `wanted`: cuts before it is known what can be traced. Raises PartitionError."""
    if plan.tp == 1:
        return CutShare(0.0, 0.0, ())
    sizes = {name: graph.specs[name].numel for name in graph.params}
    cut = sum(size for name, size in sizes.items() if cuts[name] is not None)
    parameters = cut / max(sum(sizes.values()), 1)
    whole = sum(graph.templates[u.template].flops for u in graph.units)
    local = sum(traced[cut_of(u, cuts)].flops for u in graph.units)
    flops = (1.0 - local / whole) / (1.0 - 1.0 / plan.tp) if whole else 0.0
    copied = sorted((n for n in graph.params if cuts[n] is None), key=lambda n: -sizes[n])[:NAMED]
    reasons = [f"{n} ({_reason(graph, plan, n, wanted[n])})" for n in copied]
    if not cut and flops <= 0:
        problem = f"tp {plan.tp} cuts nothing of this model: {reasons[0]}"
        hint = f"use tp 1, or sizes that divide by {plan.tp}"
        raise PartitionError(problem, line_of_reader(graph, copied[0]), hint)
    products = dict.fromkeys(
        f"{what} ({u.name})" for u in graph.units for what in traced[cut_of(u, cuts)].whole
    )
    return CutShare(parameters, min(max(flops, 0.0), 1.0), (*reasons, *[*products][:NAMED]))


def _reason(graph: Graph, plan: Plan, name: str, cut: ParamCut | None) -> str:
    if cut is not None:
        return "something in its block cannot be cut"
    shape, uses = graph.specs[name].shape, dict.fromkeys(_uses(graph, name))
    users = [*dict.fromkeys(user for user, _ in uses)]
    if len(shape) > 1 and any(user in PRODUCT_RULES or user in VOCABULARY_RULES for user in users):
        if all(style != REPLICATE for _, style in uses):
            return f"no dim of {'x'.join(map(str, shape))} that can be cut divides by {plan.tp}"
        if not any(user in VOCABULARY_RULES for user in users):
            return "the tp_plan leaves it whole"
    return f"used by {', '.join(users)}" if users else "used nowhere"


def _uses(graph: Graph, name: str) -> Iterator[tuple[str, str]]:
    """The operators that read a parameter, and its style there."""
    for unit in graph.units:
        template = graph.templates[unit.template]
        for param, node, style in zip(
            unit.params, template.graph.graph.nodes, template.tp_styles, strict=False
        ):
            if param == name:
                yield from ((op_name(user.target), style) for user in node.users)
