"""Units: the captured graph is sorted by what each value depends on, and its model part cut into slices.

Values that depend on no parameter form the constants graph (evaluated once) and the inputs graph (once per
microbatch, in every stage that needs it). What is left is cut at the borders of repeated blocks; where that gives
too few pieces, at the borders of every top-level submodule. Equal slices share one template.
"""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from enum import IntEnum

import torch
from torch import nn
from torch.fx import Node

from comms.errors import CaptureError
from partitioner.capture import loss
from partitioner.capture.captured_graph import (
    Graph,
    Side,
    Template,
    Unit,
    ancestors,
    reads_of,
    spec_of,
    template_flops,
)
from partitioner.capture.exact_float64 import ExactFloat64
from partitioner.capture.tp_styles import param_styles
from partitioner.capture.tracing import Captured, LossFunction, ModuleCall, trace_module


class Dependence(IntEnum):
    """What a value depends on: nothing that changes, the batch, or a parameter."""

    CONSTANT = 0
    BATCH = 1
    MODEL = 2


SPACES = {"params": Dependence.MODEL, "batch": Dependence.BATCH, "buffers": Dependence.CONSTANT}


def capture_graph(
    module: nn.Module,
    batch: Mapping[str, torch.Tensor],
    num_samples: int,
    *,
    loss_fn: LossFunction | None = None,
    tp_plan: Mapping[str, str] | None = None,
    frozen: frozenset[str] = frozenset(),
    min_units: int = 1,
    exact: bool = False,
) -> Graph:
    """The graph of `module(**batch)`, `batch` being one microbatch of one replica (only its shapes are used).

    `loss_fn`, `tp_plan`: see `trace_module`. `frozen`: parameters that are not trained though they have a gradient.
    `min_units`: at least so many units, if the model has that many pieces. `exact`: float64 stays wide through explicit
    casts. Raises CaptureError.
    """
    with ExactFloat64() if exact else nullcontext():
        captured = trace_module(module, batch, loss_fn, tp_plan)
    captured.frozen |= frozen
    return build_graph(captured, num_samples=num_samples, min_units=min_units)


def build_graph(captured: Captured, *, num_samples: int, min_units: int = 1) -> Graph:
    """Cut a capture of `num_samples` samples into at least `min_units` units, if the model has that many pieces."""
    graph = captured.graph_module.graph
    for node in graph.nodes:
        _refuse_random(node)
    total, count, rule = loss.rewrite(graph, num_samples)
    depends = _dependences(captured)
    pieces = _pieces(captured, depends, _borders(captured.calls, captured.containers))
    if len(pieces) < min_units:  # finer cuts cost a segment border each, so only where stages need them
        pieces = _pieces(captured, depends, _top_level_borders(captured.calls))
    if depends[total] is not Dependence.MODEL:
        raise CaptureError("the loss depends on no parameter", total.name, "check what the model returns")
    return _Builder(captured, depends, pieces, (total, count), rule).build()


def _dependences(captured: Captured) -> dict[Node, Dependence]:
    depends: dict[Node, Dependence] = {}
    for node in captured.graph_module.graph.nodes:
        if node.op == "placeholder":
            space = captured.names[node.name].split(":")[0]
            depends[node] = SPACES[space]
        elif node.op != "output":
            depends[node] = max((depends[n] for n in node.all_input_nodes), default=Dependence.CONSTANT)
    return depends


def _refuse_random(node: Node) -> None:
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or torch.Tag.nondeterministic_seeded not in target.tags:
        return
    # attention counts as random to torch because it may drop out; with a probability of zero it does not
    is_attention = "scaled_dot_product" in str(target)
    if is_attention and (len(node.args) < 5 or node.args[4] == 0.0):
        return
    raise CaptureError(f"random operator {target}", node.name, "switch dropout off (p = 0 or model.eval())")


def _borders(calls: Sequence[ModuleCall], candidates: frozenset[str]) -> list[int]:
    """Starts and ends of the outermost calls of list-like containers' children."""
    chosen: list[ModuleCall] = []
    for call in sorted(calls, key=lambda c: (c.start, -c.stop)):  # outer calls come before those inside them
        nested = any(c.start <= call.start and call.stop <= c.stop for c in chosen)
        if call.path in candidates and not nested and call.stop > call.start:
            chosen.append(call)
    return sorted({edge for call in chosen for edge in (call.start, call.stop)})


