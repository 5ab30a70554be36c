"""Ray runner: drives the actors of a `RayStart` through one Program.

A step is one call to every actor. While the calls run, the driver watches: what is to be done when an actor ends, an
error comes out of one, or no chip moves for the job's `hang_timeout`, is decided by `failure`. After any of them all
actors are ended: nobody is left waiting.
"""

import sys
import sysconfig
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import ray
import torch
from ray.exceptions import RayActorError, RayTaskError

from comms.errors import RunError
from orchestrator.runners.executing.mailbox import Mailbox, batch_key, marks_key, state_key, value_key
from orchestrator.runners.executing.transport import Arrival, Transport
from orchestrator.runners.failure import (
    ActorStatus,
    CallState,
    EndActors,
    actor_ended,
    actor_failed,
    nobody_finished,
)
from orchestrator.runners.on_ray.actor import ActorReport, marks_from
from orchestrator.runners.on_ray.assignment import (
    assign,
    chips_of,
    needed_batches,
    needed_states,
    needed_values,
)
from orchestrator.runners.on_ray.ray_connection import is_gone
from orchestrator.runners.on_ray.ray_start import RayStart
from orchestrator.runners.on_ray.screening import DRIVER, require_report
from orchestrator.runners.runner import Batches, ExecutedStep, Settings, States, StepRequest
from orchestrator.runs.timeline import Mark
from partitioner.program.machine import Key
from partitioner.program.program import Program
from partitioner.program.program_codec import encode

GONE = "its machine is gone"
# What Ray says of an actor's end, most telling first
CAUSES = (
    ("low on memory", "its machine was out of memory"),
    ("receives a SIGTERM", "its process was told to end (SIGTERM)"),
    ("connection error code 2", "its process was killed or crashed (SIGKILL, out of memory, SIGSEGV)"),
    ("`ray.kill`", "somebody ended it through Ray"),
    ("node", GONE),
    ("unavailable", "its machine is gone, or the way to it"),
)
LOOK_S = 2.0  # how often the driver asks actors for their status while it waits
ANSWER_S = 2.0  # how long an actor may take to tell it
INSTALLED = tuple(sysconfig.get_paths()[kind] for kind in ("purelib", "platlib", "stdlib"))


