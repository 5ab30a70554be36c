"""Later forwards: what no mark sees is refused before it trains, and nothing else is."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from comms.errors import PlanError
from orchestrator.verbs.distribute import DistributedStep, distribute
from partitioner.capture.tracing import calls_of
from partitioner.layout.parallel_plan import Plan

FILE = Path("unset")
SIZE = 1 << 13


class FromDisk(nn.Module):
    """Reads what it computes with from a file: `kind` says what is done with it."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.first, self.norm, self.drop = nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Dropout(0.1)
        self.kind = kind

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        number = float(FILE.read_text())
        y = self.drop(self.norm(self.first(x)))
        if self.kind == "number":
            return y.square().mean() * (1 + number)
        if self.kind == "constant":
            last = torch.cat([torch.zeros(SIZE), torch.full((1,), number)])
            return y.square().mean() * (1 + torch.from_numpy(last.numpy()).sum())
        if self.kind == "flow":
            return (y if number else y.tanh() * 0 + y * 1 + x).square().mean()
        if self.kind == "operands":
            one, two = y.sin(), y.cos()
            return (two if number else one).mean()
        if self.kind == "end":
            found = y.square().mean()
            return found * 2 if number else found
        with torch.set_grad_enabled(not number):
            z = y.square()
        return z.mean() + y.mean()


def batch(number: int) -> dict[str, torch.Tensor]:
    return {"x": torch.randn(8, 6, generator=torch.Generator().manual_seed(number))}


def step_of(module: nn.Module, laptop: Any, plan: Plan) -> DistributedStep:
    return distribute(
        module, torch.optim.SGD(module.parameters(), lr=0.1), laptop, plan=plan, chips=plan.num_chips
    )


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], object]:
    monkeypatch.setitem(globals(), "FILE", tmp_path / "beta")
    FILE.write_text("0")
    return lambda text: FILE.write_text(text)


@pytest.mark.parametrize("kind", ["number", "constant", "flow", "operands", "end", "gradients"])
def test_another_forward_is_told_by_its_calls(kind: str, write: Callable[[str], object]) -> None:
    module = FromDisk(kind)
    held = {name: value.clone() for name, value in module.state_dict().items()}
    before = calls_of(module, batch(0), None).noted
    assert not calls_of(module, batch(1), None, before).where
    write("1")
    found = calls_of(module, batch(1), None, before)
    assert found.where and found.change.startswith("it calls")
    assert all(torch.equal(value, held[name]) for name, value in module.state_dict().items())


def test_a_number_from_elsewhere_is_refused_before_a_step_is_trained(
    write: Callable[[str], object], laptop: Any
) -> None:
    module = FromDisk("number")
    step = step_of(module, laptop, Plan(dp=2))
    for number in range(7):
        step(batch(number))
    trained = {name: value.clone() for name, value in step.sync().state_dict().items()}
    write("1")
    for _ in range(2):  # it is looked at again
        with pytest.raises(PlanError, match=r"it calls mul with 2\.0, and did with 1\.0") as raised:
            step(batch(7))
        assert "test_later_forwards.py" in raised.value.where
    assert all(torch.equal(value, trained[name]) for name, value in step.sync().state_dict().items())
    write("0")
    step(batch(7))
    assert step.steps == 8


def test_what_changes_from_step_to_step_by_right_is_not_refused(
    write: Callable[[str], object], laptop: Any
) -> None:
    module = FromDisk("number")
    step = step_of(module, laptop, Plan(microbatches=2))
    for number in range(9):
        step.optimizer.param_groups[0]["lr"] *= 0.9
        step(batch(number))
        if number == 5:
            module.eval()
            step.evaluate(batch(9))
            module.train()
    assert step.steps == 9 and len(step._programs) == 2
