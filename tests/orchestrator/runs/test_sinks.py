import csv
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from comms.errors import ConfigError, ModelError
from orchestrator.config.job_file import SINKS, load_job
from orchestrator.runs.sinks import SERVICES, sinks_of

RECORDS: list[dict[str, Any]] = [
    {"step": 1, "loss": 2.5, "val_loss": None, "lr": 0.1},
    {"step": 2, "loss": 2.25, "val_loss": 3.0, "lr": 0.1},
]


def written(names: list[str], folder: Path, records: list[dict[str, Any]] = RECORDS) -> list[str]:
    said: list[str] = []
    with sinks_of(names, folder, {"model": "m"}, (), said.append) as write:
        for record in records:
            write(record)
    return said


def test_a_job_names_exactly_the_services_that_there_are() -> None:
    assert set(SINKS) == set(SERVICES)
    assert load_job(None, ["sinks=[csv, notes.py:show]"]).sinks == ["csv", "notes.py:show"]
    with pytest.raises(ConfigError, match="'tensorbord' takes no numbers") as caught:
        load_job(None, ["sinks=[tensorbord]"])
    assert "did you mean 'tensorboard'" in caught.value.hint


def test_a_csv_file_has_a_line_per_step_and_the_earlier_ones_of_a_run_that_goes_on(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(json.dumps(RECORDS[0]) + "\n")
    written(["csv"], tmp_path, RECORDS[1:])
    with (tmp_path / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert rows == [{k: "" if v is None else str(v) for k, v in each.items()} for each in RECORDS]


def test_a_function_and_a_class_of_the_users_are_called_with_every_record(tmp_path: Path) -> None:
    file = tmp_path / "notes.py"
    file.write_text(
        "seen = []\ndef show(record): seen.append(('f', record['step']))\n"
        "class Show:\n"
        "    def __call__(self, record): seen.append(('c', record['step']))\n"
        "    def close(self): seen.append('closed')\n"
    )
    written([f"{file}:show", f"{file}:Show"], tmp_path)
    module = next(m for m in sys.modules.values() if getattr(m, "__file__", None) == str(file))
    assert module.seen == [("f", 1), ("c", 1), ("f", 2), ("c", 2), "closed"]


def test_what_a_users_sink_raises_is_told_with_its_lines(tmp_path: Path) -> None:
    file = tmp_path / "broken.py"
    file.write_text("def show(record):\n    return 1 / 0\nnumber = 3\n")
    with pytest.raises(ModelError, match="ZeroDivisionError") as caught:
        written([f"{file}:show"], tmp_path)
    assert "broken.py:2 in show" in caught.value.where
    with pytest.raises(ConfigError, match="cannot be called"):
        written([f"{file}:number"], tmp_path)


def test_a_service_that_fails_is_told_of_once_and_the_run_goes_on(tmp_path: Path, monkeypatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError("no route")

    run = SimpleNamespace(log=fail, finish=lambda: None)
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **_: run))
    said = written(["wandb", "csv"], tmp_path)
    assert said == ["wandb takes no more numbers: OSError: no route; metrics.jsonl has them all"]
    assert len((tmp_path / "metrics.csv").read_text().splitlines()) == 3


def test_services_are_given_numbers_by_step_without_those_that_are_not_there(
    tmp_path: Path, monkeypatch
) -> None:
    calls: list[Any] = []
    run = SimpleNamespace(
        log=lambda numbers, step: calls.append(("wandb", step, numbers)), finish=lambda: calls.append("over")
    )
    flow = SimpleNamespace(
        start_run=lambda run_name: None, log_params=lambda given: calls.append(given),
        log_metrics=lambda numbers, step: calls.append(("mlflow", step, numbers)), end_run=lambda: calls.append("end"),
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **_: run))
    monkeypatch.setitem(sys.modules, "mlflow", flow)
    written(["wandb", "mlflow"], tmp_path, RECORDS[:1])
    numbers = {"loss": 2.5, "lr": 0.1}
    assert calls == [{"model": "m"}, ("wandb", 1, numbers), ("mlflow", 1, numbers), "end", "over"]


@pytest.mark.parametrize("name", ["wandb", "mlflow", "tensorboard"])
def test_a_service_that_is_not_installed_is_named_before_the_first_step(
    name: str, tmp_path: Path, monkeypatch
) -> None:
    module = "torch.utils.tensorboard" if name == "tensorboard" else name
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match=f"{name} is not installed") as caught:
        written([name], tmp_path)
    assert "pip install" in caught.value.hint
