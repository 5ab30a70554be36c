"""Ray executor: drives the actors of a `RayStart` through one Program, as `Executor`.

A step is one call to every actor. While the calls run, the driver watches: an actor that ends, or an error in one,
ends the step with a RunError that names the actor and its chips; if no chip moves for `timeout_s`, a HangError says
which chip waits for whom. After either, all actors are ended: nobody is left waiting.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

import ray
import torch
from ray.exceptions import RayActorError, RayTaskError

from comms.errors import HangError, RunError, UserError
from kernels.optimizers import OptimizerSpec
from orchestrator.runners.executing.chip import Mark
from orchestrator.runners.executing.executor import Batches, Outcome, States
from orchestrator.runners.executing.mailbox import Mailbox, batch_key, marks_key, state_key, value_key
from orchestrator.runners.executing.transport import Transport, host_id
from orchestrator.runners.on_ray import needs
from orchestrator.runners.on_ray.actor import DRIVER, Assignment, Order, Report, Standing, marks_from
from orchestrator.runners.on_ray.assignment import assign, chips_of
from partitioner.program.machine import Key
from partitioner.program.program import Program
from partitioner.program.program_codec import encode

if TYPE_CHECKING:
    from orchestrator.runners.on_ray.ray_start import RayStart

LOOK_S = 2.0  # how often the driver asks actors for their standing while it waits
ANSWER_S = 2.0  # how long an actor may take to tell it
ROUND_TRIPS = 5


@dataclass(frozen=True, slots=True)
class RayOptions:
    """What actors need besides the Program: `optimizer` is a specification or a `pkg.module:factory`."""

    optimizer: OptimizerSpec | str
    clip_norm: float | None
    device: str = "cpu"
    timeout_s: float = 300.0  # without any movement


class RayExecutor:
    """Executes a Program on the actors of `start`, which it owns from now on."""

    def __init__(self, start: "RayStart", program: Program, options: RayOptions) -> None:
        start.wait()
        self.start, self.program, self.options = start, program, options
        self.actor_of = assign(program, min(start.plan.num_actors, program.num_chips))
        self.actors = start.actors[: max(self.actor_of) + 1]
        self.chips = [chips_of(self.actor_of, actor) for actor in range(len(self.actors))]
        self.mailbox = Mailbox(options.timeout_s)
        self.transport = Transport(
            DRIVER,
            start.secret,
            lambda epoch, key, _, tensor: self.mailbox.put(epoch, key, tensor),
            interface=start.interface,
            share_memory=start.plan.share_memory,
        )
        self.epoch = 0
        self._is_ended = False
        self._connect()
        self.offsets_ns = [self._offset_ns(actor) for actor in range(len(self.actors))]

    def _connect(self) -> None:
        addresses = {a: self.start.addresses[a] for a in range(len(self.actors))}
        self.transport.connect(addresses)
        options = self.options
        assignment = Assignment(
            self.actor_of, options.optimizer, options.clip_norm, options.device, self.start.plan.workers
        )
        everyone = {**addresses, DRIVER: self.transport.address}
        program = ray.put(encode(self.program))
        self._call("connecting", [a.connect.remote(everyone, program, assignment) for a in self.actors])

    def _offset_ns(self, actor: int) -> int:
        """What to add to the actor's clock; 0 on this host, where processes share one."""
        if self.start.addresses[actor].host == host_id():
            return 0
        best, offset = float("inf"), 0
        for _ in range(ROUND_TRIPS):
            before = time.perf_counter_ns()
            there = ray.get(self.actors[actor].clock.remote())
            after = time.perf_counter_ns()
            if after - before < best:
                best, offset = after - before, (before + after) // 2 - there
        return offset

    def load(self, values: Callable[[str], torch.Tensor]) -> None:
        """See `Executor`."""
        running = self._begin("load")
        needed = [needs.values(self.program, chips) for chips in self.chips]
        for name in sorted({name for wanted in needed for name in wanted}):
            tensor = values(name)
            for actor, wanted in enumerate(needed):
                if name in wanted:
                    self._send(actor, 0, value_key(name), tensor)
        self._call("loading parameters", running)

    def step(self, lr: float, batches: Batches, *, measure: bool = False, check: bool = False) -> Outcome:
        """See `Executor`."""
        return self._run("step", lr, batches, measure, check)

    def evaluate(self, batches: Batches) -> Outcome:
        """See `Executor`."""
        return self._run("evaluate", 0.0, batches, measure=False, check=False)

    def states(self) -> States:
        """See `Executor`."""
        found: dict[int, dict[str, torch.Tensor]] = {}
        for names in self._call("saving", self._begin("send_states")):
            for chip, of_chip in names.items():
                found[chip] = {name: self.mailbox.take(0, state_key(chip, name)) for name in of_chip}
        return dict(sorted(found.items()))

    def restore(self, states: States) -> None:
        """See `Executor`."""
        needed = [sorted(needs.states(self.program, chips)) for chips in self.chips]
        names = [{chip: list(states[chip]) for chip in wanted} for wanted in needed]
        self._require_running()
        running = [actor.restore.remote(of_actor) for actor, of_actor in zip(self.actors, names, strict=True)]
        for actor, wanted in enumerate(needed):
            for chip in wanted:
                for name, tensor in states[chip].items():
                    self._send(actor, 0, state_key(chip, name), tensor)
        self._call("restoring", running)

    def close(self) -> None:
        """End the actors and what `RayStart` started."""
        self._is_ended = True
        self.transport.close()
        self.start.close()

    def _run(self, schedule: str, lr: float, batches: Batches, measure: bool, check: bool) -> Outcome:
        self._require_running()
        self.epoch += 1
        running = []
        for actor, chips in enumerate(self.chips):
            sent = self._send_batches(actor, chips, batches)
            order = Order(schedule, self.epoch, lr, sent, measure, check)
            running.append(self.actors[actor].run.remote(order))
        reports: list[Report] = self._call(schedule, running)
        stats = next((r.stats for r in reports if r.stats is not None), None)
        bad = min((r.first_bad for r in reports if r.first_bad is not None), default=None)
        return Outcome(stats, self._marks() if measure else (), bad)

    def _send_batches(
        self, actor: int, chips: Sequence[int], batches: Batches
    ) -> tuple[tuple[int, int, str], ...]:
        sent = []
        for replica, name in sorted(needs.batches(self.program, chips)):
            for (microbatch, given), tensor in batches.get(replica, {}).items():
                if given == name:
                    self._send(actor, self.epoch, batch_key(replica, microbatch, name), tensor)
                    sent.append((replica, microbatch, name))
        return tuple(sent)

    def _marks(self) -> tuple[Mark, ...]:
        found: list[Mark] = []
        for actor, offset in enumerate(self.offsets_ns):
            found += marks_from(self.mailbox.take(self.epoch, marks_key(actor)), offset)
        return tuple(sorted(found, key=lambda m: m.chip))

    def _send(self, actor: int, epoch: int, key: Key, tensor: torch.Tensor) -> None:
        self.transport.send(actor, epoch, key, DRIVER, tensor)

    def _begin(self, method: str) -> list[Any]:
        self._require_running()
        return [getattr(actor, method).remote() for actor in self.actors]

    def _require_running(self) -> None:
        if self._is_ended:
            raise RunError("the actors have ended", "Ray", "continue from the last checkpoint with --resume")

    def _call(self, doing: str, running: Sequence[Any]) -> list[Any]:
        """Results of calls, one per actor; see the module's docstring for what is watched meanwhile."""
        watch = _Watch(self.options.timeout_s)
        waiting = list(running)
        results: dict[Any, Any] = {}
        while waiting:
            done, waiting = ray.wait(waiting, num_returns=1, timeout=min(LOOK_S, self.options.timeout_s / 2))
            for reference in done:
                try:
                    results[reference] = ray.get(reference)
                except (RayActorError, RayTaskError) as error:
                    self._fail(doing, running.index(reference), error)
            if not done and watch.is_over(self._standings(doing)):
                self._end()
                raise HangError(
                    f"no chip has moved for {self.options.timeout_s:g} s while {_ing(doing)}",
                    "\n".join(watch.waits),
                    "a real hang is a bug worth reporting; for very slow steps raise the timeout",
                )
        return [results[reference] for reference in running]

    def _standings(self, doing: str) -> list[Standing | None]:
        """What each actor says of itself; None if it does not answer."""
        asked = [actor.standing.remote() for actor in self.actors]
        done, _ = ray.wait(asked, num_returns=len(asked), timeout=ANSWER_S)
        answers: list[Standing | None] = []
        for actor, reference in enumerate(asked):
            try:
                answers.append(ray.get(reference) if reference in done else None)
            except (RayActorError, RayTaskError) as error:
                self._fail(doing, actor, error)
        return answers

    def _fail(self, doing: str, actor: int, error: Exception) -> NoReturn:
        self._end()
        where = f"actor {actor} ({self._named(actor)}) while {_ing(doing)}"
        if isinstance(error, RayActorError):
            hint = "was it killed, or out of memory? continue from the last checkpoint with --resume"
            raise RunError(f"actor {actor} has ended", where, hint) from None
        cause = getattr(error, "cause", None) or error
        if isinstance(cause, UserError):
            raise cause
        raise RunError(
            f"{type(cause).__name__}: {cause}", where, "the full story is in Ray's logs"
        ) from error

    def _named(self, actor: int) -> str:
        chips = self.chips[actor]
        return f"chip {chips[0]}" if len(chips) == 1 else f"chips {', '.join(map(str, chips))}"

    def _end(self) -> None:
        """Nobody shall wait for an actor that will not answer."""
        self._is_ended = True
        for actor in self.actors:
            ray.kill(actor)


class _Watch:
    """Notices when nothing moves any more."""

    def __init__(self, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self.since = time.monotonic()
        self.progress: object = None
        self.waits: list[str] = []

    def is_over(self, standings: Sequence[Standing | None]) -> bool:
        """True if these standings have been the same for too long."""
        progress = [None if s is None else s.progress for s in standings]
        if progress != self.progress:
            self.progress, self.since = progress, time.monotonic()
        self.waits = [f"actor {a}: {s.waits if s else 'does not answer'}" for a, s in enumerate(standings)]
        return time.monotonic() - self.since >= self.timeout_s


def _ing(doing: str) -> str:
    return {"step": "executing a step", "evaluate": "evaluating"}.get(doing, doing)
