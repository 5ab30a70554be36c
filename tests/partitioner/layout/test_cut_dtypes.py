"""Under autocast and in narrow dtypes, cut by tensor parallelism: every operator makes the dtype it makes in torch.

The losses of two steps are those of plain torch up to the rounding of partial sums.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from orchestrator.verbs.distribute import distribute
from partitioner.layout.parallel_plan import Plan

Layers = dict[str, nn.Module | nn.Parameter]
Case = tuple[Callable[[], Layers], Callable[[Any, torch.Tensor], torch.Tensor], float]
ROUNDED = 1e-2  # relative, of losses: bfloat16 has 8 bits
TOKENS, WIDTH = 8, 16


class Narrow(nn.Module):
    def __init__(
        self, layers: Callable[[], Layers], forward: Callable[[Any, torch.Tensor], torch.Tensor]
    ) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            for name, layer in layers().items():
                setattr(self, name, layer)
        self.run = forward

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            made = self.run(self, x)
        return made if made.dim() == 0 else made.float().square().mean()


def pair() -> Layers:
    return {"up": nn.Linear(WIDTH, 64), "down": nn.Linear(64, WIDTH)}


def counted_classes(m: Any, x: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(m.up(x), torch.arange(TOKENS))


def of_one_dtype(m: Any, x: torch.Tensor) -> torch.Tensor:
    """`index_add` asks for the same dtype."""
    y = m.down(F.gelu(m.up(x)))
    return torch.zeros(TOKENS, WIDTH, dtype=y.dtype).index_add(0, torch.arange(TOKENS), y)


def asking_for_a_dtype(m: Any, x: torch.Tensor) -> torch.Tensor:
    y = m.up(x)
    return torch.zeros(TOKENS, 64, dtype=y.dtype).scatter_add(
        0, torch.arange(TOKENS)[:, None].expand(-1, 64), y
    )


def recurrent(m: Any, x: torch.Tensor) -> torch.Tensor:
    """Nobody reads the last state."""
    return m.down(m.net(m.up(x))[0])


def of_the_batch_alone(m: Any, x: torch.Tensor) -> torch.Tensor:
    """Products without parameters, and of constants, which are made once."""
    angles = torch.arange(300.0)[-TOKENS:, None] @ torch.tensor([[0.1, 0.37, 0.7, 0.9]])
    return m.down(m.up(x @ x.T @ x).tanh()) + angles.cos().repeat(1, 4)


CASES: dict[str, Case] = {
    "cross entropy, in float32": (pair, counted_classes, 1e-5),
    "without parameters": (pair, of_the_batch_alone, ROUNDED),
    "scattered": (pair, asking_for_a_dtype, ROUNDED),
    "recurrent": (lambda: {**pair(), "net": nn.LSTM(64, 64)}, recurrent, ROUNDED),
    "bias of rows": (pair, of_one_dtype, ROUNDED),
}


@pytest.mark.parametrize("case", [pytest.param(case, id=name) for name, case in CASES.items()])
def test_under_autocast_losses_are_those_of_torch(case: Case, laptop: Any, one_thread: None) -> None:
    *what, tolerance = case
    plain, module = Narrow(*what), Narrow(*what)
    optimizer = torch.optim.SGD(plain.parameters(), 0.1)
    step = distribute(module, torch.optim.SGD(module.parameters(), 0.1), laptop, plan=Plan(tp=2), chips=2)
    for index in range(2):
        x = torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(index))
        optimizer.zero_grad()
        loss = plain(x)
        loss.backward()
        optimizer.step()
        assert step({"x": x}) == pytest.approx(loss.item(), rel=tolerance)
