"""Capture: an `nn.Module` becomes one graph of pre-dispatch ATen ops with global shapes.

The forward runs once on fake tensors under `make_fx(pre_dispatch=True)`: composite ops (linear, layer norm,
attention) stay whole, and 96 layers take about a second where `torch.export` takes ten. The module is borrowed: it is
afterwards what it was. Assumed: control flow does not depend on data. What breaks it is a `CaptureError` with the
operator and the source line. A forward that writes into tensors is traced once more by torch's functionalization,
which turns writes into values (`pure_graph` says which writes it cannot express).
"""

import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch._subclasses.functional_tensor import FunctionalTensorMode, dispatch_functionalize
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as trees

from comms.errors import CaptureError, method_line
from partitioner.capture.batch_inputs import Batch, rebuilt, require_unchanged, tensors_of
from partitioner.capture.forwards.autograd_questions import AutogradQuestions, require_own, stand_in_for
from partitioner.capture.forwards.borrowed_module import REGISTERED, Borrowed, borrowed
from partitioner.capture.forwards.checkpoints import RECOMPUTE, Region, inlined_checkpoints, noted, num_nodes
from partitioner.capture.forwards.host_values import CalledWith, no_host_draws, operations_of
from partitioner.capture.forwards.keyed_random import FIRST_SAMPLE, KEY
from partitioner.capture.forwards.library_forms import keyed_draws, library_forms
from partitioner.capture.forwards.plain_forms import plain_forms
from partitioner.capture.forwards.step_loss import (
    LossFunction,
    loss_of_step,
    parameters_of,
    require_known_inputs,
    taken_by,
    unread,
)
from partitioner.capture.forwards.user_functions import recorded_functions
from partitioner.capture.forwards.viewed import Viewed
from partitioner.capture.products.tp_styles import own_plan
from partitioner.capture.pure_graph import (
    is_pure,
    make_pure,
    mark_modes,
    require_expressible,
    same_value,
)
from partitioner.capture.refused.buffer_forms import require_own_values, require_same_form
from partitioner.capture.refused.caught_errors import no_error_caught
from partitioner.capture.refused.refusals import (
    explaining,
    refuse_operator,
    refuse_unsupported,
    refused_calls,
)
from partitioner.capture.refused.shared_memory import require_own_memory
from partitioner.capture.source_lines import users_frames
from partitioner.capture.type_questions import spaces_of, types_as_in_training

NUM_MORE = 4  # forwards that must do the same


@dataclass
class ModuleCall:
    """The graph nodes that one call of a submodule produced: `meta["index"]` in start..stop-1."""

    path: str
    start: int
    stop: int = 0


@dataclass
class Captured:
    """The raw capture: placeholders are named `params:<name>`, `buffers:<name>`, `batch:<name>` in `names`.

    The graph returns the loss, then the new values of the buffers in `updated`, which the forward changes.
    """

    graph_module: torch.fx.GraphModule
    names: dict[str, str]
    updated: tuple[str, ...] = ()
    calls: list[ModuleCall] = field(default_factory=list)
    containers: frozenset[str] = frozenset()
    frozen: frozenset[str] = frozenset()
    tp_plan: Mapping[str, str] = field(default_factory=dict)


def trace_module(
    module: nn.Module,
    batch: Batch,
    loss_fn: LossFunction | None,
    tp_plan: Mapping[str, str] | None = None,
    fake_mode: FakeTensorMode | None = None,
    *,
    has_lines: bool = True,
    repeats: bool = False,
) -> Captured:
    """Trace a step's loss (see `loss_of_step`) to a graph that returns a scalar.

    `batch` may hold real or meta tensors: only shapes and dtypes are used. `tp_plan` maps module-name patterns to
    tensor-parallel styles (see `tp_styles.py`); without one the model's own is looked for. Graphs of one `fake_mode`
    can be put together. `repeats`: its forward is known to do the same each time, else that is tried. Raises
    CaptureError.
    """
    refuse_unsupported(module)
    require_known_inputs(module, batch, loss_fn)
    frozen = frozenset(name for name, p in module.named_parameters() if not p.requires_grad)
    with borrowed(module) as lent, no_host_draws(module):
        trace = _Trace(
            lent, batch, loss_fn, fake_mode or FakeTensorMode(allow_non_fake_inputs=True), has_lines
        )
        graph_module = trace.run(functional=False)
        noted = trace.called.noted if trace.called else ()
        lent.require_known("_parameters")
        require_own_values(lent)
        require_own(graph_module, trace.registered)
        for node in graph_module.graph.nodes:
            refuse_operator(node)
        if functional := not is_pure(graph_module.graph):
            require_expressible(graph_module.graph, trace.names(graph_module), frozen)
            graph_module = trace.run(functional=True)
        if not repeats:
            _require_repeatable(trace, graph_module, functional, noted)
        _require_read(trace, graph_module)
    captured = Captured(
        graph_module=graph_module,
        names=trace.names(graph_module),
        updated=trace.updated(graph_module),
        calls=trace.calls,
        containers=_containers(module),
        frozen=frozen,
        tp_plan=tp_plan or own_plan(module),
    )
    require_own_memory(module, tensors_of(batch), graph_module, captured.updated)
    make_pure(captured.graph_module, captured.names, trace.registered)
    return captured


