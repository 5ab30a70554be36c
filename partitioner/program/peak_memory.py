"""Peak memory of every role, by class, and where in the step it is reached.

A liveness walk over the calls of a schedule. Persistent tensors count all the time, once per buffer; tensors of a
microbatch from the instruction that makes them (a batch entry: that first reads it) to their Free, which
`lowering.stage` places; values inside a segment while it runs. Views cost nothing, and keep alive what they view. A
tensor that is freed while being sent counts until the same body is called again: at most one transfer per body is
assumed to linger.

Inside a segment a view shares the storage of its first operand; every other operation makes new storage. A value's
storage goes after the last use of the last value that shares it, unless an output of the segment shares it.

The effect of a body depends only on what its microbatch holds when it is called, so it is computed once per such
state: microbatches and steps are as good as free. Not modelled: the allocator's rounding and fragmentation, scratch
memory of kernels, of collectives and of the optimizer, fusion that keeps a value in registers, and what a framework
itself takes.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from partitioner.program.instructions import reads, writes
from partitioner.program.machine import BodyState, BodyStates
from partitioner.program.program import (
    Body,
    Call,
    Collective,
    Compute,
    Free,
    Instruction,
    Operation,
    Program,
    Recv,
    Role,
    Segment,
    Send,
    TensorKind,
    Wait,
)

SELECTED = re.compile(r"getitem\(v\d+, (\d+)\)")


class MemoryClass(StrEnum):
    """What bytes are for; the rows of the memory report."""

    PARAMS = "params"
    GRADS = "grads"
    OPTIMIZER = "optimizer"  # master copies and states
    ACTIVATIONS = "activations"  # what the forward makes, as far as it is kept
    BACKWARD = "backward"  # what the backward makes: gradients on their way, and what is computed again
    BATCH = "batch"
    CONSTANTS = "constants"  # with scalars
    COMMUNICATION = "communication"  # being received or gathered, or freed while being sent
    TEMPORARY = "temporary"  # inside the segment that runs


CLASSES = tuple(MemoryClass)
INDEX = {name: index for index, name in enumerate(CLASSES)}
ACTIVATIONS, BATCH = INDEX[MemoryClass.ACTIVATIONS], INDEX[MemoryClass.BATCH]
BACKWARD = INDEX[MemoryClass.BACKWARD]
COMMUNICATION, TEMPORARY = INDEX[MemoryClass.COMMUNICATION], INDEX[MemoryClass.TEMPORARY]
BACKWARD_BODIES = ("backward", "backward_last")
PERSISTENT = {
    TensorKind.PARAM: MemoryClass.PARAMS,
    TensorKind.FLAT: MemoryClass.PARAMS,
    TensorKind.GRAD: MemoryClass.GRADS,
    TensorKind.MASTER: MemoryClass.OPTIMIZER,
    TensorKind.STATE: MemoryClass.OPTIMIZER,
    TensorKind.CONSTANT: MemoryClass.CONSTANTS,
    TensorKind.BUFFER: MemoryClass.CONSTANTS,
    TensorKind.COORDINATE: MemoryClass.CONSTANTS,
    TensorKind.SCALAR: MemoryClass.CONSTANTS,
}


@dataclass(frozen=True, slots=True)
class Output:
    """Where an output of a segment lies: storage `storage` (an input's number if it is a view of that input)."""

    storage: int
    nbytes: int  # of the whole storage; 0 for an input's


@dataclass(frozen=True, slots=True)
class Footprint:
    """A segment's memory: its outputs, and the largest sum of storage that it made and still holds.

    `kept_at_peak` is the part of `peak_bytes` that later leaves the segment as outputs.
    """

    outputs: tuple[Output, ...]
    peak_bytes: int
    kept_at_peak: int


@dataclass(frozen=True, slots=True)
class RoleMemory:
    """One chip of a stage at its fullest: `classes` add up to `peak_bytes`.

    `call` and `instruction` (its id) say what runs then; None: nothing yet. `activation_bytes`: the most that forwards
    keep for their backwards (between two calls), some of which may be gone at the peak.
    """

    stage: int
    peak_bytes: int
    activation_bytes: int
    classes: tuple[tuple[MemoryClass, int], ...]
    call: Call | None
    instruction: int | None

    @property
    def where(self) -> str:
        """The place of the peak, for messages: `stage 3: backward(4) instruction 231`."""
        if self.call is None:
            return f"stage {self.stage}: throughout"
        return f"stage {self.stage}: {self.call} instruction {self.instruction}"


def peak_memory(program: Program, schedule: str = "step") -> tuple[RoleMemory, ...]:
    """The peak of every role over one execution of `schedule`."""
    footprints = tuple(footprint(segment) for segment in program.segments)
    return tuple(_role_peak(role, footprints, schedule) for role in program.roles)


def _role_peak(role: Role, footprints: Sequence[Footprint], schedule: str) -> RoleMemory:
    now = [0] * len(CLASSES)
    for tensor in role.tensors:
        if tensor.base is None and not tensor.is_per_microbatch:
            now[INDEX[PERSISTENT[tensor.kind]]] += tensor.spec.nbytes
    peak = total = sum(now)
    kept = 0
    at_peak, place = list(now), (None, None)  # type: tuple[list[int], tuple[Call | None, int | None]]
    states = BodyStates(_Held())
    held: dict[int, _Held] = {}
    lingering: dict[str, int] = {}
    known: dict[tuple[str, _Held, int], _BodyMemory] = {}
    for call in role.schedule.get(schedule, ()):
        key = (call.body, held.get(call.microbatch, states.first), lingering.get(call.body, 0))
        if (ran := known.get(key)) is None:
            ran = known[key] = _BodyMemory(role, footprints, key[1].copy(), key[2])
            ran.body(role.body[call.body])
            ran.held = states.unique(ran.held)
        if total + ran.peak > peak:
            peak, place = total + ran.peak, (call, ran.instruction)
            at_peak = [a + b for a, b in zip(now, ran.at_peak, strict=True)]
        now = [a + b for a, b in zip(now, ran.now, strict=True)]
        kept = max(kept, now[ACTIVATIONS])
        total += ran.total
        held[call.microbatch], lingering[call.body] = ran.held, ran.lingering
    classes = tuple(zip(CLASSES, at_peak, strict=True))
    return RoleMemory(role.stage, peak, kept, classes, *place)


@dataclass(eq=False)
class _Held(BodyState):
    """What a microbatch holds. Storages are named by the tensor that made them; None: a persistent tensor's."""

    storage_of: dict[int, int | None] = field(default_factory=dict)
    users: dict[int, int] = field(default_factory=dict)
    nbytes: dict[int, int] = field(default_factory=dict)
    kind: dict[int, int] = field(default_factory=dict)
    moving: dict[int, tuple[int, ...]] = field(default_factory=dict)  # tensor awaited: storages in use


class _BodyMemory:
    """One execution of a body, in bytes relative to its start."""

    def __init__(self, role: Role, footprints: Sequence[Footprint], held: _Held, lingering: int) -> None:
        self.role, self.footprints, self.held = role, footprints, held
        self.now = [0] * len(CLASSES)
        # what the last call of this body left being sent has gone by now
        self.total = self.now[COMMUNICATION] = -lingering
        self.peak, self.at_peak = 0, [0] * len(CLASSES)
        self.instruction: int | None = None
        self.sent: set[int | None] = set()
        self.lingering = 0
        self.made = ACTIVATIONS

    def body(self, body: Body) -> None:
        self.made = BACKWARD if body.name in BACKWARD_BODIES else ACTIVATIONS
        for instruction in body.instructions:
            self._execute(instruction)
            if self.total > self.peak:
                self._record(instruction, 0, 0)

    def _record(self, instruction: Instruction, kept: int, temporary: int) -> None:
        self.peak, self.instruction = self.total + kept + temporary, instruction.id
        self.at_peak = list(self.now)
        self.at_peak[self.made] += kept
        self.at_peak[TEMPORARY] += temporary

    def _execute(self, ins: Instruction) -> None:
        match ins:
            case Compute():
                self._compute(ins)
            case Collective():
                self._load(ins.reads)
                for read, write in zip(ins.reads, ins.writes, strict=True):
                    self._move(write, (read, write))
            case Recv():
                self._move(ins.tensor, (ins.tensor,))
            case Send():
                self._load((ins.tensor,))
                self.sent.add(self.held.storage_of.get(ins.tensor))
            case Wait():
                for tensor in ins.tensors:
                    self._settle(tensor)
            case Free():
                for tensor in ins.tensors:
                    self._release(self.held.storage_of.pop(tensor, None))
            case _:  # makes what it writes, and holds nothing else
                self._load(reads(ins))
                for tensor in writes(ins):
                    if (declared := self.role.tensors[tensor]).is_per_microbatch:
                        self._bind(tensor, self._make(tensor, declared.spec.nbytes, self.made))

    def _compute(self, ins: Compute) -> None:
        self._load(ins.reads)
        run = self.footprints[ins.segment]
        if self.total + run.peak_bytes > self.peak:
            self._record(ins, run.kept_at_peak, run.peak_bytes - run.kept_at_peak)
        # an output that is a view of an input goes on using the input's storage: that is how views keep it alive
        made: dict[int, int | None] = {i: self.held.storage_of.get(t) for i, t in enumerate(ins.reads)}
        for tensor, output in zip(ins.writes, run.outputs, strict=True):
            if not self.role.tensors[tensor].is_per_microbatch:
                continue
            if output.storage not in made:
                made[output.storage] = self._make(tensor, output.nbytes, self.made)
            self._bind(tensor, made[output.storage])

    def _load(self, reads: Sequence[int]) -> None:
        for tensor in reads:
            declared = self.role.tensors[tensor]
            if declared.kind is TensorKind.BATCH and tensor not in self.held.storage_of:
                self._bind(tensor, self._make(tensor, declared.spec.nbytes, BATCH))

    def _move(self, write: int, used: Sequence[int]) -> None:
        """A transfer into `write` starts; it holds the storages of `used` until it is waited for."""
        held, declared = self.held, self.role.tensors[write]
        if declared.is_per_microbatch and write not in held.storage_of:
            self._bind(write, self._make(write, declared.spec.nbytes, COMMUNICATION))
        storages = [s for s in (held.storage_of.get(t) for t in used) if s is not None]
        for storage in storages:
            held.users[storage] += 1
        if storages:
            held.moving[write] = (*held.moving.get(write, ()), *storages)

    def _settle(self, tensor: int) -> None:
        for storage in self.held.moving.pop(tensor, ()):
            self._release(storage)
        arrived = self.held.storage_of.get(tensor)
        if arrived is not None and self.held.kind[arrived] == COMMUNICATION:
            self.held.kind[arrived] = self.made
            self.now[COMMUNICATION] -= self.held.nbytes[arrived]
            self.now[self.made] += self.held.nbytes[arrived]

    def _make(self, tensor: int, nbytes: int, kind: int) -> int:
        storage = tensor
        while storage in self.held.users:  # an earlier value of this tensor lives on in a view
            storage += len(self.role.tensors)
        self.held.users[storage], self.held.nbytes[storage], self.held.kind[storage] = 0, nbytes, kind
        self.now[kind] += nbytes
        self.total += nbytes
        return storage

    def _bind(self, tensor: int, storage: int | None) -> None:
        if storage is not None:
            self.held.users[storage] += 1
        self._release(self.held.storage_of.pop(tensor, None))
        self.held.storage_of[tensor] = storage

    def _release(self, storage: int | None) -> None:
        if storage is None:
            return
        self.held.users[storage] -= 1
        if self.held.users[storage]:
            return
        del self.held.users[storage]
        nbytes, kind = self.held.nbytes.pop(storage), self.held.kind.pop(storage)
        self.now[kind] -= nbytes
        if storage in self.sent:  # freed, but the transfer still reads it: it lingers until the next call
            self.now[COMMUNICATION] += nbytes
            self.lingering += nbytes
        else:
            self.total -= nbytes


def footprint(segment: Segment) -> Footprint:
    """Walk the operations once; O(operations + operands)."""
    of, storages = _storages(segment)
    returned = [of[value][0] for value in segment.outputs]
    stays = set(returned)
    made, kept, gone = ([0] * len(segment.ops) for _ in range(3))  # bytes, by operation
    for number, storage in enumerate(storages[len(segment.inputs) :], len(segment.inputs)):
        made[storage.first] += storage.nbytes
        if number in stays:
            kept[storage.first] += storage.nbytes
        else:
            gone[storage.last] += storage.nbytes
    live = held = peak = kept_at_peak = 0
    for born, retained, freed in zip(made, kept, gone, strict=True):
        live, held = live + born, held + retained
        if live > peak:
            peak, kept_at_peak = live, held
        live -= freed
    return Footprint(tuple(Output(s, storages[s].nbytes) for s in returned), peak, kept_at_peak)


@dataclass(slots=True)
class _Storage:
    """What one or more values of a segment share; `first` and `last`: the operations that make it and last use it."""

    nbytes: int
    first: int
    last: int


def _storages(segment: Segment) -> tuple[list[tuple[int, ...]], list[_Storage]]:
    """The numbers of every value's storages (one per element of a tuple), and the storages; first those of inputs."""
    of: list[tuple[int, ...]] = [(i,) for i in range(len(segment.inputs))]
    storages = [_Storage(0, 0, 0) for _ in segment.inputs]
    for index, op in enumerate(segment.ops):
        sources = op.operands
        if sources and op.read_bytes == op.write_bytes == 0:  # a view moves no bytes
            of.append(_viewed(segment, op, sources[0], of[sources[0]]))
        else:
            of.append(tuple(range(len(storages), len(storages) + len(op.outs))))
            storages += [_Storage(spec.nbytes, index, index) for spec in op.outs]
        for value in (*sources, -1):  # what it reads, and what it has just made
            for number in of[value]:
                storages[number].last = index
    return of, storages


def _viewed(segment: Segment, op: Operation, source: int, storages: tuple[int, ...]) -> tuple[int, ...]:
    """A view's storage: its operand's, or for `getitem` that of the chosen element."""
    chosen = SELECTED.match(op.code)
    if chosen is None or len(storages) < 2 or not op.outs:
        return storages[:1]
    specs = segment.ops[source - len(segment.inputs)].outs
    index = int(chosen[1])  # counts also what is no tensor, so that it may point beside its element
    if index >= len(specs) or specs[index] != op.outs[0]:
        index = specs.index(op.outs[0]) if op.outs[0] in specs else 0
    return (storages[index],)
