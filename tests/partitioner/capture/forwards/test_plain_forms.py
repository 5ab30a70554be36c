"""Plain forms of torch's functions: the same values, gradients and training runs."""

import re
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from torch import nn

from comms.errors import UserError
from orchestrator.verbs.distribute import distribute
from partitioner.capture.forwards.plain_forms import plain_forms
from partitioner.layout.parallel_plan import Plan

WINDOW = torch.hann_window(8, dtype=torch.float64)


def doubles(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


SPECTRA: dict[str, Any] = {
    "as given": {"window": WINDOW},
    "short window": {"window": WINDOW[1:7], "win_length": 6, "hop_length": 3},
    "normalized, not centred": {"window": WINDOW + 1, "center": False, "normalized": True, "hop_length": 2},
    "rectangular": {"window": None, "hop_length": 4},
}


@pytest.mark.filterwarnings("ignore:A window was not provided")
@pytest.mark.parametrize("shape", [(40,), (3, 40)], ids=str)
@pytest.mark.parametrize("name", SPECTRA)
def test_spectra_and_signals_are_those_of_torch(name: str, shape: tuple[int, ...]) -> None:
    signal, said = doubles(*shape).requires_grad_(), SPECTRA[name]

    def made() -> tuple[torch.Tensor, ...]:
        spectrum = torch.stft(signal, 8, return_complex=True, **said)
        pairs = torch.view_as_real(signal.stft(8, return_complex=True, pad_mode="constant", **said))
        whole = torch.stft(signal, 8, return_complex=True, onesided=False, **said)
        back = [torch.istft(spectrum.abs() * spectrum, 8, length=n, **said) for n in (None, 30)]
        total = sum(v.abs().square().sum() for v in (spectrum, pairs, whole, *back))
        return spectrum, pairs, whole, *back, *torch.autograd.grad(total, signal)

    expected = made()
    with plain_forms():
        found = made()
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs)


class Denoiser(nn.Module):
    """Masks a spectrogram; its loss compares spectrograms of two lengths."""

    def __init__(self) -> None:
        super().__init__()
        self.mask = nn.Linear(5, 5)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        spectrum = torch.stft(x, 8, 4, window=WINDOW, return_complex=True)
        gain = self.mask(spectrum.abs().mT).sigmoid().mT
        found = torch.istft(spectrum * gain, 8, 4, window=WINDOW, length=x.shape[-1])
        sizes = [torch.stft(v, 6, 3, window=WINDOW[:6], return_complex=True).abs() for v in (found, y)]
        return nn.functional.mse_loss(found, y) + nn.functional.l1_loss(*sizes)


class Bags(nn.Module):
    """Mean embeddings of bags of several lengths."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.last = nn.EmbeddingBag(12, 6), nn.Linear(6, 40)

    def forward(self, x: torch.Tensor, starts: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return nn.functional.mse_loss(self.last(self.table(x, starts)), y)


@pytest.mark.parametrize("plan", [Plan(dp=2), Plan(microbatches=2)], ids=str)
@pytest.mark.parametrize("make", [Denoiser, Bags])
@pytest.mark.filterwarnings("ignore:.* run as one")
def test_models_of_them_train_as_in_torch(make: Any, plan: Plan, trained_alike: Any) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = make().double()
    ids = {"x": torch.arange(24) % 11, "starts": torch.tensor([0, 1, 4, 9, 12, 12, 20, 22])}
    batch = {**({"x": doubles(8, 40)} if make is Denoiser else ids), "y": doubles(8, 40) * 2}
    trained_alike(module, [batch] * 3, plan)


EVERY_OTHER = [True, False, True, False, True]


def with_some_written(value: torch.Tensor) -> torch.Tensor:
    value = value * 1
    value[:, torch.arange(5) > 2] += 2
    value[:, EVERY_OTHER] = 0.5
    return value


SIZED_BY_CONSTANTS: tuple[Callable[[torch.Tensor], torch.Tensor], ...] = (
    lambda x: torch.repeat_interleave(x, torch.arange(5), 1),
    lambda x: x.repeat_interleave(torch.tensor([2]), dim=1),
    lambda x: x[0].repeat_interleave(torch.arange(5)),
    lambda x: x[:, torch.arange(5) > 2],
    lambda x: x[..., EVERY_OTHER],
    lambda x: x[:, numpy.array(EVERY_OTHER)],
    lambda x: (x.unsqueeze(1) * x.unsqueeze(2))[:, torch.ones(5, 5).triu(1).bool()],
    lambda x: x[:, (torch.arange(5) > 2).nonzero()[:, 0]],
    lambda x: x[0].masked_select(torch.arange(5) > 2),
    lambda x: x[:, torch.unique(torch.tensor([1, 1, 2]), return_inverse=True)[1]],
    lambda x: x.sum(0) * torch.bincount(torch.arange(5)),
    lambda x: x[:, torch.where(torch.arange(5) > 2)[0]],
    with_some_written,
)


class Sized(nn.Module):
    """Sizes of what it computes follow from values, which are known."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(5, 5), nn.Linear(5, 5)

    def forward(self, x: torch.Tensor) -> Any:
        hidden = self.last(self.first(x).tanh())
        return sum(function(hidden).square().sum() for function in SIZED_BY_CONSTANTS)


