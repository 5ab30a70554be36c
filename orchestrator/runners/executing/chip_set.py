"""A set of chips in one process: worker threads carry the chips' machines forward until all are done.

One worker per core (or a single one in the calling thread, so that a debugger works). A chip is run by one worker at
a time and until it blocks; a meeting is carried out by the worker that completes it. Which worker does what never
changes a result: every tensor operation has fixed operands, and reductions are in chip order.
"""

import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from kernels.backend import one_thread_per_chip, prepare_thread
from orchestrator.runners.executing.chip import Chip, Mark, SegmentLibrary, Settings, StepInput
from orchestrator.runners.executing.executor import Batches, Outcome
from orchestrator.runners.executing.meetings import Mail, Meetings
from partitioner.program.machine import Key, Machine, Post
from partitioner.program.program import Program, Update

STATS = {"step": "update.stats", "evaluate": "report.stats"}  # where a schedule leaves its reduced statistics


class Stuck(RuntimeError):
    """Nothing can move although not all chips are done; the message lists what each chip waits for."""


@dataclass
class _Work:
    """Shared state of one schedule's execution; `lock` guards all of it."""

    machines: dict[int, Machine]
    ready: deque[int]
    due: deque[Key]
    arrived: dict[int, list[Key]]
    running: set[int]
    meeting: int = 0
    error: BaseException | None = None


