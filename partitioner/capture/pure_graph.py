"""From what was traced to a graph of values: no writes, no mode switches, no tensors that hang in the air.

Writes become values by torch's functionalization. It cannot express three of them, which are refused here: into a batch
(the user's own tensors would stay as they are), into a parameter, and behind autograd's back (through `detach`, `.data`
or under `no_grad`) into a value that has a gradient: autograd would pass the gradient on, a graph of values would not.
A fourth it can, but torch does it once more in the backward: out of a checkpointed part (running statistics too).

What a node was under is kept in its `meta`: "no_grad", and "autocast" as (device type, dtype, is enabled).
"""

import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.func import functionalize
from torch.fx import Node
from torch.fx.experimental.proxy_tensor import make_fx

from comms.errors import CaptureError
from partitioner.capture.captured_graph import op_name, operand
from partitioner.capture.forwards.checkpoints import regions_of
from partitioner.capture.source_lines import source_line

LARGEST_LITERAL = 64
aten = torch.ops.aten
PLAIN_DTYPES = (
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.complex64,
    torch.complex128,
)
# operators that return their operand where nothing is to be done
MAYBE_VIEWS = {"reshape", "contiguous", "to", "flatten", "expand_as"}


NORMS = (aten.batch_norm.default, aten.instance_norm.default)  # write into running statistics, unsaid


def mark_modes(graph: torch.fx.Graph) -> None:
    """Note in every node's meta what it runs under, and drop what switches it."""
    for node in reversed(note_modes(graph)):
        graph.erase_node(node)


def note_modes(graph: torch.fx.Graph) -> list[Node]:
    """Note in every node's meta what it runs under; the nodes that switch it."""
    is_off, contexts, switches = False, dict[Node, Any](), list[Node]()
    for node in graph.nodes:
        name = getattr(node.target, "__name__", "")
        switches.append(node)
        if node.target is torch._C._set_grad_enabled:
            is_off = not node.args[0]
        elif name == "_enter_autocast":
            contexts[node] = tuple(node.args[:3])
        elif name == "_exit_autocast":
            del contexts[operand(node, 0)]
        else:
            switches.pop()
            node.meta |= {"no_grad": is_off, "autocast": next(reversed(contexts.values()), None)}
    return switches


@contextmanager
def modes_of(node: Node) -> Iterator[None]:
    """What a node is under (see `mark_modes`), for computing it or its likes."""
    with ExitStack() as modes:
        if node.meta.get("no_grad"):
            modes.enter_context(torch.no_grad())
        if autocast := node.meta.get("autocast"):
            device, dtype, enabled = autocast
            modes.enter_context(torch.autocast(device, dtype, enabled, cache_enabled=False))
        yield


@contextmanager
def unfused() -> Iterator[None]:
    """Recurrent layers as products: oneDNN's kernel is not counted nor cut, and fails where a state is unused."""
    before = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(before)


class UnderModes(torch.fx.Interpreter):
    """Runs each operation under what it was captured under."""

    def run_node(self, n: Node) -> Any:
        """A node's result."""
        with modes_of(n):
            return super().run_node(n)


