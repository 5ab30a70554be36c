"""Resumed runs of the user's own code: the same bits as a run that was never stopped, or an error that says why."""

import io
import re
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext, redirect_stderr
from pathlib import Path
from typing import Any

import pytest
import torch

from comms.errors import ConfigError, UserError
from orchestrator.config.hardware.cluster_file import cluster_path
from orchestrator.config.job_file import Job, load_job
from orchestrator.config.yaml_file import read_yaml
from orchestrator.models.user_code import PREFIX
from orchestrator.runners.signals import StopRequest
from orchestrator.runs.checkpoints import checkpoint_folder as checkpoint
from orchestrator.runs.metrics import read_metrics
from orchestrator.verbs import train
from orchestrator.verbs.inputs.options import TrainOptions
from orchestrator.verbs.training import training_loop
from orchestrator.views.console import Console
from partitioner.layout.parallel_plan import Plan

MINE = """
import os, random, numpy as np, torch
from torch import nn
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, TensorDataset
def values(seed, *shape): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
X, Y = values(0, 20, 4), values(1, 20, 2)
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    def forward(self, x): return self.layers(x)
class Drawn(Net):  # all that is not trained is drawn as it is made
    def __init__(self):
        super().__init__()
        with torch.no_grad(): self.layers[0].bias.copy_(torch.from_numpy(np.random.randn(8)))
        self.frozen = nn.Parameter(torch.from_numpy(np.random.randn(2)), requires_grad=False)
        self.register_buffer("kept", torch.from_numpy(np.random.randn(2)))
        self.register_buffer("lost", torch.rand(2), persistent=False)
        self.plain, self.number = torch.from_numpy(np.random.randn(2)), random.random()
    def forward(self, x): return self.layers(x) * self.frozen * self.plain + self.kept + self.lost + self.number
class Unseeded(Net):
    def __init__(self):
        super().__init__()
        self.register_buffer("shift", torch.tensor(list(os.urandom(2))) / 256.0)
    def forward(self, x): return self.layers(x) + self.shift
class Norm(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 2))
    def forward(self, x): return self.layers(x)
FACTOR = {"value": 1.0}
def by_factor(output, y): return FACTOR["value"] * mse_loss(output, y)
def loss(output, y): return mse_loss(output, y)
def sgd(params): return torch.optim.SGD(params, lr=0.1, momentum=0.9)
def pairs(): return TensorDataset(X, Y)
GENERATOR = torch.Generator().manual_seed(3)
def loader(): return DataLoader(pairs(), batch_size=8, shuffle=True, generator=GENERATOR)
class Pairs:
    def __len__(self): return 20
    def __getitem__(self, i): return self.moved(X[i]), Y[i]
class Drawing(Pairs):
    def moved(self, x): return x + torch.rand(4) + random.random() + np.random.rand()
OWN = np.random.default_rng(0)
class Elsewhere(Pairs):
    def moved(self, x): return x + torch.from_numpy(OWN.normal(size=4))
class Annealing(Pairs):
    def moved(self, x):
        FACTOR["value"] *= 0.99
        return x
"""
BASE = ("model=mine.py:Net", "data=mine.py:pairs", "loss=mine.py:loss", "optimizer=mine.py:sgd", "dtype=fp64",
        "steps=5", "global_batch=8", "checkpoints.every=3")  # fmt: skip
DP = Plan(dp=2)
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


def job(*overrides: str) -> Job:
    return load_job(None, [*BASE, *overrides])


def stopped(given: Job, laptop: Any, plan: Plan = DP, at: int = 3) -> Path:
    """A run that was interrupted after so many steps."""
    request, original = StopRequest(owns_process=False), training_loop.Training._step

    def step(self: training_loop.Training) -> Any:
        found = original(self)
        if self.step == at:
            request(signal.SIGINT, None)
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training_loop.Training, "_step", step)
        patch.setattr(train, "stop_request", lambda: nullcontext(request))
        forget()
        document = dict(read_yaml(cluster_path("laptop")).root)
        train.run(laptop.take(plan.num_chips), given, plan=plan, folder="stopped", document=document)
    return Path("stopped")


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory, laptop: Any) -> Path:
    """The folder of a stopped run of the job as it is, to be copied."""
    (made := tmp_path_factory.mktemp("begun")).joinpath("mine.py").write_text(MINE)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(made)
        return made / stopped(job(), laptop)


def resumed(folder: Path, *, verify_first: bool = False) -> str:
    """What is said while the run is brought to its end."""
    forget()
    with redirect_stderr(io.StringIO()) as said:
        train.main(TrainOptions(resume=folder, verify_first=verify_first), Console())
    return said.getvalue()


def left(folder: Path) -> tuple[list[Any], dict[str, torch.Tensor]]:
    records = [[r[key] for key in ("loss", "val_loss", "lr")] for r in read_metrics(folder / "metrics.jsonl")]
    newest = checkpoint.latest(folder).checkpoint
    assert newest is not None and newest.manifest.step == 5
    return records, {entry.key: value for entry, value in checkpoint.load(newest).parts()}


