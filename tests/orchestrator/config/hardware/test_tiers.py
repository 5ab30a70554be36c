"""Tiers of cluster files: who shares which wires, and what each chip has alone and with all others."""

from pathlib import Path

import numpy as np
import pytest

from comms.errors import ClusterError
from comms.networks.fabrics.dragonfly import Dragonfly
from comms.networks.fabrics.torus_mesh import Torus
from comms.networks.layers import Spread
from comms.networks.links import Link
from comms.networks.network import UNBOUNDED, TierKind
from comms.networks.topology import route_latencies
from orchestrator.config.hardware.cluster_file import cluster_from, load_cluster
from orchestrator.config.yaml_file import parse_yaml

ROOT = Path(__file__).parents[4]
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


PCIE = "    pcie: {switches: 2, bandwidth: 24 GB/s, latency: 1 us}\n"


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
            far = inner.size if inner and inner.size > 1 else 1
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


def build(*levels, hosts="any", pcie=PCIE, fabric=""):
    head = HOSTS.split("scale_out:")[0].replace("count: 1,", "count: 8,").replace("any", str(hosts))
    lines = [f"  - {{{level}}}\n" for level in levels]
    return network(head.replace(PCIE, pcie) + fabric + "scale_out:\n" + "".join(lines))


LEAF = "name: leaf, hosts: 4"
TOP = "name: spine, latency: 12 us"


def test_on_rails_chips_of_equal_place_meet_under_a_leaf_and_others_above():
    net = build(f"{LEAF}, rails: true", TOP)
    topology = net.topology(64)
    routes = topology.routes(np.array([0, 0, 0]), np.array([8, 9, 32]))
    latencies = route_latencies(topology.wires(), routes)
    assert latencies == pytest.approx([10e-6, 12e-6, 12e-6])
    assert net.tiers[-2].link.latency_s == pytest.approx(10e-6)


def test_switches_that_reduce_are_levels_that_reduce():
    fabric = "scale_up: {bandwidth: 100 GB/s, latency: 1 us, reduces: true}\n"
    levels = build(LEAF, f"{TOP}, reduces: true", hosts=8, pcie="", fabric=fabric).levels(range(64))
    assert [(level.tier, level.reduces) for level in levels] == [
        ("scale-up", True),
        ("leaf", False),
        ("spine", True),
    ]


@pytest.mark.parametrize(
    ("levels", "hosts", "problem"),
    [
        ((LEAF,), "any", "joins 4 hosts, but there may be any number"),
        ((LEAF,), 8, "joins 4 hosts, but there are 8"),
        ((f"{TOP}, rails: true",), "any", "only the first level can have rails"),
        ((LEAF, f"{TOP}, rails: true"), "any", "only the first level can have rails"),
        ((LEAF, f"{TOP}, hosts: 6", "name: core"), "any", "not whole groups of 32"),
        ((LEAF, "name: leaf"), "any", "one name"),
    ],
)
def test_levels_that_make_no_sense_are_refused(levels, hosts, problem):
    with pytest.raises(ClusterError, match=problem):
        build(*levels, hosts=hosts)


def root_of(keys):
    text = HOSTS.replace("pcie: {switches: 2, bandwidth: 24 GB/s, latency: 1 us}", f"pcie: {{{keys}}}")
    return network(text.replace("repeat: any", "repeat: 1").split("    nics:")[0])


@pytest.mark.parametrize(
    ("keys", "names", "alone", "latencies"),
    [
        ("switches: 1, bandwidth: 24 GB/s, latency: 1 us", ["pcie switch"], [24e9], [1e-6]),
        ("switches: 8, bandwidth: 24 GB/s, latency: 1 us", ["pcie root"], [24e9], [2e-6]),
        ("switches: 0, bandwidth: 24 GB/s, latency: 1 us", ["pcie root"], [24e9], [2e-6]),
        (
            "switches: 0, bandwidth: 24 GB/s, root: {bandwidth: 9.9 GB/s, latency: 5 us}",
            ["pcie root"],
            [9.9e9],
            [5e-6],
        ),
        (
            "switches: 4, bandwidth: 24 GB/s, latency: 1 us, root: {bandwidth: 9.9 GB/s}",
            ["pcie switch", "pcie root"],
            [24e9, 9.9e9],
            [1e-6, 2e-6],
        ),
        (
            "switches: 4, bandwidth: 24 GB/s, latency: 1 us, uplink: 12 GB/s",
            ["pcie switch", "pcie root"],
            [24e9, 12e9],
            [1e-6, 2e-6],
        ),
        (
            "switches: 4, bandwidth: 24 GB/s, efficiency: 0.5, latency: 1 us",
            ["pcie switch", "pcie root"],
            [12e9, 12e9],
            [1e-6, 2e-6],
        ),
    ],
)
def test_pcie_between_chips(keys, names, alone, latencies):
    tiers = root_of(keys).tiers
    assert [tier.name for tier in tiers] == names
    assert [tier.link.bytes_per_s for tier in tiers] == pytest.approx(alone)
    assert [tier.link.latency_s for tier in tiers] == pytest.approx(latencies)


