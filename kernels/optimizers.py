"""Optimizers on flat shards: real `torch.optim` classes stepping on one tensor per flat group.

AdamW uses torch's fused kernel, SGD its foreach one; any other class comes from a factory
`factory(params) -> torch.optim.Optimizer`. `scope_of` finds by trial what an optimizer looks at: entries one by one, so
that parameters may be stepped on end to end and in shards, or whole parameters (LAMB, Adafactor, Muon), each of which
then has a step of its own. What couples parameters to each other, or draws random numbers, is refused.
"""

import copy
import inspect
import math
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from types import FunctionType, MethodType
from typing import Any, TypeAlias

import torch

from comms.errors import OptimizerError
from kernels.builtin_optimizers import BUILT_IN

Factory: TypeAlias = Callable[[Sequence[torch.Tensor]], torch.optim.Optimizer]
PROBES = (((4, 6), (5,), (70, 61)), ((4, 6), (3, 5), (70, 61)))  # shapes of parameters
PROBE_STEPS = 3
SIZES = frozenset({"numel", "nelement", "shape", "size", "ndim", "dim"})
TORCH_OWN = (
    "state",
    "param_groups",
    "step",
    *torch.optim.SGD([torch.zeros(1)], lr=0.0).__dict__,
    "_opt_called",
)
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
    """The names of states that hold a number for every entry of a parameter, found by taking one step."""
    param = torch.ones(2, 3, requires_grad=True)
    optimizer = factory([param])
    param.grad = torch.ones(2, 3)
    optimizer.step()
    own = optimizer.state[param]
    return frozenset(k for k, v in own.items() if isinstance(v, torch.Tensor) and v.shape == param.shape)


class Scope(StrEnum):
    """What an optimizer's step on an entry depends on."""

    ENTRY = "entry"
    PARAMETER = "parameter"


def scope_of(factory: Factory) -> Scope:
    """Steps on parameters together, apart and end to end tell. Raises OptimizerError."""
    found = None
    for shapes in PROBES:  # some optimizers take matrices only
        try:
            together, apart = _trial(factory, shapes, "together"), _trial(factory, shapes, "apart")
        except OptimizerError:
            raise
        except Exception as error:  # whatever the user's code raises
            found = found or error
            continue
        if not _close(together, apart):
            problem = "the optimizer couples parameters to each other, or draws random numbers"
            raise OptimizerError(problem, hint="use one that steps on each parameter by itself")
        try:
            joined = _trial(factory, shapes, "end to end")
        except Exception:  # an optimizer that only takes matrices looks at them
            return Scope.PARAMETER
        if not _close(together, joined) or _names_sizes(factory):
            return Scope.PARAMETER
        return Scope.ENTRY
    said = str(found).strip().split("\n")[0]
    raise OptimizerError(
        f"the optimizer cannot step on given gradients: {said}",
        hint="use one whose step needs nothing but gradients",
    )


def _trial(factory: Factory, shapes: Sequence[tuple[int, ...]], how: str) -> torch.Tensor:
    """All entries after some steps, in the order of `shapes`."""
    generator = torch.Generator().manual_seed(0)
    starts = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    sets = [
        [
            torch.randn(shape, generator=generator, dtype=torch.float64) * 10.0**i
            for i, shape in enumerate(shapes)
        ]
        for _ in range(PROBE_STEPS)
    ]
    if how == "end to end":
        starts = [torch.cat([s.reshape(-1) for s in starts])]
        sets = [[torch.cat([g.reshape(-1) for g in grads])] for grads in sets]
    params = [torch.nn.Parameter(start) for start in starts]
    made = [factory([p]) for p in params] if how == "apart" else [factory(params)]
    optimizers = [_apart_from_users(optimizer) for optimizer in made]
    held = [own_attributes(optimizer) for optimizer in optimizers]
    before = [_marks(own) for own in held]
    for grads in sets:
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for optimizer, own, marks in zip(optimizers, held, before, strict=True):
        _require_unchanged(marks, _marks(own | own_attributes(optimizer)))
    return torch.cat([p.detach().reshape(-1) for p in params])


