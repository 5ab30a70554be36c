"""Text form of a Program, for reading: one line per instruction, operation and tensor; nothing is left out.

    role 0
      t0 = param w : f32[8,4] source=w
      body forward
        0 recv t4 from 1
        1 wait t4
        2 compute s3 t4 t0 -> t5
        3 all_reduce sum tp t5 -> t6
      schedule step: forward(0) forward(1)

Words with odd characters are written as JSON strings. Validity is not judged here: see `static_check.py`.
"""

import json
import re
from collections.abc import Iterator

from partitioner.program.instructions import instruction_text
from partitioner.program.program import VERSION, Program, Role, Segment, Tensor

LINE_WIDTH = 110
BARE = re.compile(r"[A-Za-z0-9_.:+/-]+")


def to_text(program: Program) -> str:
    """The whole Program; equal Programs give equal text."""
    return "\n".join(_program_lines(program)) + "\n"


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
    if tensor.sections:
        parts.append("sections=" + "+".join(map(str, tensor.sections)))
    if tensor.base is not None:
        parts.append(f"base=t{tensor.base}")
    if tensor.offset:
        parts.append(f"offset={tensor.offset}")
    if tensor.source:
        parts.append(f"source={_word(tensor.source)}")
    return " ".join(parts)
