"""msgpack form of a Program, for the disk and the wire: compact, versioned, equal bytes for equal Programs.

Layout: a list (magic, version, tables, content). Specs, operations and groups are stored once in tables and
named by position; tensors are stored by column; instructions as short lists that start with a code; `meta` as
JSON, because a step's FLOPs may need more than 64 bits. Decoding shares what the tables share. Validity is not
judged here: see `static_check.py`.
"""

import json
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import msgpack

from comms.errors import ProgramError
from partitioner.program.instructions import FIELDS, INSTRUCTIONS
from partitioner.program.program import (
    VERSION,
    Body,
    Call,
    CollectiveOp,
    Group,
    Holds,
    Instruction,
    Operation,
    Program,
    Reduction,
    Role,
    Segment,
    Tensor,
    TensorKind,
    TensorSpec,
)

MAGIC = "program"
KINDS = tuple(TensorKind)
OPS = tuple(CollectiveOp)
REDUCTIONS = tuple(Reduction)
CODES = {kind: code for code, kind in enumerate(INSTRUCTIONS)}
TABLED = (Holds.OP, Holds.REDUCTION, Holds.GROUP)  # fields named by position; all others stand as they are
# of every kind of instruction: its fields, and which of them by place are named by position (place 0 is the code)
LAYOUTS = {
    kind: (
        tuple(field.name for field in fields),
        tuple((place, field.holds) for place, field in enumerate(fields, 1) if field.holds in TABLED),
    )
    for kind, fields in FIELDS.items()
}
SAME_AS_NAME = True  # a source that repeats the tensor's name
Item = TypeVar("Item", bound=Hashable)


def encode(program: Program) -> bytes:
    """The Program as bytes."""
    tables = _Tables()
    segments = [tables.segment(segment) for segment in program.segments]
    roles = [tables.role(role) for role in program.roles]
    content = [program.axes, program.microbatches, segments, roles, json.dumps(program.meta)]
    return bytes(msgpack.packb([MAGIC, VERSION, tables.packed(), content]))


def decode(data: bytes) -> Program:
    """Inverse of `encode`. ProgramError for other versions and for what is no Program."""
    hint = "partition the model again"
    try:
        magic, version, *rest = msgpack.unpackb(data, use_list=False)
        if magic != MAGIC:
            raise ValueError("it starts otherwise")
    except (ValueError, TypeError, msgpack.UnpackException) as error:
        raise ProgramError("these bytes are not a Program", "program", hint) from error
    if version != VERSION:
        problem = f"the Program has version {version}, this is version {VERSION}"
        raise ProgramError(problem, "program", hint)
    try:
        packed, (axes, microbatches, segments, roles, meta) = rest
        unpacker = _Unpacker(packed)
        facts = tuple((key, value) for key, value in json.loads(meta))
        made = tuple(map(unpacker.segment, segments))
        return Program(axes, microbatches, made, tuple(map(unpacker.role, roles)), facts)
    except (ValueError, TypeError, IndexError) as error:
        raise ProgramError(f"the Program is damaged: {error}", "program", hint) from error


def _positions(table: dict[Item, int], items: Iterable[Item]) -> list[int]:
    """Places of items in a table of distinct ones, in order of first use."""
    return [table.setdefault(item, len(table)) for item in items]


class _Tables:
    def __init__(self) -> None:
        self.specs: dict[TensorSpec, int] = {}
        self.ops: dict[Operation, int] = {}
        self.groups: dict[Group, int] = {}
        self.positions: Mapping[Holds, Callable[[Any], int]] = {
            Holds.OP: OPS.index, Holds.REDUCTION: REDUCTIONS.index, Holds.GROUP: self._group,
        }  # fmt: skip

    def _group(self, group: Group) -> int:
        return self.groups.setdefault(group, len(self.groups))

    def packed(self) -> list[object]:
        ops = [
            [op.code, _positions(self.specs, op.outs), op.is_tuple, op.flops, op.read_bytes, op.write_bytes]
            for op in self.ops
        ]
        specs = [[spec.dtype, spec.shape] for spec in self.specs]
        return [specs, ops, [[group.axes, group.stages] for group in self.groups]]

    def segment(self, segment: Segment) -> list[object]:
        inputs, ops = _positions(self.specs, segment.inputs), _positions(self.ops, segment.ops)
        return [segment.id, segment.name, inputs, ops, segment.outputs]

    def role(self, role: Role) -> list[object]:
        schedules = [[name, *_calls(calls)] for name, calls in role.schedules]
        return [role.stage, self.columns(role.tensors), [self.body(b) for b in role.bodies], schedules]

    def body(self, body: Body) -> list[object]:
        return [
            body.name,
            _run([ins.id for ins in body.instructions]),
            list(map(self.code, body.instructions)),
        ]

    def columns(self, tensors: Sequence[Tensor]) -> list[object]:
        return [
            _run([t.id for t in tensors]),
            [t.name for t in tensors],
            bytes(KINDS.index(t.kind) for t in tensors),
            _positions(self.specs, [t.spec for t in tensors]),
            [t.shards for t in tensors],
            [t.base for t in tensors],
            [t.offset for t in tensors],
            [SAME_AS_NAME if t.source == t.name else t.source for t in tensors],
            [t.sections for t in tensors],
        ]

    def code(self, ins: Instruction) -> list[object]:
        names, tabled = LAYOUTS[type(ins)]
        packed = [CODES[type(ins)], *[getattr(ins, name) for name in names]]
        for place, holds in tabled:
            packed[place] = self.positions[holds](packed[place])
        return packed


