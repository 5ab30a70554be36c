"""Text form of a Program: one line per instruction, operation and tensor; reads back to an equal Program.

    role 0
      t0 = param w : f32[8,4] source=w
      body forward
        0 recv t4 from 1
        1 wait t4
        2 compute s3 t4 t0 -> t5
        3 all_reduce sum tp t5 -> t6
      schedule step: forward(0) forward(1)

Words with odd characters are written as JSON strings; blank lines and lines that start with # are skipped.
Names and numbers are read, never evaluated: an operation's code stays a string. Validity is not judged here: see
`static_check.py`.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass

from comms.errors import ProgramError
from partitioner.program.instructions import fail, instruction_text, read_id, read_instruction, read_number
from partitioner.program.program import (
    DTYPE_BYTES,
    VERSION,
    Body,
    Call,
    Operation,
    Program,
    Role,
    Segment,
    Tensor,
    TensorKind,
    TensorSpec,
)

LINE_WIDTH = 110
BARE = re.compile(r"[A-Za-z0-9_.:+/-]+")
TOKEN = re.compile(r'(?:[^\s"]|"(?:[^"\\]|\\.)*")+')
SPEC = re.compile(r"([a-z]+[0-9]+)\[([0-9,]*)\]")
CALL = re.compile(r'("(?:[^"\\]|\\.)*"|[^\s"()]+)\((\d+)\)')
COSTS = re.compile(r"(.*) flops=(\d+) read=(\d+) written=(\d+)")
KINDS = tuple(TensorKind)


def to_text(program: Program) -> str:
    """The whole Program; equal Programs give equal text."""
    return "\n".join(_program_lines(program)) + "\n"


def from_text(text: str) -> Program:
    """Inverse of `to_text`. ProgramError names the line that is not understood."""
    cursor = _Cursor.over(text)
    try:
        return _read_program(cursor)
    except ValueError as error:
        where = f"line {cursor.number}"
        raise ProgramError(f"{where}: {error}", where, "see the program.txt of a run") from error


def _word(text: str) -> str:
    return text if BARE.fullmatch(text) else json.dumps(text)


def _program_lines(program: Program) -> Iterator[str]:
    yield f"program v{VERSION}"
    yield " ".join(["axes", *(f"{axis}={size}" for axis, size in program.axes)])
    yield f"microbatches {program.microbatches}"
    for key, value in program.meta:
        yield f"meta {_word(key)} = {json.dumps(value)}"
    for segment in program.segments:
        yield ""
        yield from _segment_lines(segment)
    for role in program.roles:
        yield ""
        yield from _role_lines(role)


def _segment_lines(segment: Segment) -> Iterator[str]:
    yield f"segment s{segment.id} {_word(segment.name)}"
    for index, spec in enumerate(segment.inputs):
        yield f"  v{index} : {spec}"
    for index, op in enumerate(segment.ops, len(segment.inputs)):
        outs = ", ".join(map(str, op.outs))
        made = f"({outs})" if op.is_tuple else outs or "none"
        costs = f"flops={op.flops} read={op.read_bytes} written={op.write_bytes}"
        yield f"  v{index} = {op.code} : {made} {costs}"
    yield "  return " + " ".join(f"v{v}" for v in segment.outputs)


def _role_lines(role: Role) -> Iterator[str]:
    yield f"role {role.stage}"
    for tensor in role.tensors:
        yield f"  {_tensor_line(tensor)}"
    for body in role.bodies:
        yield f"  body {_word(body.name)}"
        for ins in body.instructions:
            yield f"    {ins.id} {instruction_text(ins)}"
    for name, calls in role.schedules:
        line = f"  schedule {_word(name)}:"
        for call in calls:
            item = f" {_word(call.body)}({call.microbatch})"
            if len(line) + len(item) > LINE_WIDTH:
                yield line
                line = " " * 3
            line += item
        yield line


def _tensor_line(tensor: Tensor) -> str:
    parts = [f"t{tensor.id} = {tensor.kind} {_word(tensor.name)} : {tensor.spec}"]
    if tensor.shards:
        parts.append("shards=" + ",".join(f"{dim}:{axis}" for dim, axis in tensor.shards))
    if tensor.base is not None:
        parts.append(f"base=t{tensor.base}")
    if tensor.offset:
        parts.append(f"offset={tensor.offset}")
    if tensor.source:
        parts.append(f"source={_word(tensor.source)}")
    return " ".join(parts)


@dataclass
class _Cursor:
    """A place in the text; `number` is the line last taken, for messages."""

    lines: list[tuple[int, str]]
    index: int = 0
    number: int = 1

    @classmethod
    def over(cls, text: str) -> "_Cursor":
        stripped = ((number, line.strip()) for number, line in enumerate(text.split("\n"), 1))
        return cls([(number, line) for number, line in stripped if line and not line.startswith("#")])

    def starts(self, *words: str) -> bool:
        return self.index < len(self.lines) and self.lines[self.index][1].startswith(words)

    def is_calls(self) -> bool:
        return self.index < len(self.lines) and CALL.sub("", self.lines[self.index][1]).strip() == ""

    def take(self, expected: str) -> str:
        if self.index == len(self.lines):
            raise ValueError(f"the text ends where {expected} should stand")
        self.number, line = self.lines[self.index]
        self.index += 1
        return line


def _read_program(cursor: _Cursor) -> Program:
    if cursor.take("program v1") != f"program v{VERSION}":
        raise ValueError(f"this is not a program of version {VERSION}: it starts with 'program v{VERSION}'")
    axes = tuple(_pair(word) for word in _after("axes", cursor.take("axes")).split())
    microbatches = read_number(_after("microbatches", cursor.take("microbatches")))
    meta, segments, roles = [], [], []
    while cursor.starts("meta "):
        key, _, value = _after("meta", cursor.take("meta")).partition(" = ")
        meta.append((_unword(key), _meta_value(value)))
    while cursor.starts("segment "):
        segments.append(_read_segment(cursor))
    while cursor.starts("role "):
        roles.append(_read_role(cursor))
    if cursor.index < len(cursor.lines):
        raise ValueError(f"not understood: {cursor.take('nothing')!r}")
    return Program(axes, microbatches, tuple(segments), tuple(roles), tuple(meta))


def _read_segment(cursor: _Cursor) -> Segment:
    number, name = _words(_after("segment", cursor.take("segment")), 2, 2)
    inputs: list[TensorSpec] = []
    ops: list[Operation] = []
    while cursor.starts("v"):
        line = cursor.take("a value")
        left, colon, right = line.rpartition(" : ")
        value, equals, code = left.partition(" = ")
        expected = len(inputs) + len(ops)
        if not colon or read_id("v", value) != expected:
            raise ValueError(f"expected 'v{expected} = code : ...' or 'v{expected} : spec', not {line!r}")
        if equals:
            ops.append(_read_op(code, right))
        elif ops:
            raise ValueError("inputs come before operations")
        else:
            inputs.append(_spec(right))
    outputs = tuple(read_id("v", word) for word in _after("return", cursor.take("return")).split())
    return Segment(read_id("s", number), _unword(name), tuple(inputs), tuple(ops), outputs)


def _read_op(code: str, rest: str) -> Operation:
    found = COSTS.fullmatch(rest)
    if found is None:
        raise ValueError("an operation ends with ': spec flops=<n> read=<n> written=<n>'")
    made, flops, read, written = found.groups()
    is_tuple = made.startswith("(") and made.endswith(")")
    inner = made[1:-1] if is_tuple else made if made != "none" else ""
    outs = tuple(_spec(word) for word in inner.split(", ")) if inner else ()
    return Operation(code, outs, is_tuple, int(flops), int(read), int(written))


def _read_role(cursor: _Cursor) -> Role:
    stage = read_number(_after("role", cursor.take("role")))
    tensors, bodies, schedules = [], [], []
    while cursor.starts("t"):
        tensors.append(_read_tensor(cursor.take("a tensor")))
    while cursor.starts("body "):
        name = _unword(_after("body", cursor.take("body")))
        instructions = []
        while cursor.starts(*"0123456789") and not cursor.is_calls():
            number, *words = _words(cursor.take("an instruction"), 2)
            instructions.append(read_instruction(words, number))
        bodies.append(Body(name, tuple(instructions)))
    while cursor.starts("schedule "):
        schedules.append(_read_schedule(cursor))
    return Role(stage, tuple(tensors), tuple(bodies), tuple(schedules))


def _read_tensor(line: str) -> Tensor:
    number, equals, kind, name, colon, spec, *more = _words(line, 6, 10)
    options = {key: value for key, _, value in (word.partition("=") for word in more)}
    if (equals, colon) != ("=", ":") or not options.keys() <= {"shards", "base", "offset", "source"}:
        raise ValueError(f"a tensor is 't0 = kind name : spec shards= base= offset= source=', not {line!r}")
    cuts = (cut.partition(":") for cut in options["shards"].split(",")) if "shards" in options else ()
    return Tensor(
        id=read_id("t", number), name=_unword(name), kind=_kind(kind), spec=_spec(spec),
        shards=tuple((read_number(dim), axis) for dim, _, axis in cuts),
        base=read_id("t", options["base"]) if "base" in options else None,
        offset=read_number(options.get("offset", "0")), source=_unword(options.get("source", "")),
    )  # fmt: skip


def _read_schedule(cursor: _Cursor) -> tuple[str, tuple[Call, ...]]:
    line = _after("schedule", cursor.take("schedule"))
    head = re.match(r'("(?:[^"\\]|\\.)*"|[^\s"]+):(?: |$)', line)
    if head is None or CALL.sub("", line[head.end() :]).strip():
        raise ValueError("a schedule is 'schedule name: body(microbatch) ...'")
    texts = [line[head.end() :]]
    while cursor.is_calls():
        texts.append(cursor.take("calls"))
    found = CALL.findall(" ".join(texts))
    return _unword(head[1]), tuple(Call(_unword(body), int(microbatch)) for body, microbatch in found)


def _after(keyword: str, line: str) -> str:
    first, _, rest = line.partition(" ")
    return rest if first == keyword else fail(f"expected '{keyword}', found {line!r}")


def _words(line: str, least: int, most: int | None = None) -> list[str]:
    words = TOKEN.findall(line)
    if len(words) < least or len(words) > (most or len(words)):
        raise ValueError(f"expected {least}{f' to {most}' if most else ' or more'} words, found {line!r}")
    return words


def _unword(text: str) -> str:
    return str(json.loads(text)) if text.startswith('"') else text


def _pair(text: str) -> tuple[str, int]:
    axis, equals, size = text.partition("=")
    return (axis, read_number(size)) if equals else fail(f"expected axis=size, found {text!r}")


def _spec(text: str) -> TensorSpec:
    found = SPEC.fullmatch(text)
    if found is None or found[1] not in DTYPE_BYTES:
        raise ValueError(f"{text!r} is not a spec like f32[4,8]; dtypes: {', '.join(DTYPE_BYTES)}")
    return TensorSpec(tuple(read_number(size) for size in found[2].split(",")) if found[2] else (), found[1])


def _meta_value(text: str) -> str | int | float:
    value = json.loads(text)
    return value if isinstance(value, str | int | float) else fail(f"{text} is not a string or a number")


def _kind(text: str) -> TensorKind:
    return TensorKind(text) if text in KINDS else fail(f"unknown kind {text!r}; known: {', '.join(KINDS)}")
