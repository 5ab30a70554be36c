"""Where tp cuts each parameter: of the ways that its products allow, the first that divides.

A column-wise weight is cut along what its product makes, a row-wise one along what the product sums over (see
`tp_styles`); where that does not divide, the other way round. A vocabulary that does not divide is padded, if little
is added. A dim that the model takes apart is cut in each of its parts: fused query, key and value by thirds, per head,
or with fewer keys than queries, gate beside up. Whatever is chosen is right; it decides what is communicated.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

from torch.fx import Node

from partitioner.capture.captured_graph import Graph, Template
from partitioner.capture.products.param_uses import bias_of, lookups, product_uses, sections_of
from partitioner.capture.products.tp_styles import REPLICATE, ROW, VOCAB
from partitioner.program.program import TensorSpec, local_length

PADDING = 1 / 8  # of a dim: at most so much may be added to make it divide


@dataclass(frozen=True, slots=True)
class ParamCut:
    """The dim that tp cuts and the sections that it consists of (see `Tensor`)."""

    dim: int
    sections: tuple[int, ...]

    def local(self, spec: TensorSpec, tp: int) -> TensorSpec:
        """What one chip holds of a parameter."""
        shape = list(spec.shape)
        shape[self.dim] = local_length(self.sections, tp)
        return replace(spec, shape=tuple(shape))

    def divides(self, tp: int) -> bool:
        """Whether slices are not padded."""
        return all(length % tp == 0 for length in self.sections)

    def is_nearly_even(self, tp: int) -> bool:
        """Whether little is added where it does not divide."""
        return tp * local_length(self.sections, tp) <= (1 + PADDING) * sum(self.sections)


Cuts: TypeAlias = Mapping[str, ParamCut | None]


def param_cuts(graph: Graph, tp: int) -> Cuts:
    """Where each parameter is cut; None: every chip has all of it."""
    choices: dict[str, list[Sequence[ParamCut]]] = {}
    biases: list[tuple[str, str, tuple[int, ...]]] = []
    known = [_uses(template, tp) for template in graph.templates]
    for unit in graph.units:
        ways_of, biases_of = known[unit.template]
        for place, ways in ways_of:
            ranked = choices.setdefault(unit.params[place], [])
            # a table that is looked up decides about a head that is tied to it
            is_table = graph.templates[unit.template].tp_styles[place] == VOCAB
            ranked.insert(0 if is_table else len(ranked), ways)
        biases += [(unit.params[weight], unit.params[bias], made) for weight, bias, made in biases_of]
    cuts: dict[str, ParamCut | None] = dict.fromkeys(graph.params)
    cuts |= {name: _chosen(ranked[0], tp) for name, ranked in choices.items()}
    for weight, bias, made in biases:
        cut = cuts[weight]
        if bias not in choices and cut is not None and cut.dim in made:
            cuts[bias] = ParamCut(0, cut.sections)
    return cuts


def _chosen(ways: Sequence[ParamCut], tp: int) -> ParamCut | None:
    first = ways[0]
    if first.divides(tp) or (first.dim == 0 and first.is_nearly_even(tp)):
        return first
    return next((w for w in ways if w.divides(tp)), next((w for w in ways if w.is_nearly_even(tp)), None))


def _uses(
    template: Template, tp: int
) -> tuple[list[tuple[int, list[ParamCut]]], list[tuple[int, int, tuple[int, ...]]]]:
    """By place of a parameter, the ways to cut it; and (weight, bias, dims of the weight along which both are cut)."""
    nodes = list(template.graph.graph.nodes)
    params = {n: i for i, n in enumerate([n for n in nodes if n.op == "placeholder"][: template.num_params])}
    ways: list[tuple[int, list[ParamCut]]] = []
    biases = []
    for param, dims in lookups(nodes, params):
        if template.tp_styles[params[param]] == VOCAB:
            ways.append((params[param], _ways(param, dims, tp)))
    for use in product_uses(nodes, params):
        place = params[use.param]
        style = template.tp_styles[place]
        if style == REPLICATE or (use.groups % tp > 0 and use.groups > 1):
            continue
        dims = (
            (*use.summed, *use.made, *use.shared) if style == ROW else (*use.made, *use.shared, *use.summed)
        )
        if found := _ways(use.param, dims, tp):
            ways.append((place, found))
            bias = bias_of(use.node, params)
            if bias is not None and use.param.meta["val"].shape[dims[0]] == bias.meta["val"].numel():
                biases.append((place, params[bias], (*use.made, *use.shared)))
    return ways, biases


def _ways(param: Node, dims: Iterable[int], tp: int) -> list[ParamCut]:
    found = []
    for dim in dims:
        length = (int(param.meta["val"].shape[dim]),)
        cuts = dict.fromkeys(ParamCut(dim, sections) for sections in (sections_of(param, dim, tp), length))
        found += list(cuts)
    return found
