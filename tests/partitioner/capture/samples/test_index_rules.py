"""Rules of looking up: tables that all samples share, entries of every sample's own, and numbers of samples."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from comms.errors import CaptureError

Check = Callable[..., Any]
Batch = dict[str, torch.Tensor]
Lookup = Callable[..., torch.Tensor]
TABLE = torch.linspace(-1, 1, 30).double().view(6, 5)
SORTED = torch.tensor([-1.0, -0.5, 0.0, 0.5, 1.0], dtype=torch.float64)


@pytest.fixture
def tokens(doubles: Callable[..., torch.Tensor]) -> Batch:
    """Samples x [8, 3, 4] with token numbers ids [8, 3] below six and a label y [8] below three."""
    generator = torch.Generator().manual_seed(1)
    ids, y = torch.randint(0, 6, (8, 3), generator=generator), torch.randint(0, 3, (8,), generator=generator)
    return {"x": doubles(8, 3, 4), "ids": ids, "y": y}


# of hidden states h [8, 3, 4] of the model m
SAMPLEWISE: dict[str, Lookup] = {
    "embedding": lambda m, h, ids, y: h + m.table(ids),
    "embedding with padding": lambda m, h, ids, y: h + F.embedding(ids, m.table.weight, padding_idx=2),
    "tied head": lambda m, h, ids, y: (h + m.table(ids)) @ m.table.weight.t(),
    "positions": lambda m, h, ids, y: h + m.table(torch.arange(h.shape[1])),
    "positions of every sample": lambda m, h, ids, y: h + m.table(torch.arange(3).expand_as(ids)),
    "flattened ids": lambda m, h, ids, y: m.table(ids.view(-1)).view_as(h) * h,
    "rows of a table": lambda m, h, ids, y: TABLE[ids][..., :4] * h,
    "entries of a table": lambda m, h, ids, y: TABLE[ids, ids.clamp(max=4)].unsqueeze(-1) * h,
    "rows of a parameter": lambda m, h, ids, y: m.lin.weight[y].unsqueeze(1) * h,
    "columns of a parameter": lambda m, h, ids, y: m.lin.weight[:, y].t().unsqueeze(1) * h,
    "the same of every sample": lambda m, h, ids, y: h[:, torch.tensor([2, 0])],
    "the same of every sample, apart": lambda m, h, ids, y: h[:, torch.tensor([2, 0]), torch.tensor([1, 3])],
    "its own entry": lambda m, h, ids, y: h[torch.arange(len(h)), y],
    "its own entries": lambda m, h, ids, y: h[torch.arange(len(h))[:, None], ids % 3],
    "its own entry behind": lambda m, h, ids, y: h[torch.arange(len(h)), :, y],
    "the last of each": lambda m, h, ids, y: h[torch.arange(len(h)), (ids > 2).sum(1).clamp(max=2)],
    "gather": lambda m, h, ids, y: h.gather(-1, (ids % 4).unsqueeze(-1)),
    "gather of log softmax": lambda m, h, ids, y: h.log_softmax(-1).gather(-1, y.view(-1, 1, 1).expand(-1, 3, 1)),
    "take_along_dim": lambda m, h, ids, y: h.take_along_dim(h.argsort(-1), -1),
    "index_select": lambda m, h, ids, y: h.index_select(1, torch.tensor([2, 1])),
    "index_select of a table": lambda m, h, ids, y: m.lin.weight.index_select(0, y) * h[:, 0],
    "scatter": lambda m, h, ids, y: torch.zeros_like(h).scatter(-1, (ids % 4).unsqueeze(-1), h[..., :1]),
    "scatter_add": lambda m, h, ids, y: torch.zeros_like(h).scatter_add(-1, h.argsort(-1), h),
    "one_hot": lambda m, h, ids, y: F.one_hot(y, 3).double().unsqueeze(1) @ h,
    "bucketize": lambda m, h, ids, y: h * torch.bucketize(h.detach(), SORTED),
    "searchsorted": lambda m, h, ids, y: h * torch.searchsorted(SORTED, h.detach()),
    "top tokens": lambda m, h, ids, y: m.table(h.topk(2, -1).indices),
    "entries replaced": lambda m, h, ids, y: replaced(h, h > 0.3),
    "samples replaced": lambda m, h, ids, y: replaced(h, y == 1),
    "its own entry replaced": lambda m, h, ids, y: replaced(h, (torch.arange(len(h)), y)),
    "added in places": lambda m, h, ids, y: torch.zeros_like(h).index_add(1, torch.tensor([2, 0, 2]), h.sin()),
    "copied to places": lambda m, h, ids, y: h.index_copy(1, torch.tensor([1]), h[:, :1]),
    "filled places": lambda m, h, ids, y: h.index_fill(1, torch.tensor([1, 0]), 0.5) * h,
    "places put": lambda m, h, ids, y: put(h, (slice(None), torch.tensor([2, 0])), h[:, :2].sin()),
    "places of two dims put": lambda m, h, ids, y: put(
        h, (slice(None), torch.tensor([2, 0]), torch.tensor([1, 3])), h[:, :2, 0]),
    "places behind put": lambda m, h, ids, y: put(h, (..., torch.tensor([1, 3])), h[..., 1:3]),
    "bags": lambda m, h, ids, y: F.embedding_bag(ids, m.table.weight).unsqueeze(1) * h,
    "bags with padding": lambda m, h, ids, y: h * torch.stack([
        F.embedding_bag(ids, m.table.weight, mode=k, padding_idx=2) for k in ("sum", "mean", "max")], 1),
    "straight from logits": lambda m, h, ids, y: m.table(h.argmax(-1)) * h,
}  # fmt: skip


@pytest.mark.parametrize("name", SAMPLEWISE)
def test_lookups_of_every_sample_exchange_nothing(name: str, check: Check, tokens: Batch) -> None:
    def forward(m: Any, x: torch.Tensor, ids: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return SAMPLEWISE[name](m, m.lin(x), ids, y).sin().square().mean()

    parted = check(forward, tokens)
    assert not [target for target in parted.targets() if target.startswith("orchestrate")]


def put(h: torch.Tensor, where: Any, values: torch.Tensor | float) -> torch.Tensor:
    copied = h.clone()
    copied[where] = values
    return copied


def replaced(h: torch.Tensor, where: Any) -> torch.Tensor:
    return put(h, where, 0.25)


# what looks at other samples, the entries that it reads, and the operator that does: right on all samples, refused in
# several microbatches
MIXING: dict[str, tuple[str, str, Callable[..., torch.Tensor]]] = {
    "a partner": ("x", "index", lambda m, h: h * h[torch.arange(len(h)).flip(0)]),
    "a neighbour": ("x", "index", lambda m, h: h * h[(torch.arange(len(h)) + 1) % len(h)]),
    "the first sample": ("x", "index", lambda m, h: h * h[torch.tensor([0])]),
    "numbers of samples as values": ("x", "mul", lambda m, h: h * torch.arange(len(h)).view(-1, 1, 1)),
    "some samples": ("x", "index_select", lambda m, h: h.index_select(0, torch.tensor([0, 5]))),
    "a sample replaced": ("x", "select_scatter|slice_scatter|index_put|fill|select", lambda m, h: replaced(h, 0)),
    "samples by number": ("x", "index_put", lambda m, h: replaced(h, torch.tensor([1, 6]))),
    "samples by label": ("x y", "index", lambda m, h, y: h * h[y]),
    "samples gathered": ("x ids", "gather", lambda m, h, ids: h.gather(0, ids.unsqueeze(-1).expand_as(h))),
    "rows added up": ("x y", "index_add|index_put", lambda m, h, y: h.new_zeros(3, 4).index_add(0, y, h[:, 0])),
    "rows added to numbers": ("x y", "index_add|index_put", lambda m, h, y: torch.zeros(
        3, 4, dtype=h.dtype).index_add(0, y, h[:, 0])),
    "classes added up": ("x y", "scatter_add", lambda m, h, y: h.new_zeros(3, 4).scatter_add(
        0, y[:, None].expand(-1, 4), h[:, 0])),
    "bins of samples": ("x", "sort", lambda m, h: h * torch.searchsorted(h[:, 0, 0].detach().sort()[0], h.detach())),
    "places of all": ("x", "index_put|slice", lambda m, h: h.index_put((torch.tensor([2, 0]),), h[:2].sin())),
    "frequencies": ("ids", "embedding", lambda m, ids: F.embedding(ids, m.table.weight, scale_grad_by_freq=True)),
}  # fmt: skip


@pytest.mark.parametrize("name", MIXING)
def test_lookups_among_samples_need_all_of_them(
    name: str, check: Check, parts_of: Check, tokens: Batch
) -> None:
    entries, operator, function = MIXING[name]

    def forward(m: Any, **batch: torch.Tensor) -> torch.Tensor:
        if "x" in batch:
            batch["x"] = m.lin(batch["x"])
        return function(m, *batch.values()).sin().square().mean()

    batch = {entry: tokens[entry] for entry in entries.split()}
    check(forward, batch, dp=4, microbatches=1)
    with pytest.raises(CaptureError, match=f"^({operator}) mixes samples"):
        parts_of(forward, batch, dp=2, microbatches=2)


def test_a_table_is_shared_though_it_is_as_long_as_the_batch(check: Check, doubles: Any) -> None:
    def forward(m: Any, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return (m.lin(weights)[ids] * m.table(ids)).square().mean()

    batch = {"ids": torch.tensor([0, 3, 1, 5, 2, 2, 4, 0]), "weights": doubles(8, 4)}
    assert check(forward, batch).cut == {"ids"}


def test_an_entry_of_every_samples_own_is_told_from_one_of_another(check: Check, tokens: Batch) -> None:
    """The index along samples must count them: nothing else of `h[i, j]` is sample by sample."""

    def own(m: Any, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        rows = torch.arange(len(x)).unsqueeze(1).expand(-1, 2)
        return m.lin(x)[rows, ids[:, :2] % 3].sin().mean()

    def shifted(m: Any, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        rows = torch.arange(1, len(x) + 1) % len(x)
        return m.lin(x)[rows, ids[:, 0] % 3].sin().mean()

    batch = {"x": tokens["x"], "ids": tokens["ids"]}
    check(own, batch)
    check(shifted, batch, dp=4, microbatches=1)
    with pytest.raises(CaptureError, match="mixes samples"):
        check(shifted, batch)
