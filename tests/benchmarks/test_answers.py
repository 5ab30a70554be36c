"""The tool that compares answers: what is an answer must be equal, what the clock says need not be."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "benchmarks" / "tools" / "answers.py"
SIMULATED = {
    "exit_code": 0,
    "stdout": {"step_time_s": 0.25, "elapsed_s": 1.5, "loading_s": 2.0, "roles": [{"bubble_s": 0.0}]},
}
BENCHMARK = {"benchmark": "synthesis", "cores": 2, "rows": [{"least_s": 1e-5, "to_find_s": 3.0}]}


def folder(path: Path, simulated: object, benchmark: object) -> Path:
    path.mkdir()
    (path / "simulate-cluster-laptop.json").write_text(json.dumps(simulated))
    (path / "synthesis.json").write_text(json.dumps(benchmark))
    return path


def compared(*folders: Path) -> tuple[int, list[str]]:
    command = [sys.executable, str(TOOL), "compare", *map(str, folders)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout.splitlines()


def test_answers_are_equal_whatever_the_clock_said(tmp_path):
    before = folder(tmp_path / "before", SIMULATED, BENCHMARK)
    slower = SIMULATED | {"stdout": SIMULATED["stdout"] | {"elapsed_s": 9.0, "loading_s": 0.0}}
    elsewhere = BENCHMARK | {"cores": 64, "rows": [{"least_s": 1e-5, "to_find_s": 0.1}]}
    assert compared(before, folder(tmp_path / "after", slower, elsewhere)) == (0, ["2 answers equal"])


def test_what_differs_is_told_with_both_values(tmp_path):
    before = folder(tmp_path / "before", SIMULATED, BENCHMARK)
    other = SIMULATED | {"stdout": {"step_time_s": 0.25, "roles": [{"bubble_s": 1}, {"bubble_s": 2}]}}
    after = folder(tmp_path / "after", other, BENCHMARK | {"rows": []})
    assert compared(before, after) == (
        1,
        [
            "simulate-cluster-laptop.stdout.roles.0.bubble_s, one of 2: 0.0 -> 1",
            "simulate-cluster-laptop.stdout.roles.1.bubble_s, one of 2: - -> 2",
            "synthesis.rows.0.least_s, one of 2: 1e-05 -> -",
            "synthesis.rows, one of 2: - -> []",
            "2 of 2 answers differ",
        ],
    )


def test_an_answer_that_one_side_lacks_differs_and_no_answers_are_no_success(tmp_path):
    before = folder(tmp_path / "before", SIMULATED, BENCHMARK)
    after = folder(tmp_path / "after", SIMULATED, BENCHMARK)
    (after / "synthesis.json").unlink()
    assert compared(before, after)[0] == 1
    assert compared(tmp_path / "nowhere", tmp_path / "nowhere") == (1, ["0 answers equal"])


def test_every_shipped_cluster_is_asked_about():
    text = TOOL.read_text().partition('CLUSTERS = """{')[2].partition("}")[0]
    asked = {choice.split()[0] for choice in text.split("|")}
    assert asked == {path.stem for path in (ROOT / "cluster_configs").glob("*.yaml")}
