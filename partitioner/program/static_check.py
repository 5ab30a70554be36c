"""The static check: is this Program well formed, does it use its tensors rightly, and can it never hang?

Three passes, each trusting the one before: structure (`structure.py`), lifetimes, rendezvous. A Program without
findings runs to the end of every schedule on any number of chips, under zero buffering. Not checked: numerics, and that
operations give what their specs promise.

Lifetimes: along every schedule, each value is written, then read, then freed, and no transfer is disturbed. Followed
role by role, call by call. What a body does depends only on the state in which it is called (that of its microbatch
and that of the persistent tensors), so each (body, state) is followed once: the cost does not grow with microbatches.
A microbatch's tensor is written before it is read, not written again while it lives, and freed by the end of the
schedule; batch entries are there from the start. What a transfer writes may be touched only after a Wait; what a
collective reads may not be written before the Wait on its result. A send needs no Wait, so what is sent must not be
written again: it lives until its Free. Gradients and scalars are written before they are read; other persistent
tensors hold values from earlier steps, constants from their source or from the schedule "start". Not checked: that
views of one buffer together cover what is read through another.

Rendezvous: every send, receive and collective finds its partners, they agree, and no chips wait in a circle. The
machines of `machine.py` are driven to a fixpoint under zero buffering: a transfer finishes only when every party has
posted it as the same number on its channel. What finishes here finishes with any amount of buffering and any speeds,
because a machine's next step depends on nothing but finished transfers (a Kahn network: one fixpoint).

Folding. All chips of a role execute one instruction stream, and groups and peers are named by axes, so exchanging
coordinates along dp or tp maps the system onto itself: chips of a role that start alike are alike after every step.
Hence one chip per role is driven, and a communication takes place when its driven members have posted: the others
have, too. A collective that stays within a role takes place at once. Sizes along other axes than pp are cut to at most
2, which keeps apart exactly those groups that are apart in the full mesh (two groups have the same members only if they
differ in axes of size 1), so channels are numbered as at full size. The cost does not depend on dp and tp.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain, islice

from comms.errors import ProgramError
from partitioner.program.instructions import named, reads, writes
from partitioner.program.machine import BodyState, BodyStates, Key, Machine, Post
from partitioner.program.program import (
    Body,
    Call,
    Collective,
    Free,
    Instruction,
    Program,
    Recv,
    Role,
    Send,
    TensorKind,
    Wait,
)
from partitioner.program.structure import Finding, InstructionPlace, check_structure, representative

MOST_FINDINGS = 50  # later ones mostly follow from earlier ones
START = "start"
WRITTEN_EACH_STEP = (TensorKind.GRAD, TensorKind.SCALAR)
ABSENT, LIVE, FREED = "never written", "live", "freed"


def check_program(program: Program) -> tuple[Finding, ...]:
    """All findings (the first 50), the most basic first; empty if the Program is valid."""
    structure = tuple(islice(check_structure(program), MOST_FINDINGS))
    execution = chain(check_lifetimes(program), check_rendezvous(program))
    return structure or tuple(islice(execution, MOST_FINDINGS))


def require_valid(program: Program) -> None:
    """Raises ProgramError with the first finding if there is any."""
    findings = check_program(program)
    if findings:
        more = f" (and {len(findings) - 1} more)" if len(findings) > 1 else ""
        first = findings[0]
        raise ProgramError(f"{first}{more}", first.where, "orchestrate's own mistake unless edited by hand")


def check_lifetimes(program: Program) -> Iterator[Finding]:
    """Findings of every role and schedule; assumes that the structure is sound."""
    for role in program.roles:
        chip = representative(program, role)
        made = _written_by(role, role.schedule.get(START, ()))
        for name, calls in role.schedules:
            yield from _RoleLifetimes(role, chip, frozenset() if name == START else made).follow(name, calls)


def _written_by(role: Role, calls: Sequence[Call]) -> frozenset[int]:
    bodies = {call.body for call in calls}
    return frozenset(t for body in bodies for ins in role.body[body].instructions for t in writes(ins))


@dataclass(eq=False)
class _Tensors(BodyState):
    """Tensors by status, and transfers under way: awaited tensor -> tensors that may not be written meanwhile."""

    status: dict[int, str] = field(default_factory=dict)
    moving: dict[int, tuple[int, ...]] = field(default_factory=dict)


class _RoleLifetimes:
    """One role along one schedule."""

    def __init__(self, role: Role, chip: int, made: frozenset[int]) -> None:
        self.role, self.chip, self.made = role, chip, made
        self.root = [_root(role, t.id) for t in role.tensors]

    def follow(self, name: str, calls: Sequence[Call]) -> Iterator[Finding]:
        states = BodyStates(_Tensors())
        shared = states.first
        owned: dict[int, _Tensors] = {}
        known: dict[tuple[str, _Tensors, _Tensors], tuple[_Tensors, _Tensors]] = {}
        for call in calls:
            key = (call.body, owned.get(call.microbatch, states.first), shared)
            if key not in known:
                walk = _BodyLifetimes(self, key[1].copy(), shared.copy())
                yield from walk.body(self.role.body[call.body], call)
                known[key] = (states.unique(walk.own), states.unique(walk.shared))
            owned[call.microbatch], shared = known[key]
        yield from self._end(name, calls, owned, shared)

    def _end(
        self, name: str, calls: Sequence[Call], owned: dict[int, _Tensors], shared: _Tensors
    ) -> Iterator[Finding]:
        left = dict.fromkeys(shared.moving, (None, "is still on its way"))  # type: dict[int, tuple[int | None, str]]
        for microbatch, state in reversed(owned.items()):
            alive = (t for t, status in state.status.items() if status == LIVE)
            left |= dict.fromkeys(alive, (microbatch, "is not freed"))
            left |= dict.fromkeys(state.moving, (microbatch, "is still on its way"))
        for tensor in sorted(left):
            owner, problem = left[tensor]
            instance = f"t{tensor}" if owner is None else f"t{tensor} of microbatch {owner}"
            said = f"{instance} {problem} by the end of schedule {name}"
            yield self._last_use(tensor, calls, owner).finding(said)

    def _last_use(self, tensor: int, calls: Sequence[Call], owner: int | None) -> InstructionPlace:
        return next(
            InstructionPlace(self.chip, self.role, call, ins)
            for call in reversed(calls)
            if owner in (None, call.microbatch)
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


class _BodyLifetimes:
    """One body followed from one state."""

    def __init__(self, along: _RoleLifetimes, own: _Tensors, shared: _Tensors) -> None:
        self.along, self.role, self.root = along, along.role, along.root
        self.own, self.shared = own, shared

    def body(self, body: Body, call: Call) -> Iterator[Finding]:
        for ins in body.instructions:
            for problem in self._execute(ins):
                yield InstructionPlace(self.along.chip, self.role, call, ins).finding(problem)

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

    def _state(self, tensor: int) -> _Tensors:
        return self.own if self.role.tensors[tensor].is_per_microbatch else self.shared

    def _read(self, tensor: int) -> Iterator[str]:
        declared, root = self.role.tensors[tensor], self.root[tensor]
        arriving = next((t for t in self._state(tensor).moving if self.root[t] == root), None)
        if arriving is not None:
            yield f"it reads t{tensor} while t{arriving} is on its way: a wait is missing"
        if declared.is_per_microbatch:
            default = LIVE if declared.kind is TensorKind.BATCH else ABSENT
            status = self.own.status.get(tensor, default)
            self.own.status[tensor] = LIVE  # said once, not again at every later read
            if status != LIVE:
                yield f"it reads t{tensor}, which is {status}"
        elif not self._is_there(tensor, root):
            self.shared.status[root] = LIVE
            yield f"it reads t{tensor}, which is never written before"

    def _is_there(self, tensor: int, root: int) -> bool:
        declared = self.role.tensors[tensor]
        if declared.kind in WRITTEN_EACH_STEP:
            return root in self.shared.status
        if declared.kind in (TensorKind.CONSTANT, TensorKind.BUFFER):
            return bool(declared.source) or tensor in self.along.made or root in self.shared.status
        return True

    def _write(self, tensor: int, ins: Instruction) -> Iterator[str]:
        state, root = self._state(tensor), self.root[tensor]
        for awaited, used in state.moving.items():
            if root in (self.root[t] for t in (awaited, *used)):
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
            yield f"it frees t{tensor} again" if status == FREED else f"it frees t{tensor}, which is {status}"
        self.own.status[tensor] = FREED


def check_rendezvous(program: Program) -> Iterator[Finding]:
    """Findings of every schedule; assumes that the structure is sound."""
    for name, _ in program.roles[0].schedules if program.roles else ():
        yield from _Rendezvous(program, name).findings()


def stays_in_role(program: Program, role: Role, ins: Instruction) -> bool:
    """True for what needs no chip of another role."""
    if isinstance(ins, Send | Recv):
        return False
    if not isinstance(ins, Collective) or "pp" not in ins.group.axes:
        return True
    return program.size("pp") == 1 or ins.group.stages == (role.stage,)


class _Rendezvous:
    """One chip per role along one schedule."""

    def __init__(self, program: Program, schedule: str) -> None:
        self.program, self.schedule = program, schedule
        folded = replace(program, axes=tuple((a, n if a == "pp" else min(n, 2)) for a, n in program.axes))
        self.chips = {representative(folded, role): representative(program, role) for role in program.roles}
        self.machines = {
            chip: Machine(folded, chip, schedule, partial(stays_in_role, program, role))
            for chip, role in zip(self.chips, program.roles, strict=True)
        }
        self.open: dict[Key, dict[int, Post]] = {}

    def findings(self) -> Iterator[Finding]:
        runnable = deque(self.machines)
        while runnable:
            chip = runnable.popleft()
            machine = self.machines[chip]
            while (item := machine.ready()) is not None:
                machine.complete(item)
                if isinstance(item, Post):
                    posts = self.open.setdefault(item.key, {})
                    posts[chip] = item
                    if len(posts) == len(self._parties(item.key)):
                        yield from self._meet(item.key, posts)
                        runnable.extend(c for c in posts if c != chip)
        yield from self._stuck()

    def _parties(self, key: Key) -> list[int]:
        return [chip for chip in key.chips if chip in self.machines]

    def _meet(self, key: Key, posts: dict[int, Post]) -> Iterator[Finding]:
        for chip in posts:
            self.machines[chip].arrive(key)
        del self.open[key]
        (first, one), *others = sorted(posts.items())
        mine = self._terms(first, one)
        for chip, post in others:
            theirs = self._terms(chip, post)
            if theirs != mine:
                problem = f"{theirs} meets {mine} of {self._place(first, one)}"
                yield self._place(chip, post).finding(problem)

    def _terms(self, chip: int, post: Post) -> str:
        """What the parties of a communication must agree on."""
        ins = post.instruction
        if isinstance(ins, Collective):
            shapes = f"{self._specs(chip, ins.reads)} -> {self._specs(chip, ins.writes)}"
            return f"{ins.op} {ins.reduction} over {ins.group} dim {ins.dim} of {shapes}"
        return self._specs(chip, (ins.tensor,))

    def _specs(self, chip: int, tensors: tuple[int, ...]) -> str:
        return " ".join(str(self.machines[chip].role.tensors[tensor].spec) for tensor in tensors)

    def _place(self, chip: int, post: Post) -> InstructionPlace:
        machine = self.machines[chip]
        return InstructionPlace(self.chips[chip], machine.role, machine.calls[post.call], post.instruction)

    def _stuck(self) -> Iterator[Finding]:
        """At the fixpoint: a circle of waits, else posts that nobody answers."""
        needs = {chip: self._needs(chip) for chip in self.machines}
        circle = _circle({chip: [other for other, _ in wanted] for chip, wanted in needs.items()})
        if circle:
            yield self._circle_finding(circle, dict(needs))
            return
        for key, posts in self.open.items():
            missing = next(chip for chip in self._parties(key) if chip not in posts)
            for chip, post in posts.items():
                who = f"chip {self.chips[missing]} ({self.machines[missing].role.name})"
                which = f"(number {key.number} of its channel) in schedule {self.schedule}"
                yield self._place(chip, post).finding(f"{who} never joins {which}")

    def _needs(self, chip: int) -> list[tuple[int, Post]]:
        """Chips that this one waits for, with the post of its own that they leave unanswered."""
        machine = self.machines[chip]
        if machine.call == len(machine.calls):
            return []
        keys = machine.blocked_on()
        return [
            (c, self.open[key][chip]) for key in keys for c in self._parties(key) if c not in self.open[key]
        ]

    def _circle_finding(self, circle: list[int], needs: dict[int, list[tuple[int, Post]]]) -> Finding:
        waits = [self._waiting(chip) for chip in circle]
        steps = []
        for chip, where, following in zip(circle, waits, [*circle[1:], circle[0]], strict=True):
            post = next(post for other, post in needs[chip] if other == following)
            joined = f"chip {self.chips[following]} to join instruction {post.instruction.id}"
            steps.append(f"{where} waits for {joined}")
        problem = f"wait cycle in schedule {self.schedule}: " + "; ".join(steps)
        return waits[0].finding(problem)

    def _waiting(self, chip: int) -> InstructionPlace:
        """The Wait that a chip has come to."""
        machine = self.machines[chip]
        call = machine.calls[machine.call]
        wait = machine.role.body[call.body].instructions[machine.index]
        assert isinstance(wait, Wait)
        return InstructionPlace(self.chips[chip], machine.role, call, wait)


def _circle(needs: dict[int, list[int]]) -> list[int]:
    """A cycle of the wait-for graph (empty if there is none), starting at its smallest chip."""
    # those who wait for nobody are taken away until none is left: whoever remains comes to a cycle
    stuck = set(needs)
    while free := {chip for chip in stuck if stuck.isdisjoint(needs[chip])}:
        stuck -= free
    if not stuck:
        return []
    path = [next(chip for chip in needs if chip in stuck)]
    while (following := next(c for c in needs[path[-1]] if c in stuck)) not in path:
        path.append(following)
    circle = path[path.index(following) :]
    first = circle.index(min(circle))
    return [*circle[first:], *circle[:first]]
