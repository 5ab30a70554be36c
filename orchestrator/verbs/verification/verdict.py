"""The verdict of a verification: how far two runs are apart step by step, and where they differ first.

In float64 rounding differences are near 1e-15, so equality within 1e-10 (per tensor, L2, against the larger of its norm
and a floor) is a proof. In the job's own dtype the difference is held against the noise of one-chip runs whose sums are
merely re-ordered. What is proved, and within that noise at the first step, is equal: later a branch that rounding turns
(a clipped unit, the largest of a pool) may part two runs by more.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass, field, replace
from math import isfinite
from typing import TypeAlias

import torch

from comms.errors import RunError
from orchestrator.verbs.verification.outcome import Outcome, Tensors
from orchestrator.verbs.verification.sides import ComparedSide, GroupSettings
from partitioner.capture.batch_inputs import Batch

TOLERANCE = 1e-10  # relative, float64

# Smaller norms count as these. A gradient that is zero but for rounding (a key's bias) has no relative error, and Adam
# divides such a gradient by its own size: the parameter then drifts by lr times noise / eps.
GRAD_FLOOR = 1e-6
OWN_GRAD_FLOOR = 1e-3  # in the job's dtype, whose rounding is as much larger
PARAM_FLOOR = 1e-2
LOSS_FLOOR = 1e-6
NOISE_FACTOR = 10.0  # in the job's dtype, differences up to so many times the noise of re-ordering are noise
NUM_REORDERED = 2
UNSURE = 100.0  # times the rounding: an entry of a gradient that differs by more of itself
AMPLIFIED = 1e-6  # in float64, no larger difference is looked at twice
INFINITE = float("inf")


@dataclass(frozen=True, slots=True)
class RelativeErrors:
    """Largest relative differences in any step: of the loss, a gradient, a parameter or buffer, a state."""

    loss: float
    grad: float
    param: float
    state: float

    @property
    def worst(self) -> float:
        return max(astuple(self))

    def within(self, limit: "RelativeErrors") -> bool:
        """Whether none is larger."""
        return all(error <= other for error, other in zip(astuple(self), astuple(limit), strict=True))

    def largest(self, other: "RelativeErrors") -> "RelativeErrors":
        """Of each kind the larger one."""
        return RelativeErrors(*map(max, zip(astuple(self), astuple(other), strict=True)))

    def times(self, factor: float) -> "RelativeErrors":
        """All of them larger."""
        return RelativeErrors(*(factor * error for error in astuple(self)))

    def document(self) -> dict[str, float]:
        """As JSON values."""
        return {
            "loss_rel": self.loss,
            "grad_rel": self.grad,
            "param_rel": self.param,
            "state_rel": self.state,
        }

    def __str__(self) -> str:
        return ", ".join(f"{error:.1e}" for error in astuple(self))


NONE = RelativeErrors(0.0, 0.0, 0.0, 0.0)


@dataclass(frozen=True, slots=True)
class Lockstep:
    """Two runs compared step by step, and the noise that re-ordered sums make; `first` says what differs
    first, at step `at` (from 0); both None where nothing does.
    """

    errors: RelativeErrors
    noise: RelativeErrors
    first: str | None = None
    at: int | None = None


@dataclass(frozen=True, slots=True)
class Step:
    """What a step is given."""

    batch: Batch
    key: int
    settings: GroupSettings


MakePlanned: TypeAlias = Callable[[], ComparedSide]
MakePlain: TypeAlias = Callable[[int | None], ComparedSide]  # of the number of a re-ordering


def proof(make_planned: MakePlanned, make_plain: MakePlain, steps: Sequence[Step]) -> Lockstep:
    """Both sides hold float64.

    What rounding alone moves by more than the tolerance (Adam divides a gradient of nothing but rounding by its own
    size) is held against the noise, too. Raises RunError where one chip's loss is not finite either.
    """
    found = _lockstep(make_planned(), make_plain(None), (), steps, TOLERANCE / NOISE_FACTOR, GRAD_FLOOR)
    if found.at is None or found.errors.worst > AMPLIFIED:
        return found
    return exactly(make_planned, make_plain, steps)


def exactly(make_planned: MakePlanned, make_plain: MakePlain, steps: Sequence[Step]) -> Lockstep:
    """As `proof`, with the noise looked at from the start."""
    sides = make_planned(), make_plain(None), _reordered(make_plain)
    return _lockstep(*sides, steps, TOLERANCE / NOISE_FACTOR, GRAD_FLOOR)


def within_noise(
    make_planned: MakePlanned, make_plain: MakePlain, steps: Sequence[Step], eps: float
) -> Lockstep:
    """The sides hold the job's dtype, whose rounding is `eps`."""
    return _lockstep(make_planned(), make_plain(None), _reordered(make_plain), steps, eps, OWN_GRAD_FLOOR)


def _reordered(make_plain: MakePlain) -> list[ComparedSide]:
    return [make_plain(number) for number in range(NUM_REORDERED)]


