"""Idle keys: every key of a job leads to another result, to a warning that names it, or to a refusal."""

import itertools
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from comms.errors import DataError, ModelError, PlanError, UserError
from orchestrator.config.job_file import Job, load_job
from orchestrator.planning.idle_keys import idle_keys
from orchestrator.planning.preparation import Prepared
from orchestrator.runners.timing.fastest_plan import prepare
from orchestrator.runs.checkpoints import checkpoint_folder as checkpoint
from orchestrator.runs.metrics import read_metrics
from orchestrator.verbs import train
from orchestrator.verbs.plan import partition
from partitioner.layout.parallel_plan import Plan
from partitioner.program.program_text import to_text

MINE = """
import torch
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.utils.data import TensorDataset
class Text(nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.layers = nn.Sequential(nn.Embedding(256, width), nn.Linear(width, 256))
    def forward(self, input_ids, labels):
        return cross_entropy(self.layers(input_ids).flatten(0, 1), labels.flatten())
class Net(nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 2))
    def forward(self, x): return self.layers(x)
def pairs(n=10):
    generator = torch.Generator().manual_seed(0)
    return TensorDataset(torch.randn(n, 4, generator=generator), torch.randn(n, 2, generator=generator))
def loss(output, y, factor=1.0): return factor * mse_loss(output, y)
def sgd(params, lr=0.1, weight_decay=0.0): return torch.optim.SGD(params, lr, weight_decay=weight_decay)
def steps(optimizer, size=1): return torch.optim.lr_scheduler.StepLR(optimizer, size)
"""
TEXT = ("model=mine.py:Text", "seq=8", "global_batch=4", "steps=3", "dtype=fp64")
OWN = (
    "model=mine.py:Net",
    "data=mine.py:pairs",
    "loss=mine.py:loss",
    "global_batch=4",
    "steps=3",
    "dtype=fp64",
)
SITUATIONS = {
    "text": (TEXT, Plan(dp=2, microbatches=2)),
    "text, sgd, flat": (
        (*TEXT, "optimizer=sgd", "lr_schedule=constant", "validation.every=0"),
        Plan(microbatches=2),
    ),
    "own data": ((*OWN, "lr_schedule.warmup_steps=0"), Plan(pp=2, microbatches=2)),
    "own parts": ((*OWN, "optimizer=mine.py:sgd", "lr_schedule=mine.py:steps"), Plan(dp=2)),
}
# Another value of every key; those of plans are asked for by another plan.
OTHER = {
    "kind": "cluster", "version": 2, "model": "builtin:gpt-nano", "model_args": "{width: 6}", "data": "mine.py",
    "data_args": "{n: 8}", "data_gives": "batches", "shuffle": "false", "drop_last": "true", "loss": "torch.nn:L1Loss",
    "loss_args": "{factor: 2.0}", "seq": 6, "global_batch": 8, "microbatches": 4, "steps": 2, "seed": 1,
    "dtype": "bf16", "optimizer.name": "torch.optim:SGD", "optimizer.args": "{maximize: true}", "optimizer.lr": 0.5,
    "optimizer.weight_decay": 0.5, "optimizer.betas": "[0.5, 0.6]", "optimizer.eps": 0.1, "optimizer.momentum": 0.5,
    "clip_norm": 0.001, "lr_schedule.name": "linear", "lr_schedule.args": "{size: 2}", "lr_schedule.warmup_steps": 1,
    "lr_schedule.min_lr_ratio": 0.5, "plan.dp": 4, "plan.tp": 4, "plan.pp": 4, "plan.zero": 1, "plan.schedule": "gpipe",
    "plan.batch_norm": "per_part", "validation.data": "mine.py:pairs", "validation.every": 1, "validation.batches": 1,
    "checkpoints.every": 1, "checkpoints.interval": "1 ns", "checkpoints.keep": 1, "weights": "nothere",
    "hang_timeout": "7 s", "sinks": "[csv]",
}  # fmt: skip
OF_RUNNERS = {"hang_timeout"}  # with a word of `train` where one process needs none
NEEDS = {"checkpoints.keep": ("checkpoints.every=1",)}  # to have an effect at all
IN_PLAN = {"plan.zero": "zero", "plan.schedule": "schedule"}
numbers = itertools.count()
pytestmark = pytest.mark.usefixtures("undrawn")
once: dict[str, Prepared] = {}  # a run takes the Program that was looked at before


