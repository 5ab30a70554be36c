"""What is decided about a failure, without an actor, a clock or a file."""

from dataclasses import replace
from signal import SIGHUP, SIGINT, SIGTERM, SIGUSR1

import pytest

from comms.errors import HangError, PlanError, RunError
from orchestrator.runners.failure import (
    ActorStatus,
    CallState,
    EndActors,
    RunEnd,
    RunPhase,
    actor_ended,
    actor_failed,
    interrupted,
    nobody_finished,
    not_finite,
)

CALL = CallState("step", ((0, 1), (2,)), timeout_s=10.0, since_s=0.0)
MOVING, STILL = ActorStatus((1, 7), ""), ActorStatus((1, 5), "chip 0 waits for p2p (0, 2) #3, missing [2]")


def test_an_actor_that_has_ended_ends_all_with_its_name_and_chips() -> None:
    decision = actor_ended(CALL, 0, "its machine is gone")
    assert isinstance(decision, EndActors) and isinstance(decision.error, RunError)
    assert decision.error.problem == "actor 0 has ended: its machine is gone"
    assert decision.error.where == "actor 0 (chips 0, 1) while executing a step"
    assert "--resume" in decision.error.hint


def test_an_error_in_an_instruction_keeps_its_type_and_its_cause() -> None:
    cause = KeyError("input_ids")
    decision = actor_failed(replace(CALL, doing="saving"), 1, cause)
    assert isinstance(decision, EndActors) and isinstance(decision.error, RunError)
    assert decision.error.problem == "KeyError: 'input_ids'"
    assert decision.error.where == "actor 1 (chip 2) while saving"
    assert decision.cause is cause


def test_an_error_that_names_its_place_itself_is_raised_as_it_is() -> None:
    cause = PlanError("does not divide", "plan", "change it")
    assert actor_failed(CALL, 1, cause) == EndActors(cause)


def test_chips_that_move_are_waited_for_however_long() -> None:
    state = CALL
    for at_s in (9.0, 18.0, 27.0):
        state = nobody_finished(state, at_s, (replace(MOVING, progress=(at_s,)), STILL))
        assert isinstance(state, CallState)
    assert state.since_s == 27.0


def test_a_silent_actor_is_named_with_those_who_wait_for_it_once_nothing_has_moved_for_too_long() -> None:
    seen = (STILL, None)
    first = nobody_finished(CALL, 1.0, seen)
    assert isinstance(first, CallState)
    assert isinstance(nobody_finished(first, 10.9, seen), CallState)
    decision = nobody_finished(first, 11.0, seen)
    assert isinstance(decision, EndActors) and isinstance(decision.error, HangError)
    assert "no chip has moved for 10 s while executing a step" in decision.error.problem
    assert "--set 'hang_timeout=20 s'" in decision.error.hint
    assert decision.error.where == f"actor 0: {STILL.waits}\nactor 1: does not answer"


@pytest.mark.parametrize("where", [None, "chip 3 (stage 1), microbatch 0, instruction 7 (mlp)"])
def test_a_step_that_is_not_finite_is_named_with_the_instruction(where: str | None) -> None:
    error = not_finite(5, where)
    assert error.problem == "the loss or a gradient is not finite at step 5"
    assert error.where == (where or "the optimizer's statistics")


def test_the_first_signal_decides_and_ctrl_c_after_it_ends_at_once() -> None:
    ends = {phase: interrupted([SIGTERM], phase) for phase in RunPhase}
    assert ends[RunPhase.COMING] is ends[RunPhase.START] is RunEnd.UNSTARTED
    assert (ends[RunPhase.TRAINING], ends[RunPhase.OVER]) == (RunEnd.SAVED, RunEnd.REACHED)
    for phase in RunPhase:
        assert interrupted([SIGUSR1, SIGINT], phase) is RunEnd.AT_ONCE
        assert interrupted([SIGINT, SIGTERM, SIGHUP], phase) is RunEnd.AS_ASKED
