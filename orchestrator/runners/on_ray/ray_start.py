"""Ray start: starts Ray and places the actors in the background; their resources, patience and end.

`RayStart` needs no Program and does not import torch in the calling thread. Its thread lives until `close`: Linux
ends Ray's processes with the thread that started them, which is also why nothing survives a killed driver.

Assumes one process per actor, all on this host, and Ray's own process placement (PACK). Never waits silently: what is
short is named.
"""

import importlib.util
import logging
import os
import random
import secrets
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

from comms.errors import ClusterError, RunError

if TYPE_CHECKING:
    from orchestrator.runners.executing.transport import Address

OBJECT_STORE_BYTES = 80 << 20  # Ray's least: tensors do not go through its store
PATIENCE_S = 60.0  # for free resources, and for one more actor to come up
LONGEST_S = 600.0  # for that on a busy machine
PHASES = ("start Ray", "start actors")


@dataclass(frozen=True, slots=True)
class ActorPlan:
    """How many actors, and what each needs besides a core."""

    num_actors: int
    gpus: int = 0

    @property
    def bundle(self) -> dict[str, float]:
        """Resources of one actor, in Ray's words."""
        return {"CPU": 1.0} | ({"GPU": float(self.gpus)} if self.gpus else {})


class RayStart:
    """Ray and its actors, coming up."""

    def __init__(self, plan: ActorPlan) -> None:
        self.plan = plan
        self.secret = secrets.token_bytes(16)
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

        _draw_apart()
        if not ray.is_initialized():
            logging.getLogger("ray").setLevel(logging.CRITICAL)  # what goes wrong is told by our own errors
            self._owns_ray = True  # also of one that came up halfway
            ray.init(
                num_cpus=len(os.sched_getaffinity(0)),
                include_dashboard=False,
                object_store_memory=OBJECT_STORE_BYTES,
                log_to_driver=False,
                logging_level=logging.CRITICAL,
            )
        require_resources(self.plan, ray.cluster_resources())

    def _start_actors(self) -> None:
        import ray
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        from orchestrator.runners.on_ray.actor import ChipActor

        plan = self.plan
        self._group = ray.util.placement_group([plan.bundle] * plan.num_actors, strategy="PACK")
        if not self._group.wait(PATIENCE_S):
            raise_busy(plan, ray.available_resources())
        # Two calls at a time: while the long one runs, the driver may ask how far it is.
        remote = ray.remote(num_cpus=1, num_gpus=plan.gpus, max_concurrency=2)(ChipActor)
        for actor in range(plan.num_actors):
            place = PlacementGroupSchedulingStrategy(self._group, actor)
            self.actors.append(remote.options(scheduling_strategy=place).remote(actor, self.secret))
        self._get_addresses(ray)

    def _get_addresses(self, ray: Any) -> None:
        asked, num_up = [actor.address.remote() for actor in self.actors], 0
        while num_up < len(asked):  # on a machine that is busy elsewhere the processes come up one by one
            load, cores = os.getloadavg()[0], len(os.sched_getaffinity(0))
            done, _ = ray.wait(asked, num_returns=num_up + 1, timeout=start_patience_s(load, cores))
            if len(done) <= num_up:
                raise_slow(len(done), len(asked), load, cores)
            num_up = len(done)
        try:
            self.addresses = dict(enumerate(ray.get(asked)))
        except ray.exceptions.RayError as error:
            raise RunError(
                f"the actors did not start: {error}",
                f"{self.plan.num_actors} Ray actors",
                "look into Ray's logs (/tmp/ray/session_latest/logs), or train with --runner inline",
            ) from error
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


def _draw_apart() -> None:
    """Give Ray's modules a `random` of their own: what users' code draws meanwhile follows from a seed."""
    spec = importlib.util.find_spec("random")
    assert spec is not None and spec.loader is not None
    own = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(own)
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == "ray" and vars(module).get("random") is random:
            vars(module)["random"] = own


def require_resources(plan: ActorPlan, total: Mapping[str, float]) -> None:
    """Raise ClusterError if the actors need more than Ray has in all."""
    for name, each in plan.bundle.items():
        wanted, found = each * plan.num_actors, total.get(name, 0.0)
        if wanted > found:
            raise ClusterError(
                f"{plan.num_actors} actors need {wanted:g} {name}s, Ray has {found:g}",
                "Ray at this machine",
                f"ask for at most {int(found // each)} actors" if found >= each else f"add {name}s to Ray",
            )


def start_patience_s(load: float, num_cores: int) -> float:
    """How long one more process may take to start: longer on a machine that has more to do than cores."""
    return min(PATIENCE_S * max(1.0, load / num_cores), LONGEST_S)


def raise_slow(num_up: int, num_actors: int, load: float, num_cores: int) -> NoReturn:
    """Processes of actors did not come up in time, most often as the machine is busy."""
    raise RunError(
        f"{num_up} of {num_actors} actors came up, and no other one in {start_patience_s(load, num_cores):.0f} s",
        f"Ray at this machine: load {load:.1f} on {num_cores} cores",
        "try again when less else runs, or train with --runner inline",
    )


def raise_busy(plan: ActorPlan, free: Mapping[str, float]) -> NoReturn:
    """Ray has enough in all, but others hold it."""
    lacking = ", ".join(
        f"{each * plan.num_actors:g} {name}s needed, {free.get(name, 0.0):g} free"
        for name, each in plan.bundle.items()
    )
    raise ClusterError(
        f"Ray had no room for {plan.num_actors} actors in {PATIENCE_S:g} s: {lacking}",
        "Ray at this machine",
        "end what else runs on it, or ask for fewer actors",
    )
