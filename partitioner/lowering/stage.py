"""One pipeline stage while it is lowered: its forward and backward bodies, from the stage's units.

Assumed: values cross from earlier to later stages only. A value used in several later stages is sent to each; its
gradient comes back from each and is added. Batch entries are loaded by every stage that needs them, never sent.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TypeAlias

from partitioner.capture.captured_graph import BATCH_NAME, Known, Unit
from partitioner.lowering.buffer_updates import BufferWriter, updates_of
from partitioner.lowering.pieces import TracedUnit
from partitioner.lowering.role_builder import SCALAR, RoleBuilder
from partitioner.lowering.stage_context import NeededSide, StageContext, cut_of
from partitioner.lowering.whole_batch import bodies_of, emit_known, emit_tail
from partitioner.program.program import Accumulate, Recv, Send, TensorKind, TensorSpec

# the tensors in which a role sums loss and count, if it makes the loss
Losses: TypeAlias = tuple[int, int] | None


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
        self.makes_loss = role.stage == context.last
        self.values: dict[str, int] = {}
        self.slots: dict[int, dict[int, int]] = {}
        self.grads: dict[str, list[int]] = {}
        self.losses: Losses = None
        self.constants: set[str] = set()
        traced = [(self.graph.units[index], self._traced(self.graph.units[index])) for index in self.units]
        # parameters whose gradient is made here
        self.reached = {
            u.params[source]
            for u, t in traced
            for source, slot in t.grads
            if slot is not None and source < len(u.params)
        }
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
        BufferWriter(role, self.context, self.values, self._declare_source).emit()
        for value, stage in self._departures():
            role.emit("send_forward", Send(0, self.values[value], stage))
        if self.makes_loss and self.graph.tail is None:
            self._accumulate_loss()
        elif self.makes_loss:
            self.losses = emit_tail(role, self.graph, self.context.plan, self.values)

    def _arrivals(self) -> list[str]:
        """Values that come from earlier stages, in the order in which they are made (channels are FIFO)."""
        needed = {v for i in self.units for v in self.graph.units[i].activations}
        needed |= set(self.graph.summed) if self.makes_loss else set()
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
            needed |= {graph.count, *(graph.tail.inputs[len(graph.summed) :] if graph.tail else ())}
        updates = [update for update in updates_of(self.context) if update.is_made_in(self.role.stage)]
        needed |= {name for update in updates for name in update.reads}
        while True:  # what is kept reads more, which is kept then
            before = len(needed)
            inputs, turns = self._inputs_and_turns(needed)
            needed |= {value for buffer, value in graph.state if self.makes_loss or buffer in needed}
            if len(needed) == before:
                break
        constants = NeededSide(graph.constants, [v for v in graph.constants.outputs if v in needed])
        self._side(constants, "constants", TensorKind.CONSTANT)
        for known, totals in reversed(turns):
            self._known(known, totals)
        self._side(inputs, "forward", TensorKind.ACTIVATION)

    def _inputs_and_turns(self, needed: set[str]) -> tuple[NeededSide, list[tuple[list[Known], NeededSide]]]:
        """What makes the values `needed`, once per microbatch and before the forward; what that reads is added."""
        graph = self.graph
        inputs = NeededSide(graph.inputs, [v for v in graph.inputs.outputs if v in needed])
        needed |= set(inputs.reads)
        turns: list[tuple[list[Known], NeededSide]] = []
        for turn in sorted({each.turn for each in graph.known}, reverse=True):
            known = [each for each in graph.known if each.turn == turn and each.name in needed]
            sources = {each.source for each in known}
            totals = NeededSide(graph.totals, [v for v in graph.totals.outputs if v in sources])
            needed |= {*totals.reads, *(sources - set(totals.made))}
            turns.append((known, totals))
        return inputs, turns

    def _known(self, known: Sequence[Known], totals: NeededSide) -> None:
        """Make the values of one turn."""
        if not known:
            return
        body, _ = bodies_of(known[0].turn)
        made = self._side(totals, body, TensorKind.ACTIVATION, f"before.{body}.")
        sources = {each.source for each in known}
        for name in sorted(sources - set(made)):
            self._declare_source(name)
        emit_known(self.role, self.graph, self.context.plan, known,
                   {v: made.get(v, self.values.get(v, -1)) for v in sources})  # fmt: skip
        self.values |= {each.name: self.role.by_name[each.name] for each in known}

    def _side(self, side: NeededSide, body: str, kind: TensorKind, prefix: str = "") -> dict[str, int]:
        """Emit what makes a side's values; returns them by name. With a prefix they are another instance of each."""
        role, specs = self.role, self.graph.specs
        for name in side.reads:
            self._declare_source(name)
        made = {n: role.tensor(f"{prefix}{n}", kind, specs[n]) for n in side.made}
        if not prefix:
            self.values |= made
        if side.ops:
            segment = role.pool.add(body, [specs[n] for n in side.reads], side.ops, side.outputs)
            role.compute(body, segment, [self.values[n] for n in side.reads], list(made.values()))
        return made

    def _declare_source(self, name: str) -> None:
        if name in self.values:
            return
        graph = self.graph
        kept = TensorKind.BUFFER if name in dict(graph.state) else TensorKind.CONSTANT
        kind = TensorKind.BATCH if name in graph.batch else kept
        space = "batch" if name in graph.batch else "buffer"
        source = f"{space}:{name.removeprefix(BATCH_NAME)}"
        self.values[name] = self.role.tensor(name, kind, graph.specs[name], source=source)

    def _traced(self, unit: Unit) -> TracedUnit:
        return self.context.traced[cut_of(unit, self.context.cuts)]

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
            self._name(slots[slot], f"value:{value}")
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
            if value in self.graph.live:
                role.emit("send_backward", Send(0, self._tangent(value), self.context.producer(value)))

    def _receive_gradients(self) -> None:
        role, received = self.role, []
        for value, stage in self._departures():
            if value in self.graph.live:
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
                self._name(slots[slot], f"grad:{value}:{index}")
        for name in unit.params:  # trained elsewhere: here it is only read
            grad = role.by_name.get(f"{name}.grad")
            if grad is not None and grad not in writes and name not in self.reached:
                reads.append(self._filled(f"zero.{role.spec(grad)}", role.spec(grad), "0.0"))
                writes.append(grad)
        role.emit("backward", Accumulate(0, tuple(reads), tuple(writes)))
        self.unit_ends[index] = role.bodies["backward"][-1].id

    def _name(self, tensor: int, source: str) -> None:
        """Say what a tensor is in the model, unless it is an input or a seed that was only passed on."""
        made = self.role.tensors[tensor]
        if made.kind is TensorKind.ACTIVATION:
            self.role.tensors[tensor] = replace(made, source=source)

    def _tangent(self, value: str) -> int:
        """The gradient flowing into an output: the seed for the loss, else the sum of what its users sent."""
        role, spec = self.role, self.graph.specs[value]
        if value in self.graph.summed and self.makes_loss:
            self.grads.setdefault(value, []).append(role.by_name[f"seed.{value}"])
        if value == self.graph.loss:
            name, filler = "seed", repr(1.0 / self.context.nominal_count)
        elif value in self.grads:
            return self._grad(value)
        else:
            name, filler = f"zero.{spec}", "0.0"
        return self._filled(name, spec, filler)

    def _filled(self, name: str, spec: TensorSpec, filler: str) -> int:
        """A constant whose entries are all the same."""
        filled = self.role.tensor(name, TensorKind.CONSTANT, spec)
        if name not in self.constants:
            self.constants.add(name)
            made = f"{list(spec.shape)!r}, {filler}, dtype=dtype.{spec.dtype}, device=device"
            self.role.simple("constants", "fill", f"aten.full.default({made})", [], filled)
        return filled

    def _grad(self, value: str) -> int:
        terms = self.grads[value]
        while len(terms) > 1:
            first, second = terms.pop(0), terms.pop(0)
            name = f"grad.{value}.sum{len(terms)}"
            total = self.role.tensor(name, TensorKind.ACTIVATION, self.graph.specs[value])
            self.role.simple("backward", "add", "aten.add.Tensor(v0, v1)", [first, second], total)
            terms.insert(0, total)
        return terms[0]
