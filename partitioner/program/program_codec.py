"""msgpack form of a Program, for the disk and the wire: compact, versioned, equal bytes for equal Programs.

Layout: a list (magic, version, tables, content). Specs, operations and groups are stored once in tables and
named by position; tensors are stored by column; instructions as short lists that start with a code; `meta` as
JSON, because a step's FLOPs may need more than 64 bits. Decoding shares what the tables share. Validity is not
judged here: see `check.py`.
"""

import json
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, Generic, TypeVar, assert_never

import msgpack

from comms.errors import ProgramError
from partitioner.program.program import (
    VERSION,
    Accumulate,
    Body,
    Call,
    Collective,
    CollectiveOp,
    Compute,
    Free,
    Group,
    Instruction,
    Op,
    Program,
    Recv,
    Reduction,
    Role,
    Segment,
    Send,
    Tensor,
    TensorKind,
    TensorSpec,
    Update,
    Wait,
)  # fmt: skip

MAGIC = "program"
KINDS = tuple(TensorKind)
OPS = tuple(CollectiveOp)
REDUCTIONS = tuple(Reduction)
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
        raise ProgramError("these bytes are not a Program", where="program", hint=hint) from error
    if version != VERSION:
        problem = f"the Program has version {version}, this is version {VERSION}"
        raise ProgramError(problem, where="program", hint=hint)
    try:
        packed, (axes, microbatches, segments, roles, meta) = rest
        reader = _Reader(packed)
        facts = tuple((key, value) for key, value in json.loads(meta))
        made = tuple(map(reader.segment, segments))
        return Program(axes, microbatches, made, tuple(map(reader.role, roles)), facts)
    except (ValueError, TypeError, IndexError) as error:
        raise ProgramError(f"the Program is damaged: {error}", where="program", hint=hint) from error


class _Table(Generic[Item]):
    """Distinct items in order of first use."""

    def __init__(self) -> None:
        self.positions: dict[Item, int] = {}

    def __call__(self, item: Item) -> int:
        return self.positions.setdefault(item, len(self.positions))


class _Tables:
    def __init__(self) -> None:
        self.specs: _Table[TensorSpec] = _Table()
        self.ops: _Table[Op] = _Table()
        self.groups: _Table[Group] = _Table()

    def packed(self) -> list[object]:
        ops = [
            [op.code, [self.specs(o) for o in op.outs], op.is_tuple, op.flops, op.read_bytes, op.write_bytes]
            for op in self.ops.positions
        ]
        specs = [[spec.dtype, spec.shape] for spec in self.specs.positions]
        return [specs, ops, [[group.axes, group.stages] for group in self.groups.positions]]

    def segment(self, segment: Segment) -> list[object]:
        inputs, ops = [self.specs(s) for s in segment.inputs], [self.ops(op) for op in segment.ops]
        return [segment.id, segment.name, inputs, ops, segment.outputs]

    def role(self, role: Role) -> list[object]:
        schedules = [[name, *_calls(calls)] for name, calls in role.schedules]
        return [role.stage, self.columns(role.tensors), [self.body(b) for b in role.bodies], schedules]

    def body(self, body: Body) -> list[object]:
        return [
            body.name,
            _run(ins.id for ins in body.instructions),
            [self.code(ins) for ins in body.instructions],
        ]

    def columns(self, tensors: Sequence[Tensor]) -> list[object]:
        return [
            _run(t.id for t in tensors),
            [t.name for t in tensors],
            bytes(KINDS.index(t.kind) for t in tensors),
            [self.specs(t.spec) for t in tensors],
            [t.shards for t in tensors],
            [t.base for t in tensors],
            [t.offset for t in tensors],
            [SAME_AS_NAME if t.source == t.name else t.source for t in tensors],
        ]

    def code(self, ins: Instruction) -> list[object]:
        match ins:
            case Compute():
                return [0, ins.segment, ins.reads, ins.writes]
            case Accumulate():
                return [1, ins.reads, ins.writes]
            case Collective():
                op, reduction = OPS.index(ins.op), REDUCTIONS.index(ins.reduction)
                return [2, op, reduction, self.groups(ins.group), ins.dim, ins.reads, ins.writes]
            case Send():
                return [3, ins.tensor, ins.to]
            case Recv():
                return [4, ins.tensor, ins.source]
            case Wait():
                return [5, ins.tensors]
            case Free():
                return [6, ins.tensors]
            case Update():
                return [7, ins.param, ins.grad, ins.stats, ins.target, ins.decay]
            case _:
                assert_never(ins)


