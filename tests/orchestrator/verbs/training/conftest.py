"""What these tests share: small runs in this process, stopped after some steps, and what they leave."""

import io
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from orchestrator.config.hardware.cluster_file import cluster_path
from orchestrator.config.yaml_file import read_yaml
from orchestrator.runners.signals import StopRequest
from orchestrator.runs.checkpoints import checkpoint_folder as checkpoint
from orchestrator.runs.metrics import read_metrics
from orchestrator.verbs import train
from orchestrator.verbs.inputs.options import RunnerKind, TrainOptions
from orchestrator.verbs.training import training_loop
from orchestrator.views.console import Console
from partitioner.layout.parallel_plan import Plan

SMALL = ("validation.batches=1", "validation.every=2", "lr_schedule.warmup_steps=1", "model_args.vocab=256")
Tensors = dict[tuple[str, ...], torch.Tensor]


@pytest.fixture(scope="session")
def signal_after() -> Callable[..., Any]:
    """Sends a signal to the run of a block, as it ends its `steps`-th step."""

    @contextmanager
    def sending(steps: int, number: signal.Signals = signal.SIGINT) -> Iterator[None]:
        request, original = StopRequest(owns_process=False), training_loop.Training._step

        def step(self: training_loop.Training) -> Any:
            found = original(self)
            if self.step == steps:
                request(number, None)
            return found

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(training_loop.Training, "_step", step)
            patch.setattr(train, "stop_request", lambda: nullcontext(request))
            yield

    return sending


@pytest.fixture(scope="session")
def train_job(tiny_job: Callable[..., Any], laptop: Any) -> Callable[..., Path]:
    """Trains the small job by a plan in a folder, which it returns."""
    document = dict(read_yaml(cluster_path("laptop")).root)

    def run(folder: Path, plan: Plan, *overrides: str) -> Path:
        job = tiny_job(*SMALL, *overrides)
        console = Console(out=io.StringIO(), err=io.StringIO())
        cluster = laptop.take(plan.num_chips)
        train.run(cluster, job, plan=plan, folder=folder, document=document, console=console)
        return folder

    return run


@pytest.fixture(scope="session")
def resume_run() -> Callable[..., str]:
    """Goes on with the run in a folder, with other options, to an exit code; what is said."""

    def run(folder: Path, code: int = 0, **given: Any) -> str:
        said = io.StringIO()
        options = TrainOptions(resume=folder, **{"runner": RunnerKind.INLINE, **given})
        assert train.main(options, Console(out=io.StringIO(), err=said)) == code
        return " ".join(said.getvalue().split())

    return run


@pytest.fixture(scope="session")
def tensors_of() -> Callable[..., Tensors]:
    """All tensors of the newest checkpoint of a run, which must be of `step`."""

    def read(folder: Path, step: int) -> Tensors:
        found = checkpoint.latest(folder).checkpoint
        assert found is not None and found.manifest.step == step
        parts = checkpoint.load(found).parts()
        return {(entry.part, entry.name, entry.state): value for entry, value in parts}

    return read


@pytest.fixture(scope="session")
def facts_of() -> Callable[[Path], list[list[Any]]]:
    """What the metrics of a run say of every step."""
    facts = ("step", "loss", "grad_norm", "val_loss", "lr")

    def read(folder: Path) -> list[list[Any]]:
        return [[record[fact] for fact in facts] for record in read_metrics(folder / "metrics.jsonl")]

    return read