def _lockstep(
    planned: ComparedSide, plain: ComparedSide, reordered: Sequence[ComparedSide], steps: Sequence[Step], eps: float,
    grad_floor: float,
) -> Lockstep:  # fmt: skip
    found, noise = Lockstep(NONE, NONE), RelativeErrors(eps, eps, eps, eps)
    unsure: list[dict[str, torch.Tensor]] = [{} for _ in (planned, *reordered)]
    for number, step in enumerate(steps):
        ours, right, *others = (
            side.step(step.batch, step.key, step.settings) for side in (planned, plain, *reordered)
        )
        if not isfinite(right.loss):
            problem = "the loss on one chip is not finite"
            raise RunError(problem, "verify", "give another batch or learning rate")
        for of_side, other in zip(unsure, (ours, *others), strict=True):
            _mark_unsure(of_side, other, right, UNSURE * eps)
        pairs = [
            (_without(of_side, other), _without(of_side, right))
            for of_side, other in zip(unsure, (ours, *others), strict=True)
        ]
        for pair in pairs[1:]:
            noise = noise.largest(compare(*pair, grad_floor))
        found = _compared(found, number, *pairs[0], grad_floor, noise.times(NOISE_FACTOR))
    return replace(found, noise=noise)


def _mark_unsure(unsure: dict[str, torch.Tensor], one: Outcome, right: Outcome, share: float) -> None:
    """Entries whose gradient is little more than rounding: an optimizer that divides by its size may turn it round."""
    for name, gradient in right.gradients.items():
        if (other := one.gradients.get(name)) is not None and other.numel() == gradient.numel():
            apart = (other.reshape(gradient.shape) - gradient).abs() > share * gradient.abs()
            unsure[name] = unsure[name] | apart if name in unsure else apart


def _without(unsure: Tensors, outcome: Outcome) -> Outcome:
    """The unsure entries of parameters and of their states as zeros."""
    values, states = (_zeroed(unsure, named) for named in (outcome.values, outcome.states))
    copies = {where: _without(unsure, own) for where, own in outcome.copies.items()}
    return replace(outcome, values=values, states=states, copies=copies)


def _zeroed(unsure: Tensors, named: Tensors) -> dict[str, torch.Tensor]:
    masks = {name: unsure.get(name, unsure.get(name.partition(" of ")[2])) for name in named}
    return {
        name: value
        if (mask := masks[name]) is None or mask.numel() != value.numel()
        else value.reshape(mask.shape).masked_fill(mask, 0.0)
        for name, value in named.items()
    }


def _compared(
    so_far: Lockstep, number: int, ours: Outcome, right: Outcome, grad_floor: float, limit: RelativeErrors
) -> Lockstep:
    errors = compare(ours, right, grad_floor)
    found = replace(so_far, errors=so_far.errors.largest(errors))
    if found.at is not None or errors.within(limit):
        return found
    what = _first(ours, right, grad_floor, limit)
    return replace(found, at=number, first=f"step {number + 1}: {what}")


def compare(one: Outcome, other: Outcome, grad_floor: float) -> RelativeErrors:
    """Largest relative differences of a step; tensors that one side lacks count as infinite."""
    kinds = _kinds(one, other, grad_floor, NONE)
    whole = (_largest(each.one, each.other, each.floor) for each in kinds)
    errors = RelativeErrors(_loss_error(one.loss, other.loss), *whole)
    for copy in one.copies.values():
        of_copy = (
            _largest(each.one, each.copied, each.floor) for each in _kinds(copy, other, grad_floor, NONE)
        )
        errors = errors.largest(RelativeErrors(0.0, *of_copy))
    return errors


@dataclass(frozen=True, slots=True)
class _Kind:
    """What is compared of one kind, against which floor, and the limit of its error."""

    words: str
    one: Tensors
    other: Tensors
    floor: float
    limit: float

    @property
    def copied(self) -> Tensors:
        """Of the other side what this one has."""
        return {name: self.other[name] for name in self.one if name in self.other}


def _kinds(one: Outcome, other: Outcome, grad_floor: float, limit: RelativeErrors) -> tuple[_Kind, ...]:
    return (
        _Kind("gradient of ", one.gradients, other.gradients, grad_floor, limit.grad),
        _Kind("", one.values, other.values, PARAM_FLOOR, limit.param),
        _Kind("", one.states, other.states, grad_floor, limit.state),
    )


def _loss_error(loss: float, right: float) -> float:
    return abs(loss - right) / max(abs(right), LOSS_FLOOR) if isfinite(loss) else INFINITE


def _largest(one: Tensors, other: Tensors, floor: float) -> float:
    if set(one) - set(other) or set(other) - set(one):
        return INFINITE
    return max((relative(_like(one[name], other[name]), other[name], floor) for name in other), default=0.0)


