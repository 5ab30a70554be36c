"""Setting modes: what settings of an optimizer's groups are, whether they are the same or of one kind, and copies of
them for trials."""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch

from comms.errors import OptimizerError
from kernels.optimizers import LATE_STEPS, group_settings, is_torchs

Groups: TypeAlias = Sequence[Mapping[str, Any]]  # settings of every group
PROBE_LR = 1e-2  # at least: under a rate of nothing all optimizers are the same
LATER = 9_009_000 - LATE_STEPS - 2  # steps, for what begins late or at multiples; 32-bit floats have them


def modes_of(optimizer: torch.optim.Optimizer) -> tuple[object, ...]:
    """What groups are besides the sizes of numbers, and what parameters hold: as long as it is equal, so are traits."""
    settings = tuple(mode_of(own) for own in group_settings(optimizer))
    if is_torchs(type(optimizer)):
        return settings
    return settings, tuple((id(p), *vars(p)) for group in optimizer.param_groups for p in group["params"])


def mode_of(value: Any) -> object:
    if isinstance(value, torch.Tensor):
        return torch.Tensor
    return _walked(value, mode_of) if not isinstance(value, int | float) else (type(value), bool(value))


def plain(value: Any) -> object:
    """Equal for equal settings, whichever objects they are."""
    if isinstance(value, torch.Tensor):
        return value.dtype, repr(value.detach().tolist())
    return _walked(value, plain)


def _walked(value: Any, inner: Callable[[Any], object]) -> object:
    if isinstance(value, Mapping):
        return tuple((k, inner(v)) for k, v in sorted(value.items(), key=lambda item: repr(item[0])))
    if isinstance(value, list | tuple):
        return type(value), tuple(inner(each) for each in value)
    if isinstance(value, type) or callable(value):
        return id(value)
    held = getattr(value, "__dict__", None)
    return (type(value), inner(held)) if held else (type(value), repr(value))


def of_each_mode(groups: Groups) -> Groups:
    """One group of each kind, and two at least where there are: groups of many layers need not all be tried."""
    found = {repr(mode_of(own)): own for own in reversed(groups)}
    others = [own for own in groups if all(own is not each for each in found.values())]
    return [*found.values(), *others[: max(0, 2 - len(found))]]


def tried(settings: Mapping[str, Any], turn: int) -> dict[str, Any]:
    """Copies, with rates that tell: above nothing, and different from group to group."""
    try:
        made = copy.deepcopy(dict(settings))
    except Exception as error:  # whatever the user's objects raise
        problem = "settings of the optimizer's groups cannot be copied, so its steps cannot be tried"
        raise OptimizerError(problem, hint="keep numbers there") from error
    lr = made.get("lr")
    if isinstance(lr, float | int | torch.Tensor) and not isinstance(lr, bool):
        rate = max(float(lr), PROBE_LR) * (1 + turn / 4)
        made["lr"] = torch.full_like(lr, rate) if isinstance(lr, torch.Tensor) else rate
    return made


def move_counters(optimizers: Sequence[torch.optim.Optimizer], first: Sequence[Groups]) -> None:
    """As after many more steps; `first`: the settings of the groups that there were."""
    for optimizer, settings in zip(optimizers, first, strict=True):
        for group, was in zip(optimizer.param_groups, settings, strict=True):
            moved = {k: v for k, v in group.items() if type(v) is int and v != was.get(k)}
            group.update({k: v + LATER for k, v in moved.items()})
        for own in optimizer.state.values():
            own.update({k: v + LATER for k, v in own.items() if _is_count(v)})


def _is_count(value: object) -> bool:
    is_number = type(value) in (int, float) or (isinstance(value, torch.Tensor) and not value.dim())
    return is_number and value in range(LATE_STEPS - 1, LATE_STEPS + 2)
