"""Later forwards: now and then the forward runs again on fake tensors, and must call what it called at its capture.

Whatever marks cannot see (see `python_state`) is found that way at the next such step, before it is trained.
"""

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from comms.errors import PlanError, method_line
from orchestrator.verbs.state.python_state import PythonState
from partitioner.capture.batch_inputs import Batch
from partitioner.capture.forwards.host_values import CalledWith
from partitioner.capture.tracing import calls_of

MAX_KEPT = 16  # situations
DENSE = 4  # steps after a capture with a check each; then those that are powers of two


class LaterForwards:
    """What forwards call, by the situation in which they were captured."""

    def __init__(self, model: nn.Module, loss_fn: Callable[..., Any] | None, code: PythonState) -> None:
        self.model, self.loss_fn, self.code = model, loss_fn, code
        self._noted: dict[object, Sequence[object]] = {}
        self._steps: dict[object, tuple[object, int]] = {}  # since the capture of a Program

    def require_same(self, program: object, situation: object, batch: Batch) -> None:
        """Before a step: raises PlanError where the forward no longer calls what it called at its capture."""
        last, count = self._steps.get(situation, (None, 0))
        if last is not program:
            self._note(situation, batch)
            count = 0
        elif count < DENSE or count & (count + 1) == 0:
            self._compare(situation, batch)
        self._steps[situation] = program, count + 1  # after a refusal, the next step is looked at again

    def _note(self, situation: object, batch: Batch) -> None:
        self._noted.pop(situation, None)
        while len(self._noted) >= MAX_KEPT:
            oldest = next(iter(self._noted))
            del self._noted[oldest], self._steps[oldest]
        self._noted[situation] = self._calls(batch).noted

    def _calls(self, batch: Batch, expected: Sequence[object] | None = None) -> CalledWith:
        """What a forward calls; nothing outside of the model that its code reads may be changed by it every time."""
        before = self.code.marks(self.model, self.loss_fn)
        found = calls_of(self.model, batch, self.loss_fn, expected)
        if self.code.marks(self.model, self.loss_fn) != before:
            problem = (
                "each forward changes what its code names outside of the model: a global, a class, a closure"
            )
            hint = (
                "make it a buffer (a tensor), or an input of the model, or count in the loop around the steps"
            )
            raise PlanError(problem, method_line(type(self.model), "forward"), hint)
        return found

    def _compare(self, situation: object, batch: Batch) -> None:
        found = self._calls(batch, self._noted[situation])
        if not found.where:
            return
        again = calls_of(self.model, batch, self.loss_fn, self._noted[situation])
        if not again.where:  # something was only found in a cache, or no longer
            return
        raise PlanError(f"the forward is not what was captured: {found.change}", found.where,
                        "pass what changes as an entry of the batch")  # fmt: skip
