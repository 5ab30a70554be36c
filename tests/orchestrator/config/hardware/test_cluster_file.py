"""Cluster files: what they mean, what `take` gives, and how every mistake is reported."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from comms.errors import ClusterError, ConfigError, UserError
from comms.networks.links import Link
from comms.networks.network import TierKind
from kernels.chips import load_chip
from orchestrator.config.hardware.cluster import Device
from orchestrator.config.hardware.cluster_file import ClusterFile, cluster_from, load_cluster
from orchestrator.config.job_file import Job
from orchestrator.config.sweep_file import SweepFile
from orchestrator.config.yaml_file import parse_yaml

ROOT = Path(__file__).parents[4]
SHIPPED = sorted((ROOT / "cluster_configs").glob("*.yaml"))

MINIMAL = """\
kind: cluster
version: 1
name: two hosts
device: simulated
repeat: 2
hosts:
  - chips:
      - like: nvidia_a100_sxm_80gb
        count: 4
    nics: {count: 2, bandwidth: 200 Gb/s, latency: 2 us}
    power: 1 kW
    price: 3 USD/h
"""


def cluster(text):
    return cluster_from(parse_yaml(text, "c.yaml"))


def without_cards(text):
    return text.replace("    nics: {count: 2, bandwidth: 200 Gb/s, latency: 2 us}\n", "")


def with_pcie(keys, text=MINIMAL):
    return text.replace("    nics:", f"    pcie: {{{keys}}}\n    nics:")


def errors_of(text):
    with pytest.raises(UserError) as error:
        cluster(text)
    return error.value.findings


def test_a_file_becomes_a_cluster():
    found = cluster(MINIMAL)
    assert (found.num_chips, found.chips_per_host, found.num_hosts) == (8, 4, 2)
    assert found.chip(7) == load_chip("nvidia_a100_sxm_80gb")
    assert found.device is Device.SIMULATED
    assert found.usd_per_hour == 8 * 1.75 + 2 * 3
    assert found.watts == 8 * 400 + 2 * 1000


def test_a_card_is_shared_by_the_chips_that_send_at_once():
    outer = cluster(MINIMAL).network.tiers[-1]
    assert (outer.kind, outer.size) == (TierKind.SCALE_OUT, 8)
    assert outer.link == Link(2e-6, 25e9)
    assert outer.loaded_link == Link(2e-6, 2 * 25e9 / 4)


def test_what_a_file_leaves_out_comes_from_the_chip():
    found = cluster(MINIMAL + "scale_up: {}\n").network.tiers[0]
    assert (found.kind, found.size) == (TierKind.SCALE_UP, 4)
    assert found.link == Link(2e-6, 300e9 * 0.91)


def test_overrides_replace_single_figures():
    text = MINIMAL.replace("count: 4\n", "count: 4\n        memory: {capacity: 40 GB}\n        tdp: 250 W\n")
    chip, base = cluster(text).chip(0), load_chip("nvidia_a100_sxm_80gb")
    assert (chip.memory_bytes, chip.tdp_w) == (40 * 10**9, 250.0)
    assert (chip.memory_bytes_per_s, chip.peak("bf16")) == (base.memory_bytes_per_s, base.peak("bf16"))
    assert chip.key != base.key


def test_a_new_chip_needs_no_catalog():
    own = "name: mine\n        peak: {bf16: 1 TFLOP/s}\n        memory: {capacity: 1 GB, bandwidth: 10 GB/s}"
    text = (
        MINIMAL.replace("like: nvidia_a100_sxm_80gb", own) + "scale_up: {bandwidth: 1 GB/s, latency: 5 us}\n"
    )
    found = cluster(text)
    assert (found.chip(0).name, found.chip(0).peak("bf16")) == ("mine", 1e12)
    assert found.usd_per_hour is None
    assert found.watts is None


def test_hosts_may_mix_chips_and_the_slowest_link_counts():
    mixed = "- like: nvidia_h100_sxm\n        count: 2\n      - like: nvidia_a100_sxm_80gb\n        count: 2"
    found = cluster(
        MINIMAL.replace("- like: nvidia_a100_sxm_80gb\n        count: 4", mixed) + "scale_up: {}\n"
    )
    assert [found.chip(i).key for i in (0, 1, 2, 3, 4, 6)].count("nvidia_h100_sxm") == 3
    assert found.network.tiers[0].link.bytes_per_s == 300e9 * 0.91
    assert len(found.chip_types) == 2


def test_a_scale_up_domain_may_span_hosts():
    found = cluster(MINIMAL.replace("repeat: 2", "repeat: 18") + "scale_up: {domain: 36}\n")
    assert [tier.size for tier in found.network.tiers] == [36, 72]


def test_pcie_switches_make_two_tiers():
    tiers = cluster(with_pcie("switches: 2")).network.tiers
    assert [(tier.kind, tier.size) for tier in tiers[:2]] == [(TierKind.PCIE, 2), (TierKind.PCIE, 4)]


def test_chips_with_a_known_on_chip_network_bring_their_tier():
    found = cluster(MINIMAL.replace("nvidia_a100_sxm_80gb", "tenstorrent_wormhole_n150"))
    assert found.network.tier_for([3]).kind is TierKind.ON_CHIP
    assert found.network.tier_for([3]).link.latency_s == pytest.approx(9e-9)


@given(st.integers(1, 200))
def test_take_gives_whole_hosts_or_part_of_one(num_chips):
    unit = load_cluster(ROOT / "cluster_configs/dgx-a100.yaml")
    if num_chips > 8 and num_chips % 8:
        with pytest.raises(ClusterError, match="not a whole number of hosts"):
            unit.take(num_chips)
        return
    taken = unit.take(num_chips)
    assert taken.num_chips == num_chips == taken.network.tiers[-1].size
    assert taken.take(None) == taken
    assert taken.usd_per_hour == pytest.approx(1.75 * num_chips)


def test_take_says_which_numbers_are_possible():
    with pytest.raises(ClusterError, match="ask for 96 or 104 chips"):
        load_cluster(ROOT / "cluster_configs/dgx-a100.yaml").take(100)
    with pytest.raises(ClusterError, match="has 8 chips"):
        cluster(MINIMAL).take(12)
    with pytest.raises(ClusterError, match="at least one"):
        cluster(MINIMAL).take(0)


def test_a_superpod_of_forty_hosts_ends_with_part_of_a_scalable_unit():
    found = load_cluster(ROOT / "cluster_configs/dgx-h100-superpod.yaml").take(320)
    assert [tier.size for tier in found.network.tiers] == [8, 256, 320]
    assert found.network.tier_for([0, 255]).name == "scalable unit"
    assert found.network.tier_for([255, 256]).name == "spine"


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_files_load_are_short_and_say_what_they_are(path):
    text = path.read_text()
    assert load_cluster(path).take(None).num_chips >= 1
    assert len(text.splitlines()) < 40
    assert text.startswith("#")


def test_the_laptop_has_eight_chips_on_two_hosts_and_two_actors():
    found = load_cluster(ROOT / "cluster_configs/laptop.yaml")
    assert (found.num_chips, found.num_hosts, found.actors) == (8, 2, 2)
    assert found.network.tier_for([0, 4]).kind is TierKind.SCALE_OUT
    assert found.network.tier_for([0, 3]).kind is TierKind.PCIE


TOP_KEYS = [name for name in ClusterFile.model_fields if name in parse_yaml(MINIMAL, "c").root]


@given(st.sampled_from([key for key in TOP_KEYS if len(key) > 3]), st.data())
def test_a_typo_in_a_key_names_the_line_and_the_right_key(key, data):
    at = data.draw(st.integers(0, len(key) - 2))
    swapped = key[:at] + key[at + 1] + key[at] + key[at + 2 :]
    typo = data.draw(st.sampled_from([key[:at] + key[at + 1 :], swapped, key[:at] + "z" + key[at:]]))
    if typo in ClusterFile.model_fields or typo == "kind":
        return
    found = errors_of(MINIMAL.replace(f"{key}:", f"{typo}:", 1))
    unknown = next(error for error in found if "unknown key" in error.problem)
    line = next(i for i, text in enumerate(MINIMAL.splitlines(), 1) if text.startswith(f"{key}:"))
    assert unknown.where == f"c.yaml:{line}"
    assert unknown.hint == f"did you mean {key!r}?"


def test_all_errors_of_a_file_come_at_once_each_with_its_line():
    text = MINIMAL.replace("2 us}", "2 GB}").replace("count: 4", "count: four").replace("1 kW", "1000")
    found = {error.where: error for error in errors_of(text + "scael_up: {}\n")}
    assert set(found) == {"c.yaml:9", "c.yaml:10", "c.yaml:11", "c.yaml:13"}
    assert "'2 GB' is a size, but a time is expected" in found["c.yaml:10"].problem
    assert "needs a unit" in found["c.yaml:11"].problem
    assert found["c.yaml:13"].hint == "did you mean 'scale_up'?"
    assert all(error.hint and error.problem for error in found.values())


def test_a_duplicate_key_names_both_lines():
    (error,) = errors_of(MINIMAL + "name: again\n")
    assert "'name' stands twice" in error.problem
    assert error.where == "c.yaml:13 (first at c.yaml:3)"


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("nvidia_a100_sxm_80gb", "nvidia_a100_80gb", "not in the catalog"),
        ("device: simulated", "device: tpu", "device cannot be 'tpu'"),
        ("version: 1", "version: 2", "version cannot be 2"),
        ("    nics: {count: 2, bandwidth: 200 Gb/s, latency: 2 us}\n", "", "a host without NICs"),
        ("    nics:", "    pcie: {switches: 3}\n    nics:", "do not spread evenly"),
        ("bandwidth: 200 Gb/s", "bandwidth: 0 Gb/s", "of zero"),
        ("name: two hosts\n", "", "'name' is missing"),
        ("count: 4", "count: auto", "count only CPU cores"),
        ("like: nvidia_a100_sxm_80gb", "name: mine", "peak needs a figure"),
        ("        count: 4", "        tdp: {value: 3 W, sorce: me}", "unknown key 'sorce'"),
    ],
)
def test_a_file_that_cannot_be_is_refused(old, new, problem):
    assert any(problem in error.problem for error in errors_of(MINIMAL.replace(old, new)))


def test_a_domain_that_does_not_nest_is_refused():
    with pytest.raises(ClusterError, match="does not hold whole groups"):
        cluster(MINIMAL + "scale_up: {domain: 3}\n")


def test_hosts_of_different_sizes_are_refused():
    second = "  - chips: [{like: nvidia_l4, count: 2}]\n    nics: {bandwidth: 1 GB/s, latency: 1 us}\n"
    with pytest.raises(ClusterError, match=r"different numbers of chips \(2, 4\)"):
        cluster(MINIMAL + second)


@pytest.mark.parametrize("text", ["a: [", "- 1\n", "a: b: c\n", "\ta: 1\n"])
def test_what_is_not_a_yaml_mapping_is_a_config_error(text):
    with pytest.raises(ConfigError) as error:
        cluster(text)
    assert error.value.where.startswith("c.yaml:")


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a: &a [*a]\n", 1),
        ("a: 1\nb: &b\n  c: 1\n  d: *b\n", 4),
        ("&a\nb:\n  c:\n    - d: *a\n", 4),
        ("a: 1\nb: &b\n  - 1\n  - c: [*b]\n", 2),  # of an item it is the line of what it stands for
    ],
)
def test_a_value_that_contains_itself_is_refused_with_its_line(text, line):
    with pytest.raises(ConfigError, match="contains itself") as error:
        parse_yaml(text, "c.yaml")
    assert error.value.where == f"c.yaml:{line}"
    assert error.value.hint


@pytest.mark.parametrize("value", ["2024-02-30", "2001-1-1t25:00:00", '!!int "abc"'])
def test_what_yaml_cannot_read_is_refused_with_its_line(value):
    with pytest.raises(ConfigError, match="cannot read") as error:
        parse_yaml(f"a: 1\nname: {value}\n", "c.yaml")
    assert error.value.where == "c.yaml:2"


def test_a_value_may_be_repeated_by_an_alias():
    assert parse_yaml("a: &a [1, {b: 2}]\nc: [*a, *a]\n", "c.yaml").root["c"] == [[1, {"b": 2}]] * 2


def test_what_is_nested_too_deep_is_refused():
    with pytest.raises(ConfigError, match="nested") as error:
        parse_yaml("a: " + "[" * 2000 + "]" * 2000, "c.yaml")
    assert error.value.where == "c.yaml:1"


@pytest.mark.parametrize(
    ("old", "new", "problem", "hint"),
    [
        ("latency: 2 us", "latency: 1e300 s", "nics.latency: '1e300 s' is more than any time", "86400 s"),
        ("latency: 2 us", "latency: 86401 s", "is more than any time", "86400 s"),
        (
            "200 Gb/s",
            "1e-300 B/s",
            "nics.bandwidth: '1e-300 B/s' is less than any data rate",
            "at least 1 B/s",
        ),
        ("200 Gb/s", "1.1 EB/s", "is more than any data rate", "at most 1 EB/s"),
        ("latency: 2 us", "latency: 2 us, efficiency: 1e-300", "nics.efficiency should be greater", "bounds"),
        ("repeat: 2", "repeat: 2\nscale_up: {latency: 1e300 s}", "scale_up.latency", "86400 s"),
        ("  - chips:", "  - pcie: {uplink: 1e300 B/s}\n    chips:", "pcie.uplink", "at most 1 EB/s"),
        ("count: 4", "scale_up: {latency: 1e9 s}", "latency: '1e9 s' is more", "86400 s"),
    ],
)
def test_figures_far_beyond_what_is_built_are_refused_with_their_limit(old, new, problem, hint):
    (error,) = errors_of(MINIMAL.replace(old, new))
    assert problem in error.problem
    assert hint in error.hint
    assert error.where.startswith("c.yaml:")


LEVELS = "scale_out:\n  - {name: leaf, hosts: 2}\n  - {name: spine, hosts: any"


@pytest.mark.parametrize(
    ("more", "problem"),
    [
        ("latency: 1e300 s", "'1e300 s' is more than any time"),
        ("oversubscription: 1e300", "oversubscription should be less than or equal to"),
        ("forwarding: store-and-forward, packet: 1e300 B", "'1e300 B' is more than any size"),
        ("forwarding: store-and-forward, packet: 0.5 B", "'0.5 B' is less than any size"),
    ],
)
def test_levels_of_switches_have_limits_too(more, problem):
    (error,) = errors_of(f"{MINIMAL}{LEVELS}, {more}}}\n")
    assert problem in error.problem
    assert error.where.startswith("c.yaml:")


def test_a_missing_file_is_a_config_error(tmp_path):
    with pytest.raises(ConfigError, match="cannot read the file"):
        load_cluster(tmp_path / "none.yaml")


@pytest.mark.parametrize(("kind", "model"), [("cluster", ClusterFile), ("job", Job), ("sweep", SweepFile)])
def test_the_committed_schemas_are_current(kind, model):
    """To refresh one: json.dumps of what is on the right below, indent=2, and a line break at the end."""
    committed = (ROOT / f"docs/schema/{kind}.schema.json").read_text()
    schema = model.model_json_schema(by_alias=True)
    assert json.loads(committed) == {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def test_loading_a_cluster_imports_neither_torch_nor_ray():
    code = (
        "import sys; from orchestrator.config.hardware.cluster_file import load_cluster; load_cluster(sys.argv[1]);"
        "sys.exit(bool({'torch', 'ray', 'numba', 'scipy', 'networkx'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", code, str(SHIPPED[0])]
    assert subprocess.run(command, check=False, cwd=ROOT).returncode == 0


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (
            MINIMAL.replace("repeat: 2", "repeat: 1").replace("nvidia_a100_sxm_80gb", "apple_m3_max"),
            "joined by nothing",
        ),
        (MINIMAL.replace("nvidia_a100_sxm_80gb", "apple_m3_max"), "joined by nothing"),
        (
            MINIMAL.replace("repeat: 2", "repeat: 1").replace("nvidia_a100_sxm_80gb", "apple_m3_max")
            + "scale_up: {domain: 2}\n",
            "joined in groups of 2 only",
        ),
        (MINIMAL + "scale_out: [{name: leaf, hosts: 1}]\n", "the outermost level joins 1 hosts"),
        (
            MINIMAL.replace("nvidia_a100_sxm_80gb", "nvidia_l4") + "scale_up: {}\n",
            "no scale-up links of its own",
        ),
        (
            MINIMAL.replace("nvidia_a100_sxm_80gb", "nvidia_l4") + "scale_up: {bandwidth: 1 GB/s}\n",
            "not known",
        ),
    ],
)
def test_a_network_with_a_gap_is_refused(text, problem):
    assert any(problem in error.problem for error in errors_of(text))


def test_one_chip_alone_is_a_cluster():
    text = MINIMAL.replace("repeat: 2", "repeat: 1").replace("nvidia_a100_sxm_80gb", "apple_m3_max")
    found = cluster(without_cards(text).replace("count: 4", "count: 1"))
    assert found.num_chips == 1
    assert found.network.tier_for([0]).link.bytes_per_s == 400e9


ONE_HOST = MINIMAL.replace("repeat: 2", "repeat: 1")
PROTOCOL = "protocols: [{name: x, latency: 1 us}]"


@pytest.mark.parametrize("more", ["", f", {PROTOCOL}"])
def test_a_root_complex_quicker_than_the_switches_below_it_is_refused(more):
    (error,) = errors_of(with_pcie("switches: 2, latency: 5 us, root: {latency: 1 us}" + more))
    assert "the way through the root complex is quicker" in error.problem
    assert error.where == "c.yaml:10"
    assert error.hint
    tiers = cluster(with_pcie("switches: 2, latency: 5 us, root: {latency: 6 us}" + more)).network.tiers
    assert tiers[1].link.latency_s - tiers[0].link.latency_s == pytest.approx(1e-6)


@pytest.mark.parametrize("switches", [0, 4])
def test_a_latency_to_switches_that_no_two_chips_share_is_refused(switches):
    (error,) = errors_of(with_pcie(f"switches: {switches}, latency: 1 us, root: {{latency: 5 us}}"))
    assert error.problem.startswith("`latency` has no effect")
    for keys in ("latency: 1 us, root: {bandwidth: 9 GB/s}", "root: {latency: 2 us}"):
        assert cluster(with_pcie(f"switches: {switches}, {keys}")).network.tiers[0].link.latency_s == 2e-6


@pytest.mark.parametrize(
    ("text", "unused"),
    [
        (with_pcie("latency: 1 us") + "scale_up: {}\n", ["latency"]),
        (with_pcie(f"setup: 1 us, {PROTOCOL}") + "scale_up: {}\n", ["setup", "protocols"]),
        (with_pcie("switches: 2, root: {bandwidth: 9 GB/s}") + "scale_up: {domain: 4}\n", ["root"]),
        (with_pcie("latency: 1 us").replace("count: 4", "count: 1"), ["latency"]),
        (without_cards(with_pcie("switches: 2", ONE_HOST)) + "scale_up: {}\n", ["pcie"]),
        (ONE_HOST, ["nics"]),
        (MINIMAL + "scale_up: {domain: 8}\n", ["nics"]),
        (ONE_HOST + "scale_out: [{name: leaf}]\n", ["scale_out", "nics"]),
    ],
)
def test_links_at_which_no_chips_meet_are_refused(text, unused):
    found = errors_of(text)
    assert [error.problem for error in found] == [
        f"`{key}` has no effect, as no chips meet there" for key in unused
    ]
    assert all(error.where.startswith("c.yaml:") and error.hint.startswith("remove it") for error in found)


@pytest.mark.parametrize(
    "text",
    [
        with_pcie("switches: 2, bandwidth: 9 GB/s, efficiency: 0.9, source: me") + "scale_up: {}\n",
        with_pcie(f"latency: 2 us, setup: 1 us, {PROTOCOL}") + "scale_up: {domain: 2}\n",
        without_cards(with_pcie("latency: 1 us", ONE_HOST)),
    ],
)
def test_pcie_may_say_of_a_way_out_what_it_carries_and_of_meeting_chips_everything(text):
    assert cluster(text).num_chips in (4, 8)
