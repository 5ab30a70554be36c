"""The tables of a role while it is lowered: tensors, segments, and bodies of instructions, as they come."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any

from comms.errors import PartitionError
from partitioner.lowering.pieces import Piece, SegmentPiece
from partitioner.program.instructions import named
from partitioner.program.program import (
    Body,
    Collective,
    CollectiveOp,
    Compute,
    Free,
    Group,
    Instruction,
    Operation,
    Reduction,
    Segment,
    Tensor,
    TensorKind,
    TensorSpec,
    Wait,
)

SCALAR = TensorSpec((), "f64")


@dataclass
class SegmentPool:
    """All segments of a Program; equal ones are stored once."""

    segments: list[Segment] = field(default_factory=list)
    known: dict[object, int] = field(default_factory=dict)

    def add(
        self, name: str, inputs: Sequence[TensorSpec], ops: Sequence[Operation], outputs: Sequence[int]
    ) -> int:
        """The number of this segment, new or known."""
        key = (tuple(inputs), tuple(ops), tuple(outputs))
        if key not in self.known:
            self.known[key] = len(self.segments)
            self.segments.append(Segment(len(self.segments), name, *key))
        return self.known[key]


@dataclass
class RoleBuilder:
    """Tensors and bodies of one stage; ids are positions in these tables."""

    stage: int
    pool: SegmentPool
    tensors: list[Tensor] = field(default_factory=list)
    by_name: dict[str, int] = field(default_factory=dict)
    bodies: dict[str, list[Instruction]] = field(default_factory=dict)
    numbers: Iterator[int] = field(default_factory=count)

    def tensor(self, name: str, kind: TensorKind, spec: TensorSpec, **more: Any) -> int:
        """Declare a tensor once; later calls with the same name return it. Raises PartitionError if it is another."""
        if name not in self.by_name:
            self.by_name[name] = len(self.tensors)
            self.tensors.append(Tensor(len(self.tensors), name, kind, spec, **more))
        found = self.tensors[self.by_name[name]]
        if (found.kind, found.spec) != (kind, spec):
            problem = f"a {found.kind} and a {kind} are both called {name}"
            raise PartitionError(problem, name, "give the parameter, buffer or input another name")
        return found.id

    def spec(self, tensor: int) -> TensorSpec:
        """Shape and dtype of a tensor."""
        return self.tensors[tensor].spec

    def body(self, name: str) -> None:
        """Declare a body, which may stay empty."""
        self.bodies.setdefault(name, [])

    def emit(self, body: str, instruction: Instruction) -> None:
        """Append with a fresh id."""
        self.bodies.setdefault(body, []).append(replace(instruction, id=next(self.numbers)))

    def compute(self, body: str, segment: int, reads: Sequence[int], writes: Sequence[int]) -> None:
        """Emit a Compute."""
        self.emit(body, Compute(0, segment, tuple(reads), tuple(writes)))

    def wait(self, body: str, *tensors: int) -> None:
        """Emit a Wait, if there is anything to wait for."""
        if tensors:
            self.emit(body, Wait(0, tensors))

    def collective(
        self, body: str, op: CollectiveOp, reduction: Reduction, group: Group, read: int, write: int
    ) -> None:
        """Emit a Collective from one tensor to another."""
        self.emit(body, Collective(0, op, reduction, group, 0, (read,), (write,)))

    def pieces(
        self,
        body: str,
        name: str,
        pieces: Sequence[Piece],
        slots: dict[int, int],
        specs: Sequence[TensorSpec],
        prefix: str,
    ) -> None:
        """Emit a unit's pieces; `slots` maps its slots to tensors and gains those the pieces make."""
        for piece in pieces:
            for slot in piece.writes:
                slots[slot] = self.tensor(f"{prefix}.{slot}", TensorKind.ACTIVATION, specs[slot])
            reads, writes = [slots[s] for s in piece.reads], [slots[s] for s in piece.writes]
            if isinstance(piece, SegmentPiece):
                segment = self.pool.add(name, piece.inputs, piece.ops, piece.outputs)
                self.compute(body, segment, reads, writes)
            else:
                self.collective(body, piece.op, piece.reduction, Group((piece.axis,)), *reads, *writes)
                self.wait(body, *writes)

    def simple(self, body: str, name: str, code: str, reads: Sequence[int], write: int) -> int:
        """Emit a one-op segment whose operands are v0.. in the order of `reads`; returns `write`."""
        inputs, out = [self.spec(r) for r in reads], self.spec(write)
        nbytes = sum(spec.nbytes for spec in inputs)
        op = Operation(code, (out,), False, sum(spec.numel for spec in inputs), nbytes, out.nbytes)
        self.compute(body, self.pool.add(name, inputs, [op], [len(inputs)]), reads, [write])
        return write

    def add_frees(self, order: Sequence[str]) -> None:
        """Insert a Free after the last use of every per-microbatch tensor, bodies taken in `order`."""
        used_later: set[int] = set()
        for name in (name for name in reversed(order) if name in self.bodies):
            backwards: list[Instruction] = []
            for instruction in reversed(self.bodies[name]):
                due = {t for t in named(instruction) if self.tensors[t].is_per_microbatch} - used_later
                if due:
                    backwards.append(Free(next(self.numbers), tuple(sorted(due))))
                backwards.append(instruction)
                used_later |= due
            self.bodies[name] = backwards[::-1]

    def finished_bodies(self) -> tuple[Body, ...]:
        """Bodies with instruction ids renumbered in order, as the text form shows them."""
        numbers = count()
        return tuple(
            Body(name, tuple(replace(ins, id=next(numbers)) for ins in instructions))
            for name, instructions in self.bodies.items()
        )
