"""Client runner: a run on a cluster that is reached by its client port alone (`ray://`).

The machine that asks may be outside of the cluster's network, so that no actor could send it a tensor. Everything that
`ray_launch` does on a node of a cluster is therefore done by one more actor there, the hub; parameters, batches and
states go to it and come back as arguments and results of its calls.
"""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import ray
import torch

from comms.errors import RunError, UserError
from comms.selection.progress import Progress, quiet
from orchestrator.config.hardware.cluster import Cluster
from orchestrator.runners.on_ray.actor_logs import outputs, write_logs
from orchestrator.runners.on_ray.assignment import needed_values
from orchestrator.runners.on_ray.ray_address import RayAddress, RayKind
from orchestrator.runners.on_ray.ray_connection import RayConnection
from orchestrator.runners.on_ray.ray_launch import RayLaunch, with_modules
from orchestrator.runners.on_ray.ray_runner import ship_by_value
from orchestrator.runners.on_ray.ray_start import PHASES
from orchestrator.runners.runner import ExecutedStep, Settings, States, StepRequest
from orchestrator.runners.signals import reclaim
from partitioner.program.program import Program
from partitioner.program.program_codec import decode, encode


class Hub:
    """What runs on the cluster in place of the driver."""

    def __init__(self, cluster: Cluster) -> None:
        self.launch = RayLaunch(cluster, RayAddress(RayKind.CLUSTER, "auto", "the cluster"))
        self.runner: Any = None

    def wait(self, phase: str) -> None:
        """Until a phase of `RayStart` is over."""
        self.launch.start.wait(phase)

    def connect(self, program: bytes, settings: Settings) -> None:
        """See `Launch`."""
        self.runner = self.launch.connect(decode(program), settings, quiet)

    def load(self, values: dict[str, torch.Tensor]) -> None:
        """See `TensorRunner`."""
        self.runner.load(values.__getitem__)

    def run(self, request: StepRequest) -> tuple[Any, ...]:
        """See `Runner`; without the Program, which the other side has."""
        done = self.runner.run(request)
        return done.step_ns, done.stats, done.marks, done.first_bad

    def states(self) -> States:
        """See `TensorRunner`."""
        states: States = self.runner.states()
        return states

    def restore(self, states: States) -> None:
        """See `TensorRunner`."""
        self.runner.restore(states)

    def close(self) -> tuple[list[str], dict[int, str]]:
        """End the actors; what they wrote."""
        facts = self.launch.start.facts
        written = [each.place for each in facts], outputs(facts, self.launch.start.raylets)
        self.launch.close()
        return written


class ClientLaunch:
    """What `train` starts first for an address `ray://host:port`."""

    def __init__(self, cluster: Cluster, address: RayAddress) -> None:
        self.cluster, self.address = cluster, address
        self.logs: Path | None = None
        self.connection: RayConnection | None = None
        self.hub: Any = None

    def connect(self, program: Program, settings: Settings, progress: Progress) -> "ClientRunner":
        """See `Launch`; the actors stay the same."""
        if self.hub is None:
            with progress("reach the cluster"):
                self.connection = RayConnection(self.address)
                made = ray.remote(num_cpus=0)(Hub).remote(self.cluster)
            self.hub = made
            reclaim()
            for phase in PHASES:
                with progress(phase):
                    self.asked("wait", phase)
        ship_by_value(settings)
        with progress("connect actors"):
            self.asked("connect", encode(program), with_modules(settings, program))
        return ClientRunner(self, program)

    def asked(self, method: str, *arguments: object) -> Any:
        """What the hub answers. Raises what went wrong there, or RunError if it has ended."""
        try:
            return ray.get(getattr(self.hub, method).remote(*arguments))
        except ray.exceptions.RayTaskError as error:
            cause = getattr(error, "cause", None)
            if isinstance(cause, UserError):
                raise cause from error
            raise
        except (ray.exceptions.RayActorError, ConnectionError) as error:
            hint = "continue from the last checkpoint with --resume"
            raise RunError("the run's driver on the cluster has ended", self.address.text, hint) from error

    def keep_logs(self, folder: Path) -> None:
        """See `Launch`."""
        self.logs = folder

    def close(self) -> None:
        """End the actors, then the hub, and leave the cluster."""
        try:
            if self.hub is not None:
                places, written = self.asked("close")
                if self.logs is not None:
                    write_logs(places, written, self.logs)
                ray.kill(self.hub)
        except UserError:  # it has ended, and the actors with it
            return
        finally:
            self.hub = None
            if self.connection is not None:
                self.connection.close()


class ClientRunner:
    """Executes a Program by the hub of `launch`."""

    def __init__(self, launch: ClientLaunch, program: Program) -> None:
        self.launch, self.program = launch, program

    def load(self, values: Callable[[str], torch.Tensor]) -> None:
        """See `TensorRunner`."""
        names: Iterable[str] = sorted(needed_values(self.program, range(self.program.num_chips)))
        self.launch.asked("load", {name: values(name).detach().cpu() for name in names})

    def run(self, request: StepRequest) -> ExecutedStep:
        """See `Runner`; timed where the actors are."""
        return ExecutedStep(self.program, *self.launch.asked("run", request))

    def states(self) -> States:
        """See `TensorRunner`."""
        states: States = self.launch.asked("states")
        return states

    def restore(self, states: States) -> None:
        """See `TensorRunner`."""
        self.launch.asked("restore", states)

    def close(self) -> None:
        """See `Runner`."""
        self.launch.close()
