"""Latency tiers of every shipped cluster, against the ranges that are published for each kind of link."""

from pathlib import Path

import pytest

from orchestrator.config.hardware.cluster_file import load_cluster
from orchestrator.config.hardware.latency_tiers import latency_tiers

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
