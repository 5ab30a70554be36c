"""Starting: what can begin before there is a Program (Ray and its actors) begins in the background."""

import os
from typing import TYPE_CHECKING, Protocol

from comms.errors import ClusterError
from orchestrator.config.hardware.cluster import Cluster, Device
from orchestrator.planning.preparation import Prepared, Progress, optimizer_factory
from orchestrator.runners.executing.executor import Executor

if TYPE_CHECKING:
    from orchestrator.runners.executing.chip import Settings


class Launch(Protocol):
    """An executor that is coming up."""

    def connect(self, prepared: Prepared, progress: Progress) -> Executor:
        """The executor of `prepared`; waits for what is still starting, showing its phases."""

    def close(self) -> None:
        """Give up what was started, if `connect` was never reached."""


class InlineLaunch:
    """Nothing to start ahead: the chips live in this process."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster

    def connect(self, prepared: Prepared, progress: Progress) -> Executor:
        """See `Launch`."""
        from orchestrator.runners.executing.inline import InlineExecutor

        if self.cluster.device is Device.CUDA:
            raise ClusterError("CUDA chips need a process each", self.cluster.origin, "use --runner ray")

        with progress.phase("start chips"):
            return InlineExecutor(prepared.program, chip_settings(prepared), num_workers(self.cluster))

    def close(self) -> None:
        """Nothing was started."""


def num_workers(cluster: Cluster) -> int:
    """Threads or actors that execute simulated chips: what the cluster file says, else one per core."""
    return cluster.actors or len(os.sched_getaffinity(0))


def chip_settings(prepared: Prepared) -> "Settings":
    """What every chip of the run needs to know."""
    from orchestrator.runners.executing.chip import Settings

    return Settings(optimizer_factory(prepared.job), prepared.job.clip_norm)
