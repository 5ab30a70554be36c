"""A set of chips in one process: worker threads carry the chips' machines forward until all are done.

One worker per core (or a single one in the calling thread, so that a debugger works). A chip is run by one worker at
a time and until it blocks; a communication is carried out by the worker that completes it. Which worker does what never
changes a result: every tensor operation has fixed operands, and reductions are in chip order.

With all chips of a Program it is the inline runner: nothing is started ahead, and with one worker everything happens in
the calling thread (pdb works). An actor holds some chips, and reaches the others by mail.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from comms.errors import ClusterError
from comms.selection.progress import Progress
from kernels.backend import one_thread_per_chip, prepare_thread
from orchestrator.config.hardware.cluster import Cluster, Device
from orchestrator.runners.executing.chip import (
    ExecutingChip,
    SegmentLibrary,
    restore_state,
    saved_state,
)
from orchestrator.runners.executing.header import BadMessage
from orchestrator.runners.executing.own_operators import drawing_nothing, own_operators
from orchestrator.runners.executing.pending_communications import MAX_OPEN, PendingCommunications
from orchestrator.runners.runner import ExecutedStep, Settings, States, StepRequest, num_workers
from orchestrator.runs.timeline import Mark
from partitioner.program.machine import Key, Machine, Post
from partitioner.program.program import Program, Update

STATS = {"step": "update.stats", "evaluate": "report.stats"}  # where a schedule leaves its reduced statistics


class Mail(Protocol):
    """How tensors reach chips of other actors."""

    def send(self, actor: int, epoch: int, key: Key, source: int, tensor: torch.Tensor) -> None:
        """Deliver `tensor` of chip `source` for communication `key`; the tensor may be reused when this returns."""


class Stuck(RuntimeError):
    """Nothing can move although not all chips are done; the message lists what each chip waits for."""


@dataclass
class _Execution:
    """Shared state of one schedule's execution; `lock` guards all of it."""

    machines: dict[int, Machine]
    ready: deque[int]
    due: deque[Key]
    arrived: dict[int, list[Key]]
    running: set[int]
    combining: int = 0  # communications that a worker is carrying out
    error: BaseException | None = None


