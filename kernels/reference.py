"""The plain way to run a segment: its operators one by one from Python. Slow, obvious, and the backends' oracle."""

import ast
from collections.abc import Sequence

import torch

import kernels.ops  # noqa: F401  (registers orchestrate::shard_slice)
from kernels.backend import OpCode, literal, operator, parse

DTYPE_BY_SCALAR_TYPE = {
    0: torch.uint8, 1: torch.int8, 2: torch.int16, 3: torch.int32, 4: torch.int64, 5: torch.float16,
    6: torch.float32, 7: torch.float64, 9: torch.complex64, 10: torch.complex128, 11: torch.bool, 15: torch.bfloat16,
}  # fmt: skip


def interpret_segment(
    ops: Sequence[OpCode], outputs: Sequence[int], device: str, inputs: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, ...]:
    """The segment's results for `inputs`."""
    values: list[object] = list(inputs)
    for op in ops:
        values.append(_result(op, values, device))
    return tuple(values[i] for i in outputs)  # type: ignore[misc]


def failing_operator(ops: Sequence[OpCode], device: str, inputs: Sequence[torch.Tensor]) -> tuple[str, str]:
    """The first operator that raises for `inputs`, and what it says; empty where none does."""
    values: list[object] = list(inputs)
    for op in ops:
        try:
            values.append(_result(op, values, device))
        except (Exception, SystemExit) as error:  # an operator of the user's may end with anything
            said = str(error).strip().partition("\n")[0] or type(error).__name__
            return op.code.partition("(")[0], said
    return "", ""


def _result(op: OpCode, values: Sequence[object], device: str) -> object:
    call = parse(op.code)
    args = [_value(arg, values, device) for arg in call.args]
    named = {k.arg: _value(k.value, values, device) for k in call.keywords if k.arg}
    if isinstance(call.func, ast.Name):
        source, index = args
        return source[index]  # type: ignore[index]
    return operator(op.code)(*args, **named)


def _value(node: ast.expr, values: Sequence[object], device: str) -> object:
    match node:
        case ast.Name(id=name) if name[0] == "v" and name[1:].isdigit():
            return values[int(name[1:])]
        case ast.List(elts=elts):
            return [_value(e, values, device) for e in elts]
        case ast.Attribute(value=ast.Name(id="dtype")):
            return DTYPE_BY_SCALAR_TYPE[literal(node, device)]  # type: ignore[index]
        case ast.Attribute(value=ast.Name(id="torch"), attr=attr):
            return getattr(torch, attr)
    return literal(node, device)
