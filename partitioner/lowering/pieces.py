"""From a joint graph to pieces: forward and backward, cut into segments at every collective.

Forward is what the unit's outputs need; everything else is backward, as in functorch's default partition. Values
that pass from one to the other are saved; views are made again from what they view instead of being saved.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from torch.fx import Node

from comms.errors import PartitionError
from partitioner.capture.captured_graph import (
    SHORT,
    Graph,
    ancestors,
    is_view,
    op_bytes,
    op_flops,
    op_name,
    operand,
    product_flops,
    reads_of,
    spec_of,
)
from partitioner.capture.forwards.keyed_random import draws
from partitioner.capture.source_lines import line_of
from partitioner.layout.joint_trace import Joint
from partitioner.program.program import CollectiveOp, Operation, Reduction, TensorSpec

aten = torch.ops.aten
REDUCTIONS = {"sum": Reduction.SUM, "avg": Reduction.AVG, "max": Reduction.MAX, "min": Reduction.MIN}
COLLECTIVES = {
    "all_reduce": CollectiveOp.ALL_REDUCE,
    "all_gather_into_tensor": CollectiveOp.ALL_GATHER,
    "reduce_scatter_tensor": CollectiveOp.REDUCE_SCATTER,
    "all_to_all_single": CollectiveOp.ALL_TO_ALL,
    "broadcast": CollectiveOp.BROADCAST,
    "sum_parts": CollectiveOp.ALL_REDUCE,
    "all_gather_parts": CollectiveOp.ALL_GATHER,
    "reduce_scatter_parts": CollectiveOp.REDUCE_SCATTER,
}
SUMS = {"sum_parts", "reduce_scatter_parts"}


@dataclass(frozen=True, slots=True)
class SegmentPiece:
    """A segment without a number yet; `reads` and `writes` are slots of the unit."""

    inputs: tuple[TensorSpec, ...]
    ops: tuple[Operation, ...]
    outputs: tuple[int, ...]
    reads: tuple[int, ...]
    writes: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class CollectivePiece:
    """A collective over an axis between two segments, from one slot to another."""

    axis: str
    op: CollectiveOp
    reduction: Reduction
    reads: tuple[int]
    writes: tuple[int]


Piece: TypeAlias = SegmentPiece | CollectivePiece


@dataclass(frozen=True)
class TracedUnit:
    """A template as one chip runs it.

    Slots number the unit's values: first the inputs (params, frees, activations), the tp coordinate, the tangents,
    then everything else. `outputs` and `grads` are slots; a grad is None where nothing flows. `tangents[k]` is the
    index of the output whose gradient slot `coordinate + 1 + k` takes.
    """

    specs: tuple[TensorSpec, ...]
    coordinate: int
    tangents: tuple[int, ...]
    forward: tuple[Piece, ...]
    backward: tuple[Piece, ...]
    outputs: tuple[int, ...]
    grads: tuple[tuple[int, int | None], ...]
    whole: tuple[str, ...]  # see `Joint`
    flops: int  # of the forward, see `product_flops`
    training_flops: int  # of the backward, too


def split_joint(joint: Joint) -> TracedUnit:
    """Cut a joint graph into the pieces of forward and backward."""
    clean(joint.graph)
    nodes = list(joint.graph.nodes)
    placeholders = [n for n in nodes if n.op == "placeholder"]
    results = nodes[-1].args[0]
    assert isinstance(results, tuple | list)
    outputs, grads = results[: joint.num_outputs], results[joint.num_outputs :]
    forward = ancestors(outputs)
    # An element of a tuple stays beside what made the tuple, though only backward reads it (attention's logsumexp):
    # what crosses from forward to backward are tensors, never tuples.
    forward |= {n for n in nodes if op_name(n.target) == "getitem" and n.args[0] in forward}
    wanted = [g for g in grads if isinstance(g, Node)]
    backward = ancestors(wanted, lambda n: _is_made_in_backward(n, forward))
    calls = [n for n in nodes if n.op == "call_function"]
    forward_nodes, backward_nodes = [n for n in calls if n in forward], [n for n in calls if n in backward]
    needed_later = {*reads_of(backward_nodes), *outputs, *wanted}
    numbering = _Slots()  # one numbering for both: equal slots are how saved values are named
    for node in placeholders:
        numbering.of(node)
    forward_pieces = _pieces(forward_nodes, needed_later, numbering)
    for node in backward_nodes:  # what forward made and backward makes again lives in backward's own slot
        if node in forward and node not in outputs:
            numbering.slots.pop(node, None)
    backward_pieces = _pieces(backward_nodes, set(wanted), numbering)
    return TracedUnit(
        specs=tuple(numbering.specs),
        coordinate=joint.num_inputs,
        tangents=joint.tangents,
        forward=forward_pieces,
        backward=backward_pieces,
        outputs=tuple(numbering.slots[o] for o in outputs),
        grads=tuple(
            (i, numbering.slots[g] if isinstance(g, Node) else None)
            for i, g in zip(joint.wanted, grads, strict=True)
        ),
        whole=joint.whole,
        flops=sum(product_flops(n) or 0 for n in forward_nodes),
        training_flops=sum(product_flops(n) or 0 for n in (*forward_nodes, *backward_nodes)),
    )


@dataclass
class _Slots:
    slots: dict[Node, int] = field(default_factory=dict)
    specs: list[TensorSpec] = field(default_factory=list)

    def of(self, node: Node) -> int:
        if node not in self.slots:
            self.slots[node] = len(self.specs)
            self.specs.append(spec_of(node.meta["val"]))
        return self.slots[node]


def clean(graph: torch.fx.Graph) -> None:
    """Remove detaches and views that change nothing; make lifted scalars explicit."""
    for node in list(graph.nodes):
        if node.op == "get_attr":
            _inline_scalar(node)
        if node.op == "call_function":
            _take_number_apart(node)
        if node.op != "call_function" or not node.args or not isinstance(node.args[0], Node):
            continue
        source = node.args[0]
        name = op_name(node.target)
        if name == "getitem":  # stays with its producer, so that no tuple crosses a segment's border
            source.append(node)
        same_shape = (
            name in ("view", "_unsafe_view", "expand") and node.meta["val"].shape == source.meta["val"].shape
        )
        if name in ("detach", "alias") or same_shape:
            node.replace_all_uses_with(source)
        if name == "as_strided" and _is_reshape(node):
            node.target, node.args = aten.view.default, (source, list(node.meta["val"].shape))
    # placeholders stay, used or not: slots are numbered by them; torch would also keep collectives that nobody reads
    graph.eliminate_dead_code(is_impure_node=lambda n: n.op in ("placeholder", "output"))


def _take_number_apart(node: Node) -> None:
    """A number as the first operand (`torch.sub(1.0, x)`) becomes a tensor: no schema of a segment takes it there."""
    schema = getattr(node.target, "_schema", None)
    number = node.args[0] if node.args else None
    if schema is None or not isinstance(number, int | float) or str(schema.arguments[0].type) != "Tensor":
        return
    dtype = torch.result_type(number, node.all_input_nodes[0].meta["val"])
    with node.graph.inserting_before(node):
        made = node.graph.call_function(aten.full.default, ([], number), {"dtype": dtype})
    made.meta = dict(node.meta) | {"val": torch.empty((), dtype=dtype)}
    node.args = (made, *node.args[1:])


def _is_reshape(node: Node) -> bool:
    """Whether strides only say again how the elements lie: in order, from the first on."""
    value, source = node.meta["val"], operand(node, 0).meta["val"]
    starts = value.storage_offset() == source.storage_offset() and value.numel() == source.numel()
    return bool(starts and value.is_contiguous() and source.is_contiguous())


def _inline_scalar(node: Node) -> None:
    value = node.meta.get("val")
    owner = node.graph.owning_module
    literal = getattr(owner, str(node.target), None) if owner is not None else None
    if not isinstance(literal, torch.Tensor) or literal.numel() != 1 or not isinstance(value, torch.Tensor):
        raise PartitionError("a tensor is created inside a traced block", hint="make it a buffer")
    with node.graph.inserting_before(node):
        made = node.graph.call_function(
            aten.full.default, (list(literal.shape), literal.item()), {"dtype": literal.dtype}
        )
    made.meta = dict(node.meta)
    node.replace_all_uses_with(made)


def _is_made_in_backward(node: Node, forward: set[Node]) -> bool:
    """What is not forward's, and forward's views (free to make again)."""
    is_remade = is_view(node.target) and op_name(node.target) not in ("wait_tensor", "getitem")
    return node.op == "call_function" and (node not in forward or is_remade)


def _is_collective(node: Node) -> bool:
    return _axis(node) != "" and op_name(node.target) != "wait_tensor"


def _axis(node: Node) -> str:
    """The axis that a node communicates over, if it does."""
    if "_c10d_functional" in str(node.target):
        return "tp"
    return "dp" if "orchestrate" in str(node.target) and op_name(node.target) in COLLECTIVES else ""


def _pieces(nodes: Sequence[Node], needed_later: set[Node], slots: _Slots) -> tuple[Piece, ...]:
    """Cut a node list at collectives; `needed_later` is what must outlive the list."""
    runs: list[list[Node]] = [[]]
    for node in nodes:
        # A wait is no piece: whoever reads the result waits for it, which lowering writes after the collective.
        if op_name(node.target) == "wait_tensor":
            continue
        if _is_collective(node):
            runs += [[node], []]
        else:
            runs[-1].append(node)
    pieces: list[Piece] = []
    for index, run in enumerate(runs):
        if run and _is_collective(run[0]):
            pieces.append(_collective(run[0], slots))
        elif run:
            later = needed_later | {
                _source(n) for other in runs[index + 1 :] for node in other for n in node.all_input_nodes
            }
            pieces.append(_segment(run, later, slots))
    return tuple(pieces)


def _source(node: Node) -> Node:
    """A wait stands for the collective it waits on."""
    while op_name(node.target) == "wait_tensor":
        node = operand(node, 0)
    return node


def _collective(node: Node, slots: _Slots) -> CollectivePiece:
    op = COLLECTIVES[op_name(node.target)]
    named = (REDUCTIONS[a] for a in node.args[1:] if isinstance(a, str) and a in REDUCTIONS)
    none = Reduction.SUM if op_name(node.target) in SUMS else Reduction.NONE
    reduction, source = next(named, none), operand(node, 0)
    write = slots.of(node)
    for user in node.users:  # its waits: they are the same value
        if op_name(user.target) == "wait_tensor":
            slots.slots[user] = write
    return CollectivePiece(_axis(node), op, reduction, (slots.of(_source(source)),), (write,))


def _segment(run: Sequence[Node], later: set[Node], slots: _Slots) -> SegmentPiece:
    inside = set(run)
    outer = list(dict.fromkeys(_source(n) for node in run for n in node.all_input_nodes if n not in inside))
    number = {n: i for i, n in enumerate([*outer, *run])}
    kept = [n for n in run if n in later]
    return SegmentPiece(
        inputs=tuple(spec_of(n.meta["val"]) for n in outer),
        ops=tuple(make_op(node, number) for node in run),
        outputs=tuple(number[n] for n in kept),
        reads=tuple(slots.of(n) for n in outer),
        writes=tuple(slots.of(n) for n in kept),
    )


def make_op(node: Node, number: Mapping[Node, int]) -> Operation:
    """One node as an Operation whose operands are `v<number>`."""
    if draws(node):
        problem = f"{op_name(node.target)} draws random numbers that no key decides"
        raise PartitionError(problem, hint="draw with rand_like in the forward")
    value = node.meta["val"]
    is_tuple = isinstance(value, tuple | list)
    outs = tuple(spec_of(v) for v in (value if is_tuple else [value]) if isinstance(v, torch.Tensor))
    reads, writes = op_bytes(node)
    return Operation(_code(node, number), outs, is_tuple, op_flops(node), reads, writes)


def _code(node: Node, number: Mapping[Node, int]) -> str:
    parts = [_literal(arg, number) for arg in node.args]
    parts += [f"{key}={_literal(arg, number)}" for key, arg in node.kwargs.items() if key != "pin_memory"]
    target = node.target
    if op_name(target) in ("view", "_unsafe_view"):  # traced on contiguous operands; real ones may be strided
        target = aten.reshape.default
    if op_name(target) == "as_strided":
        problem = "as_strided depends on memory layout"
        raise PartitionError(problem, hint="use view, narrow or unfold")
    if isinstance(target, torch._ops.OpOverload):
        space, name = target._schema.name.split("::")
        return f"{space}.{name}.{target._overloadname}({', '.join(parts)})"
    return f"{op_name(target)}({', '.join(parts)})"


def _literal(arg: object, number: Mapping[Node, int]) -> str:
    if isinstance(arg, Node):
        return f"v{number[_source(arg)]}"
    if isinstance(arg, tuple | list):
        return "[" + ", ".join(_literal(a, number) for a in arg) + "]"
    if isinstance(arg, torch.dtype):
        return f"dtype.{SHORT[arg]}"
    if isinstance(arg, torch.device):
        return "device"
    if isinstance(arg, torch.layout | torch.memory_format):
        return str(arg)
    if isinstance(arg, complex):
        return f"complex({arg.real!r}, {arg.imag!r})"  # which keeps nan, inf and the sign of zero
    assert arg is None or isinstance(arg, bool | int | float | str), f"{arg!r} cannot be written down"
    return repr(arg)


def line_of_reader(graph: Graph, name: str) -> str:
    """The first line of the user's that reads a parameter, buffer or input; empty where captures noted none."""
    reads = [(graph.templates[u.template].graph, (*u.params, *u.frees, *u.activations)) for u in graph.units]
    sides = [side for side in (graph.constants, graph.inputs, graph.totals, graph.updates) if side]
    for owner, names in [*reads, *((side.graph, side.inputs) for side in sides)]:
        for node, own in zip(owner.graph.nodes, names, strict=False):
            if own == name and any(lines := [*map(line_of, node.users)]):
                return next(filter(None, lines))
    return ""
