"""Batch norm with statistics of the batch, taken apart.

Synchronised: into means over samples, which then follow the rules for means. Two passes, as torch does it: the mean,
then the mean of squared distances. Per part, a part is normalised by its own statistics (as by torch's
DistributedDataParallel without SyncBatchNorm, and by GPipe per microbatch). Running statistics move by `momentum`
towards those of the batch, or the mean of those of its parts; the variance with Bessel's correction.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch.fx import Node
from torch.nn import functional

from comms.errors import CaptureError
from partitioner.capture.captured_graph import op_name, operand

aten = torch.ops.aten
FUNCTIONAL = (
    "_native_batch_norm_legit_functional"  # what functionalization makes of one with running statistics
)
WITHOUT_STATS = "batch_norm"
NUM_ARGUMENTS = 8


BATCH_NORM = "batch_norm"  # marks operations that a batch norm consists of
PER_PART = "per_part"  # marks operations whose results are of a part, by its own samples


def take_batch_norms_apart(graph: torch.fx.Graph, *, per_part: bool) -> None:
    """Replace every batch norm that uses the statistics of its batch. CaptureError if none is to be taken per part."""
    found = 0
    for node in list(graph.nodes):
        args = _arguments(node)
        if args is None:
            continue
        found += 1
        if not args[5]:
            continue
        with graph.inserting_before(node):
            results = (_results_per_part if per_part else _results)(_maker(node), args)
        if op_name(node.target) == WITHOUT_STATS:
            node.replace_all_uses_with(results[0])
        else:
            for user in list(node.users):
                user.replace_all_uses_with(results[user.args[1]])
                graph.erase_node(user)
        graph.erase_node(node)
    if per_part and not found:
        raise CaptureError("the model has no batch norm", "batch_norm: per_part in the plan",
                           "leave batch_norm out")  # fmt: skip


def _arguments(node: Node) -> Sequence[Any] | None:
    """(input, weight, bias, running mean, running variance, training, momentum, eps) of a batch norm."""
    if node.op != "call_function":
        return None
    if node.target is aten._native_batch_norm_legit.no_stats:
        return (*node.args[:3], None, None, *node.args[3:])
    return node.args[:NUM_ARGUMENTS] if op_name(node.target) in (FUNCTIONAL, WITHOUT_STATS) else None


def _maker(node: Node) -> Callable[..., Node]:
    """What makes nodes in the place of a batch norm."""

    def made(target: Any, *args: Any, dtype: torch.dtype | None = None, **meta: Any) -> Node:
        given = {"dtype": dtype} if dtype else {}
        new = node.graph.call_function(target, args, dict(given))
        values = torch.fx.node.map_arg(args, lambda n: n.meta["val"])
        with operand(node, 0).meta["val"].fake_mode:
            new.meta = dict(node.meta) | {"val": target(*values, **given), BATCH_NORM: True} | meta
        return new

    return made


def _results_per_part(made: Callable[..., Node], args: Sequence[Any]) -> dict[int, Node]:
    """By their places among the results: normalised values, new running mean and variance."""
    x, weight, bias, running_mean, running_var, _, momentum, eps = args
    settings = (weight, bias, None, None, True, momentum, eps, False)
    results = {0: made(aten.batch_norm.default, x, *settings, **{PER_PART: True})}
    if running_mean is not None:
        still, dims = _wide(made, made(aten.detach.default, x)), [0, *range(2, x.meta["val"].dim())]
        variance = made(aten.var.dim, still, dims, True, **{PER_PART: True})
        results |= {
            3: _moved(made, running_mean, made(aten.mean.dim, still, dims), momentum),
            4: _moved(made, running_var, variance, momentum),
        }
    return results


def _results(made: Callable[..., Node], args: Sequence[Any]) -> dict[int, Node]:
    """By their places among the results: normalised values, mean, 1 / deviation, new running mean and variance."""
    given, weight, bias, running_mean, running_var, _, momentum, eps = args
    x = _wide(made, given)
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
    if out.meta["val"].dtype != given.meta["val"].dtype:
        out = made(aten._to_copy.default, out, dtype=given.meta["val"].dtype)
    results = {0: out, 1: made(aten.view.default, mean, [-1]), 2: made(aten.view.default, inverse, [-1])}
    if running_mean is not None:
        unbiased = made(aten.mul.Tensor, made(aten.view.default, variance, [-1]), count / max(count - 1, 1))
        results |= {
            3: _moved(made, running_mean, results[1], momentum),
            4: _moved(made, running_var, unbiased, momentum),
        }
    return results


def _wide(made: Callable[..., Node], x: Node) -> Node:
    """The input in the dtype that torch sums up in."""
    narrow = (torch.float16, torch.bfloat16)
    return made(aten._to_copy.default, x, dtype=torch.float32) if x.meta["val"].dtype in narrow else x


@contextmanager
def normalised_per_part(parts: int, samples: Collection[int] = ()) -> Iterator[None]:
    """Inside the block torch's batch norms do on one chip what those of `parts` parts do together.

    The first dim of what they normalise holds the batch; where it is as long as none of `samples`, CaptureError.
    """

    def batch_norm(
        input: torch.Tensor,  # noqa: A002  (torch's own name)
        running_mean: torch.Tensor | None, running_var: torch.Tensor | None, weight: torch.Tensor | None = None,
        bias: torch.Tensor | None = None, training: bool = False, momentum: float = 0.1, eps: float = 1e-5,
    ) -> torch.Tensor:  # fmt: skip
        if not training or parts == 1:
            return original(input, running_mean, running_var, weight, bias, training, momentum, eps)
        if samples and input.shape[0] not in samples:
            problem = f"a batch norm of {list(input.shape)} cannot be taken apart on one chip"
            raise CaptureError(
                problem, "batch_norm: per_part in the plan", "compare with batch_norm: synchronised"
            )
        pieces = input.chunk(parts)
        if running_mean is not None and running_var is not None:
            with torch.no_grad():
                dims = [0, *range(2, input.dim())]
                running_mean.lerp_(torch.stack([p.mean(dims) for p in pieces]).mean(0), momentum)
                running_var.lerp_(torch.stack([p.var(dims) for p in pieces]).mean(0), momentum)
        # Not `original`: under a function mode it calls itself by its name, which is this one.
        alone = partial(torch.batch_norm, weight=weight, bias=bias, running_mean=None, running_var=None,
                        training=True, momentum=momentum, eps=eps, cudnn_enabled=True)  # fmt: skip
        return torch.cat([alone(p) for p in pieces])

    original = functional.batch_norm
    with patch.object(functional, "batch_norm", batch_norm):
        yield


def _moved(made: Any, running: Any, found: Node, momentum: Any) -> Node:
    kept = made(aten.mul.Tensor, running, 1.0 - momentum)
    moved: Node = made(
        aten.add.Tensor, kept, made(aten.mul.Tensor, made(aten.detach.default, found), momentum)
    )
    return moved