def calls_of(
    module: nn.Module, batch: Batch, loss_fn: LossFunction | None, expected: Sequence[object] | None = None
) -> CalledWith:
    """What a forward of a borrowed module calls, on fake tensors, and where not `expected`. Raises CaptureError."""
    with borrowed(module) as lent, no_host_draws(module):
        trace = _Trace(lent, batch, loss_fn, FakeTensorMode(allow_non_fake_inputs=True), has_lines=False)
        called = CalledWith(expected, follows=True)
        trace.differs(called)
    called.require_end(type(module).__name__)
    return called


class _Trace:
    """A borrowed module and the fake tensors that stand for its own and the batch's."""

    def __init__(
        self,
        lent: Borrowed,
        batch: Batch,
        loss_fn: LossFunction | None,
        fake_mode: FakeTensorMode,
        has_lines: bool,
    ) -> None:
        self.lent, self.module, self.batch, self.loss_fn = lent, lent.module, batch, loss_fn
        self.fake_mode, self.has_lines = fake_mode, has_lines
        self.spaces = spaces_of(self.module, loss_fn)
        self.calls: list[ModuleCall] = []
        self.open_calls: list[ModuleCall] = []
        self.viewed = Viewed()
        self.called: CalledWith | None = None
        self.modules = frozenset(self.module.modules())
        self.questions = AutogradQuestions({}, self.modules, self.fake_mode)
        self.told: Sequence[Any] | None = None  # what an earlier forward was told of autograd
        self.regions: list[tuple[Region, int, int]] = []  # with the nodes that they start and stop at
        params, buffers = dict(self.module.named_parameters()), dict(self.module.named_buffers())
        self.registered = {id(v): f"params:{n}" for n, v in params.items()}
        self.registered |= {id(v): f"buffers:{n}" for n, v in buffers.items()}
        self.buffers = tuple(buffers)
        self.sources: dict[str, torch.Tensor] = {f"params:{n}": v for n, v in params.items()}
        self.sources |= {f"buffers:{n}": v for n, v in buffers.items()}
        number = torch.zeros((), dtype=torch.int64)
        given = {**tensors_of(batch), KEY: number, FIRST_SAMPLE: number}
        self.sources |= {f"batch:{n}": v for n, v in given.items()}
        like = {n: torch.empty_like(v.detach(), device="meta") for n, v in self.sources.items()}
        self.shapes = {n: (v.shape, v.stride(), v.dtype) for n, v in like.items()}
        self.with_gradient = {n for n, v in self.sources.items() if v.requires_grad and n[:7] != "buffers"}

    def run(self, *, functional: bool) -> torch.fx.GraphModule:
        """The graph of a forward; `functional`: without writes into tensors."""
        for held in (self.calls, self.open_calls, self.regions):
            held.clear()
        self.called = None if functional else CalledWith()
        self.told = self.questions.answers if functional else None
        values = self._fakes()
        forward: Callable[..., Any] = self._forward
        if functional:
            forward = dispatch_functionalize(forward, FunctionalTensorMode(pre_dispatch=True, export=True))
        # Code that asks whether it is traced knows fake tensors, but not the wrappers of functionalization.
        is_traced = patch.object(torch.jit, "is_tracing", _is_traced) if functional else nullcontext()
        with (
            explaining(self.module, self.open_calls),
            _recording(self.module, self.calls, self.open_calls),
            torch.enable_grad(),
            self.viewed.reshaped() if functional else self.viewed.noted(),
            users_frames() if self.has_lines else nullcontext(),
            is_traced,
        ):
            traced = make_fx(
                forward, pre_dispatch=True, tracing_mode="real", record_stack_traces=self.has_lines,
                _allow_non_fake_inputs=True, _error_on_data_dependent_ops=False,
            )(*values)  # fmt: skip
        outer_first = sorted(self.regions, key=lambda r: (r[1], -r[2]))
        for index, node in enumerate(traced.graph.nodes):
            node.meta["index"] = index
            if functional and node.target is torch.ops.aten.view.default:
                node.target = torch.ops.aten.reshape.default  # of what may lie in another order by now
            node.meta[RECOMPUTE] = tuple(r for r, start, stop in outer_first if start <= index < stop)
            node.meta["val"] = trees.tree_map_only(torch.Tensor, self._in_mode, node.meta.get("val"))
        if self.has_lines:
            self._mark_modules(list(traced.graph.nodes))
        mark_modes(traced.graph)
        return traced

    def _mark_modules(self, nodes: Sequence[torch.fx.Node]) -> None:
        for call in reversed(self.calls):  # inner ones end first
            for node in nodes[call.start : call.stop]:
                node.meta["module"] = call.path

    def _in_mode(self, value: torch.Tensor) -> torch.Tensor:
        """A value of the graph as a fake tensor of this trace: those made of numbers alone are real, or of no mode."""
        if isinstance(value, FakeTensor) and value.fake_mode is self.fake_mode:
            return value
        with self.fake_mode:
            return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="cpu")

    def _fakes(self) -> list[torch.Tensor]:
        """Stand-ins; from shapes, as torch takes ten times as long to make them from values."""
        with self.fake_mode:
            made = {
                n: torch.empty_strided(shape, stride, dtype=dtype, device="cpu")
                for n, (shape, stride, dtype) in self.shapes.items()
            }
        return [value.requires_grad_(name in self.with_gradient) for name, value in made.items()]

    def _forward(self, *flat: torch.Tensor) -> tuple[torch.Tensor, ...]:
        named = dict(zip(self.sources, flat, strict=True))
        if self.called:
            self.called.number(flat)
        for name, value in named.items():
            stand_in_for(self.sources[name], value, name.startswith("params:"))
        self.lent.replace({identity: named[name] for identity, name in self.registered.items()})
        stand_ins = {id(named[n]): n for n in self.registered.values()}
        self.questions = AutogradQuestions(stand_ins, self.modules, self.fake_mode, self.told)
        fakes = {n.partition(":")[2]: v for n, v in named.items() if n.startswith("batch:")}
        given, inputs = (rebuilt(self.batch, fakes) for _ in range(2))
        with (
            self.called or nullcontext(),
            recorded_functions(stand_ins),
            refused_calls(),
            plain_forms(),
            keyed_draws(named[f"batch:{KEY}"], named[f"batch:{FIRST_SAMPLE}"]),
            library_forms(),  # of what is drawn by keys
            inlined_checkpoints(self._noted),
            self.questions.asked(),
            types_as_in_training(self.spaces),
            no_error_caught(),
        ):
            loss = loss_of_step(self.module, self.loss_fn, inputs)
        require_unchanged(given, inputs)
        return loss, *(self.module.get_buffer(name) for name in self.buffers)

    @contextmanager
    def _noted(self, region: Region, run: Callable[[], object]) -> Iterator[None]:
        twice = (self.called or CalledWith()).twice(run)
        with self.questions.computed_again(region.is_reentrant), noted(self.regions, region), twice:
            yield

    def differs(self, called: CalledWith) -> str:
        """The first line that calls torch with other numbers when the forward runs once more, if any."""
        self.called, self.told = called, None
        with explaining(self.module, ()), torch.enable_grad():
            self._forward(*self._fakes())
        return self.called.where

    def repeats(self, noted: Sequence[object]) -> bool:
        """Whether further forwards are what a later one was: only the first was different, as with caches."""
        try:
            return not any(self.differs(CalledWith(noted)) for _ in range(NUM_MORE))
        except CaptureError:  # as where a count is an index
            return False

    def names(self, traced: torch.fx.GraphModule) -> dict[str, str]:
        """By the name of a placeholder, what it stands for."""
        placeholders = (node.name for node in traced.graph.nodes if node.op == "placeholder")
        return dict(zip(placeholders, self.sources, strict=True))

    def updated(self, traced: torch.fx.GraphModule) -> tuple[str, ...]:
        """Buffers that come out as other values than they went in; only these stay in the graph's output."""
        names, output = self.names(traced), next(iter(reversed(traced.graph.nodes)))
        loss, *after = output.args[0]
        kept = {
            name: node for name, node in zip(self.buffers, after, strict=True)
            if names.get(same_value(node).name) != f"buffers:{name}"
        }  # fmt: skip
        for name, node in kept.items():
            require_same_form(name, self.shapes[f"buffers:{name}"], node)
        output.args = ((loss, *kept.values()),)
        return tuple(kept)


