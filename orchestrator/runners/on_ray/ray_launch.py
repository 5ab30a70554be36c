"""Ray launch: how many actors a cluster needs, started with nothing else known; the runner once they are up.

Does not import torch in the calling thread before the actors are on their way.
"""

from dataclasses import replace
from typing import TYPE_CHECKING

from comms.selection.progress import Progress
from orchestrator.config.hardware.cluster import Cluster, Device
from orchestrator.runners.on_ray.ray_start import PHASES, ActorPlan, RayStart
from orchestrator.runners.runner import Settings, TensorRunner, num_workers
from partitioner.program.program import Program

if TYPE_CHECKING:
    from orchestrator.runners.on_ray.ray_runner import RayRunner

DEVICES = {Device.SIMULATED: "cpu", Device.CPU: "cpu", Device.CUDA: "cuda"}


class RayLaunch:
    """What `train` starts first: actors for `cluster`, as many as it says or one per core; real chips one each."""

    def __init__(self, cluster: Cluster) -> None:
        is_real = cluster.device is not Device.SIMULATED
        self.device = DEVICES[cluster.device]
        num_actors = cluster.num_chips if is_real else min(num_workers(cluster), cluster.num_chips)
        self.start = RayStart(ActorPlan(num_actors, gpus=int(cluster.device is Device.CUDA)))
        self.runner: RayRunner | None = None

    def connect(self, program: Program, settings: Settings, progress: Progress) -> TensorRunner:
        """See `Launch`; the actors stay the same."""
        settings = replace(settings, device=self.device)
        if self.runner is not None:
            self.runner.become(program, settings)
            return self.runner
        try:
            for phase in PHASES:
                with progress(phase):
                    self.start.wait(phase)
            with progress("connect actors"):
                from orchestrator.runners.on_ray.ray_runner import RayRunner

                self.runner = RayRunner(self.start, program, settings)
                return self.runner
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End what was started."""
        if self.runner is not None:
            self.runner.close()
        self.start.close()
