"""The inline runner: all chips of a Program in this process, a `ChipSet`.

With one worker everything happens in the calling thread (pdb works).
"""

from comms.errors import ClusterError
from orchestrator.config.hardware.cluster import Cluster, Device
from orchestrator.planning.preparation import PhaseReporter, Prepared, optimizer_factory
from orchestrator.runners.executing.chip import Settings
from orchestrator.runners.executing.chip_set import ChipSet
from orchestrator.runners.runner import num_workers


class InlineLaunch:
    """Nothing to start ahead: the chips live in this process."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster

    def connect(self, prepared: Prepared, progress: PhaseReporter) -> ChipSet:
        """See `Launch`."""
        if self.cluster.device is Device.CUDA:
            raise ClusterError("CUDA chips need a process each", self.cluster.origin, "use --runner ray")

        with progress.phase("start chips"):
            return ChipSet(prepared.program, chip_settings(prepared), num_workers(self.cluster))

    def close(self) -> None:
        """Nothing was started."""


def chip_settings(prepared: Prepared) -> Settings:
    """What every chip of the run needs to know."""
    return Settings(optimizer_factory(prepared.job), prepared.job.clip_norm)
