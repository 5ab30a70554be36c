"""Latency tiers of every shipped cluster, against the ranges that are published for each kind of link; published
on-chip figures come out exactly, and every row is what the topology's routes say."""

from dataclasses import replace
from math import prod
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from comms.networks.fabrics.edge_list import Edge, EdgeList
from comms.networks.fabrics.switch_tree import Tree
from comms.networks.fabrics.torus_mesh import FullMesh, Torus
from comms.networks.layers import Switch, Trunk
from comms.networks.links import Link
from comms.networks.network import Network, Tier, TierKind, layered, switched
from kernels.chips import Noc, NocShape, Port, load_chip
from orchestrator.config.hardware.cluster_file import load_cluster
from orchestrator.config.hardware.latency_tiers import latency_tiers, sum_over_cores_s

ROOT = Path(__file__).parents[4]
SHIPPED = sorted(path.stem for path in (ROOT / "cluster_configs").glob("*.yaml"))

NS, US = 1e-9, 1e-6
NVLINK = (1.5 * US, 3 * US)  # GPU to GPU write through NVSwitch (recalled)
INFINIBAND = (0.9 * US, 1.3 * US)  # MPI ping-pong, half (recalled)
ROCE = (1.5 * US, 3 * US)  # RDMA write over Ethernet, one switch (recalled)
TCP = (10 * US, 30 * US)  # kernel TCP, half of a ping-pong (recalled)
PCIE = (1.052 * US, 1.342 * US)  # DMA from and to a PCIe 4 card, measured (Wormhole documentation)
HOP = (9 * NS, 9 * NS)

# cluster -> the row that begins so -> published range of its latency
PUBLISHED = {
    "cerebras-cs3": {
        "core to its own memory": (0.9 * NS, 1.2 * NS),  # one cycle
        "core to neighbouring core": (0.9 * NS, 1.2 * NS),
        "host to host through swarmx": ROCE,
    },
    "cpu": {"chip to chip through a switch": (10 * US, 100 * US)},
    "dgx-a100": {
        "chip to the memory": PCIE,
        "chip to chip through a switch": NVLINK,
        "host to host through infiniband": INFINIBAND,
    },
    "dgx-h100-superpod": {
        "chip to the memory": PCIE,
        "chip to chip through a switch": NVLINK,
        "host to host under one switch": INFINIBAND,
        "host to host through spine": (1.3 * US, 2.6 * US),
    },
    "graphcore-pod64": {
        "core to its own memory": (3.2 * NS, 3.3 * NS),  # 6 cycles
        "host to host through gateway": ROCE,
    },
    "jetson-edge": {"host to host through ethernet": TCP},
    "laptop": {
        "chip to chip behind one PCIe switch": PCIE,
        "chip to chip through the host bridge": (2 * PCIE[0], 2 * PCIE[1]),
        "host to host through ethernet": TCP,
    },
    "pcie-workstation": {
        "chip to chip behind one PCIe switch": PCIE,
        "chip to chip through the host bridge": (2 * PCIE[0], 2 * PCIE[1]),
    },
    "tenstorrent-galaxy": {
        "core to neighbouring core": (19 * NS, 19 * NS),
        "core to the furthest": (109 * NS, 109 * NS),
        "chip to the memory": PCIE,
        "chip to the nearest chip": (0.5 * US, 0.8 * US),  # half of a ping, a hop of the fabric (tt-metal)
    },
    "tpu-v5p-pod": {
        "chip to the nearest chip": (1 * US, 1 * US),
        "chip to the furthest": (32 * US, 32 * US),  # 8 + 10 + 14 hops
        "host to host through data-centre": TCP,
    },
    "two-host-ethernet": {
        "chip to chip through the host bridge": (14.5 * US, 14.5 * US),  # staged (NCCL issue 1127)
        "host to host through ethernet": TCP,
    },
}
# The same for what a large message gets alone.
RATES = {
    "dgx-a100": {"chip to chip through a switch": 274e9, "host to host through infiniband": 24e9},
    "dgx-h100-superpod": {"chip to chip through a switch": 376e9},
    "graphcore-pod64": {"chip to the furthest": 32e9},
    "pcie-workstation": {"chip to chip behind": 24e9, "chip to chip through the host bridge": 9.9e9},
    "tenstorrent-galaxy": {
        "core to neighbouring": 32e9,
        "chip to the memory": 24.04e9,
        "chip to the nearest": 47e9,
    },
    "tpu-v5p-pod": {"chip to the nearest": 90e9, "chip to the memory": 15e9},
    "two-host-ethernet": {"chip to chip through the host bridge": 22.3e9},
}


