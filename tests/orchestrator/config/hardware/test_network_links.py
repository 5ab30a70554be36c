"""Shapes and protocols of a scale-up fabric: what a file's words become, and what is refused, with its line."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from comms.errors import UserError
from comms.networks.fabrics.dragonfly import Arrangement, Dragonfly, Routing
from comms.networks.fabrics.edge_list import Duplex, EdgeList
from comms.networks.fabrics.switch_tree import Tree
from comms.networks.fabrics.torus_mesh import FullMesh, Torus
from comms.networks.links import Link, Protocol
from orchestrator.config.hardware.cluster_file import cluster_from
from orchestrator.config.yaml_file import parse_yaml

HOST = """\
kind: cluster
version: 1
name: shapes
device: simulated
hosts:
  - chips: [{like: nvidia_a100_sxm_80gb, count: 8}]
scale_up:
"""
FIGURES = "  bandwidth: 50 GB/s\n  latency: 1 us\n"
LINK = Link(1e-6, 50e9)


def cluster(lines, figures=FIGURES):
    return cluster_from(parse_yaml(HOST + figures + lines, "c.yaml"))


def shape(lines, figures=FIGURES):
    return cluster(lines, figures).network.tiers[-1].shape


def topology(lines, figures=FIGURES):
    return shape(lines, figures)


def error_of(lines, figures=FIGURES):
    with pytest.raises(UserError) as error:
        cluster(lines, figures)
    return error.value.findings[0]


def test_a_fabric_is_a_switch_unless_it_says_otherwise():
    assert isinstance(shape(""), Tree)
    assert shape("  shape: switch\n") == shape("")
    assert shape("  reduces: true\n").switch.reduces
    assert not shape("  duplex: half\n").duplex


def test_each_word_is_its_shape():
    assert topology("  shape: ring\n") == Torus((8,), (LINK,))
    assert topology("  shape: torus\n  dims: [2, 4]\n") == Torus((2, 4), (LINK, LINK), (True,))
    assert topology("  shape: mesh\n  dims: [2, 4]\n") == Torus((2, 4), (LINK, LINK), (False,))
    assert topology("  shape: full mesh\n") == FullMesh(8, LINK)
    assert topology("  shape: full mesh\n  duplex: half\n").half_duplex
    assert isinstance(shape("  shape: ring\n"), Torus)
    assert isinstance(shape("  shape: full mesh\n"), FullMesh)


def test_dimensions_may_differ():
    found = topology(
        "  shape: torus\n  dims: [2, 4]\n  efficiency: 0.5\n"
        "  links: [{bandwidth: 30 GB/s}, {latency: 3 us}]\n"
    )
    assert found.links == (Link(1e-6, 15e9), Link(3e-6, 25e9))


@pytest.mark.parametrize(
    ("lines", "links"),
    [
        ("  shape: ring\n", 2),
        ("  shape: torus\n  dims: [2, 2, 2]\n", 3),
        ("  shape: torus\n  dims: [2, 4]\n", 3),
        ("  shape: mesh\n  dims: [1, 8]\n", 2),
        ("  shape: full mesh\n", 7),
    ],
)
def test_what_a_chip_brings_is_spread_over_its_links(lines, links):
    found = shape(lines, "")
    assert found.link.latency_s == 2e-6
    assert found.link.bytes_per_s == pytest.approx(300e9 * 0.91 / links)


def test_a_dragonfly_has_three_sizes_and_three_links():
    found = topology(
        "  shape: dragonfly\n  dims: [1, 2, 4]\n  long_links: 2\n  arrangement: absolute\n  routing: valiant\n"
        "  links: [{}, {latency: 2 us}, {latency: 3 us, bandwidth: 10 GB/s}]\n"
    )
    assert found == Dragonfly(
        4, 2, 1, 2, LINK, Link(2e-6, 50e9), Link(3e-6, 10e9), Arrangement.ABSOLUTE, Routing.VALIANT
    )
    assert topology("  shape: dragonfly\n  dims: [2, 1, 4]\n").long_links_per_router == 3


EDGES = """\
  edges:
    - {a: 0, b: hub}
    - {a: 1, b: hub, bandwidth: 20 GB/s, latency: 2 us, duplex: half}
    - {a: hub, b: 2, back: {bandwidth: 10 GB/s}}
    - {a: 2, b: 3}
    - {a: 3, b: 2, duplex: one way}
  domain: 4
