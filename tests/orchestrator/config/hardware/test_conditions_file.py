"""The `conditions:` of a cluster file: each word becomes its value, and every mistake has its line."""

from pathlib import Path

import pytest

from comms.collectives.schedule import Op
from comms.errors import ClusterError, UserError
from comms.networks.conditions import (
    HEALTHY,
    Background,
    Between,
    ChipFault,
    Flaps,
    Jitter,
    LinkFault,
    Reach,
    resolve,
)
from orchestrator.config.hardware.cluster_file import cluster_from, load_cluster
from orchestrator.config.yaml_file import parse_yaml

ROOT = Path(__file__).parents[4]
HOSTS = """\
kind: cluster
version: 1
name: hosts
device: simulated
repeat: 4
hosts:
  - chips: [{like: nvidia_a100_sxm_80gb, count: 4}]
    nics: {count: 4, bandwidth: 100 Gb/s, latency: 2 us}
scale_up: {shape: ring}
scale_out:
  - {name: leaf, hosts: 2}
  - {name: spine, hosts: any, latency: 3 us, paths: 2, spread: hashed}
"""
FIRST_LINE = len(HOSTS.splitlines()) + 2  # of what follows `conditions:`


def cluster(lines, repeat="4"):
    text = HOSTS.replace("repeat: 4", f"repeat: {repeat}") + "conditions:\n"
    return cluster_from(parse_yaml(text + "".join(f"  {line}\n" for line in lines), "c.yaml"))


def conditions(*lines):
    return cluster(lines).conditions


def link(line):
    return conditions("links:", f"- {{{line}}}").links[0]


def test_a_file_without_conditions_is_healthy():
    assert cluster_from(parse_yaml(HOSTS, "c.yaml")).conditions == HEALTHY


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("from: chip 0, to: chip 1, factor: 0.5", LinkFault(Between(0, 1), 0.5)),
        ("from: 0, to: 1, one_way: true, down: true", LinkFault(Between(0, 1, False), 0.0)),
        ("chip: 7, tier: leaf, down: true", LinkFault(Reach((7,), "leaf"), 0.0)),
        ("chip: 7, tier: scale-out, factor: 0.1", LinkFault(Reach((7,), "leaf"), 0.1)),
        ("chip: 7, tier: scale-up, factor: 0.1", LinkFault(Reach((7,), "scale-up"), 0.1)),
        ("chip: 4-6, tier: spine, path: 1, down: true", LinkFault(Reach((4, 5, 6), "spine", 1), 0.0)),
        (
            "chip: [0, 8-9, 0], tier: leaf, flaps: {down: 5 ms, every: 100 ms}",
            LinkFault(Reach((0, 8, 9), "leaf"), 1.0, Flaps(5e-3, 0.1)),
        ),
        (
            "chip: chip 3, tier: leaf, flaps: {down: 5 ms, every: 100 ms, first: 1 s}",
            LinkFault(Reach((3,), "leaf"), 1.0, Flaps(5e-3, 0.1, 1.0)),
        ),
    ],
)
def test_links_that_are_slow_down_or_flapping(line, fault):
    found = link(line)
    assert (found.which, found.factor, found.flaps) == (fault.which, fault.factor, fault.flaps)
    assert found.where == f"c.yaml:{FIRST_LINE + 1}"


def test_chips_jitter_and_background():
    found = conditions(
        "seed: 7",
        "chips: [{chip: 7, slowdown: 1.3, delay: 5 us}, {chip: 0-3, slowdown: 2}]",
        "jitter: {rate: 5 %, delay: 1 us}",
        "background: [{op: all_to_all, chips: 0-15, size: 16 MiB}]",
    )
    where = [f"c.yaml:{FIRST_LINE + line}" for line in (1, 3)]
    assert found.chips == (
        ChipFault((7,), 1.3, 5e-6, where[0]),
        ChipFault((0, 1, 2, 3), 2.0, 0.0, where[0]),
    )
    assert (found.jitter, found.seed) == (Jitter(0.05, 1e-6), 7)
    assert found.background == (Background(Op.ALL_TO_ALL, tuple(range(16)), 16 * 2.0**20, where[1]),)


def test_a_part_may_be_a_bare_number():
    assert conditions("jitter: {rate: 0.05}").jitter == conditions("jitter: {rate: 5 %}").jitter


def test_conditions_of_a_file_hold_on_its_network():
    found = cluster(["links: [{from: 0, to: 1, down: true}, {chip: 8, tier: spine, path: 0, down: true}]"])
    resolved = resolve(found.conditions, found.network.topology())
    assert resolved.topology.wires().num_wires == found.network.topology().wires().num_wires - 4


