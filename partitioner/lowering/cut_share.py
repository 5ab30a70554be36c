"""How much of a model tensor parallelism cuts: the share of its parameters, and of its matrix multiplications' FLOPs.

A share of 1 means that each of `tp` chips has 1/tp. What is not cut is copied: every chip holds and does all of it.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch.utils.flop_counter import flop_registry

from comms.errors import PartitionError
from partitioner.capture.captured_graph import Graph
from partitioner.capture.forwards.grouped_products import GROUPED
from partitioner.layout.parallel_plan import Plan
from partitioner.lowering.pieces import SegmentPiece, TracedUnit
from partitioner.lowering.stage import Cut, cut_of

COUNTED = frozenset(str(packet).rpartition(".")[2] for packet in (*flop_registry, GROUPED))
NAMED = 5  # of the copied parameters, the largest


@dataclass(frozen=True, slots=True)
class CutShare:
    """Shares from 0 to 1, and the largest parameters that are copied, with the reason."""

    parameters: float
    flops: float
    copied: tuple[str, ...]


def cut_share(
    graph: Graph, plan: Plan, dims: Mapping[str, int | None], wanted: Mapping[str, int | None],
    traced: Mapping[Cut, TracedUnit],
) -> CutShare:  # fmt: skip
    """What a plan cuts along tp. `wanted`: the dims before it is known whether they divide. Raises PartitionError."""
    sizes = {name: graph.specs[name].numel for name in graph.params}
    cut = sum(size for name, size in sizes.items() if dims[name] is not None)
    parameters = cut / max(sum(sizes.values()), 1)
    whole = sum(graph.templates[u.template].flops for u in graph.units)
    local = sum(_flops(traced[cut_of(u, dims)]) for u in graph.units)
    flops = (1.0 - local / whole) / (1.0 - 1.0 / plan.tp) if whole and plan.tp > 1 else 0.0
    if plan.tp > 1 and not cut and flops <= 0:
        raise PartitionError(f"tp {plan.tp} cuts nothing of this model", "tensor parallelism",
                             "use tp 1, or give the model a tp_plan")  # fmt: skip
    copied = sorted((n for n in graph.params if dims[n] is None), key=lambda n: -sizes[n])[:NAMED]
    reasons = (f"{n} ({_reason(graph, plan, n, wanted[n])})" for n in copied)
    return CutShare(parameters, min(max(flops, 0.0), 1.0), tuple(reasons))


def _flops(unit: TracedUnit) -> int:
    """FLOPs of what is counted in a unit's forward on one chip."""
    ops = (op for piece in unit.forward if isinstance(piece, SegmentPiece) for op in piece.ops)
    return sum(op.flops for op in ops if op.target.split(".")[1:2] and _is_counted(op.target.split(".")[1]))


def _is_counted(name: str) -> bool:
    return name in COUNTED or "scaled_dot_product" in name


def _reason(graph: Graph, plan: Plan, name: str, dim: int | None) -> str:
    if dim is None:
        return "its uses do not tell how to cut it"
    return f"{graph.specs[name].shape[dim]} does not divide by {plan.tp}"
