"""Grouped products of experts: trained in every dtype that torch's kernel has, and counted as products per expert."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from orchestrator.verbs.distribute import distribute
from partitioner.capture.captured_graph import KERNELS
from partitioner.layout.parallel_plan import Plan
from partitioner.lowering.lower import partition

SAMPLES, WIDTH, HIDDEN, EXPERTS = 8, 8, 16, 4
Experts = Callable[[Tensor, Tensor, Tensor], Tensor]


class Routed(nn.Module):
    """Samples go to the expert that they ask for."""

    def __init__(self, experts: Experts) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.enter = nn.Linear(WIDTH, WIDTH)
            self.up = nn.Parameter(torch.randn(EXPERTS, WIDTH, HIDDEN) / 4)
            self.down = nn.Parameter(torch.randn(EXPERTS, HIDDEN, WIDTH) / 4)
        self.experts = experts

    def forward(self, x: Tensor, which: Tensor) -> Tensor:
        order = which.argsort()
        rows = self.enter(x)[order]
        ends = (which[None] <= torch.arange(EXPERTS)[:, None]).sum(1, dtype=torch.int32)
        hidden = self.experts(rows, self.up, ends).relu()
        return self.experts(hidden, self.down, ends).square().mean()


def grouped(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    return F.grouped_mm(rows, weight, offs=ends)


def one_by_one(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    starts = [0, *ends.tolist()[:-1]]
    return torch.cat([rows[a:b] @ w for a, b, w in zip(starts, ends.tolist(), weight, strict=True)])


def batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {"x": torch.randn(SAMPLES, WIDTH, generator=generator),
            "which": torch.randint(0, EXPERTS, (SAMPLES,), generator=generator)}  # fmt: skip


def flops_of_a_loop() -> int:
    with FlopCounterMode(display=False) as counter:
        Routed(one_by_one)(**batch()).backward()
    return int(counter.get_total_flops())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_they_are_counted_as_a_loop_over_experts(dtype: torch.dtype) -> None:
    inputs = batch() | {"x": batch()["x"].to(dtype)}
    program = partition(Routed(grouped).to(dtype), inputs, Plan())
    ops = [op for segment in program.segments for op in segment.ops]
    ran = sum(op.flops for op in ops if "mm" in op.target)
    assert program.facts["model_flops"] == ran == flops_of_a_loop()


def test_an_eager_run_is_counted_likewise() -> None:
    with FlopCounterMode(display=False, custom_mapping=KERNELS) as counter:
        Routed(grouped)(**batch()).backward()
    assert counter.get_total_flops() == flops_of_a_loop()


def test_every_form_of_operands_is_counted() -> None:
    count = KERNELS[torch.ops.aten._grouped_mm]
    assert count(torch.zeros(6, 4).shape, torch.zeros(3, 4, 5).shape) == 2 * 6 * 4 * 5
    assert count(torch.zeros(4, 6).shape, torch.zeros(6, 5).shape) == 2 * 6 * 4 * 5
    assert count(torch.zeros(3, 5, 4).shape, torch.zeros(4, 6).shape) == 2 * 6 * 4 * 5
    assert count(torch.zeros(3, 5, 4).shape, torch.zeros(3, 4, 2).shape) == 2 * 3 * 5 * 4 * 2


def test_they_train_as_a_loop_over_experts_does(laptop: Any, one_thread: None) -> None:
    plain, module = Routed(one_by_one), Routed(grouped)
    loss = plain(**batch())
    loss.backward()
    torch.optim.SGD(plain.parameters(), 0.1).step()
    step = distribute(module, torch.optim.SGD(module.parameters(), 0.1), laptop, plan=Plan(dp=2), chips=2)
    assert step(batch()) == pytest.approx(loss.item(), rel=1e-5)
    step.sync()
    for mine, theirs in zip(module.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs)
