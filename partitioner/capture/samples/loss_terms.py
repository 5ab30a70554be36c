"""Means over what counts, taken apart: the sum of terms, divided by what they weigh.

Cross entropy averages over valid targets, or over the weights of their classes, which differ from part to part of a
batch. Written as a quotient of two sums its parts add up. Smoothing changes the terms only: torch divides it by the
same number.
"""

from typing import Any

import torch
from torch.fx import Node

from partitioner.capture.captured_graph import op_name, operand
from partitioner.capture.pure_graph import modes_of

aten = torch.ops.aten
MEAN, SUM = 1, 2
REDUCTION = 3  # its place among the arguments of both
NAMES = {"cross_entropy_loss", "nll_loss", "nll_loss_nd", "nll_loss2d"}
ARGUMENTS: tuple[Any, ...] = (
    None,
    None,
    None,
    MEAN,
    -100,
)  # logits, target, weight, reduction, ignored class


def take_means_apart(graph: torch.fx.Graph) -> None:
    """Replace every mean of a classification's terms by sum / weight."""
    for node in list(graph.nodes):
        if node.op == "call_function" and op_name(node.target) in NAMES:
            args = [*node.args, *ARGUMENTS[len(node.args) :]]
            if args[REDUCTION] == MEAN:
                with graph.inserting_before(node):
                    node.replace_all_uses_with(_quotient(node, args))
                graph.erase_node(node)


def _quotient(node: Node, args: list[Any]) -> Node:
    args[REDUCTION] = SUM
    total = _made(node, node.target, *args)
    target = operand(node, 1)
    if target.meta["val"].is_floating_point():  # probabilities: every sample counts
        number = target.meta["val"].numel() // target.meta["val"].shape[min(1, target.meta["val"].dim() - 1)]
        return _made(node, aten.div.Tensor, total, float(number))
    valid = _made(node, aten.ne.Scalar, target, args[4])
    if args[2] is None:
        return _made(node, aten.div.Tensor, total, _made(node, aten.sum.default, valid))
    classes = _made(node, aten.mul.Tensor, target, valid)  # an ignored class may be no class at all
    weights = _made(node, aten.embedding.default, _made(node, aten.unsqueeze.default, args[2], 1), classes)
    weights = _made(node, aten.squeeze.dim, weights, -1)
    weights = _made(node, aten.mul.Tensor, weights, valid)
    return _made(node, aten.div.Tensor, total, _made(node, aten.sum.default, weights))


def _made(like: Node, target: Any, *args: Any) -> Node:
    """A node where `like` is, with its value's shape."""
    made = like.graph.call_function(target, args)
    values = torch.fx.node.map_arg(args, lambda n: n.meta["val"])
    with like.meta["val"].fake_mode, modes_of(like):
        made.meta = dict(like.meta) | {"val": target(*values)}
    return made
