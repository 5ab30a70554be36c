"""A step as it stands, verified: the user's module, optimizer and batch in plain PyTorch, against all chips.

Two steps on the same batch are compared, the second from the states that the first one left. In float64 the module's
values are widened for as long as that takes; where it cannot run so (an operator without float64), the comparison
within the noise of its own dtype stands alone, and the verdict says so.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from comms.errors import RunError, UserError
from kernels.optimizers import same_kind
from orchestrator.planning.preparation import module_values
from orchestrator.runners.executing.whole_state import MASTER
from orchestrator.verbs.verification.outcome import Tensors
from orchestrator.verbs.verification.sides import (
    GroupSettings,
    PlainSide,
    PlannedSide,
    placed,
    wide_values,
    widened,
    widened_batch,
)
from orchestrator.verbs.verification.verdict import (
    Lockstep,
    Step,
    TrainingVerdict,
    proof,
    verdict,
    within_noise,
)
from partitioner.capture.batch_inputs import Batch, tensors_of
from partitioner.capture.tracing import LossFunction

STEPS = 2
States = Mapping[str, Mapping[str, Any]]  # of the optimizer, by parameter and key


@dataclass(frozen=True, slots=True)
class StepCheck:
    """What is trained, from where on. `states` may hold full-precision copies of parameters, as `MASTER`."""

    module: nn.Module
    optimizer: torch.optim.Optimizer
    loss_fn: LossFunction | None
    clip_norm: float | None
    states: States
    keys: tuple[int, ...]  # of the steps' random numbers
    settings: GroupSettings
    norm_parts: int  # see `Plan`

    def verdict(self, batch: Batch, planned: Callable[[Batch, States, bool], PlannedSide]) -> TrainingVerdict:
        """`planned(batch, states, exact)` is the plan's side of the module as it is then, which may be widened."""
        exact, unproved = None, None
        try:
            exact = self._proof(batch, planned)
        except RunError:
            raise
        except (UserError, RuntimeError) as error:
            unproved = str(error).strip().split("\n")[0]
        if exact is not None and self._is_wide(batch):
            return verdict(exact, None, STEPS)
        plain = partial(self._plain, module_values(self.module), self.states, False)
        ours = partial(planned, batch, self.states, False)
        own = within_noise(ours, plain, self._steps(batch), self._eps(batch))
        return verdict(exact, own, STEPS, unproved)

    def _proof(self, batch: Batch, planned: Callable[[Batch, States, bool], PlannedSide]) -> Lockstep:
        values, wide = wide_values(self.module), widened_batch(batch)
        states = {
            name: {
                k: widened(v) if isinstance(v, torch.Tensor) and v.dim() else v
                for k, v in own.items()
                if k != MASTER
            }
            for name, own in self.states.items()
        }

        def ours() -> PlannedSide:
            with placed(self.module, values):
                return planned(wide, states, True)

        return proof(ours, partial(self._plain, values, states, True), self._steps(wide))

    def _steps(self, batch: Batch) -> list[Step]:
        return [Step(batch, key, self.settings) for key in self.keys]

    def _plain(self, values: Tensors, states: States, exact: bool, order: int | None) -> PlainSide:
        def optimizers(params: Mapping[str, nn.Parameter]) -> list[torch.optim.Optimizer]:
            return [_twin(self.optimizer, self.module, params, states)]

        return PlainSide(
            self.module,
            values,
            optimizers,
            self.loss_fn,
            clip_norm=self.clip_norm,
            norm_parts=self.norm_parts,
            exact=exact,
            order=order,
        )

    def _dtypes(self, batch: Batch) -> set[torch.dtype]:
        held = (*module_values(self.module).values(), *tensors_of(batch).values())
        return {value.dtype for value in held if value.is_floating_point() or value.is_complex()}

    def _is_wide(self, batch: Batch) -> bool:
        return self._dtypes(batch) <= {torch.float64, torch.complex128}

    def _eps(self, batch: Batch) -> float:
        return max((torch.finfo(dtype).eps for dtype in self._dtypes(batch)), default=0.0)


def _twin(
    optimizer: torch.optim.Optimizer, module: nn.Module, params: Mapping[str, nn.Parameter], states: States
) -> torch.optim.Optimizer:
    """The optimizer over other parameters: its groups, and copies of its states."""
    names = {id(param): name for name, param in module.named_parameters()}
    made = same_kind(optimizer)([])
    made.param_groups = [
        {**group, "params": [params[names[id(p)]] for p in group["params"] if id(p) in names]}
        for group in optimizer.param_groups
    ]
    made.state = defaultdict(dict)
    with torch.no_grad():
        for name, own in states.items():
            if MASTER in own:
                params[name].copy_(own[MASTER])
            made.state[params[name]] = {
                k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in own.items() if k != MASTER
            }
    return made
