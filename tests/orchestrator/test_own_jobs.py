"""Jobs of the user's own objects: trained as a plain PyTorch loop trains them, on every runner, or refused."""

import re
import signal
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from comms.errors import ConfigError, DataError, ModelError, UserError
from orchestrator.config.hardware.cluster_file import cluster_path
from orchestrator.config.job_file import Job, load_job
from orchestrator.config.yaml_file import read_yaml
from orchestrator.runners.signals import StopRequest
from orchestrator.runs.checkpoints import checkpoint_folder as checkpoint
from orchestrator.runs.metrics import read_metrics
from orchestrator.verbs import train
from orchestrator.verbs.distribute import distribute
from orchestrator.verbs.inputs.options import RunnerKind, TrainOptions
from orchestrator.verbs.training import training_loop
from orchestrator.verbs.verify import verify
from orchestrator.views.console import Console
from partitioner.layout.parallel_plan import Plan

DOCS = Path(__file__).parents[2] / "docs"
PAGES = {  # and the verbs of their commands
    "own-model": "verify train train", "own-data": "train simulate",
    "own-cluster": "check comms comms plan simulate check simulate",
    "resume": "train train train checkpoint checkpoint checkpoint train",
}  # fmt: skip
MINE = """
from collections import namedtuple
from dataclasses import dataclass
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
Pair = namedtuple("Pair", "x y")
@dataclass
class Both:
    x: object
    y: object
class Net(nn.Module):
    def __init__(self, width=8, drop=0.0):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, width), nn.Dropout(drop),
                                    nn.Tanh(), nn.Linear(width, 2))
    def forward(self, x): return self.layers(x)
def values(n, seed, width): return torch.randn(n, width, generator=torch.Generator().manual_seed(seed))
def pairs(n=20): return TensorDataset(values(n, 0, 4), values(n, 1, 2))
def triples(): return TensorDataset(values(60, 0, 4).view(20, 3, 4), values(60, 1, 2).view(20, 3, 2))
def dicts(): return [{"x": x, "y": y} for x, y in pairs()]
def named(): return [Pair(x, y) for x, y in pairs()]
def loader(): return DataLoader(pairs(), batch_size=8)
def objects():
    return DataLoader(named(), batch_size=8, collate_fn=lambda s: Both(*(torch.stack(t) for t in zip(*s))))
def shuffled(): return DataLoader(pairs(), batch_size=8, shuffle=True)
class Stream(IterableDataset):
    def __iter__(self): return iter(dicts())
def extra(): return [{**each, "z": each["y"]} for each in dicts()]
class Breaks(Stream):
    def __iter__(self):
        yield from dicts()
        raise OSError("disk full")
def by_name(output, y): return nn.functional.mse_loss(output, y)
def by_batch(output, batch): return nn.functional.mse_loss(output, batch["y"])
def by_tuple(output, batch): return nn.functional.mse_loss(output, batch[1])
def scaled(factor): return lambda output, y: factor * nn.functional.mse_loss(output, y)
def adam(params): return torch.optim.Adam(params, lr=0.02)
def groups(model):
    return torch.optim.SGD([{"params": model.layers[:3].parameters()},
                            {"params": model.layers[3:].parameters(), "lr": 0.01}], lr=0.1, momentum=0.9)
class Slow(torch.optim.SGD):
    pass
def one_cycle(optimizer): return torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=12)
def flat(optimizer): return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
def plateau(optimizer): return torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
def nothing(*_): return None
def other(params): return torch.optim.SGD([torch.zeros(2, requires_grad=True)], lr=0.1)
"""
PLANS = [Plan(dp=2, zero=1), Plan(pp=2, microbatches=2)]
STEPS = 5
Make = Callable[..., Any]
pytestmark = pytest.mark.usefixtures("undrawn")


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """mine.py in the current folder, and what is in it."""
    (tmp_path / "mine.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    scope: dict[str, Any] = {"__name__": "mine"}
    exec(compile(MINE, "mine.py", "exec"), scope)
    return scope


def job(*overrides: str) -> Job:
    base = ["model=mine.py:Net", "data=mine.py:pairs", "loss=mine.py:by_name", "optimizer=mine.py:adam", "dtype=fp64",
            f"steps={STEPS}", "global_batch=8", "validation.every=0"]  # fmt: skip
    return load_job(None, [*base, *overrides])


def trained(
    laptop: Any, plan: Plan, given: Job, runner: str = "inline"
) -> tuple[list[list[Any]], dict[str, torch.Tensor]]:
    """(loss, validation loss, rate) of every step, and what the checkpoint holds."""
    found = train.run(laptop.take(plan.num_chips), given, plan=plan, folder=f"{runner}-{plan}", runner=runner)
    return written(found.run_dir)


def written(folder: Path) -> tuple[list[list[Any]], dict[str, torch.Tensor]]:
    records = [[r[key] for key in ("loss", "val_loss", "lr")] for r in read_metrics(folder / "metrics.jsonl")]
    newest = checkpoint.latest(folder).checkpoint
    assert newest is not None
    return records, {entry.key: value for entry, value in checkpoint.load(newest).parts()}


def plain(
    mine: dict[str, Any],
    optimizer: Make,
    batches: Sequence[Any],
    factor: float = 1.0,
    scheduler: Make | None = None,
) -> list[float]:
    """The losses of the loop that anyone would write."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = mine["Net"]().double()
    made = optimizer(model)
    moved, losses = scheduler and scheduler(made), []
    for x, y in batches:
        made.zero_grad()
        loss = factor * nn.functional.mse_loss(model(x.double()), y.double())
        loss.backward()
        made.step()
        if moved is not None:
            moved.step()
        losses.append(loss.item())
    return losses


def in_order(mine: dict[str, Any]) -> list[Any]:
    """The batches of five steps: 8, 8 and 4 samples, and from the start again."""
    return [*mine["loader"](), *mine["loader"]()][:STEPS]


@pytest.mark.parametrize("plan", PLANS, ids=str)
@pytest.mark.parametrize("name", ["pairs", "dicts", "named", "loader", "objects", "Stream"])
def test_data_of_every_kind_trains_as_in_a_plain_loop_a_smaller_last_batch_included(
    name: str, plan: Plan, mine: dict[str, Any], laptop: Any, one_thread: None
) -> None:
    overrides = [f"data=mine.py:{name}", *(["shuffle=false"] if name in ("pairs", "dicts", "named") else [])]
    records, _ = trained(laptop, plan, job(*overrides))
    expected = plain(mine, lambda model: mine["adam"](model.parameters()), in_order(mine))
    assert [loss for loss, _, _ in records] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("overrides", "factor"),
    [(["loss=mine.py:by_batch", "data=mine.py:dicts"], 1.0), (["loss=mine.py:by_tuple"], 1.0),
     (["loss=torch.nn:MSELoss"], 1.0), (["loss=torch.nn.functional:mse_loss"], 1.0),
     (["loss=mine.py:scaled", "loss_args={factor: 3.0}"], 3.0)],
    ids=["batch", "tuple", "class", "function of torch", "factory"],
)  # fmt: skip
def test_a_loss_of_every_form_is_that_of_the_plain_loop(
    overrides: list[str], factor: float, mine: dict[str, Any], laptop: Any, one_thread: None
) -> None:
    records, _ = trained(laptop, PLANS[0], job("shuffle=false", *overrides))
    expected = plain(mine, lambda model: mine["adam"](model.parameters()), in_order(mine), factor)
    assert [loss for loss, _, _ in records] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("text", "make"),
    [("mine.py:groups", lambda mine, m: mine["groups"](m)),
     ("{name: mine.py:Slow, lr: 0.05, momentum: 0.9}", lambda mine, m: torch.optim.SGD(m.parameters(), 0.05, 0.9)),
     ("{name: torch.optim:Adam, lr: 0.05, args: {amsgrad: true}}",
      lambda mine, m: torch.optim.Adam(m.parameters(), 0.05, amsgrad=True)),
     ("torch.optim:RMSprop", lambda mine, m: torch.optim.RMSprop(m.parameters()))],
    ids=["of the module", "class in the file", "class with arguments", "class"],
)  # fmt: skip
@pytest.mark.parametrize("scheduled", [False, True])
def test_an_optimizer_and_a_scheduler_are_those_of_the_plain_loop(
    text: str, make: Make, scheduled: bool, mine: dict[str, Any], laptop: Any, one_thread: None
) -> None:
    more = ["lr_schedule=mine.py:one_cycle"] if scheduled else []
    records, _ = trained(laptop, PLANS[1], job("shuffle=false", f"optimizer={text}", *more))
    scheduler = mine["one_cycle"] if scheduled else None
    expected = plain(mine, lambda model: make(mine, model), in_order(mine), scheduler=scheduler)
    assert [loss for loss, _, _ in records] == pytest.approx(expected, rel=1e-12)


EVERYTHING = (
    "model_args={drop: 0.5}", "data=mine.py:shuffled", "optimizer=mine.py:groups", "lr_schedule=mine.py:one_cycle",
    "validation={data: mine.py:pairs, every: 2, batches: 9}",
)  # fmt: skip


def test_validation_is_the_mean_over_the_held_out_data_in_eval_mode(
    mine: dict[str, Any], laptop: Any, one_thread: None
) -> None:
    still = "optimizer={name: torch.optim:SGD, lr: 1.0e-30}"  # the model stays as it began
    records, _ = trained(laptop, Plan(dp=2), job(*EVERYTHING, still, "lr_schedule=mine.py:flat", "steps=6"))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = mine["Net"]().double()
    x, y = mine["pairs"]().tensors
    expected = nn.functional.mse_loss(model(x.double()), y.double()).item()
    assert [value for _, value, _ in records] == [None, pytest.approx(expected, rel=1e-12)] * 3
    assert len({loss for loss, _, _ in records}) == 6  # dropout is on


def test_a_resumed_run_of_own_objects_goes_on_bit_for_bit(
    mine: dict[str, Any], laptop: Any, one_thread: None
) -> None:
    whole = trained(laptop, Plan(dp=2), job(*EVERYTHING))
    request, original = StopRequest(owns_process=False), training_loop.Training._step

    def step(self: training_loop.Training) -> Any:
        found = original(self)
        if self.step == 3:
            request(signal.SIGINT, None)
        return found

    document = dict(read_yaml(cluster_path("laptop")).root)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training_loop.Training, "_step", step)
        patch.setattr(train, "stop_request", lambda: nullcontext(request))
        first = train.run(
            laptop.take(2), job(*EVERYTHING), plan=Plan(dp=2), folder="stopped", document=document
        )
    assert first.was_interrupted and first.steps == 3
    assert train.main(TrainOptions(resume=Path("stopped"), runner=RunnerKind.INLINE), Console()) == 0
    records, states = written(Path("stopped"))
    assert records == whole[0]
    assert all(torch.equal(states[name], value) for name, value in whole[1].items())


def test_verify_compares_a_job_of_own_objects(mine: dict[str, Any], laptop: Any, one_thread: None) -> None:
    given = job(
        "data=mine.py:dicts", "optimizer=mine.py:groups", "lr_schedule=mine.py:one_cycle", "clip_norm=0.5"
    )
    assert verify(laptop.take(2), given, Plan(dp=2)).equal


@pytest.mark.parametrize(
    ("overrides", "error", "said", "hint"),
    [
        (["data=mine.py:extra"], UserError, "batch's z is read by neither", "the batch has x, y, z"),
        (["data=mine.py:extra", "loss=torch.nn:MSELoss"], UserError, "the loss takes target", "names them"),
        (["model=mine.py:adam"], UserError, "missing a required argument: 'params'", "mine.py:adam(params)"),
        (["model=mine.py:nothing"], ModelError, "returned a NoneType", "torch.nn.Module"),
        (["model=mine.py:Net", "model_args={depth: 2}"], ModelError, "argument 'depth'", "(width=8, drop=0.0)"),
        (["data=mine.py:Breaks"], ModelError, "raised OSError: disk full", "mend data"),
        (["data=mine.py:pairs", "data_args={n: 19}"], DataError, "last batch of 3 samples", "drop_last"),
        (["data=mine.py:loader", "shuffle=true"], ConfigError, "shuffle is true", "leave it out"),
        (["data=mine.py:shuffled", "shuffle=false"], ConfigError, "shuffle is false", "leave it out"),
        (["data=mine.py:pairs", "seq=9"], ConfigError, "seq is 9, the samples of mine.py:pairs have 2, 4", "leave"),
        (["loss=mine.py:by_batch"], UserError, "TypeError: tuple indices must be integers", "the batch has x, entry_0"),
        (["optimizer=mine.py:nothing"], ModelError, "returned a NoneType", "torch.optim.Optimizer"),
        (["optimizer=mine.py:other"], ModelError, "no parameters of the model", "called with"),
        (["optimizer=torch.optim:LBFGS"], UserError, "closure", "gradients"),
        (["lr_schedule=mine.py:plateau"], ModelError, "steps on a metric", "counts steps"),
        (["lr_schedule=mine.py:nothing"], ModelError, "returned a NoneType", "lr_scheduler"),
    ],
)  # fmt: skip
def test_what_cannot_be_trained_is_refused_in_three_parts(
    overrides: list[str], error: type[UserError], said: str, hint: str, mine: dict[str, Any], laptop: Any
) -> None:
    with pytest.raises(error, match=re.escape(said)) as caught:
        trained(laptop, Plan(dp=2), job(*overrides))
    assert caught.value.problem and caught.value.where and hint in caught.value.hint


@pytest.mark.parametrize(
    ("override", "said"),
    [("loss=mse", "names no Python object"), ("loss_args={a: 1}", "loss_args without a loss"),
     ("lr_schedule={name: cosin}", "is no schedule"), ("lr_schedule={name: cosine, args: {a: 1}}", "takes no args"),
     ("lr_schedule={name: mine.py:one_cycle, warmup_steps: 2}", "its own warm-up"),
     ("optimizer={name: adamw, args: {a: 1}}", "takes no args"), ("shuffle=false", "has no effect on text"),
     ("validation.data=mine.py:pairs", "a tenth is held out")],
)  # fmt: skip
def test_a_key_that_would_reach_nobody_is_refused(override: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load_job(None, [override])


def test_what_was_trained_before_the_data_failed_is_saved(
    mine: dict[str, Any], laptop: Any, one_thread: None
) -> None:
    with pytest.raises(ModelError, match="disk full"):
        train.run(laptop.take(2), job("data=mine.py:Breaks"), plan=Plan(dp=2), folder="run")
    newest = checkpoint.latest(Path("run")).checkpoint
    assert newest is not None and newest.manifest.step == 2


@pytest.mark.parametrize("page", PAGES)
def test_every_command_of_a_how_to_runs(
    page: str, tmp_path: Path, orchestrate: Make, monkeypatch: pytest.MonkeyPatch, one_thread: None
) -> None:
    text = (DOCS / f"{page}.md").read_text()
    for name, content in re.findall(r"```(?:python|yaml)\n# (\S+)\n(.*?)```", text, re.DOTALL):
        (tmp_path / name).write_text(content)
    monkeypatch.chdir(tmp_path)
    commands = re.findall(r"^orchestrate (.*)$", text, re.MULTILINE)
    assert [command.split()[0] for command in commands] == PAGES[page].split()
    for command in commands:
        words = command.split()
        is_open = words[0] == "train" and "--runner" not in words
        ran = orchestrate(*words, *(["--runner", "inline"] if is_open else []))
        assert ran.code == 0, ran.err
        assert "warning" not in ran.err, ran.err


def test_the_flags_name_model_and_data_at_every_verb(mine: dict[str, Any], orchestrate_json: Make) -> None:
    words = ("--cluster", "laptop", "--chips", 2, "--model", "mine.py:Net", "--set", "loss=mine.py:by_name",
             "--set", "plan.dp=2")  # fmt: skip
    flops = [
        orchestrate_json("plan", *words, "--global-batch", 8, "--data", f"mine.py:{name}")["stages"][0][
            "flops_per_chip"
        ]
        for name in ("pairs", "triples")
    ]
    assert 2.5 * flops[0] < flops[1] < 3.5 * flops[0]


SENTENCES = """
import torch
def rows():
    drawn = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 40, (12, 6), generator=drawn)
    mask = (torch.arange(6) < torch.randint(2, 7, (12, 1), generator=drawn)).long()
    labels = torch.where(mask.bool(), ids % 2, -100)
    return [dict(input_ids=i, attention_mask=m, labels=t) for i, m, t in zip(ids, mask, labels)]
