from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from comms.errors import ClusterError, ConfigError
from orchestrator.config.hardware.cluster import Device
from orchestrator.runners.on_ray.placement import (
    ActorPlan,
    RayNode,
    busy,
    own_plan,
    require_room,
    spread_plan,
)
from orchestrator.runners.on_ray.ray_address import RayKind, ray_address


def machines(*cores: float, gpus: float = 0.0) -> list[RayNode]:
    return [RayNode(f"10.0.0.{n}", {"CPU": each, "GPU": gpus}) for n, each in enumerate(cores)]


def fits_by_search(plan: ActorPlan, cores: list[int]) -> bool:
    """Whether the bundles can be put one after the other, each on a machine of its own if they must be apart."""
    left, need = sorted(cores, reverse=True), int(plan.bundle["CPU"])
    for _ in range(plan.num_bundles):
        place = next((i for i, room in enumerate(left) if room >= need), None)
        if place is None:
            return False
        left[place] = -1 if plan.per_machine else left[place] - need
    return True


@given(st.lists(st.integers(0, 5), max_size=5), st.integers(1, 6), st.none() | st.integers(1, 3))
def test_room_is_refused_exactly_where_the_actors_cannot_be_put(
    cores: list[int], count: int, per: int | None
) -> None:
    plan = ActorPlan(count * (per or 1), per_machine=per)
    try:
        require_room(plan, machines(*cores))
    except ClusterError:
        assert not fits_by_search(plan, cores)
    else:
        assert fits_by_search(plan, cores)


def test_what_is_short_is_named_with_what_there_is_and_where() -> None:
    with pytest.raises(
        ClusterError, match="4 actors need 1 CPU and 1 GPU each, Ray has room for 2"
    ) as caught:
        require_room(ActorPlan(4, gpus=1), machines(8, gpus=2))
    assert caught.value.where == "Ray: 10.0.0.0 has 8 CPUs and 2 GPUs"
    assert caught.value.hint == "ask for at most 2 actors"
    with pytest.raises(ClusterError, match="2 hosts need a machine each with 4 CPUs, Ray has 1 of those"):
        require_room(ActorPlan(8, per_machine=4), machines(2, 4))
    with pytest.raises(ClusterError, match="room for 0") as caught:
        require_room(ActorPlan(1), [])
    assert "no machine is up" in caught.value.where
    assert "4 CPUs needed, 1 free" in busy(ActorPlan(4), {"CPU": 1.0}, 60.0).problem


def test_real_chips_follow_the_hosts_and_simulated_ones_the_cores(laptop) -> None:
    assert spread_plan(replace(laptop, actors=None), 3.0) == ActorPlan(3, strategy="SPREAD")
    assert spread_plan(replace(laptop, actors=None), 100.0).num_actors == laptop.num_chips
    assert spread_plan(replace(laptop, actors=None), 0.0).num_actors == 1
    assert spread_plan(replace(laptop, actors=2), 100.0).num_actors == 2
    real = replace(laptop, device=Device.CUDA)
    plan = spread_plan(real, 1.0)
    assert (plan.num_actors, plan.per_machine, plan.gpus) == (real.num_chips, real.chips_per_host, 1)
    assert plan.strategy == "STRICT_SPREAD"
    assert own_plan(real).per_machine is None


@pytest.mark.parametrize(
    ("given", "environment", "kind", "text"),
    [
        (None, {}, RayKind.OWN, "local"), (None, {"RAY_ADDRESS": ""}, RayKind.OWN, "local"),
        (None, {"RAY_ADDRESS": "auto"}, RayKind.CLUSTER, "auto"),
        (None, {"RAY_ADDRESS": "10.0.0.1:6379"}, RayKind.CLUSTER, "10.0.0.1:6379"),
        ("local", {"RAY_ADDRESS": "10.0.0.1:6379"}, RayKind.OWN, "local"),
        ("auto", {"RAY_ADDRESS": "10.0.0.1:6379"}, RayKind.CLUSTER, "10.0.0.1:6379"),
        ("ray://head:10001", {}, RayKind.CLIENT, "ray://head:10001"),
        ("[fd00::2]:6379", {}, RayKind.CLUSTER, "[fd00::2]:6379"),
    ],
)  # fmt: skip
def test_an_address_goes_before_the_environment(given, environment, kind, text) -> None:
    found = ray_address(given, environment)
    assert (found.kind, found.text) == (kind, text)


@pytest.mark.parametrize(
    "text",
    ["", "head", "head:", ":6379", "head:99999", "head:0", "ray://", "ray://head", "a b:1", "tcp://a:1", "a:-1"],
)  # fmt: skip
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="no address of a Ray"):
        ray_address(text, {})


def test_a_dashboards_address_is_told_from_a_clusters() -> None:
    with pytest.raises(ConfigError, match="takes jobs") as caught:
        ray_address(None, {"RAY_ADDRESS": "http://head:8265"})
    assert caught.value.where == "RAY_ADDRESS"
