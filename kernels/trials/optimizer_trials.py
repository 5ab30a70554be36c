"""Trials: what an optimizer's step looks at, reads and keeps, found by steps on small parameters.

It may look at entries one by one, so that parameters can be stepped on end to end and in shards, or at whole parameters
(LAMB, Adafactor, Muon), each of which then has a step of its own. Settings that it moves by itself (a count, a rate)
may follow from settings only, as every chip has those. What couples parameters to each other, draws random numbers,
or keeps what chips cannot hold is refused.
"""

import copy
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from enum import StrEnum
from itertools import product
from typing import Any

import torch

from comms.errors import OptimizerError
from kernels.optimizers import (
    LATE_STEPS,
    NUMBERS,
    Factory,
    group_settings,
    is_torchs,
    marks_of,
    own_attributes,
    same_kind,
)
from kernels.trials.entry_operations import StepWatch
from kernels.trials.optimizer_reads import names_of, recording
from kernels.trials.setting_modes import Groups, move_counters, of_each_mode, plain, tried

PROBES = (((4, 6), (5,), (70, 61)), ((4, 6), (3, 5), (70, 61)))  # shapes of a group's parameters
PROBE_STEPS = {True: 3, False: LATE_STEPS}  # of torch's own, and of others
EXTREMES = (1.0, 1e-6, 1e6)  # factors of gradients in steps after that, for what begins at a threshold
SIZES = frozenset({"numel", "nelement", "shape", "size", "ndim", "dim"})
KEEP = "keep tensors and numbers in self.state[p], and settings in self.param_groups"
GIVEN = "use one whose step needs nothing but gradients"


class Scope(StrEnum):
    """What an optimizer's step on an entry depends on."""

    ENTRY = "entry"
    PARAMETER = "parameter"


@dataclass(frozen=True, slots=True)
class StepTraits:
    """Whether a step moves settings of its groups, and the attributes of parameters and names that its code reads."""

    scope: Scope
    moves_groups: bool
    reads: frozenset[str]


_known: dict[tuple[type, str], StepTraits] = {}


def scope_of(factory: Factory) -> Scope:
    """What a step on an entry depends on. Raises OptimizerError."""
    return traits_of(factory).scope


def traits_of(factory: Factory, groups: Groups = (), sizes: Sequence[int] = ()) -> StepTraits:
    """By steps with these settings of groups (else the factory's own), of so many parameters. Raises OptimizerError.

    Of torch's own classes they are found once for the same settings.
    """
    made = factory([torch.zeros(4, 6, requires_grad=True)])
    key = type(made), repr(groups or group_settings(made))
    if key in _known:
        return _known[key]
    found = _found_traits(factory, groups, sizes)
    if is_torchs(type(made)):
        _known[key] = found
    return found


def _found_traits(factory: Factory, groups: Groups, sizes: Sequence[int]) -> StepTraits:
    found: Exception | None = None
    for extremes, shapes in product(
        (EXTREMES, ()), PROBES
    ):  # some take matrices only, some no such gradients
        trial = _Trials(factory, groups, shapes, extremes)
        try:
            together, apart = trial.run("together"), trial.run("apart")
        except OptimizerError:
            raise
        except Exception as error:  # whatever the user's code raises
            found = found or error
            continue
        _require_same(together, apart)
        trial.require_plain_loop(together)
        trial.require_uncounted(together, sizes)
        return StepTraits(_scope(trial, together), together.moved, frozenset(trial.reads) | trial.names)
    said = str(found).strip().split("\n")[0]
    raise OptimizerError(f"the optimizer cannot step on given gradients: {said}", hint=GIVEN)


def advance(optimizer: torch.optim.Optimizer) -> None:
    """Move the settings of the groups as a step does that moves them by themselves."""
    made, before = same_kind(optimizer)([]), group_settings(optimizer)
    made.param_groups = [
        {**copy.deepcopy(own), "params": [torch.nn.Parameter(torch.ones(PROBES[0][0]))]} for own in before
    ]
    for group in made.param_groups:
        group["params"][0].grad = torch.ones(PROBES[0][0])
    made.step()
    for group, own, after in zip(optimizer.param_groups, before, group_settings(made), strict=True):
        for name in own.keys() - after.keys():
            del group[name]
        group.update({k: v for k, v in after.items() if k not in own or plain(v) != plain(own[k])})


