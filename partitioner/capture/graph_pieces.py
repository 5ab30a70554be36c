"""Pieces: the model part of a captured graph, cut into slices of its order.

Cuts are at the borders of repeated blocks; where that gives too few slices, at the borders of every submodule, and at
last at every operation. What depends on no parameter belongs to no slice, and checkpointed regions stay whole if
stages are not longer.
"""

from collections.abc import Mapping, Sequence
from enum import IntEnum

import torch
from torch.fx import Node

from partitioner.capture.captured_graph import op_name, operand, spec_of
from partitioner.capture.forwards.checkpoints import Region, regions_of
from partitioner.capture.samples.loss_form import LossForm, finals_of
from partitioner.capture.tracing import Captured, ModuleCall


class Dependence(IntEnum):
    """What a value depends on: nothing that changes, the batch, or a parameter."""

    CONSTANT = 0
    BATCH = 1
    MODEL = 2


SPACES = {"params": Dependence.MODEL, "batch": Dependence.BATCH, "buffers": Dependence.CONSTANT}


def dependences(captured: Captured) -> dict[Node, Dependence]:
    depends: dict[Node, Dependence] = {}
    for node in captured.graph_module.graph.nodes:
        if node.op == "placeholder":
            space = captured.names[node.name].split(":")[0]
            name = captured.names[node.name].partition(":")[2]
            depends[node] = (
                Dependence.BATCH if space == "buffers" and name in captured.updated else SPACES[space]
            )
        elif node.op != "output":
            depends[node] = max((depends[n] for n in node.all_input_nodes), default=Dependence.CONSTANT)
    return depends


def cut_into_pieces(
    captured: Captured, depends: Mapping[Node, Dependence], form: LossForm, min_units: int
) -> list[list[Node]]:
    """At least `min_units` slices of the model's operations, if it has that many."""
    blocks, modules = _borders(captured.calls, captured.containers), _top_level_borders(captured.calls)
    nodes = captured.graph_module.graph.nodes
    every = [node.meta["index"] for node in nodes if node.op == "call_function"]
    pieces: list[list[Node]] = []
    for edges, is_merged in ((blocks, True), (modules, True), (modules, False), (every, False)):
        if len(pieces) < min_units:  # finer cuts cost a segment border each, so only where stages need them
            kept = _outside_regions(captured, edges, min_units)
            pieces = _pieces(captured, depends, form, kept, is_merged=is_merged)
    return pieces


def _outside_regions(captured: Captured, edges: Sequence[int], min_units: int) -> list[int]:
    """Without the borders in checkpointed regions, which are computed again as a whole.

    A region that is longer than a stage's share of the slices is cut all the same, else stages would not balance.
    """
    spans: dict[Region, list[int]] = {}
    for node in captured.graph_module.graph.nodes:
        for region in regions_of(node):
            spans.setdefault(region, []).append(node.meta["index"])
    inside: set[int] = set()
    for span in spans.values():
        within = [edge for edge in edges if span[0] < edge <= span[-1]]
        if (len(within) + 1) * min_units <= len(edges) + 1:
            inside |= set(within)
    return [edge for edge in edges if edge not in inside]


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


def _pieces(
    captured: Captured,
    depends: Mapping[Node, Dependence],
    form: LossForm,
    borders: list[int],
    *,
    is_merged: bool,
) -> list[list[Node]]:
    """Model nodes grouped by the borders they lie between; merged: groups without parameters join the one before."""
    late = [*form.tail, *form.updates]
    apart = {*late, *finals_of(late)}
    pieces: dict[int, list[Node]] = {}
    for node in captured.graph_module.graph.nodes:
        if (
            node.op not in ("placeholder", "output")
            and depends[node] is Dependence.MODEL
            and node not in apart
        ):
            maker = node
            while op_name(maker.target) == "getitem":  # stays with what made the tuple
                maker = operand(maker, 0)
            index = maker.meta["index"]
            pieces.setdefault(sum(edge <= index for edge in borders), []).append(node)
    merged: list[list[Node]] = []
    for _, nodes in sorted(pieces.items()):
        read = (n for node in nodes for n in node.all_input_nodes if n.op == "placeholder")
        if is_merged and merged and not any(depends[n] is Dependence.MODEL for n in read):
            merged[-1].extend(nodes)
        else:
            merged.append(nodes)
    return merged


def piece_name(calls: Sequence[ModuleCall], nodes: list[Node]) -> str:
    """The innermost module call that contains the first node, or the first call inside the slice."""
    first = nodes[0].meta["index"]
    last = max(n.meta["index"] for n in nodes)
    around = [c for c in calls if c.start <= first and last < c.stop and c.path]
    inside = [c for c in calls if first <= c.start and c.stop <= last + 1 and c.path]
    best = max(around, key=lambda c: c.path.count("."), default=None) or (inside[0] if inside else None)
    return best.path if best else nodes[0].name


def structure_of(nodes: list[Node], inputs: list[Node], outputs: list[Node]) -> object:
    """A key equal for slices that compute the same thing on inputs of the same kind."""
    number = {n: i for i, n in enumerate([*inputs, *nodes])}
    regions: dict[Region, int] = {}
    lines: list[object] = []
    for node in nodes:
        args = torch.fx.node.map_arg((node.args, node.kwargs), lambda n: f"%{number[n]}")
        lines.append(f"{node.op} {node.target} {args} {node.meta['no_grad']} {node.meta['autocast']}")
        lines += [(regions.setdefault(r, len(regions)), r.context_fn) for r in regions_of(node)]
    specs = tuple(str(spec_of(n.meta["val"])) for n in inputs)
    return tuple(lines), specs, tuple(number[n] for n in outputs)


def extracted(
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
