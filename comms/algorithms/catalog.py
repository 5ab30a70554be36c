"""The catalog: every algorithm by name and operation, with its schedule and its outline for a group's levels.

A new algorithm is one file with tables of schedules and outlines, entered here. Options follow from the group: its
fanouts, the number of pieces that suits the size, the orders of several rings.
"""

from collections.abc import Callable, Iterable, Mapping
from functools import cache, partial
from inspect import signature
from math import prod
from typing import TypeVar

from comms.algorithms import (
    binary_trees,
    bruck,
    direct,
    doubling,
    in_network,
    ring,
    torus_exchange,
    torus_rings,
    torus_trees,
)
from comms.algorithms.hierarchical import (
    hierarchical,
    hierarchical_exchange,
    hierarchical_rooted,
    hierarchical_torus,
    hierarchical_tree,
)
from comms.collectives.outline import Outline
from comms.collectives.schedule import Op, Schedule
from comms.networks.levels import Levels

FILES = (
    ring,
    doubling,
    direct,
    bruck,
    binary_trees,
    hierarchical,
    hierarchical_exchange,
    hierarchical_rooted,
    hierarchical_tree,
    hierarchical_torus,
    torus_rings,
    torus_trees,
    torus_exchange,
    in_network,
)
# Their messages change one digit at a time.
LIKES = frozenset(
    name
    for file in (
        doubling,
        bruck,
        hierarchical,
        hierarchical_exchange,
        hierarchical_rooted,
        hierarchical_tree,
        hierarchical_torus,
    )
    for name in file.SCHEDULES
)
T = TypeVar("T")
RAIL_RINGS = "rail rings"
MESHES = (torus_rings.MESH, torus_trees.MESH_TREE, torus_trees.ROTATED_MESH_TREE)
IN_NETWORK = in_network.NAME
BY_SWITCHES = frozenset({IN_NETWORK, hierarchical_tree.BY_SWITCH})
MOST_RINGS = 16  # as many channels as libraries open
MOST_PEERS = 64
MANY_PEERS = (Op.ALL_TO_ALL, Op.GATHER, Op.SCATTER)


def names(op: Op) -> tuple[str, ...]:
    """The algorithms for an operation, in the order of the files: of equally fast ones the first is taken."""
    known = [name for file in FILES for name, ops in file.SCHEDULES.items() if op in ops]
    return (*known, RAIL_RINGS) if op in _RAIL_OPS else tuple(known)


def considered(op: Op, num_chips: int) -> tuple[str, ...]:
    """What an automatic choice looks at where libraries do not say what they offer.

    Not several rings over hosts, which are no faster than hierarchical algorithms. Nor that each chip exchanges parts
    with more than MOST_PEERS others at once where there are other ways (see `has_many_peers`).
    """
    left_out = {RAIL_RINGS}
    if num_chips > MOST_PEERS + 1 and op not in MANY_PEERS:
        left_out |= set(direct.SCHEDULES)
    kept = tuple(name for name in names(op) if name not in left_out)
    return kept or names(op)


def has_many_peers(name: str, op: Op, levels: Levels) -> bool:
    """Whether each chip of a hierarchy exchanges parts with more than MOST_PEERS others of one level at once.

    Libraries keep connections and buffers for a few, and what a message costs by itself is not modelled. Who scatters,
    gathers or sends everyone something else has no other way.
    """
    return op not in MANY_PEERS and hierarchical.most_peers(name, levels) > MOST_PEERS


def joins_likes(name: str) -> bool:
    """Whether its messages between bunches join members with the same inner digits only: they keep to rails."""
    return name in LIKES or name == RAIL_RINGS


def num_layers_of_switches(name: str, levels: Levels) -> int:
    """How many layers of switches add for its chips: their helper ranks are a switch per bunch, then the next."""
    return {IN_NETWORK: len(levels), hierarchical_tree.BY_SWITCH: 1}.get(name, 0)


def hidden_latency_s(name: str, levels: Levels) -> float:
    """What a pipelined library takes inside switches that add, which no message shows."""
    if name == IN_NETWORK:
        return in_network.hidden_latency_s(levels)
    return hierarchical_tree.hidden_latency_s(levels) if name in BY_SWITCHES else 0.0


