"""What to do when something goes wrong or somebody interrupts: pure functions from state and event to decision.

No clock, no Ray and no file: whoever sees an event tells it, and carries out what is decided.

A call to actors ends with all actors: an actor that has ended, an error in one, and chips that have not moved for too
long are told with their names, and then every actor is ended, so that nobody is left waiting. A step with a result
that is not finite was skipped by the optimizer, so the state before it is saved. The first signal ends the run after
the current step and saves, or at once where no step was taken; Ctrl-C after any signal ends it at once.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from signal import SIGINT, Signals
from typing import assert_never

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
class EndActors:
    """End every actor, then raise `error` from `cause`."""

    error: Exception
    cause: BaseException | None = None


def actor_ended(state: CallState, actor: int, why: str) -> EndActors:
    """The process of an actor is gone; `why`, as far as that is known."""
    hint = "continue from the last checkpoint with --resume"
    return EndActors(RunError(f"actor {actor} has ended: {why}", state.place(actor), hint))


def actor_failed(state: CallState, actor: int, cause: BaseException) -> EndActors:
    """An instruction, or what is around it, raised `cause`."""
    if isinstance(cause, UserError):
        return EndActors(cause)
    problem = f"{type(cause).__name__}: {cause}"
    return EndActors(RunError(problem, state.place(actor), "the full story is in Ray's logs"), cause)


def nobody_finished(
    state: CallState, at_s: float, statuses: tuple[ActorStatus | None, ...]
) -> CallState | EndActors:
    """What each actor says of itself at `at_s`, None where it does not answer.

    Chips that moved since the last time are waited for; those that have not for too long hang.
    """
    progress = tuple(None if status is None else status.progress for status in statuses)
    since_s = state.since_s if progress == state.progress else at_s
    if at_s - since_s < state.timeout_s:
        return replace(state, progress=progress, since_s=since_s)
    waits = (
        f"actor {actor}: {status.waits if status else 'does not answer'}"
        for actor, status in enumerate(statuses)
    )
    return EndActors(
        HangError(
            f"no chip has moved for {state.timeout_s:g} s while {DOING.get(state.doing, state.doing)}",
            "\n".join(waits),
            f"if it is only slow, wait longer: --set 'hang_timeout={2 * state.timeout_s:g} s'; "
            "a real hang is a bug worth reporting",
        )
    )


class RunPhase(StrEnum):
    """How far a command is when a signal comes."""

    COMING = "before it is known what is asked"
    START = "before the first step"
    TRAINING = "between the first step and the last checkpoint"
    OVER = "nothing is left that could be lost"


class RunEnd(StrEnum):
    """How a command ends that a signal asks to, in words."""

    UNSTARTED = "ending"
    SAVED = "ending after this step, which is saved (Ctrl-C ends at once)"
    AS_ASKED = "ending already (Ctrl-C ends at once)"
    REACHED = "ending as it would have, all is done"
    AT_ONCE = "ended at once, without saving"


def interrupted(received: Sequence[Signals], phase: RunPhase) -> RunEnd:
    """What the last of these signals does.

    Only Ctrl-C is pressed twice by somebody who cannot wait; others follow the first one as its reminders, or from a
    batch system that asks once more before it kills.
    """
    if len(received) > 1:
        return RunEnd.AT_ONCE if received[-1] is SIGINT else RunEnd.AS_ASKED
    match phase:
        case RunPhase.COMING | RunPhase.START:
            return RunEnd.UNSTARTED
        case RunPhase.TRAINING:
            return RunEnd.SAVED
        case RunPhase.OVER:
            return RunEnd.REACHED
        case _:
            assert_never(phase)


def not_finite(step: int, where: str | None) -> RunError:
    """What ends a run once the state before `step` is saved; `where`: what made its result not finite, if found."""
    return RunError(
        f"the loss or a gradient is not finite at step {step}",
        where or "the optimizer's statistics",
        "lower optimizer.lr or lengthen the warm-up; the checkpoint before this step is saved",
    )