@pytest.mark.parametrize(
    ("lines", "problem", "line"),
    [
        (["links: [{from: 0, to: 0, factor: 0.5}]"], "a link from chip 0 to itself", 0),
        (["links:", "- {from: 0, factor: 0.5}"], "not clear which link is meant", 1),
        (["links:", "- {from: 0, to: 1, chip: 3, factor: 0.5}"], "not clear which link is meant", 1),
        (["links:", "- {from: 0, to: 1}"], "not clear what is wrong", 1),
        (["links:", "- {from: 0, to: 1, factor: 0.5, down: true}"], "not clear what is wrong", 1),
        (["links:", "- {from: 0, to: 1, factor: 1}"], "a factor of 1 has no effect", 1),
        (["links:", "- {from: 0, to: 1, factor: 0}"], "greater than 0", 1),
        (["links:", "- {from: 0, to: 1, down: false}"], "down", 1),
        (["links:", "- {from: 0, to: 1, path: 0, down: true}"], "`path` has no effect", 1),
        (["links:", "- {chip: 0, tier: leaf, one_way: true, down: true}"], "`one_way` has no effect", 1),
        (["links:", "- {chip: 0, tier: laef, down: true}"], "there is no tier 'laef'", 1),
        (["links:", "- {chip: 0, tier: pcie, down: true}"], "there is no tier 'pcie'", 1),
        (["links:", "- {chip: 16, tier: leaf, down: true}"], "chip 16 is named, but there are 16 chips", 1),
        (["links:", "- {chip: nic, tier: leaf, down: true}"], "'nic' is not a chip", 1),
        (["links:", "- {chip: 9-3, tier: leaf, down: true}"], "the range '9-3' is empty", 1),
        (
            ["links:", "- {from: 0, to: 1, flaps: {down: 2 ms, every: 1 ms}}"],
            "down for 0.002 s every 0.001 s",
            1,
        ),
        (["links:", "- {from: 0, to: 1, flaps: {down: 0 ms, every: 1 ms}}"], "down for 0.0 s", 1),
        (["chips: [{chip: 3}]"], "this has no effect on the chip", 0),
        (["chips: [{chip: 3, slowdown: 0.5}]"], "greater than or equal to 1", 0),
        (["jitter: {}"], "this jitter has no effect", 0),
        (["jitter: {rate: 100 %}"], "is not a part of a whole", 0),
        (["jitter: {rate: true}"], "is not a part of a whole", 0),
        (["seed: 3"], "`seed` has no effect", 0),
        (["background: [{op: all_to_all, chips: 0, size: 1 MB}]"], "one chip alone", 0),
        (["background: [{op: all_two_all, chips: 0-3, size: 1 MB}]"], "cannot be 'all_two_all'", 0),
        (["background: [{op: all_to_all, chips: 0-3, size: 0 B}]"], "of zero", 0),
        (["background: [{op: all_to_all, chips: 0-63, size: 1 B}]"], "chip 63 is named", 0),
    ],
)
def test_mistakes_are_told_with_their_line(lines, problem, line):
    with pytest.raises(UserError) as error:
        cluster(lines)
    found = error.value.findings[0]
    assert problem in found.problem
    assert found.where == f"c.yaml:{FIRST_LINE + line}"
    assert found.hint


def test_unknown_tiers_name_the_known_ones():
    with pytest.raises(ClusterError) as error:
        link("chip: 0, tier: spin, down: true")
    assert error.value.hint == "did you mean 'spine'?"


def test_of_a_cluster_of_any_size_chips_are_checked_when_they_are_taken():
    found = cluster(["chips: [{chip: 20, delay: 1 us}]"], repeat="any")
    assert found.take(24).conditions == found.conditions
    with pytest.raises(ClusterError) as error:
        found.take(16)
    assert "chip 20 is named, but there are 16 chips" in error.value.problem
    assert error.value.where == f"c.yaml:{FIRST_LINE}"
    assert "take more chips" in error.value.hint


@pytest.mark.parametrize("name", ["tpu-v5p-pod", "tenstorrent-galaxy"])
def test_shipped_tori_go_round_a_dead_link(name):
    path = ROOT / f"cluster_configs/{name}.yaml"
    text = path.read_text() + "\nconditions:\n  links: [{from: 0, to: 1, down: true}]\n"
    found = cluster_from(parse_yaml(text, str(path)))
    topology = found.take(None).network.topology()
    around = resolve(found.conditions, topology).topology.routes([0], [1])
    assert len(around.wires) == 3
    assert load_cluster(path).conditions == HEALTHY
