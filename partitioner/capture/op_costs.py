"""FLOPs and bytes of one operation, from shapes alone.

FLOPs follow `torch.utils.flop_counter` (a multiply-add is 2) with the CPU attention kernels added; elementwise work
counts one FLOP per output element, views nothing. Causal attention counts half. Bytes: every tensor operand read
once and every result written once; no cache reuse between operations (fusion is the kernel model's business).
"""

from math import prod
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Node
from torch.utils.flop_counter import FlopCounterMode, flop_registry

aten = torch.ops.aten
VIEWS = {
    "view", "_unsafe_view", "reshape", "t", "transpose", "permute", "expand", "slice", "select", "split", "chunk",
    "split_with_sizes", "unsqueeze", "squeeze", "detach", "alias", "getitem", "as_strided", "unbind", "narrow",
    "flatten", "expand_as", "unflatten", "view_as", "diagonal", "to", "wait_tensor",
}  # fmt: skip
FREE = VIEWS | {"empty", "empty_like", "zeros", "ones", "full", "arange", "scalar_tensor", "sym_size"}


def op_name(target: Any) -> str:
    """`aten.mm.default` -> `mm`; `operator.getitem` -> `getitem`."""
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.name.split("::")[1]
    return getattr(target, "__name__", str(target))


def is_view(target: Any) -> bool:
    """True for operations that move no data."""
    return op_name(target) in VIEWS


def op_flops(node: Node) -> int:
    """FLOPs of one node of an ATen graph, from its operands' and result's fake values."""
    name = op_name(node.target)
    if node.op != "call_function" or name in FREE:
        return 0
    values: Any = torch.fx.node.map_arg((node.args, dict(node.kwargs)), lambda n: n.meta.get("val"))
    args, kwargs = values
    result: Any = node.meta.get("val")
    if name in ("linear", "matmul"):
        return 2 * result.numel() * args[0].shape[-1]
    if "scaled_dot_product" in name:
        return _attention_flops(name, args)
    packet = getattr(node.target, "overloadpacket", None)
    if packet in flop_registry:
        return int(flop_registry[packet](*args, **kwargs, out_val=result))
    return sum(r.numel() for r in _tensors(result)[:1])


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
    position = {
        "_scaled_dot_product_flash_attention_for_cpu": 4,
        "_scaled_dot_product_flash_attention_for_cpu_backward": 7,
    }
    index = position.get(name, 4)
    return len(args) > index and args[index] is True


def op_bytes(node: Node) -> tuple[int, int]:
    """(bytes read, bytes written)."""
    if node.op != "call_function" or op_name(node.target) in VIEWS:
        return 0, 0
    reads = sum(
        t.numel() * t.element_size() for n in node.all_input_nodes for t in _tensors(n.meta.get("val"))
    )
    writes = sum(t.numel() * t.element_size() for t in _tensors(node.meta.get("val")))
    name = op_name(node.target)
    if name == "embedding":  # reads only the looked-up rows
        reads = writes
    return (0 if name in FREE else reads), writes


def _tensors(value: object) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    return [t for t in value if isinstance(t, torch.Tensor)] if isinstance(value, tuple | list) else []


def template_flops(module: torch.fx.GraphModule) -> int:
    """Model FLOPs of a captured slice: matrix multiplications and convolutions only (the convention of MFU).

    Counted by torch below the composite operators, plus attention, whose CPU kernel torch does not count.
    """
    nodes = list(module.graph.nodes)
    attention = sum(op_flops(n) for n in nodes if "scaled_dot_product" in op_name(n.target))
    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        FlopCounterMode(display=False) as counter,
        torch.no_grad(),
    ):
        module(*(torch.empty_like(n.meta["val"], device="cpu") for n in nodes if n.op == "placeholder"))
    return int(counter.get_total_flops()) + attention
