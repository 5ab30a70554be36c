"""Lifetimes: along every schedule, each value is written, then read, then freed, and no transfer is disturbed.

Followed role by role, call by call. What a body does depends only on the state in which it is called (that of its
microbatch and that of the persistent tensors), so each (body, state) is followed once: the cost does not grow with
microbatches.

Rules. A microbatch's tensor is written before it is read, not written again while it lives, and freed by the end of
the schedule; batch entries are there from the start. What a transfer writes may be touched only after a Wait; what a
collective reads may not be written before the Wait on its result. A send needs no Wait, so what is sent must not be
written again: it lives until its Free. Gradients and scalars are written before they are read; other persistent
tensors hold values from earlier steps, constants from their source or from the schedule "start".
Not checked: that views of one buffer together cover what is read through another.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from partitioner.program.findings import Finding, Rule, at, place, representative
from partitioner.program.instructions import named, reads, writes
from partitioner.program.program import (
    Body,
    Call,
    Collective,
    Free,
    Instruction,
    Program,
    Recv,
    Role,
    TensorKind,
    Wait,
)

START = "start"
WRITTEN_EACH_STEP = (TensorKind.GRAD, TensorKind.SCALAR)
ABSENT, LIVE, FREED = "never written", "live", "freed"


def check_lifetimes(program: Program) -> Iterator[Finding]:
    """Findings of every role and schedule; assumes that the structure is sound."""
    for role in program.roles:
        chip = representative(program, role)
        made = _written_by(role, role.schedule.get(START, ()))
        for name, calls in role.schedules:
            yield from _Schedule(role, chip, frozenset() if name == START else made).follow(name, calls)


def _written_by(role: Role, calls: Sequence[Call]) -> frozenset[int]:
    bodies = {call.body for call in calls}
    return frozenset(t for body in bodies for ins in role.body[body].instructions for t in writes(ins))


@dataclass
class _State:
    """Tensors by status, and transfers under way: awaited tensor -> tensors that may not be written meanwhile."""

    status: dict[int, str] = field(default_factory=dict)
    moving: dict[int, tuple[int, ...]] = field(default_factory=dict)

    def copy(self) -> "_State":
        return _State(self.status.copy(), self.moving.copy())

    def key(self) -> object:
        return frozenset(self.status.items()), frozenset(self.moving.items())


class _Schedule:
    """One role along one schedule. States are numbered; 0 is where nothing has happened."""

    def __init__(self, role: Role, chip: int, made: frozenset[int]) -> None:
        self.role, self.chip, self.made = role, chip, made
        self.root = [_root(role, t.id) for t in role.tensors]
        self.states: list[_State] = [_State()]
        self.numbers: dict[object, int] = {_State().key(): 0}
        self.known: dict[tuple[str, int, int], tuple[int, int]] = {}

    def follow(self, name: str, calls: Sequence[Call]) -> Iterator[Finding]:
        persistent = 0
        states: dict[int, int] = {}
        for call in calls:
            key = (call.body, states.get(call.microbatch, 0), persistent)
            if key not in self.known:
                walk = _Walk(self, self.states[key[1]].copy(), self.states[persistent].copy())
                yield from walk.body(self.role.body[call.body], call)
                self.known[key] = (self._number(walk.own), self._number(walk.shared))
            states[call.microbatch], persistent = self.known[key]
        yield from self._end(name, calls, states, self.states[persistent])

    def _number(self, state: _State) -> int:
        number = self.numbers.setdefault(state.key(), len(self.states))
        if number == len(self.states):
            self.states.append(state)
        return number

    def _end(
        self, name: str, calls: Sequence[Call], states: dict[int, int], shared: _State
    ) -> Iterator[Finding]:
        left = dict.fromkeys(shared.moving, (None, "is still on its way"))  # type: dict[int, tuple[int | None, str]]
        for microbatch, number in reversed(states.items()):
            state = self.states[number]
            alive = (t for t, status in state.status.items() if status == LIVE)
            left |= dict.fromkeys(alive, (microbatch, "is not freed"))
            left |= dict.fromkeys(state.moving, (microbatch, "is still on its way"))
        for tensor in sorted(left):
            owner, problem = left[tensor]
            instance = f"t{tensor}" if owner is None else f"t{tensor} of microbatch {owner}"
            call, ins = self._last_use(tensor, calls, owner)
            where = place(self.chip, self.role, call.body, ins, call)
            said = f"{instance} {problem} by the end of schedule {name}"
            yield Finding(Rule.LIFETIME, where, said, self.chip, ins.id)

    def _last_use(
        self, tensor: int, calls: Sequence[Call], microbatch: int | None
    ) -> tuple[Call, Instruction]:
        return next(
            (call, ins)
            for call in reversed(calls)
            if microbatch in (None, call.microbatch)
            for ins in reversed(self.role.body[call.body].instructions)
            if tensor in named(ins)
        )


def _root(role: Role, tensor: int) -> int:
    """The buffer at the bottom of a chain of views."""
    seen = {tensor}
    base = role.tensors[tensor].base
    while base is not None and base not in seen:
        seen.add(base)
        tensor, base = base, role.tensors[base].base
    return tensor


class _Walk:
    """One body followed from one state."""

    def __init__(self, schedule: _Schedule, own: _State, shared: _State) -> None:
        self.schedule, self.role = schedule, schedule.role
        self.own, self.shared = own, shared

    def body(self, body: Body, call: Call) -> Iterator[Finding]:
        for ins in body.instructions:
            for problem in self._execute(ins):
                yield at(Rule.LIFETIME, self.schedule.chip, self.role, body.name, ins, problem, call)

    def _execute(self, ins: Instruction) -> Iterable[str]:
        if isinstance(ins, Wait):
            for tensor in ins.tensors:
                self._state(tensor).moving.pop(tensor, None)
            return ()
        if isinstance(ins, Free):
            return [p for t in ins.tensors for p in self._free(t)]
        problems = [p for t in reads(ins) for p in self._read(t)]
        problems += [p for t in writes(ins) for p in self._write(t, ins)]
        if isinstance(ins, Recv | Collective):
            for tensor in writes(ins):
                self._state(tensor).moving[tensor] = reads(ins)
        return problems

    def _state(self, tensor: int) -> _State:
        return self.own if self.role.tensors[tensor].is_per_microbatch else self.shared

    def _read(self, tensor: int) -> Iterator[str]:
        declared, root = self.role.tensors[tensor], self.schedule.root[tensor]
        arriving = next((t for t in self._state(tensor).moving if self.schedule.root[t] == root), None)
        if arriving is not None:
            yield f"it reads t{tensor} while t{arriving} is on its way: a wait is missing"
        if declared.is_per_microbatch:
            default = LIVE if declared.kind is TensorKind.BATCH else ABSENT
            status = self.own.status.get(tensor, default)
            self.own.status[tensor] = LIVE
            if status != LIVE:
                yield f"it reads t{tensor}, which is {status}"
        elif not self._is_there(tensor, root):
            self.shared.status[root] = LIVE
            yield f"it reads t{tensor}, which is never written before"

    def _is_there(self, tensor: int, root: int) -> bool:
        declared = self.role.tensors[tensor]
        if declared.kind in WRITTEN_EACH_STEP:
            return root in self.shared.status
        if declared.kind is TensorKind.CONSTANT:
            return bool(declared.source) or tensor in self.schedule.made or root in self.shared.status
        return True

    def _write(self, tensor: int, ins: Instruction) -> Iterator[str]:
        state, root = self._state(tensor), self.schedule.root[tensor]
        for awaited, used in state.moving.items():
            if root in (self.schedule.root[t] for t in (awaited, *used)):
                yield f"it writes t{tensor} while the transfer into t{awaited} uses it: a wait is missing"
                break
        if not self.role.tensors[tensor].is_per_microbatch:
            state.status[root] = LIVE
            return
        if state.status.get(tensor) == LIVE and tensor not in reads(ins):
            yield f"it writes t{tensor}, which still holds a value"
        state.status[tensor] = LIVE

    def _free(self, tensor: int) -> Iterator[str]:
        declared = self.role.tensors[tensor]
        if not declared.is_per_microbatch:
            yield f"it frees t{tensor}, which outlives the microbatch"
            return
        if tensor in self.own.moving:
            yield f"it frees t{tensor} while it is on its way: a wait is missing"
            del self.own.moving[tensor]
        status = self.own.status.get(tensor, LIVE if declared.kind is TensorKind.BATCH else ABSENT)
        if status != LIVE:
            yield (
                f"it frees t{tensor}, which is {status}" if status == ABSENT else f"it frees t{tensor} again"
            )
        self.own.status[tensor] = FREED
