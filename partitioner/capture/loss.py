"""Loss as sum and count.

A mean over valid tokens cannot be averaged over microbatches or replicas (padding and ignored labels make the
counts differ), so the captured mean is rewritten to (sum, count) and both are reduced. Known losses: cross entropy,
NLL and the elementwise losses of `torch.nn.functional`. Any other scalar is taken as a mean over samples of equal
weight: sum = loss x samples, count = samples; `rewrite` says which rule it used.
"""

from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Node

from comms.errors import CaptureError
from partitioner.capture.captured_graph import operand

aten = torch.ops.aten
MEAN, SUM = 1, 2
END = 1 << 40  # index of nodes that the rewriting adds: after every captured one
# position of `reduction` among the arguments
ELEMENTWISE: dict[Any, int] = {
    aten.mse_loss.default: 2, aten.l1_loss.default: 2, aten.smooth_l1_loss.default: 2, aten.huber_loss.default: 2,
    aten.binary_cross_entropy.default: 3, aten.binary_cross_entropy_with_logits.default: 4,
}  # fmt: skip
CLASSIFICATION = {aten.cross_entropy_loss.default, aten.nll_loss_nd.default, aten.nll_loss.default}
SUMS = {aten.sum.default, aten.sum.dim_IntList}
TRANSPARENT = {
    aten.reshape.default,
    aten.view.default,
    aten.clone.default,
    aten.alias.default,
    aten.detach.default,
}


def rewrite(graph: torch.fx.Graph, num_samples: int) -> tuple[Node, Node, str]:
    """Replace the output by (sum, count) and return both nodes and the rule used."""
    output = next(iter(reversed(graph.nodes)))
    loss = output.args[0]
    assert isinstance(loss, Node)
    core = _core(loss)
    with graph.inserting_before(output):
        if core.target in CLASSIFICATION and _reduction(core, 3) == MEAN:
            total, count, rule = *_cross_entropy(graph, core), "sum over valid targets"
        elif core.target in ELEMENTWISE and _reduction(core, ELEMENTWISE[core.target]) == MEAN:
            total, count, rule = *_elementwise(graph, core), "sum over elements"
        elif _is_sum(core):
            raise CaptureError("the loss is a sum, which grows with the batch", core.name, "return a mean")
        else:
            total = _call(graph, aten.mul.Tensor, loss, float(num_samples))
            count = _call(graph, aten.scalar_tensor.default, num_samples, dtype=torch.int64)
            rule = "mean over samples of equal weight"
    output.args = ((total, count),)
    graph.eliminate_dead_code()
    return total, count, rule


def _core(loss: Node) -> Node:
    """Look through shape changes and casts that keep the dtype: what computes the scalar."""
    node = loss
    while isinstance(node.args[0], Node) and (node.target in TRANSPARENT or _is_idle_cast(node)):
        node = node.args[0]
    return node


def _is_sum(core: Node) -> bool:
    if core.target in CLASSIFICATION:
        return _reduction(core, 3) == SUM
    position = ELEMENTWISE.get(core.target)
    return core.target in SUMS or (position is not None and _reduction(core, position) == SUM)


def _is_idle_cast(node: Node) -> bool:
    source = node.args[0]
    is_cast = node.target in (aten.to.dtype, aten._to_copy.default, aten.to.device, aten.to.dtype_layout)
    return is_cast and isinstance(source, Node) and source.meta["val"].dtype == node.meta["val"].dtype


def _reduction(node: Node, position: int) -> object:
    return node.args[position] if len(node.args) > position else node.kwargs.get("reduction", MEAN)


def _with(node: Node, position: int, defaults: tuple[object, ...]) -> tuple[object, ...]:
    """The node's arguments with `reduction` set to SUM, defaults filled in up to it."""
    args = [*node.args, *defaults[len(node.args) :]][: max(position + 1, len(node.args))]
    args[position] = SUM
    return tuple(args)


def _cross_entropy(graph: torch.fx.Graph, core: Node) -> tuple[Node, Node]:
    if core.args[2:3] and core.args[2] is not None:
        raise CaptureError("class weights in cross entropy are not supported", core.name, "drop `weight=`")
    target = operand(core, 1)
    if target.meta["val"].dtype.is_floating_point:
        raise CaptureError("class probabilities as targets are not supported", core.name, "use class indices")
    ignore_index = core.args[4] if len(core.args) > 4 else core.kwargs.get("ignore_index", -100)
    assert isinstance(core.target, torch._ops.OpOverload)
    total = _call(graph, core.target, *_with(core, 3, (None, None, None, MEAN)))
    valid = _call(graph, aten.ne.Scalar, target, ignore_index)
    return total, _call(graph, aten.sum.default, valid)


def _elementwise(graph: torch.fx.Graph, core: Node) -> tuple[Node, Node]:
    position = ELEMENTWISE[core.target]
    assert isinstance(core.target, torch._ops.OpOverload)
    defaults = (None,) * position + (MEAN,)
    total = _call(graph, core.target, *_with(core, position, defaults))
    num_elements = operand(core, 0).meta["val"].numel()
    return total, _call(graph, aten.scalar_tensor.default, num_elements, dtype=torch.int64)


def _call(graph: torch.fx.Graph, target: torch._ops.OpOverload, *args: Any, **options: Any) -> Node:
    node = graph.call_function(target, args, options)
    values = [arg.meta["val"] if isinstance(arg, Node) else arg for arg in args]
    # A placeholder's: constants inside the graph may be real tensors.
    made = next(iter(graph.nodes)).meta["val"]
    assert isinstance(made, FakeTensor)
    with made.fake_mode:
        node.meta["val"] = target(*values, **options)
    node.meta["index"] = END
    return node