def _run(ids: list[int]) -> list[int] | int:
    """Ids that count up from a first one are stored as that one."""
    first = ids[0] if ids else 0
    return first if ids == list(range(first, first + len(ids))) else ids


def _ids(run: Sequence[int] | int, count: int) -> Sequence[int]:
    """Inverse of `_run`."""
    return range(run, run + count) if isinstance(run, int) else run


def _calls(calls: Sequence[Call]) -> tuple[list[str], list[int], list[int]]:
    names: dict[str, int] = {}
    numbers = _positions(names, [call.body for call in calls])
    return list(names), numbers, [call.microbatch for call in calls]


class _Unpacker:
    """The tables of one Program, read."""

    def __init__(self, packed: Sequence[Any]) -> None:
        specs, ops, groups = packed
        self.specs = [TensorSpec(shape, dtype) for dtype, shape in specs]
        at = self.specs.__getitem__
        self.ops = [Operation(code, tuple(map(at, outs)), *costs) for code, outs, *costs in ops]
        self.groups = [Group(axes, stages) for axes, stages in groups]
        tables = {Holds.OP: OPS, Holds.REDUCTION: REDUCTIONS, Holds.GROUP: self.groups}
        self.readers = [_unpacked(kind, tables) for kind in INSTRUCTIONS]

    def segment(self, packed: Sequence[Any]) -> Segment:
        number, name, inputs, ops, outputs = packed
        specs, made = tuple(map(self.specs.__getitem__, inputs)), tuple(map(self.ops.__getitem__, ops))
        return Segment(number, name, specs, made, outputs)

    def role(self, packed: Sequence[Any]) -> Role:
        stage, columns, bodies, schedules = packed
        return Role(
            stage,
            self.tensors(columns),
            tuple(self.body(*body) for body in bodies),
            tuple((name, _read_calls(*calls)) for name, *calls in schedules),
        )

    def tensors(self, columns: Sequence[Any]) -> tuple[Tensor, ...]:
        ids, names, kinds, specs, shards, bases, offsets, sources, sections = columns
        named = zip(names, sources, strict=True)
        origins = (name if source is SAME_AS_NAME else source for name, source in named)
        kind, spec = map(KINDS.__getitem__, kinds), map(self.specs.__getitem__, specs)
        numbers = _ids(ids, len(names))
        return tuple(map(Tensor, numbers, names, kind, spec, shards, bases, offsets, origins, sections))

    def body(self, name: str, ids: Sequence[int] | int, codes: Sequence[Sequence[Any]]) -> Body:
        readers, numbered = self.readers, zip(_ids(ids, len(codes)), codes, strict=True)
        return Body(name, tuple(readers[code[0]](number, *code[1:]) for number, code in numbered))


def _unpacked(kind: type[Instruction], tables: Mapping[Holds, Sequence[Any]]) -> Callable[..., Instruction]:
    """What makes an instruction from its id and packed fields: its class itself if none is named by position."""
    _, tabled = LAYOUTS[kind]

    def read(*packed: Any) -> Instruction:
        values = list(packed)
        for place, holds in tabled:
            values[place] = tables[holds][values[place]]
        return kind(*values)

    return read if tabled else kind


def _read_calls(
    names: Sequence[str], numbers: Sequence[int], microbatches: Sequence[int]
) -> tuple[Call, ...]:
    return tuple(map(Call, map(names.__getitem__, numbers), microbatches))
