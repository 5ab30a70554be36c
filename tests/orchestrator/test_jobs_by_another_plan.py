"""Own jobs that go on by another plan: what is not in parameters alone comes along, and what differs is still seen."""

import io
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import pytest
import torch

from comms.errors import UserError
from orchestrator.config.hardware.cluster_file import cluster_path
from orchestrator.config.job_file import load_job
from orchestrator.config.yaml_file import read_yaml
from orchestrator.models.user_code import PREFIX
from orchestrator.runs.checkpoints import checkpoint_folder as checkpoint
from orchestrator.runs.metrics import read_metrics
from orchestrator.verbs import train
from orchestrator.verbs.inputs.options import TrainOptions
from orchestrator.views.console import Console
from partitioner.layout.parallel_plan import BatchNorms, Plan, plan_to_yaml

MINE = """
import torch
from torch import nn
from torch.nn.functional import mse_loss
from torch.utils.data import TensorDataset
def values(seed, *shape): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
def pairs(): return TensorDataset(values(0, 20, 4), values(1, 20, 2))
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 2))
        self.frozen = nn.Parameter(torch.rand(2), requires_grad=False)
    def forward(self, x): return self.layers(x) * self.frozen
FACTOR = {"value": 1.0}
def loss(output, y): return FACTOR["value"] * mse_loss(output, y)
def sgd(params): return torch.optim.SGD(params, lr=0.1, momentum=0.9)
class Norming(torch.optim.Optimizer):  # looks at whole parameters
    def __init__(self, params): super().__init__(params, {"lr": 0.1})
    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                state["mean"] = state.get("mean", torch.zeros_like(p)).mul(0.9).add(p.grad / (1 + p.grad.norm()))
                state["count"] = state.get("count", 0) + 1
                p.sub_(group["lr"] * state["mean"])
def annealing(step):
    FACTOR["value"] = 1 / (1 + step)
    return 1.0
def schedule(optimizer): return torch.optim.lr_scheduler.LambdaLR(optimizer, annealing)
"""
BASE = ("model=mine.py:Net", "data=mine.py:pairs", "loss=mine.py:loss", "dtype=fp64", "steps=4", "global_batch=8",
        "drop_last=true", "checkpoints.every=3", "checkpoints.keep=9")  # fmt: skip
pytestmark = pytest.mark.usefixtures("undrawn")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None) -> Iterator[Path]:
    """mine.py in the current folder; no module of it is left from another process, as it were."""
    (tmp_path / "mine.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    forget()


def forget() -> None:
    for name in [name for name in sys.modules if name.startswith(PREFIX)]:
        del sys.modules[name]


def trained(laptop: Any, plan: Plan, *overrides: str) -> Path:
    """A run of four steps, and a copy of it that lost the last."""
    document = dict(read_yaml(cluster_path("laptop")).root)
    forget()
    given = load_job(None, [*BASE, *overrides])
    train.run(laptop.take(plan.num_chips), given, plan=plan, folder="whole", document=document)
    shutil.copytree("whole", "cut")
    shutil.rmtree("cut/checkpoints/step-000004")
    return Path("cut")


def moved(plan: Plan) -> str:
    forget()
    Path("other.yaml").write_text(plan_to_yaml(plan))
    with redirect_stderr(io.StringIO()) as said:
        train.main(TrainOptions(resume=Path("cut"), plan=Path("other.yaml")), Console())
    return said.getvalue()


def tensors_of(run: str) -> dict[str, torch.Tensor]:
    found = checkpoint.latest(Path(run)).checkpoint
    assert found is not None and found.manifest.step == 4
    return {f"{entry.part} {entry.key}": value for entry, value in checkpoint.load(found).parts()}


@pytest.mark.parametrize("optimizer", ["mine.py:sgd", "mine.py:Norming", "adamw"])
@pytest.mark.parametrize(
    ("one", "other"),
    [
        (Plan(dp=2, zero=1), Plan(pp=2, microbatches=2)),
        (Plan(pp=2, microbatches=2), Plan(dp=2, microbatches=2)),
    ],
    ids=["dp to pp", "pp to dp"],
)
def test_statistics_draws_and_states_of_any_optimizer_come_along(
    one: Plan, other: Plan, optimizer: str, laptop: Any
) -> None:
    trained(laptop, one, f"optimizer={optimizer}")
    moved(other)
    losses = [
        [record["loss"] for record in read_metrics(Path(run) / "metrics.jsonl")] for run in ("whole", "cut")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)
    expected, found = tensors_of("whole"), tensors_of("cut")
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, rtol=1e-9, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_full_precision_copies_come_along_bit_for_bit(laptop: Any) -> None:
    folder = trained(laptop, Plan(dp=2, zero=1), "dtype=bf16", "optimizer=adamw")
    before = checkpoint.load(checkpoint.open_checkpoint(folder / "checkpoints" / "step-000003"))
    wide = before.states["layers.0.weight"]["float32 copy"]
    assert wide.dtype is torch.float32
    assert torch.equal(wide.bfloat16(), before.parameters["layers.0.weight"])
    assert not torch.equal(wide, before.parameters["layers.0.weight"].float())
    moved(Plan(pp=2, microbatches=2))
    one, other = tensors_of("whole"), tensors_of("cut")
    assert one.keys() == other.keys()


def test_numbers_that_the_loss_read_last_are_compared_by_the_plan_before(laptop: Any) -> None:
    """The factor of the loss has changed since the Program was prepared: both are made by the plan before."""
    folder = trained(laptop, Plan(dp=2), "optimizer=mine.py:sgd", "lr_schedule=mine.py:schedule")
    was = checkpoint.read_manifest(folder / "checkpoints" / "step-000003").evidence
    assert was.program != was.last_program
    assert "resumed at step 3 of 4" in moved(Plan())
    losses = [
        [record["loss"] for record in read_metrics(Path(run) / "metrics.jsonl")] for run in ("whole", "cut")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("nn.Tanh()", "nn.ReLU()", "has become"),
        ("momentum=0.9", "momentum=0.5", "momentum of group 0 was 0.9, is 0.5"),
        ("Dropout(0.2)", "Dropout(0.3)", "the Program is another"),
    ],
)
def test_what_is_trained_is_compared_by_another_plan_too(old: str, new: str, said: str, laptop: Any) -> None:
    trained(laptop, Plan(dp=2), "optimizer=mine.py:sgd")
    Path("mine.py").write_text(MINE.replace(old, new))
    before = Path("cut/metrics.jsonl").read_bytes(), Path("cut/plan.yaml").read_bytes()
    with pytest.raises(UserError, match=re.escape(said)):
        moved(Plan())
    assert (Path("cut/metrics.jsonl").read_bytes(), Path("cut/plan.yaml").read_bytes()) == before


def test_batch_norms_of_parts_keep_their_parts(laptop: Any) -> None:
    per_part = BatchNorms.PER_PART
    trained(laptop, Plan(dp=2, batch_norm=per_part))
    with pytest.raises(UserError, match="batch norms saw 2 parts of a batch, by this plan they see 4"):
        moved(Plan(dp=2, microbatches=2, batch_norm=per_part))
    assert "resumed at step 3" in moved(Plan(microbatches=2, batch_norm=per_part))
