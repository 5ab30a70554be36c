"""Tiered topologies: one numbering over all copies of all fabrics, and routes that stay inside their fabric."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from comms.errors import CommsError
from comms.networks.fabrics.switch_tree import Tree
from comms.networks.fabrics.torus_mesh import Torus
from comms.networks.links import Link
from comms.networks.tiered import Fabric, TieredTopology

FEW = settings(max_examples=60)
LINK = Link(1e-6, 1e9)


@st.composite
def tiered(draw):
    """A torus or a crossbar inside, a crossbar over whole and part groups, perhaps one over all."""
    inner = Torus((2, 2), (LINK,)) if draw(st.booleans()) else Tree(4, LINK)
    num_chips = draw(st.integers(5, 24))
    fabrics = [Fabric(inner, 4, tuple(0 for _ in inner.tiers))]
    if draw(st.booleans()):
        fabrics.append(Fabric(Tree(8, LINK), 8, (1,)))
    fabrics.append(Fabric(Tree(num_chips, LINK), num_chips, (2,)))
    return TieredTopology(num_chips, ("inner", "middle", "outer"), tuple(fabrics))


@FEW
@given(tiered(), st.data())
def test_routes_lead_from_end_to_end_over_wires_of_the_innermost_common_fabric(topology, data):
    chip = st.integers(0, topology.num_chips - 1)
    pairs = data.draw(st.lists(st.tuples(chip, chip), min_size=1, max_size=20))
    src, dst = (np.array(column) for column in zip(*pairs, strict=True))
    wires, routes = topology.wires(), topology.routes(src, dst)
    for message, (start, end) in enumerate(pairs):
        way = routes.of(message)
        nodes = [start, *wires.head[way]]
        assert nodes[-1] == end
        assert wires.tail[way].tolist() == nodes[:-1]
        fabric = next(f for f in topology.fabrics if start // f.size == end // f.size)
        assert set(wires.tier[way]) <= set(fabric.tiers)


@FEW
@given(tiered())
def test_every_node_and_wire_has_one_number(topology):
    wires = topology.wires()
    assert set(wires.tail) | set(wires.head) == set(range(topology.num_nodes))
    assert wires.shares.tolist() == list(range(wires.num_wires))
    assert len(set(zip(wires.tail, wires.head, wires.tier, strict=True))) == wires.num_wires


@FEW
@given(tiered(), st.data())
def test_a_switch_is_reached_from_the_chips_below_it(topology, data):
    chip = data.draw(st.integers(4, topology.num_chips - 1))
    chips = np.array([0, chip])
    switch = np.full(2, topology.switch_over(chips))
    wires, routes = topology.wires(), topology.routes(chips, switch)
    assert wires.head[routes.wires].tolist() == switch.tolist()
    assert wires.tail[topology.routes(switch, chips).wires].tolist() == switch.tolist()


def test_what_has_no_route_or_switch_is_refused():
    torus = TieredTopology(4, ("x",), (Fabric(Torus((2, 2), (LINK,)), 4, (0, 0)),))
    with pytest.raises(CommsError, match="no switch over"):
        torus.switch_over([0, 1])
    with pytest.raises(CommsError, match="no route from node 0 to node 9"):
        torus.routes(np.array([0]), np.array([9]))
    hosts = TieredTopology(
        8, ("host", "net"), (Fabric(Tree(4, LINK), 4, (0,)), Fabric(Tree(8, LINK), 8, (1,)))
    )
    with pytest.raises(CommsError, match="no route from node 5 to node 8"):
        hosts.routes(np.array([5]), np.array([hosts.switch_over([0, 1])]))


def test_one_chip_has_no_wires():
    alone = TieredTopology(1, ("on-chip",), ())
    assert (alone.wires().num_wires, alone.num_nodes) == (0, 1)
    assert alone.routes(np.array([0]), np.array([0])).wires.tolist() == []
