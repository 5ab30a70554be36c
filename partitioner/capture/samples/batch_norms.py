"""Batch norm with statistics of the batch, taken apart: means over samples, which then follow the rules for means.

Two passes, as torch does it: the mean, then the mean of squared distances. Running statistics move by `momentum`
towards them, the variance with Bessel's correction.
"""

from typing import Any

import torch
from torch.fx import Node

from partitioner.capture.captured_graph import op_name

aten = torch.ops.aten
FUNCTIONAL = (
    "_native_batch_norm_legit_functional"  # what functionalization makes of one with running statistics
)
WITHOUT_STATS = "batch_norm"
FUNCTIONAL_ARGUMENTS = 8  # input, weight, bias, running mean, running variance, training, momentum, eps


def take_batch_norms_apart(graph: torch.fx.Graph) -> None:
    """Replace every batch norm that uses the statistics of its batch."""
    for node in list(graph.nodes):
        name = op_name(node.target)
        if node.op != "call_function" or name not in (FUNCTIONAL, WITHOUT_STATS) or not node.args[5]:
            continue
        with graph.inserting_before(node):
            results = _results(node)
        if name == WITHOUT_STATS:
            node.replace_all_uses_with(results[0])
        else:
            for user in list(node.users):
                user.replace_all_uses_with(results[user.args[1]])
                graph.erase_node(user)
        graph.erase_node(node)


def _results(node: Node) -> dict[int, Node]:
    """By their places among the results: normalised values, mean, 1 / deviation, new running mean and variance."""
    x, weight, bias, running_mean, running_var, _, momentum, eps = node.args[:FUNCTIONAL_ARGUMENTS]

    def made(target: Any, *args: Any) -> Node:
        new = node.graph.call_function(target, args)
        values = torch.fx.node.map_arg(args, lambda n: n.meta["val"])
        assert isinstance(x, Node)
        with x.meta["val"].fake_mode:
            new.meta = dict(node.meta) | {"val": target(*values)}
        return new

    assert isinstance(x, Node)
    shape = x.meta["val"].shape
    dims, count = [0, *range(2, len(shape))], shape.numel() // shape[1]
    mean = made(aten.mean.dim, x, dims, True)
    distance = made(aten.sub.Tensor, x, mean)
    variance = made(aten.mean.dim, made(aten.mul.Tensor, distance, distance), dims, True)
    inverse = made(aten.rsqrt.default, made(aten.add.Tensor, variance, eps))
    out = made(aten.mul.Tensor, distance, inverse)
    column = [1, -1, *[1] * (len(shape) - 2)]
    if weight is not None:
        out = made(aten.mul.Tensor, out, made(aten.view.default, weight, column))
    if bias is not None:
        out = made(aten.add.Tensor, out, made(aten.view.default, bias, column))
    results = {0: out, 1: made(aten.view.default, mean, [-1]), 2: made(aten.view.default, inverse, [-1])}
    if running_mean is not None:
        unbiased = made(aten.mul.Tensor, made(aten.view.default, variance, [-1]), count / max(count - 1, 1))
        results |= {
            3: _moved(made, running_mean, results[1], momentum),
            4: _moved(made, running_var, unbiased, momentum),
        }
    return results


def _moved(made: Any, running: Any, found: Node, momentum: Any) -> Node:
    kept = made(aten.mul.Tensor, running, 1.0 - momentum)
    moved: Node = made(
        aten.add.Tensor, kept, made(aten.mul.Tensor, made(aten.detach.default, found), momentum)
    )
    return moved
