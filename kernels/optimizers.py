"""Optimizers on flat shards: real `torch.optim` classes stepping on one tensor per flat group.

AdamW uses torch's fused kernel, SGD its foreach one; any other class comes from a factory
`factory(params) -> torch.optim.Optimizer`. What such a class looks at is found by trial (`trials`).
"""

import builtins
import copy
import math
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from types import FunctionType, MethodType
from typing import Any, TypeAlias

import torch

from comms.errors import OptimizerError, method_line
from kernels.builtin_optimizers import BUILT_IN
from kernels.trials.entry_operations import StepWatch

Factory: TypeAlias = Callable[[Sequence[torch.Tensor]], torch.optim.Optimizer]
TORCH_OWN = frozenset(
    {"state", "param_groups", "step", "_opt_called", *torch.optim.SGD([torch.zeros(1)], lr=0.0).__dict__}
) - {"defaults"}
LATE = "do so from the first step on, so that it is seen before; go on from the last checkpoint"
LATE_STEPS = 11  # more than the usual "every tenth step"
GROUPS = "let groups of the optimizer say what is special"  # what to do
AS = ": "  # between the name of a state and its type
NUMBERS = {bool: torch.bool, int: torch.int64, float: torch.float64}
MAX_DEPTH = 6


@dataclass(frozen=True, slots=True)
class OptimizerSpec:
    """A built-in optimizer (see `builtin_optimizers`) and its settings; each takes those that it has."""

    name: str = "adamw"
    lr: float = 1e-3
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    momentum: float = 0.0

    def __call__(self, params: Sequence[torch.Tensor]) -> torch.optim.Optimizer:
        """Build the optimizer over `params`."""
        known = BUILT_IN[self.name]
        settings = {name: getattr(self, name) for name in known.settings}
        made: torch.optim.Optimizer = getattr(torch.optim, known.torch_name)(
            params, **settings, **{known.kernel: True}
        )
        return made


def states_per_element(factory: Factory) -> int:
    """How many full-size state tensors the optimizer keeps (2 for AdamW)."""
    return len(entry_states(factory))


def entry_states(factory: Factory) -> frozenset[str]:
    """The names of states that hold a number for every entry of a parameter, found by taking a few steps."""
    param = torch.ones(2, 3, requires_grad=True)
    optimizer = factory([param])
    for _ in range(1 if is_torchs(type(optimizer)) else LATE_STEPS):
        param.grad = torch.ones(2, 3)
        optimizer.step()
    own = optimizer.state[param]
    return frozenset(k for k, v in own.items() if isinstance(v, torch.Tensor) and v.shape == param.shape)


