"""Units: the captured graph is sorted by what each value depends on, and its model part cut into slices.

Values that depend on no parameter form the constants graph (evaluated once) and the inputs graph (once per
microbatch, in every stage that needs it). What is left is cut at the borders of repeated blocks; where that gives
too few pieces, at the borders of every top-level submodule. Equal slices share one template.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Node

from comms.errors import CaptureError, UserError, first_sentence, has_line, method_line
from partitioner.capture.batch_inputs import Batch, require_plain
from partitioner.capture.captured_graph import (
    BATCH_NAME,
    Graph,
    Known,
    Side,
    Template,
    Unit,
    ancestors,
    operand,
    reads_of,
    spec_of,
)
from partitioner.capture.exact_float64 import ExactFloat64
from partitioner.capture.forwards.keyed_random import draws
from partitioner.capture.forwards.step_loss import LossFunction, warn_of_batch
from partitioner.capture.forwards.user_functions import AppliedFunction
from partitioner.capture.graph_pieces import (
    Dependence,
    cut_into_pieces,
    dependences,
    extracted,
    piece_name,
    structure_of,
)
from partitioner.capture.products.tp_styles import param_styles
from partitioner.capture.pure_graph import (
    autocast_written_out,
    is_float,
    quiet_torch,
    with_gradient,
)
from partitioner.capture.refused.refusals import instead_of, users_warnings
from partitioner.capture.samples.batch_cut import cut_batch
from partitioner.capture.samples.loss_form import FINAL, GATHERED, KNOWN, LossForm, finals_of, whole_loss
from partitioner.capture.samples.taking_apart import put_apart, replace_by
from partitioner.capture.source_lines import first_user_line, loss_line, source_line
from partitioner.capture.tracing import Captured, trace_module
from partitioner.capture.training_flops import training_flops

aten = torch.ops.aten
HAS_LINES = ContextVar("HAS_LINES", default=False)


@quiet_torch()
def capture_graph(
    module: nn.Module,
    batch: Batch,
    *,
    dp: int = 1,
    microbatches: int = 1,
    loss_fn: LossFunction | None = None,
    tp_plan: Mapping[str, str] | None = None,
    frozen: frozenset[str] = frozenset(),
    min_units: int = 1,
    exact: bool = False,
    norms_per_part: bool = False,
    repeats: bool = False,
) -> Graph:
    """The graph of one microbatch of one replica, where `module(**batch)` is a step (only shapes are used).

    `loss_fn`, `tp_plan`, `repeats`: see `trace_module`. `frozen`: parameters that are not trained though they have a
    gradient. `min_units`: at least so many units, if the model has that many pieces. `exact`: float64 stays wide
    through explicit casts. `norms_per_part`: see `batch_norms`. Raises CaptureError, and PlanError where the batch
    does not divide.
    """

    said: set[str] = set()

    def graph(has_lines: bool) -> Graph:
        def trace(given: Batch, mode: FakeTensorMode) -> Captured:
            with ExactFloat64() if exact else nullcontext(), users_warnings(said, given is batch):
                warn_of_batch(loss_fn, given)
                captured = trace_module(
                    module, given, loss_fn, tp_plan, mode, has_lines=has_lines, repeats=repeats
                )
            captured.frozen |= frozen
            return captured

        if dp * microbatches == 1:
            captured = trace(batch, FakeTensorMode(allow_non_fake_inputs=True))
            return build_graph(captured, whole_loss(captured), frozenset(), min_units=min_units)
        captured, form, cut = cut_batch(trace, batch, dp, microbatches, norms_per_part=norms_per_part)
        return build_graph(captured, form, cut, min_units=min_units)

    require_plain(batch)
    try:
        return graph(has_lines=HAS_LINES.get())
    except Exception as error:
        with _explaining(type(module), loss_fn):
            graph(has_lines=True)  # source lines cost as much again: only to say what is wrong
            raise error  # now it is right: then it depends on what the first forward did


@contextmanager
def noting_lines() -> Iterator[None]:
    """Inside the block captures note source lines, which cost as much again."""
    token = HAS_LINES.set(True)
    try:
        yield
    finally:
        HAS_LINES.reset(token)


@contextmanager
def _explaining(kind: type[nn.Module], loss_fn: LossFunction | None) -> Iterator[None]:
    try:
        yield
    except CaptureError as error:
        if not has_line(error.where):
            known = error.where if error.where != kind.__name__ else ""
            code = getattr(loss_fn, "__code__", None) if "loss_fn" in known else None
            line = f"{code.co_filename}:{code.co_firstlineno}" if code else method_line(kind, "forward")
            error.where = ", ".join(filter(None, (known, line)))
        raise
    except UserError:
        raise
    except Exception as error:
        problem = f"cannot capture {kind.__name__}: {type(error).__name__}: {first_sentence(error)}"
        hint = instead_of(error, "write this part with other operators")
        raise CaptureError(problem, first_user_line(error), hint) from error


def build_graph(captured: Captured, form: LossForm, cut: frozenset[str], *, min_units: int = 1) -> Graph:
    """Cut a capture into at least `min_units` units, if the model has that many pieces. `cut`: entries with samples."""
    graph = captured.graph_module.graph
    for node in graph.nodes:
        _refuse_random(node)
    form = _with_count(captured, form)
    depends = _inline_functions(captured, dependences(captured))
    if depends[form.total] is not Dependence.MODEL:
        raise CaptureError(
            "the loss depends on no parameter", loss_line(form.total), "check what the model returns"
        )
    live = _live(captured, form)
    _refuse_complex_parameters(captured, live)
    if not any(node.op == "placeholder" for node in live):
        problem = "no parameter is trained: all are frozen, or no gradient reaches them"
        raise CaptureError(problem, loss_line(form.total), "unfreeze some, or check detach and no_grad")
    pieces = cut_into_pieces(captured, depends, form, min_units)
    return _Builder(captured, depends, pieces, form, live, cut).build()


def _inline_functions(captured: Captured, depends: Mapping[Node, Dependence]) -> dict[Node, Dependence]:
    """Functions of the user's own that no parameter reaches become what they consist of: no backward is needed."""
    for node in list(captured.graph_module.graph.nodes):
        if isinstance(node.target, AppliedFunction) and depends[node] is not Dependence.MODEL:
            replace_by(node, put_apart(node)[1])
    return dependences(captured)


