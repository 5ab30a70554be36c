"""Mistakes planted in one chip of a split run: verify names the step, the tensor and the chip; right runs pass."""

import re
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import nn

from orchestrator.runners.executing import pending_communications
from orchestrator.runners.executing.chip import ExecutingChip
from orchestrator.verbs import distribute as verb
from orchestrator.verbs.distribute import DistributedStep, distribute
from orchestrator.verbs.verification import sides
from partitioner.capture.captured_graph import Graph
from partitioner.capture.forwards.keyed_random import FIRST_SAMPLE, KEY
from partitioner.capture.graph_units import capture_graph
from partitioner.layout.parallel_plan import BatchNorms, Plan
from partitioner.program.program import TensorKind

Plant = Callable[[pytest.MonkeyPatch], None]
DP, PP, TP, ZERO = Plan(dp=2), Plan(pp=2, microbatches=2), Plan(tp=2), Plan(dp=2, zero=1, microbatches=2)
BOTH, MANY = Plan(dp=2, pp=2, microbatches=2), Plan(microbatches=4)
PER_PART = Plan(dp=2, microbatches=2, batch_norm=BatchNorms.PER_PART)


class Loss(nn.Module):
    """The mean square of what a network makes of x."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.net = nn.Sequential(*layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x).square().mean()


class Tied(nn.Module):
    """A head that is the embedding; labels of -1 do not count."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.inner = nn.Embedding(12, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, 12, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        scores = self.head(torch.tanh(self.inner(self.embed(ids))))
        labels = ids.roll(1, 1).masked_fill(ids == 3, -1)
        return nn.functional.cross_entropy(scores.flatten(0, 1), labels.flatten(), ignore_index=-1)


MODELS: Mapping[str, Callable[[], nn.Module]] = {
    "mlp": lambda: Loss(nn.Linear(6, 16), nn.Tanh(), nn.LayerNorm(16), nn.Linear(16, 16), nn.Linear(16, 4)),
    "dropout": lambda: Loss(nn.Linear(6, 16), nn.Dropout(0.4), nn.Tanh(), nn.Linear(16, 4)),
    "batch norm": lambda: Loss(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, 4)),
    "convolution": lambda: Loss(
        nn.Unflatten(1, (1, 6)), nn.Conv1d(1, 4, 3), nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(16, 2)
    ),
    "recurrent": lambda: Loss(nn.Unflatten(1, (3, 2)), Last(nn.GRU(2, 8, batch_first=True)), nn.Linear(8, 2)),
    "tied": Tied,
}


class Last(nn.Module):
    """The outputs of a recurrent network."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.inner(x)[0][:, -1]
        return out


GRAPHS: dict[str, Graph] = {}


@pytest.fixture(autouse=True)
def captured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mistakes are planted in what is run: what a model is captured as stays."""

    def graph(module: nn.Module, batch: Mapping[str, torch.Tensor], **options: Any) -> Graph:
        form = [(name, value.dtype, value.shape) for name, value in batch.items()]
        key = repr((module, next(module.parameters()).dtype, form, sorted(options.items())))
        if key not in GRAPHS:
            GRAPHS[key] = capture_graph(module, batch, **options)
        return GRAPHS[key]

    monkeypatch.setattr(verb, "capture_graph", graph)


def step_of(model: str, plan: Plan, dtype: torch.dtype, laptop: Any, clip: float | None) -> DistributedStep:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = MODELS[model]().to(dtype)
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.01)
    return distribute(module, optimizer, laptop, plan=plan, chips=plan.num_chips, clip_norm=clip)


