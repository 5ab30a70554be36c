"""Tiers of cluster files: who shares which wires, and what each chip has alone and with all others."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from comms.links import Link
from comms.network import UNBOUNDED, TierKind
from comms.topology import route_latencies
from orchestrator.cluster_file import cluster_from, load_cluster
from orchestrator.errors import ClusterError
from orchestrator.tiers import Fabric, Level, build_network
from orchestrator.yaml_file import parse_yaml

ROOT = Path(__file__).parents[2]
SHIPPED = sorted((ROOT / "cluster_configs").glob("*.yaml"))
GBIT = 1e9 / 8

HOSTS = """\
kind: cluster
version: 1
name: hosts
device: simulated
repeat: any
hosts:
  - chips: [{like: nvidia_l4, count: 8}]
    pcie: {switches: 2, bandwidth: 24 GB/s, latency: 1 us}
    nics: {count: 1, bandwidth: 100 Gb/s, latency: 10 us}
scale_out:
  - {name: leaf, hosts: 4}
  - {name: spine, hosts: any, latency: 12 us, oversubscription: 2}
"""


def network(text=HOSTS):
    return cluster_from(parse_yaml(text, "c.yaml")).network


def rates(net):
    return {tier.name: (tier.link.bytes_per_s, tier.loaded_link.bytes_per_s) for tier in net.tiers}


def test_one_card_for_a_host_is_one_tree_with_pcie():
    net = network()
    assert [(tier.name, tier.kind, tier.size, tier.part_of_next) for tier in net.tiers] == [
        ("pcie switch", TierKind.PCIE, 4, True),
        ("pcie root", TierKind.PCIE, 8, True),
        ("leaf", TierKind.SCALE_OUT, 32, True),
        ("spine", TierKind.SCALE_OUT, UNBOUNDED, False),
    ]
    card = 100 * GBIT
    assert rates(net) == {
        "pcie switch": (24e9, 24e9),
        "pcie root": (24e9, 24e9 / 4),  # four chips behind one uplink
        "leaf": (card, card / 8),
        "spine": (card, card / 16),
    }
    assert [tier.link.latency_s for tier in net.tiers] == pytest.approx([1e-6, 2e-6, 10e-6, 12e-6])


def test_a_chip_that_sends_to_its_neighbour_and_away_has_one_pcie_link_for_both():
    topology = network().topology(16)
    routes = topology.routes(np.array([0, 0, 0]), np.array([1, 4, 8]))
    assert len({int(routes.of(message)[0]) for message in range(3)}) == 1


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_tier_of_a_shipped_cluster_has_the_latency_of_its_file(path):
    cluster = load_cluster(path)
    size = cluster.network.tiers[-1].size
    net = cluster.network.take(min(size, max([1, *(2 * t.size for t in cluster.network.tiers[:-1])])))
    topology = net.topology()
    for inner, tier in zip((None, *net.tiers), net.tiers, strict=False):
        if tier.size > 1:
            far = inner.size if inner else 1
            route = topology.routes(np.array([0, far]), np.array([far, 0]))
            expected = np.full(2, tier.link.latency_s)
            assert route_latencies(topology.wires(), route) == pytest.approx(expected)
            assert tier.source


@pytest.mark.parametrize(
    ("nics", "alone", "together"),
    [
        ("count: 2", 100, 25),  # one behind each switch, for four chips
        ("count: 4", 100, 50),
        ("count: 3", 192, 300 / 8),  # not even: all chips share all cards, as fast as their PCIe links are
        ("count: 8", 100, 100),
        ("count: 16", 192, 192),  # two cards each, more than the chip's PCIe link carries
    ],
)
def test_cards_are_dealt_out_evenly_or_pooled(nics, alone, together):
    leaf = next(tier for tier in network(HOSTS.replace("count: 1,", f"{nics},")).tiers if tier.name == "leaf")
    assert leaf.link.bytes_per_s == alone * GBIT
    assert leaf.loaded_link.bytes_per_s == pytest.approx(together * GBIT)


def test_chips_reach_a_card_at_the_root_over_the_uplink_of_their_switch():
    text = HOSTS.replace("bandwidth: 100 Gb/s", "bandwidth: 800 Gb/s")
    assert rates(network(text))["leaf"] == (24e9, 6e9)


def test_a_card_quicker_than_pcie_has_wires_of_its_own():
    net = network(HOSTS.replace("latency: 10 us", "latency: 1.3 us"))
    assert [tier.part_of_next for tier in net.tiers] == [True, False, True, False]
    assert net.tiers[2].link.latency_s == pytest.approx(1.3e-6)


def test_without_pcie_a_chip_alone_has_one_card():
    text = HOSTS.replace("nvidia_l4", "apple_m3_max").replace(
        "    pcie: {switches: 2, bandwidth: 24 GB/s, latency: 1 us}\n", ""
    )
    net = network(text + "scale_up: {bandwidth: 50 GB/s, latency: 1 us}\n")
    assert rates(net)["leaf"] == (100 * GBIT, 100 * GBIT / 8)


def test_oversubscription_multiplies_from_level_to_level():
    text = HOSTS.replace("hosts: any, latency", "hosts: 16, latency")
    net = network(text + "  - {name: core, hosts: any, latency: 15 us, oversubscription: 3}\n")
    card = 100 * GBIT
    assert [rates(net)[name][1] for name in ("leaf", "spine", "core")] == pytest.approx(
        [card / 8, card / 16, card / 48]
    )


def test_oversubscription_of_the_first_level_is_what_its_switches_pass():
    net = network(HOSTS.replace("{name: leaf, hosts: 4}", "{name: leaf, hosts: 4, oversubscription: 4}"))
    card = 100 * GBIT
    assert rates(net)["leaf"] == (card, card / 8 / 4)


def build(*levels, hosts=None, fabric=None):
    document = parse_yaml(HOSTS.replace("count: 1,", "count: 8,"), "c.yaml")
    unit = cluster_from(document).unit
    return build_network(unit, hosts, fabric, levels, document)


LEAF = Level("leaf", 4, None, 1.0, "a leaf")
TOP = Level("spine", None, 12e-6, 1.0, "a spine")


def test_on_rails_chips_of_equal_place_meet_under_a_leaf_and_others_above():
    net = build(replace(LEAF, rails=True), TOP)
    topology = net.topology(64)
    routes = topology.routes(np.array([0, 0, 0]), np.array([8, 9, 32]))
    latencies = route_latencies(topology.wires(), routes)
    assert latencies == pytest.approx([10e-6, 12e-6, 12e-6])
    assert net.tiers[-2].link.latency_s == pytest.approx(10e-6)


def test_switches_that_reduce_are_levels_that_reduce():
    fabric = Fabric(Link(1e-6, 100e9), 8, "a fabric", reduces=True)
    levels = build(LEAF, replace(TOP, reduces=True), hosts=8, fabric=fabric).levels(range(64))
    assert [(level.tier, level.reduces) for level in levels] == [
        ("scale-up", True),
        ("leaf", False),
        ("spine", True),
    ]


@pytest.mark.parametrize(
    ("levels", "hosts", "problem"),
    [
        ((LEAF,), None, "joins 4 hosts, but there may be any number"),
        ((LEAF,), 8, "joins 4 hosts, but there are 8"),
        ((replace(TOP, rails=True),), None, "only the first level can have rails"),
        ((LEAF, replace(TOP, rails=True)), None, "only the first level can have rails"),
        ((LEAF, replace(TOP, hosts=6), replace(TOP, name="core")), None, "not whole groups of 32"),
        ((LEAF, replace(TOP, name="leaf")), None, "one name"),
    ],
)
def test_levels_that_make_no_sense_are_refused(levels, hosts, problem):
    with pytest.raises(ClusterError, match=problem):
        build(*levels, hosts=hosts)