def _with_count(captured: Captured, form: LossForm) -> LossForm:
    """A loss that is not divided has a count of one, of which every part gives its share."""
    if form.count is not None:
        return form
    graph, total = captured.graph_module.graph, form.total
    output = next(iter(reversed(graph.nodes)))
    with graph.inserting_before(output), total.meta["val"].fake_mode:
        one = graph.call_function(aten.scalar_tensor.default, (1.0 / form.parts,), {"dtype": torch.float64})
        one.meta = dict(total.meta) | {"val": torch.empty((), dtype=torch.float64)}
    output.args = ((form.total, one, *output.args[0][1:]),)
    return replace(form, count=one)


def _live(captured: Captured, form: LossForm) -> set[Node]:
    """The nodes that a gradient reaches, on its way from the loss to a parameter that is trained."""
    graph = captured.graph_module.graph
    placeholders = [n for n in graph.nodes if n.op == "placeholder"]
    names = {n: captured.names[n.name].partition(":") for n in placeholders}
    trained = [
        n for n, (space, _, name) in names.items() if space == "params" and name not in captured.frozen
    ]
    differentiable = with_gradient(graph, [n for n in trained if is_float(n)])
    return ancestors([form.total], lambda n: n in differentiable)


def _refuse_complex_parameters(captured: Captured, live: set[Node]) -> None:
    for node in captured.graph_module.graph.nodes:
        if node in live and node.op == "placeholder" and node.meta["val"].is_complex():
            problem = f"the parameter {captured.names[node.name].partition(':')[2]} is complex"
            raise CaptureError(problem, "parameters", "keep its real and imaginary parts as two parameters")


