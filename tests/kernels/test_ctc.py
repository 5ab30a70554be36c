"""CTC sample by sample: torch's losses and gradients, for rows of targets and for those that a mask selects."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

import kernels.ctc  # noqa: F401  (registers orchestrate::ctc_losses)

own = torch.ops.orchestrate


@given(
    st.integers(1, 4),
    st.integers(1, 8),
    st.integers(2, 5),
    st.integers(1, 4),
    st.booleans(),
    st.integers(0, 99),
)
def test_losses_and_gradients_are_torchs(
    samples: int, steps: int, classes: int, longest: int, zero: bool, seed: int
) -> None:
    draw = torch.Generator().manual_seed(seed)
    logs = torch.randn(steps, samples, classes, generator=draw, dtype=torch.float64).log_softmax(-1)
    logs.requires_grad_()
    targets = torch.randint(1, classes, (samples, longest), generator=draw)
    numbers = torch.randint(0, longest + 1, (samples,), generator=draw)
    taken = torch.randint(1, steps + 1, (samples,), generator=draw)
    weights = torch.randn(samples, generator=draw, dtype=torch.float64)
    chosen = torch.arange(longest) < numbers.unsqueeze(1)
    expected = functional.ctc_loss(logs, targets, taken, numbers, reduction="none", zero_infinity=zero)
    (slope,) = torch.autograd.grad(expected, logs, weights)
    for mask in (None, chosen):
        found = own.ctc_losses(logs, targets, mask, taken, numbers, 0, zero)
        assert torch.equal(found, expected)
        assert torch.equal(torch.autograd.grad(found, logs, weights)[0].nan_to_num(7), slope.nan_to_num(7))


def test_targets_that_are_no_classes_and_lengths_of_others_are_refused() -> None:
    logs, targets, numbers = torch.zeros(5, 2, 4), torch.tensor([[1, 4], [2, 9]]), torch.tensor([1, 1])
    assert own.ctc_losses(logs, targets, None, numbers + 3, numbers, 0, False).shape == (2,)
    with pytest.raises(ValueError, match="no class of 0 to 3"):
        own.ctc_losses(logs, targets, None, numbers + 3, numbers + 1, 0, False)
    with pytest.raises(ValueError, match="not the numbers of targets"):
        own.ctc_losses(logs, targets, targets < 3, numbers + 3, numbers + 1, 0, False)
