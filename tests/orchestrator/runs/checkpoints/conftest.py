"""What these tests share: a manifest, and a checkpoint of a few small tensors with every kind of part."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from orchestrator.runs.checkpoints.checkpoint_folder import Checkpoint, TrainingState, save
from orchestrator.runs.checkpoints.manifest import Evidence, Manifest, SeenAgain
from partitioner.layout.parallel_plan import Plan, plan_to_yaml


@pytest.fixture(scope="session")
def run_manifest() -> Callable[..., Manifest]:
    """A manifest of a step."""

    def make(step: int) -> Manifest:
        evidence = Evidence(
            data="text", program="0" * 64, last_program="1" * 64, settings={"lr": "0.1"}, batch="b",
            validation=SeenAgain(count=1, digest="d"), sources={"mine.py": "s"}, versions={"torch": "2"},
        )  # fmt: skip
        return Manifest(
            step=step, steps=10_000_000, sample=step * 32, seed=7, plan=plan_to_yaml(Plan(dp=2, tp=4)),
            rates=(0.1, 1 / 3), evidence=evidence,
        )  # fmt: skip

    return make


@pytest.fixture(scope="session")
def save_whole(run_manifest: Callable[..., Manifest]) -> Callable[[Path, int], Checkpoint]:
    """Writes a checkpoint of a step below a run directory."""

    def make(run: Path, step: int) -> Checkpoint:
        weight = torch.arange(6.0).reshape(2, 3) + step
        state = TrainingState(
            {"w": weight, "b": torch.ones(3, dtype=torch.bfloat16)},
            {"count": torch.tensor(step)},
            {"w": {"step": torch.tensor(float(step)), "exp_avg": weight / 3}},
        )
        return save(run / "checkpoints", run_manifest(step), state)

    return make