class ChipSet:
    """The chips of `actor` in a Program (all, without `actor_of`), executed by `num_workers` threads."""

    def __init__(
        self,
        program: Program,
        settings: Settings,
        num_workers: int = 1,
        *,
        actor_of: Sequence[int] | None = None,
        actor: int = 0,
        mail: Mail | None = None,
    ) -> None:
        library = SegmentLibrary(program, settings.device)
        self.program, self.settings, self.mail = program, settings, mail
        actor_of = actor_of or (actor,) * program.num_chips
        local = (chip for chip, holder in enumerate(actor_of) if holder == actor)
        self.chips = {i: ExecutingChip(program, i, library, settings) for i in local}
        self.communications = PendingCommunications(self.chips, actor_of, actor)
        self.own = own_operators(program)
        self.num_workers = max(1, min(num_workers, len(self.chips)))
        self.changed = threading.Condition()
        self.execution: _Execution | None = None
        self.epoch = 0  # number of the execution: actors may be one ahead of each other
        self.early: dict[tuple[Key, int], torch.Tensor] = {}  # of the next execution

    def load(self, values: Callable[[str], torch.Tensor]) -> None:
        """Give every chip its parameters and buffers, then compute its constants."""
        with torch.no_grad():
            for chip in self.chips.values():
                chip.load(values)
        self.run(StepRequest("start"))

    def run(self, request: StepRequest) -> ExecutedStep:
        """Execute a schedule on all local chips. Raises Stuck."""
        start_ns = time.perf_counter_ns()
        machines = {index: chip.begin(request) for index, chip in self.chips.items()}
        execution = _Execution(machines, deque(machines), deque(), {i: [] for i in machines}, set())
        with self.changed:
            self.epoch += 1
            self.execution = execution
            for (key, source), tensor in self.early.items():
                self.communications.deliver(key, source, tensor)
            self.early.clear()
        with (
            one_thread_per_chip(),
            torch.autocast("cpu", enabled=False),
            torch.autocast("cuda", enabled=False),
            drawing_nothing(self.own),
        ):
            self._run_workers(execution)
        if execution.error is not None:
            self.communications.open.clear()  # keys start again at the next execution
            raise execution.error
        return self._result(STATS.get(request.schedule), time.perf_counter_ns() - start_ns)

    def _run_workers(self, execution: _Execution) -> None:
        helpers = [
            threading.Thread(target=self._helper, args=(execution,), daemon=True)
            for _ in range(self.num_workers - 1)
        ]
        for helper in helpers:
            helper.start()
        self._worker(execution)
        for helper in helpers:
            helper.join()

    def _helper(self, execution: _Execution) -> None:
        prepare_thread()
        self._worker(execution)

    def _worker(self, execution: _Execution) -> None:
        try:
            while True:
                with self.changed:
                    task = self._next(execution)
                if task is None:
                    return
                if isinstance(task, Key):
                    self._combine(execution, task)
                else:
                    self._advance(execution, task)
        except BaseException as error:  # a worker's failure ends the whole execution, in the caller's thread
            with self.changed:
                execution.error = execution.error or error
                self.changed.notify_all()

    def _next(self, execution: _Execution) -> int | Key | None:
        """The next thing to do (called with the lock); None at the end or after an error."""
        while execution.error is None:
            if execution.due:
                execution.combining += 1
                return execution.due.popleft()
            if execution.ready:
                chip = execution.ready.popleft()
                execution.running.add(chip)
                return chip
            if not execution.running and all(m.done for m in execution.machines.values()):
                self.changed.notify_all()
                return None
            if not execution.running and not execution.combining and self.mail is None:
                raise Stuck(self.explain(execution))
            self.changed.wait()
        return None

    def explain(self, execution: _Execution) -> str:
        """Which chip waits where, and for whom (called with the lock)."""
        lines = []
        for index, machine in execution.machines.items():
            if index in execution.running:  # its worker moves the machine without the lock
                lines.append(f"chip {index} ({machine.role.name}) is running")
            elif not machine.done:
                missing = (
                    f"{k.kind} {k.chips} #{k.number}, missing {self._missing(k)}"
                    for k in machine.blocked_on()
                )
                lines.append(f"{machine.position()} waits for {'; '.join(missing) or 'nothing'}")
        return "\n".join(lines)

    def _missing(self, key: Key) -> list[int]:
        pending = self.communications.open.get(key)
        present = {*pending.posts, *pending.values} if pending else set()
        return [c for c in key.chips if c not in present]

    def _advance(self, execution: _Execution, index: int) -> None:
        """Run one chip until it blocks."""
        machine, chip = execution.machines[index], self.chips[index]
        while True:
            with self.changed:
                for key in execution.arrived[index]:
                    machine.arrive(key)
                execution.arrived[index].clear()
                item = machine.ready()
                if item is None:
                    execution.running.discard(index)
                    self.changed.notify_all()
                    return
            if isinstance(item, Post):
                self._post(execution, index, item)
            else:
                chip.execute(item)
                machine.complete(item)

    def _post(self, execution: _Execution, index: int, post: Post) -> None:
        for actor, tensor in self.communications.outgoing(index, post):
            assert self.mail is not None
            self.mail.send(actor, self.epoch, post.key, index, tensor)
        execution.machines[index].complete(post)
        with self.changed:
            if self.communications.post(index, post):
                execution.due.append(post.key)
                self.changed.notify()

    def deliver(self, epoch: int, key: Key, source: int, tensor: torch.Tensor) -> None:
        """A contribution of execution `epoch` has come in from another actor (called by the transport's thread).

        Raises BadMessage for one of a time that nobody can be at, or one that is there.
        """
        with self.changed:
            if epoch == self.epoch + 1:
                if (key, source) in self.early or len(self.early) >= MAX_OPEN:
                    raise BadMessage(f"{key.kind} {key.chips} #{key.number} of chip {source} twice")
                self.early[key, source] = tensor
            elif epoch != self.epoch:
                raise BadMessage(f"a contribution to execution {epoch}, while {self.epoch} is under way")
            elif self.communications.deliver(key, source, tensor):
                assert self.execution is not None
                self.execution.due.append(key)
                self.changed.notify()

    def _combine(self, execution: _Execution, key: Key) -> None:
        start = time.perf_counter_ns()
        posts = dict(self.communications.open[key].posts)
        local = self.communications.carry_out(key)
        end = time.perf_counter_ns()
        with self.changed:
            execution.combining -= 1
            for index in local:
                chip, post = self.chips[index], posts[index]
                if chip.marks is not None:
                    chip.marks.append(
                        Mark(index, post.call, post.microbatch, post.instruction.id, start, end)
                    )
                execution.arrived[index].append(key)
                if index not in execution.running and index not in execution.ready:
                    execution.ready.append(index)
            self.changed.notify_all()

    def _result(self, reported: str | None, step_ns: int) -> ExecutedStep:
        chip = next(iter(self.chips.values()))
        place = next((t.id for t in chip.tensors if t.name == reported), None)
        value = None if place is None else chip.fixed[place]
        stats = None if value is None else chip.statistics(value)
        marks = tuple(m for c in self.chips.values() for m in (c.marks or ()))
        bad = min((c.first_bad for c in self.chips.values() if c.first_bad), default=None)
        return ExecutedStep(self.program, step_ns, stats, marks, bad)

    def buffer(self, chip: int, name: str) -> torch.Tensor:
        """A persistent tensor of a local chip, by name."""
        return self.chips[chip].named(name)

    def states(self) -> States:
        """See `TensorRunner`."""
        return {index: saved_state(chip) for index, chip in self.chips.items()}

    def restore(self, states: States) -> None:
        """See `TensorRunner`."""
        for chip in self.chips.values():
            for body in chip.role.bodies:
                for instruction in body.instructions:
                    if isinstance(instruction, Update):
                        chip.optimizer(instruction)  # made now, to be given its state
            restore_state(chip, states.__getitem__)

    def close(self) -> None:
        """Nothing to release."""


class InlineLaunch:
    """Nothing to start ahead: the chips live in this process."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster

    def connect(self, program: Program, settings: Settings, progress: Progress) -> ChipSet:
        """See `Launch`."""
        if self.cluster.device is Device.CUDA:
            raise ClusterError("CUDA chips need a process each", self.cluster.origin, "use --runner ray")

        with progress("start chips"):
            return ChipSet(program, settings, num_workers(self.cluster))

    def keep_logs(self, folder: Path) -> None:
        """There are no other processes."""

    def close(self) -> None:
        """Nothing was started."""