def tiers_of(cluster):
    return latency_tiers(cluster.network, cluster.chip_types)


def table(name):
    return tiers_of(load_cluster(ROOT / f"cluster_configs/{name}.yaml"))


def row(name, start):
    found = [row for row in table(name) if row.between.startswith(start)]
    assert len(found) == 1, [row.between for row in table(name)]
    return found[0]


def test_every_shipped_cluster_is_compared():
    assert set(PUBLISHED) == set(SHIPPED)


@pytest.mark.parametrize(
    ("name", "start"), [(name, start) for name in sorted(PUBLISHED) for start in PUBLISHED[name]]
)
def test_published_latencies_are_reproduced(name, start):
    low, high = PUBLISHED[name][start]
    assert low * (1 - 1e-9) <= row(name, start).latency_s <= high * (1 + 1e-9)


@pytest.mark.parametrize(
    ("name", "start"), [(name, start) for name in sorted(RATES) for start in RATES[name]]
)
def test_published_rates_are_reproduced(name, start):
    assert row(name, start).bytes_per_s == pytest.approx(RATES[name][start], rel=0.01)


@pytest.mark.parametrize("name", SHIPPED)
def test_every_row_has_a_source_and_loaded_is_never_faster(name):
    for each in table(name):
        assert each.source
        assert "as given in the cluster file" not in each.source
        if each.bytes_per_s is not None and each.loaded_bytes_per_s is not None:
            assert each.loaded_bytes_per_s <= each.bytes_per_s * (1 + 1e-9)


@pytest.mark.parametrize(
    ("own", "source"),
    [
        ("bandwidth: 50 GB/s, latency: 1 us", "the cluster file"),
        ("latency: 1 us", "CHIP; latency: the cluster file"),
        ("bandwidth: 50 GB/s", "the cluster file; latency: CHIP"),
        ("bandwidth: 50 GB/s, source: our test bench", "our test bench"),
    ],
)
def test_a_figure_of_the_cluster_file_is_credited_to_it(own, source, tmp_path):
    path = tmp_path / "own.yaml"
    path.write_text(
        "kind: cluster\nversion: 1\nname: own\ndevice: simulated\n"
        f"hosts: [{{count: 1, chips: [{{like: nvidia_h100_sxm, count: 2}}]}}]\nscale_up: {{{own}}}\n"
    )
    cluster = load_cluster(path)
    found = next(r.source for r in latency_tiers(cluster.network, cluster.chip_types) if r.tier == "scale-up")
    figure = "latency" if source.endswith("CHIP") else "bandwidth"
    assert found == source.replace("CHIP", cluster.chip(0).sources[f"scale_up.{figure}"])


@pytest.mark.parametrize("name", SHIPPED)
def test_a_chip_without_a_published_on_chip_latency_says_so(name):
    chip = load_cluster(ROOT / f"cluster_configs/{name}.yaml").chip(0)
    known = chip.noc is not None and chip.noc.hop_latency_s is not None
    rows = [each for each in table(name) if each.tier == "on-chip"]
    assert rows
    assert all((each.latency_s is not None) == known for each in rows)
    assert all(("not known" in each.source) != known for each in rows)


def test_a_wormhole_hop_is_nine_cycles():
    near, far = row("tenstorrent-galaxy", "core to neigh"), row("tenstorrent-galaxy", "core to the furthest")
    assert (far.latency_s - near.latency_s) / (far.hops - near.hops) == pytest.approx(HOP[0], rel=1e-12)


def test_congestion_of_the_exchange_is_told():
    assert row("graphcore-pod64", "core to core").loaded_factor == 1.24


def test_tiers_are_orders_of_magnitude_apart():
    found = [each.latency_s for each in table("cerebras-cs3") if each.latency_s]
    assert max(found) / min(found) > 1000


