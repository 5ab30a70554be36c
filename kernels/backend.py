"""Backend: a segment's ops become one TorchScript function.

Each op is written as `aten.mm.default(v0, v3)`; it is parsed (never evaluated), checked against the operator's
schema and put into a TorchScript graph. The interpreter then runs a whole segment without the Python lock, so two
simulated chips really use two cores, and frees every value at its last use. No fusion, no autodiff: what runs is
exactly what was traced, op by op, hence the same bytes in every runner.
"""

import ast
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

import kernels.ctc
import kernels.expert_products
import kernels.ops  # noqa: F401  (registers orchestrate::shard_slice)
from comms.errors import SegmentError

SegmentFunction: TypeAlias = Callable[..., tuple[torch.Tensor, ...]]
# c10::ScalarType
SCALAR_TYPES = {
    "u8": 0, "i8": 1, "i16": 2, "i32": 3, "i64": 4, "f16": 5, "f32": 6, "f64": 7, "c64": 9, "c128": 10, "b8": 11,
    "bf16": 15,
}  # fmt: skip
NAMED_CONSTANTS = {
    "torch.strided": 0, "torch.contiguous_format": 0, "torch.preserve_format": 1, "torch.channels_last": 2,
}  # fmt: skip
# Whoever traced them had operands that lie in order, where a chip may have transposed ones.
NEED_ORDER = {
    "native_group_norm", "native_group_norm_backward", "_weight_norm_interface_backward",
    "pdist", "_pdist_forward", "_pdist_backward", "view_as_complex",
}  # fmt: skip
OPERATOR_PARTS = 3


@dataclass(frozen=True, slots=True)
class OpCode:
    """What the backend needs of an op: its code, and how many results a tuple- or list-valued one has."""

    code: str
    num_outs: int
    is_tuple: bool


def compile_segment(
    name: str, num_inputs: int, ops: Sequence[OpCode], outputs: Sequence[int], device: str
) -> SegmentFunction:
    """A function from the segment's inputs to its outputs. Raises SegmentError."""
    graph = torch._C.Graph()
    tensor = torch._C.TensorType.get()
    values: list[Any] = []
    for _ in range(num_inputs):
        value = graph.addInput()
        value.setType(tensor)
        values.append(value)
    writer = _Writer(graph, values, device)
    for op in ops:
        writer.add(op)
    result = graph.create("prim::TupleConstruct", [values[i] for i in outputs], 1)
    graph.appendNode(result)
    result.output().setType(torch._C.TupleType([tensor] * len(outputs)))
    graph.registerOutput(result.output())
    try:
        return torch._C._create_function_from_graph("".join(c if c.isalnum() else "_" for c in name), graph)
    except RuntimeError as error:
        lines = str(error).strip().partition("candidates were")[0].split("\n")
        said = " ".join(line.strip() for line in lines if line.strip())
        hint = "write this part with other operators"
        raise SegmentError(f"TorchScript cannot compile {name}: {said}", name, hint) from error


@contextmanager
def one_thread_per_chip() -> Iterator[None]:
    """Run compiled segments with one intra-op thread, no gradients, no graph optimisation; restored at the end.

    Call it once in the main thread; worker threads call `prepare_thread`.
    """
    threads, optimize = torch.get_num_threads(), torch._C._get_graph_executor_optimize()
    torch._C._set_graph_executor_optimize(False)
    torch.set_num_threads(1)
    try:
        with torch.no_grad():
            yield
    finally:
        torch.set_num_threads(threads)
        torch._C._set_graph_executor_optimize(optimize)


def prepare_thread() -> None:
    """Per-thread settings: OpenMP's thread count, grad mode and the executor's optimisation are thread-local."""
    torch.set_num_threads(1)
    torch._C._set_graph_executor_optimize(False)
    torch.set_grad_enabled(False)


