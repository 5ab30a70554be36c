"""One pipeline stage while it is lowered: its role's tables, its forward and backward bodies, what is freed where.

`RoleBuilder` takes tensors and instructions as they come. From the stage's units it gets forward and backward, with
what crosses the stage's borders. Assumed: values cross from earlier to later stages only. A value used in several later
stages is sent to each; its gradient comes back from each and is added. Batch entries are loaded by every stage that
needs them, never sent.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any, TypeAlias

from torch.fx import Node

from partitioner.capture.captured_graph import Graph, Side, Unit, ancestors
from partitioner.layout.parallel_plan import Plan
from partitioner.lowering.pieces import Piece, SegmentPiece, TracedUnit, make_op
from partitioner.program.instructions import named
from partitioner.program.program import (
    Accumulate,
    Body,
    Collective,
    CollectiveOp,
    Compute,
    Free,
    Group,
    Instruction,
    Operation,
    Recv,
    Reduction,
    Segment,
    Send,
    Tensor,
    TensorKind,
    TensorSpec,
    Wait,
)

SCALAR = TensorSpec((), "f64")
# the tensors in which a role sums loss and count, if it makes the loss
Losses: TypeAlias = tuple[int, int] | None


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
        """Declare a tensor once; later calls with the same name return it."""
        if name not in self.by_name:
            self.by_name[name] = len(self.tensors)
            self.tensors.append(Tensor(len(self.tensors), name, kind, spec, **more))
        return self.by_name[name]

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
                self.collective(body, piece.op, piece.reduction, Group(("tp",)), *reads, *writes)
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


@dataclass(frozen=True)
class StageContext:
    """What lowering knows about the whole model."""

    graph: Graph
    plan: Plan
    traced: Mapping[tuple[int, bool], TracedUnit]
    stage_of: tuple[int, ...]
    dims: Mapping[str, int | None]
    nominal_count: int

    def producer(self, value: str) -> int:
        """The stage that makes an activation."""
        return next(self.stage_of[i] for i, unit in enumerate(self.graph.units) if value in unit.outputs)

    def consumers(self, value: str) -> list[int]:
        """The stages that read an activation, in order."""
        return sorted(
            {self.stage_of[i] for i, unit in enumerate(self.graph.units) if value in unit.activations}
        )


def emit_stage(role: RoleBuilder, context: StageContext) -> tuple[Losses, Mapping[int, int]]:
    """Emit every per-microbatch body of `role`.

    Returns the tensors of accumulated (loss, count), and the last backward instruction of every unit.
    """
    emitter = _StageEmitter(role, context)
    emitter.forward()
    emitter.backward()
    return emitter.losses, emitter.unit_ends


class _StageEmitter:
    def __init__(self, role: RoleBuilder, context: StageContext) -> None:
        self.role, self.context, self.graph = role, context, context.graph
        self.units = [unit for unit, stage in enumerate(context.stage_of) if stage == role.stage]
        self.makes_loss = any(self.graph.loss in self.graph.units[index].outputs for index in self.units)
        self.values: dict[str, int] = {}
        self.slots: dict[int, dict[int, int]] = {}
        self.grads: dict[str, list[int]] = {}
        self.losses: Losses = None
        self.unit_ends: dict[int, int] = {}

    def forward(self) -> None:
        role = self.role
        role.body("forward")
        arrivals = self._arrivals()
        for value in arrivals:
            self.values[value] = role.tensor(value, TensorKind.ACTIVATION, self.graph.specs[value])
            role.emit("recv_forward", Recv(0, self.values[value], self.context.producer(value)))
        self._sides()
        role.wait("forward", *(self.values[v] for v in arrivals))
        for index in self.units:
            self._unit_forward(index)
        for value, stage in self._departures():
            role.emit("send_forward", Send(0, self.values[value], stage))
        if self.makes_loss:
            self._accumulate_loss()

    def _arrivals(self) -> list[str]:
        """Values that come from earlier stages, in the order in which they are made (channels are FIFO)."""
        needed = {v for i in self.units for v in self.graph.units[i].activations}
        made = (v for unit in self.graph.units for v in unit.outputs)
        return [v for v in made if v in needed and self.context.producer(v) != self.role.stage]

    def _departures(self) -> Iterator[tuple[str, int]]:
        """Values that other stages read, once for each of them, in the order in which they are made."""
        for value in (value for index in self.units for value in self.graph.units[index].outputs):
            for stage in self.context.consumers(value):
                if stage != self.role.stage:
                    yield value, stage

    def _sides(self) -> None:
        """Constants once, inputs once per microbatch, both cut down to what this stage needs."""
        graph = self.graph
        needed = {v for i in self.units for v in graph.units[i].frees}
        if self.makes_loss:
            needed.add(graph.count)
        inputs = _NeededSide(graph.inputs, [v for v in graph.inputs.outputs if v in needed])
        needed |= set(inputs.reads)
        constants = _NeededSide(graph.constants, [v for v in graph.constants.outputs if v in needed])
        self._side(constants, "constants", TensorKind.CONSTANT)
        self._side(inputs, "forward", TensorKind.ACTIVATION)

    def _side(self, side: "_NeededSide", body: str, kind: TensorKind) -> None:
        role, specs = self.role, self.graph.specs
        for name in side.reads:
            self._declare_source(name)
        if side.ops:
            writes = [self.values.setdefault(n, role.tensor(n, kind, specs[n])) for n in side.made]
            segment = role.pool.add(body, [specs[n] for n in side.reads], side.ops, side.outputs)
            role.compute(body, segment, [self.values[n] for n in side.reads], writes)

    def _declare_source(self, name: str) -> None:
        if name in self.values:
            return
        graph = self.graph
        kind = TensorKind.BATCH if name in graph.batch else TensorKind.CONSTANT
        space = "batch" if name in graph.batch else "buffer"
        self.values[name] = self.role.tensor(name, kind, graph.specs[name], source=f"{space}:{name}")

    def _traced(self, unit: Unit) -> TracedUnit:
        return self.context.traced[unit.template, not unit.activations]

    def _unit_forward(self, index: int) -> None:
        unit, role = self.graph.units[index], self.role
        traced = self._traced(unit)
        params = [role.by_name[p] for p in unit.params]
        slots = dict(enumerate([*params, *(self.values[v] for v in (*unit.frees, *unit.activations))]))
        at = traced.coordinate
        slots[at] = role.tensor(
            "coordinate.tp", TensorKind.COORDINATE, traced.specs[at], source="coordinate:tp"
        )
        role.pieces("forward", unit.name, traced.forward, slots, traced.specs, f"u{index}")
        for value, slot in zip(unit.outputs, traced.outputs, strict=True):
            self.values[value] = slots[slot]
            role.tensors[slots[slot]] = replace(role.tensors[slots[slot]], source=f"value:{value}")
        self.slots[index] = slots

    def _accumulate_loss(self) -> None:
        role = self.role
        sums = tuple(role.tensor(f"step.{name}", TensorKind.SCALAR, SCALAR) for name in ("loss", "count"))
        made = (self.values[self.graph.loss], self.values[self.graph.count])
        role.emit("forward", Accumulate(0, made, sums))
        self.losses = (sums[0], sums[1])

    def backward(self) -> None:
        role = self.role
        role.body("backward")
        self._receive_gradients()
        for index in reversed(self.units):
            self._unit_backward(index)
        for value in self._arrivals():
            if self.graph.specs[value].is_float:
                role.emit("send_backward", Send(0, self._tangent(value), self.context.producer(value)))

    def _receive_gradients(self) -> None:
        role, received = self.role, []
        for value, stage in self._departures():
            if self.graph.specs[value].is_float:
                name = f"grad.{value}.from{stage}"
                tensor = role.tensor(name, TensorKind.ACTIVATION, self.graph.specs[value])
                role.emit("recv_backward", Recv(0, tensor, stage))
                self.grads.setdefault(value, []).append(tensor)
                received.append(tensor)
        role.wait("backward", *received)

    def _unit_backward(self, index: int) -> None:
        unit, role = self.graph.units[index], self.role
        traced, slots = self._traced(unit), self.slots[index]
        for tangent, output in enumerate(traced.tangents, traced.coordinate + 1):
            slots[tangent] = self._tangent(unit.outputs[output])
        role.pieces("backward", f"{unit.name}.backward", traced.backward, slots, traced.specs, f"b{index}")
        reads, writes = [], []
        for source, slot in traced.grads:
            if slot is None:
                continue
            if source < len(unit.params):
                reads.append(slots[slot])
                writes.append(role.by_name[f"{unit.params[source]}.grad"])
            else:
                value = unit.activations[source - len(unit.params) - len(unit.frees)]
                self.grads.setdefault(value, []).append(slots[slot])
                role.tensors[slots[slot]] = replace(role.tensors[slots[slot]], source=f"grad:{value}:{index}")
        role.emit("backward", Accumulate(0, tuple(reads), tuple(writes)))
        self.unit_ends[index] = role.bodies["backward"][-1].id

    def _tangent(self, value: str) -> int:
        """The gradient flowing into an output: the seed for the loss, else the sum of what its users sent."""
        role, spec = self.role, self.graph.specs[value]
        if value == self.graph.loss:
            name, filler = "seed", repr(1.0 / self.context.nominal_count)
        elif value in self.grads:
            return self._grad(value)
        else:
            name, filler = f"zero.{spec}", "0.0"
        if name not in role.by_name:
            seed = role.tensor(name, TensorKind.CONSTANT, spec)
            made = f"{list(spec.shape)!r}, {filler}, dtype=dtype.{spec.dtype}, device=device"
            role.simple("constants", "fill", f"aten.full.default({made})", [], seed)
        return role.by_name[name]

    def _grad(self, value: str) -> int:
        terms = self.grads[value]
        while len(terms) > 1:
            first, second = terms.pop(0), terms.pop(0)
            name = f"grad.{value}.sum{len(terms)}"
            total = self.role.tensor(name, TensorKind.ACTIVATION, self.graph.specs[value])
            self.role.simple("backward", "add", "aten.add.Tensor(v0, v1)", [first, second], total)
            terms.insert(0, total)
        return terms[0]


class _NeededSide:
    """The part of a side graph that makes `wanted`: the values it reads, its ops, what it makes."""

    def __init__(self, side: Side, wanted: Sequence[str]) -> None:
        nodes = list(side.graph.graph.nodes)
        sources = dict(zip((n for n in nodes if n.op == "placeholder"), side.inputs, strict=True))
        results = dict(zip(side.outputs, nodes[-1].args[0], strict=True)) if side.outputs else {}
        kept = ancestors(results[v] for v in wanted)
        outer = [n for n in nodes if n in kept and n.op == "placeholder"]
        calls: list[Node] = [n for n in nodes if n in kept and n.op == "call_function"]
        number = {n: i for i, n in enumerate([*outer, *calls])}
        made = [v for v in wanted if results[v] not in sources]
        self.reads: tuple[str, ...] = tuple(sources[n] for n in outer)
        self.ops: tuple[Operation, ...] = tuple(make_op(n, number) for n in calls)
        self.made: tuple[str, ...] = tuple(made)
        self.outputs: tuple[int, ...] = tuple(number[results[v]] for v in made)
