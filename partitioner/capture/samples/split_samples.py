"""Splitting samples: the graph of one part of a batch, such that all parts together compute what the whole would.

Two traces are walked side by side, of the whole batch and of one of its parts. A rule per operation tells how its
result spreads over the parts (`spread`, `rules`). Where an operation needs whole operands they are made whole: sums of
parts that depend on the batch alone are known before the forward; other sums, and samples side by side, are exchanged
between replicas, which one microbatch allows; what only the loss needs may be summed when every forward has ended.
Numbers that depend on the size of the batch (`x / len(x)`) become those of the whole.

Nothing is guessed: what no rule covers is refused, with the operator and its line.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Node

import kernels.ops  # noqa: F401  (registers the operators between parts)
from comms.errors import CaptureError
from partitioner.capture.captured_graph import op_name
from partitioner.capture.forwards.user_functions import AppliedFunction
from partitioner.capture.pure_graph import modes_of
from partitioner.capture.samples.arithmetic_rules import is_inexact
from partitioner.capture.samples.batch_norms import BATCH_NORM
from partitioner.capture.samples.rules import rule_of, spread_of
from partitioner.capture.samples.spread import (
    SAME,
    TOTAL,
    NeedsWhole,
    OperatorCall,
    Place,
    Split,
    Spread,
    Total,
    place_of,
)  # fmt: skip
from partitioner.capture.samples.taking_apart import (
    consists_of_others,
    put_apart,
    put_backward_apart,
    replace_by,
)
from partitioner.capture.samples.two_traces import paired, with_numbers
from partitioner.capture.source_lines import source_line

aten, own = torch.ops.aten, torch.ops.orchestrate
# operators whose whole-number arguments are sizes, which grow with the batch as their results do
SIZED = {
    "view", "reshape", "_unsafe_view", "expand", "broadcast_to", "unflatten", "zeros", "ones", "full", "empty",
    "arange", "new_zeros", "new_ones", "new_full", "new_empty", "repeat", "split", "split_with_sizes", "slice", "chunk",
    "keyed_uniform",
}  # fmt: skip

# types of arguments that are values, not sizes
NUMBERS = {"Tensor", "number", "float", "Optional[number]", "Optional[float]"}


@dataclass(frozen=True, slots=True)
class Parts:
    """How a batch is divided: into `dp` replicas of `microbatches` microbatches of `samples` samples."""

    dp: int
    microbatches: int
    samples: int

    @property
    def number(self) -> int:
        return self.dp * self.microbatches


@dataclass
class Splitter:
    """Walks a part's graph (changed in place) beside the whole's. `depends_on_model(node)`: on a parameter."""

    graph: torch.fx.Graph
    whole: torch.fx.Graph
    parts: Parts
    inputs: Collection[str]  # names of placeholders that hold samples
    depends_on_model: Callable[[Node], bool]
    spreads: dict[Node, Any] = field(default_factory=dict)
    wholes: dict[Node, Node] = field(default_factory=dict)
    made_whole: dict[Node, Node] = field(default_factory=dict)
    num_changes: int = 0  # made to the graph
    instead: dict[Node, Node] = field(default_factory=dict)  # means of parts, and the parts of the mean
    grown: set[Node] = field(
        default_factory=set
    )  # Same, in the whole's shape, which the part's trace did not have
    after: set[Node] = field(default_factory=set)  # known only when every forward has ended

    def run(self) -> None:
        """Work the graph out. Raises CaptureError."""
        pairs = paired(self.graph, self.whole)
        for node, whole in pairs:
            self.wholes[node] = whole
        for node, whole in pairs:
            if node.op == "placeholder":
                shape = tuple(whole.meta["val"].shape)
                self.spreads[node] = Split(_numel(shape[1:])) if node.name in self.inputs else SAME
            elif node.op == "call_function":
                if rule_of(node.target) is None and consists_of_others(node):
                    self._visit_apart(node, whole)
                else:
                    self._visit(node, whole)

    def _visit_apart(self, node: Node, whole: Node) -> None:
        """By what an operator consists of: it stays if its parts need nothing, else they take its place."""
        self._settle_operands(node)
        if all(self.spreads[n] == SAME for n in node.all_input_nodes):
            self._visit(node, whole)
            return
        before = self.num_changes
        steps, result = put_apart(node)
        others, _ = put_apart(whole)
        if [str(s.target) for s in steps] != [str(o.target) for o in others]:
            raise self._refusal(node)
        for step, other in zip(steps, others, strict=True):
            self.wholes[step] = other
        for step, other in zip(steps, others, strict=True):
            self._visit(step, other)
        if isinstance(node.target, AppliedFunction):
            if self.num_changes != before:
                raise self._refusal(node)  # by its operators it would lose its own backward
            self._prove_backward(node, whole, result)
        if self.num_changes == before:
            self.spreads[node] = (
                self.spreads[result] if isinstance(result, Node) else tuple(self.spreads[n] for n in result)
            )
            for step in reversed(steps):
                if not step.users:
                    self.graph.erase_node(step)
        else:
            replace_by(node, torch.fx.node.map_arg(result, lambda n: self.instead.get(n, n)))

    def _settle_operands(self, node: Node) -> None:
        """Beside what is known at the end, or is whole already, the other operands must be so too."""
        operands = node.all_input_nodes
        if any(n in self.after for n in operands):
            self._put_after(node)
        elif any(n in self.grown for n in operands):
            for operand in [n for n in operands if self.spreads[n] != SAME]:
                node.replace_input_with(operand, self.made_whole_for(operand, node))

    def _prove_backward(self, node: Node, whole: Node, result: Any) -> None:
        """The gradients of a function of the user's own spread as what they are gradients of."""
        outputs = [result] if isinstance(result, Node) else list(result)
        before, temporary = self.num_changes, list[Node]()
        with self.graph.inserting_before(node), whole.graph.inserting_before(whole):
            wholes = put_backward_apart(whole)
            mine = put_backward_apart(node)
        if [str(s.target) for s in mine.steps] != [str(s.target) for s in wholes.steps]:
            raise self._refusal(node)
        for one, other in zip((*mine.tangents, *mine.steps), (*wholes.tangents, *wholes.steps), strict=True):
            self.wholes[one] = other
            temporary.append(one)
        for tangent, output in zip(mine.tangents, outputs, strict=True):
            self.spreads[tangent] = self.spreads[output]
        for step, other in zip(mine.steps, wholes.steps, strict=True):
            self._visit(step, other)
        for operand, grad in zip(node.all_input_nodes, mine.grads, strict=True):
            expected = TOTAL if self.spreads[operand] == SAME else self.spreads[operand]
            if grad is not None and self.spreads[grad] != expected:
                raise self._refusal(node)
        if self.num_changes != before:
            raise self._refusal(node)
        for one in reversed(temporary):
            self.graph.erase_node(one)

    def _visit(self, node: Node, whole: Node) -> None:
        for _ in range(2 * len(node.all_input_nodes) + 2):
            if any(n in self.after for n in node.all_input_nodes):
                self._put_after(node)
            call = OperatorCall(node, whole, self.spreads, self.wholes, self.parts.number, self.parts.samples)
            call.has_grown = any(n in self.grown for n in node.all_input_nodes)
            try:
                spread = spread_of(call)
            except NeedsWhole as needed:
                operands = needed.operands or [n for n in call.operands if call.spread(n) != SAME]
                if not operands:
                    if isinstance(node.target, torch._ops.OpOverload) and not node.all_input_nodes:
                        self._recreate(node, whole)
                        return
                    raise self._refusal(node) from None
                self.num_changes += 1
                known = [n for n in operands if self.spreads[n] == TOTAL and not self.depends_on_model(n)]
                for operand in known or operands:  # what the batch alone decides is had for nothing
                    node.replace_input_with(operand, self.made_whole_for(operand, node))
                continue
            self._settle(node, whole, call, spread)
            return
        raise self._refusal(node)

    def _recreate(self, node: Node, whole: Node) -> None:
        """A tensor of numbers that has no parts: the whole one."""
        self.num_changes += 1
        node.args, node.kwargs = whole.args, whole.kwargs
        self._become_whole(node, whole)
        self.spreads[node] = SAME

    def _become_whole(self, node: Node, whole: Node) -> None:
        if _shapes(node) != _shapes(whole):
            self.grown.add(node)
        node.meta["val"] = whole.meta["val"]

    def _settle(self, node: Node, whole: Node, call: OperatorCall, spread: Any) -> None:
        if node in self.after:  # it runs once, not once per part
            spread, call.shared, call.is_mean = SAME, [], False
        is_same = spread == SAME
        self._take_numbers(node, whole, all_of_them=is_same)
        if is_same:
            self._become_whole(node, whole)
        if node.target is own.keyed_uniform.default and isinstance(spread, Split):
            samples = self.parts.samples
            node.args = (*node.args[:5], spread.weight, samples, samples * self.parts.number)
        for index in call.shared:
            self._share(node, index)
        self.spreads[node] = spread
        if call.is_mean and spread == TOTAL:
            self._divide(node)

    def _put_after(self, node: Node) -> None:
        """An operation on what is known only at the end runs then too, and what it reads of the model with it."""
        for operand in [n for n in node.all_input_nodes if n not in self.after]:
            summed = operand
            if self.spreads[operand] == SAME and self.depends_on_model(operand):
                if not is_inexact(operand.meta["val"]):
                    raise self._refusal(node)
                with self.graph.inserting_before(node):
                    summed = self.share_of(operand)
            if self.spreads[summed] == TOTAL:
                node.replace_input_with(operand, self.made_whole_for(summed, node))
            elif self.spreads[operand] != SAME:
                raise self._refusal(node)
        self.after.add(node)

    def _take_numbers(self, node: Node, whole: Node, *, all_of_them: bool) -> None:
        """Numbers among the arguments that differ are those of the whole, sizes those of the part."""
        before = node.args, node.kwargs
        self._merge_numbers(node, whole, all_of_them=all_of_them)
        self.num_changes += (node.args, node.kwargs) != before

    def _merge_numbers(self, node: Node, whole: Node, *, all_of_them: bool) -> None:
        if node.args == whole.args and node.kwargs == whole.kwargs:
            return
        schema = getattr(node.target, "_schema", None)
        is_sized = op_name(node.target) in SIZED
        args = list(node.args)
        for index, (mine, other) in enumerate(zip(node.args, whole.args, strict=True)):
            kind = str(schema.arguments[index].type) if schema else ""
            merged = with_numbers(mine, other)
            if merged == mine:
                continue
            if all_of_them or (kind in NUMBERS and op_name(node.target) != "arange"):
                args[index] = merged
            elif not is_sized:
                raise self._refusal(node, "depends on the number of samples")
        node.args = tuple(args)
        kwargs = dict(node.kwargs)
        for name, mine in node.kwargs.items():
            merged = with_numbers(mine, whole.kwargs[name])
            if merged != mine:
                kwargs[name] = merged
        node.kwargs = kwargs

    def _share(self, node: Node, index: int) -> None:
        """Of an argument that is the same for all each part takes its share."""
        value = node.args[index]
        args = list(node.args)
        if isinstance(value, Node):
            with self.graph.inserting_before(node):
                args[index] = self.share_of(self._in_dtype_of(value, node))
        else:
            args[index] = value / self.parts.number  # type: ignore[operator]
        node.args = tuple(args)

    def _in_dtype_of(self, value: Node, node: Node) -> Node:
        """A value in the dtype of a result: a share of it is not rounded to less."""
        dtype = node.meta["val"].dtype
        if value.meta["val"].dtype == dtype:
            return value
        with value.meta["val"].fake_mode:
            made = self._insert(aten._to_copy.default, (value,), SAME, value)
            made.kwargs, made.meta["val"] = {"dtype": dtype}, value.meta["val"].to(dtype)
        return made

    def _divide(self, node: Node) -> None:
        """A mean over the samples of a part is that over all, times the number of parts."""
        users = list(node.users)
        with self.graph.inserting_after(node):
            made = self._insert(aten.mul.Tensor, (node, 1.0 / self.parts.number), TOTAL, node)
        self.instead[node] = made
        for user in users:
            user.replace_input_with(node, made)

    def _insert(self, target: Any, args: tuple[Any, ...], spread: Spread, like: Node) -> Node:
        """A new node, whose whole counterpart is that of `like`."""
        self.num_changes += 1
        made = self.graph.call_function(target, args)
        values = torch.fx.node.map_arg(args, lambda n: n.meta["val"])
        with like.meta["val"].fake_mode, modes_of(like):
            made.meta = dict(like.meta) | {"val": target(*values)}
        self.spreads[made], self.wholes[made] = spread, self.wholes[like]
        if like in self.after:
            self.after.add(made)
        return made

    def share_of(self, value: Node) -> Node:
        """Of a value that all parts have, the share of one: together they make it up. Inserted where the graph says."""
        return self._insert(aten.mul.Tensor, (value, 1.0 / self.parts.number), TOTAL, value)

    def whole_value(self, value: Node, user: Node) -> Node:
        """A value that outlives the step, as of the whole batch; known at its end if it is in `after`."""
        found = value if self.spreads[value] == SAME else self.made_whole_for(value, user)
        if found.target is own.final_total.default:
            with self.graph.inserting_before(user):
                return self._insert(aten.clone.default, (found,), SAME, found)
        return found

    def made_whole_for(self, operand: Node, user: Node) -> Node:
        """The operand as it is in the whole batch, for a node that reads it."""
        if operand not in self.made_whole:
            self.made_whole[operand] = self._make_whole(operand, user)
        return self.made_whole[operand]

    def _make_whole(self, operand: Node, user: Node) -> Node:
        spread = self.spreads[operand]
        with self.graph.inserting_before(user):
            if not _sources(operand):
                return self._copied(self.wholes[operand], {})
            if isinstance(spread, Total):
                if not self.depends_on_model(operand):
                    return self._insert(own.known_total.default, (operand,), SAME, operand)
                if self.parts.microbatches == 1:
                    return self._insert(own.sum_parts.default, (operand,), SAME, operand)
                made = self._insert(own.final_total.default, (operand,), SAME, operand)
                self.after.add(made)
                return made
            if not isinstance(spread, Split) or self.parts.microbatches > 1:
                raise self._refusal(user)
            shape = tuple(self.wholes[operand].meta["val"].shape)
            place = place_of(spread, shape, self.parts.samples * self.parts.number)
            if place is None:
                raise self._refusal(user)
            return self._gathered(operand, place)

    def _gathered(self, operand: Node, place: Place) -> Node:
        length = operand.meta["val"].shape[place.dim]
        outer = length // (self.parts.samples * place.inner)
        args = (operand, place.dim, outer, self.parts.number)
        made = self._insert(own.gather_parts.default, args, SAME, operand)
        self.grown.add(made)
        return made

    def _copied(self, whole: Node, known: dict[Node, Node]) -> Node:
        """A copy of the whole trace's node and all it reads (which are numbers)."""
        if whole not in known:
            for operand in whole.all_input_nodes:
                self._copied(operand, known)
            known[whole] = self.graph.node_copy(whole, lambda n: known[n])
            self.spreads[known[whole]], self.wholes[known[whole]] = SAME, whole
            self.grown.add(known[whole])
        return known[whole]

    def _refusal(self, node: Node, why: str = "mixes samples") -> CaptureError:
        number = self.parts.number
        split = f"{number} parts (dp {self.parts.dp} x {self.parts.microbatches} microbatches)"
        hint = "use 1 microbatch" if self.parts.microbatches > 1 else "use dp 1"
        known = "" if rule_of(node.target) else ", for all that is known"
        name, other = op_name(node.target), "compute it from sums over samples"
        if BATCH_NORM in node.meta:
            name, other = "batch_norm", "normalise each part by itself (batch_norm: per_part in the plan)"
        problem = f"{name} {why}{known}: the batch cannot be cut into {split}"
        return CaptureError(problem, source_line(node), f"{hint}, or {other}")


def _sources(node: Node) -> bool:
    """Whether a value depends on any tensor that is given."""
    stack, seen = [node], set[Node]()
    while stack:
        current = stack.pop()
        if current.op in ("placeholder", "get_attr"):
            return True
        for operand in current.all_input_nodes:
            if operand not in seen:
                seen.add(operand)
                stack.append(operand)
    return False


def _shapes(node: Node) -> list[tuple[int, ...]]:
    value = node.meta["val"]
    return [tuple(v.shape) for v in (value if isinstance(value, tuple | list) else [value])]


def _numel(shape: Sequence[int]) -> int:
    return int(torch.Size(shape).numel())
