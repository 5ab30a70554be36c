"""Experts, spans that SpecAugment masks and layers dropped by chance, as libraries have them."""

import copy
from collections import Counter
from contextlib import AbstractContextManager
from typing import Any

import numpy
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from comms.errors import CaptureError, UserError
from orchestrator.runs.data import step_key
from orchestrator.verbs.distribute import distribute
from partitioner.capture.forwards.library_forms import keyed_draws, masked_spans
from partitioner.capture.tracing import trace_module
from partitioner.layout.parallel_plan import Plan

PLANS = [Plan(), Plan(dp=2, microbatches=2), Plan(pp=2, microbatches=2), Plan(tp=2)]


def trained_as_plain(module: nn.Module, batch: dict[str, torch.Tensor], plan: Plan, laptop: Any) -> None:
    plain = copy.deepcopy(module)
    step = distribute(
        module, torch.optim.SGD(module.parameters(), 0.1), laptop, plan=plan, chips=plan.num_chips
    )
    optimizer = torch.optim.SGD(plain.parameters(), 0.1)
    for _ in range(2):
        optimizer.zero_grad()
        loss = plain(**batch)
        loss = loss if isinstance(loss, torch.Tensor) else loss.loss
        loss.backward()
        optimizer.step()
        assert step(batch) == pytest.approx(loss.item(), rel=1e-5)
    step.sync()
    for mine, theirs in zip(module.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("implementation", "plan"),
    [*(("eager", plan) for plan in PLANS), ("grouped_mm", PLANS[1]), ("batched_mm", PLANS[1])],
    ids=str,
)
def test_experts_of_transformers(implementation: str, plan: Plan, laptop: Any, one_thread: None) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.MixtralConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=3, num_experts_per_tok=2, max_position_embeddings=16,
    )  # fmt: skip
    config._experts_implementation = implementation
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = transformers.MixtralForCausalLM(config)
    ids = torch.randint(0, 32, (4, 6), generator=torch.Generator().manual_seed(0))
    trained_as_plain(module, {"input_ids": ids, "labels": ids}, plan, laptop)


class Grouped(nn.Module):
    """Rows that lie in order of their experts, in groups of fixed ends."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.weights = nn.Parameter(torch.randn(3, 4, 4))
        self.register_buffer("ends", torch.tensor([1, 4, 6], dtype=torch.int32))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        each = [F.grouped_mm(rows, self.weights, offs=self.ends) for rows in x.unbind(1)]
        return (torch.stack(each, 1) - y).square().mean()


def test_grouped_products_of_any_floating_dtype(laptop: Any, one_thread: None) -> None:
    draw = torch.Generator().manual_seed(0)
    batch = {name: torch.randn(6, 2, 4, generator=draw) for name in "xy"}
    module = Grouped()
    plain = copy.deepcopy(module)
    step = distribute(module, torch.optim.SGD(module.parameters(), 0.1), laptop, plan=Plan(), chips=1)
    loss = plain(**batch)
    loss.backward()
    assert step(batch) == pytest.approx(loss.item(), rel=1e-5)
    step.sync()
    torch.testing.assert_close(module.weights, plain.weights - 0.1 * plain.weights.grad)


SPANS: list[tuple[tuple[int, int], float, int, Any, int]] = [
    ((3, 6), 0.4, 2, [6, 4, 1], 0), ((2, 5), 0.3, 2, None, 1), ((2, 7), 0.9, 3, [7, 2], 2), ((2, 4), 0.05, 4, None, 0),
]  # fmt: skip


@pytest.mark.parametrize("given", SPANS, ids=str)
def test_spans_are_masked_as_often_as_in_transformers(given: Any) -> None:
    wav2vec2 = pytest.importorskip("transformers.models.wav2vec2.modeling_wav2vec2")
    *others, lengths, fewest = given
    mask = None if lengths is None else (torch.arange(given[0][1]) < torch.tensor(lengths)[:, None]).long()
    state, times = numpy.random.get_state(), 1000
    shares = []
    try:
        numpy.random.seed(0)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            for draw in (wav2vec2._compute_mask_indices, masked_spans):
                masks = [torch.as_tensor(draw(*others, mask, fewest)) for _ in range(times)]
                rows = Counter((n, *row) for m in masks for n, row in enumerate(m.int().tolist()))
                shares.append({row: count / times for row, count in rows.items()})
    finally:
        numpy.random.set_state(state)
    theirs, mine = shares
    assert {row for row, share in theirs.items() if share > 0.01} <= set(mine)
    assert set(mine) <= set(theirs) | {row for row, share in mine.items() if share < 0.01}
    assert max(abs(theirs.get(row, 0) - mine.get(row, 0)) for row in {*theirs, *mine}) < 0.08


class Speech(nn.Module):
    """A model of transformers that reads sound, and its loss."""

    def __init__(self, **said: Any) -> None:
        super().__init__()
        transformers = pytest.importorskip("transformers")
        config = transformers.Wav2Vec2Config(
            vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8,
            conv_dim=(4, 4), conv_stride=(4, 2), conv_kernel=(4, 2), num_feat_extract_layers=2,
            num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2, mask_time_length=2, mask_time_prob=0.4,
            mask_feature_length=2, mask_feature_prob=0.3, **said,
        )  # fmt: skip
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.model = transformers.Wav2Vec2ForCTC(config)
        self.double()

    def forward(self, input_values: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor = self.model(input_values=input_values, labels=labels).loss
        return loss


def sound(step: int) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(step)
    labels = torch.tensor([[1, 2, -100], [3, -100, -100], [4, 5, 6], [7, 1, -100]])
    return {"input_values": torch.randn(4, 96, generator=draw, dtype=torch.float64), "labels": labels}


def drawn_alike(step: int) -> AbstractContextManager[None]:
    return keyed_draws(torch.tensor(step_key(0, step)), torch.tensor(0))


@pytest.mark.parametrize("plan", [Plan(dp=2), Plan(pp=2, microbatches=2)], ids=str)
def test_sound_with_masked_spans_trains_as_in_transformers(plan: Plan, trained_alike: Any) -> None:
    trained_alike(
        Speech(layerdrop=0.0), [sound(s) for s in range(3)], plan, rel=1e-6, around=drawn_alike
    )  # of float32


def test_labels_that_are_no_classes_end_the_step(laptop: Any) -> None:
    module = Speech(layerdrop=0.0)
    step = distribute(module, torch.optim.SGD(module.parameters()), laptop, plan=Plan(), chips=1)
    with pytest.raises(UserError, match="a target is no class of 0 to 7"):
        step({**sound(0), "labels": torch.full((4, 3), 8)})


def test_layers_that_are_dropped_by_chance_are_refused_with_what_to_do() -> None:
    with pytest.raises(CaptureError, match="by chance one way or another") as found:
        trace_module(Speech(layerdrop=0.5), sound(0), None)
    assert "layerdrop" in found.value.hint and "modeling_wav2vec2" in found.value.where


def test_what_happens_with_no_chance_is_known(same_as_eager: Any) -> None:
    same_as_eager(lambda m, x: (m.lin(x) if not torch.rand([]) < 0.0 else x).square().sum())