def test_a_part_of_a_pod_has_its_own_table():
    part = tiers_of(load_cluster(ROOT / "cluster_configs/tpu-v5p-pod.yaml").take(320))
    far = next(each for each in part if each.between.startswith("chip to the furthest"))
    assert far.hops == 18  # a plane of 16 x 20


NOBODY = Network((switched("on-chip", 1, Link(0.0, 1e9), TierKind.ON_CHIP),))
# Two tori of opposite directions, 9 cycles a hop and 5 at either end, 1 GHz, 32 bytes a cycle.
OPPOSITE_TORI = Noc(
    "2 opposite tori",
    NocShape.ONE_WAY_TORUS,
    dims=(10, 12),
    networks=2,
    hop_latency_s=9e-9,
    entry_latency_s=5e-9,
    hop_bytes_per_s=32e9,
)


def chip_of(name, cores, noc, **sources):
    """A chip with this network and no host, its figures from these sources."""
    known = {f"noc.{figure}": source for figure, source in sources.items()}
    return replace(load_chip("nvidia_l4"), name=name, cores=cores, noc=noc, host_link=None, sources=known)


WORMHOLE = chip_of("Wormhole", 72, OPPOSITE_TORI, hop_latency="documentation")
WAFER = chip_of(
    "wafer",
    381_066,
    Noc("mesh", NocShape.MESH, dims=(633, 602), hop_latency_s=1 / 1.1e9),
    hop_latency="paper",
)


def shaped(name, kind, topology):
    """A tier of any topology."""
    return Tier(name, kind, topology.num_chips, topology)


def rows(network, *chips):
    return {row.between: row for row in latency_tiers(network, chips)}


@pytest.mark.parametrize("hops", range(1, 12))
def test_a_wormhole_takes_nine_cycles_a_hop_and_five_at_either_end(hops):
    ring = Noc(
        "ring",
        NocShape.TORUS,
        (2 * hops,),
        hop_latency_s=9e-9,
        entry_latency_s=5e-9,
        hop_bytes_per_s=32e9,
    )
    row = latency_tiers(NOBODY, (chip_of("line", 24, ring, hop_latency="x"),))[-1]
    assert (row.hops, row.latency_s) == (hops, pytest.approx((5 + 9 * hops + 5) * 1e-9, rel=1e-12))


def test_the_cores_of_a_wormhole():
    near, far = latency_tiers(NOBODY, (WORMHOLE,))
    assert (near.hops, near.latency_s) == (1, pytest.approx(19e-9, rel=1e-12))
    assert (far.hops, far.latency_s) == (11, pytest.approx(109e-9, rel=1e-12))  # half of 10 + 12
    assert (near.bytes_per_s, near.loaded_bytes_per_s) == (32e9, 32e9)
    assert far.loaded_bytes_per_s == 32e9 / 3  # twelve in a ring, two networks
    assert far.ratio == pytest.approx(109 / 19)
    assert near.ratio is None


def test_no_core_is_further_than_the_furthest():
    torus = Torus((10, 12), (Link(9e-9, 32e9),), num_networks=2, one_way=True, access=Link(5e-9, 32e9))
    src, dst = np.divmod(np.arange(120**2), 120)
    assert np.diff(torus.routes(src, dst).offsets).max() - 2 == 11


@pytest.mark.parametrize("clock", [0.85e9, 1.1e9])
def test_a_number_summed_over_380000_cores_takes_less_than_1500_ns(clock):
    """Measured on a wafer: under 1.5 us, about a tenth more than its diameter."""
    seconds = sum_over_cores_s(Noc("mesh", NocShape.MESH, (633, 602), hop_latency_s=1 / clock))
    assert 1.0e-6 < seconds < 1.5e-6
    assert seconds == pytest.approx((632 + 601) / clock, rel=0.01)


