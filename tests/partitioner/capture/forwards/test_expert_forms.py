"""Mixtures of experts as users have them: looped or grouped, they train under every plan as on one chip."""

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from orchestrator.verbs.distribute import distribute
from partitioner.layout.parallel_plan import Plan

PLANS = [Plan(), Plan(dp=2, microbatches=2), Plan(pp=2, microbatches=2), Plan(tp=2)]


def trained_alike(module: nn.Module, batch: dict[str, torch.Tensor], plan: Plan, laptop: Any) -> None:
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
    trained_alike(module, {"input_ids": ids, "labels": ids}, plan, laptop)


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