def _run(ids: Iterable[int]) -> list[int] | int:
    """Ids that count up from a first one are stored as that one."""
    listed = list(ids)
    first = listed[0] if listed else 0
    return first if listed == list(range(first, first + len(listed))) else listed


def _calls(calls: Sequence[Call]) -> tuple[list[str], list[int], list[int]]:
    names: _Table[str] = _Table()
    numbers = [names(call.body) for call in calls]
    return list(names.positions), numbers, [call.microbatch for call in calls]


class _Reader:
    """The tables of one Program, read."""

    def __init__(self, packed: Sequence[Any]) -> None:
        specs, ops, groups = packed
        self.specs = [TensorSpec(shape, dtype) for dtype, shape in specs]
        at = self.specs.__getitem__
        self.ops = [Op(code, tuple(map(at, outs)), *costs) for code, outs, *costs in ops]
        self.groups = [Group(axes, stages) for axes, stages in groups]
        self.readers: tuple[Callable[..., Instruction], ...] = (
            Compute, Accumulate, self.collective, Send, Recv, Wait, Free, Update,
        )  # fmt: skip

    def segment(self, packed: Sequence[Any]) -> Segment:
        number, name, inputs, ops, outputs = packed
        specs, made = tuple(map(self.specs.__getitem__, inputs)), tuple(map(self.ops.__getitem__, ops))
        return Segment(number, name, specs, made, outputs)

    def role(self, packed: Sequence[Any]) -> Role:
        stage, columns, bodies, schedules = packed
        return Role(
            stage,
            self.tensors(*columns),
            tuple(self.body(*body) for body in bodies),
            tuple((name, _read_calls(*calls)) for name, *calls in schedules),
        )

    def tensors(
        self,
        ids: Sequence[int] | int,
        names: Sequence[str],
        kinds: bytes,
        specs: Sequence[int],
        *more: Sequence[Any],
    ) -> tuple[Tensor, ...]:
        shards, bases, offsets, sources = more
        named = zip(names, sources, strict=True)
        origins = (name if source is SAME_AS_NAME else source for name, source in named)
        numbers = range(ids, ids + len(names)) if isinstance(ids, int) else ids
        kind, spec = map(KINDS.__getitem__, kinds), map(self.specs.__getitem__, specs)
        return tuple(map(Tensor, numbers, names, kind, spec, shards, bases, offsets, origins))

    def body(self, name: str, ids: Sequence[int] | int, codes: Sequence[Sequence[Any]]) -> Body:
        numbers = range(ids, ids + len(codes)) if isinstance(ids, int) else ids
        readers = self.readers
        numbered = zip(numbers, codes, strict=True)
        return Body(name, tuple(readers[code[0]](number, *code[1:]) for number, code in numbered))

    def collective(
        self, number: int, op: int, reduction: int, group: int, dim: int, *flow: tuple[int, ...]
    ) -> Collective:
        return Collective(number, OPS[op], REDUCTIONS[reduction], self.groups[group], dim, *flow)


def _read_calls(
    names: Sequence[str], numbers: Sequence[int], microbatches: Sequence[int]
) -> tuple[Call, ...]:
    return tuple(map(Call, map(names.__getitem__, numbers), microbatches))
