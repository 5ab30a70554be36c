"""Capture: an `nn.Module` becomes one graph of pre-dispatch ATen ops with global shapes.

The forward runs once on fake tensors under `make_fx(pre_dispatch=True)`: composite ops (linear, layer norm,
attention) stay whole, and 96 layers take about a second where `torch.export` takes ten. Assumed: control flow does
not depend on data, buffers are not updated in the forward, dropout is off. Each assumption that a model breaks is
a `CaptureError` with the operator and the source line.
"""

import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import get_proxy_mode, make_fx
from torch.nn.utils.stateless import _reparametrize_module

from comms.errors import CaptureError
from partitioner.capture.captured_graph import operand

LossFunction = Callable[..., torch.Tensor]
LARGEST_LITERAL = 64
aten = torch.ops.aten
NAMESPACES = ("params", "buffers", "batch")


@dataclass
class ModuleCall:
    """The graph nodes that one call of a submodule produced: `meta["index"]` in start..stop-1."""

    path: str
    start: int
    stop: int = 0


@dataclass
class Captured:
    """The raw capture: placeholders are named `params:<name>`, `buffers:<name>`, `batch:<name>` in `names`."""

    graph_module: torch.fx.GraphModule
    names: dict[str, str]
    calls: list[ModuleCall] = field(default_factory=list)
    containers: frozenset[str] = frozenset()
    frozen: frozenset[str] = frozenset()
    tp_plan: Mapping[str, str] = field(default_factory=dict)


def trace_module(
    module: nn.Module,
    batch: Mapping[str, torch.Tensor],
    loss_fn: LossFunction | None,
    tp_plan: Mapping[str, str] | None = None,
) -> Captured:
    """Trace `module(**batch)` (then `loss_fn(output, **batch)`, if given) to a graph that returns a scalar.

    `batch` may hold real or meta tensors: only shapes and dtypes are used. `tp_plan` maps module-name patterns to
    tensor-parallel styles (see `tp_styles.py`); without one the model's own is looked for. Raises CaptureError.
    """
    _refuse_unsupported(module)
    calls: list[ModuleCall] = []
    values = _fake_inputs(module, batch)

    def forward(*flat: torch.Tensor) -> torch.Tensor:
        named = dict(zip(values, flat, strict=True))
        groups = {
            space: {k[len(space) + 1 :]: v for k, v in named.items() if k.startswith(space + ":")}
            for space in NAMESPACES
        }
        with _reparametrize_module(module, groups["params"] | groups["buffers"], tie_weights=True):
            output = module(**groups["batch"])
            _require_same_buffers(module, groups["buffers"])
        return scalar_loss(loss_fn(output, **groups["batch"]) if loss_fn else output)

    with _recording(module, calls), torch.enable_grad(), _explaining(module):
        traced = make_fx(
            forward,
            pre_dispatch=True,
            tracing_mode="real",
            _allow_non_fake_inputs=True,
            _error_on_data_dependent_ops=False,
        )(*values.values())
    for index, node in enumerate(traced.graph.nodes):
        node.meta["index"] = index
    placeholders = [node.name for node in traced.graph.nodes if node.op == "placeholder"]
    captured = Captured(
        graph_module=traced,
        names=dict(zip(placeholders, values, strict=True)),
        calls=calls,
        containers=_containers(module),
        frozen=frozenset(name for name, p in module.named_parameters() if not p.requires_grad),
        tp_plan=tp_plan or _tensor_parallel_plan(module),
    )
    _normalise(captured)
    return captured