def outline_of(name: str, op: Op, nbytes: float, levels: Levels) -> Outline | None:
    """What representative chips send; None where the algorithm does not suit these levels."""
    if any(level.shared for level in levels) and _needs_wires_of_its_own(name, op, len(levels)):
        return None
    if name == RAIL_RINGS:
        rings = _num_rings(levels)
        return ring.around_outline(op, nbytes, levels, rings=rings) if rings > 1 else None
    make = _outlines()[name][op]
    return make(nbytes, levels, **_options(name, op, make, nbytes, levels))


def schedule_of(name: str, op: Op, num_ranks: int, nbytes: float, levels: Levels | None) -> Schedule:
    """The messages of all ranks. Without levels the group counts as one flat level."""
    if name == RAIL_RINGS:
        rings = _num_rings(levels or ())
        per_host = prod(level.fanout for level in (levels or ())[:-1])
        orders = ring.rail_orders(num_ranks, per_host, rings)
        return _RAIL_OPS[op](num_ranks, orders=orders)
    make = _schedules()[name][op]
    return make(num_ranks, **_options(name, op, make, nbytes, levels))


def _needs_wires_of_its_own(name: str, op: Op, num_levels: int) -> bool:
    """Whether its outline is wrong where a switch limits all that passes it, or both directions share a wire.

    Pools take it that all members send and receive alike, at one level at a time. A root's collective does not, and
    flat rings and one-round algorithms cross several levels at once.
    """
    rooted = op in (Op.BROADCAST, Op.REDUCE, Op.GATHER, Op.SCATTER)
    if rooted or any(
        name in file.SCHEDULES for file in (binary_trees, hierarchical_tree, hierarchical_torus)
    ):
        return True
    flat = name in (RAIL_RINGS, IN_NETWORK) or name in ring.SCHEDULES or name in direct.SCHEDULES
    return flat and num_levels > 1


_RAIL_OPS: Mapping[Op, Callable[..., Schedule]] = {
    op: ring.SCHEDULES["ring"][op] for op in (Op.ALL_REDUCE, Op.ALL_GATHER, Op.REDUCE_SCATTER)
}


@cache
def _schedules() -> Mapping[str, Mapping[Op, Callable[..., Schedule]]]:
    return _in_one(file.SCHEDULES for file in FILES)


@cache
def _outlines() -> Mapping[str, Mapping[Op, Callable[..., Outline | None]]]:
    return _in_one(file.OUTLINES for file in FILES)


@cache
def _pieces() -> Mapping[str, Mapping[Op, Callable[[float, Levels], int]]]:
    return _in_one(getattr(file, "PIECES", {}) for file in FILES)


def _in_one(tables: Iterable[Mapping[str, Mapping[Op, T]]]) -> Mapping[str, Mapping[Op, T]]:
    """Files may have an algorithm by the same name for different operations."""
    whole: dict[str, dict[Op, T]] = {}
    for table in tables:
        for name, ops in table.items():
            whole.setdefault(name, {}).update(ops)
    return whole


@cache
def _takes(make: Callable[..., object] | partial[object], option: str) -> bool:
    return option in signature(make).parameters


def _options(
    name: str, op: Op, make: Callable[..., object], nbytes: float, levels: Levels | None
) -> dict[str, object]:
    options: dict[str, object] = {}
    if levels and _takes(make, "fanouts"):
        options["fanouts"] = tuple(level.fanout for level in levels)
    if levels and _takes(make, "ports"):
        options["ports"] = tuple(level.port for level in levels)
    if levels and _takes(make, "around"):
        options["around"] = tuple(hierarchical.is_ring(level) for level in levels)
    if levels and name in MESHES and not all(level.wraps for level in levels):
        options["wraps"] = tuple(level.wraps for level in levels)  # where some do, they are gone round
    pieces = _pieces().get(name, {}).get(op)
    if levels and pieces is not None and _takes(make, "pieces"):
        options["pieces"] = pieces(nbytes, levels)
    return options


def _num_rings(levels: Levels) -> int:
    """One ring for each chip of a bunch, so that each leaves the bunch by another chip; no ring levels."""
    if len(levels) < 2 or any(level.ring for level in levels):
        return 1
    return min(MOST_RINGS, prod(level.fanout for level in levels[:-1]))