def _top_level_borders(calls: Sequence[ModuleCall]) -> list[int]:
    return sorted({edge for call in calls if call.path for edge in (call.start, call.stop)})


def _pieces(captured: Captured, depends: Mapping[Node, Dependence], borders: list[int]) -> list[list[Node]]:
    """Model nodes grouped by the borders they lie between; groups without parameters join the one before."""
    pieces: dict[int, list[Node]] = {}
    for node in captured.graph_module.graph.nodes:
        if node.op not in ("placeholder", "output") and depends[node] is Dependence.MODEL:
            index = node.meta["index"]
            pieces.setdefault(sum(edge <= index for edge in borders), []).append(node)
    merged: list[list[Node]] = []
    for _, nodes in sorted(pieces.items()):
        read = (n for node in nodes for n in node.all_input_nodes if n.op == "placeholder")
        if merged and not any(depends[n] is Dependence.MODEL for n in read):
            merged[-1].extend(nodes)
        else:
            merged.append(nodes)
    return merged


@dataclass
class _Builder:
    """Holds the tables while units, templates and sides are made from pieces."""

    captured: Captured
    depends: dict[Node, Dependence]
    pieces: list[list[Node]]
    ends: tuple[Node, Node]
    rule: str
    templates: list[Template] = field(default_factory=list)
    known: dict[object, int] = field(default_factory=dict)
    free_values: dict[Node, None] = field(default_factory=dict)

    def build(self) -> Graph:
        units = tuple(self._unit(piece) for piece in self.pieces)
        total, count = self.ends
        self.free_values[count] = None
        batch_values = [n for n in self.free_values if self._is(n, Dependence.BATCH)]
        used = {name for unit in units for name in unit.params}
        tensors = [n for n in self.depends if isinstance(n.meta.get("val"), torch.Tensor)]
        return Graph(
            units=units,
            templates=tuple(self.templates),
            constants=self._side(Dependence.CONSTANT, self._needed_constants(batch_values)),
            inputs=self._side(Dependence.BATCH, batch_values),
            specs={self._name(n): spec_of(n.meta["val"]) for n in tensors},
            params=tuple(name for name in self._placeholders("params") if name in used),
            frozen=self.captured.frozen,
            batch=self._placeholders("batch"),
            buffers=self._placeholders("buffers"),
            loss=self._name(total),
            count=self._name(count),
            loss_rule=self.rule,
        )

    def _placeholders(self, space: str) -> tuple[str, ...]:
        found = (full.partition(":") for full in self.captured.names.values())
        return tuple(name for of, _, name in found if of == space)

    def _is(self, node: Node, on: Dependence) -> bool:
        return self.depends[node] is on

    def _name(self, node: Node) -> str:
        return self.captured.names.get(node.name, f":{node.name}").partition(":")[2]

    def _names(self, nodes: Iterable[Node]) -> tuple[str, ...]:
        return tuple(map(self._name, nodes))

    def _unit(self, nodes: list[Node]) -> Unit:
        inside, outer = set(nodes), reads_of(nodes)
        params = [n for n in outer if n.op == "placeholder" and self._is(n, Dependence.MODEL)]
        frees = [n for n in outer if not self._is(n, Dependence.MODEL)]
        activations = [n for n in outer if n not in params and n not in frees]
        self.free_values |= dict.fromkeys(frees)
        outputs = [
            n for n in nodes if n in self.ends or any(u not in inside and u.op != "output" for u in n.users)
        ]
        names = self._names(params)
        styles = param_styles(
            names, params, inside, self.captured.tp_plan,
            lambda n: self._is(n, Dependence.MODEL), lambda n: self._is(n, Dependence.BATCH),
        )  # fmt: skip
        template = self._template(nodes, [params, frees, activations], outputs, styles)
        return Unit(
            name=_piece_name(self.captured.calls, nodes),
            template=template,
            params=names,
            frees=self._names(frees),
            activations=self._names(activations),
            outputs=self._names(outputs),
        )

    def _template(
        self, nodes: list[Node], inputs: list[list[Node]], outputs: list[Node], styles: tuple[str, ...]
    ) -> int:
        flat = [n for group in inputs for n in group]
        frozen = tuple(self._name(n) in self.captured.frozen for n in inputs[0])
        # frozen parameters get no gradient, and styles decide the cut: equal operations alone are not enough
        key = (_structure(nodes, flat, outputs), tuple(map(len, inputs)), styles, frozen)
        if key not in self.known:
            self.known[key] = len(self.templates)
            graph = _extract(self.captured, nodes, flat, outputs)
            self.templates.append(
                Template(
                    graph=graph,
                    inputs=tuple(spec_of(n.meta["val"]) for n in flat),
                    num_params=len(inputs[0]),
                    num_frees=len(inputs[1]),
                    outputs=tuple(spec_of(n.meta["val"]) for n in outputs),
                    flops=template_flops(graph),
                    tp_styles=styles,
                )
            )
        return self.known[key]

    def _needed_constants(self, batch_values: Sequence[Node]) -> list[Node]:
        """Constant values that units or the inputs graph read."""
        read = [n for node in self._made(batch_values, Dependence.BATCH) for n in node.all_input_nodes]
        needed = dict.fromkeys(n for n in (*self.free_values, *read) if self._is(n, Dependence.CONSTANT))
        return list(needed)

    def _made(self, outputs: Sequence[Node], on: Dependence) -> list[Node]:
        """The operations that depend on `on` and that make `outputs`, in graph order."""
        wanted = ancestors(outputs, lambda n: self._is(n, on))
        return [n for n in self.depends if n in wanted and n.op != "placeholder"]

    def _side(self, on: Dependence, outputs: list[Node]) -> Side:
        nodes = self._made(outputs, on)
        inside = set(nodes)
        outer = list(dict.fromkeys((*reads_of(nodes), *(n for n in outputs if n not in inside))))
        graph = _extract(self.captured, nodes, outer, outputs)
        return Side(graph, self._names(outer), self._names(outputs))


