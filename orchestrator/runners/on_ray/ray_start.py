"""Ray start: joins or starts Ray and places the actors, in the background; their resources, patience and end.

`RayStart` needs no Program and does not import torch in the calling thread. Its thread lives until `close`: Linux
ends the processes of a Ray of our own with the thread that started them. Never waits silently: what is short is named.
"""

import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias

from comms.errors import ClusterError, RunError
from kernels.memory import VARIABLES
from orchestrator.runners.on_ray.actor_logs import save_logs
from orchestrator.runners.on_ray.placement import ActorPlan, RayNode, busy, require_room
from orchestrator.runners.on_ray.ray_address import RayAddress, RayKind, ray_address
from orchestrator.runners.on_ray.ray_connection import RayConnection, Raylets

if TYPE_CHECKING:
    from orchestrator.runners.executing.peer_keys import PeerKeys
    from orchestrator.runners.on_ray.actor import ActorFacts

PATIENCE_S = 60.0  # for free resources, and for one more actor to come up
LONGEST_S = 600.0  # for that on a busy machine
PHASES = ("start Ray", "start actors")
Planned: TypeAlias = Callable[[RayAddress, float], ActorPlan]  # for a Ray with so many free cores


class RayStart:
    """Ray and its actors, coming up."""

    def __init__(self, planned: ActorPlan | Planned, address: RayAddress | None = None) -> None:
        self.address = address or ray_address(None, {})
        self._planned = planned
        self.actors: list[Any] = []
        self.facts: list[ActorFacts] = []
        self.raylets: Raylets = {}
        self.logs: Path | None = None  # the folder that the actors' output is to be kept in
        self.failure: BaseException | None = None
        self._plan = planned if isinstance(planned, ActorPlan) else None
        self._reached = {phase: threading.Event() for phase in PHASES}
        self._closing = threading.Event()
        self._group: Any = None
        self._connection: RayConnection | None = None
        self._thread = threading.Thread(target=self._main, name="ray-start", daemon=True)
        self._thread.start()

    @property
    def plan(self) -> ActorPlan:
        """How many actors there are and where; known once Ray is there."""
        assert self._plan is not None
        return self._plan

    @property
    def keys(self) -> "PeerKeys":
        """The driver's keys; the actors have been placed."""
        from orchestrator.runners.on_ray.screening import DRIVER

        return self._keys[DRIVER]

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
            self._connection = RayConnection(self.address)
            machines, self.raylets = self._connection.machines(), self._connection.raylets()
            if not isinstance(self._planned, ActorPlan):
                self._plan = self._planned(self.address, self._connection.free().get("CPU", 0.0))
            require_room(self.plan, machines)
            self._reached[PHASES[0]].set()
            if not self._closing.is_set():
                self._start_actors(machines)
        except BaseException as error:
            self.failure = error
        for event in self._reached.values():
            event.set()
        self._closing.wait()
        self._end()

    def _start_actors(self, machines: Sequence[RayNode]) -> None:
        import ray
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        from orchestrator.runners.executing.peer_keys import new_keys
        from orchestrator.runners.executing.transport import LOOPBACK
        from orchestrator.runners.on_ray.actor import ChipActor
        from orchestrator.runners.on_ray.screening import DRIVER

        plan = self.plan
        self._group = ray.util.placement_group([plan.bundle] * plan.num_bundles, strategy=plan.strategy)
        if not self._group.wait(PATIENCE_S):
            raise busy(plan, ray.available_resources(), PATIENCE_S)
        self._keys = new_keys((DRIVER, *range(plan.num_actors)))
        self.host = LOOPBACK if self.address.kind is RayKind.OWN else ray.util.get_node_ip_address()
        host = LOOPBACK if self.address.kind is RayKind.OWN else None  # None: that of the node
        # Two calls at a time: while the long one runs, the driver may ask how far it is.
        remote = ray.remote(num_cpus=1, num_gpus=plan.gpus, max_concurrency=2, **self._environment())(
            ChipActor
        )
        for actor in range(plan.num_actors):
            place = PlacementGroupSchedulingStrategy(self._group, plan.bundle_of(actor))
            self.actors.append(remote.options(scheduling_strategy=place).remote(self._keys[actor], host))
        self._get_facts(ray)

    def _environment(self) -> dict[str, Any]:
        """What actors must have from their start on; those of a Ray of our own inherit it."""
        if self.address.kind is RayKind.OWN:
            return {}
        return {"runtime_env": {"env_vars": {k: os.environ.get(k, v) for k, v in VARIABLES.items()}}}

    def _get_facts(self, ray: Any) -> None:
        asked, num_up = [actor.facts.remote() for actor in self.actors], 0
        while num_up < len(asked):  # on a machine that is busy elsewhere the processes come up one by one
            load, cores = os.getloadavg()[0], len(os.sched_getaffinity(0))
            done, _ = ray.wait(asked, num_returns=num_up + 1, timeout=start_patience_s(load, cores))
            if len(done) <= num_up:
                raise_slow(len(done), len(asked), load, cores)
            num_up = len(done)
        try:
            self.facts = ray.get(asked)
        except ray.exceptions.RayError as error:
            raise _not_started(error, self.plan.num_actors) from error
        _require_same_code(self.facts)
        for actor in self.actors:
            actor.warm_up.remote()  # nobody waits for it

    def _end(self) -> None:
        if self._connection is None:
            return
        import ray

        if ray.is_initialized():
            if self.logs is not None:
                save_logs(self.facts, self.raylets, self.logs)
            for actor in self.actors:
                ray.kill(actor)
            if self._group is not None:
                ray.util.remove_placement_group(self._group)
        self._connection.close()


def _not_started(error: Exception, num_actors: int) -> RunError:
    said = str(error).strip()
    hint = (
        "look into Ray's logs on that machine (/tmp/ray/session_latest/logs), or train with --runner inline"
    )
    if "No module named" in said or "ModuleNotFoundError" in said:
        hint = "install orchestrate with what it needs on every machine of the cluster"
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    return RunError(
        f"the actors did not start: {lines[-1] if lines else error}", f"{num_actors} Ray actors", hint
    )


def _require_same_code(facts: Sequence["ActorFacts"]) -> None:
    """Raise ClusterError where a machine would run other code than the driver: it would train differently."""
    from orchestrator.runners.on_ray.actor import code_facts

    own = code_facts()
    for actor, each in enumerate(facts):
        for name, value in own.items():
            if each.code.get(name) != value:
                problem = f"{name} is {each.code.get(name)} there and {value} here"
                hint = "install the same version on every machine"
                raise ClusterError(problem, f"actor {actor} on {each.machine}", hint)


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
