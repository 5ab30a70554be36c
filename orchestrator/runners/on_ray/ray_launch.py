"""Ray launch: how many actors a cluster needs, started with nothing else known; the runner once they are up.

Does not import torch in the calling thread before the actors are on their way.
"""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from comms.selection.progress import Progress
from orchestrator.config.hardware.cluster import Cluster, Device
from orchestrator.runners.on_ray.placement import ActorPlan, own_plan, spread_plan
from orchestrator.runners.on_ray.ray_address import RayAddress, RayKind
from orchestrator.runners.on_ray.ray_start import PHASES, RayStart
from orchestrator.runners.runner import Settings, TensorRunner
from orchestrator.runners.signals import reclaim
from partitioner.program.program import Program

if TYPE_CHECKING:
    from orchestrator.runners.on_ray.ray_runner import RayRunner

DEVICES = {Device.SIMULATED: "cpu", Device.CPU: "cpu", Device.CUDA: "cuda"}


class RayLaunch:
    """What `train` starts first: actors for `cluster`, on the Ray at `address` (None: one of our own)."""

    def __init__(self, cluster: Cluster, address: RayAddress | None = None) -> None:
        self.device = DEVICES[cluster.device]
        self.start = RayStart(partial(_planned, cluster), address)
        self.runner: RayRunner | None = None

    def connect(self, program: Program, settings: Settings, progress: Progress) -> TensorRunner:
        """See `Launch`; the actors stay the same."""
        settings = replace(with_modules(settings, program), device=self.device)
        if self.runner is not None:
            self.runner.become(program, settings)
            return self.runner
        try:
            for phase in PHASES:
                with progress(phase):
                    self.start.wait(phase)
            reclaim()  # Ray's own handlers would abort the process soon after
            with progress("connect actors"):
                from orchestrator.runners.on_ray.ray_runner import RayRunner

                self.runner = RayRunner(self.start, program, settings)
                return self.runner
        except BaseException:
            self.close()
            raise

    def keep_logs(self, folder: Path) -> None:
        """What the actors print is in this folder at the end."""
        self.start.logs = folder

    def close(self) -> None:
        """End what was started."""
        if self.runner is not None:
            self.runner.close()
        self.start.close()


def with_modules(settings: Settings, program: Program) -> Settings:
    """With the user's modules that actors need: they execute operators that are defined there."""
    from orchestrator.models.own_modules import own_modules
    from orchestrator.runners.executing.own_operators import own_operators

    if settings.modules or not own_operators(program):
        return settings
    return replace(settings, modules=own_modules())


def _planned(cluster: Cluster, address: RayAddress, free_cores: float) -> ActorPlan:
    return own_plan(cluster) if address.kind is RayKind.OWN else spread_plan(cluster, free_cores)
