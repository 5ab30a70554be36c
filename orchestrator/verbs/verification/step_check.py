"""A step as it stands, verified: the user's module, optimizer and batch in plain PyTorch, against all chips.

Two steps on the same batch are compared, the second from the states that the first one left. In float64 the module's
values are widened for as long as that takes; where it cannot run so (an operator without float64), the comparison
within the noise of its own dtype stands alone, and the verdict says so.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch

from comms.errors import RunError, UserError
from kernels.optimizers import entry_states, same_kind
from orchestrator.runners.executing.failed_segment import FailedOperationError
from orchestrator.runners.executing.whole_state import MASTER
from orchestrator.verbs.verification.one_chip import OneChip
from orchestrator.verbs.verification.outcome import Tensors
from orchestrator.verbs.verification.sides import (
    ComparedSide,
    GroupSettings,
    PlannedSide,
    States,
    placed,
    widened,
    widened_batch,
)
from orchestrator.verbs.verification.verdict import (
    Lockstep,
    Step,
    TrainingVerdict,
    exactly,
    proof,
    verdict,
    within_noise,
)
from partitioner.capture.batch_inputs import Batch, tensors_of

STEPS = 2
MakeSide = Callable[[Batch, States, bool], PlannedSide]


@dataclass(frozen=True, slots=True)
class StepCheck:
    """What is trained, and from where on: values, and states of the optimizer (see `OneChip`)."""

    chip: OneChip
    values: Tensors
    states: States
    keys: tuple[int, ...]  # of the steps' random numbers
    settings: GroupSettings

    def kept(self) -> "StepCheck":
        """The same, whatever becomes of the module and the optimizer."""
        values = {name: value.clone() for name, value in self.values.items()}
        return replace(self, values=values, states={
            name: {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in own.items()}
            for name, own in self.states.items()
        })  # fmt: skip

    def verdict(self, batch: Batch, planned: MakeSide, taken: ComparedSide | None = None) -> TrainingVerdict:
        """`planned(batch, states, exact)` is the plan's side of the module as it is then, which may be widened.

        `taken`: what the steps left, if they were taken already, by whatever holds the module's own dtype.
        """
        plain, steps = partial(self.chip.side, self.values, self.states), self._steps(batch)
        if taken is not None and self._is_wide(batch):
            return verdict(exactly(lambda: taken, partial(plain, True), steps), None, len(steps))
        exact, unproved = None, None
        try:
            exact = self._proof(batch, planned)
        except (UserError, RuntimeError) as error:
            if isinstance(error, RunError) and not isinstance(error, FailedOperationError):
                raise  # not even one chip has a verdict
            unproved = str(error).strip().split("\n")[0]
        if exact is not None and self._is_wide(batch):
            return verdict(exact, None, len(steps))

        def ours() -> ComparedSide:
            return taken or planned(batch, self.states, False)

        own = within_noise(ours, partial(plain, False), steps, self._eps(batch))
        return verdict(exact, own, len(steps), unproved)

    def _proof(self, batch: Batch, planned: MakeSide) -> Lockstep:
        values = {name: widened(value) for name, value in self.values.items()}
        wide = widened_batch(batch)
        entries = entry_states(same_kind(self.chip.optimizer))  # of parameters without dims too
        states = {
            name: {
                k: widened(v) if isinstance(v, torch.Tensor) and (v.dim() or k in entries) else v
                for k, v in own.items()
                if k != MASTER
            }
            for name, own in self.states.items()
        }

        def ours() -> PlannedSide:
            with placed(self.chip.module, values):
                return planned(wide, states, True)

        return proof(ours, partial(self.chip.side, values, states, True), self._steps(wide))

    def _steps(self, batch: Batch) -> list[Step]:
        return [Step(batch, key, self.settings) for key in self.keys]

    def _dtypes(self, batch: Batch) -> set[torch.dtype]:
        held = (*self.values.values(), *tensors_of(batch).values())
        return {value.dtype for value in held if value.is_floating_point() or value.is_complex()}

    def _is_wide(self, batch: Batch) -> bool:
        return self._dtypes(batch) <= {torch.float64, torch.complex128}

    def _eps(self, batch: Batch) -> float:
        return max((torch.finfo(dtype).eps for dtype in self._dtypes(batch)), default=0.0)
