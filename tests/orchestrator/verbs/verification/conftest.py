"""What goes wrong on purpose: by name, a way to break every split run."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from orchestrator.runners.executing import pending_communications
from orchestrator.runners.executing.chip import ExecutingChip
from partitioner.program.program import TensorKind

Break = Callable[[str], None]


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> Break:
    """Break all chips: reductions give the first chip's share, gradients are too large, updates are too small."""
    accumulate, update = ExecutingChip._accumulate, ExecutingChip._update

    def first_only(reduction: Any, parts: Any, out: Any) -> torch.Tensor:
        return parts[0].clone()

    def larger(self: ExecutingChip, instruction: Any, microbatch: int) -> None:
        accumulate(self, instruction, microbatch)
        for tensor in instruction.writes:
            if self.tensors[tensor].kind is TensorKind.GRAD:
                self.value(tensor).mul_(1.01)

    def smaller(self: ExecutingChip, instruction: Any, *others: Any) -> None:
        before = self.value(instruction.param).clone()
        update(self, instruction, *others)
        self.value(instruction.param).lerp_(before, 0.01)

    def apply(how: str) -> None:
        match how:
            case "a missing reduction":
                monkeypatch.setattr(pending_communications, "combine", first_only)
            case "a wrong scale":
                monkeypatch.setattr(ExecutingChip, "_accumulate", larger)
            case "a wrong update":
                monkeypatch.setattr(ExecutingChip, "_update", smaller)

    return apply


BREAKS = {
    "a missing reduction": "step 1: ",
    "a wrong scale": "step 1: gradient of ",
    "a wrong update": "step 1: ",
}


@pytest.fixture(params=BREAKS)
def wrong(request: pytest.FixtureRequest, broken: Break) -> str:
    """Every way once: how the finding begins."""
    broken(request.param)
    return BREAKS[request.param]