@pytest.mark.parametrize("plan", [Plan(), Plan(dp=2), Plan(pp=2, microbatches=2)], ids=str)
@pytest.mark.filterwarnings("ignore:.* run as one")
def test_sizes_that_follow_from_constants_are_known(plan: Plan, trained_alike: Any) -> None:
    trained_alike(Sized().double(), [{"x": doubles(8, 5)}], plan)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum", "median"])
@pytest.mark.parametrize(
    "var",
    [doubles(3, 3), doubles(3, 1), doubles(1, 3), doubles(3), doubles(2, 3), doubles(1, 1), 0.5],
    ids=lambda v: str(tuple(v.shape)) if isinstance(v, torch.Tensor) else str(v),
)
def test_a_gaussians_variance_is_spread_as_in_torch(var: Any, reduction: str) -> None:
    var = var.abs() if isinstance(var, torch.Tensor) else var
    given, target = doubles(3, 3), doubles(3, 3) * 2

    def made() -> Any:
        try:
            return nn.functional.gaussian_nll_loss(given, target, var, full=True, reduction=reduction)
        except ValueError as error:
            return type(error)

    expected = made()
    with plain_forms():
        found = made()
    assert found is ValueError if expected is ValueError else torch.allclose(found, expected)


CLASSES, STEPS, LONGEST = 6, 9, 3


class Spoken(nn.Module):
    """Logits over time, and their distance to targets of several lengths."""

    def __init__(self, way: str, reduction: str = "mean") -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.first, self.last = nn.Linear(5, 8), nn.Linear(8, CLASSES)
        self.way, self.reduction = way, reduction
        self.double()

    def forward(self, x: torch.Tensor, y: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
        logs = self.last(self.first(x).tanh()).log_softmax(-1).transpose(0, 1)
        chosen, rows = y >= 0, y.clamp(min=1)
        lengths = chosen.sum(1)
        targets: torch.Tensor = {
            "masked": lambda: y.masked_select(chosen), "indexed": lambda: y[chosen], "rows": lambda: rows,
            "even": lambda: rows[:, :2], "torch": lambda: rows, "module": lambda: rows,
            "in one": lambda: rows.flatten(), "used": lambda: y[chosen] + 1, "shifted": lambda: y[chosen],
            "no class": lambda: rows + CLASSES,
        }[self.way]()  # fmt: skip
        if self.way == "even":
            return nn.functional.ctc_loss(logs, targets, (STEPS,) * len(x), [2] * len(x))
        if self.way == "torch":
            return torch.ctc_loss(logs, targets, steps, lengths, 0, 2)
        if self.way == "module":
            return nn.CTCLoss(blank=5, zero_infinity=True)(logs, targets, steps, lengths)
        lengths = lengths.roll(1) if self.way == "shifted" else lengths
        losses = nn.functional.ctc_loss(logs, targets, steps, lengths, reduction=self.reduction)
        return losses.square().mean()


def spoken(step: int) -> dict[str, torch.Tensor]:
    numbers = [step % 3, 3, 1, 2]
    y = torch.where(
        torch.arange(LONGEST) < torch.tensor(numbers)[:, None], torch.arange(12).view(4, 3) % 5 + 1, -100
    )
    return {"x": doubles(4, STEPS, 5) + step, "y": y, "steps": torch.tensor([9, 8, 7, 2 + 6 * (step % 2)])}


CTC = [
    ("masked", "sum"),
    ("indexed", "none"),
    ("rows", "mean"),
    ("even", "mean"),
    ("torch", ""),
    ("module", ""),
]


@pytest.mark.parametrize(("way", "reduction"), CTC)
def test_targets_of_unknown_lengths_train_as_in_torch(way: str, reduction: str, trained_alike: Any) -> None:
    for plan in (Plan(dp=2), Plan(pp=2, microbatches=2)):
        trained_alike(Spoken(way, reduction), [spoken(s) for s in range(3)], plan)


@pytest.mark.parametrize(
    ("way", "said"),
    [("in one", r"_ctc_loss.*give it rows"), ("used", "masked_select.*depends on values"),
     ("shifted", "target_lengths are not the numbers"), ("no class", "no class of 0 to 5")],
)  # fmt: skip
def test_targets_that_cannot_be_told_apart_are_refused(way: str, said: str, laptop: Any) -> None:
    module = Spoken(way)
    step = distribute(module, torch.optim.SGD(module.parameters()), laptop, plan=Plan(), chips=1)
    with pytest.raises(UserError) as found:
        step(spoken(1))
    assert re.search(said, str(found.value), re.DOTALL)


class Replacing(nn.Module):
    """Puts one vector, which is trained, wherever a mask holds."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.vector = nn.Linear(5, 6), nn.Parameter(torch.ones(6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.first(x)
        hidden[x[..., 0] > 0] = self.vector
        hidden[hidden[..., 1] > 0, 1] = 0.5
        return (hidden * torch.arange(6)).square().mean()


@pytest.mark.parametrize("plan", [Plan(dp=2), Plan(tp=2), Plan(pp=2, microbatches=2)], ids=str)
def test_what_a_mask_gets_everywhere_is_written_where_it_holds(plan: Plan, trained_alike: Any) -> None:
    trained_alike(Replacing().double(), [{"x": doubles(8, 3, 5)}] * 3, plan)
