"""Rendezvous: every send, receive and collective finds its partners, they agree, and nobody waits in a circle.

The machines of `machine.py` are driven to a fixpoint under zero buffering: a transfer finishes only when every party
has posted it as the same number on its channel. What finishes here finishes with any amount of buffering and any
speeds, because a machine's next step depends on nothing but finished transfers (a Kahn network: one fixpoint).

Folding. All chips of a role execute one instruction stream, and groups and peers are named by axes, so exchanging
coordinates along dp or tp maps the system onto itself: chips of a role that start alike are alike after every step.
Hence one chip per role is driven, and a meeting takes place when its driven members have posted: the others have,
too. A collective that stays within a role meets at once. Sizes along other axes than pp are cut to at most 2, which
keeps apart exactly those groups that are apart in the full mesh (two groups have the same members only if they differ
in axes of size 1), so channels are numbered as at full size. The cost does not depend on dp and tp.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

from partitioner.program.findings import Finding, Rule, at, place, representative
from partitioner.program.machine import Key, Machine, Post
from partitioner.program.program import Collective, Instruction, Program, Recv, Role, Send, TensorSpec, Wait


def check_rendezvous(program: Program) -> Iterator[Finding]:
    """Findings of every schedule; assumes that the structure is sound."""
    names = [name for name, _ in program.roles[0].schedules] if program.roles else []
    for name in names:
        yield from _Meetings(program, name).findings()


def stays_in_role(program: Program, role: Role, ins: Instruction) -> bool:
    """True for what needs no chip of another role."""
    if isinstance(ins, Send | Recv):
        return False
    if not isinstance(ins, Collective) or "pp" not in ins.group.axes:
        return True
    return program.size("pp") == 1 or ins.group.stages == (role.stage,)


class _Meetings:
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
                yield self._at(chip, post, problem)

    def _terms(self, chip: int, post: Post) -> str:
        """What the parties of a meeting must agree on."""
        ins = post.instruction
        if isinstance(ins, Collective):
            shapes = f"{self._specs(chip, ins.reads)} -> {self._specs(chip, ins.writes)}"
            return f"{ins.op} {ins.reduction} over {ins.group} dim {ins.dim} of {shapes}"
        return self._specs(chip, (ins.tensor,))

    def _specs(self, chip: int, tensors: tuple[int, ...]) -> str:
        specs: list[TensorSpec] = [self.machines[chip].role.tensors[t].spec for t in tensors]
        return " ".join(map(str, specs))

    def _place(self, chip: int, post: Post) -> str:
        role, call = self.machines[chip].role, self.machines[chip].calls[post.call]
        return place(self.chips[chip], role, call.body, post.instruction, call)

    def _at(self, chip: int, post: Post, problem: str) -> Finding:
        role, call = self.machines[chip].role, self.machines[chip].calls[post.call]
        return at(Rule.COMMUNICATION, self.chips[chip], role, call.body, post.instruction, problem, call)

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
                stage = self.machines[missing].role.name
                problem = (
                    f"chip {self.chips[missing]} ({stage}) never joins (number {key.number} of its channel)"
                )
                yield self._at(chip, post, f"{problem} in schedule {self.schedule}")

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
        steps = []
        for chip, following in zip(circle, [*circle[1:], circle[0]], strict=True):
            post = next(post for other, post in needs[chip] if other == following)
            machine = self.machines[chip]
            call = machine.calls[machine.call]
            wait = machine.role.body[call.body].instructions[machine.index]
            assert isinstance(wait, Wait)
            standing = place(self.chips[chip], machine.role, call.body, wait, call)
            steps.append(
                f"{standing} waits for chip {self.chips[following]} to join instruction {post.instruction.id}"
            )
        chip = circle[0]
        machine = self.machines[chip]
        call = machine.calls[machine.call]
        wait = machine.role.body[call.body].instructions[machine.index]
        where = place(self.chips[chip], machine.role, call.body, wait, call)
        problem = f"wait cycle in schedule {self.schedule}: " + "; ".join(steps)
        return Finding(Rule.COMMUNICATION, where, problem, self.chips[chip], wait.id)


def _circle(needs: dict[int, list[int]]) -> list[int]:
    """A cycle of the wait-for graph (empty if there is none), starting at its smallest chip."""
    finished: set[int] = set()
    for start in needs:
        path: list[int] = []
        found = _search(start, needs, path, finished)
        if found:
            first = found.index(min(found))
            return [*found[first:], *found[:first]]
    return []


def _search(chip: int, needs: dict[int, list[int]], path: list[int], finished: set[int]) -> list[int]:
    if chip in path:
        return path[path.index(chip) :]
    if chip in finished:
        return []
    path.append(chip)
    for other in needs[chip]:
        found = _search(other, needs, path, finished)
        if found:
            return found
    finished.add(path.pop())
    return []
