"""The trace of a part and of the whole batch, side by side."""

from typing import Any

import torch
from torch.fx import Node

from comms.errors import CaptureError
from partitioner.capture.captured_graph import op_name
from partitioner.capture.pure_graph import source_line


def paired(graph: torch.fx.Graph, whole: torch.fx.Graph) -> list[tuple[Node, Node]]:
    """The nodes of both traces side by side. Raises CaptureError where they do different things."""
    mine, others = list(graph.nodes), list(whole.nodes)
    for node, other in zip(mine, others, strict=False):
        if node.op != other.op or (node.op == "call_function" and str(node.target) != str(other.target)):
            what = f"{op_name(node.target)} where the whole batch has {op_name(other.target)}"
            raise CaptureError(f"a part of the batch is computed differently: {what}", source_line(node),
                               "use dp 1 and 1 microbatch, or other sizes")  # fmt: skip
    if len(mine) != len(others):
        raise CaptureError("a part of the batch is computed differently than the whole", "forward",
                           "use dp 1 and 1 microbatch, or other sizes")  # fmt: skip
    return list(zip(mine, others, strict=True))


def with_numbers(mine: Any, other: Any) -> Any:
    """An argument with the other's numbers in the places of its own."""
    if isinstance(mine, Node):
        return mine
    if isinstance(mine, tuple | list) and isinstance(other, tuple | list):
        return type(mine)(with_numbers(a, b) for a, b in zip(mine, other, strict=True))
    return other
