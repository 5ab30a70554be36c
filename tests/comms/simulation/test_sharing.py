"""Max-min fair rates against progressive filling by brute force, at the scale that they are meant for."""

import numpy as np
import pytest

from comms.networks.fabrics.switch_tree import Tree
from comms.networks.layers import Spread, Switch, Trunk
from comms.networks.links import Link
from comms.simulation.sharing import EPSILON, draw_in, draw_in_all, empty_flows, insert, remove, solve

LEAF, CHIPS = 32, 1024


def permutation(seed):
    """A random permutation over a 4:1 oversubscribed leaf-spine, paths by hash."""
    uplinks = Trunk(LEAF, Link(1e-6, 50e9), Switch("spine"), paths=LEAF // 4)
    fabric = Tree(CHIPS, Link(5e-7, 50e9), Switch("leaf"), (uplinks,), spread=Spread.HASHED)
    order = np.random.default_rng(seed).permutation(CHIPS)
    return fabric.wires(), fabric.routes(order, np.roll(order, 1))


def filled(capacity, offsets, wires):
    """Raise all rates together; whoever meets a full wire stops."""
    num = len(offsets) - 1
    flow_of = np.repeat(np.arange(num), np.diff(offsets))
    rates, growing = np.zeros(num), np.ones(num, dtype=bool)
    while growing.any():
        load = np.bincount(wires, weights=rates[flow_of], minlength=len(capacity))
        users = np.bincount(wires, weights=growing[flow_of], minlength=len(capacity))
        room = np.where(users > 0, (capacity - load) / np.maximum(users, 1), np.inf)
        rates[growing] += room.min()
        full = room <= room.min() * (1 + 1e-12) + 1e-3
        growing[flow_of[full[wires]]] = False
    return rates


def fair_rates(bytes_per_s, offsets, resources):
    """Max-min fair rates of flows with routes resources[offsets[i] : offsets[i + 1]], solved all at once."""
    num, drawn = len(offsets) - 1, 0
    flows = empty_flows(bytes_per_s, num, int(np.diff(offsets).max(initial=0)))
    for flow in range(num):
        insert(flows, flow, resources, int(offsets[flow]), int(offsets[flow + 1]))
        drawn = draw_in(flows, flow, drawn)
    solve(flows, drawn)
    return flows.flow["rate"]


@pytest.mark.parametrize("seed", range(3))
def test_a_thousand_flows_get_what_progressive_filling_gives_them(seed):
    wires, routes = permutation(seed)
    rates = fair_rates(wires.bytes_per_s, routes.offsets, routes.wires.astype(np.int32))
    assert rates == pytest.approx(filled(wires.bytes_per_s, routes.offsets, routes.wires), rel=1e-9)
    assert len(set(np.round(rates / 1e6))) > 5  # it is not one bottleneck for all


def test_only_what_a_flow_disturbs_is_solved_anew_and_nothing_else_would_change():
    wires, routes = permutation(0)
    capacity, resources = wires.bytes_per_s, routes.wires.astype(np.int32)
    flows = empty_flows(capacity, CHIPS, int(np.diff(routes.offsets).max()))
    there = np.zeros(CHIPS, dtype=bool)
    solved = 0
    random = np.random.default_rng(1)
    for step, flow in enumerate(random.integers(0, CHIPS, 3000)):
        route = resources[routes.offsets[flow] : routes.offsets[flow + 1]].tolist()
        drawn = 0
        if there[flow]:
            if not remove(flows, flow):
                for resource in route:
                    drawn = draw_in_all(flows, resource, drawn, True)
        elif not insert(flows, flow, resources, routes.offsets[flow], routes.offsets[flow + 1]):
            for resource in route:
                drawn = draw_in_all(flows, resource, drawn, False)
        there[flow] = not there[flow]
        if drawn:
            drawn = solve(flows, drawn)
            flows.flow["drawn"][flows.drawn[:drawn]] = False
            solved += drawn
        if step % 500 == 499:
            kept = np.flatnonzero(there)
            parts = [resources[routes.offsets[f] : routes.offsets[f + 1]] for f in kept]
            offsets = np.cumsum([0, *map(len, parts)])
            expected = filled(capacity, offsets, np.concatenate(parts))
            assert flows.flow["rate"][kept] == pytest.approx(expected, rel=10 * EPSILON)
    assert solved / 3000 < 0.05 * there.sum()
