"""Peak memory of every role, by class, and where in the step it is reached.

A liveness walk over the calls of a schedule. Persistent tensors count all the time, once per buffer; tensors of a
microbatch from the instruction that makes them (a batch entry: that first reads it) to their Free; values inside a
segment while it runs (`storage.py`). Views cost nothing, and keep alive what they view. A tensor that is freed while
being sent counts until the same body is called again: at most one transfer per body is assumed to linger.

The effect of a body depends only on what its microbatch holds when it is called, so it is computed once per such
state: microbatches and steps are as good as free. Not modelled: the allocator's rounding and fragmentation, scratch
memory of kernels, of collectives and of the optimizer, and what a framework itself takes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import assert_never

from partitioner.memory.segment_storage import Footprint, footprint
from partitioner.program.program import (
    Accumulate,
    Body,
    Call,
    Collective,
    Compute,
    Free,
    Instruction,
    Program,
    Recv,
    Role,
    Send,
    TensorKind,
    Update,
    Wait,
)


class MemoryClass(StrEnum):
    """What bytes are for; the rows of the memory report."""

    PARAMS = "params"
    GRADS = "grads"
    OPTIMIZER = "optimizer"  # master copies and states
    ACTIVATIONS = "activations"
    BATCH = "batch"
    CONSTANTS = "constants"  # with scalars
    COMMUNICATION = "communication"  # being received or gathered, or freed while being sent
    TEMPORARY = "temporary"  # inside the segment that runs


CLASSES = tuple(MemoryClass)
INDEX = {name: index for index, name in enumerate(CLASSES)}
ACTIVATIONS, BATCH = INDEX[MemoryClass.ACTIVATIONS], INDEX[MemoryClass.BATCH]
COMMUNICATION, TEMPORARY = INDEX[MemoryClass.COMMUNICATION], INDEX[MemoryClass.TEMPORARY]
PERSISTENT = {
    TensorKind.PARAM: MemoryClass.PARAMS,
    TensorKind.FLAT: MemoryClass.PARAMS,
    TensorKind.GRAD: MemoryClass.GRADS,
    TensorKind.MASTER: MemoryClass.OPTIMIZER,
    TensorKind.STATE: MemoryClass.OPTIMIZER,
    TensorKind.CONSTANT: MemoryClass.CONSTANTS,
    TensorKind.COORDINATE: MemoryClass.CONSTANTS,
    TensorKind.SCALAR: MemoryClass.CONSTANTS,
}


@dataclass(frozen=True, slots=True)
class RoleMemory:
    """One chip of a stage at its fullest: `classes` add up to `peak_bytes`.

    `call_index` counts in the schedule, `instruction` is the id of the one that runs (None: before the first).
    """

    stage: int
    peak_bytes: int
    classes: tuple[tuple[MemoryClass, int], ...]
    resident_bytes: int
    call_index: int
    call: Call | None
    instruction: int | None

    @property
    def where(self) -> str:
        """The place of the peak, for messages: `stage 3: backward(4) instruction 231`."""
        if self.call is None:
            return f"stage {self.stage}: throughout"
        return f"stage {self.stage}: {self.call.body}({self.call.microbatch}) instruction {self.instruction}"


def peak_memory(program: Program, schedule: str = "step") -> tuple[RoleMemory, ...]:
    """The peak of every role over one execution of `schedule`."""
    footprints = tuple(footprint(segment) for segment in program.segments)
    return tuple(_role_peak(role, footprints, schedule) for role in program.roles)


def _role_peak(role: Role, footprints: Sequence[Footprint], schedule: str) -> RoleMemory:
    now = [0] * len(CLASSES)
    for tensor in role.tensors:
        if tensor.base is None and not tensor.is_per_microbatch:
            now[INDEX[PERSISTENT[tensor.kind]]] += tensor.spec.nbytes
    resident = peak = total = sum(now)
    at_peak, place = list(now), (0, None, None)  # type: tuple[list[int], tuple[int, Call | None, int | None]]
    effects = _Effects(role, footprints)
    states: dict[int, int] = {}
    lingering: dict[str, int] = {}
    for index, call in enumerate(role.schedule.get(schedule, ())):
        effect = effects.of(call.body, states.get(call.microbatch, 0), lingering.get(call.body, 0))
        if total + effect.peak > peak:
            peak, place = total + effect.peak, (index, call, effect.instruction)
            at_peak = [a + b for a, b in zip(now, effect.at_peak, strict=True)]
        now = [a + b for a, b in zip(now, effect.delta, strict=True)]
        total += sum(effect.delta)
        states[call.microbatch], lingering[call.body] = effect.state, effect.lingering
    return RoleMemory(role.stage, peak, tuple(zip(CLASSES, at_peak, strict=True)), resident, *place)


@dataclass(frozen=True, slots=True)
class _Effect:
    """What one call does: the microbatch's next state, bytes by class after it, and at its own peak."""

    state: int
    delta: tuple[int, ...]
    peak: int
    at_peak: tuple[int, ...]
    instruction: int | None
    lingering: int


