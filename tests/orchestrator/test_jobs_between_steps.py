"""What code of the user's does between the steps of a job: seen as a plain loop sees it, or refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from comms.errors import DataError, ModelError
from orchestrator.config.job_file import load_job
from orchestrator.runs.metrics import read_metrics
from orchestrator.verbs import train
from orchestrator.verbs.verify import verify
from partitioner.layout.parallel_plan import Plan

MINE = """
import torch
from torch import nn
class CFG: beta = 1.0
factor = 1.0
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 2)
    def forward(self, x, y=None): return self.layer(x) if y is None else self.layer(x) * y.sum()
class Open(Net):
    def forward(self, x, **more):
        assert not more, "the target is the loss's"
        return self.layer(x)
def pairs():
    values = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
    return torch.utils.data.TensorDataset(values[:, :4], values[:, 4:])
class Eager:
    def __iter__(self):
        for _ in range(3): yield pairs()[:8]
def columns(): return [{"x": x, "y": y, "note": "text"} for x, y in pairs()]
def loss(output, y): return factor * nn.functional.mse_loss(output, y)
class Anneals(torch.optim.lr_scheduler.LambdaLR):
    def step(self, epoch=None):
        super().step(epoch)
        globals()["factor"] = 1.0 / (1 + self.last_epoch)
def anneals(optimizer): return Anneals(optimizer, lambda step: 1.0)
class Clamps(torch.optim.lr_scheduler.LambdaLR):
    def step(self, epoch=None):
        super().step(epoch)
        for group in self.optimizer.param_groups:
            for param in group["params"]: param.data.clamp_(-0.1, 0.1)
def clamps(optimizer): return Clamps(optimizer, lambda step: 1.0)
class Metric:
    def step(self, metric): pass
    def state_dict(self): return {}
    def load_state_dict(self, state): pass
def metric(optimizer): return Metric()
def another(optimizer):
    return torch.optim.lr_scheduler.StepLR(torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1), 1)
def doubled(model):
    model.layer.weight.data.mul_(2)
    model.layer.register_forward_hook(lambda module, args, output: output * 2)
    return torch.optim.SGD(model.parameters(), lr=0.1)
class AtOnce(torch.utils.data.Dataset):
    def __len__(self): return 8
    def __getitem__(self, i): raise AssertionError("one by one")
    def __getitems__(self, numbers): return [pairs()[i] for i in numbers]
def odd():
    return torch.utils.data.DataLoader(pairs(), batch_size=8, collate_fn=lambda samples: {0: torch.zeros(8)})
def meta():
    return torch.utils.data.DataLoader(
        pairs(), batch_size=8, collate_fn=lambda samples: {"x": torch.zeros(8, 4, device="meta")})
def nothing(): return torch.utils.data.DataLoader(pairs(), batch_size=8, collate_fn=lambda samples: {})
"""


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    (tmp_path / "mine.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    scope: dict[str, Any] = {"__name__": "mine"}
    exec(compile(MINE, "mine.py", "exec"), scope)
    return scope


def trained(laptop: Any, *overrides: str) -> list[float]:
    job = load_job(None, ["model=mine.py:Net", "data=mine.py:pairs", "loss=mine.py:loss", "shuffle=false",
                          "optimizer={name: torch.optim:SGD, lr: 0.1}", "dtype=fp64", "steps=4", "global_batch=8",
                          "validation.every=0", *overrides])  # fmt: skip
    plan = None if "plan.dp=auto" in overrides else Plan(dp=2)
    found = train.run(laptop.take(2), job, plan=plan)
    return [record["loss"] for record in read_metrics(found.run_dir / "metrics.jsonl")]


def plain(mine: dict[str, Any], factors: tuple[float, ...] = (1.0,) * 4, make: str = "") -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = mine["Net"]().double()
    optimizer = mine[make](model) if make else torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    x, y = (v.double() for v in mine["pairs"]()[:8])
    for factor in factors:
        optimizer.zero_grad()
        loss = factor * nn.functional.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return pytest.approx(losses, rel=1e-12)


def test_a_number_that_a_scheduler_anneals_is_read_anew(mine: dict[str, Any], laptop: Any) -> None:
    assert trained(laptop, "lr_schedule=mine.py:anneals") == plain(mine, (1.0, 1 / 2, 1 / 3, 1 / 4))


def test_weights_that_a_scheduler_changes_are_refused(mine: dict[str, Any], laptop: Any) -> None:
    with pytest.raises(ModelError, match=r"Clamps uses the model's weights \(aten"):
        trained(laptop, "lr_schedule=mine.py:clamps")


def test_a_scheduler_whose_step_needs_more_is_refused_before_the_first(
    mine: dict[str, Any], laptop: Any
) -> None:
    with pytest.raises(Exception, match="steps on a metric"):
        trained(laptop, "lr_schedule=mine.py:metric")
    assert not list(Path().rglob("metrics.jsonl"))


@pytest.mark.parametrize("plan", [(), ("plan.dp=auto",)], ids=["a plan", "any plan"])
def test_what_an_optimizers_function_does_to_the_model_is_done_once(
    plan: tuple[str, ...], mine: dict[str, Any], laptop: Any
) -> None:
    assert trained(laptop, "optimizer=mine.py:doubled", *plan) == plain(mine, make="doubled")


def test_a_job_whose_optimizers_function_changes_the_model_is_verified(
    mine: dict[str, Any], laptop: Any
) -> None:
    job = load_job(None, ["model=mine.py:Net", "data=mine.py:pairs", "loss=mine.py:loss", "global_batch=8",
                          "optimizer=mine.py:doubled", "dtype=fp64", "steps=2", "plan.dp=2"])  # fmt: skip
    assert verify(laptop.take(2), job).equal


def test_a_scheduler_of_another_optimizer_is_refused(mine: dict[str, Any], laptop: Any) -> None:
    with pytest.raises(ModelError, match="another returned a scheduler of another optimizer"):
        trained(laptop, "lr_schedule=mine.py:another")


def test_samples_are_taken_at_once_where_a_dataset_gives_them_so(mine: dict[str, Any], laptop: Any) -> None:
    assert trained(laptop, "data=mine.py:AtOnce") == plain(mine)


@pytest.mark.parametrize(
    ("data", "said"),
    [("odd", "an entry of a batch is called 0"), ("meta", "x of a batch is on the meta device"),
     ("nothing", "the first batch of mine.py:nothing holds no samples")],
)  # fmt: skip
def test_batches_that_no_model_takes_are_refused(
    data: str, said: str, mine: dict[str, Any], laptop: Any
) -> None:
    with pytest.raises(DataError, match=said) as caught:
        trained(laptop, f"data=mine.py:{data}")
    assert caught.value.where and caught.value.hint


@pytest.mark.parametrize("model", ["Net", "Open"])
def test_a_target_without_a_name_is_not_the_forwards_too(
    model: str, mine: dict[str, Any], laptop: Any
) -> None:
    assert trained(laptop, f"model=mine.py:{model}") == plain(mine)


def test_text_that_nobody_reads_is_refused_as_tensors_are(mine: dict[str, Any], laptop: Any) -> None:
    with pytest.raises(Exception, match="the batch's note is read by neither"):
        trained(laptop, "data=mine.py:columns")


def test_an_iterable_of_batches_is_asked_about_and_taken_as_it_is_said(
    mine: dict[str, Any], laptop: Any
) -> None:
    with pytest.raises(Exception, match="8 rows, as many as global_batch"):
        trained(laptop, "data=mine.py:Eager")
    assert trained(laptop, "data=mine.py:Eager", "data_gives=batches") == plain(mine)