def _close(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.allclose(one, other, rtol=1e-9, atol=1e-12)


def own_attributes(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """What an optimizer of the user's holds besides states and groups."""
    if type(optimizer).__module__.partition(".")[0] == "torch":
        return {}
    return {name: value for name, value in optimizer.__dict__.items() if name not in TORCH_OWN}


def require_no_parameters(optimizer: torch.optim.Optimizer) -> None:
    """Where shards are stepped on, what goes by a parameter itself finds nothing. Raises OptimizerError."""
    params = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for name, marks in _marks(own_attributes(optimizer)).items():
        if params & set(_numbers(marks)):
            problem = (
                f"the optimizer's {name} holds parameters, or ids of them, but chips step on other tensors"
            )
            raise OptimizerError(problem, hint="let groups of the optimizer say what is special")


def _numbers(marks: object) -> Iterator[int]:
    if isinstance(marks, int):
        yield marks
    elif isinstance(marks, list | tuple):
        for each in marks:
            yield from _numbers(each)


def _apart_from_users(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimizer with copies of what it shares with the user's, which a trial must not change."""
    memo: dict[int, Any] = {id(p): p for group in optimizer.param_groups for p in group["params"]}
    for name, value in own_attributes(optimizer).items():
        try:
            optimizer.__dict__[name] = copy.deepcopy(value, memo)
        except Exception as error:  # whatever the user's objects raise
            problem = f"what the optimizer holds as {name} cannot be copied, so its steps cannot be tried"
            raise OptimizerError(problem, hint=f"keep {name} outside of the optimizer") from error
    return optimizer


def _require_unchanged(before: Mapping[str, object], after: Mapping[str, object]) -> None:
    changed = [name for name, marks in after.items() if before.get(name, after) != marks]
    if changed:
        problem = f"a step of the optimizer changes its {changed[0]}, which is neither state nor setting"
        hint = "keep it in self.state[p], and step on the parameters of self.param_groups"
        raise OptimizerError(problem, hint=hint)


def _marks(held: Mapping[str, object]) -> dict[str, object]:
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


def _names_sizes(factory: Factory) -> bool:
    """Whether code of a class that is not torch's asks how large tensors are: no trial knows where it changes."""
    kinds = [k for k in type(factory([torch.zeros(1, requires_grad=True)])).__mro__ if k is not object]
    own = [f for k in kinds if k.__module__.partition(".")[0] != "torch" for f in vars(k).values()]
    codes = [inspect.unwrap(f).__code__ for f in own if isinstance(f, FunctionType)]
    return any(SIZES & set(code.co_names) for code in codes)


def same_kind(optimizer: torch.optim.Optimizer) -> Factory:
    """What makes the optimizer anew over other tensors, whatever its class takes; settings are those of its first
    group. Raises OptimizerError."""
    require_own_step(optimizer)
    kind = type(optimizer)
    shared = {k: v for k, v in optimizer.__dict__.items() if k not in ("state", "param_groups", "step")}
    settings = group_settings(optimizer)[0]

    def make(params: Sequence[torch.Tensor]) -> torch.optim.Optimizer:
        made: torch.optim.Optimizer = object.__new__(kind)
        made.__dict__.update(shared)
        made.state = defaultdict(dict)
        made.param_groups = [{**settings, "params": list(params)}]
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
    """One optimizer over one flat tensor."""

    def __init__(self, factory: Factory, flat: torch.Tensor, settings: Mapping[str, object]) -> None:
        self.param = torch.nn.Parameter(flat, requires_grad=True)
        self.optimizer = factory([self.param])
        self._set(settings)

    def _set(self, settings: Mapping[str, object]) -> None:
        for group in self.optimizer.param_groups:
            group.update({name: value for name, value in settings.items() if name in group})

    def step(self, grad: torch.Tensor, scale: float, settings: Mapping[str, object]) -> None:
        """Scale `grad` in place and step with these settings (as long as the parameter; rounded to its dtype)."""
        grad.mul_(scale)
        self.param.grad = grad.view(self.param.shape).to(self.param.dtype)
        self._set(settings)
        self.optimizer.step()
        self.param.grad = None

    def state(self) -> dict[str, torch.Tensor]:
        """State tensors by name (numbers as 0-dim tensors), for a checkpoint."""
        found = self.optimizer.state.get(self.param, {})
        return {k: v if isinstance(v, torch.Tensor) else torch.tensor(v) for k, v in found.items()}

    def load(self, state: dict[str, torch.Tensor]) -> None:
        """Put back what `state` gave, bit for bit."""
        self.optimizer.state[self.param] = {k: v.clone() for k, v in state.items()}