def scalar_loss(output: object) -> torch.Tensor:
    """The scalar a model returns: a tensor, `.loss`, `["loss"]` or the first of a tuple."""
    found: object = output
    if isinstance(output, Mapping) and "loss" in output:
        found = output["loss"]
    elif isinstance(loss := getattr(output, "loss", None), torch.Tensor):
        found = loss
    elif isinstance(output, tuple | list) and output:
        found = output[0]
    if not isinstance(found, torch.Tensor) or found.numel() != 1:
        got = tuple(found.shape) if isinstance(found, torch.Tensor) else type(found).__name__
        raise CaptureError(
            f"the model returns {got}, not a scalar loss",
            type(output).__name__,
            "return the loss (or an object with .loss), or give loss_fn",
        )
    return found.reshape(())


def _refuse_unsupported(module: nn.Module) -> None:
    for name, child in module.named_modules():
        where = f"{name or type(module).__name__} ({type(child).__name__})"
        if isinstance(child, nn.modules.dropout._DropoutNd) and child.p > 0 and module.training:
            raise CaptureError("dropout is active", where, "set its probability to 0 (or call model.eval())")
        tracks = isinstance(child, nn.modules.batchnorm._NormBase) and child.track_running_stats
        if tracks and module.training:
            raise CaptureError(
                "batch norm updates running statistics in the forward", where,
                "use group or layer norm, or put the model in eval mode",
            )  # fmt: skip


def _require_same_buffers(module: nn.Module, given: Mapping[str, torch.Tensor]) -> None:
    for name, value in given.items():
        if module.get_buffer(name) is not value:
            raise CaptureError("the forward replaces a buffer", name, "keep state out of the forward")


def _fake_inputs(module: nn.Module, batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    sources: dict[str, torch.Tensor] = {}
    sources |= {f"params:{name}": value for name, value in module.named_parameters()}
    sources |= {f"buffers:{name}": value for name, value in module.named_buffers()}
    sources |= {f"batch:{name}": value for name, value in batch.items()}
    with FakeTensorMode(allow_non_fake_inputs=True):
        return {
            name: torch.empty(value.shape, dtype=value.dtype, device="cpu") for name, value in sources.items()
        }


def _containers(module: nn.Module) -> frozenset[str]:
    """Paths of the children of every list-like container: the candidates for repeated blocks."""
    return frozenset(
        f"{path}.{name}" if path else name
        for path, child in module.named_modules()
        if isinstance(child, nn.ModuleList | nn.Sequential)
        for name, _ in child.named_children()
    )


def _tensor_parallel_plan(module: nn.Module) -> Mapping[str, str]:
    """The model's own plan, module-name pattern to style: ours (`tp_plan`) or Hugging Face's."""
    for name in ("_tp_plan", "tp_plan"):
        plan = getattr(module, name, None)
        if isinstance(plan, Mapping) and plan:
            return dict(plan)
    return {}


@contextmanager
def _recording(module: nn.Module, calls: list[ModuleCall]) -> Iterator[None]:
    """Note which nodes each submodule call adds, through forward hooks."""
    open_calls: list[ModuleCall] = []

    def num_nodes() -> int:
        mode = get_proxy_mode()
        assert mode is not None
        return len(mode.tracer.graph.nodes)

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


@contextmanager
def _explaining(module: nn.Module) -> Iterator[None]:
    """Turn a failure inside the trace into a CaptureError that names the operator and the user's line."""
    try:
        yield
    except CaptureError:
        raise
    except Exception as error:
        operator = str(getattr(error, "func", "")) or str(error).strip().split("\n")[0][:200]
        raise CaptureError(
            f"cannot capture {type(module).__name__}: {type(error).__name__} at {operator}",
            _user_line(error),
            "shapes and branches must not depend on tensor values; move such code out of forward",
        ) from error


def _user_line(error: BaseException) -> str:
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "/torch/" not in f.filename]
    frame = frames[-1]
    return f"{frame.filename}:{frame.lineno} ({frame.line})"