class ChipSet:
    """The chips `local` of a Program, executed by `num_workers` threads; other chips are reached through `mail`."""

    def __init__(
        self,
        program: Program,
        local: Sequence[int],
        settings: Settings,
        *,
        num_workers: int,
        actor_of: Sequence[int] | None = None,
        actor: int = 0,
        mail: Mail | None = None,
        timeout_s: float | None = None,
    ) -> None:
        library = SegmentLibrary(program, settings.device)
        self.program, self.settings, self.mail, self.timeout_s = program, settings, mail, timeout_s
        self.chips = {i: Chip(program, i, library, settings) for i in local}
        self.actor_of = tuple(actor_of) if actor_of is not None else (actor,) * program.num_chips
        self.meetings = Meetings(self.chips, self.actor_of, actor, mail)
        self.num_workers = max(1, min(num_workers, len(self.chips)))
        self.changed = threading.Condition()
        self.work: _Work | None = None
        self.epoch = 0  # number of the execution: actors may be one ahead of each other
        self.early: dict[int, list[tuple[Key, int, torch.Tensor]]] = {}

    def load(self, values: Callable[[str], torch.Tensor]) -> None:
        """Give every chip its parameters and buffers, then compute its constants."""
        with torch.no_grad():
            for chip in self.chips.values():
                chip.load(values)
        self.run("start", StepInput(0.0), {})

    def run(
        self,
        schedule: str,
        step_input: StepInput,
        batches: Batches,
        *,
        measure: bool = False,
        check: bool = False,
    ) -> Outcome:
        """Execute a schedule on all local chips; `batches[dp]` are the batch tensors of a replica.

        `measure` records marks; `check` looks for the first instruction with a non-finite result. Raises Stuck.
        """
        machines = {}
        for index, chip in self.chips.items():
            mine = StepInput(step_input.lr, batches.get(chip.coordinates["dp"], {}))
            chip.marks, chip.checked = ([] if measure else None), check
            machines[index] = chip.begin(schedule, mine)
        work = _Work(machines, deque(machines), deque(), {i: [] for i in machines}, set())
        with self.changed:
            self.epoch += 1
            self.work = work
            for key, source, tensor in self.early.pop(self.epoch, ()):
                self.meetings.deliver(key, source, tensor)
        with one_thread_per_chip():
            self._run_workers(work)
        if work.error is not None:
            self.meetings.open.clear()  # keys start again at the next execution
            raise work.error
        return self._outcome(STATS.get(schedule))

    def _run_workers(self, work: _Work) -> None:
        helpers = [
            threading.Thread(target=self._helper, args=(work,), daemon=True)
            for _ in range(self.num_workers - 1)
        ]
        for helper in helpers:
            helper.start()
        self._worker(work)
        for helper in helpers:
            helper.join()

    def _helper(self, work: _Work) -> None:
        prepare_thread()
        self._worker(work)

    def _worker(self, work: _Work) -> None:
        try:
            while True:
                with self.changed:
                    task = self._next(work)
                if task is None:
                    return
                if isinstance(task, Key):
                    self._meet(work, task)
                else:
                    self._advance(work, task)
        except BaseException as error:  # a worker's failure ends the whole execution, in the caller's thread
            with self.changed:
                work.error = work.error or error
                self.changed.notify_all()

    def _next(self, work: _Work) -> int | Key | None:
        """The next thing to do (called with the lock); None at the end or after an error."""
        while work.error is None:
            if work.due:
                work.meeting += 1
                return work.due.popleft()
            if work.ready:
                chip = work.ready.popleft()
                work.running.add(chip)
                return chip
            if not work.running and all(m.done for m in work.machines.values()):
                self.changed.notify_all()
                return None
            is_idle = not work.running and not work.meeting
            if is_idle and self.mail is None:
                raise Stuck(self.explain(work))
            if not self.changed.wait(self.timeout_s) and is_idle:
                raise Stuck(self.explain(work))
        return None

    def explain(self, work: _Work) -> str:
        """Which chip waits where, and for whom (called with the lock)."""
        lines = []
        for index, machine in work.machines.items():
            if index in work.running:  # its worker moves the machine without the lock
                lines.append(f"chip {index} ({machine.role.name}) is running")
            elif not machine.done:
                missing = (
                    f"{k.kind} {k.chips} #{k.number}, missing {self._missing(k)}"
                    for k in machine.blocked_on()
                )
                lines.append(f"{machine.position()} waits for {'; '.join(missing) or 'nothing'}")
        return "\n".join(lines)

    def _missing(self, key: Key) -> list[int]:
        meeting = self.meetings.open.get(key)
        present = {*meeting.posts, *meeting.values} if meeting else set()
        return [c for c in key.chips if c not in present]

    def _advance(self, work: _Work, index: int) -> None:
        """Run one chip until it blocks."""
        machine, chip = work.machines[index], self.chips[index]
        while True:
            with self.changed:
                for key in work.arrived[index]:
                    machine.arrive(key)
                work.arrived[index].clear()
                item = machine.ready()
                if item is None:
                    work.running.discard(index)
                    self.changed.notify_all()
                    return
            if isinstance(item, Post):
                self._post(work, index, item)
            else:
                chip.execute(item)
                machine.complete(item)

    def _post(self, work: _Work, index: int, post: Post) -> None:
        for actor, tensor in self.meetings.outgoing(index, post):
            assert self.mail is not None
            self.mail.send(actor, self.epoch, post.key, index, tensor)
        work.machines[index].complete(post)
        with self.changed:
            if self.meetings.post(index, post):
                work.due.append(post.key)
                self.changed.notify()

    def deliver(self, epoch: int, key: Key, source: int, tensor: torch.Tensor) -> None:
        """A contribution of execution `epoch` has come in from another actor (called by the transport's thread)."""
        with self.changed:
            if epoch != self.epoch:
                self.early.setdefault(epoch, []).append((key, source, tensor))
            elif self.meetings.deliver(key, source, tensor):
                assert self.work is not None
                self.work.due.append(key)
                self.changed.notify()

    def _meet(self, work: _Work, key: Key) -> None:
        marks_start = self.settings.clock()
        posts = dict(self.meetings.open[key].posts)
        local = self.meetings.carry_out(key)
        end = self.settings.clock()
        with self.changed:
            work.meeting -= 1
            for index in local:
                chip, post = self.chips[index], posts[index]
                if chip.marks is not None:
                    chip.marks.append(
                        Mark(index, post.call, post.microbatch, post.instruction.id, marks_start, end)
                    )
                work.arrived[index].append(key)
                if index not in work.running and index not in work.ready:
                    work.ready.append(index)
            self.changed.notify_all()

    def _outcome(self, reported: str | None) -> Outcome:
        chip = next(iter(self.chips.values()))
        place = next((t.id for t in chip.tensors if t.name == reported), None)
        value = None if place is None else chip.fixed[place]
        stats = None if value is None else chip.statistics(value)
        marks = tuple(m for c in self.chips.values() for m in (c.marks or ()))
        bad = min((c.first_bad for c in self.chips.values() if c.first_bad), default=None)
        return Outcome(stats, marks, bad)

    def prepare_optimizers(self) -> None:
        """Make every optimizer now (before loading a checkpoint's state)."""
        for chip in self.chips.values():
            for body in chip.role.bodies:
                for instruction in body.instructions:
                    if isinstance(instruction, Update):
                        chip.optimizer(instruction)
