"""The two sides of a job: its model and optimizer in plain PyTorch, and its Program on all chips of the plan.

Both start from given values (see `module_values`), and from states of the optimizer where a run goes on.
"""

from collections.abc import Mapping

import torch
from torch import nn

from kernels.optimizers import entry_states
from orchestrator.config.job_file import Dtype
from orchestrator.models.model_builder import BuiltModel
from orchestrator.planning.preparation import Prepared, optimizer_factory
from orchestrator.runners.executing.chip_set import ChipSet, chip_settings
from orchestrator.runners.executing.whole_state import MASTER, OwnState, chip_states
from orchestrator.verbs.verification.outcome import Tensors
from orchestrator.verbs.verification.sides import PlainSide, PlannedSide


def planned_side(prepared: Prepared, values: Tensors, states: OwnState | None = None) -> PlannedSide:
    """All chips of the plan, in this process."""
    runner = ChipSet(prepared.program, chip_settings(prepared))
    runner.load(values.__getitem__)
    if states:
        entries = entry_states(optimizer_factory(prepared.job))
        runner.restore(chip_states(prepared.program, values.__getitem__, states, entries))
    return PlannedSide(prepared.program, runner, values)


def plain_side(
    prepared: Prepared,
    model: BuiltModel,
    values: Tensors,
    order: int | None = None,
    states: OwnState | None = None,
) -> PlainSide:
    """One chip; `order`: see `PlainSide`."""
    job, make = prepared.job, optimizer_factory(prepared.job)

    def optimizers(params: Mapping[str, nn.Parameter]) -> list[torch.optim.Optimizer]:
        """Matrices decay, vectors do not."""
        trained = [p for p in params.values() if p.requires_grad]
        matrices, rest = ([p for p in trained if (p.dim() >= 2) is is_one] for is_one in (True, False))
        made = [make(group or [torch.zeros(1, requires_grad=True)]) for group in (matrices, rest)]
        for group in made[1].param_groups:
            group["weight_decay"] = 0.0
        for name, own in (states or {}).items():
            _load(made[0 if params[name].dim() >= 2 else 1], params[name], own)
        return made

    return PlainSide(
        model.module,
        values,
        optimizers,
        clip_norm=job.clip_norm,
        norm_parts=prepared.plan.norm_parts,
        exact=job.dtype is Dtype.FP64,
        order=order,
    )


def _load(optimizer: torch.optim.Optimizer, param: nn.Parameter, own: Mapping[str, torch.Tensor]) -> None:
    """A parameter's state, as `whole_states` has it: end to end, or in the parameter's shape."""
    with torch.no_grad():
        if MASTER in own:
            param.copy_(own[MASTER].view(param.shape))
    optimizer.state[param] = {
        key: value.clone().view(param.shape)
        if value.dim() and value.numel() == param.numel()
        else value.clone()
        for key, value in own.items()
        if key != MASTER
    }