def as_tensors(state: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """States with plain numbers as 0-dim tensors, exactly, under names that tell their type; None, as torch's SGD once
    saved it, is no state."""
    numbers = {f"{k}{AS}{type(v).__name__}": torch.tensor(v, dtype=NUMBERS[type(v)])
               for k, v in state.items() if type(v) in NUMBERS}  # fmt: skip
    return {k: v for k, v in state.items() if isinstance(v, torch.Tensor)} | numbers


def laid_as(value: torch.Tensor, param: torch.Tensor) -> torch.Tensor:
    """A state in the order of memory of its parameter, if it has the shape: fused steps walk both as they lie."""
    if value.shape != param.shape or value.stride() == param.stride():
        return value
    return torch.empty_like(param, dtype=value.dtype, requires_grad=False).copy_(value)


def as_kept(state: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """What `as_tensors` was given."""
    kinds = {kind.__name__: kind for kind in NUMBERS}
    parts = {k: k.rpartition(AS) for k in state}
    return {parts[k][0] or k: kinds[parts[k][2]](v.item()) if parts[k][0] else v for k, v in state.items()}


def is_torchs(what: object) -> bool:
    """Whether a class or function is of torch (or of Python itself)."""
    home = str(getattr(what, "__module__", "")).partition(".")[0]
    # a class that was made by exec says that it is of "builtins", too
    return home == "torch" or (
        home == "builtins" and vars(builtins).get(getattr(what, "__name__", "")) is what
    )


def own_attributes(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """What an optimizer of the user's holds besides states and groups."""
    if is_torchs(type(optimizer)):
        return {}
    return {name: value for name, value in optimizer.__dict__.items() if name not in TORCH_OWN}


def require_no_parameters(optimizer: torch.optim.Optimizer) -> None:
    """Where shards are stepped on, what goes by a parameter itself finds nothing. Raises OptimizerError."""
    params = {id(p) for group in optimizer.param_groups for p in group["params"]}
    held = {k: v for own in group_settings(optimizer) for k, v in own.items()}
    for name, marks in marks_of(held | own_attributes(optimizer)).items():
        if params & set(_numbers(marks)):
            problem = (
                f"the optimizer's {name} holds parameters, or ids of them, but chips step on other tensors"
            )
            raise OptimizerError(problem, hint=GROUPS)


def _numbers(marks: object) -> Iterator[int]:
    if isinstance(marks, int):
        yield marks
    elif isinstance(marks, list | tuple):
        for each in marks:
            yield from _numbers(each)


def marks_of(held: Mapping[str, object]) -> dict[str, object]:
    """By name something that differs once the value, or what it holds, is written to."""
    return {name: _mark(value, 0, set()) for name, value in held.items()}


def _mark(value: Any, depth: int, seen: set[int]) -> object:
    """Something that differs once the value, or what it holds, is written to."""
    if isinstance(value, int | float | str | bytes | complex | None):
        return value
    if isinstance(value, torch.Tensor):
        return id(value), value.detach().reshape(-1).contiguous().view(torch.uint8).numpy(
            force=True
        ).tobytes()
    if id(value) in seen or depth > MAX_DEPTH:
        return id(value)
    seen.add(id(value))
    if isinstance(value, Mapping):
        return [(_mark(k, depth + 1, seen), _mark(v, depth + 1, seen)) for k, v in value.items()]
    if isinstance(value, list | tuple | set | frozenset | deque):
        return [_mark(each, depth + 1, seen) for each in value]
    if isinstance(value, FunctionType):
        cells = [c.cell_contents for c in value.__closure__ or ()]
        return id(value), [_mark(c, depth + 1, seen) for c in cells]
    held = value.__self__ if isinstance(value, MethodType) else getattr(value, "__dict__", {})
    return id(value), _mark(held, depth + 1, seen)


def same_kind(optimizer: torch.optim.Optimizer) -> Factory:
    """What makes the optimizer anew over other tensors, whatever its class takes; settings are those that all
    groups have, as in the first. Raises OptimizerError."""
    require_own_step(optimizer)
    kind = type(optimizer)
    shared = {k: v for k, v in optimizer.__dict__.items() if k not in ("state", "param_groups", "step")}
    first, *others = group_settings(optimizer)
    settings = {k: v for k, v in first.items() if all(k in own for own in others)}

    def make(params: Sequence[torch.Tensor]) -> torch.optim.Optimizer:
        made: torch.optim.Optimizer = object.__new__(kind)
        made.__dict__.update(shared)
        made.state = defaultdict(dict)
        made.param_groups = [{**copy.deepcopy(settings), "params": list(params)}]
        return made

    return make


def require_own_step(optimizer: torch.optim.Optimizer) -> None:
    """Chips take the step of the optimizer's class: only a scheduler may put one into the object, which calls that."""
    own: Any = optimizer.__dict__.get("step")
    is_counted = hasattr(own, "_wrapped_by_lr_sched") and own.__wrapped__ is type(optimizer).step
    if own is not None and not is_counted:
        problem = "the optimizer's step was replaced on the object, and would not run"
        raise OptimizerError(problem, hint="define step in a class of your own")


def group_settings(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Any], ...]:
    """The settings of every group, without its parameters."""
    return tuple(
        {name: value for name, value in group.items() if name not in ("params", "param_names")}
        for group in optimizer.param_groups
    )


@dataclass(frozen=True, slots=True)
class StepStatistics:
    """The reduced statistics of a step: gradients are of loss_sum / nominal_count until scaled."""

    squares: float
    loss_sum: float
    count: float
    nominal_count: float

    @property
    def loss(self) -> float:
        """Mean loss over what was counted; NaN if nothing was."""
        return self.loss_sum / self.count if self.count else math.nan

    @property
    def grad_norm(self) -> float:
        """L2 norm of the gradient of the mean loss."""
        return math.sqrt(self.squares) * self.correction if self.squares >= 0 else math.nan

    @property
    def correction(self) -> float:
        """What makes accumulated gradients those of the mean loss: nominal over actual count."""
        return self.nominal_count / self.count if self.count else math.nan

    @property
    def is_finite(self) -> bool:
        """False: the step is skipped."""
        return math.isfinite(self.squares) and math.isfinite(self.loss_sum) and self.count > 0

    def gradient_scale(self, clip_norm: float | None) -> float:
        """What to multiply gradients by: nominal / actual count, and clipping as torch.nn.utils.clip_grad_norm_."""
        if clip_norm is None:
            return self.correction
        return self.correction * min(1.0, clip_norm / (self.grad_norm + 1e-6))


class FlatOptimizer:
    """One optimizer over one flat tensor, or over a parameter as it is (`is_whole`).

    What a class of the user's does is watched: trials (`trials`) see a few steps, later ones may do more.
    """

    def __init__(
        self, factory: Factory, flat: torch.Tensor, settings: Mapping[str, object], *, is_whole: bool = False
    ) -> None:
        self.param = torch.nn.Parameter(flat, requires_grad=True)
        self.optimizer, self.is_whole = factory([self.param]), is_whole
        self.watch = None if is_torchs(type(self.optimizer)) else StepWatch()
        self.given: set[str] = set()
        self._set(settings)

    def _set(self, settings: Mapping[str, object]) -> None:
        """Copies, as a step may write into them."""
        for group in self.optimizer.param_groups:
            group.update(copy.deepcopy(dict(settings)))

    def step(self, grad: torch.Tensor, scale: float, settings: Mapping[str, object]) -> None:
        """Scale `grad` in place and step with these settings (as long as the parameter; rounded to its dtype).

        Settings that are no longer given are taken away. Raises OptimizerError where a class of the user's starts to
        look at whole parameters, which a shard is not, or to draw random numbers.
        """
        grad.mul_(scale)
        self.param.grad = grad.view(self.param.shape).to(self.param.dtype)
        for name in self.given - settings.keys() if settings else ():
            self.optimizer.param_groups[0].pop(name, None)
        self.given |= settings.keys()
        self._set(settings)
        held = self.param.detach()
        with self.watch or nullcontext():
            self.optimizer.step()
        self.param.grad = None
        if self.param.data_ptr() != held.data_ptr():  # a step that assigns .data, or calls set_
            held.copy_(self.param.detach())
            self.param.data = held
        if self.watch and (self.watch.drawing or (self.watch.mixing and not self.is_whole)):
            drawn, mixing = sorted(self.watch.drawing), sorted(self.watch.mixing)
            what = (
                f"draws random numbers ({drawn[0]})" if drawn else f"looks at whole parameters ({mixing[0]})"
            )
            where = method_line(type(self.optimizer), "step")
            raise OptimizerError(f"in this step the optimizer first {what}", where, LATE)

    def state(self) -> dict[str, torch.Tensor]:
        """State tensors by name (numbers as 0-dim tensors), for a checkpoint."""
        return as_tensors(self.optimizer.state.get(self.param, {}))

    def load(self, state: dict[str, torch.Tensor]) -> None:
        """Put back what `state` gave, bit for bit."""
        self.optimizer.state[self.param] = as_kept({k: v.clone() for k, v in state.items()})
