"""Optimizer checks: whether a user's optimizer steps on chips as it would here, or is refused."""

import torch
from torch import nn
from torch.optim import optimizer as optimizers
from torch.utils._pytree import tree_leaves

from comms.errors import OptimizerError, PlanError, located, method_line
from kernels.optimizers import GROUPS, group_settings, is_torchs, require_no_parameters, same_kind
from kernels.trials.optimizer_trials import StepTraits, require_kept, traits_of

HOOKS = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")
ALL_HOOKS = optimizers._global_optimizer_pre_hooks, optimizers._global_optimizer_post_hooks


def checked_traits(optimizer: torch.optim.Optimizer) -> StepTraits:
    """What the optimizer's step looks at and moves. Raises PlanError for what cannot step on given gradients."""
    require_no_hooks(optimizer)
    with located(method_line(type(optimizer), "step"), "use an optimizer that steps on given gradients"):
        require_no_parameters(optimizer)
        sizes = [len(group["params"]) for group in optimizer.param_groups]
        found = traits_of(same_kind(optimizer), group_settings(optimizer), sizes)
        _require_seen(optimizer, found.reads)
    return found


def require_no_hooks(optimizer: torch.optim.Optimizer) -> None:
    """Refuse hooks of steps, of this optimizer or of all. Raises PlanError."""
    if any(getattr(optimizer, name, None) for name in HOOKS) or any(ALL_HOOKS):
        where, hint = method_line(type(optimizer), "step"), "remove them, or call them yourself"
        raise PlanError("hooks of the optimizer's steps would not run", where, hint)


def _require_seen(optimizer: torch.optim.Optimizer, reads: frozenset[str]) -> None:
    """What the step of a class that is not torch's reads of parameters and settings must be there on chips, which step
    on other tensors, end to end. Raises OptimizerError."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for settings in group_settings(optimizer):
        leaves = [(k, leaf) for k, v in settings.items() for leaf in tree_leaves(v)]
        if wide := [k for k, leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.numel() > 1]:
            problem = (
                f"the optimizer's groups hold a tensor in {wide[0]}, of which chips would need their part"
            )
            raise OptimizerError(problem, hint="keep it in self.state[p]")
    for param in params:
        state = optimizer.state.get(param, {})
        require_kept(
            {k: v for k, v in state.items() if v is not None or not is_torchs(type(optimizer))}, param
        )
    if is_torchs(type(optimizer)):
        return
    if "param_names" in reads and any("param_names" in group for group in optimizer.param_groups):
        raise OptimizerError("the optimizer's step goes by param_names", hint=GROUPS)
    for param in params:
        if read := [name for name in vars(param) if {name, "__dict__"} & reads]:
            problem = f"the optimizer's step reads {read[0]} of parameters, but chips step on other tensors"
            raise OptimizerError(problem, hint=GROUPS)
        if type(param) not in (nn.Parameter, torch.Tensor):
            problem = f"the optimizer's step would see a plain parameter for a {type(param).__name__}"
            raise OptimizerError(problem, hint="take nn.Parameter, or an optimizer of torch")
    keys: list[object] = list(optimizer.state)
    if other := [key for key in keys if not isinstance(key, torch.Tensor)]:
        problem = f"the optimizer keeps a state under {other[0]!r}, which is no parameter"
        raise OptimizerError(problem, hint="keep it in self.state[p] or in self.param_groups")
