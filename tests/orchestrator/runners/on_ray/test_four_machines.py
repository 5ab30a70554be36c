"""Four raylets on this machine stand for four machines: hosts of the cluster file, their chips, and their ends."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from comms.errors import ClusterError, RunError
from comms.selection.progress import quiet
from kernels.optimizers import OptimizerSpec
from orchestrator.config.hardware.cluster import Cluster
from orchestrator.config.hardware.cluster_file import cluster_path, load_cluster
from orchestrator.config.job_file import load_job
from orchestrator.planning.preparation import module_values
from orchestrator.runners.on_ray.ray_address import RayAddress, RayKind
from orchestrator.runners.on_ray.ray_launch import RayLaunch
from orchestrator.runners.on_ray.ray_runner import RayRunner
from orchestrator.runners.runner import Settings, StepRequest
from orchestrator.sweeps import point_pool
from orchestrator.verbs.scale import scale

HOSTS = """
kind: cluster
version: 1
name: four-hosts
device: cpu
hosts:
  - count: 4
    chips:
      - name: one CPU core
        class: cpu
        count: 2
        peak: {fp32: 94 GFLOP/s}
        memory: {capacity: 4 GB, bandwidth: 35 GB/s}
    nics: {count: 1, bandwidth: 10 Gb/s, latency: 20 us}
scale_up: {bandwidth: 8 GB/s, latency: 50 us}
scale_out:
  - {name: ethernet, hosts: any}
"""
PLANS: tuple[dict[str, int], ...] = (
    {"dp": 8}, {"tp": 2, "dp": 4}, {"tp": 8}, {"pp": 2, "dp": 4, "zero": 1}, {"dp": 2, "tp": 2, "pp": 2},
)  # fmt: skip
STEPS = 2
END_S = 10
OPTIMIZER = OptimizerSpec("adamw", lr=1e-2)


@pytest.fixture(scope="module")
def raylets() -> Iterator[Any]:
    import ray
    from ray.cluster_utils import Cluster as Raylets

    ray.shutdown()  # one that other tests share
    made = Raylets(
        initialize_head=True,
        head_node_args={"num_cpus": 2, "include_dashboard": False, "_system_config": {"worker_niceness": 0}},
    )
    for _ in range(3):
        made.add_node(num_cpus=2)
    yield made
    ray.shutdown()
    made.shutdown()


@pytest.fixture(scope="module")
def four_hosts(tmp_path_factory: pytest.TempPathFactory) -> Cluster:
    file: Path = tmp_path_factory.mktemp("hosts") / "four.yaml"
    file.write_text(HOSTS)
    return load_cluster(file)


@pytest.fixture(scope="module")
def launch(raylets: Any, four_hosts: Cluster) -> Iterator[RayLaunch]:
    made = RayLaunch(four_hosts, RayAddress(RayKind.CLUSTER, raylets.address, "the test"))
    yield made
    made.close()


@pytest.mark.ray
def test_a_host_too_many_is_named_before_anything_starts(raylets: Any, tmp_path: Path) -> None:
    file = tmp_path / "five.yaml"
    file.write_text(HOSTS.replace("count: 4", "count: 5"))
    made = RayLaunch(load_cluster(file), RayAddress(RayKind.CLUSTER, raylets.address, "the test"))
    with pytest.raises(
        ClusterError, match="5 hosts need a machine each with 2 CPUs, Ray has 4 of those"
    ) as caught:
        made.start.wait()
    assert "has 2 CPUs; " in caught.value.where
    made.close()


@pytest.mark.ray
def test_a_sweep_is_worked_out_by_the_machines_of_the_cluster(
    raylets: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, model = "builtin:gpt-nano", "model_args={layers: 2, width: 32, heads: 4, vocab: 256, max_seq: 16}"
    job = load_job(None, (f"model={name}", model, "seq=16", "global_batch=24", "plan.tp=1"))
    dgx = load_cluster(cluster_path("dgx-a100"))

    def refuse(*_: object) -> None:
        raise AssertionError("predicted here")

    with monkeypatch.context() as patch:
        patch.setattr(point_pool.Predictor, "predict", refuse)
        sweep = scale(dgx, job, chips=[1, 4, 8], mode="both", address=raylets.address)
        again = scale(dgx, job, chips=[1, 4, 8], mode="both", address="nobody.invalid:1")  # all is remembered
    assert list(sweep.results) == [point_pool.Predictor(quiet).predict(point) for point in sweep.points]
    assert again.results == sweep.results and again.levers == sweep.levers and len(sweep.levers) == 2


@pytest.mark.ray
def test_a_sweep_on_a_cluster_without_a_free_core_says_so(raylets: Any, launch: RayLaunch) -> None:
    launch.start.wait()  # actors hold all cores
    dgx, job = load_cluster(cluster_path("dgx-a100")), load_job(None, ("seq=16", "global_batch=40"))
    with pytest.raises(ClusterError, match="no core is free"):
        scale(dgx, job, chips=[1, 8], address=raylets.address)


@pytest.mark.ray
@pytest.mark.parametrize("degrees", PLANS, ids=lambda each: "-".join(f"{k}{v}" for k, v in each.items()))
def test_actors_over_four_hosts_give_the_bytes_of_one_process(
    degrees: dict[str, int], launch: RayLaunch, tiny_program: Callable[..., Any],
    running_chips: Callable[..., Any], batches_of: Callable[..., Any], tiny_model: Callable[..., Any],
) -> None:  # fmt: skip
    options = (("heads", 8), ("vocab", 64))
    program = tiny_program(options, **degrees)
    inline, running = (
        running_chips(program, dict(options)),
        launch.connect(program, Settings(OPTIMIZER, 1.0), quiet),
    )
    running.load(module_values(tiny_model("cpu", **dict(options)).module).__getitem__)
    for number in range(STEPS):
        request = StepRequest("step", 1e-2, batches_of(program, number))
        assert running.run(request).stats == inline.run(request).stats
    states, expected = running.states(), inline.states()
    assert all(
        torch.equal(states[chip][name], value)
        for chip, state in expected.items()
        for name, value in state.items()
    )


@pytest.mark.ray
def test_the_chips_of_a_host_share_a_machine_and_no_other_hosts_do(launch: RayLaunch) -> None:
    nodes = [each.node for each in launch.start.facts]
    assert [nodes[chip] == nodes[chip + 1] for chip in range(7)] == [True, False] * 3 + [True]
    assert len(set(nodes)) == 4


@pytest.mark.ray
def test_a_machine_that_is_gone_ends_the_run_with_its_chips_named(
    launch: RayLaunch, raylets: Any, batches_of: Callable[..., Any]
) -> None:
    running = launch.runner
    assert isinstance(running, RayRunner)
    request = StepRequest("step", 1e-2, batches_of(running.program))
    head = raylets.head_node.node_id
    lost = next(node for node in raylets.worker_nodes if node.node_id != head)
    chips = [chip for chip, each in enumerate(launch.start.facts) if each.node == lost.node_id]
    raylets.remove_node(lost, allow_graceful=False)
    start = time.monotonic()

    def steps() -> None:
        while time.monotonic() - start < END_S:  # its processes may outlive it by some steps
            running.run(request)

    with pytest.raises(RunError) as caught:
        steps()
    assert time.monotonic() - start < END_S
    assert caught.value.problem.endswith(("its machine is gone", "its machine is gone, or the way to it"))
    assert any(f"chip {chip})" in caught.value.where for chip in chips)
