"""Placement: how many actors a cluster file asks for, which machine each goes to, and whether Ray has the room.

Chips that are simulated go wherever there are cores. A real chip has an actor of its own, and on a cluster the chips
of a host share a machine that no other host's chips are on: what is measured is then what the file describes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf
from typing import NamedTuple

from comms.errors import ClusterError
from orchestrator.config.hardware.cluster import Cluster, Device
from orchestrator.runners.runner import num_workers

MAX_NAMED = 8  # machines in a message


class RayNode(NamedTuple):
    """A node of Ray's that is up, and what it has in all."""

    name: str
    resources: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class ActorPlan:
    """How many actors there are, with one core each; `per_machine` of them have a machine to themselves."""

    num_actors: int
    gpus: int = 0  # of each actor
    per_machine: int | None = None  # None: wherever there is room
    strategy: str = "PACK"

    @property
    def bundle(self) -> dict[str, float]:
        """Resources of the actors that are placed together, in Ray's words."""
        together = self.per_machine or 1
        return {"CPU": float(together)} | ({"GPU": float(self.gpus * together)} if self.gpus else {})

    @property
    def num_bundles(self) -> int:
        """How many such places there are."""
        return self.num_actors // (self.per_machine or 1)

    def bundle_of(self, actor: int) -> int:
        """The place of an actor."""
        return actor // (self.per_machine or 1)


def own_plan(cluster: Cluster) -> ActorPlan:
    """On this machine alone: as many actors as the file says or one per core; real chips one each."""
    if cluster.device is not Device.SIMULATED:
        return ActorPlan(cluster.num_chips, int(cluster.device is Device.CUDA))
    return ActorPlan(min(num_workers(cluster), cluster.num_chips))


def spread_plan(cluster: Cluster, free_cores: float) -> ActorPlan:
    """On a Ray cluster: real chips by the file's hosts, simulated ones over the cores that are free."""
    if cluster.device is not Device.SIMULATED:
        together = min(cluster.chips_per_host, cluster.num_chips)
        return ActorPlan(cluster.num_chips, int(cluster.device is Device.CUDA), together, "STRICT_SPREAD")
    wanted = cluster.actors or max(1, int(free_cores))
    return ActorPlan(min(wanted, cluster.num_chips), strategy="SPREAD")


def require_room(plan: ActorPlan, machines: Sequence[RayNode]) -> None:
    """Raise ClusterError if the actors cannot all be on these machines, even with nothing else there."""
    places = [_places(plan, machine) for machine in machines]
    found = sum(min(count, 1) for count in places) if plan.per_machine else sum(places)
    if found >= plan.num_bundles:
        return
    each = _words(plan.bundle)
    has = "; ".join(f"{machine.name} has {_words(_asked(plan, machine))}" for machine in machines[:MAX_NAMED])
    more = f"; and {len(machines) - MAX_NAMED} more" if len(machines) > MAX_NAMED else ""
    if plan.per_machine:
        needs = f"{plan.num_bundles} hosts need a machine each with {each}, Ray has {found} of those"
        hint = "start more nodes, take fewer --chips, or write fewer chips per host in the cluster file"
    else:
        needs = f"{plan.num_actors} actors need {each} each, Ray has room for {found}"
        hint = f"ask for at most {found} actors" if found else f"add {' and '.join(plan.bundle)} to Ray"
    raise ClusterError(needs, f"Ray: {has or 'no machine is up'}{more}", hint)


def busy(plan: ActorPlan, free: Mapping[str, float], waited_s: float) -> ClusterError:
    """Ray has enough in all, but others hold it."""
    needs = {name: each * plan.num_bundles for name, each in plan.bundle.items()}
    lacking = ", ".join(
        f"{wanted:g} {name}s needed, {free.get(name, 0.0):g} free" for name, wanted in needs.items()
    )
    apart = f", on {plan.num_bundles} machines" if plan.per_machine else ""
    return ClusterError(
        f"Ray had no room for {plan.num_actors} actors in {waited_s:g} s: {lacking}{apart}",
        "Ray",
        "end what else runs on it, or ask for fewer actors",
    )


def _places(plan: ActorPlan, machine: RayNode) -> int:
    counts = (machine.resources.get(name, 0.0) // each for name, each in plan.bundle.items())
    return int(min(counts, default=inf))


def _asked(plan: ActorPlan, machine: RayNode) -> dict[str, float]:
    return {name: machine.resources.get(name, 0.0) for name in plan.bundle}


def _words(resources: Mapping[str, float]) -> str:
    return " and ".join(f"{amount:g} {name}{'s' * (amount != 1)}" for name, amount in resources.items())