def _piece_name(calls: Sequence[ModuleCall], nodes: list[Node]) -> str:
    """The innermost module call that contains the first node, or the first call inside the slice."""
    first = nodes[0].meta["index"]
    # without what the loss's rewriting added
    last = max(n.meta["index"] for n in nodes if n.meta["index"] < loss.END)
    around = [c for c in calls if c.start <= first and last < c.stop and c.path]
    inside = [c for c in calls if first <= c.start and c.stop <= last + 1 and c.path]
    best = max(around, key=lambda c: c.path.count("."), default=None) or (inside[0] if inside else None)
    return best.path if best else nodes[0].name


def _structure(nodes: list[Node], inputs: list[Node], outputs: list[Node]) -> object:
    """A key equal for slices that compute the same thing on inputs of the same kind."""
    number = {n: i for i, n in enumerate([*inputs, *nodes])}
    lines = []
    for node in nodes:
        args = torch.fx.node.map_arg((node.args, node.kwargs), lambda n: f"%{number[n]}")
        lines.append(f"{node.op} {node.target} {args} {node.meta.get('no_grad')}")
    specs = tuple(str(spec_of(n.meta["val"])) for n in inputs)
    return tuple(lines), specs, tuple(number[n] for n in outputs)


def _extract(
    captured: Captured, nodes: list[Node], inputs: list[Node], outputs: list[Node]
) -> torch.fx.GraphModule:
    """Copy `nodes` into a graph of their own with `inputs` as placeholders."""
    graph = torch.fx.Graph()
    copies: dict[Node, Node] = {}
    for index, node in enumerate(inputs):
        copies[node] = graph.placeholder(f"in_{index}")
        copies[node].meta = dict(node.meta)
    for node in nodes:
        copies[node] = graph.node_copy(node, lambda n: copies[n])
    graph.output(tuple(copies[n] for n in outputs))
    return torch.fx.GraphModule(captured.graph_module, graph)
