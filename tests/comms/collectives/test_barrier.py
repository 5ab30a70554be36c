"""A barrier costs what its messages cost: one after another along its algorithm, each its latency, however large."""

import numpy as np
import pytest

from comms.collectives.schedule import Op
from comms.networks.fabrics.edge_list import Edge, EdgeList
from comms.networks.fabrics.torus_mesh import Torus
from comms.networks.links import Link, Protocol
from comms.networks.network import Network, Tier, TierKind, switched
from comms.networks.topology import Conditions, route_latencies
from comms.selection.choice import choose
from comms.selection.collective import estimate
from comms.selection.collective import simulate as move
from comms.simulation.full import simulate

INNER, OUTER = Link(1e-6, 1e11), Link(1e-5, 1e10)


def rounds(number):
    return (number - 1).bit_length()


def took(network, nbytes=0.0):
    """By arithmetic, by representatives and message by message."""
    by_hand = [estimate("barrier", nbytes, network, fidelity=how).seconds for how in ("closed", "folded")]
    return [*by_hand, move("barrier", nbytes, network).seconds]


@pytest.mark.parametrize("nbytes", [0.0, 64e6])
@pytest.mark.parametrize("number", [2, 3, 5, 8, 9, 64])
def test_over_a_switch_it_is_a_message_for_each_doubling(number, nbytes):
    assert took(Network.of((number, INNER)), nbytes) == pytest.approx([rounds(number) * 1e-6] * 3)


@pytest.mark.parametrize(("chips", "hosts"), [(2, 2), (8, 4), (4, 7), (6, 3)])
def test_over_hosts_messages_between_them_add_to_those_within(chips, hosts):
    expected = rounds(chips) * 1e-6 + rounds(hosts) * 1e-5
    assert took(Network.of((chips, INNER), (chips * hosts, OUTER))) == pytest.approx([expected] * 3)


def test_a_library_adds_its_setup_once_and_its_latency_to_every_message():
    protocol = Protocol("simple", latency_s=3e-6, share=0.5, pipelined=True)
    tier = switched("switch", 8, INNER, TierKind.SCALE_UP)
    tier = Tier(tier.name, tier.kind, 8, tier.shape, setup_s=2e-5, protocols=(protocol,))
    assert took(Network((tier,))) == pytest.approx([2e-5 + 3 * (1e-6 + 3e-6)] * 3)


@pytest.mark.parametrize("length", [3, 4, 8, 9])
def test_around_a_ring_it_goes_to_the_middle_and_back(length):
    network = Network((Tier("ring", TierKind.SCALE_UP, length, Torus((length,), (INNER,))),))
    for fidelity in ("closed", "folded", "full"):
        found = estimate("barrier", 0.0, network, algorithm="torus tree", fidelity=fidelity)
        assert found.seconds == pytest.approx(2 * (length // 2) * 1e-6)


def test_on_any_graph_it_is_the_longest_chain_of_messages():
    edges = (Edge(0, 1, INNER), Edge(1, 2, OUTER), Edge(2, 3, INNER), Edge(3, 4, INNER), Edge(4, 0, OUTER))
    network = Network((Tier("graph", TierKind.SCALE_UP, 5, EdgeList(5, edges)),))
    topology, wires = network.topology(), network.topology().wires()
    choice = choose(Op.BARRIER, 0.0, range(5), network)
    job = choice.job(np.arange(5)[np.newaxis], topology)
    ready = np.zeros(5)
    for channel in job.schedule.channels:
        for each in (each for phase in channel.phases for each in phase):
            routes = topology.routes(each.pattern.src, each.pattern.dst)
            came = ready[each.pattern.src] + route_latencies(wires, routes)
            ready = ready.copy()
            np.maximum.at(ready, each.pattern.dst, came)
    assert simulate(topology, [job]).seconds[0] == pytest.approx(ready.max())


def test_a_chip_whose_messages_leave_late_delays_all_that_wait_for_it():
    network = Network.of((2, INNER))
    job = choose(Op.BARRIER, 0.0, range(2), network).job(np.arange(2)[np.newaxis], network.topology())
    late = Conditions(overhead_s={1: 5e-6})
    assert simulate(network.topology(), [job], late).seconds[0] == pytest.approx(6e-6)