def test_the_sum_over_a_mesh_is_rows_to_the_middle_and_back():
    """Played core by core: each adds what comes and sends on, one hop a cycle."""
    for dims in ((5, 4), (3, 3), (6, 7)):
        mesh = Noc("mesh", NocShape.MESH, dims, hop_latency_s=1.0)
        to_middle = sum(max(abs(at - size // 2) for at in range(size)) for size in dims)
        assert sum_over_cores_s(mesh) == 2 * to_middle


def test_only_meshes_without_entries_sum_on_the_way():
    assert sum_over_cores_s(OPPOSITE_TORI) is None
    assert not any("summed" in between for between in rows(NOBODY, WORMHOLE))
    assert rows(NOBODY, WAFER)["a number summed over 381066 cores, on wafer"].latency_s < 1.5e-6


def test_a_large_mesh_is_not_laid_out_core_by_core():
    near, far = latency_tiers(NOBODY, (WAFER,))[:2]
    assert (near.hops, far.hops) == (1, 632 + 601)
    assert (far.bytes_per_s, far.loaded_bytes_per_s) == (None, None)  # no rate is known


@settings(max_examples=30)
@given(st.lists(st.sampled_from([2, 4, 8]), min_size=1, max_size=3), st.booleans())
def test_loaded_rates_are_those_of_all_cores_sending_half_way_round(dims, wraps):
    shape = NocShape.TORUS if wraps else NocShape.MESH
    grid = Noc("grid", shape, tuple(dims), hop_latency_s=1e-9, hop_bytes_per_s=1e9)
    far = latency_tiers(NOBODY, (chip_of("grid", prod(dims), grid, hop_latency="x"),))[1]
    torus = Torus(tuple(dims), (Link(1e-9, 1e9),), (wraps,))
    cores = np.arange(torus.num_chips)
    digits = (torus.digits(cores) + np.array(dims)[:, None] // 2) % np.array(dims)[:, None]
    to = (digits * np.array([prod(dims[:k]) for k in range(len(dims))])[:, None]).sum(axis=0)
    users = np.bincount(torus.routes(cores, to).wires)
    assert far.loaded_bytes_per_s == pytest.approx(1e9 / users.max())


@pytest.mark.parametrize(
    ("shape", "hops"),
    [(NocShape.ONE_WAY_TORUS, 3 + 6), (NocShape.TORUS, 2 + 3), (NocShape.MESH, 3 + 6)],
)
def test_a_multicast_reaches_all_cores_at_the_rate_of_one_message(shape, hops):
    grid = Noc("grid", shape, (4, 7), hop_latency_s=1e-9, hop_bytes_per_s=1e9, multicasts=True)
    row = rows(NOBODY, chip_of("grid", 28, grid))["core to all 28 cores at once, on grid"]
    assert (row.hops, row.latency_s) == (hops, pytest.approx(hops * 1e-9))
    assert (row.bytes_per_s, row.loaded_bytes_per_s) == (1e9, pytest.approx(1e9 / 27))
    wraps, one_way = shape is not NocShape.MESH, shape is NocShape.ONE_WAY_TORUS
    torus, everyone = Torus((4, 7), (Link(1e-9, 1e9),), (wraps,), one_way=one_way), np.arange(28)
    assert hops == np.diff(torus.routes(np.zeros_like(everyone), everyone).offsets).max()
    silent = chip_of("grid", 28, replace(grid, multicasts=False))
    assert not any("at once" in between for between in rows(NOBODY, silent))


def test_what_is_not_known_is_said_and_not_guessed():
    exchange = Noc("exchange", aggregate_bytes_per_s=8e12, memory_latency_s=3e-9, loaded_latency_factor=1.24)
    memory, core = latency_tiers(NOBODY, (chip_of("ipu", 1000, exchange, memory_latency="notes"),))
    assert (memory.latency_s, memory.hops, memory.source) == (3e-9, 0, "notes")
    assert (core.latency_s, core.bytes_per_s, core.hops, core.ratio) == (None, None, None, None)
    assert (core.loaded_bytes_per_s, core.loaded_factor) == (8e9, 1.24)
    assert "not known" in core.source
    assert "exchange" in core.source


def test_a_row_is_compared_with_the_last_one_known():
    unknown = chip_of("gpu", 100, Noc("crossbar"))
    net = Network((switched("fast", 4, Link(2e-6, 1e9), TierKind.SCALE_UP),))
    memory = chip_of("ipu", 10, Noc("exchange", memory_latency_s=4e-9))
    assert [row.ratio for row in latency_tiers(net, (memory, unknown))] == [
        None,
        None,
        None,
        pytest.approx(500),
    ]


def test_switches_have_one_row_each_and_say_what_they_are():
    tree = Tree(
        8, Link(1e-6, 20e9), Switch("pcie switch"), (Trunk(4, Link(1e-6, 20e9), Switch("pcie root")),)
    )
    out = Tree(64, Link(2e-6, 10e9), Switch("leaf"), (Trunk(32, Link(1e-6, 160e9), Switch("spine")),))
    net = Network((*layered(tree, TierKind.PCIE), *layered(out, TierKind.SCALE_OUT, inner=8)))
    table = latency_tiers(net, ())
    assert [row.between for row in table] == [
        "chip to chip behind one PCIe switch",
        "chip to chip through the host bridge",
        "host to host under one switch, leaf",
        "host to host through spine",
    ]
    assert [row.hops for row in table] == [2, 4, 2, 4]
    assert [row.latency_s for row in table] == pytest.approx([2e-6, 4e-6, 4e-6, 6e-6])
    assert table[1].loaded_bytes_per_s == 5e9
    assert table[3].loaded_bytes_per_s == 5e9


def test_issuing_a_message_counts_once():
    tier = switched("fast", 4, Link(0.5e-6, 1e9), TierKind.SCALE_UP)
    net = Network((replace(tier, issue_s=1.5e-6),))
    assert latency_tiers(net, ())[0].latency_s == pytest.approx(2e-6)


def test_a_torus_has_neighbours_and_chips_far_away():
    net = Network((shaped("ici", TierKind.SCALE_UP, Torus((4, 6, 8), (Link(1e-6, 90e9),))),))
    near, far = latency_tiers(net, ())
    assert (near.latency_s, near.hops, near.bytes_per_s) == (1e-6, 1, 90e9)
    assert (far.latency_s, far.hops) == (9e-6, 9)
    assert (far.bytes_per_s, far.loaded_bytes_per_s) == (90e9, 45e9)


def test_a_ring_of_two_has_no_chips_far_away():
    net = Network((shaped("ring", TierKind.SCALE_UP, Torus((2,), (Link(1e-6, 1e9),))),))
    assert [row.between for row in latency_tiers(net, ())] == ["chip to the nearest chip, ring"]


def test_wires_of_their_own_are_said():
    net = Network((shaped("board", TierKind.SCALE_UP, FullMesh(4, Link(1e-6, 1e9))),))
    assert latency_tiers(net, ())[0].between == "chip to chip by a wire of their own, board"


def test_graphs_are_looked_at_route_by_route():
    edges = (Edge(0, 1, Link(1e-6, 4e9)), Edge(1, 2, Link(2e-6, 2e9)), Edge(2, 3, Link(3e-6, 3e9)))
    near, far = latency_tiers(Network((shaped("line", TierKind.SCALE_UP, EdgeList(4, edges)),)), ())
    assert (near.latency_s, near.bytes_per_s, near.hops) == (1e-6, 4e9, 1)
    assert (far.latency_s, far.bytes_per_s, far.hops) == (pytest.approx(6e-6), 2e9, 3)
    assert far.loaded_bytes_per_s == EdgeList(4, edges).loaded_link.bytes_per_s


def test_the_host_stands_between_cores_and_chips():
    port = Port("pcie4_x16", 24e9, 1.3e-6)
    host = replace(WORMHOLE, host_link=port, sources={"host_link.latency": "measured"})
    net = Network((switched("fast", 4, Link(2e-6, 1e9), TierKind.SCALE_UP),))
    table = latency_tiers(net, (host,))
    assert [row.tier for row in table] == ["on-chip", "on-chip", "pcie4_x16", "fast"]
    assert (table[2].latency_s, table[2].source) == (1.3e-6, "measured")


def test_a_cluster_of_any_size_has_a_table():
    from comms.networks.network import UNBOUNDED

    net = Network(
        (
            switched("fast", 8, Link(2e-6, 1e9), TierKind.SCALE_UP),
            switched("net", UNBOUNDED, Link(5e-6, 1e8), TierKind.SCALE_OUT),
        )
    )
    assert [row.hops for row in latency_tiers(net, ())] == [2, 2]
