"""The captured model: one graph of global tensors, cut into units.

A *unit* is a contiguous slice of the model's forward: one of a row of repeated blocks, or the glue between
them. Units with the same structure share a *template* (an `fx.Graph`), so a 96-layer model is traced once per
distinct block. Values that depend on no parameter are not part of any unit: the *constants* graph is evaluated
once, the *inputs* graph once per microbatch in every stage that needs it (labels shifted, masks built).

What an operation costs is counted from shapes alone. FLOPs follow `torch.utils.flop_counter` (a multiply-add is 2) with
the CPU attention kernels added and grouped convolutions' backward put right; elementwise work counts one FLOP per
output element, views nothing. Causal attention counts half. Bytes: every tensor operand read once and every result
written once; no cache reuse between operations (fusion is the kernel model's business).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch.fx import Node
from torch.utils.flop_counter import conv_flop_count, flop_registry, sdpa_flop_count, shape_wrapper

from partitioner.capture.forwards.grouped_products import GROUPED, grouped_flops
from partitioner.program.program import TensorSpec

# the one place where torch's dtypes meet the Program's short names
SHORT = {
    torch.float64: "f64", torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16", torch.int64: "i64",
    torch.int32: "i32", torch.int16: "i16", torch.int8: "i8", torch.uint8: "u8", torch.bool: "b8",
    torch.complex64: "c64", torch.complex128: "c128",
}  # fmt: skip
TORCH = {short: dtype for dtype, short in SHORT.items()}
VIEWS = {
    "view", "_unsafe_view", "reshape", "t", "transpose", "permute", "expand", "slice", "select", "split", "chunk",
    "split_with_sizes", "unsqueeze", "squeeze", "detach", "alias", "getitem", "as_strided", "unbind", "narrow",
    "unsafe_chunk", "unsafe_split", "flatten", "expand_as", "unflatten", "view_as", "diagonal", "to", "wait_tensor",
}  # fmt: skip
BATCH_NAME = "batch:"  # before an entry of the batch that is called like a parameter or buffer
FREE = VIEWS | {"empty", "empty_like", "zeros", "ones", "full", "arange", "scalar_tensor", "sym_size"}


def _attention(q: Sequence[int], k: Sequence[int], v: Sequence[int], *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(q, k, v))


def _attention_backward(_grad: Any, *args: Any, **_: Any) -> int:
    return 2 * _attention(*args)


aten = torch.ops.aten
# what torch does not count: the attention kernels of CPUs, and grouped products
KERNELS = {
    GROUPED: grouped_flops,
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


@dataclass(frozen=True, slots=True)
class Unit:
    """One call of a template: global value names in, global value names out.

    `params`, `frees` (values of the constants or inputs graph) and `activations` follow the template's
    placeholders, in that order.
    """

    name: str
    template: int
    params: tuple[str, ...]
    frees: tuple[str, ...]
    activations: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class Template:
    """A unit's forward as a graph of pre-dispatch ATen ops on global shapes.

    `live_inputs` get a gradient from the unit, `live_outputs` give it one. `flops`: of the forward; `model_flops`: of
    forward and backward, each operation once.
    """

    graph: torch.fx.GraphModule
    inputs: tuple[TensorSpec, ...]
    num_params: int
    outputs: tuple[TensorSpec, ...]
    live_inputs: tuple[bool, ...]
    live_outputs: tuple[bool, ...]
    flops: int
    model_flops: int
    tp_styles: tuple[str, ...]


@dataclass(frozen=True)
class Side:
    """A graph without parameters: its outputs by global value name, and the names of what it reads."""

    graph: torch.fx.GraphModule
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Known:
    """A value of the whole batch that is known before the forward: `source` of all parts added up, or side by side.

    `gathered`: (dim, outer, parts) where it is gathered, see `kernels.ops`. `turn`: its source needs those of earlier
    turns.
    """

    name: str
    source: str
    gathered: tuple[int, int, int] | None
    turn: int = 0


@dataclass(frozen=True)
class Graph:
    """A whole model, captured for one microbatch of one data-parallel replica.

    `totals` makes the sources of `known`. `tail` makes the loss of the sums of `summed` over all parts (which its first
    inputs stand for); None where the parts' losses just add up.
    `state`: buffers that the forward changes, with the values that they have after the step. `updates` makes those that
    need sums of `kept` over all parts (which its first inputs stand for), at the end of the step.
    `live`: values on the way of a gradient; parameters that are not among them are `frozen`. `cut`: batch entries that
    hold `samples` samples each. `is_counted`: the loss's count depends on the batch; else it is one. `traced`: what
    lowering keeps, for other plans of the same parts.
    """

    units: tuple[Unit, ...]
    templates: tuple[Template, ...]
    constants: Side
    inputs: Side
    totals: Side
    known: tuple[Known, ...]
    tail: Side | None
    summed: tuple[str, ...]
    updates: Side | None
    kept: tuple[str, ...]
    state: tuple[tuple[str, str], ...]
    specs: Mapping[str, TensorSpec]
    params: tuple[str, ...]
    frozen: frozenset[str]
    live: frozenset[str]
    batch: tuple[str, ...]
    buffers: tuple[str, ...]
    loss: str
    count: str
    loss_rule: str
    cut: frozenset[str]
    samples: int
    is_counted: bool
    traced: dict[object, Any] = field(default_factory=dict, compare=False)

    @property
    def needs_whole_batch(self) -> bool:
        """Whether a part needs values of all others, which replicas and microbatches give one another differently."""
        calls = {op_name(node.target) for each in self.templates for node in each.graph.graph.nodes}
        is_gathered = any(known.gathered for known in self.known)
        return is_gathered or bool(self.tail or self.updates or calls & {"sum_parts", "gather_parts"})

    def param_numel(self) -> int:
        """Number of parameters, tied ones counted once."""
        return sum(self.specs[name].numel for name in self.params)


def operand(node: Node, index: int) -> Node:
    """Argument `index` of a node where the operator's schema says that it is a tensor."""
    found = node.args[index]
    assert isinstance(found, Node), f"argument {index} of {node} is {found}"
    return found


