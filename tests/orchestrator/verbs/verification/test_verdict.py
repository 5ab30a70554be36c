"""verdict: distances, what is said of the first difference, and what counts as noise."""

import pytest
import torch

from comms.errors import RunError
from orchestrator.verbs.verification.outcome import Outcome
from orchestrator.verbs.verification.sides import GroupSettings
from orchestrator.verbs.verification.verdict import (
    RelativeErrors,
    Step,
    compare,
    exactly,
    proof,
    relative,
    verdict,
    within_noise,
)

ENTRY = "1 of 6 entries differ, first entry [1, 0]: 1.5 for 1 (off by 2.0e-01 in all)"
STEPS = [Step({}, key, ()) for key in range(3)]


def outcome(loss: float, value: float, name: str = "w") -> Outcome:
    return Outcome(loss, {name: torch.full((4,), value)}, {name: torch.full((4,), value)})


def test_differences_are_relative_and_missing_tensors_infinite() -> None:
    assert compare(outcome(2.0, 1.0), outcome(2.0, 1.0), 1e-6) == RelativeErrors(0.0, 0.0, 0.0, 0.0)
    assert compare(outcome(2.2, 1.1), outcome(2.0, 1.0), 1e-6).loss == pytest.approx(0.1)
    assert compare(outcome(2.0, 1.1), outcome(2.0, 1.0), 1e-6).grad == pytest.approx(0.1, rel=1e-5)
    assert compare(outcome(2.0, 1.0, "w"), outcome(2.0, 1.0, "b"), 1e-6).worst == float("inf")
    assert compare(outcome(float("nan"), 1.0), outcome(2.0, 1.0), 1e-6).loss == float("inf")


@pytest.mark.parametrize(
    ("value", "expected", "error"),
    [
        (torch.ones(2), torch.ones(3), float("inf")),
        (torch.tensor([float("nan")]), torch.ones(1), float("inf")),
        (torch.tensor([1]), torch.tensor([2]), float("inf")),
        (torch.tensor([2]), torch.tensor([2]), 0.0),
        (torch.full((1,), 1e-9), torch.zeros(1), 1e-3),
    ],
)
def test_relative_distance(value: torch.Tensor, expected: torch.Tensor, error: float) -> None:
    assert relative(value, expected, 1e-6) == pytest.approx(error)


class Scripted:
    """A side whose loss, gradient and parameter are off by so much, step by step, at entry (1, 0)."""

    def __init__(self, *off: float, kind: str = "gradient", order: int | None = None) -> None:
        self.off, self.kind, self.scale = off, kind, 1.0 if order is None else 1.0 + 1e-7 * (order + 1)

    def step(self, batch: object, key: int, settings: GroupSettings) -> Outcome:
        moved = torch.ones(2, 3, dtype=torch.float64)
        moved[1, 0] += self.off[key] if self.off else 0.0
        right = torch.ones(2, 3, dtype=torch.float64)
        loss = 2.0 + (self.off[key] if self.off and self.kind == "loss" else 0.0)
        gradient = (moved if self.kind == "gradient" else right) * self.scale
        return Outcome(loss, {"w": gradient}, {"w": moved if self.kind == "parameter" else right})


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("loss", "step 2: the loss is 2.5 for 2 (off by 2.5e-01)"),
        ("gradient", f"step 2: gradient of w, {ENTRY}"),
        ("parameter", f"step 2: w, {ENTRY}"),
    ],
)  # fmt: skip
def test_the_first_difference_is_named_by_step_tensor_and_entry(kind: str, said: str) -> None:
    found = proof(lambda: Scripted(0.0, 0.5, 0.7, kind=kind), lambda order: Scripted(), STEPS)
    assert (found.at, found.first) == (1, said)
    judged = verdict(found, None, 3)
    assert not judged.equal and judged.differs == said and said in str(judged)


def test_noise_is_what_reordering_makes_and_ten_times_that_is_allowed() -> None:
    def judged(off: float) -> bool:
        found = within_noise(
            lambda: Scripted(*(off,) * 3),
            lambda order: Scripted(order=order),
            STEPS,
            1e-9,
        )
        assert found.noise.grad == pytest.approx(2e-7) and found.noise.loss == 1e-9
        return found.at is None

    assert judged(1e-6) and not judged(1e-5)


def test_what_rounding_moves_in_float64_is_looked_at_twice() -> None:
    def side() -> Scripted:
        return Scripted(*(1e-6,) * 3)

    assert proof(side, lambda order: Scripted(order=order), STEPS).at is None
    assert proof(side, lambda order: Scripted(), STEPS).at == 0
    assert exactly(side, lambda order: Scripted(), STEPS).at == 0


def test_a_gradient_of_nothing_but_rounding_does_not_judge_what_an_optimizer_makes_of_it() -> None:
    class Adam:
        """Moves by a rate in the gradient's direction, which is that of its rounding."""

        def __init__(self, sign: float, size: float) -> None:
            self.sign, self.size = sign, size

        def step(self, batch: object, key: int, settings: GroupSettings) -> Outcome:
            gradient = torch.tensor([1.0, self.sign * self.size], dtype=torch.float64)
            return Outcome(1.0, {"w": gradient}, {"w": gradient.sign() * -0.01 + 1.0})

    def at(size: float) -> int | None:
        return proof(lambda: Adam(-1.0, size), lambda order: Adam(1.0, size), STEPS).at

    assert at(1e-17) is None and at(1e-3) == 0


def test_a_loss_that_is_not_finite_on_one_chip_is_no_verdict() -> None:
    with pytest.raises(RunError, match="not finite"):
        proof(lambda: Scripted(), lambda order: Scripted(*(float("nan"),) * 3, kind="loss"), STEPS)
