"""Ray launch: how many actors a cluster needs, started with nothing else known; the runner once they are up.

Does not import torch in the calling thread before the actors are on their way.
"""

from comms.selection.progress import Progress
from orchestrator.config.hardware.cluster import Cluster, Device
from orchestrator.planning.preparation import Prepared
from orchestrator.runners.on_ray.ray_start import PHASES, ActorPlan, RayStart
from orchestrator.runners.runner import TensorRunner, num_workers

DEVICES = {Device.SIMULATED: "cpu", Device.CPU: "cpu", Device.CUDA: "cuda"}


class RayLaunch:
    """What `train` starts first: actors for `cluster`, as many as it says or one per core; real chips one each."""

    def __init__(self, cluster: Cluster) -> None:
        is_real = cluster.device is not Device.SIMULATED
        self.device = DEVICES[cluster.device]
        num_actors = cluster.num_chips if is_real else min(num_workers(cluster), cluster.num_chips)
        self.start = RayStart(ActorPlan(num_actors, gpus=int(cluster.device is Device.CUDA)))

    def connect(self, prepared: Prepared, progress: Progress) -> TensorRunner:
        """The runner of `prepared`, once the actors are up."""
        try:
            for phase in PHASES:
                with progress(phase):
                    self.start.wait(phase)
            with progress("connect actors"):
                from orchestrator.runners.executing.chip_set import chip_settings
                from orchestrator.runners.on_ray.ray_runner import RayRunner

                return RayRunner(self.start, prepared.program, chip_settings(prepared, self.device))
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End what was started."""
        self.start.close()