@pytest.mark.parametrize(
    ("overrides", "plan"),
    [(["model=mine.py:Drawn"], DP), (["data=mine.py:loader"], DP), (["data=mine.py:Drawing"], DP),
     (["validation={data: mine.py:loader, every: 1, batches: 2}"], DP),
     (["validation={data: mine.py:pairs, every: 1, batches: 2}"], DP),
     (["model=mine.py:Norm", "validation={data: mine.py:pairs, every: 1, batches: 1}"], DP),
     (["model=mine.py:Norm", "global_batch=4"], Plan(pp=2, microbatches=2))],
    ids=["drawn model", "generator", "drawn samples", "generator of validation", "validation",
         "buffers and validation", "merged microbatches"],
)  # fmt: skip
def test_what_follows_from_the_seed_or_can_be_read_again_goes_on_bit_for_bit(
    overrides: list[str], plan: Plan, laptop: Any
) -> None:
    forget()
    whole = train.run(laptop.take(plan.num_chips), job(*overrides), plan=plan, folder="whole").run_dir
    resumed(stopped(job(*overrides), laptop, plan))
    (records, states), (others, found) = left(whole), left(Path("stopped"))
    assert records == others and states.keys() == found.keys()
    assert all(torch.equal(states[name], found[name]) for name in states)


def test_a_buffer_that_follows_from_no_seed_comes_from_the_checkpoint(laptop: Any) -> None:
    folder = stopped(job("model=mine.py:Unseeded", "checkpoints.keep=9"), laptop)
    before = checkpoint.latest(folder).checkpoint
    resumed(folder)
    after = checkpoint.latest(folder).checkpoint
    assert before and after and (before.manifest.step, after.manifest.step) == (3, 5)
    shifts = [checkpoint.load(each).buffers["shift"] for each in (before, after)]
    assert torch.equal(*shifts)


def edited(old: str, new: str, name: str = "mine.py") -> Callable[[], object]:
    def edit() -> None:
        text = Path(name).read_text()
        assert old in text
        Path(name).write_text(text.replace(old, new))

    return edit


@pytest.mark.parametrize(
    ("overrides", "between", "said", "where"),
    [
        ([], edited("nn.Tanh()", "nn.ReLU()"), "tanh.default(v4) : f64[4,8]", "program.txt:"),
        ([], edited("return mse_loss", "return 2 * mse_loss"), "the Program is another", "program.txt:"),
        ([], edited("momentum=0.9", "momentum=0.5"), "momentum of group 0 was 0.9, is 0.5", "optimizer"),
        ([], edited("lr=0.1", "lr=0.2"), "the learning rate is not what it was", "lr_schedule"),
        (["clip_norm=1.0"], edited("clip_norm: 1.0", "clip_norm: 0.5", "stopped/run.yaml"), "clip_norm was 1.0, is 0.5",
         "optimizer"),
        ([], edited("runner: inline", "runner: inlin", "stopped/run.yaml"), "there is no runner 'inlin'", "run.yaml"),
        ([], edited("seed: 0", "seed: 1", "stopped/run.yaml"), "the data is not what", "mine.py:pairs"),
        (["shuffle=false"], edited("def pairs():", "Y[8:] = 0\ndef pairs():"), "the last batch before",
         "mine.py:pairs"),
        (["data=mine.py:Elsewhere", "drop_last=true"], forget, "the last batch before the checkpoint", "Elsewhere"),
        (["data=mine.py:Annealing", "drop_last=true", "loss=mine.py:by_factor"], forget, "numbers that the model's",
         "mine.py:Net"),
        (["validation={data: mine.py:pairs, every: 1, batches: 2}"], edited("def pairs(): return", "def pairs():\n"
         "    global Y\n    Y = Y * 2; return"), "the data is not", "mine.py:pairs"),
        (["validation={data: mine.py:Elsewhere, every: 1, batches: 2}"], edited("default_rng(0)", "default_rng(1)"),
         "what is validated on is read as something else", "mine.py:Elsewhere"),
    ],
    ids=["model", "loss", "optimizer", "rate", "job", "runner", "seed", "labels", "generator", "numbers",
         "data", "held out"],
)  # fmt: skip
def test_what_is_not_the_same_any_more_is_refused_and_named(
    overrides: list[str], between: Callable[[], object], said: str, where: str, laptop: Any,
    begun: Path,
) -> None:  # fmt: skip
    folder = stopped(job(*overrides), laptop) if overrides else Path(shutil.copytree(begun, "stopped"))
    before = {
        path: path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name not in ("log.txt", ".lock")
    }
    between()
    with pytest.raises(UserError, match=re.escape(said)) as caught:
        resumed(folder)
    assert where in caught.value.where and caught.value.hint
    kept = {path: path.read_bytes() for path in before if path.suffix != ".yaml"}
    assert all(data == before[path] for path, data in kept.items())


def test_an_edit_that_changes_nothing_so_far_is_told(begun: Path) -> None:
    folder = Path(shutil.copytree(begun, "stopped"))
    edited("def sgd", "# its end is near\ndef sgd")()
    assert "warning: mine.py was edited since the run was started" in resumed(folder)
    assert "was edited" not in resumed(folder)


def test_a_run_that_has_no_step_left_verifies_none(begun: Path) -> None:
    folder = Path(shutil.copytree(begun, "stopped"))
    resumed(folder)
    with pytest.raises(ConfigError, match="no step is left"):
        resumed(folder, verify_first=True)
    with pytest.raises(ConfigError, match="nothing is trained"):
        train.main(TrainOptions(dry_run=True, verify_first=True), Console())
