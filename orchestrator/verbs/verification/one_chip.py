"""One chip: a module, its optimizer and its loss in plain PyTorch, started from any values and states."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from kernels.optimizers import as_kept, same_kind
from orchestrator.runners.executing.whole_state import MASTER
from orchestrator.verbs.verification.outcome import Tensors
from orchestrator.verbs.verification.sides import PlainSide, States
from partitioner.capture.forwards.step_loss import LossFunction


@dataclass(frozen=True, slots=True)
class OneChip:
    """What is trained and how; the optimizer is over the module's parameters. `norm_parts`: see `Plan`.

    `has_masters`: parameters of less than float32 are trained by float32 copies.
    """

    module: nn.Module
    optimizer: torch.optim.Optimizer
    loss_fn: LossFunction | None
    clip_norm: float | None
    norm_parts: int
    has_masters: bool

    def side(self, values: Tensors, states: States, exact: bool, order: int | None) -> PlainSide:
        """A run from `values` (see `module_values`); states may hold full-precision copies of parameters, as `MASTER`.

        `exact`, `order`: see `PlainSide`.
        """

        def twin(params: Mapping[str, nn.Parameter]) -> torch.optim.Optimizer:
            return _twin(self.optimizer, self.module, params, states)

        return PlainSide(
            self.module, values, twin, self.loss_fn, clip_norm=self.clip_norm, norm_parts=self.norm_parts,
            has_masters=self.has_masters, exact=exact, order=order,
        )  # fmt: skip


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
    with torch.no_grad():
        for name, own in states.items():
            if MASTER in own:
                params[name].copy_(own[MASTER])
            copied = {k: v.clone() for k, v in own.items() if k != MASTER}
            made.state[params[name]] = as_kept(copied)
    return made