def _like(value: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    return value.reshape(other.shape) if value.numel() == other.numel() else value


def relative(value: torch.Tensor, expected: torch.Tensor, floor: float) -> float:
    """L2 distance over the larger of the expected norm and `floor`.

    Infinite if shapes differ or numbers are not finite.
    """
    if value.shape != expected.shape:
        return INFINITE
    if not value.is_floating_point():
        return 0.0 if torch.equal(value, expected) else INFINITE
    distance: float = (value.double() - expected.double()).norm().item()
    if not distance < INFINITE:
        return INFINITE
    norm: float = expected.double().norm().item()
    return distance / max(norm, floor)


def _first(ours: Outcome, right: Outcome, grad_floor: float, limit: RelativeErrors) -> str:
    """The loss, or the first gradient, parameter, buffer or state (in the module's order) over its limit."""
    if (error := _loss_error(ours.loss, right.loss)) > limit.loss:
        return f"the loss is {ours.loss:.12g} for {right.loss:.12g} (off by {error:.1e})"
    order = {name: place for place, name in enumerate({**right.values, **ours.values})}
    copies = {f" on {where}": _kinds(own, right, grad_floor, limit) for where, own in ours.copies.items()}
    for at, kind in enumerate(_kinds(ours, right, grad_floor, limit)):
        if (said := _first_of(kind, kind.other, "", order)) is not None:
            return said
        for where, kinds in copies.items():
            if (said := _first_of(kinds[at], kinds[at].copied, where, order)) is not None:
                return said
    raise AssertionError("something is over its limit")


def _first_of(kind: _Kind, other: Tensors, where: str, order: Mapping[str, int]) -> str | None:
    one = kind.one
    for name in sorted(
        {**other, **one}, key=lambda n: order.get(n, order.get(n.partition(" of ")[2], len(order)))
    ):
        if (name in one) != (name in other):
            return f"{kind.words}{name} is there {'under the plan' if name in one else 'on one chip'} only"
        if said := _entry(_like(one[name], other[name]), other[name], kind.floor, kind.limit):
            return f"{kind.words}{name}{where}, {said}"
    return None


def _entry(value: torch.Tensor, right: torch.Tensor, floor: float, most: float) -> str | None:
    """The first entry that is off by more than its share of the limit."""
    error = relative(value, right, floor)
    if error <= most:
        return None
    if value.shape != right.shape:
        return f"of shape {list(value.shape)} for {list(right.shape)}"
    wide, expected = value.double(), right.double()
    share = most * max(expected.norm().item(), floor) / max(right.numel(), 1) ** 0.5
    wrong = ~((wide - expected).abs() <= share)
    place = tuple(wrong.nonzero()[0].tolist())
    count = f"{int(wrong.sum())} of {right.numel()} entries differ, first " if right.dim() else ""
    where = f"entry {list(place)}: " if right.dim() else ""
    return f"{count}{where}{wide[place].item():.12g} for {expected[place].item():.12g} (off by {error:.1e} in all)"


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingVerdict:
    """Whether two runs are the same training.

    `errors` are of the float64 proof (None: there could be none, `unproved` says why); `own` and `noise` of the job's
    dtype (None if that is float64). `differs`: the first step, tensor and entry that does. `grown`: the first that is
    beyond the noise in the job's dtype, at a later step of a run that is proved.
    """

    equal: bool
    errors: RelativeErrors | None
    own: RelativeErrors | None = None
    noise: RelativeErrors | None = None
    differs: str | None = None
    unproved: str | None = None
    grown: str | None = None
    steps: int = field(default=1)

    def document(self) -> dict[str, object]:
        """As JSON values."""
        return {
            "equal": self.equal, **(self.errors.document() if self.errors else {}), "differs": self.differs,
            "grown": self.grown, "unproved": self.unproved,
            "tolerance": TOLERANCE, "grad_floor": GRAD_FLOOR, "param_floor": PARAM_FLOOR,
            "steps": self.steps, "own_dtype": None if self.own is None else self.own.document(),
            "reordering_noise": None if self.noise is None else self.noise.document(),
        }  # fmt: skip

    def __str__(self) -> str:
        if not self.equal:
            return f"differs from one chip: {self.differs}"
        if self.errors is None:
            return f"within the noise of one chip's re-ordered sums ({self.own}); no proof: {self.unproved}"
        grown = f"; in its own dtype rounding grows beyond the noise seen: {self.grown}" if self.grown else ""
        return (
            f"equal to one chip (float64: loss, gradients, parameters, states differ by {self.errors}){grown}"
        )


def verdict(
    exact: Lockstep | None, own: Lockstep | None, steps: int, unproved: str | None = None
) -> TrainingVerdict:
    """Of a proof and of a comparison in the job's dtype, as far as there are any."""
    first = None if own is None else own.first
    is_grown = exact is not None and exact.first is None and own is not None and bool(own.at)
    found = (exact and exact.first) or (None if is_grown else first)
    return TrainingVerdict(
        equal=found is None, errors=exact.errors if exact else None, own=own.errors if own else None,
        noise=own.noise if own else None, differs=found, unproved=unproved, grown=first if is_grown else None,
        steps=steps,
    )  # fmt: skip