@dataclass(frozen=True, slots=True)
class _Stepped:
    """Values by parameter, their states, and what the groups' settings became; in the order of groups and shapes.
    `early`: the values before counters were moved."""

    early: list[torch.Tensor]
    values: list[torch.Tensor]
    states: list[dict[str, Any]]
    groups: list[object]
    moved: bool

    @property
    def flat(self) -> torch.Tensor:
        return torch.cat([value.reshape(-1) for value in (*self.early, *self.values)])


class _Trials:
    """Steps on the same values and gradients, with parameters together, apart or end to end."""

    def __init__(
        self, factory: Factory, groups: Groups, shapes: Sequence[tuple[int, ...]], extremes: Sequence[float] = ()
    ) -> None:  # fmt: skip
        made = factory([torch.zeros(4, 6, requires_grad=True)])
        self.factory, self.shapes, self.reads = factory, shapes, set[str]()
        self.is_torchs, self.names = is_torchs(type(made)), names_of(type(made))
        self.watch = StepWatch()
        self.zeroes = type(made).zero_grad is not torch.optim.Optimizer.zero_grad
        self.kind = recording(self.reads) if not self.is_torchs else torch.nn.Parameter
        self.groups = of_each_mode(groups or group_settings(made))
        generator = torch.Generator().manual_seed(0)

        def drawn() -> list[list[torch.Tensor]]:
            return [[torch.randn(s, generator=generator, dtype=torch.float64) * 10.0**i
                     for i, s in enumerate(shapes)] for _ in self.groups]  # fmt: skip

        self.starts = [[start / 10.0**i for i, start in enumerate(own)] for own in drawn()]
        self.grads = [drawn() for _ in range(PROBE_STEPS[self.is_torchs])]
        self.extremes = () if self.is_torchs else extremes

    def run(
        self, how: str, *, loop: bool = False, afresh: bool = False, crowd: Sequence[int] = ()
    ) -> _Stepped:
        """`loop`: gradients are added up after the optimizer's own `zero_grad`; `afresh`: states are forgotten;
        `crowd`: how many parameters more each group has, and groups more."""
        join = _joined if how == "end to end" else list
        params = [[self.kind(start.clone()) for start in join(own)] for own in self.starts]
        optimizers = self._made(params, is_apart=how == "apart")
        others = self._add(crowd, optimizers[0])
        held = [own_attributes(optimizer) for optimizer in optimizers]
        marks = [marks_of(own) for own in held]
        first = [group_settings(optimizer) for optimizer in optimizers]
        before = [[plain(own) for own in each] for each in first]

        def step(grads: Sequence[Sequence[torch.Tensor]], scale: float = 1.0) -> None:
            for optimizer in optimizers if loop else ():
                optimizer.zero_grad()
            for optimizer in optimizers if afresh else ():
                optimizer.state.clear()
            for param, grad in zip(_flat(params), _flat([join(own) for own in grads]), strict=True):
                param.grad = grad * scale + (param.grad if loop and param.grad is not None else 0.0)
            for param in others:
                param.grad = torch.ones_like(param)
            for optimizer in optimizers:
                with nullcontext() if self.is_torchs else self.watch:
                    optimizer.step()

        for grads in self.grads:
            step(grads)
        early = [p.detach().clone() for p in _flat(params)]
        if self.extremes:
            move_counters(optimizers, first)
        for grads, scale in zip(self.grads, self.extremes, strict=False):
            step(grads, scale)
        for optimizer, kept, own in zip(optimizers, held, marks, strict=True):
            _require_unchanged(own, marks_of(kept | own_attributes(optimizer)))
        return self._outcome(early, params, optimizers, before)

    def _add(self, crowd: Sequence[int], optimizer: torch.optim.Optimizer) -> list[torch.nn.Parameter]:
        """More parameters in each group of an optimizer, and more groups of one; the others come after them."""
        if not crowd:
            return []
        more = [{**tried(self.groups[0], i), "params": []} for i in range(crowd[1])]
        optimizer.param_groups = [*more, *optimizer.param_groups]
        added = []
        for group in optimizer.param_groups:
            count = max(crowd[0], not group["params"])
            own = [self.kind(torch.ones(self.shapes[0], dtype=torch.float64)) for _ in range(count)]
            group["params"] = [*own, *group["params"]]
            added += own
        return added

    def _made(self, params: list[list[torch.nn.Parameter]], *, is_apart: bool) -> list[torch.optim.Optimizer]:
        """One optimizer with all groups, or one for each parameter with its group's settings."""
        chosen = [[(i, [p])] for i, own in enumerate(params) for p in own] if is_apart else [
            list(enumerate(params))]  # fmt: skip
        found = []
        for groups in chosen:
            made = _apart_from_users(self.factory([p for _, own in groups for p in own]))
            made.param_groups = [{**tried(self.groups[i], i), "params": own} for i, own in groups]
            found.append(made)
        return found

    def _outcome(
        self, early: list[torch.Tensor], params: list[list[torch.nn.Parameter]],
        optimizers: list[torch.optim.Optimizer], before: list[list[object]],
    ) -> _Stepped:  # fmt: skip
        known = {id(p) for each in optimizers for group in each.param_groups for p in group["params"]}
        states: dict[int, Any] = {}
        for optimizer in optimizers:
            for key, own in optimizer.state.items():
                if id(key) not in known and own not in ({}, None):
                    problem = f"a step of the optimizer keeps a state under {key!r}, which is no parameter"
                    raise OptimizerError(problem[:200], hint=KEEP)
                states[id(key)] = own
        after = [[plain(own) for own in group_settings(each)] for each in optimizers]
        values, found = (
            [p.detach().clone() for p in _flat(params)],
            [states.get(id(p), {}) for p in _flat(params)],
        )
        if not self.is_torchs:
            for param, own in zip(_flat(params), found, strict=True):
                require_kept(own, param)
        return _Stepped(early, values, found, [own for each in after for own in each], after != before)

    def require_uncounted(self, together: _Stepped, sizes: Sequence[int]) -> None:
        """Nothing may follow from how many parameters or groups there are: chips have a tensor of each group."""
        more = max(sizes, default=0) - len(self.shapes), len(sizes) - len(self.groups)
        if self.is_torchs or max(more) <= 0:
            return
        crowded = self.run("together", crowd=[max(0, number) for number in more])
        own = slice(len(crowded.groups) - len(self.groups), None)
        if not (_close(crowded.flat, together.flat) and crowded.groups[own] == together.groups):
            problem = "the optimizer's step goes by how many parameters or groups there are"
            raise OptimizerError(problem, hint="use one that steps on each parameter by itself")

    def require_plain_loop(self, together: _Stepped) -> None:
        """What a plain loop does besides steps on gradients must change nothing that would be missed."""
        if together.moved and self.run("together", afresh=True).groups != together.groups:
            raise _by_gradients()
        if self.zeroes and not _close(self.run("together", loop=True).flat, together.flat):
            problem = "the optimizer's own zero_grad changes what is trained, and would not run"
            raise OptimizerError(problem, hint="change gradients in step")
        if self.is_torchs:
            return
        still = self.kind(torch.ones(self.shapes[0], dtype=torch.float64))
        (made,) = self._made([[still]], is_apart=False)
        before = plain(made.state.get(still, {}))
        try:
            made.step()
        except Exception:  # what needs gradients says so
            return
        if (
            not torch.equal(still.detach(), torch.ones_like(still))
            or plain(made.state.get(still, {})) != before
        ):
            problem = "a step of the optimizer changes parameters that have no gradient, or their states"
            raise OptimizerError(problem, hint="skip those whose grad is None, as torch's do")


