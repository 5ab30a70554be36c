"""What if: each factor changes what it is about, by exactly that, and nothing else."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from comms.collectives.schedule import Op
from comms.networks.groups import mesh_group
from comms.selection.choice import choose
from orchestrator.config.hardware.cluster_file import cluster_path, load_cluster, shipped_clusters
from orchestrator.sweeps.what_if import Factors, scaled

FACTOR = st.floats(0.1, 10.0)


@given(st.sampled_from(sorted(shipped_clusters())), FACTOR, FACTOR)
def test_links_get_faster_by_the_factors_in_every_tier(name: str, bandwidth: float, latency: float) -> None:
    cluster = load_cluster(cluster_path(name))
    changed = scaled(cluster, Factors(bandwidth, latency))
    for before, after in zip(cluster.network.tiers, changed.network.tiers, strict=True):
        assert after.link.bytes_per_s == pytest.approx(bandwidth * before.link.bytes_per_s)
        assert after.link.latency_s == pytest.approx(latency * before.link.latency_s)
        assert after.setup_s == pytest.approx(latency * before.setup_s)
    assert changed.unit == cluster.unit


@given(FACTOR)
def test_a_network_that_is_as_many_times_faster_in_all_takes_that_share_of_the_time(factor: float) -> None:
    cluster = load_cluster(cluster_path("dgx-a100")).take(64)
    changed = scaled(cluster, Factors(factor, 1 / factor))
    members = mesh_group((("dp", 64),), ("dp",))
    before, after = (
        choose(Op("all_reduce"), 1 << 26, members, each.network).seconds for each in (cluster, changed)
    )
    assert after == pytest.approx(before / factor)


def test_compute_and_memory_are_of_the_chips_alone() -> None:
    cluster = load_cluster(cluster_path("dgx-a100")).take(8)
    changed = scaled(cluster, Factors(compute=2.0, memory=3.0))
    before, after = cluster.chip(0), changed.chip(0)
    assert after.peak("bf16") == 2 * before.peak("bf16")
    assert after.memory_bytes_per_s == 3 * before.memory_bytes_per_s
    assert after.memory_bytes == before.memory_bytes
    assert changed.network == cluster.network
    assert scaled(cluster, Factors()) is cluster
