"""Claims about `orchestrate calibrate links`: constants are found again, errors are honest, what is pasted holds."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import yaml

from comms.calibration.calibration import Constants, FabricFit, LinkFit, Sheet, predict
from comms.calibration.measured_tables import MeasuredCurve, MeasuredPoint
from comms.collectives.schedule import Op, bus_factor
from comms.networks.links import Link
from orchestrator.config.hardware.line_rates import line_rate
from orchestrator.config.hardware.link_calibration import (
    REDUCING_SHARE,
    Calibration,
    MeasuredTable,
    calibrate_links,
    errors,
)
from orchestrator.verbs.check import check
from orchestrator.views.network.calibration_paste import paste

CONFIGS = Path(__file__).parents[3] / "cluster_configs"
A100 = CONFIGS / "dgx-a100.yaml"
SIZES = 2.0 ** np.arange(10, 31)
TRUE = Constants(setup_s=30e-6, latency_s=0.6e-6, share=0.8)


@pytest.fixture
def calibrate(orchestrate):
    """MeasuredRun `orchestrate calibrate` with these words: exit code, stdout, stderr."""
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


def pasted_into(path: Path, text: str, target: Path) -> Path:
    """A cluster file with these keys where the text says that they belong."""
    file = yaml.safe_load(path.read_text())
    for block in text.split("# under ")[1:]:
        heading, keys = block.split("\n", 1)
        for section in sections_of(file, heading.split("; fitted to ")[0]):
            section |= yaml.safe_load(keys)
    target.write_text(yaml.safe_dump(file))
    return target


def sections_of(file: dict, name: str) -> list[dict]:
    first, *inner = name.split(", ")
    match first:
        case "scale_up":
            found = [file["scale_up"]]
        case "scale_out":
            found = [level for level in file["scale_out"] if f"level {level['name']}" == inner[0]]
            inner = []
        case _:
            found = file["hosts"]
    for key in inner:
        found = [section.setdefault(key, {}) for section in found]
    assert found, name
    return found


def calibrated(path: Path, num_chips: int, latency_s: float, share: float, op: Op | None) -> Calibration:
    """As if these figures had been fitted."""
    line, table = line_rate(path, num_chips), MeasuredTable("a.csv", MeasuredCurve(op, num_chips, ()))
    if op is None:
        fit = LinkFit(Link(latency_s, share * line.alone.bytes_per_s), ())
        return Calibration((table,), None, fit, line, (), None, None)
    constants = Constants(30e-6, latency_s, share, eager_share=0.1, handshake_s=latency_s)
    fabric = constants.on(Sheet(line.together.bytes_per_s, REDUCING_SHARE if line.reduces else None))
    return Calibration((table,), FabricFit(constants, (fabric,), ((),), True), None, line, (), None, None)


PLACES = [
    ("dgx-a100", 8),
    ("dgx-a100", 16),
    ("dgx-h100-superpod", 8),
    ("dgx-h100-superpod", 64),
    ("dgx-h100-superpod", 512),
    ("laptop", 2),
    ("laptop", 4),
    ("laptop", 8),
    ("pcie-workstation", 2),
    ("pcie-workstation", 4),
    ("two-host-ethernet", 2),
    ("two-host-ethernet", 4),
    ("tenstorrent-galaxy", 32),
    ("cerebras-cs3", 4),
]


@pytest.mark.parametrize("op", [None, Op.ALL_REDUCE, Op.ALL_TO_ALL], ids=str)
@pytest.mark.parametrize(("cluster", "num_chips"), PLACES)
def test_what_is_pasted_is_valid_whatever_was_measured(tmp_path, cluster, num_chips, op):
    path = CONFIGS / f"{cluster}.yaml"
    for latency_s in (0.0, 1.99999e-6, 2.34567e-6, 40e-6):
        for share in (0.0123456, 0.95999, 1.0) if op else (0.0123456, 0.5, 1.7):
            text = paste(calibrated(path, num_chips, latency_s, share, op))
            assert check(pasted_into(path, text, tmp_path / "changed.yaml")).kind == "cluster", text


@pytest.mark.parametrize(("cluster", "num_chips"), PLACES)
def test_a_pasted_message_is_what_the_cluster_file_then_predicts(tmp_path, cluster, num_chips):
    path = CONFIGS / f"{cluster}.yaml"
    share = 0.9 if cluster.startswith("dgx") else 0.7  # above protocols, below the links on the way
    found = calibrated(path, num_chips, 30e-6, share, op=None)
    line = line_rate(pasted_into(path, paste(found), tmp_path / "changed.yaml"), num_chips)
    latency_s = line.tier.link.latency_s + line.tier.issue_s
    assert latency_s == pytest.approx(30e-6)
    assert line.tier.link.bytes_per_s == pytest.approx(found.link.link.bytes_per_s, rel=0.01)


@pytest.mark.parametrize(
    ("cluster", "num_chips", "rate", "headings"),
    [
        ("dgx-a100", 8, 300e9, ["scale_up"]),
        ("dgx-a100", 16, 25e9, ["hosts, nics"]),
        ("dgx-h100-superpod", 512, 50e9, ["scale_out, level spine", "hosts, nics"]),
        ("laptop", 8, 3.125e9, ["hosts, nics"]),
        ("laptop", 4, 31.5e9, ["hosts, pcie, root"]),
        ("tenstorrent-galaxy", 32, 50e9, ["scale_up"]),
        ("cerebras-cs3", 2, 12 * 12.5e9, ["hosts, nics"]),
    ],
)
def test_a_message_is_held_against_what_one_message_can_use(
    answer, tmp_path, cluster, num_chips, rate, headings
):
    table = csv_file(tmp_path / "p2p.csv", 40e-6 + SIZES / (0.5 * rate))
    found = answer("links", table, "--chips", num_chips, "--cluster", cluster)
    assert found["line_rate_bytes_per_s"] == pytest.approx(rate)
    lines = found["paste"].splitlines()
    assert [line for line in lines if line.startswith("#")] == [
        f"# under {heading}; fitted to p2p.csv" for heading in headings
    ]
    assert "latency: 40 us" in lines


@pytest.mark.parametrize(
    ("cluster", "num_chips", "algorithms"),
    [
        ("dgx-a100", 8, ["ring"]),
        ("laptop", 8, ["ring"]),  # one card
        ("dgx-a100", 16, ["hierarchical ring"]),  # a flat ring leaves a host by one card of eight
        ("dgx-h100-superpod", 64, ["hierarchical ring"]),
        ("tenstorrent-galaxy", 32, None),  # a flat ring uses one link of four
    ],
)
def test_a_pasted_protocol_is_for_rings_that_reach_the_line_rate(cluster, num_chips, algorithms):
    found = calibrated(CONFIGS / f"{cluster}.yaml", num_chips, 1e-6, 0.5, Op.ALL_REDUCE)
    assert yaml.safe_load(paste(found))["protocols"][0].get("algorithms") == algorithms


def test_constants_of_collectives_between_hosts_raise_what_a_message_takes(answer, tmp_path):
    seconds = predict(Constants(30e-6, 5e-6, 0.99).on(Sheet(200e9)), Op.ALL_REDUCE, 16, SIZES)
    table = csv_file(tmp_path / "a.csv", seconds)
    words = ("--op", "all_reduce", "--chips", 16, "--cluster", "dgx-a100")
    text = answer("links", table, *words)["paste"]
    level, cards = (yaml.safe_load(block) for block in text.split("# under hosts, nics; fitted to a.csv\n"))
    assert text.startswith("# under scale_out, level infiniband; ")
    assert set(level) == {"setup", "protocols"}
    assert cards["efficiency"] == level["protocols"][0]["share"] > 0.96
    assert cards["latency"] == level["protocols"][0]["latency"]
    assert check(pasted_into(A100, text, tmp_path / "changed.yaml"))


@pytest.mark.parametrize(
    ("cluster", "num_chips", "rate", "within"),
    [
        ("dgx-a100", 8, 300e9, 0.01),
        ("two-host-ethernet", 2, 20e9, 0.01),
        ("pcie-workstation", 4, 11e9, 0.1),  # two of four stages are behind one switch, and quicker
    ],
)
def test_what_is_pasted_makes_the_cluster_file_predict_what_was_fitted(
    tmp_path, cluster, num_chips, rate, within
):
    path = CONFIGS / f"{cluster}.yaml"
    seconds = seconds_of(Op.ALL_REDUCE, num_chips, rate) * (1 + 0.05 * np.sin(np.arange(len(SIZES))))
    points = tuple(MeasuredPoint(float(n), float(s)) for n, s in zip(SIZES, seconds, strict=True))
    table = MeasuredTable("measured", MeasuredCurve(Op.ALL_REDUCE, num_chips, points))
    fitted = calibrate_links([table], [line_rate(path, num_chips)])
    path = pasted_into(path, paste(fitted), tmp_path / "calibrated.yaml")
    again = calibrate_links([table], [line_rate(path, num_chips)])
    assert errors(again.as_it_is) == pytest.approx(errors(fitted.residuals), abs=within)


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
    assert yaml.safe_load(found["paste"]) == {"latency": "5 us", "bandwidth": "20 GB/s", "efficiency": 1}
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
    assert (found.together.bytes_per_s, found.sections.library) == (pytest.approx(rate), section)


@pytest.mark.parametrize(
    ("text", "words", "expected"),
    [
        ("size,time_us\n1024,1\n2048,2\n", ("--op", "all_reduce"), "--chips"),
        ("size,time_us\n1024,1\n2048,2\n", ("--op", "all_reduce", "--chips", "8"), "4 sizes or more"),
        ("size,time_us\n1024,1\n", (), "two sizes"),
        ("hello", (), "do: "),
        ("size,time_us\n1024,x\n2048,2\n", (), "line 2"),
        ("size,time_us\n1024,1\n2048,2\n", ("--op", "allreduce"), "did you mean 'all_reduce'?"),
    ],
)
def test_what_cannot_be_fitted_is_three_lines(calibrate, tmp_path, text, words, expected):
    path = tmp_path / "table.csv"
    path.write_text(text)
    code, out, err = calibrate("links", path, *words)
    assert (code, out) == (2, "")
    assert expected in err
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
