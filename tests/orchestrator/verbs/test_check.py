"""check: each kind of file gets its report, and a file that does not say its kind is told how."""

from pathlib import Path

import pytest

from comms.errors import ClusterError, ConfigError
from kernels.chips import CATALOG, chip_keys
from orchestrator.verbs.check import check

ROOT = Path(__file__).parents[3]


def write(tmp_path, text):
    path = tmp_path / "file.yaml"
    path.write_text(text)
    return path


def test_a_cluster_report_names_hosts_tiers_price_and_power():
    report = check(ROOT / "cluster_configs/dgx-a100.yaml")
    text = "\n".join(report.lines)
    assert report.kind == "cluster"
    assert "any number of hosts of 8 x NVIDIA A100 SXM 80 GB" in text
    assert "scale-up: 8 chips, 273.9 GB/s, 2 us, 31.6 us a collective" in text
    assert "infiniband: any number of chips, 24 GB/s, 1.3 us, 31.6 us a collective" in text
    assert "14 USD/h, 6.5 kW" in text


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("tpu-v5p-pod", "scale-up: 8960 chips (torus of 16 x 20 x 28), 90 GB/s, 1 us"),
        ("tenstorrent-galaxy", "scale-up: 32 chips (mesh of 4 x 8), 47 GB/s, 760 ns"),
        ("cerebras-cs3", "on-chip: 1 chip, 3.715 GB/s, 1.077 ns"),
        ("pcie-workstation", "pcie root: 4 chips, 4.95 GB/s (9.9 GB/s alone), 2.6 us"),
    ],
)
def test_a_cluster_report_names_shapes(name, line):
    assert line in check(ROOT / f"cluster_configs/{name}.yaml").lines


def test_the_facts_of_a_cluster_are_numbers_in_base_units():
    facts = check(ROOT / "cluster_configs/dgx-a100.yaml").facts
    assert (facts["num_hosts"], facts["chips_per_host"], facts["chips"]) == (
        None,
        8,
        ["nvidia_a100_sxm_80gb"],
    )
    assert (facts["num_chips"], facts["usd_per_hour"], facts["watts"]) == (8, 14.0, 6500.0)
    inner, outer = facts["tiers"]
    assert (inner["name"], inner["shape"], inner["num_chips"]) == ("scale-up", "switch", 8)
    assert (inner["latency_s"], inner["setup_s"]) == pytest.approx((2e-6, 31.6e-6))
    assert inner["bytes_per_s"] == pytest.approx(273.9e9, rel=1e-3)
    assert (outer["kind"], outer["num_chips"]) == ("scale_out", None)
    torus = check(ROOT / "cluster_configs/tpu-v5p-pod.yaml").facts["tiers"][0]
    assert (torus["shape"], torus["dims"]) == ("torus", [16, 20, 28])


def test_the_facts_of_a_chip_are_those_of_the_catalog():
    facts = check(CATALOG / "nvidia_l4.yaml").facts
    assert (facts["key"], facts["memory_bytes"], facts["peak_flops_per_s"]["fp16"]) == (
        "nvidia_l4",
        24e9,
        121e12,
    )


def test_the_facts_of_a_job_are_its_keys(tmp_path):
    facts = check(write(tmp_path, "kind: job\nversion: 1\nsteps: 7\nplan: {tp: 2}\n")).facts
    assert (facts["job"]["steps"], facts["job"]["plan"]["tp"], facts["names_own_code"]) == (7, 2, False)


def test_a_cluster_report_counts_conditions_and_names_other_shapes(tmp_path):
    text = (ROOT / "cluster_configs/tenstorrent-galaxy.yaml").read_text()
    text = text.replace("shape: mesh", "shape: full mesh").replace("  dims: [4, 8]", "  domain: 32")
    report = check(
        write(
            tmp_path,
            f"{text}\nconditions:\n  links: [{{from: 0, to: 9, down: true}}, {{from: 1, to: 2, factor: 0.5}}]\n"
            "  chips: [{chip: 3, slowdown: 2}]\n  jitter: {rate: 5 %}\n",
        )
    )
    assert "conditions: 2 links, 1 chip, jitter" in report.lines
    assert "scale-up: 32 chips (full mesh), 47 GB/s, 760 ns" in report.lines


