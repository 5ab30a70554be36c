"""scale: the figures are those of simulate; nothing is worked out twice; files say what the sweep says."""

import csv
import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from comms.errors import ConfigError
from orchestrator.config.hardware.cluster_file import cluster_path, load_cluster
from orchestrator.config.job_file import load_job
from orchestrator.planning.preparation import prepare
from orchestrator.runners.timing.prediction import simulate
from orchestrator.sweeps import point_pool
from orchestrator.sweeps.point_pool import Found, Group, groups_of, here
from orchestrator.sweeps.point_prediction import plan_of
from orchestrator.sweeps.points import Status
from orchestrator.sweeps.sweep_files import csv_text, document, mllog_lines, rows, write_sweep
from orchestrator.sweeps.sweep_result import Sweep
from orchestrator.verbs import scale as verb
from orchestrator.verbs.scale import scale

Make = Callable[..., Any]
DGX = load_cluster(cluster_path("dgx-a100"))
NAMED = (
    "model=builtin:gpt-nano",
    "model_args={layers: 2, width: 32, heads: 4, vocab: 256, max_seq: 16}",
    "seq=16",
    "plan.tp=1",  # one way to cut is enough here
)


@pytest.fixture(scope="module")
def sweep() -> Sweep:
    job = load_job(None, (*NAMED, "global_batch=16"))
    return scale(DGX, job, chips=[1, 4, 16, 64], mode="both", workers=1)


def test_the_figures_are_those_of_simulate(sweep: Sweep) -> None:
    for point, result in list(zip(sweep.points, sweep.results, strict=True))[::3]:
        assert result is not None and result.status is Status.OK
        alone = simulate(prepare(point.cluster, point.job, plan_of(result)).program, point.cluster)
        assert (result.step_time_s, result.mfu, result.tokens_per_s) == (
            alone.step_time_s, alone.mfu, alone.tokens_per_s)  # fmt: skip
        assert result.peak_memory_bytes == max(role.peak_bytes for role in alone.memory)
        parts = [result.compute_s, result.optimizer_s, result.host_s, result.bubble_s]
        assert sum(parts) + sum(result.exposed_communication_s.values()) == pytest.approx(result.step_time_s)


