"""Situations: all that a Program depends on besides values and code, and which step has a module's newest values.

What surrounds a step counts too: autocast, the default dtype and hooks on all modules hold for the forward as they do
in plain PyTorch; a Program runs with the casts that it was captured with.
"""

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.nn.modules import module as modules
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from torch.utils.weak import WeakIdKeyDictionary

from comms.errors import PlanError, UserError, has_line
from orchestrator.planning.optimizer_checks import require_no_hooks
from orchestrator.verbs.state.object_parts import is_installed, is_library
from orchestrator.verbs.state.python_state import checksum
from partitioner.capture.batch_inputs import Batch, require_plain, settings_of, tensors_of
from partitioner.capture.refused.refusals import refuse_unsupported
from partitioner.capture.source_lines import calling_line

Situation: TypeAlias = tuple[object, ...]
KNOWN = ("torch.", "partitioner.")  # whose modes around a step are taken to change nothing, or to be seen
FORWARD_HOOKS: tuple[Mapping[int, Any], ...] = (
    modules._global_forward_pre_hooks,
    modules._global_forward_hooks,
)
BACKWARD_HOOKS: tuple[Mapping[int, Any], ...] = (
    modules._global_backward_pre_hooks,
    modules._global_backward_hooks,
)
_newest = WeakIdKeyDictionary()  # by parameter: the step whose chips have trained it since it was fetched


@contextmanager
def naming_the_call() -> Iterator[None]:
    """Errors of what users call that know no line of theirs get the one that calls."""
    try:
        yield
    except UserError as error:
        if not has_line(error.where):
            error.where = ", ".join(filter(None, (error.where, calling_line())))
        raise


def situation_of(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch) -> Situation:
    """Equal for steps that one Program serves. Raises PlanError for what plain PyTorch would train and we would not."""
    require_no_modes()
    refuse_unsupported(model)
    require_no_hooks(optimizer)
    params, given = dict(model.named_parameters()), tensors_of(batch)
    groups = tuple(tuple(id(p) for p in group["params"]) for group in optimizer.param_groups)
    optimized = Counter(each for own in groups for each in own)
    if twice := [name for name, value in params.items() if optimized[id(value)] > 1]:
        problem = f"the optimizer holds {twice[0]} twice: torch would step on it as often"
        raise PlanError(problem, "step(batch)", "leave it out once, as tied parameters are one")
    if trained := [name for name, value in model.named_buffers() if id(value) in optimized]:
        problem = f"the optimizer holds the buffer {trained[0]}, which chips do not train"
        raise PlanError(problem, "step(batch)", "register it as a parameter, or take it out of the groups")
    for name, value in params.items():
        if not isinstance(own := optimizer.state.get(value, {}), Mapping):
            problem = f"the optimizer's state of {name} is a {type(own).__name__}"
            raise PlanError(problem, "step(batch)", "keep tensors and numbers by name in self.state[p]")
        if value.is_meta or value.is_inference():
            problem = f"the parameter {name} is " + ("on the meta device, without numbers" if value.is_meta else
                                                     "a tensor of inference_mode, which nothing trains")  # fmt: skip
            raise PlanError(problem, "step(batch)", "make the model on the CPU, outside of inference_mode")
    if params and not any(id(value) in optimized for value in params.values()):
        problem = "the optimizer holds none of the model's parameters"
        raise PlanError(problem, type(optimizer).__name__, "make it of this model's parameters()")
    if any(BACKWARD_HOOKS):
        raise PlanError(
            "a backward hook on all modules would not run", "torch.nn.modules.module", "remove the hook"
        )
    tensors = tuple(
        (n, v.shape, v.dtype, v.requires_grad, v.is_contiguous() or v.stride()) for n, v in given.items()
    )
    held = tuple((n, id(p), p.requires_grad, p.shape, p.dtype) for n, p in params.items())
    kept = tuple((n, b.shape, b.dtype) for n, b in model.named_buffers())
    modes = tuple(module.training for module in model.modules())
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
    if odd := [name for name in batch if not isinstance(name, str)]:
        raise PlanError(f"the batch has the key {odd[0]!r}, which names no input", "step(batch)",
                        "name entries as forward does")  # fmt: skip
    held = [name for name in getattr(batch, "__dict__", {}) if name != "data"]
    if held and not is_library(type(batch)) and not is_installed(type(batch)):
        problem = f"the batch has {held[0]} beside its entries, which a step would not see"
        raise PlanError(problem, "step(batch)", "pass it as an entry of the batch")
    require_plain(batch)
    if meta := [name for name, value in tensors_of(batch).items() if value.is_meta]:
        problem = f"the batch's {meta[0]} is on the meta device, without numbers"
        raise PlanError(problem, "step(batch)", "make it on the CPU")
    if any(v.numel() == 0 and v.dim() and not v.shape[0] for v in tensors_of(batch).values()):
        raise PlanError("the batch has no samples", "step(batch)", "leave empty batches out")


def ungiven(batch: Batch) -> list[str]:
    """Warnings of gradients that a plain loop would leave at entries of the batch."""
    wanted = [name for name, value in tensors_of(batch).items() if value.requires_grad]
    return [f"the batch's {name} requires a gradient, which it is not given" for name in wanted]


def require_no_modes() -> None:
    """Refuse what is around a step and would see what it computes in plain PyTorch, not on chips. Raises PlanError."""
    modes = [*_get_current_function_mode_stack(), *_get_current_dispatch_mode_stack()]
    saving = torch._C._autograd._top_saved_tensors_default_hooks(True)
    around: list[Any] = [*map(type, modes), *(saving or ())]
    if torch.is_anomaly_enabled():
        problem = "anomaly detection is on, which would not see what chips compute"
        raise PlanError(
            problem, "step(batch)", "turn it off: a loss or gradient that is not finite ends the step"
        )
    if foreign := [each for each in around if not str(each.__module__).startswith(KNOWN)]:
        problem = f"{foreign[0].__qualname__} is around the step, and would not see what it computes"
        raise PlanError(problem, "step(batch)", "leave it before the step, or put it into the forward")


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
