"""Metrics: each formula against a number done by hand; the JSONL file survives what a crash leaves."""

import errno
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.errors import RunError
from orchestrator.runs import metrics
from orchestrator.runs.metrics import MetricsWriter, read_metrics, rewind_metrics
from orchestrator.runs.occupancy import Breakdown
from orchestrator.runs.timeline import Lane

values = st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats() | st.text(max_size=5)
records = st.lists(st.dictionaries(st.text(max_size=5), values, max_size=4), max_size=5)
UNREADABLE_AS_TEXT = {"NaN", "Infinity", "-Infinity"}


def test_formulas_equal_hand_calculations() -> None:
    assert metrics.tokens_per_s(8192, 0.5) == 16384
    assert metrics.mfu(model_flops=3e15, peak_flops_per_s=312e12, seconds=2, num_chips=8) == pytest.approx(
        0.600961538
    )
    assert metrics.cost_usd_per_step(cluster_usd_per_hour=36, seconds=2) == pytest.approx(0.02)
    assert metrics.energy_j_per_step(chip_watts=400, num_chips=8, seconds=2) == 6400
    assert metrics.eta_s([9.0, 1.0, 1.0], steps_left=10) == 10
    assert metrics.eta_s([], steps_left=10) is None


def test_shares_are_of_all_chip_time() -> None:
    parts = Breakdown(
        duration_ns=100, num_chips=2, compute_ns=120, optimizer_ns=10, host_ns=0,
        exposed_ns=((Lane.TP, 30), (Lane.DP, 10)), bubble_ns=30,
    )  # fmt: skip
    assert metrics.exposed_communication(parts) == pytest.approx(0.2)
    assert metrics.exposed_communication(Breakdown(0, 0, 0, 0, 0, (), 0)) == 0


@given(records)
def test_records_come_back_as_written(
    tmp_path_factory: pytest.TempPathFactory, given: list[dict[str, object]]
) -> None:
    path = tmp_path_factory.mktemp("metrics") / "metrics.jsonl"
    given = [{k: v for k, v in record.items() if v not in UNREADABLE_AS_TEXT} for record in given]
    with MetricsWriter(path) as writer:
        for record in given:
            writer.write(record)  # type: ignore[arg-type]
    assert repr(list(read_metrics(path))) == repr(given)


def test_every_line_is_in_the_file_before_the_writer_closes(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path / "m.jsonl")
    writer.write({"step": 1, "loss": math.nan})
    assert math.isnan(read_metrics(tmp_path / "m.jsonl")[0]["loss"])  # type: ignore[arg-type]
    assert '"NaN"' in (tmp_path / "m.jsonl").read_text()
    writer.close()


def test_half_a_line_is_ignored_and_dropped_on_reopening(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "lo')
    assert read_metrics(path) == ({"step": 1},)
    with MetricsWriter(path) as writer:
        writer.write({"step": 2})
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_rewinding_drops_later_steps_and_keeps_the_rest(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    rewind_metrics(path, 5)
    assert not path.exists()
    with MetricsWriter(path) as writer:
        for record in ({"event": "start"}, {"step": 1}, {"step": 2}, {"step": 3}):
            writer.write(record)
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

    writer = MetricsWriter(tmp_path / "m.jsonl")
    writer.write({"step": 1})
    monkeypatch.setattr(metrics, "_line", full)
    with pytest.raises(RunError, match="disk is full"):
        writer.write({"step": 2})
    assert read_metrics(tmp_path / "m.jsonl") == ({"step": 1},)