def test_points_are_predicted_once_and_a_sweep_that_was_interrupted_goes_on(
    sweep: Sweep, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("predicted again")

    monkeypatch.setattr(point_pool.Predictor, "predict", refuse)
    job = load_job(None, (*NAMED, "global_batch=16"))
    again = scale(DGX, job, chips=[1, 4, 16, 64], mode="both", workers=1)
    assert again.results == sweep.results
    with pytest.raises(AssertionError, match="predicted again"):
        scale(DGX, job, chips=[1, 4, 16, 32], workers=1)


def test_an_interrupted_sweep_keeps_what_is_there(sweep: Sweep, tmp_path: Path) -> None:
    def interrupted(groups: list[Group]) -> Iterator[Found]:
        for number, found in enumerate(here()(groups)):
            if number == 3:
                raise KeyboardInterrupt
            yield found

    file = verb._from_file.__globals__["validate"](
        verb.Document("here", {"kind": "sweep", "version": 1, "chips": [1, 4, 16, 64]}, {}), verb.SweepFile
    )
    part = verb.swept(file, DGX, load_job(None, (*NAMED, "global_batch=16")), interrupted)  # type: ignore[arg-type]
    assert [result is None for result in part.results] == [False, False, False, True]
    assert not part.is_complete and "interrupted" in part.findings[-1]
    write_sweep(tmp_path, part, 0)
    assert len(list(csv.DictReader((tmp_path / "points.csv").open()))) == 3


def test_a_point_that_cannot_be_is_a_row_with_its_reason() -> None:
    job = load_job(None, (*NAMED, "global_batch=4", "plan.pp=1"))
    found = scale(DGX, job, chips=[1, 8], mode="strong", workers=1)
    first, second = found.results
    assert first is not None and second is not None
    assert (first.status, second.status) == (Status.OK, Status.REFUSED)
    assert "global_batch 4 is not a multiple of dp 8" in second.reason
    assert "refused" in found.tables()[0].rows[1][1]


def test_the_csv_file_reads_back_equal(sweep: Sweep) -> None:
    wanted = rows(sweep)
    found = list(csv.DictReader(csv_text(sweep).splitlines()))
    assert len(found) == len(wanted) == 8
    for read, row in zip(found, wanted, strict=True):
        for name, value in row.items():
            assert read[name] == "" if value is None else type(value)(read[name]) == value, name


def test_the_page_is_whole_and_asks_nobody_for_anything(sweep: Sweep, tmp_path: Path) -> None:
    write_sweep(tmp_path, sweep, 0)
    page = (tmp_path / "index.html").read_text()
    assert len(page) < 1_000_000
    assert page == sweep.page()  # the same sweep gives the same bytes
    assert page.count("<svg") == 4 and page.rstrip().endswith("</html>")
    assert not re.search(r"(src|href)\s*=\s*[\"'](?!#)|url\((?!#)|@import|<script|<link", page)
    for said in (
        "weak scaling: the global batch grows",
        "strong scaling: the global batch is the same",
        "MFU: FLOPs",
    ):
        assert said in page
    assert {path.name for path in tmp_path.iterdir()} == {
        "index.html", "mllog.txt", "points.csv", "result.json", "scaling.png", "scaling.svg"}  # fmt: skip


def test_lines_for_mlperf_are_json_with_the_batch_and_the_throughput_of_each_point(sweep: Sweep) -> None:
    lines = list(mllog_lines(sweep, 17))
    found = [json.loads(line.removeprefix(":::MLLOG ")) for line in lines]
    assert all(line.startswith(":::MLLOG {") for line in lines)
    assert {line["time_ms"] for line in found} == {17}
    stats = [line["value"] for line in found if line["key"] == "tracked_stats"]
    assert [each["throughput"] for each in stats] == [row["tokens_per_s"] for row in rows(sweep)]


def test_the_ideal_line_starts_at_the_first_point(sweep: Sweep) -> None:
    panel = sweep.panels[0]
    predicted, ideal = panel.lines[:2]
    assert ideal.places[0] == predicted.places[0]
    assert ideal.places[-1][1] == pytest.approx(predicted.places[0][1] * 64)


def test_a_series_names_what_moves_its_knee(sweep: Sweep) -> None:
    for lever in sweep.levers:
        assert set(lever.efficiencies) == {
            "as it is",
            "bandwidth x2",
            "latency /2",
            "compute x2",
            "memory x2",
        }
        at = {point.chips: point.efficiency for point in sweep.curve(lever.row.points[0].series)}
        assert lever.efficiencies["as it is"] == pytest.approx(at[lever.beyond], rel=0.03)
    assert document(sweep)["findings"] == sweep.findings


def test_series_of_one_model_are_dealt_out_over_the_cores(sweep: Sweep) -> None:
    groups = groups_of(sweep.points, 2)
    assert sorted(number for group in groups for row in group for number in row.numbers) == list(range(8))
    assert [len(group) for group in groups] == [1, 1]
    assert [len(group) for group in groups_of(sweep.points, 1)] == [2]


def test_a_sweep_draws_itself(sweep: Sweep, tmp_path: Path) -> None:
    sweep.plot(tmp_path / "scaling.svg")
    assert (tmp_path / "scaling.svg").read_text().startswith("<?xml")
    assert "efficiency" in str(sweep) and "<figure>" in sweep.html()
    with pytest.raises(ConfigError, match=r"a picture is a \.png or \.svg file"):
        sweep.plot(tmp_path / "scaling.gif")


def test_the_command_line_says_what_a_sweep_file_says(
    orchestrate: Make, orchestrate_json: Callable[..., Mapping[str, Any]], tmp_path: Path
) -> None:
    sets = [word for text in (NAMED[1], NAMED[3]) for word in ("--set", text)]
    flags = ("--cluster", "dgx-a100", "--model", "builtin:gpt-nano", "--seq", 16, "--chips", "1,4", "--mode", "strong",
             "--global-batch", 16, "--vary", "bandwidth=1,2", *sets)  # fmt: skip
    asked = orchestrate_json("scale", *flags, "--out", tmp_path / "out")
    assert (tmp_path / "out" / "index.html").is_file()
    file = tmp_path / "sweep.yaml"
    file.write_text(
        "kind: sweep\nversion: 1\ncluster: dgx-a100\nchips: [1, 4]\nmodes: [strong]\nvary: {bandwidth: [1.0, 2.0]}\n"
        f"set: {json.dumps([*NAMED, 'global_batch=16'])}\n"
    )
    assert orchestrate_json("scale", file) == asked
    assert orchestrate("check", file).code == 0
    for words, said in (
        ((file, "--chips", "8"), "--chips beside a sweep file"),
        (("--model", "builtin:gpt-nano"), "no numbers of chips"),
        (("--chips", "8", "--vary", "seq"), "cannot read 'seq'"),
        (("--chips", "8", "--vary", "sqe=8"), "unknown key 'vary.sqe'"),
    ):
        ran = orchestrate("scale", *words)
        assert (ran.code, said in ran.err) == (2, True), ran.err


def test_a_point_is_measured_by_real_steps_beside_its_prediction(laptop: Any, undrawn: None) -> None:
    job = load_job(None, (*NAMED, "global_batch=4"))
    found = scale(laptop, job, chips=[1, 2], mode="strong", measure="inline", workers=1)
    for result in found.results:
        assert result is not None and result.measured is not None
        steps = result.measured
        assert steps.steps == 6 and 0 < steps.p10_s <= steps.p50_s <= steps.p90_s
        assert steps.tokens_per_s * steps.p50_s == pytest.approx(4 * 16)
    assert any(line.stroke == "measured" for line in found.panels[0].lines)


def test_a_point_that_cannot_be_measured_is_still_predicted(laptop: Any) -> None:
    job = load_job(None, (*NAMED, "model_args.vocab=64", "global_batch=4"))
    found = scale(laptop, job, chips=[1], mode="strong", measure="inline", workers=1)
    (result,) = found.results
    assert result is not None and result.status is Status.OK and result.measured is None
    assert "1 chips: not measured: a vocabulary of 64 is too small for bytes" in found.findings[-1]


def test_the_commands_and_the_file_of_the_page_work(
    orchestrate: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (Path(__file__).parents[3] / "docs" / "scaling.md").read_text()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(verb, "over_cores", lambda _: here())  # processes are tried above
    Path("sweep.yaml").write_text("".join(re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)))
    commands = re.findall(r"```sh\n(.*?)```", page, re.DOTALL) + re.findall(
        r"`(orchestrate \w+ [^`]*yaml[^`]*)`", page
    )
    assert len(commands) == 3
    for command in commands:
        ran = orchestrate(*command.split()[1:])
        assert ran.code == 0, (command, ran.err)
    assert Path("scaling/index.html").is_file()