class _Effects:
    """Effects of bodies, remembered by the state in which they are called; state 0 holds nothing."""

    def __init__(self, role: Role, footprints: Sequence[Footprint]) -> None:
        self.role, self.footprints = role, footprints
        self.known: dict[tuple[str, int, int], _Effect] = {}
        self.states: list[_Held] = [_Held()]
        self.numbers: dict[object, int] = {_Held().key(): 0}

    def of(self, body: str, state: int, lingering: int) -> _Effect:
        """The effect of calling `body` while `lingering` bytes of its last call are still being sent."""
        key = (body, state, lingering)
        if key not in self.known:
            walk = _Walk(self.role, self.footprints, self.states[state].copy(), lingering)
            walk.body(self.role.body[body])
            after = self.numbers.setdefault(walk.held.key(), len(self.states))
            if after == len(self.states):
                self.states.append(walk.held)
            self.known[key] = _Effect(
                after, tuple(walk.now), walk.peak, tuple(walk.at_peak), walk.instruction, walk.lingering
            )
        return self.known[key]


@dataclass
class _Held:
    """What a microbatch holds. Storages are named by the tensor that made them; None: a persistent tensor's."""

    storage_of: dict[int, int | None] = field(default_factory=dict)
    users: dict[int, int] = field(default_factory=dict)
    nbytes: dict[int, int] = field(default_factory=dict)
    kind: dict[int, int] = field(default_factory=dict)
    moving: dict[int, tuple[int, ...]] = field(
        default_factory=dict
    )  # by tensor awaited: storages a transfer uses

    def copy(self) -> "_Held":
        return _Held(
            self.storage_of.copy(),
            self.users.copy(),
            self.nbytes.copy(),
            self.kind.copy(),
            self.moving.copy(),
        )

    def key(self) -> object:
        """Equal for equal states, whatever the order in which they came about."""
        parts = (self.storage_of, self.users, self.nbytes, self.kind, self.moving)
        return tuple(frozenset(part.items()) for part in parts)


class _Walk:
    """One execution of a body, in bytes relative to its start."""

    def __init__(self, role: Role, footprints: Sequence[Footprint], held: _Held, lingering: int) -> None:
        self.role, self.footprints, self.held = role, footprints, held
        self.now = [0] * len(CLASSES)
        self.now[COMMUNICATION] -= lingering
        self.total = -lingering
        self.peak, self.at_peak = 0, [0] * len(CLASSES)
        self.instruction: int | None = None
        self.sent: set[int] = set()
        self.lingering = 0

    def body(self, body: Body) -> None:
        for instruction in body.instructions:
            self._execute(instruction)
            if self.total > self.peak:
                self._record(instruction, 0, 0)

    def _record(self, instruction: Instruction, kept: int, temporary: int) -> None:
        self.peak, self.instruction = self.total + kept + temporary, instruction.id
        self.at_peak = list(self.now)
        self.at_peak[ACTIVATIONS] += kept
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
                storage = self.held.storage_of.get(ins.tensor)
                self.sent |= set() if storage is None else {storage}
            case Wait():
                for tensor in ins.tensors:
                    self._settle(tensor)
            case Free():
                for tensor in ins.tensors:
                    self._release(self.held.storage_of.pop(tensor, None))
            case Accumulate():
                self._load(ins.reads)
            case Update():
                pass
            case _:
                assert_never(ins)

    def _compute(self, ins: Compute) -> None:
        self._load(ins.reads)
        run = self.footprints[ins.segment]
        if self.total + run.peak_bytes > self.peak:
            self._record(ins, run.kept_at_peak, run.peak_bytes - run.kept_at_peak)
        made: dict[int, int | None] = {i: self.held.storage_of.get(t) for i, t in enumerate(ins.reads)}
        for tensor, output in zip(ins.writes, run.outputs, strict=True):
            if not self.role.tensors[tensor].is_per_microbatch:
                continue
            if output.storage not in made:
                made[output.storage] = self._make(tensor, output.nbytes, ACTIVATIONS)
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
            self.held.kind[arrived] = ACTIVATIONS
            self.now[COMMUNICATION] -= self.held.nbytes[arrived]
            self.now[ACTIVATIONS] += self.held.nbytes[arrived]

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
        if storage in self.sent:
            self.now[COMMUNICATION] += nbytes
            self.lingering += nbytes
        else:
            self.total -= nbytes
