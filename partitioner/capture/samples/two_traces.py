"""The trace of a part and of the whole batch, side by side."""

from collections import deque
from typing import Any

import torch
from torch.fx import Node

from comms.errors import CaptureError
from partitioner.capture.captured_graph import op_name
from partitioner.capture.source_lines import source_line

COPIES = frozenset(
    {"clone", "contiguous"}
)  # which torch leaves out where one sample lies in memory as its copy would
VIEWS = frozenset({"view", "_unsafe_view", "reshape"})


def paired(graph: torch.fx.Graph, whole: torch.fx.Graph) -> list[tuple[Node, Node]]:
    """The nodes of a part's trace, beside the whole's. Raises CaptureError where they do different things.

    A copy that only the part makes is beside what it copies; one that only the whole makes has no place.
    """
    others = deque(whole.nodes)
    beside: dict[Node, Node] = {}
    for node in graph.nodes:
        while others and not _is_alike(node, others[0]) and op_name(others[0].target) in COPIES:
            others.popleft()
        if others and _is_alike(node, others[0]):
            beside[node] = others.popleft()
        elif op_name(node.target) in COPIES:
            beside[node] = beside[node.all_input_nodes[0]]
        else:
            other = op_name(others[0].target) if others else "nothing"
            what = f"{op_name(node.target)} where the whole batch has {other}"
            raise CaptureError(f"a part of the batch is computed differently: {what}", source_line(node),
                               "use dp 1 and 1 microbatch, or other sizes")  # fmt: skip
    return list(beside.items())


def _is_alike(node: Node, other: Node) -> bool:
    if node.op != other.op or node.op != "call_function":
        return node.op == other.op
    return str(node.target) == str(other.target) or {op_name(node.target), op_name(other.target)} <= VIEWS


def with_numbers(mine: Any, other: Any) -> Any:
    """An argument with the other's numbers in the places of its own."""
    if isinstance(mine, Node):
        return mine
    if isinstance(mine, tuple | list) and isinstance(other, tuple | list):
        return type(mine)(with_numbers(a, b) for a, b in zip(mine, other, strict=True))
    return other