class RayRunner:
    """Executes a Program on the actors of `start`, which it owns from now on."""

    def __init__(self, start: RayStart, program: Program, settings: Settings) -> None:
        start.wait()
        self.start = start
        self.mailbox = Mailbox(settings.hang_timeout_s)
        self.actor_of: tuple[int, ...] = ()
        self.transport = Transport(start.keys, self._deliver, start.host)
        self._is_ended = False
        self.become(program, settings)

    def become(self, program: Program, settings: Settings) -> None:
        """Take another Program; values are to be loaded anew."""
        self.program, self.epoch, self.timeout_s = program, 0, settings.hang_timeout_s
        self.actor_of = assign(program, self._machines())
        self.actors = self.start.actors[: max(self.actor_of) + 1]
        self.chips = [chips_of(self.actor_of, actor) for actor in range(len(self.actors))]
        ship_by_value(settings)
        self._require_running()
        addresses = {a: self.start.facts[a].address for a in range(len(self.actors))}
        self.transport.connect(addresses)
        everyone = {**addresses, DRIVER: self.transport.address}
        settled = (everyone, ray.put(encode(self.program)), self.actor_of, settings)
        self._call("connecting", [actor.connect.remote(*settled) for actor in self.actors])

    def load(self, values: Callable[[str], torch.Tensor]) -> None:
        """See `TensorRunner`."""
        running = self._begin("load")
        needed = [needed_values(self.program, chips) for chips in self.chips]
        for name in sorted({name for wanted in needed for name in wanted}):
            tensor = values(name)
            for actor, wanted in enumerate(needed):
                if name in wanted:
                    self._send(actor, 0, value_key(name), tensor)
        self._call("loading parameters", running)

    def run(self, request: StepRequest) -> ExecutedStep:
        """See `Runner`."""
        self._require_running()
        start_ns = time.perf_counter_ns()
        self.epoch += 1
        bare, running = replace(request, batches={}), []
        for actor, chips in enumerate(self.chips):
            sent = self._send_batches(actor, chips, request.batches)
            running.append(self.actors[actor].run.remote(bare, self.epoch, sent))
        reports: list[ActorReport] = self._call(request.schedule, running)
        stats = next((r.stats for r in reports if r.stats is not None), None)
        bad = min((r.first_bad for r in reports if r.first_bad is not None), default=None)
        marks = self._marks() if request.measure else ()
        return ExecutedStep(self.program, time.perf_counter_ns() - start_ns, stats, marks, bad)

    def states(self) -> States:
        """See `TensorRunner`."""
        found: dict[int, dict[str, torch.Tensor]] = {}
        for names in self._call("saving", self._begin("send_states")):
            for chip, of_chip in names.items():
                found[chip] = {name: self.mailbox.take(0, state_key(chip, name)) for name in of_chip}
        return dict(sorted(found.items()))

    def restore(self, states: States) -> None:
        """See `TensorRunner`."""
        needed = [sorted(needed_states(self.program, chips)) for chips in self.chips]
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

    def _send_batches(
        self, actor: int, chips: Sequence[int], batches: Batches
    ) -> tuple[tuple[int, int, str], ...]:
        sent = []
        for replica, name in sorted(needed_batches(self.program, chips)):
            for (microbatch, given), tensor in batches.get(replica, {}).items():
                if given == name:
                    self._send(actor, self.epoch, batch_key(replica, microbatch, name), tensor)
                    sent.append((replica, microbatch, name))
        return tuple(sent)

    def _marks(self) -> tuple[Mark, ...]:
        found: list[Mark] = []
        for actor in range(len(self.actors)):
            found += marks_from(self.mailbox.take(self.epoch, marks_key(actor)))
        return tuple(sorted(found, key=lambda m: m.chip))

    def _machines(self) -> list[str]:
        """The machine of each actor that is to have chips, as Ray knows it."""
        return [each.node for each in self.start.facts[: self.program.num_chips]]

    def _deliver(self, message: Arrival) -> None:
        require_report(message, self.actor_of)
        self.mailbox.put(message.epoch, message.key, message.tensor)

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
        state = CallState(doing, tuple(self.chips), self.timeout_s, time.monotonic())
        waiting = list(running)
        results: dict[Any, Any] = {}
        while waiting:
            done, waiting = ray.wait(waiting, num_returns=1, timeout=min(LOOK_S, self.timeout_s / 2))
            for reference in done:
                try:
                    results[reference] = ray.get(reference)
                except (RayActorError, RayTaskError) as error:
                    self._carry_out(_decision(state, running.index(reference), error))
            if self.transport.failure is not None:
                self._carry_out(EndActors(_as_run_error(self.transport.failure), self.transport.failure))
            if not done:
                self._require_machines(state, [running.index(each) for each in waiting])
                statuses = self._statuses(state)
                state = self._carry_out(nobody_finished(state, time.monotonic(), statuses))
        return [results[reference] for reference in running]

    def _require_machines(self, state: CallState, actors: Sequence[int]) -> None:
        """Whose machine refuses us is lost; Ray, which counts heartbeats, says so up to ten seconds later."""
        for actor in actors:
            if is_gone(self.start.facts[actor].node, self.start.raylets):
                self._carry_out(actor_ended(state, actor, GONE))

    def _statuses(self, state: CallState) -> tuple[ActorStatus | None, ...]:
        """What each actor says of itself; None if it does not answer."""
        asked = [actor.status.remote() for actor in self.actors]
        done, _ = ray.wait(asked, num_returns=len(asked), timeout=ANSWER_S)
        answers: list[ActorStatus | None] = []
        for actor, reference in enumerate(asked):
            try:
                answers.append(ray.get(reference) if reference in done else None)
            except (RayActorError, RayTaskError) as error:
                self._carry_out(_decision(state, actor, error))
        return tuple(answers)

    def _carry_out(self, decision: CallState | EndActors) -> CallState:
        if isinstance(decision, EndActors):
            self._is_ended = True
            for actor in self.actors:
                ray.kill(actor)
            raise decision.error from decision.cause
        return decision


def ship_by_value(settings: Settings) -> None:
    """The user's own optimizer goes to the actors whole: they may not find the file or module that it is from."""
    kind = type(settings.optimizer([torch.zeros(1, requires_grad=True)]))
    for each in kind.__mro__:
        module = sys.modules.get(each.__module__)
        file = getattr(module, "__file__", None)
        if module is not None and file and not file.startswith(INSTALLED) and each.__module__ != "__main__":
            ray.cloudpickle.register_pickle_by_value(module)


def _as_run_error(error: BaseException) -> Exception:
    if isinstance(error, RunError):
        return error
    return RunError(f"{type(error).__name__}: {error}", "the driver's transport", "a bug worth reporting")


def _decision(state: CallState, actor: int, error: Exception) -> EndActors:
    if isinstance(error, RayActorError):
        return actor_ended(state, actor, _why(str(error)))
    return actor_failed(state, actor, getattr(error, "cause", None) or error)


def _why(said: str) -> str:
    """What Ray tells of an actor's end, in a few words."""
    for words, why in CAUSES:
        if words in said:
            return why
    first = next((line.strip() for line in said.splitlines() if line.strip()), "Ray does not say why")
    return first[:200]
