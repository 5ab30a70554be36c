"""The loss of a split batch: what the parts add up, and what makes the loss of it.

    loss = total / count           both added over all parts; the count is known from the batch, or is a number
    loss = f(total, total, ...)    where f is not linear: sums first, the backwards follow

The optimizer divides by the count, so that no part need know it before its backward. Where a count stands elsewhere in
the loss it is known before the forward (`known_total`).
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

import torch
from torch.fx import Node

from partitioner.capture.captured_graph import ancestors, op_name, operand
from partitioner.capture.forwards.user_functions import AppliedFunction
from partitioner.capture.samples import loss_terms
from partitioner.capture.samples.batch_norms import take_batch_norms_apart
from partitioner.capture.samples.split_samples import Parts, Splitter
from partitioner.capture.samples.spread import SAME, TOTAL
from partitioner.capture.tracing import Captured

aten, own = torch.ops.aten, torch.ops.orchestrate
FINAL, KNOWN, GATHERED = own.final_total.default, own.known_total.default, own.gather_parts.default
KEEPS_VALUE = {"view", "reshape", "clone", "alias", "squeeze", "_unsafe_view"}


@dataclass(frozen=True)
class LossForm:
    """Nodes of the part's graph: what is added up, by what it is divided (None: by 1), and the rule in words.

    `is_counted`: what it is divided by depends on the batch. `parts`: into how many the batch is cut, each of
    `samples` (0: it is not cut).
    `tail`: the nodes of f, which reads `final_total` nodes and gives `total`; empty if the loss is linear.
    `updates`: the nodes that make new values of buffers of such totals, at the end of the step.
    """

    total: Node
    count: Node | None
    rule: str
    parts: int = 1
    samples: int = 0
    is_counted: bool = False
    tail: tuple[Node, ...] = ()
    updates: tuple[Node, ...] = ()

    @property
    def summed(self) -> tuple[Node, ...]:
        """What the parts make for f: the totals of these are what the tail reads."""
        return tuple(operand(n, 0) for n in finals_of(self.tail))

    @property
    def kept(self) -> tuple[Node, ...]:
        """What the parts make for buffers: the totals of these are what the updates read."""
        return tuple(operand(n, 0) for n in finals_of(self.updates))


def finals_of(nodes: Sequence[Node]) -> list[Node]:
    """The totals, known when every forward has ended, that nodes read."""
    return list(dict.fromkeys(n for node in nodes for n in node.all_input_nodes if n.target is FINAL))


def whole_loss(captured: Captured) -> LossForm:
    """The loss of a batch that is not split."""
    loss_terms.take_means_apart(captured.graph_module.graph)
    loss, *updated = _results(captured)
    quotient = _quotient(loss, _model_test(captured), is_whole=True)
    if quotient is None:
        return LossForm(loss, None, "of the whole batch")
    output = next(iter(reversed(captured.graph_module.graph.nodes)))
    output.args = ((*quotient, *updated),)
    captured.graph_module.graph.eliminate_dead_code()
    return LossForm(*quotient, "of the whole batch: a sum / a number known from it", is_counted=True)


def split_loss(
    part: Captured, whole: Captured, parts: Parts, split: Collection[str], *, norms_per_part: bool = False
) -> LossForm:
    """Make the part's graph what each part computes. `split`: the batch's entries that are cut. Raises CaptureError."""
    for captured in (part, whole):
        loss_terms.take_means_apart(captured.graph_module.graph)
        take_batch_norms_apart(captured.graph_module.graph, per_part=norms_per_part)
    graph = part.graph_module.graph
    inputs = {
        node
        for node, name in part.names.items()
        if name.startswith("batch:") and name[len("batch:") :] in split
    }
    splitter = Splitter(graph, whole.graph_module.graph, parts, inputs, _model_test(part))
    splitter.run()
    output = next(iter(reversed(graph.nodes)))
    loss, *updated = _results(part)
    form = replace(_form(splitter, output, loss), samples=parts.samples)
    updated = [splitter.whole_value(node, output) for node in updated]
    form = replace(form, updates=_updates(part, splitter, updated))
    output.args = ((form.total, *([form.count] if form.count else []), *updated),)
    graph.eliminate_dead_code()
    return form


def _updates(part: Captured, splitter: Splitter, updated: Sequence[Node]) -> tuple[Node, ...]:
    """What makes the values that are known at the end of the step only, from totals and what buffers held."""
    held: dict[Node, bool] = {}  # by nodes: made of buffers and numbers alone
    for node in splitter.graph.nodes:
        is_buffer = node.op == "placeholder" and part.names[node.name].startswith("buffers:")
        held[node] = is_buffer or (
            node.op == "call_function" and all(held[n] or n.op == "get_attr" for n in node.all_input_nodes)
        )
    found = ancestors(
        [n for n in updated if n in splitter.after],
        lambda n: n.op == "call_function" and n.target is not FINAL and (n in splitter.after or held[n]),
    )
    return tuple(n for n in splitter.graph.nodes if n in found)


def _results(captured: Captured) -> list[Node]:
    output = next(iter(reversed(captured.graph_module.graph.nodes)))
    return list(output.args[0])


def _form(splitter: Splitter, output: Node, loss: Node) -> LossForm:
    graph, number = splitter.graph, splitter.parts.number
    spread = splitter.spreads[loss]
    if loss in splitter.after:
        found = ancestors([loss], splitter.after.__contains__)
        tail = tuple(n for n in graph.nodes if n in found and n.target is not FINAL)
        return LossForm(
            loss,
            None,
            "a function of sums over samples, which are added up first",
            splitter.parts.dp,
            tail=tail,
        )
    if spread != TOTAL and spread != SAME:
        loss, spread = splitter.made_whole_for(loss, output), SAME
    with graph.inserting_before(output):
        if spread == SAME:
            share = splitter.share_of(loss)
            return LossForm(share, None, "of values gathered from all replicas", number)
        quotient = _quotient(loss, splitter.depends_on_model)
        if quotient is None:
            return LossForm(loss, None, "a sum over samples", number)
        return LossForm(*quotient, "a sum over samples / a sum known from the batch", number, is_counted=True)


def _quotient(
    loss: Node, depends_on_model: Callable[[Node], bool], *, is_whole: bool = False
) -> tuple[Node, Node] | None:
    """(dividend, divisor) where the loss is a total divided by a number that the batch alone decides."""
    node = loss
    if any(isinstance(n.target, AppliedFunction) for n in loss.graph.nodes):
        return None  # a backward of the user's own may not be linear: it must see gradients as they are
    while op_name(node.target) in KEEPS_VALUE and node.all_input_nodes:
        node = operand(node, 0)
    if node.target is not aten.div.Tensor or not isinstance(node.args[1], Node):
        return None
    divisor = operand(node, 1)
    if divisor.meta["val"].numel() != 1 or depends_on_model(divisor) or not isinstance(node.args[0], Node):
        return None
    if is_whole:
        return operand(node, 0), divisor
    return (operand(node, 0), operand(divisor, 0)) if divisor.target is KNOWN else None


def _model_test(captured: Captured) -> Callable[[Node], bool]:
    """Whether a value depends on a parameter."""
    known: dict[Node, bool] = {}

    def depends(node: Node) -> bool:
        if node not in known:
            if node.op == "placeholder":
                known[node] = captured.names[node.name].startswith("params:")
            else:
                known[node] = False
                known[node] = any(depends(n) for n in node.all_input_nodes)
        return known[node]

    return depends
