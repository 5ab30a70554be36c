"""The first step of a training run, verified before the second one is taken.

The run's own runner takes it. Beside it, in this process, one chip takes the same step in plain PyTorch, from the same
values and states and on the same samples: in the job's dtype, against what the runner made of it, and in float64,
against the plan's chips. Gradients are those of the plan's chips in this process. Where anything differs the run ends.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from comms.errors import DifferenceError
from orchestrator.planning.preparation import module_values
from orchestrator.runners.runner import ExecutedStep
from orchestrator.verbs.distribute import DistributedStep
from orchestrator.verbs.verification.outcome import Outcome, Tensors, named_states
from orchestrator.verbs.verification.sides import GroupSettings, placed
from orchestrator.verbs.verification.step_check import StepCheck
from partitioner.capture.batch_inputs import Batch


def verified_step(step: DistributedStep, batch: Batch, say: Callable[[str], None]) -> ExecutedStep:
    """One step on a whole global batch; `say` is told that it is one chip's. Raises DifferenceError where it is not."""
    check = step.check(batch, 1).kept()
    result = step.execute(batch)
    if result.stats is None or not result.stats.is_finite:
        return result  # the run ends for that
    values = {name.partition(":")[2]: value for name, value in module_values(step.sync()).items()}
    taken = _Taken(step, check, result.stats.loss, values, named_states(step.own_states()))
    found = check.verdict(batch, step.side, taken)
    if not found.equal:
        raise DifferenceError(f"the first step {found}", str(step.plan), "look at it with `verify`")
    say(f"first step verified: {found}")
    return result


@dataclass(frozen=True, slots=True)
class _Taken:
    """The runner's step as a side, with the gradients that the plan's chips have in this process."""

    taker: DistributedStep
    check: StepCheck
    loss: float
    values: Tensors
    states: Tensors

    def step(self, batch: Batch, key: int, settings: GroupSettings) -> Outcome:
        """See `ComparedSide`; there is one step only."""
        with placed(self.taker.model, self.check.values):
            here = self.taker.side(batch, self.check.states, False)
        return replace(
            here.step(batch, key, settings), loss=self.loss, values=self.values, states=self.states
        )
