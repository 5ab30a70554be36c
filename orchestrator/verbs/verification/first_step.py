"""The first step of a training run, verified before the second one is taken.

The run's own runner takes it. Beside it, in this process, one chip takes the same step in plain PyTorch, from the same
values and states and on the same samples: in the job's dtype, against what the runner made of it, and in float64,
against the plan's chips. Gradients are those of the plan's chips in this process. Where anything differs the run ends.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch

from comms.errors import DifferenceError
from orchestrator.config.job_file import Dtype
from orchestrator.models.model_builder import BuiltModel
from orchestrator.planning.preparation import Prepared, build_model, module_values, prepare
from orchestrator.runners.executing.whole_state import (
    MASTER,
    OwnState,
    whole_buffers,
    whole_parameters,
    whole_states,
)
from orchestrator.runners.runner import ExecutedStep, States, StepRequest, TensorRunner
from orchestrator.verbs.verification.job_sides import plain_side, planned_side
from orchestrator.verbs.verification.job_steps import NUM_GROUPS
from orchestrator.verbs.verification.outcome import Outcome, Tensors, named_states
from orchestrator.verbs.verification.sides import GroupSettings, widened, widened_batch
from orchestrator.verbs.verification.verdict import (
    Step,
    TrainingVerdict,
    exactly,
    proof,
    verdict,
    within_noise,
)
from partitioner.capture.batch_inputs import Batch

NextStep = Callable[[], tuple[Batch, int]]  # samples and key (see `step_key`) of the step that comes next


class VerifiedRunner:
    """A runner whose first training step is verified; `say` is told the verdict."""

    def __init__(
        self, runner: TensorRunner, prepared: Prepared, next_step: NextStep, say: Callable[[str], None]
    ) -> None:
        self.runner, self.prepared, self.next_step, self.say = runner, prepared, next_step, say
        self.load, self.states = runner.load, runner.states
        self.restore, self.close = runner.restore, runner.close
        self._is_verified = False

    def run(self, request: StepRequest) -> ExecutedStep:
        """See `TensorRunner`. Raises DifferenceError."""
        if self._is_verified or request.schedule != "step":
            return self.runner.run(request)
        self._is_verified = True
        batch, key = self.next_step()
        model = build_model(self.prepared.job, "cpu")
        before = _Snapshot.of(self.prepared, model, self.runner.states())
        result = self.runner.run(request)
        if result.stats is None or not result.stats.is_finite:
            return result  # the run ends for that
        after = _Snapshot.of(self.prepared, model, self.runner.states())
        taken = _Taken(self.prepared, before, result.stats.loss, after)
        step = Step(batch, key, request.settings or ({"lr": request.lr},) * NUM_GROUPS)
        found = _verdict(self.prepared, model, before, taken, step)
        if not found.equal:
            raise DifferenceError(
                f"the first step {found}", str(self.prepared.plan), "look at it with `verify`"
            )
        self.say(f"first step verified: {found}")
        return result


@dataclass(frozen=True, slots=True)
class _Snapshot:
    """What the chips hold together: parameters and buffers as `module_values`, states of the optimizer."""

    values: Tensors
    states: OwnState

    @classmethod
    def of(cls, prepared: Prepared, model: BuiltModel, states: States) -> "_Snapshot":
        program, values = prepared.program, module_values(model.module)
        own = {f"params:{n}": v for n, v in whole_parameters(program, states.__getitem__).items()}
        own |= {f"buffer:{n}": v for n, v in whole_buffers(program, states).items()}
        held = {name: own[name].reshape(v.shape).clone() if name in own else v for name, v in values.items()}
        return cls(held, {
            name: {key: _like(held[f"params:{name}"], value) for key, value in of_one.items()}
            for name, of_one in whole_states(program, states).items()
        })  # fmt: skip

    def widened(self) -> "_Snapshot":
        """The same in float64, without full-precision copies."""
        wide = {
            name: {k: widened(v) if v.dim() else v for k, v in own.items() if k != MASTER}
            for name, own in self.states.items()
        }
        return _Snapshot({name: widened(value) for name, value in self.values.items()}, wide)


def _like(param: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return (
        value.reshape(param.shape).clone()
        if value.dim() and value.numel() == param.numel()
        else value.clone()
    )


@dataclass(frozen=True, slots=True)
class _Taken:
    """The runner's step as a side, with the gradients that the plan's chips have in this process."""

    prepared: Prepared
    before: _Snapshot
    loss: float
    after: _Snapshot

    def step(self, batch: Batch, key: int, settings: GroupSettings) -> Outcome:
        """See `ComparedSide`; there is one step only."""
        here = planned_side(self.prepared, self.before.values, self.before.states)
        values = {name.partition(":")[2]: value for name, value in self.after.values.items()}
        return replace(
            here.step(batch, key, settings), loss=self.loss, values=values,
            states=named_states(self.after.states),
        )  # fmt: skip


def _verdict(
    prepared: Prepared, model: BuiltModel, before: _Snapshot, taken: _Taken, step: Step
) -> TrainingVerdict:
    job, wide = prepared.job, before.widened()
    plain = partial(plain_side, prepared, model, before.values, states=before.states)
    if job.dtype is Dtype.FP64:
        return verdict(exactly(lambda: taken, plain, [step]), None, 1)
    exact = prepare(prepared.cluster, job.model_copy(update={"dtype": Dtype.FP64}), prepared.plan)
    planned = partial(planned_side, exact, wide.values, wide.states)
    right = partial(plain_side, exact, build_model(exact.job, "cpu"), wide.values, states=wide.states)
    proved = proof(planned, right, [replace(step, batch=widened_batch(step.batch))])
    own = within_noise(lambda: taken, plain, [step], torch.finfo(model.dtype).eps)
    return verdict(proved, own, 1)