def require_kept(state: Mapping[str, Any], param: torch.Tensor) -> None:
    """Refuse what chips cannot keep of a parameter's state. Raises OptimizerError."""
    if not state:  # as of parameters that have no shape yet
        return
    storages = {param.untyped_storage().data_ptr(): "the parameter"}
    if param.grad is not None:
        storages[param.grad.untyped_storage().data_ptr()] = "the gradient"
    for key, value in state.items():
        is_dense = isinstance(value, torch.Tensor) and value.layout is torch.strided
        if type(key) is not str or not (is_dense or type(value) in NUMBERS):
            about = f"{key!r} is a {_called(value)}" if type(key) is str else f"has the key {key!r}"
            raise OptimizerError(f"the optimizer's state {about}, which chips cannot keep", hint=KEEP)
        if isinstance(value, torch.Tensor) and value.numel() and not value.is_meta:
            place = value.untyped_storage().data_ptr()
            if place in storages:
                problem = f"the optimizer's state {key!r} shares its memory with {storages[place]}"
                raise OptimizerError(problem, hint="keep a clone")
            storages[place] = repr(key)


def _called(value: object) -> str:
    return f"tensor ({value.layout})" if isinstance(value, torch.Tensor) else type(value).__name__


def _scope(trial: _Trials, together: _Stepped) -> Scope:
    try:
        joined = trial.run("end to end")
    except OptimizerError:
        raise
    except Exception:  # an optimizer that only takes matrices looks at them
        return Scope.PARAMETER
    if not _close(together.flat, joined.flat) or trial.watch.mixing or SIZES & (trial.names | trial.reads):
        return Scope.PARAMETER
    count = len(trial.shapes)
    for turn, (value, own) in enumerate(zip(joined.values, joined.states, strict=True)):
        parts = range(turn * count, (turn + 1) * count)
        lies = [_lies([together.values[i] for i in parts], [together.states[i] for i in parts], value, own, key)
                for key in own]  # fmt: skip
        if not all(lies):
            return Scope.PARAMETER
    return Scope.ENTRY


