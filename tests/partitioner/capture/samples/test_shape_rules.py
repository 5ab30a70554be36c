"""Rules of shapes: where samples lie after entries were moved, for every operator that moves them."""

from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from comms.errors import CaptureError
from partitioner.capture.samples.spread import Split

Check = Callable[..., Any]
Batch = Mapping[str, torch.Tensor]
H = Callable[[torch.Tensor], torch.Tensor]

# of hidden states [8 samples, 3, 4]
MOVES: dict[str, H] = {
    "view": lambda h: h.view(-1, 4),
    "view of all but samples": lambda h: h.view(len(h), -1),
    "reshape": lambda h: h.transpose(1, 2).reshape(len(h), 2, 6),
    "flatten": lambda h: h.flatten(0, 1),
    "flatten all": lambda h: h.flatten(),
    "unflatten": lambda h: h.unflatten(-1, (2, 2)),
    "flatten and back": lambda h: h.flatten(0, 1).unflatten(0, (-1, 3)),
    "unsqueeze": lambda h: h.unsqueeze(0),
    "unsqueeze and squeeze": lambda h: h.unsqueeze(1).squeeze(),
    "new axes": lambda h: h[None, :, None],
    "transpose": lambda h: h.transpose(0, 1),
    "transpose and flatten": lambda h: h.transpose(0, 1).reshape(-1, 4),
    "transpose, flatten and cut": lambda h: h.transpose(0, 1).reshape(-1, 4).view(3, -1, 4),
    "permute": lambda h: h.permute(2, 0, 1),
    "t": lambda h: h[:, 0].t(),
    "mT": lambda h: h.mT,
    "movedim": lambda h: h.movedim(0, -1),
    "swapaxes": lambda h: h.swapaxes(0, 2),
    "expand": lambda h: h.unsqueeze(1).expand(-1, 5, 3, 4),
    "expand in front": lambda h: h.expand(2, *h.shape),
    "repeat": lambda h: h.repeat(1, 2, 1),
    "repeat in front": lambda h: h.repeat(2, 1, 1, 1),
    "repeat_interleave": lambda h: h.repeat_interleave(2, dim=1),
    "repeat_interleave of samples": lambda h: h.repeat_interleave(3, dim=0),
    "repeat of all samples": lambda h: h.repeat(2, 1, 1),
    "tile": lambda h: h.tile(1, 1, 2),
    "slice": lambda h: h[:, 1:],
    "slice of all samples": lambda h: h[:, ::2, :-1],
    "slice to a number": lambda h: h[: len(h), :2],
    "select": lambda h: h[:, -1],
    "select behind": lambda h: h[..., 2],
    "narrow": lambda h: h.narrow(2, 1, 2),
    "diff": lambda h: h.diff(dim=1),
    "split": lambda h: h.split(2, dim=-1)[1] * h.split([1, 3], dim=-1)[0],
    "chunk": lambda h: h.chunk(2, -1)[0] * h.chunk(2, -1)[1],
    "tensor_split": lambda h: h.tensor_split(2, dim=1)[0],
    "unbind": lambda h: h.unbind(1)[0] * h.unbind(1)[2],
    "unbind behind": lambda h: h.unbind(-1)[3],
    "cat": lambda h: torch.cat([h, 2 * h], 1),
    "cat behind": lambda h: torch.cat((h, h.sin()), dim=-1),
    "stack": lambda h: torch.stack([h, h.sin()]),
    "stack in between": lambda h: torch.stack([h, h.sin()], 1),
    "hstack": lambda h: torch.hstack([h, h]),
    "pad": lambda h: F.pad(h, (1, 2, 0, 1), value=0.5),
    "triu": lambda h: h.triu(1) + h.tril(-1),
    "flip": lambda h: h.flip(1) * h,
    "roll": lambda h: h.roll(1, dims=-1) * h,
    "rot90": lambda h: h.rot90(1, (1, 2)),
    "complex": lambda h: torch.view_as_complex(h.view(-1, 3, 2, 2)).abs(),
    "complex and back": lambda h: torch.view_as_real(torch.view_as_complex(h.view(-1, 3, 2, 2)) ** 2),
    "write": lambda h: written(h, (slice(None), 0)),
    "write behind": lambda h: written(h, (slice(None), slice(None), slice(1, 3))),
    "new tensor": lambda h: h + h.new_ones(len(h), 1, 1),
    "zeros": lambda h: h + torch.zeros(h.shape[0], 3, 4, dtype=h.dtype),
    "full": lambda h: h * torch.full((h.shape[0], 1, 1), 0.5, dtype=h.dtype),
    "zeros_like": lambda h: torch.cat([torch.zeros_like(h), h], 1),
    "positions in a sequence": lambda h: h * torch.arange(h.shape[1], dtype=h.dtype)[:, None],
    "positions of every sample": lambda h: h * torch.arange(3).expand(h.shape[0], 3).unsqueeze(-1),
    "meshgrid": lambda h: h * torch.meshgrid(torch.arange(3), torch.arange(4), indexing="ij")[0],
    "unfold": lambda h: h.unfold(1, 2, 1),
    "as_strided of a part": lambda h: h[:, 1:].contiguous(),
    "broadcast": lambda h: torch.broadcast_tensors(h, torch.ones(5, 1, 1, 1, dtype=h.dtype))[0],
    "windows": lambda h: h.view(-1, 3, 2, 2).permute(0, 2, 1, 3).reshape(-1, 3, 2),
    "windows and back": lambda h: h.view(-1, 3, 2, 2).permute(0, 2, 1, 3).reshape(-1, 3, 2).view(-1, 2, 3, 2),
    "heads": lambda h: h.view(-1, 3, 2, 2).transpose(1, 2).reshape(-1, 3, 2).softmax(-1).view(-1, 2, 3, 2),
}  # fmt: skip