"""
FOUR = HOST.replace("count: 8", "count: 4")


def graph(lines):
    found = cluster_from(parse_yaml(FOUR + FIGURES + lines, "c.yaml")).network.tiers[0].shape
    assert isinstance(found, EdgeList)
    return found


def test_edges_are_a_graph():
    found = graph(EDGES + "  through_chips: true\n")
    assert (found.num_chips, found.switches, found.through_chips) == (4, ("hub",), True)
    first, second, third, _, last = found.edges
    assert (first.link, first.duplex) == (LINK, Duplex.FULL)
    assert (second.link, second.duplex) == (Link(2e-6, 20e9), Duplex.HALF)
    assert (third.link, third.back) == (LINK, Link(1e-6, 10e9))
    assert last.duplex is Duplex.ONE_WAY


def test_chips_pass_on_unless_there_are_switches():
    square = "  edges: [{a: 0, b: 1}, {a: 1, b: 2}, {a: 2, b: 3}, {a: 3, b: 0}]\n"
    star = "  edges: [{a: 0, b: s}, {a: 1, b: s}, {a: 2, b: s}, {a: 3, b: s}]\n"
    assert graph(square).through_chips
    assert not graph(star).through_chips


@pytest.mark.parametrize(
    ("lines", "problem", "line"),
    [
        ("  shape: torus\n  dims: [2, 3]\n  domain: 8\n", "dims of 2 x 3 make 6 chips, but there are 8", 11),
        ("  shape: torus\n  dims: [2, 3]\n", "the 8 chips are not whole domains of 2 x 3 = 6", 11),
        ("  shape: torus\n", "a torus needs `dims`", 10),
        ("  dims: [8]\n", "`dims` has no effect on a switch", 10),
        ("  shape: ring\n  dims: [8]\n", "`dims` has no effect on a ring", 11),
        ("  shape: ring\n  reduces: true\n", "`reduces` has no effect on a ring", 11),
        ("  shape: ring\n  duplex: half\n", "`duplex` has no effect on a ring", 11),
        ("  through_chips: true\n", "`through_chips` has no effect on a switch", 10),
        ("  shape: mesh\n  dims: [8]\n  routing: valiant\n", "`routing` has no effect on a mesh", 12),
        ("  shape: mesh\n  dims: [2, 4]\n  links: [{}]\n", "1 links for 2 dims", 12),
        ("  shape: dragonfly\n  dims: [2, 4]\n", "2 dims for a dragonfly", 11),
        ("  shape: dragonfly\n  dims: [1, 1, 8]\n  long_links: 2\n", "do not reach 7 other groups", 11),
        ("  shape: ring\n  edges: [{a: 0, b: 1}]\n", "a fabric of edges has no shape", 10),
        ("  edges: [{a: 0, b: 1}]\n", "no way from chip 0 to chip 2", 10),
        ("  edges:\n    - {a: 0, b: 1}\n    - {a: 1, b: 1}\n", "a link from 1 to itself", 12),
        ("  edges:\n    - {a: 0, b: 9}\n", "no chip 9 in a domain of 8", 11),
        ("  edges: [{a: 0, b: 1, bandwidth: 0 GB/s}]\n", "of zero", 10),
        ("  edges: [{a: 0, b: 1, bandwidth: 5}]\n", "needs a unit", 10),
        ("  edges: []\n", "at least 1 item", 10),
        ("  shape: torrus\n", "shape cannot be 'torrus'", 10),
        ("  shape: torus\n  dims: [0, 8]\n", "greater than or equal to 1", 11),
    ],
)
def test_mistakes_are_told_with_their_line(lines, problem, line):
    error = error_of(lines)
    assert problem in error.problem
    assert error.where == f"c.yaml:{line}"
    assert error.hint


def test_figures_that_nobody_reads_are_refused():
    links = "  shape: mesh\n  dims: [2, 4]\n  links: [{bandwidth: 1 GB/s}, {bandwidth: 2 GB/s}]\n"
    assert "`bandwidth` has no effect" in error_of(links).problem
    assert topology(links, "  latency: 1 us\n").links == (Link(1e-6, 1e9), Link(1e-6, 2e9))


def test_rates_and_latencies_of_links_are_enough():
    links = "  shape: mesh\n  dims: [8]\n  links: [{bandwidth: 1 GB/s, latency: 4 us}]\n"
    assert topology(links, "").links == (Link(4e-6, 1e9),)


def test_a_domain_of_several_hosts_may_be_a_torus_without_cards():
    text = HOST.replace("device: simulated", "device: simulated\nrepeat: 4") + FIGURES
    found = cluster_from(parse_yaml(text + "  shape: torus\n  dims: [4, 8]\n", "c.yaml"))
    assert [tier.size for tier in found.network.tiers] == [32]
    with pytest.raises(UserError, match="`scale_out` has no effect"):
        cluster_from(parse_yaml(text + "  shape: torus\n  dims: [4, 8]\nscale_out: [{name: x}]\n", "c.yaml"))


# Protocols: figures of a message by itself, and those of a stage of a collective.
NCCL = "  setup: 30 us\n  protocols:\n    - {name: nccl, latency: 0.5 us, share: 0.75, pipelined: true}\n"


def test_a_stage_has_its_own_latency_and_share_and_nothing_counts_twice():
    found = cluster("  efficiency: 0.9\n" + NCCL)
    tier = found.network.tiers[0]
    assert tier.setup_s == 30e-6
    protocol = tier.protocols[0]
    assert (protocol.name, protocol.pipelined) == ("nccl", True)
    stage = protocol.on(tier.link)
    assert (stage.latency_s, stage.bytes_per_s) == pytest.approx((0.5e-6, 0.75 * 50e9))
    assert tier.link.bytes_per_s == pytest.approx(0.9 * 50e9)  # a message by itself
    assert tier.link.latency_s + tier.issue_s == pytest.approx(1e-6)


def test_a_library_offers_some_algorithms():
    lines = "  protocols: [{name: a, algorithms: [ring, double tree]}, {name: b}]\n"
    first, second = cluster(lines).network.tiers[0].protocols
    assert (first.algorithms, second.algorithms) == (("ring", "double tree"), ())


def test_a_protocol_may_reach_more_than_a_message_by_itself():
    tier = cluster("  efficiency: 0.6\n" + NCCL).network.tiers[0]
    assert tier.protocols[0].on(tier.link).bytes_per_s == pytest.approx(0.75 * 50e9)


def test_without_protocols_a_message_is_a_message():
    found = cluster("  setup: 3 us\n")
    tier = found.network.tiers[0]
    assert (tier.setup_s, tier.link, tier.issue_s) == (3e-6, LINK, 0.0)
    assert tier.protocols == (Protocol("plain"),)


def test_links_of_a_torus_are_as_much_quicker_in_a_collective():
    found = topology("  shape: mesh\n  dims: [2, 4]\n  links: [{}, {latency: 4 us}]\n" + NCCL, FIGURES)
    assert [link.latency_s for link in found.links] == pytest.approx([0.5e-6, 3.5e-6])


@given(
    st.lists(st.tuples(st.integers(0, 300), st.integers(1, 100)), min_size=1, max_size=4),
    st.integers(1, 100),
)
def test_every_protocol_gets_the_figures_that_were_given(figures, efficiency):
    protocols = "".join(
        f"    - {{name: p{number}, latency: {latency / 100} us, share: {share / 100}}}\n"
        for number, (latency, share) in enumerate(figures)
    )
    tier = cluster(f"  efficiency: {efficiency / 100}\n  protocols:\n{protocols}").network.tiers[0]
    for protocol, (latency, share) in zip(tier.protocols, figures, strict=True):
        stage = protocol.on(tier.link)
        assert stage.latency_s == pytest.approx(latency / 1e8, abs=1e-18)
        assert stage.bytes_per_s == pytest.approx(share / 100 * 50e9)


@pytest.mark.parametrize(
    ("lines", "problem"),
    [
        ("  protocols: [{name: a}, {name: a}]\n", "two protocols are named 'a'"),
        ("  protocols: [{name: a, share: 1.5}]\n", "less than or equal to 1"),
        ("  protocols: [{name: a, algorithms: [rings]}]\n", "there is no algorithm 'rings'"),
        ("  protocols: [{name: a, ops: [allreduce]}]\n", "there is no operation 'allreduce'"),
        ("  protocols: [{name: a, shar: 0.5}]\n", "unknown key"),
        (
            "  shape: mesh\n  dims: [8]\n  links: [{latency: 0.1 us}]\n  protocols: [{name: a, latency: 0.2 us}]\n",
            "has no effect",
        ),
    ],
)
def test_protocols_that_cannot_be_are_refused(lines, problem):
    assert problem in error_of(lines).problem


def test_a_stage_cannot_be_quicker_than_its_slowest_link_allows():
    lines = "  shape: mesh\n  dims: [2, 4]\n  links: [{latency: 0.2 us}, {}]\n" + NCCL
    assert "quicker than one of the links" in error_of(lines).problem


def test_a_share_above_the_cards_is_refused():
    text = HOST.replace(
        "count: 8}]", "count: 8}]\n    nics: {bandwidth: 1 GB/s, latency: 1 us, efficiency: 0.5}"
    )
    text = text.replace("device: simulated", "device: simulated\nrepeat: 2") + FIGURES
    with pytest.raises(UserError, match="above the efficiency of"):
        cluster_from(parse_yaml(text + "scale_out: [{name: x, protocols: [{name: a, share: 0.6}]}]\n", "c"))
