"""Ray start: Ray and the actors in the background, while the model is captured.

`RayStart` needs no Program and does not import torch in the calling thread. Its thread lives until `close`: the
kernel ends Ray's processes with the thread that started them, which is also why nothing survives a killed driver.

Assumes one process per actor and Ray's own process placement (PACK). Never waits silently: what is short is named.
"""

import logging
import os
import secrets
import socket
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

from comms.errors import ClusterError, RunError

if TYPE_CHECKING:
    from orchestrator.runners.executing.transport import Address

LOOPBACK = "127.0.0.1"
OBJECT_STORE_BYTES = 80 << 20  # Ray's least: tensors do not go through its store
PATIENCE_S = 60.0  # for Ray, for free resources and for actors to come up
LISTENER_S = 5.0
PHASES = ("start Ray", "start actors")


@dataclass(frozen=True, slots=True)
class ActorPlan:
    """How many actors, what each needs, and where: `address` None starts Ray on this machine.

    `num_cpus` is what a started Ray may use, all cores if None. Without `share_memory` all tensors travel through
    sockets. `workers` is the number of threads an actor executes its chips with.
    """

    num_actors: int
    workers: int = 1
    gpus: int = 0
    address: str | None = None
    num_cpus: int | None = None
    share_memory: bool = True
    patience_s: float = PATIENCE_S

    @property
    def bundle(self) -> dict[str, float]:
        """Resources of one actor, in Ray's words."""
        return {"CPU": float(self.workers)} | ({"GPU": float(self.gpus)} if self.gpus else {})


class RayStart:
    """Ray and its actors, coming up."""

    def __init__(self, plan: ActorPlan) -> None:
        self.plan = plan
        self.secret = secrets.token_bytes(16)
        self.interface = LOOPBACK
        self.actors: list[Any] = []
        self.addresses: dict[int, Address] = {}
        self.failure: BaseException | None = None
        self._reached = {phase: threading.Event() for phase in PHASES}
        self._closing = threading.Event()
        self._group: Any = None
        self._owns_ray = False
        self._thread = threading.Thread(target=self._main, name="ray-start", daemon=True)
        self._thread.start()

    def wait(self, phase: str = PHASES[-1]) -> None:
        """Until `phase` is over. Raises what went wrong."""
        self._reached[phase].wait()
        if self.failure is not None:
            raise self.failure

    def close(self) -> None:
        """End the actors, and Ray if it was started here. Waits for what is still starting."""
        self._closing.set()
        self._thread.join()

    def _main(self) -> None:
        try:
            self._start_ray()
            self._reached[PHASES[0]].set()
            if not self._closing.is_set():
                self._start_actors()
        except BaseException as error:
            self.failure = error
        for event in self._reached.values():
            event.set()
        self._closing.wait()
        self._end()

    def _start_ray(self) -> None:
        try:
            import ray
        except ImportError as error:
            raise RunError(
                "Ray is not installed", "--runner ray", "pip install 'ray>=2.60', or use --runner inline"
            ) from error

        if not ray.is_initialized():
            logging.getLogger("ray").setLevel(logging.CRITICAL)  # what goes wrong is told by our own errors
            self._owns_ray = True  # also of one that came up halfway
            self._initialize(ray)
        if self.plan.address is not None:
            self.interface = ray.util.get_node_ip_address()
        require_resources(self.plan, ray.cluster_resources())

    def _initialize(self, ray: Any) -> None:
        quiet = {"log_to_driver": False, "logging_level": logging.CRITICAL}
        if self.plan.address is None:
            ray.init(
                num_cpus=self.plan.num_cpus or len(os.sched_getaffinity(0)),
                include_dashboard=False,
                object_store_memory=OBJECT_STORE_BYTES,
                **quiet,
            )
            return
        try:
            require_listener(self.plan.address)
            ray.init(address=self.plan.address, **quiet)
        except OSError as error:
            hint = "start one with `ray start --head`, or leave the address out"
            raise ClusterError("no Ray cluster answers", f"address {self.plan.address}", hint) from error

    def _start_actors(self) -> None:
        import ray
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        from orchestrator.runners.on_ray.actor import ChipActor

        plan = self.plan
        self._group = ray.util.placement_group([plan.bundle] * plan.num_actors, strategy="PACK")
        if not self._group.wait(plan.patience_s):
            raise_busy(plan, ray.available_resources())
        # Two calls at a time: while the long one runs, the driver may ask how far it is.
        remote = ray.remote(num_cpus=plan.workers, num_gpus=plan.gpus, max_concurrency=2)(ChipActor)
        for actor in range(plan.num_actors):
            place = PlacementGroupSchedulingStrategy(self._group, actor)
            interface = LOOPBACK if plan.address is None else None
            made = remote.options(scheduling_strategy=place)
            self.actors.append(made.remote(actor, self.secret, interface, plan.share_memory))
        self._get_addresses(ray)

    def _get_addresses(self, ray: Any) -> None:
        try:
            found = ray.get([actor.address.remote() for actor in self.actors], timeout=self.plan.patience_s)
        except ray.exceptions.RayError as error:
            raise RunError(
                f"the actors did not start: {error}",
                f"{self.plan.num_actors} Ray actors",
                "look into Ray's logs (/tmp/ray/session_latest/logs), or train with --runner inline",
            ) from error
        self.addresses = dict(enumerate(found))
        for actor in self.actors:
            actor.warm_up.remote()  # nobody waits for it

    def _end(self) -> None:
        if self.failure is not None and isinstance(self.failure.__cause__, ImportError):
            return  # without Ray there is nothing to end
        import ray

        if ray.is_initialized():
            for actor in self.actors:
                ray.kill(actor)
            if self._group is not None:
                ray.util.remove_placement_group(self._group)
        if self._owns_ray:
            ray.shutdown()


def require_listener(address: str) -> None:
    """Raise OSError if nobody listens at HOST:PORT: Ray itself would try for minutes. Other forms pass."""
    host, _, port = address.rpartition(":")
    if host and port.isdigit() and "/" not in host:
        socket.create_connection((host, int(port)), LISTENER_S).close()


def require_resources(plan: ActorPlan, total: Mapping[str, float]) -> None:
    """Raise ClusterError if the actors need more than Ray has in all."""
    for name, each in plan.bundle.items():
        wanted, found = each * plan.num_actors, total.get(name, 0.0)
        if wanted > found:
            raise ClusterError(
                f"{plan.num_actors} actors need {wanted:g} {name}s, Ray has {found:g}",
                f"Ray at {plan.address or 'this machine'}",
                f"ask for at most {int(found // each)} actors" if found >= each else f"add {name}s to Ray",
            )


def raise_busy(plan: ActorPlan, free: Mapping[str, float]) -> NoReturn:
    """Ray has enough in all, but others hold it."""
    lacking = ", ".join(
        f"{each * plan.num_actors:g} {name}s needed, {free.get(name, 0.0):g} free"
        for name, each in plan.bundle.items()
    )
    raise ClusterError(
        f"Ray had no room for {plan.num_actors} actors in {plan.patience_s:g} s: {lacking}",
        f"Ray at {plan.address or 'this machine'}",
        "end what else runs on it, or ask for fewer actors",
    )
