"""What buffers become in a step, in one pipeline stage: made or brought from where it is made, then put in place.

A new value is made where the values that it needs are; of sums over all parts that several stages make, in the last of
these. Whoever else reads the buffer gets it from there. All new values are made of old ones, then all are put in place.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from partitioner.lowering.role_builder import RoleBuilder
from partitioner.lowering.stage_context import NeededSide, StageContext
from partitioner.lowering.whole_batch import emit_updates, keep
from partitioner.program.program import Recv, Send, TensorKind


@dataclass(frozen=True)
class BufferUpdate:
    """A buffer's new value after a step, of the `sums` that `makers` make; without sums every stage makes it."""

    buffer: str
    value: str
    side: NeededSide
    sums: tuple[str, ...]
    makers: frozenset[int]

    @property
    def reads(self) -> list[str]:
        """What else it reads."""
        return [name for name in self.side.reads if name not in self.sums]

    def is_made_in(self, stage: int) -> bool:
        """Whether the value is made there."""
        return not self.makers or stage == max(self.makers)


def updates_of(context: StageContext) -> Iterator[BufferUpdate]:
    """Buffers that need sums over all parts, in the graph's order."""
    graph = context.graph
    for buffer, value in graph.state:
        if graph.updates is not None and value in graph.updates.outputs:
            side = NeededSide(graph.updates, [value])
            sums = tuple(name for name in side.reads if name in graph.kept)
            yield BufferUpdate(buffer, value, side, sums, frozenset(map(context.producer, sums)))


class BufferWriter:
    """Emits a stage's writes to buffers; `values` are its tensors by name, `declare` adds a buffer's to them."""

    def __init__(
        self, role: RoleBuilder, context: StageContext, values: dict[str, int], declare: Callable[[str], None]
    ) -> None:
        self.role, self.context, self.graph = role, context, context.graph
        self.values, self.declare = values, declare
        self.sent: set[tuple[str, int]] = set()

    def emit(self) -> None:
        """After the stage's forward: what is kept of it, and the end of the step."""
        updated = self._updated()
        self._keep()
        for buffer, made in updated:
            copied = f"aten._to_copy.default(v0, dtype=dtype.{self.graph.specs[buffer].dtype})"
            self.role.simple("commit", "keep", copied, [made], self.values[buffer])

    def _updated(self) -> list[tuple[str, int]]:
        found: list[tuple[str, int]] = []
        updates = list(updates_of(self.context))
        for name in (n for update in updates if update.is_made_in(self.role.stage) for n in update.reads):
            self.declare(name)
        for update in updates:
            if update.is_made_in(self.role.stage):
                self.declare(update.buffer)
                found.append((update.buffer, self._made(update)))
                continue
            if self.role.stage in update.makers:
                self._send_sums(update)
            if update.buffer in self.values:
                found.append((update.buffer, self._fetch(update.buffer, update.value, max(update.makers))))
        return found

    def _made(self, update: BufferUpdate) -> int:
        role, graph = self.role, self.graph
        totals = self._own_totals(update)
        for name in [name for name in update.sums if name not in totals]:
            totals[name] = self._receive(f"{name}.kept_total", name, self.context.producer(name))
        reads = [totals[n] if n in totals else keep(role, self.values[n]) for n in update.side.reads]
        made = role.tensor(f"next.{update.buffer}", TensorKind.SCALAR, graph.specs[update.value])
        segment = role.pool.add("commit", [role.spec(t) for t in reads], update.side.ops, update.side.outputs)
        role.compute("commit", segment, reads, [made])
        if update.makers:
            self._give(update.buffer, made)
        return made

    def _send_sums(self, update: BufferUpdate) -> None:
        owner = max(update.makers)
        for name, total in self._own_totals(update).items():
            if (name, owner) not in self.sent:
                self.sent.add((name, owner))
                self.role.emit("commit", Send(0, total, owner))

    def _own_totals(self, update: BufferUpdate) -> dict[str, int]:
        """Of the sums that an update needs, those of what this stage makes."""
        own = [name for name in update.sums if self.context.producer(name) == self.role.stage]
        return emit_updates(self.role, self.context.plan, {name: self.values[name] for name in own})

    def _keep(self) -> None:
        """What needs no sums is made in the forward, and kept aside until the step's end."""
        role, graph = self.role, self.graph
        unit_made = {v for unit in graph.units for v in unit.outputs}
        for buffer, value in graph.state:
            if value in unit_made and self.context.producer(value) != role.stage:
                if buffer in self.values:
                    arrived = self._fetch(buffer, buffer, self.context.producer(value))
                    role.simple("commit", "copy", "aten.clone.default(v0)", [arrived], self.values[buffer])
                continue
            if value not in self.values:
                continue
            self.declare(buffer)
            spec = graph.specs[buffer]
            kept = role.tensor(f"next.{buffer}", TensorKind.SCALAR, spec)
            made = f"aten._to_copy.default(v0, dtype=dtype.{spec.dtype})"
            role.simple("forward", "keep", made, [self.values[value]], kept)
            role.simple("commit", "copy", "aten.clone.default(v0)", [kept], self.values[buffer])
            self._give(buffer, kept)

    def _fetch(self, buffer: str, value: str, source: int) -> int:
        """What a buffer that is read here becomes in another stage."""
        self.context.abroad.setdefault(buffer, set()).add(self.role.stage)
        return self._receive(f"next.{buffer}", value, source)

    def _receive(self, name: str, value: str, source: int) -> int:
        if (found := self.role.by_name.get(name)) is not None:  # another buffer needs it too
            return found
        arrived = self.role.tensor(name, TensorKind.SCALAR, self.graph.specs[value])
        self.role.emit("commit", Recv(0, arrived, source))
        self.role.wait("commit", arrived)
        return arrived

    def _give(self, buffer: str, made: int) -> None:
        """What a buffer becomes here goes to the stages that read it and do not make it."""
        for stage in sorted(self.context.abroad.get(buffer, set()) - {self.role.stage}):
            self.role.emit("commit", Send(0, made, stage))
