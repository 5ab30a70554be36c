"""Units: the captured graph is sorted by what each value depends on, and its model part cut into slices.

Values that depend on no parameter form the constants graph (evaluated once) and the inputs graph (once per
microbatch, in every stage that needs it). What is left is cut at the borders of repeated blocks; where that gives
too few pieces, at the borders of every top-level submodule. Equal slices share one template.
"""

from collections.abc import Mapping, Sequence
from enum import IntEnum

import torch
from torch.fx import Node

from comms.errors import CaptureError
from partitioner.capture import loss
from partitioner.capture.captured_graph import Graph, Side, Template, Unit
from partitioner.capture.dtypes import spec_of
from partitioner.capture.op_costs import template_flops
from partitioner.capture.tracing import Captured, ModuleCall
from partitioner.layout.tp_styles import param_styles


class Level(IntEnum):
    """What a value depends on: nothing that changes, the batch, or a parameter."""

    CONSTANT = 0
    BATCH = 1
    MODEL = 2


def build_graph(captured: Captured, *, num_samples: int, min_units: int = 1) -> Graph:
    """Cut a capture of `num_samples` samples into at least `min_units` units, if the model has that many pieces."""
    graph = captured.graph_module.graph
    for node in graph.nodes:
        _refuse_random(node)
    total, count, rule = loss.rewrite(graph, num_samples)
    levels = _levels(captured)
    pieces = _pieces(captured, levels, _borders(captured.calls, captured.containers))
    if len(pieces) < min_units:
        pieces = _pieces(captured, levels, _top_level_borders(captured.calls))
    if levels[total] is not Level.MODEL:
        raise CaptureError(
            "the loss depends on no parameter", where=total.name, hint="check what the model returns"
        )
    builder = _Builder(captured, levels, pieces, (total, count), rule)
    return builder.build()


def _levels(captured: Captured) -> dict[Node, Level]:
    levels: dict[Node, Level] = {}
    for node in captured.graph_module.graph.nodes:
        if node.op == "placeholder":
            space = captured.names[node.name].split(":")[0]
            levels[node] = {"params": Level.MODEL, "batch": Level.BATCH, "buffers": Level.CONSTANT}[space]
        elif node.op != "output":
            levels[node] = max((levels[n] for n in node.all_input_nodes), default=Level.CONSTANT)
    return levels


def _refuse_random(node: Node) -> None:
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or torch.Tag.nondeterministic_seeded not in target.tags:
        return
    is_attention = "scaled_dot_product" in str(target)
    if is_attention and (len(node.args) < 5 or node.args[4] == 0.0):
        return
    raise CaptureError(
        f"random operator {target}", where=node.name, hint="switch dropout off (p = 0 or model.eval())"
    )


def _borders(calls: Sequence[ModuleCall], candidates: frozenset[str]) -> list[int]:
    """Starts and ends of the outermost calls of list-like containers' children."""
    chosen: list[ModuleCall] = []
    for call in sorted(calls, key=lambda c: (c.start, -c.stop)):
        nested = any(c.start <= call.start and call.stop <= c.stop for c in chosen)
        if call.path in candidates and not nested and call.stop > call.start:
            chosen.append(call)
    return sorted({edge for call in chosen for edge in (call.start, call.stop)})


def _top_level_borders(calls: Sequence[ModuleCall]) -> list[int]:
    return sorted({edge for call in calls if call.path for edge in (call.start, call.stop)})


def _pieces(captured: Captured, levels: Mapping[Node, Level], borders: list[int]) -> list[list[Node]]:
    """Model nodes grouped by the borders they lie between; groups without parameters join the one before."""
    pieces: dict[int, list[Node]] = {}
    for node in captured.graph_module.graph.nodes:
        if node.op not in ("placeholder", "output") and levels[node] is Level.MODEL:
            index = node.meta["index"]
            pieces.setdefault(sum(edge <= index for edge in borders), []).append(node)
    merged: list[list[Node]] = []
    for _, nodes in sorted(pieces.items()):
        has_params = any(
            n.op == "placeholder" for node in nodes for n in node.all_input_nodes if levels[n] is Level.MODEL
        )
        if merged and not has_params:
            merged[-1].extend(nodes)
        else:
            merged.append(nodes)
    return merged