def _is_traced() -> bool:
    """What code that asks is told: the truth, but for transformers' own question whether values are fake."""
    return sys._getframe(1).f_globals.get("__name__") == "transformers.utils.import_utils"


def _require_repeatable(
    trace: _Trace, traced: torch.fx.GraphModule, functional: bool, noted: Sequence[object]
) -> None:
    """Refuse a forward that depends on attributes that it changes, or on the host: once more, it must do the same."""
    changed = trace.lent.changed()
    trace.lent.require_known(*(REGISTERED if changed else ()))
    where = "" if changed else trace.differs(CalledWith(noted))
    if not changed and not where:
        return
    calls = list(trace.calls)
    trace.differs(second := CalledWith())  # the first may fill caches
    again = trace.run(functional=functional)
    trace.calls = calls
    if operations_of(again) == operations_of(traced) and trace.repeats(second.noted):
        counts = trace.lent.run_on()
        if not counts or trace.repeats(second.noted):
            if counts:
                said = f"the forward counts {counts[0]}, which stays as it was: steps run what was captured"
                warnings.warn(said, stacklevel=2)
            return
    problem = f"the forward depends on {changed[0]}, which it changes itself" if changed else (
        "the forward computes with another number each time, of which all steps would get the first")  # fmt: skip
    hint = "make it a buffer (a tensor), or an input of the model; what the forward copies (deepcopy), call as it is"
    raise CaptureError(problem, where or method_line(type(_owner(trace.module, changed[0])), "forward"), hint)


