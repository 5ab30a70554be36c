"""Claims about `orchestrate calibrate links`: constants are found again, errors are honest, what is pasted holds."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import yaml

from comms.calibration import Constants, Sheet, predict
from comms.measured_tables import MeasuredCurve, MeasuredPoint, bus_factor
from comms.schedule import Op
from orchestrator.calibration_report import paste
from orchestrator.line_rates import line_rate
from orchestrator.link_calibration import Table, calibrate_links, errors

CONFIGS = Path(__file__).parents[2] / "cluster_configs"
A100 = CONFIGS / "dgx-a100.yaml"
SIZES = 2.0 ** np.arange(10, 31)
TRUE = Constants(setup_s=30e-6, latency_s=0.6e-6, share=0.8)


@pytest.fixture
def calibrate(orchestrate):
    """Run `orchestrate calibrate` with these words: exit code, stdout, stderr."""
    return partial(orchestrate, "calibrate")


@pytest.fixture
def answer(orchestrate_json):
    """The JSON of a run that must succeed."""
    return partial(orchestrate_json, "calibrate")


def seconds_of(op: Op, num_chips: int, rate: float = 300e9) -> np.ndarray:
    return predict(TRUE.on(Sheet(rate)), op, num_chips, SIZES)


def csv_file(path: Path, seconds: np.ndarray, sizes: np.ndarray = SIZES) -> Path:
    rows = [f"{size:.0f},{each * 1e6:.6f}" for size, each in zip(sizes, seconds, strict=True)]
    path.write_text("\n".join(["size,time_us", *rows]) + "\n")
    return path


def nccl_text(op: str, num_chips: int, seconds: np.ndarray) -> str:
    lines = [f"# {op}_perf -b 1K -e 1G -f 2 -g {num_chips}"]
    lines += [f"#  Rank  {rank} Group  0 Pid  1 on   host device  {rank}" for rank in range(num_chips)]
    lines.append("#  size count type redop root time algbw busbw #wrong time algbw busbw #wrong")
    for size, each in zip(SIZES, seconds, strict=True):
        alg = size / each / 1e9
        half = f"{each * 1e6:.4f} {alg:.4f} {alg * 2 * (num_chips - 1) / num_chips:.4f} 0"
        lines.append(f"{size:.0f} {size / 4:.0f} float sum -1 {half} {half}")
    return "\n".join(lines)


def test_constants_and_errors_of_a_table_that_the_model_made(answer, tmp_path):
    table = csv_file(tmp_path / "a.csv", seconds_of(Op.ALL_REDUCE, 8))
    found = answer("links", table, "--op", "all_reduce", "--chips", 8, "--cluster", "dgx-a100")
    assert found["line_rate_bytes_per_s"] == 300e9
    assert found["constants"]["setup_s"] == pytest.approx(30e-6, rel=0.02)
    assert found["constants"]["latency_s"] == pytest.approx(0.6e-6, rel=0.1)
    assert found["constants"]["share"] == pytest.approx(0.8, rel=0.02)
    for which in ("fitted", "held_out"):
        assert max(found[which].values()) < 0.01
    assert len(found["tables"][0]["points"]) == len(SIZES)


def test_a_table_of_nccl_tests_says_operation_and_chips_itself(answer, calibrate, tmp_path):
    path = tmp_path / "out.txt"
    path.write_text(nccl_text("all_reduce", 8, seconds_of(Op.ALL_REDUCE, 8)))
    (table,) = answer("links", path)["tables"]
    assert (table["op"], table["num_chips"]) == ("all_reduce", 8)
    code, _, err = calibrate("links", path, "--op", "all_gather")
    assert (code, "is of all_reduce" in err) == (2, True)


def test_residuals_are_predicted_over_measured(answer, tmp_path):
    table = csv_file(tmp_path / "a.csv", seconds_of(Op.ALL_REDUCE, 8) * np.where(SIZES == 2**20, 1.5, 1.0))
    points = answer("links", table, "--op", "all_reduce", "--chips", 8)["tables"][0]["points"]
    off = next(point for point in points if point["nbytes"] == 2**20)
    assert off["error"] == pytest.approx(off["predicted_s"] / off["measured_s"] - 1)
    assert off["error"] < -0.2
    assert off["held_out_error"] < -0.2


def test_several_tables_of_one_fabric_are_fitted_together(answer, tmp_path):
    paths = [tmp_path / f"{op}.txt" for op in ("all_reduce", "all_gather")]
    paths[0].write_text(nccl_text("all_reduce", 8, seconds_of(Op.ALL_REDUCE, 8)))
    paths[1].write_text(nccl_text("all_reduce", 4, seconds_of(Op.ALL_REDUCE, 4)))
    found = answer("links", *paths, "--cluster", "dgx-a100")
    assert [table["num_chips"] for table in found["tables"]] == [8, 4]
    assert found["fitted"]["mean_error_from_1_mib"] < 0.01


def test_what_is_pasted_makes_the_cluster_file_predict_what_was_fitted(tmp_path):
    seconds = seconds_of(Op.ALL_REDUCE, 8) * (1 + 0.05 * np.sin(np.arange(len(SIZES))))
    points = tuple(MeasuredPoint(float(n), float(s)) for n, s in zip(SIZES, seconds, strict=True))
    table = Table("measured", MeasuredCurve(Op.ALL_REDUCE, 8, points))
    fitted = calibrate_links([table], [line_rate(A100, 8)])
    file = yaml.safe_load(A100.read_text())
    for key in ("setup", "protocols"):
        file["scale_up"].pop(key, None)
    file["scale_up"] |= yaml.safe_load(paste(fitted))
    path = tmp_path / "calibrated.yaml"
    path.write_text(yaml.safe_dump(file))
    again = calibrate_links([table], [line_rate(path, 8)])
    assert errors(again.as_it_is).large == pytest.approx(errors(fitted.residuals).large, abs=0.01)
    assert errors(again.as_it_is).small == pytest.approx(errors(fitted.residuals).small, abs=0.01)


def test_without_a_cluster_the_rate_is_pasted_instead_of_a_share(answer, tmp_path):
    table = csv_file(tmp_path / "a.csv", seconds_of(Op.ALL_REDUCE, 8))
    found = answer("links", table, "--op", "all_reduce", "--chips", 8)
    assert (found["line_rate_bytes_per_s"], found["cluster"]) == (None, None)
    assert found["constants"]["bytes_per_s"] == pytest.approx(240e9, rel=0.02)
    pasted = yaml.safe_load(found["paste"])
    assert pasted["bandwidth"].endswith(" GB/s")
    assert [each["share"] for each in pasted["protocols"] if each["name"] == "pipelined"] == [1]


def test_messages_from_chip_to_chip_have_a_latency_and_a_rate(answer, tmp_path):
    table = csv_file(tmp_path / "p2p.csv", 5e-6 + SIZES / 20e9)
    found = answer("links", table)
    assert found["constants"] == pytest.approx({"latency_s": 5e-6, "bytes_per_s": 20e9}, rel=1e-3)
    assert yaml.safe_load(found["paste"]) == {"latency": "5 us", "bandwidth": "20 GB/s"}
    with_share = answer("links", table, "--cluster", "laptop")
    assert yaml.safe_load(with_share["paste"])["efficiency"] == pytest.approx(20 / 31.5, rel=0.01)


def test_a_table_without_an_operation_is_taken_as_messages_and_that_is_said(calibrate, tmp_path):
    code, _, err = calibrate("links", csv_file(tmp_path / "p2p.csv", 5e-6 + SIZES / 20e9))
    assert (code, "names no operation" in err) == (0, True)


@pytest.mark.parametrize(
    ("cluster", "num_chips", "rate", "section"),
    [
        ("dgx-a100", 8, 300e9, "scale_up"),
        ("dgx-a100", 16, 200e9, "scale_out, level infiniband"),
        ("laptop", 2, 31.5e9, "hosts, pcie"),
        ("laptop", 8, 3.125e9, "scale_out, level ethernet"),
        ("tenstorrent-galaxy", 32, 400e9 / 2, "scale_up"),
    ],
)
def test_line_rates_are_those_of_the_links_between_the_chips(cluster, num_chips, rate, section):
    found = line_rate(CONFIGS / f"{cluster}.yaml", num_chips)
    assert (found.bytes_per_s, found.section) == (pytest.approx(rate), section)


@pytest.mark.parametrize(
    ("text", "words", "told"),
    [
        ("size,time_us\n1024,1\n2048,2\n", ("--op", "all_reduce"), "--chips"),
        ("size,time_us\n1024,1\n2048,2\n", ("--op", "all_reduce", "--chips", "8"), "4 sizes or more"),
        ("size,time_us\n1024,1\n", (), "two sizes"),
        ("hello", (), "do: "),
        ("size,time_us\n1024,x\n2048,2\n", (), "line 2"),
        ("size,time_us\n1024,1\n2048,2\n", ("--op", "allreduce"), "did you mean 'all_reduce'?"),
    ],
)
def test_what_cannot_be_fitted_is_three_lines(calibrate, tmp_path, text, words, told):
    path = tmp_path / "table.csv"
    path.write_text(text)
    code, out, err = calibrate("links", path, *words)
    assert (code, out) == (2, "")
    assert told in err
    assert "Traceback" not in err


def test_tables_of_different_tiers_and_of_different_kinds_are_refused(calibrate, tmp_path):
    inside, outside = tmp_path / "inside.txt", tmp_path / "outside.txt"
    inside.write_text(nccl_text("all_reduce", 8, seconds_of(Op.ALL_REDUCE, 8)))
    outside.write_text(nccl_text("all_reduce", 16, seconds_of(Op.ALL_REDUCE, 16)))
    code, _, err = calibrate("links", inside, outside, "--cluster", "dgx-a100")
    assert (code, "one tier at a time" in err) == (2, True)
    messages = csv_file(tmp_path / "p2p.csv", 5e-6 + SIZES / 20e9)
    code, _, err = calibrate("links", inside, messages)
    assert (code, "one kind at a time" in err) == (2, True)


@pytest.mark.parametrize("words", [(), ("links",), ("chip", "a.csv"), ("links", "no-such-file.csv")])
def test_something_to_calibrate_and_a_table_are_needed(calibrate, words):
    assert calibrate(*words)[0] == 2


def test_the_picture_shows_bus_bandwidth_and_is_the_same_every_time(calibrate, tmp_path):
    path = csv_file(tmp_path / "a.csv", seconds_of(Op.ALL_REDUCE, 8))
    drawn = []
    for name in ("one.png", "two.png"):
        words = ("--op", "all_reduce", "--chips", 8, "--plot", tmp_path / name)
        assert calibrate("links", path, *words)[0] == 0
        drawn.append((tmp_path / name).read_bytes())
    assert drawn[0] == drawn[1]
    assert drawn[0].startswith(b"\x89PNG")
    assert bus_factor(Op.ALL_REDUCE, 8) == 1.75