def test_what_the_root_lacks_between_chips_a_card_of_its_own_may_have():
    keys = "switches: 2, bandwidth: 24 GB/s, latency: 1 us, uplink: 20 GB/s, root: {bandwidth: 5 GB/s}"
    text = HOSTS.replace("pcie: {switches: 2, bandwidth: 24 GB/s, latency: 1 us}", f"pcie: {{{keys}}}")
    text = text.replace(
        "count: 1, bandwidth: 100 Gb/s, latency: 10 us", "count: 1, bandwidth: 800 Gb/s, latency: 1 us"
    )
    net = network(text)
    assert rates(net)["pcie root"][0] == 5e9
    assert rates(net)["leaf"][0] == 20e9


def test_half_duplex_links_share_their_rate():
    keys = "switches: 1, bandwidth: 24 GB/s, latency: 1 us, duplex: half"
    tier = root_of(keys).tiers[0]
    assert (tier.link.bytes_per_s, tier.loaded_link.bytes_per_s) == (24e9, 12e9)


def test_half_duplex_cards_share_their_rate():
    net = network(HOSTS.replace("latency: 10 us}", "latency: 10 us, duplex: half}"))
    assert rates(net)["leaf"] == (100 * GBIT, 100 * GBIT / 16)


def test_paths_to_the_spine_split_its_rate_and_messages_keep_to_one():
    text = HOSTS.replace("oversubscription: 2}", "oversubscription: 2, paths: 4, spread: by target}")
    net = network(text.replace("count: 1,", "count: 8,"))
    tree = net.tiers[-1].shape
    assert (tree.spread, tree.trunks[-1].paths) == (Spread.BY_TARGET, 4)
    whole = network(HOSTS.replace("count: 1,", "count: 8,")).tiers[-1].shape
    assert 4 * tree.trunks[-1].link.bytes_per_s == pytest.approx(whole.trunks[-1].link.bytes_per_s)


def test_store_and_forward_takes_in_a_packet():
    text = HOSTS.replace("{name: leaf, hosts: 4}", "{name: leaf, hosts: 4, forwarding: store-and-forward}")
    wires = network(text).topology(64).wires()
    assert set(wires.forward_nbytes.tolist()) == {0.0, 1500.0}
    text = text.replace("store-and-forward}", "store-and-forward, packet: 4 KiB}")
    assert 4096.0 in network(text).topology(64).wires().forward_nbytes


def test_a_shape_may_join_all_chips_by_their_cards():
    text = HOSTS.split("scale_out:")[0].replace("repeat: any", "repeat: 4").replace("count: 1,", "count: 8,")
    torus = network(text + "scale_out: [{name: torus, shape: torus, dims: [8, 4]}]\n").tiers[-1]
    assert isinstance(torus.shape, Torus)
    assert (torus.size, torus.kind) == (32, TierKind.SCALE_OUT)
    assert torus.link == Link(10e-6, 12.5e9 / 4)  # a card's rate, over four links
    dragonfly = network(
        text + "scale_out: [{name: far, shape: dragonfly, dims: [2, 4, 4], links: "
        "[{}, {latency: 1 us, bandwidth: 5 GB/s}, {latency: 2 us, bandwidth: 5 GB/s}]}]\n"
    ).tiers[-1]
    assert isinstance(dragonfly.shape, Dragonfly)
    assert dragonfly.shape.num_chips == 32


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("count: 8,", "count: 4,", "not the same number for each of 8 chips"),
        ("repeat: 4", "repeat: 3", "dims of 8 x 4 make 32 chips, but there are 24"),
        ("dims: [8, 4]", "dims: [8, 4], rails: true", "`rails` has no effect on a torus"),
        ("[{name", "[{name: leaf, hosts: 2}, {name", "joins all chips by itself"),
    ],
)
def test_shapes_over_cards_that_cannot_be_are_refused(old, new, problem):
    text = HOSTS.split("scale_out:")[0].replace("repeat: any", "repeat: 4").replace("count: 1,", "count: 8,")
    text += "scale_out: [{name: torus, shape: torus, dims: [8, 4]}]\n"
    with pytest.raises(ClusterError, match=problem):
        network(text.replace(old, new))


def test_a_level_between_hosts_may_have_a_library():
    text = HOSTS.replace(
        "{name: leaf, hosts: 4}",
        "{name: leaf, hosts: 4, setup: 20 us, protocols: [{name: p, latency: 4 us, share: 0.5}]}",
    )
    cluster = cluster_from(parse_yaml(text, "c.yaml"))
    leaf = next(tier for tier in cluster.network.tiers if tier.name == "leaf")
    assert (leaf.setup_s, leaf.link.latency_s) == (20e-6, pytest.approx(4e-6))
    assert [(each.name, each.latency_s, each.share) for each in leaf.protocols] == [("p", 0.0, 0.5)]
    assert leaf.issue_s == pytest.approx(6e-6)


def test_pcie_may_have_a_library():
    keys = "switches: 4, bandwidth: 24 GB/s, latency: 2 us, setup: 9 us"
    cluster = root_of(keys + ", protocols: [{name: p, latency: 0.5 us, pipelined: true}]")
    assert [tier.setup_s for tier in cluster.tiers] == [9e-6, 9e-6]
    assert [tier.link.latency_s for tier in cluster.tiers] == pytest.approx([0.5e-6, 2.5e-6])
    assert all(tier.protocols[0].pipelined for tier in cluster.tiers)
