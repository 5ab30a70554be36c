"""Launch: who is to carry out Programs, by the names that users give."""

import os

from comms.errors import ConfigError, PlanError
from orchestrator.config.hardware.cluster import Cluster
from orchestrator.runners.executing.chip_set import InlineLaunch
from orchestrator.runners.on_ray.ray_address import RayKind, ray_address
from orchestrator.runners.on_ray.ray_launch import RayLaunch
from orchestrator.runners.runner import Launch
from orchestrator.runs.sinks import Sink
from orchestrator.verbs.inputs.options import RunnerKind


def launch_of(cluster: Cluster, runner: str, address: str | None = None) -> Launch:
    """What carries out Programs on a cluster: this process, or Ray's actors, which begin to start.

    `address`: of the Ray to use (None: what RAY_ADDRESS says, else one of our own). Raises PlanError or ConfigError.
    """
    if runner == RunnerKind.RAY:
        found = ray_address(address, os.environ)
        if found.kind is not RayKind.CLIENT:
            return RayLaunch(cluster, found)
        from orchestrator.runners.on_ray.client_runner import ClientLaunch

        return ClientLaunch(cluster, found)
    if runner != RunnerKind.INLINE:
        raise PlanError(f"no runner {runner!r}", "runner", "write inline or ray")
    if address is not None:
        raise ConfigError("--runner inline uses no Ray", f"--address {address}", "leave one of them out")
    return InlineLaunch(cluster)


def cluster_sinks(launch: Launch, run: str) -> tuple[Sink, ...]:
    """Who is shown a run's numbers because of where it runs: the dashboard of a Ray cluster."""
    if not (isinstance(launch, RayLaunch) and launch.start.address.kind is RayKind.CLUSTER):
        return ()
    from orchestrator.runners.ray_jobs.ray_metrics import RayMetrics

    return (RayMetrics(run),)
