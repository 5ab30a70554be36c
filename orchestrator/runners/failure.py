"""What to do when something goes wrong or somebody interrupts: a pure function from state and event to decision.

No clock, no Ray and no file: whoever sees an event tells it, and carries out what is decided.

A call to actors ends with all actors: an actor that has ended, an error in one, and chips that have not moved for too
long are told with their names, and then every actor is ended, so that nobody is left waiting. A step with a result
that is not finite was skipped by the optimizer, so the state before it is saved. The first interrupt ends the run
after the current step and saves, the second ends it at once.
"""

from dataclasses import dataclass, replace
from typing import TypeAlias, assert_never

from comms.errors import HangError, RunError, UserError

DOING = {"step": "executing a step", "evaluate": "evaluating"}  # schedules in words


@dataclass(frozen=True, slots=True)
class ActorStatus:
    """How far an actor's chips are: `progress` changes whenever one moves, `waits` says who waits for whom."""

    progress: tuple[object, ...]
    waits: str


@dataclass(frozen=True, slots=True)
class CallState:
    """A call to every actor that is going on: what for, since when nothing has moved, and which chips each has."""

    doing: str
    chips: tuple[tuple[int, ...], ...]
    timeout_s: float  # without any movement
    since_s: float
    progress: tuple[object, ...] | None = None

    def place(self, actor: int) -> str:
        """An actor with its chips, and what it was asked to do."""
        chips = ", ".join(map(str, self.chips[actor]))
        named = f"chip {chips}" if len(self.chips[actor]) == 1 else f"chips {chips}"
        return f"actor {actor} ({named}) while {DOING.get(self.doing, self.doing)}"


@dataclass(frozen=True, slots=True)
class RunState:
    """A run of training: steps done, steps to do, and how often somebody has asked for its end."""

    step: int
    steps: int
    interrupts: int = 0


@dataclass(frozen=True, slots=True)
class ActorEnded:
    """The process of an actor is gone."""

    actor: int


@dataclass(frozen=True, slots=True)
class ActorFailed:
    """An instruction, or what is around it, raised `cause`."""

    actor: int
    cause: BaseException


@dataclass(frozen=True, slots=True)
class StatusesCame:
    """Nobody has finished; what each actor says of itself at `at_s`, None where it does not answer."""

    at_s: float
    statuses: tuple[ActorStatus | None, ...]


@dataclass(frozen=True, slots=True)
class NotFinite:
    """The loss or a gradient of the next step is not finite; the first instruction that made it so, if found."""

    where: str | None


@dataclass(frozen=True, slots=True)
class StepEnded:
    """A step is over."""


@dataclass(frozen=True, slots=True)
class Interrupted:
    """Somebody asks for the end of the run."""


@dataclass(frozen=True, slots=True)
class GoOn:
    """Nothing to do but to remember `state`."""

    state: "State"


@dataclass(frozen=True, slots=True)
class EndActors:
    """End every actor, then raise `error` from `cause`."""

    error: Exception
    cause: BaseException | None = None


@dataclass(frozen=True, slots=True)
class SaveAndStop:
    """Save, then raise `error`; without one, end as somebody asked."""

    error: RunError | None = None


@dataclass(frozen=True, slots=True)
class StopAtOnce:
    """End without saving."""


State: TypeAlias = CallState | RunState
CallEvent: TypeAlias = ActorEnded | ActorFailed | StatusesCame
RunEvent: TypeAlias = NotFinite | StepEnded | Interrupted
Decision: TypeAlias = GoOn | EndActors | SaveAndStop | StopAtOnce


def in_call(state: CallState, event: CallEvent) -> GoOn | EndActors:
    """What becomes of a call to all actors."""
    match event:
        case ActorEnded(actor):
            hint = "was it killed, or out of memory? continue from the last checkpoint with --resume"
            return EndActors(RunError(f"actor {actor} has ended", state.place(actor), hint))
        case ActorFailed(actor, cause):
            if isinstance(cause, UserError):
                return EndActors(cause)
            problem = f"{type(cause).__name__}: {cause}"
            return EndActors(RunError(problem, state.place(actor), "the full story is in Ray's logs"), cause)
        case StatusesCame(at_s, statuses):
            return _after_silence(state, at_s, statuses)
        case _:
            assert_never(event)


def in_run(state: RunState, event: RunEvent) -> GoOn | SaveAndStop | StopAtOnce:
    """What becomes of a run of training."""
    match event:
        case NotFinite(where):
            return SaveAndStop(
                RunError(
                    f"the loss or a gradient is not finite at step {state.step + 1}",
                    where or "the optimizer's statistics",
                    "lower optimizer.lr or lengthen the warm-up; the checkpoint before this step is saved",
                )
            )
        case StepEnded():
            return SaveAndStop() if state.interrupts and state.step < state.steps else GoOn(state)
        case Interrupted():
            return StopAtOnce() if state.interrupts else GoOn(replace(state, interrupts=1))
        case _:
            assert_never(event)


def _after_silence(
    state: CallState, at_s: float, statuses: tuple[ActorStatus | None, ...]
) -> GoOn | EndActors:
    """Chips that moved since the last time are waited for; those that have not for too long hang."""
    progress = tuple(None if status is None else status.progress for status in statuses)
    since_s = state.since_s if progress == state.progress else at_s
    if at_s - since_s < state.timeout_s:
        return GoOn(replace(state, progress=progress, since_s=since_s))
    waits = (
        f"actor {actor}: {status.waits if status else 'does not answer'}"
        for actor, status in enumerate(statuses)
    )
    return EndActors(
        HangError(
            f"no chip has moved for {state.timeout_s:g} s while {DOING.get(state.doing, state.doing)}",
            "\n".join(waits),
            "a real hang is a bug worth reporting; for very slow steps raise the timeout",
        )
    )