class _Builder:
    """Holds the tables while units, templates and sides are made from pieces."""

    def __init__(
        self,
        captured: Captured,
        levels: dict[Node, Level],
        pieces: list[list[Node]],
        ends: tuple[Node, Node],
        rule: str,
    ) -> None:
        self.captured, self.levels, self.pieces, self.ends, self.rule = captured, levels, pieces, ends, rule
        self.templates: list[Template] = []
        self.known: dict[object, int] = {}
        self.free_values: dict[Node, None] = {}

    def build(self) -> Graph:
        units = tuple(self._unit(piece) for piece in self.pieces)
        total, count = self.ends
        self.free_values[count] = None
        constants = self._side(Level.CONSTANT, self._needed_constants())
        inputs = self._side(Level.BATCH, [n for n in self.free_values if self._is(n, Level.BATCH)])
        names = self.captured.names
        used = {name for unit in units for name in unit.params}
        params = tuple(
            n.split(":", 1)[1]
            for n in names.values()
            if n.startswith("params:") and n.split(":", 1)[1] in used
        )
        return Graph(
            units=units,
            templates=tuple(self.templates),
            constants=constants,
            inputs=inputs,
            specs={
                self._name(n): spec_of(n.meta["val"])
                for n in self.levels
                if isinstance(n.meta.get("val"), torch.Tensor)
            },
            params=params,
            frozen=self.captured.frozen,
            batch=tuple(n.split(":", 1)[1] for n in names.values() if n.startswith("batch:")),
            buffers=tuple(n.split(":", 1)[1] for n in names.values() if n.startswith("buffers:")),
            loss=self._name(total),
            count=self._name(count),
            loss_rule=self.rule,
        )

    def _is(self, node: Node, level: Level) -> bool:
        return self.levels[node] is level

    def _name(self, node: Node) -> str:
        full = self.captured.names.get(node.name)
        return full.split(":", 1)[1] if full else node.name

    def _unit(self, nodes: list[Node]) -> Unit:
        inside = set(nodes)
        outer = dict.fromkeys(n for node in nodes for n in node.all_input_nodes if n not in inside)
        params = [n for n in outer if n.op == "placeholder" and self._is(n, Level.MODEL)]
        frees = [n for n in outer if not self._is(n, Level.MODEL)]
        activations = [n for n in outer if n not in params and n not in frees]
        self.free_values |= dict.fromkeys(frees)
        outputs = [
            n for n in nodes if n in self.ends or any(u not in inside and u.op != "output" for u in n.users)
        ]
        names = tuple(self._name(n) for n in params)
        styles = param_styles(
            names, params, inside, self.captured.tp_plan,
            lambda n: self._is(n, Level.MODEL), lambda n: self._is(n, Level.BATCH),
        )  # fmt: skip
        template = self._template(nodes, [params, frees, activations], outputs, styles)
        return Unit(
            name=_piece_name(self.captured.calls, nodes),
            template=template,
            params=names,
            frees=tuple(self._name(n) for n in frees),
            activations=tuple(self._name(n) for n in activations),
            outputs=tuple(self._name(n) for n in outputs),
        )

    def _template(
        self, nodes: list[Node], inputs: list[list[Node]], outputs: list[Node], styles: tuple[str, ...]
    ) -> int:
        flat = [n for group in inputs for n in group]
        frozen = tuple(self._name(n) in self.captured.frozen for n in inputs[0])
        key = (_structure(nodes, flat, outputs), tuple(map(len, inputs)), styles, frozen)
        if key not in self.known:
            self.known[key] = len(self.templates)
            self.templates.append(
                Template(
                    graph=_extract(self.captured, nodes, flat, outputs),
                    inputs=tuple(spec_of(n.meta["val"]) for n in flat),
                    num_params=len(inputs[0]),
                    num_frees=len(inputs[1]),
                    outputs=tuple(spec_of(n.meta["val"]) for n in outputs),
                    flops=template_flops(_extract(self.captured, nodes, flat, outputs)),
                    tp_styles=styles,
                )
            )
        return self.known[key]

    def _needed_constants(self) -> list[Node]:
        """Constant values that units or the inputs graph read."""
        needed = dict.fromkeys(n for n in self.free_values if self._is(n, Level.CONSTANT))
        for node in self._closure([n for n in self.free_values if self._is(n, Level.BATCH)], Level.BATCH):
            needed |= dict.fromkeys(n for n in node.all_input_nodes if self._is(n, Level.CONSTANT))
        return list(needed)

    def _closure(self, outputs: Sequence[Node], level: Level) -> list[Node]:
        """All nodes of `level` that `outputs` depend on, in graph order."""
        wanted, stack = set(), list(outputs)
        while stack:
            node = stack.pop()
            if node not in wanted and self._is(node, level):
                wanted.add(node)
                stack.extend(node.all_input_nodes)
        return [n for n in self.levels if n in wanted and n.op != "placeholder"]

    def _side(self, level: Level, outputs: list[Node]) -> Side:
        nodes = self._closure(outputs, level)
        inside = set(nodes)
        feeds = [*nodes, *(n for n in outputs if n not in inside)]
        outer = dict.fromkeys(
            n
            for node in feeds
            for n in ([node] if node not in inside else node.all_input_nodes)
            if n not in inside
        )
        return Side(
            graph=_extract(self.captured, nodes, list(outer), outputs),
            inputs=tuple(self._name(n) for n in outer),
            outputs=tuple(self._name(n) for n in outputs),
        )


def _piece_name(calls: Sequence[ModuleCall], nodes: list[Node]) -> str:
    """The innermost module call that contains the first node, or the first call inside the slice."""
    first = nodes[0].meta["index"]
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