def _lies(
    values: list[torch.Tensor], states: list[dict[str, Any]], joined: torch.Tensor, own: Mapping[str, Any], key: str
) -> bool:  # fmt: skip
    """Whether a state has a number for every entry as the parameter has, or is the same for all."""
    if any(key not in state for state in states):
        return False
    parts, whole = [torch.as_tensor(state[key]) for state in states], torch.as_tensor(own[key])
    if whole.shape == joined.shape:
        shaped = all(part.shape == value.shape for part, value in zip(parts, values, strict=True))
        return shaped and _close(torch.cat([part.reshape(-1) for part in parts]), whole)
    return whole.dim() == 0 and all(_close(part, whole) for part in parts)


def _require_same(together: _Stepped, apart: _Stepped) -> None:
    kept = zip(together.states, apart.states, strict=True)
    is_same = _close(together.flat, apart.flat) and all(
        one.keys() == other.keys()
        and all(_close(torch.as_tensor(v), torch.as_tensor(other[k])) for k, v in one.items())
        for one, other in kept
    )
    if not is_same:
        problem = (
            "the optimizer couples parameters to each other, or draws random numbers, or counts elsewhere"
        )
        raise OptimizerError(problem, hint="use one that steps on each parameter by itself")
    each = len(apart.groups) // len(together.groups)
    if apart.groups != [own for own in together.groups for _ in range(each)]:
        raise _by_gradients()


def _by_gradients() -> OptimizerError:
    problem = "a step of the optimizer sets its groups by gradients or states, of which a chip has some only"
    return OptimizerError(problem, hint="keep in self.state[p] what follows from these")


def _close(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and torch.allclose(
        one.to(other.dtype), other, rtol=1e-9, atol=1e-12, equal_nan=True
    )


def _flat(groups: Sequence[Sequence[Any]]) -> list[Any]:
    return [each for own in groups for each in own]


def _joined(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return [torch.cat([t.reshape(-1) for t in tensors])]


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
