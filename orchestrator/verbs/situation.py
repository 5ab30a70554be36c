"""Situations: all that a Program depends on besides values and code, and which step has a module's newest values.

What surrounds a step counts too: autocast, the default dtype and hooks on all modules hold for the forward as they do
in plain PyTorch; a Program runs with the casts that it was captured with.
"""

import weakref
from collections.abc import Callable, Iterable, Mapping
from functools import wraps
from typing import Any, Protocol, TypeAlias, TypeVar

import torch
from torch import nn
from torch.nn.modules import module as modules
from torch.utils.weak import WeakIdKeyDictionary

from comms.errors import PlanError, UserError, has_line
from orchestrator.verbs.state.python_state import checksum
from partitioner.capture.batch_inputs import Batch, require_plain, settings_of, tensors_of
from partitioner.capture.source_lines import calling_line

Situation: TypeAlias = tuple[object, ...]
ResultT = TypeVar("ResultT")


class _Watched(Protocol):
    is_watched: bool


StepT = TypeVar("StepT", bound=_Watched)
FORWARD_HOOKS: tuple[Mapping[int, Any], ...] = (
    modules._global_forward_pre_hooks,
    modules._global_forward_hooks,
)
BACKWARD_HOOKS: tuple[Mapping[int, Any], ...] = (
    modules._global_backward_pre_hooks,
    modules._global_backward_hooks,
)
_newest = WeakIdKeyDictionary()  # by parameter: the step whose chips have trained it since it was fetched


def naming_the_call(method: Callable[[StepT, Batch], ResultT]) -> Callable[[StepT, Batch], ResultT]:
    """Errors that know no line of the user's get the one that calls us, unless no code of the user's runs the steps."""

    @wraps(method)
    def called(step: StepT, batch: Batch) -> ResultT:
        try:
            return method(step, batch)
        except UserError as error:
            if step.is_watched and not has_line(error.where):
                error.where = ", ".join(filter(None, (error.where, calling_line())))
            raise

    return called


def situation_of(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch) -> Situation:
    """Equal for steps that one Program serves. Raises PlanError for what plain PyTorch would train and we would not."""
    params, given = dict(model.named_parameters()), tensors_of(batch)
    optimized = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if entries := [name for name, value in given.items() if id(value) in optimized]:
        problem = f"the batch's {entries[0]} is a parameter that the optimizer has"
        hint = "register it in the model, or take it out of the optimizer's groups"
        raise PlanError(problem, "step(batch)", hint)
    if params and not optimized & set(map(id, params.values())):
        problem = "the optimizer holds none of the model's parameters"
        raise PlanError(problem, type(optimizer).__name__, "make it of this model's parameters()")
    if any(BACKWARD_HOOKS):
        raise PlanError(
            "a backward hook on all modules would not run", "torch.nn.modules.module", "remove the hook"
        )
    tensors = tuple((n, tuple(v.shape), v.dtype) for n, v in given.items())
    held = tuple((n, id(p), p.requires_grad, p.shape, p.dtype) for n, p in params.items())
    kept = tuple((n, b.shape, b.dtype) for n, b in model.named_buffers())
    modes = tuple(module.training for module in model.modules())
    groups = tuple(tuple(id(p) for p in group["params"]) for group in optimizer.param_groups)
    return tensors, settings_of(batch), held, kept, modes, groups, _surroundings()


def require_kinds(**given: tuple[object, type | tuple[type, ...]]) -> None:
    """Refuse arguments of other kinds, by their names; None where it is one of them. Raises PlanError."""
    for name, (value, kinds) in given.items():
        if isinstance(value, bool) or not isinstance(value, kinds):
            wanted = kinds[0] if isinstance(kinds, tuple) else kinds
            what = f"the class {value.__name__}" if isinstance(value, type) else f"a {type(value).__name__}"
            raise PlanError(
                f"{name} is {what}", "distribute", f"give a {wanted.__module__}.{wanted.__qualname__}"
            )


def ages_of(
    model: nn.Module, optimizer: torch.optim.Optimizer, entries: frozenset[str]
) -> tuple[tuple[str, int], ...]:
    """A number for each parameter, equal where states have come equally far: only such can share a step. `entries`:
    names of states that lie as the parameter does."""
    numbers: dict[object, int] = {}
    ages = []
    for name, param in model.named_parameters():
        own = optimizer.state.get(param, {})
        age = tuple(sorted((str(k), _age(v, param, is_entry=k in entries)) for k, v in own.items()))
        ages.append((name, numbers.setdefault(age, len(numbers))))
    return tuple(ages)


def _age(value: object, param: torch.Tensor, *, is_entry: bool) -> str:
    if not isinstance(value, torch.Tensor):
        return repr(value)
    if value.shape == param.shape and (is_entry or value.numel() > 1):
        return ""
    return repr(value.tolist()) if value.numel() == 1 else f"{tuple(value.shape)} {checksum(value)}"


def require_batch(batch: object) -> None:
    """Refuse what is no batch. Raises PlanError."""
    if not isinstance(batch, Mapping) or not batch:
        problem = "the batch is not a mapping of names to inputs"
        raise PlanError(problem, "step(batch)", "pass {name: input}, as model(**batch)")
    require_plain(batch)
    if meta := [name for name, value in tensors_of(batch).items() if value.is_meta]:
        problem = f"the batch's {meta[0]} is on the meta device, without numbers"
        raise PlanError(problem, "step(batch)", "make it on the CPU")
    if any(v.numel() == 0 and v.dim() and not v.shape[0] for v in tensors_of(batch).values()):
        raise PlanError("the batch has no samples", "step(batch)", "leave empty batches out")


def _surroundings() -> Situation:
    kinds = ("cpu", "cuda")
    casts = tuple(torch.get_autocast_dtype(k) if torch.is_autocast_enabled(k) else None for k in kinds)
    return casts, torch.get_default_dtype(), tuple(tuple(hooks.values()) for hooks in FORWARD_HOOKS)


def require_newest(step: object, params: Iterable[nn.Parameter]) -> None:
    """Refuse to train on from values that another step has trained since. Raises PlanError."""
    for param in params:
        reference: Callable[[], object] = _newest.get(param, _nobody)
        if (other := reference()) is not None and other is not step:
            problem = "another step has trained this model, and its values were not fetched"
            raise PlanError(problem, "step(batch)", "call sync() of the other step before")


def set_newest(step: object, params: Iterable[nn.Parameter], *, is_newest: bool) -> None:
    """Note that a step's chips have newer values than the module, or no longer."""
    for param in params:
        if is_newest:
            _newest[param] = weakref.ref(step)
        elif _newest.get(param, _nobody)() is step:
            del _newest[param]


def _nobody() -> None:
    return None