@pytest.mark.parametrize(
    "path", sorted((ROOT / "cluster_configs").glob("*.yaml")), ids=lambda path: path.stem
)
def test_every_shipped_cluster_is_valid(path):
    assert check(path).kind == "cluster"


@pytest.mark.parametrize(
    ("links", "problem", "lines"),
    [
        (["[{chip: 31, tier: scale-up, down: true}]"], "chip 31 cut off by links that are down", [0]),
        (["", "- {from: 30, to: 31, down: true}", "- {from: 27, to: 31, down: true}"], "chip 31 cut", [1, 2]),
        (["[{from: 0, to: 9, down: true}]"], "there is no link from chip 0 to chip 9", [0]),
    ],
)
def test_a_network_that_falls_apart_is_refused_with_the_lines_that_do_it(tmp_path, links, problem, lines):
    text = (ROOT / "cluster_configs/tenstorrent-galaxy.yaml").read_text() + "conditions:\n"
    first = len(text.splitlines()) + 1
    path = write(tmp_path, f"{text}  links: " + "\n    ".join(links) + "\n")
    with pytest.raises(ClusterError) as error:
        check(path)
    assert problem in error.value.problem
    assert error.value.where == ", ".join(f"{path}:{first + line}" for line in lines)
    assert error.value.hint


def test_a_job_report_names_model_steps_and_plan(tmp_path):
    report = check(write(tmp_path, "kind: job\nversion: 1\nmodel: hf:gpt2\nplan: {dp: 4}\n"))
    assert report.kind == "job"
    assert "hf:gpt2" in report.lines[0]
    assert "dp 4 tp auto pp auto" in report.lines[2]


@pytest.mark.parametrize("key", chip_keys())
def test_every_catalog_file_passes_the_strict_schema(key):
    assert check(CATALOG / f"{key}.yaml").kind == "chip"


def test_a_chip_file_with_a_wrong_unit_is_refused(tmp_path):
    text = (CATALOG / "nvidia_l4.yaml").read_text().replace("72 W", "72 GB")
    with pytest.raises(ConfigError, match="a power is expected"):
        check(write(tmp_path, text))


@pytest.mark.parametrize(
    ("text", "problem", "hint"),
    [
        ("version: 1\n", "'kind' is missing", "cluster or job or chip"),
        ("kind: clutser\n", "kind cannot be 'clutser'", "did you mean 'cluster'?"),
        ("kind: 3\n", "kind cannot be 3", "cluster or job or chip"),
        ("", "'kind' is missing", "add `kind:`"),
        (
            "kind: cluster\nversion: 1\nname: a\nhosts: [{count: 1, chips: [{like: nvidia_l4, count: 1}]}]\n",
            "'device' is missing",
            "add `device: simulated` (or cpu, cuda)",
        ),
        ("kind: job\n", "'version' is missing", "add `version: 1`"),
    ],
)
def test_a_file_of_no_known_kind_is_told_how(tmp_path, text, problem, hint):
    with pytest.raises(ConfigError) as error:
        check(write(tmp_path, text))
    assert problem in error.value.problem
    assert hint in error.value.hint


def test_a_job_report_counts_tokens_of_text_only_and_says_what_it_does_not_look_up(tmp_path):
    text = "kind: job\nversion: 1\nsteps: 12\nglobal_batch: 64\n"
    lines = check(write(tmp_path, text)).lines
    assert "12 steps of 64 x 128 tokens" in lines and not any("looked up" in line for line in lines)
    lines = check(
        write(tmp_path, f"{text}model: mine.py:Net\ndata: mine.py:cifar\nloss: mine.py:loss\n")
    ).lines
    assert "12 steps of 64 samples" in lines
    assert "names of your code are not looked up here, but by plan and train" in lines
    lines = check(write(tmp_path, f"{text}optimizer: torch.optim:SGD\nlr_schedule: mine.py:later\n")).lines
    assert "names of your code are not looked up here, but by plan and train" in lines
