"""How a batch is cut: entries that hold samples are found by what the model does with them, whatever their shapes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from comms.errors import CaptureError, PlanError

Check = Callable[..., Any]
Doubles = Callable[..., torch.Tensor]


def scaled(m: Any, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return (m.lin(x) * scale).sin().mean()


@pytest.mark.parametrize("shape", [(), (1,), (4,), (3, 1), (1, 3, 4), (1, 1, 1), (3, 4)], ids=str)
def test_what_all_samples_share_may_have_any_shape(
    shape: tuple[int, ...], check: Check, doubles: Doubles
) -> None:
    parted = check(scaled, {"x": doubles(8, 3, 4), "scale": doubles(*shape)})
    assert parted.cut == {"x"}


@pytest.mark.parametrize("shape", [(8, 1, 1), (8, 3, 1), (8, 3, 4)], ids=str)
def test_what_every_sample_has_may_be_broadcast(
    shape: tuple[int, ...], check: Check, doubles: Doubles
) -> None:
    assert check(scaled, {"x": doubles(8, 3, 4), "scale": doubles(*shape)}).cut == {"x", "scale"}


def test_positions_and_masks_of_a_sequence_are_shared(check: Check, doubles: Doubles) -> None:
    def forward(m: Any, x: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return ((m.lin(x) + m.table(positions)) * mask.unsqueeze(-1)).sin().sum() / mask.sum()

    for positions in (torch.arange(3), torch.arange(3)[None]):
        batch = {
            "x": doubles(8, 3, 4),
            "positions": positions,
            "mask": torch.tensor([[1.0, 0.0, 1.0]]).double(),
        }
        assert check(forward, batch).cut == {"x"}


@pytest.mark.parametrize("by_sample", [True, False])
def test_a_sequence_as_long_as_the_batch_is_told_by_its_use(
    by_sample: bool, check: Check, doubles: Doubles
) -> None:
    """[8, 8, 4] with eight numbers: one a sample, or one a position."""

    def forward(m: Any, x: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
        column = numbers.view(-1, 1, 1) if by_sample else numbers.view(1, -1, 1)
        return (m.lin(x) * column).sin().mean()

    batch = {"x": doubles(8, 8, 4), "numbers": doubles(8)}
    assert check(forward, batch).cut == ({"x", "numbers"} if by_sample else {"x"})


def test_attention_over_a_sequence_as_long_as_the_batch(check: Check, doubles: Doubles) -> None:
    def forward(m: Any, x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        h = m.lin(x)
        return ((h @ h.mT + bias).softmax(-1) @ h).sin().mean()

    assert check(forward, {"x": doubles(8, 8, 4), "bias": doubles(8, 8)}).cut == {"x"}


def test_a_table_in_the_batch_is_shared(check: Check, doubles: Doubles) -> None:
    def forward(m: Any, ids: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        return m.lin(table[ids]).sin().mean()

    ids = torch.randint(0, 8, (8, 3), generator=torch.Generator().manual_seed(0))
    for rows in (5, 8, 16):
        batch = {"ids": ids.clamp(max=rows - 1), "table": doubles(rows, 4)}
        assert check(forward, batch).cut == {"ids"}


def test_samples_may_lie_in_another_dim_if_it_is_turned_before(
    check: Check, parts_of: Check, doubles: Doubles
) -> None:
    """Time-major inside the model is followed; a batch itself has its samples first."""

    def turned(m: Any, x: torch.Tensor) -> torch.Tensor:
        h = m.lin(x).transpose(0, 1).contiguous()
        return (h.cumsum(0) / torch.arange(1, len(h) + 1).view(-1, 1, 1)).sin().mean()

    check(turned, {"x": doubles(8, 3, 4)})

    def time_first(m: Any, x: torch.Tensor) -> torch.Tensor:
        return m.lin(x).cumsum(0).sin().mean()

    with pytest.raises(PlanError, match="does not divide into 4 parts"):
        parts_of(time_first, {"x": doubles(3, 8, 4)})


def test_the_length_that_most_entries_have_is_the_batchs(check: Check, doubles: Doubles) -> None:
    def forward(m: Any, x: torch.Tensor, y: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return ((m.lin(x).mean(1) - y) @ weights.t()).square().mean()

    batch = {"weights": doubles(4, 4), "x": doubles(8, 3, 4), "y": doubles(8, 4)}
    parted = check(forward, batch)
    assert (parted.cut, parted.form.samples) == ({"x", "y"}, 2)


def test_entries_of_several_lengths_per_sample(check: Check, doubles: Doubles) -> None:
    def forward(m: Any, image: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        return (m.lin(image).mean((1, 2)) - m.table(text).mean(1)).square().mean()

    batch = {"image": doubles(8, 2, 3, 4), "text": torch.arange(40).view(8, 5) % 6}
    assert check(forward, batch).cut == {"image", "text"}


def test_two_crops_of_every_sample_are_two_entries_or_one(check: Check, doubles: Doubles) -> None:
    def separate(m: Any, crops: list[torch.Tensor]) -> torch.Tensor:
        first, second = (m.lin(crop) for crop in crops)
        return (first - second).square().mean()

    assert check(separate, {"crops": [doubles(8, 4), doubles(8, 4, seed=1)]}).cut == {"crops.0", "crops.1"}

    def joined(m: Any, crops: list[torch.Tensor]) -> torch.Tensor:
        first, second = m.lin(torch.cat(crops)).chunk(2)
        return (first - second).square().mean()

    parted = check(joined, {"crops": [doubles(8, 4), doubles(8, 4, seed=1)]})
    assert not [target for target in parted.targets() if target.startswith("orchestrate")]


def test_none_numbers_and_texts_are_no_samples(check: Check, doubles: Doubles) -> None:
    def forward(m: Any, x: torch.Tensor, mask: None, power: float, more: dict[str, Any]) -> torch.Tensor:
        assert mask is None and more["mode"] == "sin"
        return (m.lin(x) ** power * more["shift"]).sin().mean()

    check(forward, {"x": doubles(8, 3, 4), "mask": None, "power": 2.0, "more": {"mode": "sin", "shift": 1}})


def unused(m: Any, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return m.lin(x).sin().mean()


def test_an_entry_that_nothing_reads_is_of_no_consequence(check: Check, doubles: Doubles) -> None:
    check(unused, {"x": doubles(8, 3, 4), "labels": doubles(8)})
    check(unused, {"x": doubles(8, 3, 4), "labels": doubles(5, 2)})
    check(unused, {"x": doubles(8, 3, 4), "labels": torch.zeros(0, 2)})


def test_an_entry_that_nothing_reads_does_not_make_every_part_the_whole_batch(
    parts_of: Check, doubles: Doubles
) -> None:
    """Else all samples could be 'shared' by parts that are told apart by nothing."""

    def mixing(m: Any, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return m.lin(x).cumsum(0).sin().mean()

    with pytest.raises(CaptureError, match="cumsum mixes samples"):
        parts_of(mixing, {"x": doubles(8, 3, 4), "labels": doubles(8)})


@pytest.mark.parametrize(
    ("shapes", "parts", "said"),
    [
        ({"x": (7, 3, 4)}, (2, 2), r"does not divide into 4 parts .*x \[7, 3, 4\]"),
        ({"x": (6, 3, 4)}, (4, 1), r"does not divide into 4 parts .*x \[6, 3, 4\]"),
        ({"x": (1, 4)}, (2, 1), r"does not divide into 2 parts .*x \[1, 4\]"),
        ({"x": ()}, (2, 1), r"does not divide into 2 parts .*x \[\]"),
    ],
)
def test_a_batch_that_does_not_divide_is_refused_with_its_shapes(
    shapes: dict[str, tuple[int, ...]], parts: tuple[int, int], said: str, parts_of: Check, doubles: Doubles
) -> None:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        return m.lin(x).sin().mean()

    with pytest.raises(PlanError, match=said) as caught:
        parts_of(forward, {name: doubles(*shape) for name, shape in shapes.items()}, *parts)
    assert f"a multiple of {parts[0] * parts[1]}" in caught.value.hint


def test_the_first_guess_is_what_a_refusal_is_about(parts_of: Check, doubles: Doubles) -> None:
    def forward(m: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return (m.lin(x).cumsum(0) * y).sin().mean()

    with pytest.raises(CaptureError, match="cumsum mixes samples"):
        parts_of(forward, {"x": doubles(8, 4), "y": doubles(8, 4)})