def written(h: torch.Tensor, where: Any) -> torch.Tensor:
    copied = h.clone()
    copied[where] = copied[where] * 2
    return copied


@pytest.mark.parametrize("move", MOVES)
def test_samples_are_followed_wherever_they_are_moved(move: str, check: Check, sequences: Batch) -> None:
    parted = check(lambda m, x: MOVES[move](m.lin(x)).sin().square().mean(), sequences)
    assert not [target for target in parted.targets() if target.startswith("orchestrate")]


VIEWS_OF_TWO: dict[str, H] = {
    "cat and chunk": lambda a: torch.cat([a, a.cos()]).tanh().chunk(2)[1],
    "cat and split": lambda a: torch.cat([a, a.cos(), a]).tanh().split(len(a))[1],
    "stack and flatten": lambda a: torch.stack([a, a.cos()]).flatten(0, 1).tanh().view(2, -1, 3, 4)[1],
    "cat and view": lambda a: torch.cat([a, a.cos()]).tanh().view(2, -1, 3, 4).transpose(0, 1),
    "cat and unflatten": lambda a: torch.cat([a, a.cos()]).softmax(-1).unflatten(0, (2, -1))[0],
}


@pytest.mark.parametrize("move", VIEWS_OF_TWO)
def test_two_views_side_by_side_are_taken_apart_again(move: str, check: Check, sequences: Batch) -> None:
    parted = check(lambda m, x: VIEWS_OF_TWO[move](m.lin(x)).sin().square().mean(), sequences)
    assert not [target for target in parted.targets() if target.startswith("orchestrate")]


TOTALS: dict[str, H] = {
    "view": lambda t: t.view(2, 6), "transpose": lambda t: t.t(), "select": lambda t: t[1],
    "cat": lambda t: torch.cat([t, 2 * t]), "stack": lambda t: torch.stack([t, t]),
    "expand": lambda t: t.expand(2, 3, 4), "pad": lambda t: F.pad(t, (1, 1)), "slice": lambda t: t[:, 1:3],
    "unbind": lambda t: t.unbind(0)[2], "triu": lambda t: t.triu(), "chunk": lambda t: t.chunk(2, 1)[0],
    "permute": lambda t: t.permute(1, 0), "unsqueeze": lambda t: t[None],
}  # fmt: skip


@pytest.mark.parametrize("move", TOTALS)
def test_sums_over_samples_are_moved_in_parts(move: str, check: Check, sequences: Batch) -> None:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        moved = TOTALS[move](m.lin(x).square().sum(0)).reshape(-1)
        return (moved * torch.linspace(1, 2, len(moved), dtype=moved.dtype)).sum()

    parted = check(forward, sequences)
    assert not [target for target in parted.targets() if target.startswith("orchestrate")]


def test_samples_keep_their_distance_in_a_view_and_change_it_where_dims_change_places(
    check: Check, sequences: Batch
) -> None:
    parted = check(lambda m, x: m.lin(x).transpose(0, 1).reshape(-1, 4).square().mean(), sequences)
    spreads = {str(n.target): spread for n, spread in parted.splitter.spreads.items() if n.meta["val"].dim()}
    assert spreads["aten.linear.default"] == Split(12)
    assert spreads["aten.transpose.int"] == spreads["aten.reshape.default"] == Split(4)


PLACE = st.integers(0, 9)
MOVE = st.sampled_from(["swap", "merge", "divide", "new", "repeat", "pick"])
STEPS = st.lists(st.tuples(MOVE, PLACE, PLACE), max_size=6)


def moved(h: torch.Tensor, step: tuple[str, int, int]) -> torch.Tensor:
    """One step of moving entries, on any dims that there are."""
    name, first, second = step
    one, other = first % h.dim(), second % h.dim()
    match name:
        case "swap":
            return h.transpose(one, other)
        case "merge":
            return h.flatten(one, one + 1) if one + 1 < h.dim() else h
        case "divide":
            return h.unflatten(one, (2, -1) if second % 2 else (-1, 2)) if h.shape[one] % 2 == 0 else h
        case "new":
            return h.unsqueeze(one)
        case "repeat":
            return torch.stack([h, h.sin()], one)
    return h.select(one, 0) if h.shape[one] < 4 else h


@given(steps=STEPS)
@settings(max_examples=30)
def test_however_entries_are_moved_a_spread_is_right_or_refused(
    steps: Any, check: Check, doubles: Any
) -> None:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        h = m.lin(x)
        for step in steps:
            h = moved(h, step)
        return (h.tanh() * torch.linspace(1, 2, h.shape[-1], dtype=h.dtype)).mean() if h.dim() else h

    with suppress(CaptureError):  # which is no guess
        check(forward, {"x": doubles(24, 2, 4)}, dp=2, microbatches=3)