class _Writer:
    """Adds ops to a TorchScript graph, filling defaults from the operator's schema; `values` get their results."""

    def __init__(self, graph: Any, values: list[Any], device: str) -> None:
        self.graph, self.values, self.device = graph, values, device

    def add(self, op: OpCode) -> None:
        """Append one op to the graph and its result to the values."""
        self.values.append(self._result(op))

    def _result(self, op: OpCode) -> Any:
        call = parse(op.code)
        if isinstance(call.func, ast.Name):
            return self._python_call(call.func.id, call)
        schema = operator(op.code)._schema
        given = dict(zip((a.name for a in schema.arguments), call.args, strict=False))
        given |= {k.arg: k.value for k in call.keywords if k.arg}
        inputs = [self._argument(a, given.get(a.name), op.code) for a in schema.arguments]
        is_list = len(schema.returns) == 1 and str(schema.returns[0].type) == "List[Tensor]"
        node = self.graph.create(schema.name, inputs, len(schema.returns))
        self.graph.appendNode(node)
        if is_list:
            node.output().setType(torch._C.ListType.ofTensors())
            unpack = self.graph.create("prim::ListUnpack", [node.output()], op.num_outs)
            self.graph.appendNode(unpack)
            return list(unpack.outputs())
        return list(node.outputs()) if op.is_tuple else node.output()

    def _python_call(self, name: str, call: ast.Call) -> Any:
        if name != "getitem":
            raise SegmentError(f"{name} is not an operator of the backend")
        source, index = call.args
        assert (
            isinstance(source, ast.Name) and isinstance(index, ast.Constant) and isinstance(index.value, int)
        )
        return self.values[int(source.id[1:])][index.value]

    def _argument(self, argument: Any, given: ast.expr | None, code: str) -> Any:
        kind = str(argument.type)
        if given is None:
            if argument.default_value is None and "Optional" not in kind and not argument.has_default_value():
                raise SegmentError(f"{code}: argument {argument.name} is missing")
            return self._constant(argument.default_value, kind)
        if isinstance(given, ast.Name) and given.id[0] == "v" and given.id[1:].isdigit():
            value = self.values[int(given.id[1:])]
            name = operator(code)._schema.name.removeprefix("aten::")
            return self._in_order(value) if name in NEED_ORDER else value
        if isinstance(given, ast.List) and "Tensor" in kind:
            return self._tensor_list(given, kind)
        return self._constant(literal(given, self.device), kind)

    def _tensor_list(self, given: ast.List, kind: str) -> Any:
        items = [
            self.values[int(item.id[1:])] if isinstance(item, ast.Name) else self.graph.insertConstant(None)
            for item in given.elts
        ]
        tensor = torch._C.TensorType.get()
        is_optional = "Optional[Tensor]" in kind
        return self._list(items, torch._C.OptionalType(tensor) if is_optional else tensor)

    def _truth(self, value: bool) -> Any:
        """A truth value as a tensor of no dims, which is promoted as one: no schema takes it as a number."""
        given = (int(value), SCALAR_TYPES["b8"], None, torch.device(self.device), None)
        node = self.graph.create("aten::scalar_tensor", [self.graph.insertConstant(v) for v in given], 1)
        self.graph.appendNode(node)
        return node.output()

    def _in_order(self, value: Any) -> Any:
        """The same elements, contiguous; nothing is copied where they are."""
        node = self.graph.create("aten::contiguous", [value, self.graph.insertConstant(0)], 1)
        self.graph.appendNode(node)
        return node.output()

    def _list(self, items: list[Any], element: Any) -> Any:
        node = self.graph.create("prim::ListConstruct", items, 1)
        self.graph.appendNode(node)
        node.output().setType(torch._C.ListType(element))
        return node.output()

    def _constant(self, value: object, kind: str) -> Any:
        if isinstance(value, list) and not value:
            return self._list([], torch._C.FloatType.get() if "float" in kind else torch._C.IntType.get())
        if "float" in kind:
            if isinstance(value, int) and not isinstance(value, bool):
                value = float(value)
            elif isinstance(value, list):
                value = [float(v) for v in value]
        if isinstance(value, bool) and kind == "Tensor":
            return self._truth(value)
        elif isinstance(value, bool) and kind in ("number", "Optional[number]"):
            value = int(value)
        if kind in ("List[int]", "Optional[List[int]]") and isinstance(value, int):
            value = [value]
        return self.graph.insertConstant(value)


def parse(code: str) -> ast.Call:
    """The call that an op's code is. Raises SegmentError."""
    try:
        call = ast.parse(code, mode="eval").body
    except SyntaxError as error:
        raise SegmentError(f"malformed op {code!r}") from error
    if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name | ast.Attribute):
        raise SegmentError(f"malformed op {code!r}")
    return call


def operator(code: str) -> Any:
    """The operator that an op calls. Raises SegmentError."""
    path = code.partition("(")[0].split(".")
    if len(path) != OPERATOR_PARTS:
        raise SegmentError(f"{'.'.join(path)} is not namespace.name.overload")
    space, name, overload = path
    try:
        return getattr(getattr(getattr(torch.ops, space), name), overload)
    except AttributeError as error:
        raise SegmentError(f"unknown operator {space}.{name}.{overload}") from error


def literal(node: ast.expr, device: str) -> object:
    """A literal of the op language: numbers, strings, lists, `dtype.f32`, `device`, `inf`, `nan`, `complex(0, 1)`."""
    match node:
        case ast.Constant(value=value):
            return value
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -literal(operand, device)  # type: ignore[operator]
        case ast.List(elts=elts) | ast.Tuple(elts=elts):
            return [literal(e, device) for e in elts]
        case ast.Name(id="device"):
            return torch.device(device)
        case ast.Name(id="inf" | "nan" as number):
            return float(number)
        case ast.Call(func=ast.Name(id="complex"), args=[real, imag], keywords=[]):
            return complex(*(float(literal(part, device)) for part in (real, imag)))  # type: ignore[arg-type]
        case ast.Attribute(value=ast.Name(id="dtype"), attr=short):
            return SCALAR_TYPES[short]
        case ast.Attribute(value=ast.Name(id="torch"), attr=attr):
            return NAMED_CONSTANTS[f"torch.{attr}"]
    raise SegmentError(f"{ast.unparse(node)} is not a literal of the op language")