def keys_of(section: type[BaseModel], before: str = "") -> Iterator[str]:
    """All keys of a schema that are no sections."""
    for name, field in section.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from keys_of(kind, f"{before}{name}.")
        else:
            yield f"{before}{name}"


def test_there_is_another_value_of_every_key() -> None:
    assert set(keys_of(Job)) == set(OTHER)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("idle")
    (made / "mine.py").write_text(MINE)
    return made


@pytest.fixture(scope="module")
def known() -> dict[object, object]:
    """What was found without another key."""
    return {}


def split(given: Job, plan: Plan, laptop: Any) -> object:
    """The Program, without the words of its plan."""
    once[f"{given} {plan}"] = prepared = prepare(laptop.take(plan.num_chips), given, plan)
    lines = to_text(prepared.program).splitlines()
    return [line for line in lines if not line.startswith(("meta plan", "meta schedule", "meta zero"))]


def trained(given: Job, plan: Plan, laptop: Any) -> object:
    """All that a run leaves of its steps: what they were, and what is saved."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "prepare", lambda *_, **__: once[f"{given} {plan}"])
        run = train.run(laptop.take(plan.num_chips), given, plan=plan, folder=f"run-{next(numbers)}").run_dir
    newest = checkpoint.latest(run).checkpoint
    assert newest is not None
    steps = [(r["loss"], r["val_loss"], r["lr"]) for r in read_metrics(run / "metrics.jsonl")]
    saved = sorted(path.name for path in (run / "checkpoints").iterdir()), (run / "metrics.csv").exists()
    return steps, saved, [file.sha256 for file in newest.manifest.files]


def has_effect(key: str, base: tuple[str, ...], plan: Plan, known: dict[object, object], laptop: Any) -> bool:
    """Whether the key changes what is split or trained, or there is a word on it. Raises UserError."""
    given = load_job(None, [*base, f"{key}={OTHER[key]}"])
    asked = replace(plan, **{IN_PLAN[key]: getattr(given.plan, IN_PLAN[key])}) if key in IN_PLAN else plan
    if any(said.startswith(f"{key} has no effect") for said in idle_keys(given, asked)):
        return True
    for result in (split, trained):
        found = result(given, asked, laptop)
        if (result, base) not in known:
            known[result, base] = result(load_job(None, base), plan, laptop)
        if found != known[result, base]:
            return True
    return False


@pytest.mark.parametrize(
    ("situation", "key"),
    [
        pair
        for place, pair in enumerate(product(SITUATIONS, OTHER))
        if (place % 2 or "own" in pair[0]) and pair[1] not in OF_RUNNERS
    ],
)
def test_every_key_has_an_effect_or_a_word(
    key: str, situation: str, folder: Path, known: dict[object, object], laptop: Any,
    monkeypatch: pytest.MonkeyPatch, one_thread: None,
) -> None:  # fmt: skip
    monkeypatch.chdir(folder)
    base, plan = SITUATIONS[situation]
    with suppress(UserError):
        assert has_effect(key, (*base, *NEEDS.get(key, ())), plan, known, laptop)


@pytest.mark.parametrize(
    ("key", "plan"),
    [
        ("plan.tp=2", Plan(dp=2)),
        ("microbatches=4", Plan(microbatches=2)),
        ("plan.zero=0", Plan(dp=2, zero=1)),
    ],
)
def test_what_a_job_asks_for_is_what_a_plan_beside_it_has(
    key: str, plan: Plan, folder: Path, laptop: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    name = key.partition("=")[0]
    with pytest.raises(PlanError, match=rf"{name} is \d in the job, \d in the plan"):
        partition(laptop.take(plan.num_chips), load_job(None, [*TEXT, key]), plan)


@pytest.mark.parametrize("key", ["lr_schedule", "validation.data"])
def test_a_name_that_only_training_reads_must_be_there(
    key: str, folder: Path, laptop: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    with pytest.raises(ModelError, match=r"mine\.py has no 'nothere'"):
        prepare(laptop.take(1), load_job(None, [*OWN, f"{key}=mine.py:nothere"]))


def test_data_that_is_not_there_is_refused_before_it_is_read(laptop: Any) -> None:
    for name in ("nothere.txt", "mine.pairs", "mine.py:", "builtin:dutch"):
        with pytest.raises(DataError, match=f"there is no data '{name}'"):
            prepare(laptop.take(1), load_job(None, [f"data={name}"]))