def _owner(module: nn.Module, attribute: str) -> nn.Module:
    """The submodule that holds an attribute, by its full name."""
    children = dict(module.named_modules())
    while attribute not in children:
        attribute = attribute.rpartition(".")[0]
    return children[attribute]


def _require_read(trace: _Trace, traced: torch.fx.GraphModule) -> None:
    """Refuse entries that only the loss function could read, and that it does not."""
    taken = taken_by(trace.module.forward, trace.batch, trace.loss_fn)
    names = trace.names(traced)
    for node in traced.graph.nodes:
        space, _, name = names.get(node.name, "").partition(":")
        root = name.partition(".")[0]
        if space == "batch" and root in trace.batch and root not in taken and not node.users:
            takes = ", ".join(p.name for p in parameters_of(trace.module.forward))
            raise unread(name, trace.batch, f"{type(trace.module).__name__}.forward({takes})")


def _containers(module: nn.Module) -> frozenset[str]:
    """Paths of the children of every list-like container: the candidates for repeated blocks."""
    return frozenset(
        f"{path}.{name}" if path else name
        for path, child in module.named_modules()
        if isinstance(child, nn.ModuleList | nn.Sequential)
        for name, _ in child.named_children()
    )


@contextmanager
def _recording(module: nn.Module, calls: list[ModuleCall], open_calls: list[ModuleCall]) -> Iterator[None]:
    """Note which nodes each submodule call adds, through forward hooks; `open_calls`: those that have not ended."""

    def enter(path: str) -> Callable[..., None]:
        def hook(*_: object) -> None:
            open_calls.append(ModuleCall(path, num_nodes()))

        return hook

    def leave(*_: object) -> None:
        call = open_calls.pop()
        call.stop = num_nodes()
        calls.append(call)

    handles: list[Any] = []
    try:
        for path, child in module.named_modules():
            handles.append(child.register_forward_pre_hook(enter(path)))
            handles.append(child.register_forward_hook(leave))
        yield
    finally:
        for handle in handles:
            handle.remove()