def autocast_written_out(module: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """The graph with the casts that autocast makes, for where operations run without it."""
    if not any((node.meta.get("autocast") or [False])[-1] for node in module.graph.nodes):
        return module
    places = [n.meta["val"] for n in module.graph.nodes if n.op == "placeholder"]
    with FakeTensorMode(allow_non_fake_inputs=True):
        values = [torch.empty_like(value, device="cpu") for value in places]
    return trace_values(UnderModes(module).run, values)


def is_pure(graph: torch.fx.Graph) -> bool:
    """Whether no operation writes into its operands."""
    return not any(map(_is_write, graph.nodes))


def _is_write(node: Node) -> bool:
    if node.target in NORMS:
        return node.args[3] is not None and bool(node.args[5])
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def trace_values(function: Callable[..., Any], values: Sequence[torch.Tensor]) -> torch.fx.GraphModule:
    """A function of (fake) tensors as a graph below autograd, without the writes of operators into what they make."""
    traced = make_fx(function, tracing_mode="real", _allow_non_fake_inputs=True)(*values)
    if not is_pure(traced.graph):
        traced = make_fx(functionalize(traced), tracing_mode="real", _allow_non_fake_inputs=True)(*values)
    _conjugate_numbers(traced.graph)
    return traced


def _conjugate_numbers(graph: torch.fx.Graph) -> None:
    """Gradients conjugate the numbers of the forward as if they were tensors."""
    for node in list(graph.nodes):
        if op_name(node.target) in ("_conj", "clone") and isinstance(number := node.args[0], complex):
            new = number if op_name(node.target) == "clone" else number.conjugate()
            for user in list(node.users):
                user.args, user.kwargs = torch.fx.node.map_arg(
                    (user.args, user.kwargs), partial(_instead, old=node, new=new)
                )
            graph.erase_node(node)


def _instead(node: Node, *, old: Node, new: object) -> Any:
    return new if node is old else node


def with_gradient(graph: torch.fx.Graph, trained: Collection[Node]) -> set[Node]:
    """The nodes through which a gradient reaches one of the parameters `trained`, as autograd would record them."""
    found: set[Node] = set(trained)
    for node in graph.nodes:
        name = op_name(node.target)
        stops = node.meta.get("no_grad") or name in ("detach", "detach_")
        stops = stops or name.endswith("_like") or name.startswith("new_")  # only the shape is read
        is_result = name == "getitem" and "native_batch_norm" in op_name(operand(node, 0).target)
        stops = stops or (is_result and node.args[1] != 0)  # statistics, also the running ones
        reached = node.op == "call_function" and not stops and any(n in found for n in node.all_input_nodes)
        if reached and is_float(node):
            found.add(node)
    return found


def is_float(node: Node) -> bool:
    """Whether a node's value (one of its values) is made of floating-point or complex numbers."""
    value = node.meta.get("val")
    values = value if isinstance(value, tuple | list) else [value]
    return any(isinstance(v, torch.Tensor) and v.dtype in PLAIN_DTYPES for v in values)


def same_value(node: Node) -> Node:
    """What a node only passes on: an operator that had nothing to do returns its operand."""
    while (
        op_name(node.target) in ("to", "alias", "contiguous")
        and node.meta["val"].dtype == operand(node, 0).meta["val"].dtype
    ):
        node = operand(node, 0)
    return node


def require_expressible(graph: torch.fx.Graph, names: Mapping[str, str], frozen: Collection[str]) -> None:
    """Refuse the writes that values cannot express, in a graph as it was traced."""
    sources = {node: names[node.name].partition(":") for node in graph.nodes if node.op == "placeholder"}
    trained = [
        n
        for n, (space, _, name) in sources.items()
        if space == "params" and name not in frozen and is_float(n)
    ]
    has_grad = with_gradient(graph, trained)
    for node in filter(_is_write, graph.nodes):
        for base in _written(node):
            _require_expressible(node, base, sources, has_grad)
            if node.target in NORMS:
                _require_one_mode(node, base)


def _require_one_mode(norm: Node, mean: Node) -> None:
    """Refuse statistics that another norm read before this one changes them: torch's backward reads them afterwards."""
    for other in mean.users:
        if other.target in NORMS and not _is_write(other) and other.meta["index"] < norm.meta["index"]:
            problem = "a norm is used in eval mode, and then in train mode, in one forward"
            raise CaptureError(problem, source_line(norm), "use it in one mode, or the other way round")


def _written(node: Node) -> list[Node]:
    """The operands that an operation writes into."""
    if node.target in NORMS:
        return [operand(node, 3)]  # the running mean; the variance goes with it
    arguments = node.target._schema.arguments  # type: ignore[union-attr]
    given = dict(zip((a.name for a in arguments), node.args, strict=False)) | node.kwargs
    written = [given.get(a.name) for a in arguments if a.alias_info is not None and a.alias_info.is_write]
    flat = (v for value in written for v in (value if isinstance(value, list | tuple) else [value]))
    return [v for v in flat if isinstance(v, Node)]


def _require_expressible(
    node: Node, base: Node, sources: Mapping[Node, tuple[str, str, str]], has_grad: Collection[Node]
) -> None:
    """Refuse the write of `node` into `base` where values cannot express it."""
    is_hidden = bool(node.meta["no_grad"])
    while base.op != "placeholder" and _shares_memory(base):
        is_hidden = is_hidden or op_name(base.target) == "detach"
        base = operand(base, 0)
    space, _, name = sources.get(base, ("", "", ""))
    if space in ("batch", "params"):
        kind = {"batch": "input", "params": "parameter"}[space]
        problem, hint = f"{node.target} writes into the {kind} {name}", "work on a clone of it"
        if op_name(node.target) == "embedding_renorm_":
            hint = "leave max_norm out of the embedding, or scale the rows that are looked up"
        raise CaptureError(problem, source_line(node), hint)
    if base.op == "get_attr" and not _is_made_inside(base):
        problem = f"{node.target} writes into a tensor that is neither parameter nor buffer of the model"
        raise CaptureError(problem, source_line(node), "register it as a buffer of the model")
    if set(regions_of(node)) - set(regions_of(base)):
        problem = f"{node.target} inside a checkpoint writes into what lies outside, which torch does twice"
        raise CaptureError(problem, source_line(node), "write outside of the checkpoint, or into a clone")
    if is_hidden and base in has_grad:
        problem = f"{node.target} changes a value behind autograd's back"
        raise CaptureError(problem, source_line(node), "write into a clone, outside detach and no_grad")


def _is_made_inside(constant: Node) -> bool:
    """Whether it can only be a parameter that the forward makes and starts, as where it makes a module."""
    value = getattr(constant.graph.owning_module, str(constant.target), None)
    return isinstance(value, torch.nn.Parameter) and not any(user.users for user in constant.users)


def _shares_memory(node: Node) -> bool:
    if not isinstance(node.target, torch._ops.OpOverload):
        return getattr(node.target, "__name__", "") == "getitem"
    return node.target.is_view or node.target._schema.is_mutable or op_name(node.target) in MAYBE_VIEWS


def make_pure(module: torch.fx.GraphModule, names: dict[str, str], registered: Mapping[int, str]) -> None:
    """Drop what only guards, and give tensors that the code holds a place: a parameter's or buffer's, or in the code.

    `registered`: by the identity of a tensor that the module registers, what it is in `names`.
    """
    graph = module.graph
    places = {name: node for node in graph.nodes if node.op == "placeholder" for name in (names[node.name],)}
    for node in list(graph.nodes):
        if node.op == "call_function" and "_assert" in str(node.target):
            graph.erase_node(node)
        elif node.op == "get_attr":
            value = getattr(module, str(node.target))
            if getattr(value, "layout", torch.strided) is not torch.strided:
                raise CaptureError(
                    "the forward holds a sparse tensor", source_line(node), "make it dense: to_dense()"
                )
            known = places.get(registered.get(id(value), ""))
            if known is None:
                _inline_literal(node, value)
            else:
                node.replace_all_uses_with(known)
                graph.erase_node(node)
        elif node.target is aten.copy.default:
            _write_out(node)
        elif _is_idle_dropout(node):
            node.replace_all_uses_with(operand(node, 0))
            graph.erase_node(node)
    graph.eliminate_dead_code()


def inline_numbers(module: torch.fx.GraphModule) -> None:
    """Small tensors that a graph holds become operators in it. Raises CaptureError for large ones."""
    for node in list(module.graph.nodes):
        if node.op == "get_attr":
            _inline_literal(node, getattr(module, str(node.target)))


def _inline_literal(node: Node, value: object) -> None:
    """A small tensor made of Python numbers becomes operators; a large one must be a buffer."""
    if not isinstance(value, torch.Tensor) or value.numel() > LARGEST_LITERAL:
        raise CaptureError("the forward uses a tensor that is neither parameter nor buffer", source_line(node),
                           "register it as a buffer of the module")  # fmt: skip
    graph = node.graph
    with graph.inserting_before(node):
        numbers = [_made(node, aten.scalar_tensor.default, (n.item(),), {"dtype": value.dtype}, n)
                   for n in value.flatten()]  # fmt: skip
        whole = (
            numbers[0]
            if numbers
            else _made(node, aten.zeros.default, ([0],), {"dtype": value.dtype}, value.flatten())
        )
        if value.dim() != 0:
            flat = _made(node, aten.stack.default, (numbers,), {}, value.flatten()) if numbers else whole
            whole = _made(node, aten.view.default, (flat, list(value.shape)), {}, value)
    node.replace_all_uses_with(whole)
    graph.erase_node(node)


def _made(origin: Node, target: Any, args: Any, kwargs: Any, value: torch.Tensor) -> Node:
    made = origin.graph.call_function(target, args, kwargs)
    like = next(iter(origin.graph.nodes)).meta.get("val")  # of a placeholder
    mode = like.fake_mode if isinstance(like, FakeTensor) else nullcontext()
    with mode:
        made.meta = dict(origin.meta) | {"val": torch.empty(value.shape, dtype=value.dtype)}
    return made


def _write_out(node: Node) -> None:
    """What a tensor holds once another is copied into it: that one, in its shape and dtype (autograd has no rule)."""
    target, source, graph = operand(node, 0), operand(node, 1), node.graph
    like, value = target.meta["val"], source.meta["val"]
    with graph.inserting_before(node), like.fake_mode:
        if value.dtype != like.dtype:
            source = graph.call_function(aten._to_copy.default, (source,), {"dtype": like.dtype})
            source.meta = dict(node.meta) | {"val": value.to(like.dtype)}
        if value.shape != like.shape or node.meta["no_grad"]:  # which keeps gradients from what was copied
            shape = () if value.shape == like.shape else (list(like.shape),)
            source = graph.call_function(
                aten.expand.default if shape else aten.detach.default, (source, *shape)
            )
            source.meta = dict(node.meta)
    node.replace_all_uses_with(source)
    graph.erase_node(node)


def _is_idle_dropout(node: Node) -> bool:
    return node.target is aten.dropout.default and bool(node.args[1] == 0 or not node.args[2])


@contextmanager
def quiet_torch() -> Iterator[None]:
    """What torch logs of a guess that does not work out is not the user's business."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)