def ancestors(ends: Iterable[Node], belongs: Callable[[Node], bool] = lambda _: True) -> set[Node]:
    """What `ends` depend on, themselves included, as far as it belongs."""
    found: set[Node] = set()
    stack = list(ends)
    while stack:
        node = stack.pop()
        if node not in found and belongs(node):
            found.add(node)
            stack.extend(node.all_input_nodes)
    return found


def reads_of(nodes: Iterable[Node]) -> list[Node]:
    """What these nodes read and none of them makes, in the order of its first use."""
    inside = dict.fromkeys(nodes)
    return list(dict.fromkeys(n for node in inside for n in node.all_input_nodes if n not in inside))


def spec_of(value: torch.Tensor) -> TensorSpec:
    """Shape and short dtype of a (real or fake) tensor."""
    return TensorSpec(tuple(int(size) for size in value.shape), SHORT[value.dtype])


def op_name(target: Any) -> str:
    """`aten.mm.default` -> `mm`; `operator.getitem` -> `getitem`."""
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.name.split("::")[1]
    return getattr(target, "__name__", str(target))


def constants_of(traced: torch.fx.GraphModule) -> Iterator[tuple[Node, torch.Tensor]]:
    """The tensors that a graph holds, each with its node."""
    for node in traced.graph.nodes:
        value = getattr(traced, str(node.target), None) if node.op == "get_attr" else None
        if isinstance(value, torch.Tensor):
            yield node, value


def is_view(target: Any) -> bool:
    """True for operations that move no data."""
    return op_name(target) in VIEWS


def op_flops(node: Node) -> int:
    """FLOPs of one node of an ATen graph, from its operands' and result's fake values."""
    name = op_name(node.target)
    if node.op != "call_function" or name in FREE:
        return 0
    args, _ = _operands(node)
    result: Any = node.meta.get("val")
    if name in ("linear", "matmul"):
        return 2 * result.numel() * args[0].shape[-1]
    if "scaled_dot_product" in name:
        return _attention_flops(name, args)
    if name == "convolution_backward":  # torch counts the weight's gradient once for each group
        forward = conv_flop_count(args[1].shape, args[2].shape, args[0].shape, transposed=args[7])
        return int(forward * sum(args[10][:2]))
    products = product_flops(node)
    return sum(r.numel() for r in _tensors(result)[:1]) if products is None else products


def product_flops(node: Node) -> int | None:
    """FLOPs of one node of an ATen graph as torch counts a model's; None of what is no product."""
    packet = getattr(node.target, "overloadpacket", None)
    formula = shape_wrapper(KERNELS[packet]) if packet in KERNELS else flop_registry.get(packet)
    args, kwargs = _operands(node)
    return None if formula is None else int(formula(*args, **kwargs, out_val=node.meta.get("val")))


def _operands(node: Node) -> tuple[Any, Any]:
    values: Any = torch.fx.node.map_arg((node.args, dict(node.kwargs)), lambda n: n.meta.get("val"))
    return values


def _attention_flops(name: str, args: Any) -> int:
    """Two matmuls forward, five backward (scores recomputed, as flash attention does); half when causal."""
    first = 1 if "backward" in name else 0
    q, k, v = args[first : first + 3]
    matmul = prod(q.shape[:-1]) * k.shape[-2]
    forward = 2 * matmul * (q.shape[-1] + v.shape[-1])
    total = forward * 5 // 2 if first else forward
    return total // 2 if _is_causal(name, args) else total


def _is_causal(name: str, args: Any) -> bool:
    if name == "scaled_dot_product_attention":
        return len(args) > 5 and bool(args[5])
    index = 7 if name == "_scaled_dot_product_flash_attention_for_cpu_backward" else 4
    return len(args) > index and args[index] is True


def op_bytes(node: Node) -> tuple[int, int]:
    """(bytes read, bytes written)."""
    if node.op != "call_function" or op_name(node.target) in VIEWS:
        return 0, 0
    reads, writes = sum(map(_nbytes, node.all_input_nodes)), _nbytes(node)
    name = op_name(node.target)
    if name == "embedding":  # reads only the looked-up rows
        reads = writes
    return (0 if name in FREE else reads), writes


def _nbytes(node: Node) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in _tensors(node.meta.get("val")))


def _tensors(value: object) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    return [t for t in value if isinstance(t, torch.Tensor)] if isinstance(value, tuple | list) else []