"""


def test_a_folder_with_weights_trains_on_own_data_as_in_a_plain_loop(
    tmp_path: Path, laptop: Any, monkeypatch: pytest.MonkeyPatch, one_thread: None
) -> None:
    from transformers import BertConfig, BertForTokenClassification

    monkeypatch.chdir(tmp_path)
    Path("sentences.py").write_text(SENTENCES)
    config = BertConfig(vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
                        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)  # fmt: skip
    BertForTokenClassification(config).save_pretrained("saved")
    given = load_job(None, ["model=hf:saved", "data=sentences.py:rows", "shuffle=false", "dtype=fp64", "global_batch=8",
                            "steps=3", "validation.every=0", "optimizer={name: torch.optim:SGD, lr: 0.5}"])  # fmt: skip
    records, _ = trained(laptop, Plan(dp=2), given)
    model = BertForTokenClassification.from_pretrained("saved").double().train()
    optimizer, losses, scope = torch.optim.SGD(model.parameters(), lr=0.5), [], dict[str, Any]()
    exec(SENTENCES, scope)
    loader: Any = DataLoader(scope["rows"](), batch_size=8)
    for batch in [*loader, *loader][:3]:
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert [loss for loss, _, _ in records] == pytest.approx(losses, rel=1e-10)


@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
def test_rays_actors_train_jobs_of_own_objects_to_the_same_bits(
    mine: dict[str, Any], laptop: Any, one_thread: None
) -> None:
    given = job(*EVERYTHING, "optimizer={name: mine.py:Slow, lr: 0.05, momentum: 0.9}")
    one, other = trained(laptop, Plan(dp=2), given), trained(laptop, Plan(dp=2), given, "ray")
    assert one[0] == other[0] and one[1].keys() == other[1].keys()
    assert all(torch.equal(one[1][name], other[1][name]) for name in one[1])


@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
def test_distribute_on_ray_goes_through_changes_to_the_same_bits(
    mine: dict[str, Any], laptop: Any, one_thread: None
) -> None:
    def losses(runner: str) -> tuple[list[float], dict[str, torch.Tensor]]:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = mine["Net"](drop=0.5).double()
        optimizer, found = mine["groups"](model), []
        scheduler = mine["one_cycle"](optimizer)
        step = distribute(
            model, optimizer, laptop, plan=Plan(dp=2), chips=2, loss_fn=mine["by_batch"], runner=runner
        )
        try:
            for number, (x, y) in enumerate(in_order(mine)):
                if number == 3:  # what changes between steps leads to another Program
                    step.sync().layers[0].requires_grad_(False)
                found += [step({"x": x.double(), "y": y.double()})]
                scheduler.step()
                model.eval()
                found += [step.evaluate({"x": x.double(), "y": y.double()})]
                model.train()
            return found, dict(step.sync().state_dict())
        finally:
            step.close()

    one, other = losses("inline"), losses("ray")
    assert one[0] == other[0]
    assert all(torch.equal(one[1][name], other[1][name]) for name in one[1])