def _refuse_random(node: Node) -> None:
    if draws(node):
        problem = f"{node.target} draws random numbers in a way that cannot be split"
        raise CaptureError(problem, source_line(node), "use rand, randn or dropout")


@dataclass
class _Builder:
    """Holds the tables while units, templates and sides are made from pieces."""

    captured: Captured
    depends: dict[Node, Dependence]
    pieces: list[list[Node]]
    form: LossForm
    live: set[Node]
    cut: frozenset[str]
    templates: list[Template] = field(default_factory=list)
    known: dict[object, int] = field(default_factory=dict)
    free_values: dict[Node, None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        names = [full.partition(":")[::2] for full in self.captured.names.values()]
        self.own, self.taken = {n for space, n in names if space != "batch"}, {n for _, n in names}

    def build(self) -> Graph:
        units = tuple(self._unit(piece) for piece in self.pieces)
        total, count = self.form.total, self.form.count
        assert count is not None
        self.free_values[count] = None
        tail, live = self._late(self.form.tail, [total]), frozenset(self._names(self.live))
        updates = self._late(self.form.updates, [n for n in self._updated() if n in self.form.updates])
        made = (n for n in self._updated() if n not in self.form.updates)
        self.free_values |= dict.fromkeys(n for n in made if not self._is(n, Dependence.MODEL))
        batch_values = [n for n in self.free_values if self._is(n, Dependence.BATCH)]
        known = self._known(batch_values)
        sources = [operand(n, 0) for n in known]
        used = {name for unit in units for name in unit.params}
        tensors = [n for n in self.depends if isinstance(n.meta.get("val"), torch.Tensor)]
        return Graph(
            units=units,
            templates=tuple(self.templates),
            constants=self._side(Dependence.CONSTANT, self._needed_constants([*batch_values, *sources])),
            inputs=self._side(Dependence.BATCH, batch_values),
            totals=self._side(Dependence.BATCH, sources),
            known=tuple(
                Known(self._name(n), self._name(operand(n, 0)), _gathering(n), t) for n, t in known.items()
            ),
            tail=tail,
            summed=self._names(self.form.summed),
            updates=updates,
            kept=self._names(self.form.kept),
            state=tuple(zip(self.captured.updated, self._names(self._updated()), strict=True)),
            specs={self._name(n): spec_of(n.meta["val"]) for n in tensors},
            params=tuple(name for name in self._placeholders("params") if name in used),
            frozen=frozenset(self._placeholders("params")) - live,
            live=live,
            batch=self._placeholders("batch"),
            buffers=self._placeholders("buffers"),
            loss=self._name(total),
            count=self._name(count),
            loss_rule=self.form.rule,
            cut=self.cut,
            samples=self.form.samples,
            is_counted=self.form.is_counted,
        )

    def _late(self, nodes: Sequence[Node], results: list[Node]) -> Side | None:
        """What reads sums over samples when they are known; what else it reads is there where it runs."""
        if not nodes:
            return None
        sums = finals_of(nodes)
        others = [n for n in reads_of(nodes) if n.target is not FINAL]
        self.free_values |= dict.fromkeys(others)
        graph = extracted(self.captured, list(nodes), [*sums, *others], results)
        inputs = (*self._names([operand(n, 0) for n in sums]), *self._names(others))
        return Side(autocast_written_out(graph), inputs, self._names(results))

    def _updated(self) -> list[Node]:
        """What changed buffers hold after the step."""
        output = next(iter(reversed(self.captured.graph_module.graph.nodes)))
        return list(output.args[0])[2:]

    def _known(self, batch_values: Sequence[Node]) -> dict[Node, int]:
        """What batch values read of the whole batch, and in which turn it can be had."""
        turns: dict[Node, int] = {}

        def turn(values: Sequence[Node]) -> int:
            read = reads_of(self._made(values, Dependence.BATCH))
            for node in dict.fromkeys(n for n in (*values, *read) if _is_known(n)):
                if node not in turns:
                    turns[node] = turn([operand(node, 0)])
            return 1 + max((turns[n] for n in (*values, *read) if _is_known(n)), default=-1)

        turn(batch_values)
        return turns

    def _placeholders(self, space: str) -> tuple[str, ...]:
        found = (full for full in self.captured.names.values() if full.startswith(f"{space}:"))
        return tuple(map(self._called, found))

    def _is(self, node: Node, on: Dependence) -> bool:
        return self.depends[node] is on

    def _name(self, node: Node) -> str:
        full = self.captured.names.get(node.name)
        return self._called(full) if full else f"%{node.name}" if node.name in self.taken else node.name

    def _called(self, full: str) -> str:
        """What an input is called among all values: as the user calls it, unless two are called so."""
        space, _, name = full.partition(":")
        return f"{BATCH_NAME}{name}" if space == "batch" and name in self.own else name

    def _names(self, nodes: Iterable[Node]) -> tuple[str, ...]:
        return tuple(map(self._name, nodes))

    def _unit(self, nodes: list[Node]) -> Unit:
        inside, outer = set(nodes), reads_of(nodes)
        params = [n for n in outer if n.op == "placeholder" and self._is(n, Dependence.MODEL)]
        frees = [n for n in outer if not self._is(n, Dependence.MODEL)]
        activations = [n for n in outer if n not in params and n not in frees]
        self.free_values |= dict.fromkeys(frees)
        ends = {self.form.total, *self.form.summed, *self.form.kept, *self._updated()}
        outputs = [
            n for n in nodes if n in ends or any(u not in inside and u.op != "output" for u in n.users)
        ]
        names = self._names(params)
        styles = param_styles(
            names, params, inside, self.captured.tp_plan,
            lambda n: self._is(n, Dependence.MODEL), lambda n: self._is(n, Dependence.BATCH),
        )  # fmt: skip
        template = self._template(nodes, [params, frees, activations], outputs, styles)
        return Unit(
            name=piece_name(self.captured.calls, nodes),
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
        # where gradients go, and styles, which decide the cut: equal operations alone are not enough
        live = tuple(n in self.live for n in (*flat, *outputs))
        key = (structure_of(nodes, flat, outputs), tuple(map(len, inputs)), styles, live)
        if key not in self.known:
            self.known[key] = len(self.templates)
            graph = extracted(self.captured, nodes, flat, outputs)
            forward, once = training_flops(graph, live[: len(flat)], live[len(flat) :])
            self.templates.append(
                Template(
                    graph=graph,
                    inputs=tuple(spec_of(n.meta["val"]) for n in flat),
                    num_params=len(inputs[0]),
                    outputs=tuple(spec_of(n.meta["val"]) for n in outputs),
                    live_inputs=live[: len(flat)],
                    live_outputs=live[len(flat) :],
                    flops=forward,
                    model_flops=once,
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
        wanted = ancestors(outputs, lambda n: self._is(n, on) and not _is_known(n))
        return [n for n in self.depends if n in wanted and n.op != "placeholder"]

    def _side(self, on: Dependence, outputs: list[Node]) -> Side:
        nodes = self._made(outputs, on)
        inside = set(nodes)
        outer = list(dict.fromkeys((*reads_of(nodes), *(n for n in outputs if n not in inside))))
        graph = extracted(self.captured, nodes, outer, outputs)
        return Side(autocast_written_out(graph), self._names(outer), self._names(outputs))


def _is_known(node: Node) -> bool:
    """Whether a value is of the whole batch (where it depends on the batch alone)."""
    return node.target in (KNOWN, GATHERED)


def _gathering(node: Node) -> tuple[int, int, int] | None:
    if node.target is KNOWN:
        return None
    given: Any = node.args
    _, dim, outer, parts = given
    return int(dim), int(outer), int(parts)