def _normalise(captured: Captured) -> None:
    """Drop guards and mode switches, mark no-grad regions, turn in-place ops into pure ones."""
    graph = captured.graph_module.graph
    grad_enabled = True
    for node in list(graph.nodes):
        if node.target is torch._C._set_grad_enabled:
            grad_enabled = bool(node.args[0])
            graph.erase_node(node)
            continue
        node.meta["no_grad"] = not grad_enabled
        if node.op == "call_function" and "_assert" in str(node.target):
            graph.erase_node(node)
        elif node.op == "get_attr":
            _inline_literal(captured, node)
        elif node.op == "call_function" and "autocast" in str(node.target):
            _drop_autocast(node)
        elif _is_idle_dropout(node):
            node.replace_all_uses_with(operand(node, 0))
            graph.erase_node(node)
        elif isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable:
            _make_pure(captured, node)
    graph.eliminate_dead_code()


def _shares_memory(node: torch.fx.Node) -> bool:
    is_view = isinstance(node.target, torch._ops.OpOverload) and node.target.is_view
    return is_view or getattr(node.target, "__name__", "") == "getitem"


def _inline_literal(captured: Captured, node: torch.fx.Node) -> None:
    """A small tensor made of Python numbers becomes operators; a large one must be a buffer."""
    value = getattr(captured.graph_module, str(node.target))
    if not isinstance(value, torch.Tensor) or value.numel() > LARGEST_LITERAL:
        raise CaptureError("a tensor is created from Python numbers in the forward", node.name,
                           "make it a buffer of the module")  # fmt: skip
    graph = node.graph
    with graph.inserting_before(node):
        numbers = [_made(graph, node, aten.scalar_tensor.default, (n.item(),), {"dtype": value.dtype}, n)
                   for n in value.flatten()]  # fmt: skip
        whole = numbers[0]
        if value.dim():
            flat = _made(graph, node, aten.stack.default, (numbers,), {}, value.flatten())
            whole = _made(graph, node, aten.view.default, (flat, list(value.shape)), {}, value)
    node.replace_all_uses_with(whole)
    graph.erase_node(node)


def _made(
    graph: torch.fx.Graph, origin: torch.fx.Node, target: Any, args: Any, kwargs: Any, value: torch.Tensor
) -> torch.fx.Node:
    made = graph.call_function(target, args, kwargs)
    made.meta = dict(origin.meta) | {"val": value.clone()}
    return made


def _is_idle_dropout(node: torch.fx.Node) -> bool:
    return node.target is torch.ops.aten.dropout.default and bool(node.args[1] == 0 or not node.args[2])


def _drop_autocast(node: torch.fx.Node) -> None:
    is_enter = "enter" in str(node.target)
    if is_enter and len(node.args) > 2 and node.args[2]:
        raise CaptureError("the model enables autocast itself", node.name, "set the job's dtype instead")
    if is_enter:
        for user in list(node.users):
            user.graph.erase_node(user)
        node.graph.erase_node(node)


def _make_pure(captured: Captured, node: torch.fx.Node) -> None:
    """`y = relu_(x)` becomes `y = relu(x)`, later uses of x see y; refused where x is an input or a view."""
    target = node.args[0]
    assert isinstance(target, torch.fx.Node) and isinstance(node.target, torch._ops.OpOverload)
    name = node.target._schema.name.removeprefix("aten::")
    pure = getattr(torch.ops.aten, name.removesuffix("_"), None) if name.endswith("_") else None
    overload = getattr(pure, node.target._overloadname, None) if pure else None
    # a write must not reach what shares the memory: neither what `target` views nor earlier views of it
    is_view = _shares_memory(target) or any(_shares_memory(user) for user in target.users if user is not node)
    if overload is None or target.op == "placeholder" or is_view:
        source = captured.names.get(target.name, target.name)
        raise CaptureError(
            f"operator {node.target} changes {source} in place", str(node.meta.get("stack_trace", node.name)),
            "use the out-of-place form of the operator",
        )  # fmt: skip
    node.target = overload
    seen = False
    for later in captured.graph_module.graph.nodes:
        if seen:
            later.replace_input_with(target, node)
        seen = seen or later is node