def batch(model: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    if model == "tied":
        return {"ids": torch.randint(0, 12, (8, 5), generator=generator)}
    return {"x": torch.randn(8, 6, generator=generator).to(dtype)}


def gradient_of(chip: int) -> Plant:
    """A chip's gradients are 1 % too large."""
    accumulate = ExecutingChip._accumulate

    def larger(self: ExecutingChip, instruction: Any, microbatch: int) -> None:
        accumulate(self, instruction, microbatch)
        for tensor in instruction.writes:
            if self.index == chip and self.tensors[tensor].kind is TensorKind.GRAD:
                self.value(tensor).mul_(1.01)

    return lambda patch: patch.setattr(ExecutingChip, "_accumulate", larger)


def update_of(chip: int, spoil: Callable[[dict[str, Any]], Any]) -> Plant:
    """A chip steps with other settings."""
    update = ExecutingChip._update

    def other(self: ExecutingChip, instruction: Any, microbatch: int) -> None:
        before = self.step_settings
        if self.index == chip:
            self.step_settings = [spoil(dict(each)) for each in before]
        update(self, instruction, microbatch)
        self.step_settings = before

    return lambda patch: patch.setattr(ExecutingChip, "_update", other)


def no_update(chip: int) -> Plant:
    """A chip leaves its last update out."""
    update = ExecutingChip._update

    def left_out(self: ExecutingChip, instruction: Any, microbatch: int) -> None:
        if self.index != chip or instruction.param not in self.optimizers:
            update(self, instruction, microbatch)

    return lambda patch: patch.setattr(ExecutingChip, "_update", left_out)


def no_reduction(patch: pytest.MonkeyPatch) -> None:
    """Sums over chips are those of the first one."""
    patch.setattr(pending_communications, "combine", lambda reduction, parts, out: parts[0].clone())


def own_reduction(chip: int) -> Plant:
    """A chip keeps what it had instead of the sum."""
    put = pending_communications.PendingCommunications._put

    def kept(self: Any, target: int, post: Any, value: torch.Tensor) -> None:
        is_gradient = self.chips[target].tensors[post.instruction.reads[0]].name.endswith(".grads")
        if target != chip or not is_gradient:
            put(self, target, post, value)

    def apply(patch: pytest.MonkeyPatch) -> None:
        patch.setattr(pending_communications.PendingCommunications, "_put", kept)
        patch.setattr(pending_communications.PendingCommunications, "_reduce", _apart)

    return apply


def _apart(self: Any, reduction: Any, parts: list[torch.Tensor], pending: Any, key: Any) -> torch.Tensor:
    return pending_communications.combine(reduction, parts, None)


def stale_buffer(chip: int) -> Plant:
    """A chip keeps its buffers as they were."""
    write = ExecutingChip.write

    def stale(self: ExecutingChip, tensor: int, microbatch: int, value: torch.Tensor) -> None:
        is_old = self.index == chip and self.tensors[tensor].kind is TensorKind.BUFFER
        write(self, tensor, microbatch, self.value(tensor) if is_old else value)

    return lambda patch: patch.setattr(ExecutingChip, "write", stale)


def keyed_by_chip(entry: str, value: int) -> Plant:
    """Every replica but the first draws by another key, or as if it had the first samples."""
    split = verb.split_batch

    def other(*args: Any) -> Any:
        batches = split(*args)
        for replica, entries in batches.items():
            for microbatch, name in entries:
                if replica and name == entry:
                    entries[microbatch, name] = torch.tensor(value)
        return batches

    return lambda patch: patch.setattr(sides, "split_batch", other)


def last_microbatch_twice(patch: pytest.MonkeyPatch) -> None:
    """The last microbatch is taken in the place of the first."""
    split = verb.split_batch

    def twice(*args: Any) -> Any:
        batches = split(*args)
        for entries in batches.values():
            last = max(microbatch for microbatch, _ in entries)
            for name in [name for microbatch, name in entries if microbatch == 0]:
                entries[0, name] = entries[last, name]
        return batches

    patch.setattr(sides, "split_batch", twice)


def state_of(chip: int) -> Plant:
    """After its step a chip's second moments are 1 % too large: parameters do not show it yet."""
    update = ExecutingChip._update

    def larger(self: ExecutingChip, instruction: Any, microbatch: int) -> None:
        update(self, instruction, microbatch)
        if self.index == chip:
            self.optimizer(instruction).state()["exp_avg_sq"].mul_(1.01)

    return lambda patch: patch.setattr(ExecutingChip, "_update", larger)


def faster(settings: dict[str, Any]) -> dict[str, Any]:
    return {**settings, "lr": settings["lr"] * 1.01}


def undecayed(settings: dict[str, Any]) -> dict[str, Any]:
    return {**settings, "weight_decay": 0.0}


def other_betas(settings: dict[str, Any]) -> dict[str, Any]:
    return {**settings, "betas": (0.9, 0.99)}


LOSS, GRADIENT, FIRST = (
    r"step 1: the loss is .* for .*",
    r"step 1: gradient of {}, .*entry .*",
    r"step 1: {}, .*",
)
PLANTED: list[tuple[str, Plan, Plant, str]] = [
    ("mlp", DP, gradient_of(0), GRADIENT.format(r"net\.0\.weight")),
    ("mlp", ZERO, gradient_of(1), GRADIENT.format(r"net\.0\.weight")),
    ("mlp", PP, gradient_of(1), GRADIENT.format(r"net\.\d\.\w+")),
    ("mlp", TP, gradient_of(1), GRADIENT.format(r"net\.\d\.\w+( on chip 1)?")),
    ("tied", BOTH, gradient_of(3), GRADIENT.format(r"\w+\.weight")),
    ("recurrent", DP, gradient_of(1), GRADIENT.format(r"net\.1\.inner\.\w+")),
    ("mlp", DP, no_reduction, LOSS),
    ("mlp", TP, no_reduction, LOSS),
    ("convolution", ZERO, no_reduction, LOSS),
    ("mlp", DP, own_reduction(1), GRADIENT.format(r"net\.0\.weight on chip 1")),
    ("tied", DP, own_reduction(1), GRADIENT.format(r"\w+\.weight on chip 1")),
    ("convolution", DP, own_reduction(0), GRADIENT.format(r"net\.1\.weight")),
    ("batch norm", DP, stale_buffer(1), FIRST.format(r"net\.1\.running_mean on chip 1")),
    ("batch norm", DP, stale_buffer(0), FIRST.format(r"net\.1\.running_mean")),
    ("batch norm", PER_PART, stale_buffer(1), FIRST.format(r"net\.1\.running_mean on chip 1")),
    ("batch norm", PER_PART, gradient_of(1), GRADIENT.format(r"net\.0\.\w+")),
    ("mlp", DP, update_of(1, faster), FIRST.format(r"net\.0\.weight on chip 1")),
    ("mlp", DP, update_of(0, undecayed), FIRST.format(r"net\.0\.weight")),
    ("recurrent", ZERO, update_of(1, faster), FIRST.format(r"net\.[12]\.\S+")),
    ("tied", PP, update_of(1, undecayed), FIRST.format(r"\S+( on chip 1)?")),
    ("mlp", DP, update_of(1, other_betas), r"step 1: exp_avg_sq of net\.0\.weight on replica 1, .*"),
    ("mlp", DP, no_update(1), r"step 2: net\.0\.weight on chip 1, .*"),
    ("convolution", DP, state_of(0), r"step 1: exp_avg_sq of net\.1\.weight, .*"),
    ("mlp", ZERO, state_of(1), r"step 1: exp_avg_sq of net\.\d\.\w+, .*"),
    ("dropout", DP, keyed_by_chip(KEY, 5), LOSS),
    ("dropout", ZERO, keyed_by_chip(FIRST_SAMPLE, 0), LOSS),
    ("mlp", MANY, last_microbatch_twice, LOSS),
    ("tied", BOTH, last_microbatch_twice, LOSS),
]  # fmt: skip


@pytest.mark.parametrize(
    ("number", "dtype"), [(n, (torch.float64, torch.float32)[n % 2]) for n in range(len(PLANTED))], ids=str
)
def test_what_is_planted_is_named(
    number: int, dtype: torch.dtype, laptop: Any, one_thread: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, plan, plant, said = PLANTED[number]
    step = step_of(model, plan, dtype, laptop, clip=None)
    plant(monkeypatch)
    found = step.verify(batch(model, dtype))
    assert not found.equal and found.differs is not None
    assert re.fullmatch(said, found.differs), found.differs


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("model", "plan"), sorted({row[:2] for row in PLANTED}, key=str), ids=str)
def test_what_is_right_passes(
    model: str, plan: Plan, dtype: torch.dtype, laptop: Any, one_thread: None
) -> None:
    found = step_of(model, plan, dtype, laptop, clip=0.5).verify(batch(model, dtype))
    assert found.equal, str(found)
