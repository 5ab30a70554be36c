"""Sinks: where the numbers of every step go besides `metrics.jsonl`, as a job's `sinks` names them.

A sink is a function of one step's record, with a `close`, or anything of the user's by `file.py:name`: a function that
is called with each record (a dict), or a class whose objects are. Services are asked for when the run starts: one that
is not installed is an error then. What a sink of a service's raises later is a warning, once: numbers that nobody can
take are no reason to lose a run, and `metrics.jsonl` has them all.
"""

import csv
import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from comms.errors import ConfigError
from orchestrator.models.user_code import called, named_object
from orchestrator.runs.disk import explained
from orchestrator.runs.metrics import Record, read_metrics

EXTRA = "pip install 'orchestrate-chips[sinks]'"


class Sink(Protocol):
    """Takes the record of every step, in order."""

    def __call__(self, record: Record) -> object:
        """One step."""


class _Csv:
    """`metrics.csv`, a line per step; a run that goes on has the earlier ones first."""

    def __init__(self, folder: Path, config: Mapping[str, object]) -> None:
        del config
        self.path = folder / "metrics.csv"
        with explained(self.path):
            self.file = self.path.open("w", encoding="utf-8", newline="")
        self.writer: csv.DictWriter[str] | None = None
        for record in read_metrics(folder / "metrics.jsonl"):
            self(record)

    def __call__(self, record: Record) -> None:
        with explained(self.path):
            if self.writer is None:
                self.writer = csv.DictWriter(self.file, list(record))
                self.writer.writeheader()
            self.writer.writerow(dict(record))
            self.file.flush()

    def close(self) -> None:
        self.file.close()


class _TensorBoard:
    """Event files below `tensorboard/`."""

    def __init__(self, folder: Path, config: Mapping[str, object]) -> None:
        del config
        writers = _module("torch.utils.tensorboard", "tensorboard")
        seen = [record["step"] for record in read_metrics(folder / "metrics.jsonl")]
        # what an earlier process wrote of steps that come again is not shown
        self.writer = writers.SummaryWriter(
            str(folder / "tensorboard"), purge_step=len(seen) + 1 if seen else None
        )

    def __call__(self, record: Record) -> None:
        for name, value in _numbers(record).items():
            self.writer.add_scalar(name, value, int(str(record["step"])))

    def close(self) -> None:
        self.writer.close()


class _WeightsAndBiases:
    """One run of the project `orchestrate` (or what its own variables say), the same again where a run goes on."""

    def __init__(self, folder: Path, config: Mapping[str, object]) -> None:
        wandb = _module("wandb", "wandb")
        name = folder.resolve().name
        self.run = wandb.init(
            project="orchestrate", name=name, id=name, resume="allow", dir=str(folder), config=dict(config)
        )

    def __call__(self, record: Record) -> None:
        self.run.log(_numbers(record), step=int(str(record["step"])))

    def close(self) -> None:
        self.run.finish()


class _MlFlow:
    """One run of the experiment that MLflow's own variables say."""

    def __init__(self, folder: Path, config: Mapping[str, object]) -> None:
        self.mlflow = _module("mlflow", "mlflow")
        self.run = self.mlflow.start_run(run_name=folder.resolve().name)
        self.mlflow.log_params({key: str(value)[:250] for key, value in config.items()})

    def __call__(self, record: Record) -> None:
        self.mlflow.log_metrics(_numbers(record), step=int(str(record["step"])))

    def close(self) -> None:
        self.mlflow.end_run()


SERVICES: dict[str, Callable[[Path, Mapping[str, object]], Any]] = {
    "csv": _Csv,
    "tensorboard": _TensorBoard,
    "wandb": _WeightsAndBiases,
    "mlflow": _MlFlow,
}


@contextmanager
def sinks_of(
    names: Sequence[str], folder: Path, config: Mapping[str, object], others: Sequence[Sink],
    warn: Callable[[str], None],
) -> Iterator[Sink]:  # fmt: skip
    """What hands a record to all of these sinks, and to `others`. Raises ConfigError or ModelError for one."""
    opened: list[tuple[str, Sink]] = [("", each) for each in others]
    failed = set[str]()

    def write(record: Record) -> None:
        for name, sink in opened:
            if name not in SERVICES and name:
                called(sink, name, "sinks", dict(record))
            elif name not in failed:
                _tried(name, sink, record, failed, warn)

    with ExitStack() as stack:
        for name in names:
            made = SERVICES[name](folder, config) if name in SERVICES else _own(name)
            if (close := getattr(made, "close", None)) is not None:
                stack.callback(close)
            opened.append((name, made))
        yield write


def _own(name: str) -> Sink:
    found = named_object(name, "sinks")
    if isinstance(found, type):
        found = called(found, name, "sinks")
    if not callable(found):
        hint = "name a function that takes a record, or a class whose objects do"
        raise ConfigError(f"{name} cannot be called with a record", "sinks", hint)
    sink: Sink = found
    return sink


def _tried(name: str, sink: Sink, record: Record, failed: set[str], warn: Callable[[str], None]) -> None:
    try:
        sink(record)
    except Exception as error:  # whatever a service's client raises
        failed.add(name)
        warn(
            f"{name or 'a sink'} takes no more numbers: {type(error).__name__}: {error}; metrics.jsonl has them all"
        )


def _module(name: str, distribution: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(f"{distribution} is not installed", "sinks", f"{EXTRA}, or leave it out") from error


def _numbers(record: Record) -> dict[str, float]:
    return {
        name: float(value)
        for name, value in record.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and name != "step"
    }
