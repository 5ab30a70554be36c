"""Metrics: the JSONL file survives what a crash leaves."""

import errno
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from comms.errors import RunError
from orchestrator.runs import metrics
from orchestrator.runs.metrics import metrics_writer, read_metrics, rewind_metrics

values = st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats() | st.text(max_size=5)
records = st.lists(st.dictionaries(st.text(max_size=5), values, max_size=4), max_size=5)
UNREADABLE_AS_TEXT = {"NaN", "Infinity", "-Infinity"}


def test_the_time_left_counts_what_lies_between_steps_but_not_the_first() -> None:
    assert metrics.eta_s([0.0, 9.0, 10.0, 11.0], steps_left=10) == 10
    assert metrics.eta_s([5.0, 9.0], steps_left=3) == 12


@given(records)
def test_records_come_back_as_written(
    tmp_path_factory: pytest.TempPathFactory, given: list[dict[str, object]]
) -> None:
    path = tmp_path_factory.mktemp("metrics") / "metrics.jsonl"
    given = [{k: v for k, v in record.items() if v not in UNREADABLE_AS_TEXT} for record in given]
    with metrics_writer(path) as write:
        for record in given:
            write(record)  # type: ignore[arg-type]
    assert repr(list(read_metrics(path))) == repr(given)


def test_every_line_is_in_the_file_before_the_writer_closes(tmp_path: Path) -> None:
    with metrics_writer(tmp_path / "m.jsonl") as write:
        write({"step": 1, "loss": math.nan})
        assert math.isnan(read_metrics(tmp_path / "m.jsonl")[0]["loss"])  # type: ignore[arg-type]
        assert '"NaN"' in (tmp_path / "m.jsonl").read_text()


def test_half_a_line_is_ignored_and_dropped_on_reopening(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "lo')
    assert read_metrics(path) == ({"step": 1},)
    with metrics_writer(path) as write:
        write({"step": 2})
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_rewinding_drops_later_steps_and_keeps_the_rest(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    rewind_metrics(path, 5)
    assert not path.exists()
    with metrics_writer(path) as write:
        for record in ({"event": "start"}, {"step": 1}, {"step": 2}, {"step": 3}):
            write(record)
    rewind_metrics(path, 2)
    assert read_metrics(path) == ({"event": "start"}, {"step": 1}, {"step": 2})


@pytest.mark.parametrize("line", ["not json", "3", "[1]"])
def test_a_line_that_is_no_object_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text(f'{{"step": 1}}\n{line}\n')
    with pytest.raises(RunError) as caught:
        read_metrics(path)
    assert caught.value.where == f"{path}:2"


def test_a_full_disk_is_a_user_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(record: object) -> str:
        raise OSError(errno.ENOSPC, "No space left on device")

    with metrics_writer(tmp_path / "m.jsonl") as write:
        write({"step": 1})
        monkeypatch.setattr(metrics, "_line", full)
        with pytest.raises(RunError, match="disk is full"):
            write({"step": 2})
    assert read_metrics(tmp_path / "m.jsonl") == ({"step": 1},)
