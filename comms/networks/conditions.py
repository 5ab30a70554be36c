"""Conditions as people describe them: links that are slow, down or flapping, chips that are slow or late, jitter,
other jobs in the background; and what that means on a given network.

A link is named by its two chips, or as that of a chip in a tier: the chip's own wires there, else the first wires of
that tier on its way out (of a host's card, of a leaf switch). A link that is down is gone from the topology; messages
that crossed it take the best way round, also through other chips, unless a network of edges says that chips do not
pass anything on. A flapping link keeps its messages waiting: nothing is rerouted for an outage that ends.

Jitter draws the rate of every wire evenly from 1 - rate to 1 + rate of its own, once, from the seed and in the order
of wires; its delay is the mean of an exponential one before each message. After the horizon flapping links stay up.

Not modelled: the time until a network notices a dead link, links that fail while a job runs and stay down.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil
from typing import TypeAlias

import numpy as np

from comms.errors import CommsError
from comms.networks.fabrics.edge_list import EdgeList, Rerouted
from comms.networks.paths import within_reach
from comms.networks.tiered import TieredTopology
from comms.networks.topology import Change, Conditions, FloatArray, IntArray, Topology, Wires

HORIZON_S = 10.0  # how long flapping links are followed


@dataclass(frozen=True, slots=True)
class Between:
    """The link that two chips have between them."""

    a: int
    b: int
    both_ways: bool = True  # else only from a to b


@dataclass(frozen=True, slots=True)
class Reach:
    """The links by which chips reach others in a tier."""

    chips: tuple[int, ...]
    tier: str
    path: int | None = None  # which of several side by side, in the order of wires; None: all


@dataclass(frozen=True, slots=True)
class Flaps:
    """Down for a while, again and again."""

    down_s: float
    every_s: float
    first_s: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.down_s < self.every_s or self.first_s < 0:
            problem = f"down for {self.down_s} s every {self.every_s} s"
            raise CommsError(problem, hint="let it be down for less than its period")


@dataclass(frozen=True, slots=True)
class LinkFault:
    """What is wrong with some links."""

    which: Between | Reach
    factor: float = 1.0  # of their rate; 0 is down
    flaps: Flaps | None = None
    where: str = ""  # where it is described

    def __post_init__(self) -> None:
        if not 0 <= self.factor <= 1:
            hint = "give a share of its rate from 0 (down) to 1"
            raise CommsError(f"a link cannot have {self.factor} of its rate", self.where, hint)


@dataclass(frozen=True, slots=True)
class ChipFault:
    """Chips that compute or send later than they should."""

    chips: tuple[int, ...]
    slowdown: float = 1.0  # of all their work
    delay_s: float = 0.0  # before each message they send
    where: str = ""


@dataclass(frozen=True, slots=True)
class Jitter:
    """Random differences from data sheets."""

    rate: float = 0.0  # largest part by which a wire's rate differs from its own
    delay_s: float = 0.0  # mean, before each message

    def __post_init__(self) -> None:
        if not 0 <= self.rate < 1 or self.delay_s < 0:
            raise CommsError(f"a jitter of {self.rate}", "jitter", "give a part of the rate, below 1")


@dataclass(frozen=True, slots=True)
class Background:
    """A job of others, over and over again."""

    op: str  # by its name: networks do not know collectives
    chips: tuple[int, ...]
    nbytes: float
    where: str = ""


@dataclass(frozen=True, slots=True)
class OwnRates:
    """Chips of several kinds, whose links in a tier are not all as slow as the network says, which is the slowest."""

    tier: str
    factors: tuple[float, ...]  # of chip i's wires: factors[i % len(factors)] times the rate

    def differ(self, num_chips: int) -> bool:
        """Whether any of the first chips has more."""
        return any(factor != 1.0 for factor in self.factors[:num_chips])


@dataclass(frozen=True, slots=True)
class Described:
    """All that differs from a network in perfect order; nothing by default."""

    links: tuple[LinkFault, ...] = ()
    chips: tuple[ChipFault, ...] = ()
    jitter: Jitter = Jitter()
    seed: int = 0
    background: tuple[Background, ...] = ()
    rates: tuple[OwnRates, ...] = ()

    @property
    def is_healthy(self) -> bool:
        """Whether nothing differs."""
        return self == Described(seed=self.seed)


HEALTHY = Described()

FaultyWires: TypeAlias = list[tuple[LinkFault, tuple[int, ...]]]  # faults and their wires


@dataclass(frozen=True, slots=True, eq=False)
class Resolved:
    """Conditions on one topology, as simulations read them."""

    topology: Topology  # without what is down
    conditions: Conditions
    background: tuple[Background, ...]
    work_factors: Mapping[int, float]  # chip to how many times as long its work takes, where not once


def resolve(described: Described, topology: Topology, horizon_s: float = HORIZON_S) -> Resolved:
    """What is described, on this topology. Raises CommsError for chips, tiers and links that it does not have, and
    with the names of chips that would be cut off."""
    wires = topology.wires()
    found = _found(described, topology, wires)
    dead = _check_dead(found, topology, wires)
    left: Topology = topology
    numbers, now = np.arange(wires.num_wires), wires
    if dead:
        # Through chips too, as libraries relay for a chip whose card is down.
        left = Rerouted(topology, tuple(dead), chips_relay=may_relay(topology))
        numbers, now = left.numbers, left.wires()
    factors = _factors(described, found, numbers, now, _own_rates(described, topology, wires))
    delays_s, work_factors = _of_chips(described)
    return Resolved(
        left,
        Conditions(
            factors=factors,
            changes=_changes(found, numbers, now, factors, horizon_s),
            overhead_s=delays_s,
            noise_s=described.jitter.delay_s,
            seed=described.seed,
        ),
        described.background,
        work_factors,
    )


def check_links(described: Described, topology: Topology) -> None:
    """Raises what `resolve` would raise for links, without making anything."""
    wires = topology.wires()
    _check_dead(_found(described, topology, wires), topology, wires)


def check_chips(described: Described, num_chips: int) -> None:
    """Raises CommsError where a chip is named that is not there."""
    named = [(fault.where, chips_of(fault.which)) for fault in described.links]
    named += [(fault.where, fault.chips) for fault in described.chips]
    named += [(job.where, job.chips) for job in described.background]
    for where, chips in named:
        if not chips or min(chips) < 0 or max(chips) >= num_chips:
            problem = f"chip {max(chips)} is named, but there are {num_chips} chips" if chips else "no chip"
            raise CommsError(problem, where, f"chips are 0 to {num_chips - 1}")


def chips_of(which: Between | Reach) -> tuple[int, ...]:
    """The chips that a link is named by."""
    return (which.a, which.b) if isinstance(which, Between) else which.chips


def _found(described: Described, topology: Topology, wires: Wires) -> FaultyWires:
    check_chips(described, topology.num_chips)
    return [(fault, _wires_of(fault, topology, wires)) for fault in described.links]


def _wires_of(fault: LinkFault, topology: Topology, wires: Wires) -> tuple[int, ...]:
    """The wires of the links, each once."""
    which = fault.which
    if isinstance(which, Between):
        there = (wires.tail == which.a) & (wires.head == which.b)
        back = (wires.tail == which.b) & (wires.head == which.a)
        found = np.flatnonzero(there | (back & which.both_ways))
        if not len(found):
            problem = f"there is no link from chip {which.a} to chip {which.b}"
            hint = "where they meet in a switch, name one chip and the tier, `chip: 3, tier: scale-up`"
            raise CommsError(problem, fault.where, hint)
        return tuple(found.tolist())
    if which.tier not in topology.tiers:
        known = ", ".join(topology.tiers)
        raise CommsError(f"there is no tier {which.tier!r}", fault.where, f"tiers are {known}")
    tier = topology.tiers.index(which.tier)
    every: dict[int, None] = {}
    for chip in which.chips:
        for way in _ways(chip, tier, topology, wires, fault):
            every |= dict.fromkeys(_on_path(way, which.path, fault.where))
    return tuple(every)


def _ways(
    chip: int, tier: int, topology: Topology, wires: Wires, fault: LinkFault
) -> tuple[IntArray, IntArray]:
    """The wires from a chip into a tier, and those back: its own, else the first on its way."""
    of_tier = wires.tier == tier
    own = of_tier & (wires.tail == chip), of_tier & (wires.head == chip)
    if own[0].any() or own[1].any():
        return np.flatnonzero(own[0]), np.flatnonzero(own[1])
    others = np.arange(topology.num_chips)
    here = np.full_like(others, chip)
    out, back = topology.routes(here, others), topology.routes(others, here)
    crossing = np.flatnonzero(of_tier[out.wires])
    if not len(crossing):
        hint = "name a chip whose messages cross that tier"
        raise CommsError(f"chip {chip} has no link in tier {topology.tiers[tier]!r}", fault.where, hint)
    other = int(np.searchsorted(out.offsets, crossing[0], side="right")) - 1
    leaves = wires.tail[out.wires[crossing[0]]]
    inwards = back.of(other)
    enters = wires.head[inwards[of_tier[inwards]][-1]]
    return np.flatnonzero(of_tier & (wires.tail == leaves)), np.flatnonzero(of_tier & (wires.head == enters))


def _on_path(way: IntArray, path: int | None, where: str) -> list[int]:
    if path is None:
        return [int(wire) for wire in way]
    if path >= len(way):
        raise CommsError(f"there is no path {path} of {len(way)}", where, f"paths are 0 to {len(way) - 1}")
    return [int(way[path])]


def may_relay(topology: Topology) -> bool:
    """False where a network of edges says that its chips pass nothing on."""
    fabrics = topology.fabrics if isinstance(topology, TieredTopology) else ()
    shapes: list[Topology] = [*(fabric.shape for fabric in fabrics)] or [topology]
    return all(shape.through_chips for shape in shapes if isinstance(shape, EdgeList))


def _check_dead(found: FaultyWires, topology: Topology, wires: Wires) -> list[int]:
    """The dead wires. Raises CommsError with the chips that cannot be reached any more."""
    faults = [(fault, which) for fault, which in found if not fault.factor]
    dead = sorted({wire for _, which in faults for wire in which})
    if not dead:
        return []
    alive = np.ones(wires.num_wires, dtype=np.bool_)
    alive[dead] = False
    tail, head = wires.tail[alive], wires.head[alive]
    relays = np.ones(topology.num_nodes, dtype=np.bool_)
    relays[: topology.num_chips] = may_relay(topology)
    lost = ~(within_reach(tail, head, relays) & within_reach(head, tail, relays))[: topology.num_chips]
    if 2 * lost.sum() > len(lost):  # chip 0 is among the few
        lost = ~lost
    if lost.any():
        chips = np.flatnonzero(lost)
        names = ", ".join(map(str, chips[:8])) + (", ..." if len(chips) > 8 else "")
        problem = f"{'chips' if len(chips) > 1 else 'chip'} {names} cut off by links that are down"
        where = ", ".join(dict.fromkeys(fault.where for fault, _ in faults if fault.where))
        raise CommsError(problem, where, "leave one way to each chip, or take the chip out")
    return dead


def _capacities(which: tuple[int, ...], numbers: IntArray, now: Wires) -> list[int]:
    """The capacities of wires that are left, each once: both directions of shared media have one."""
    alive = numbers[list(which)]
    return [int(row) for row in np.unique(now.shares[alive[alive >= 0]])]


def _own_rates(described: Described, topology: Topology, wires: Wires) -> FloatArray:
    """[wires] How many times its rate each has; between two chips it is as slow as the slower one's."""
    factors = np.ones(wires.num_wires)
    for rates in described.rates:
        of_node = np.full(topology.num_nodes, np.inf)
        of_node[: topology.num_chips] = np.resize(rates.factors, topology.num_chips)
        own = np.minimum(of_node[wires.tail], of_node[wires.head])
        is_own = np.isfinite(own) & (np.array(topology.tiers)[wires.tier] == rates.tier)
        factors[is_own] = own[is_own]
    return factors


def _factors(
    described: Described, found: FaultyWires, numbers: IntArray, now: Wires, own: FloatArray
) -> dict[int, float]:
    """Share of its rate for each capacity that has not just all of it."""
    kept = numbers >= 0
    factors = np.ones(now.num_wires)
    factors[numbers[kept]] = own[kept]
    if described.jitter.rate:
        drawn = np.random.default_rng(described.seed).uniform(-1.0, 1.0, len(numbers))
        factors[numbers[kept]] *= 1.0 + described.jitter.rate * drawn[kept]
    factors[now.shares != np.arange(now.num_wires)] = 1.0
    for fault, which in found:
        if 0 < fault.factor < 1:
            factors[_capacities(which, numbers, now)] *= fault.factor
    return {int(row): float(factors[row]) for row in np.flatnonzero(factors != 1.0)}


def _changes(
    found: FaultyWires, numbers: IntArray, now: Wires, factors: Mapping[int, float], horizon_s: float
) -> tuple[Change, ...]:
    """Down and up again for every flapping link, in order of time and wire."""
    changes: list[Change] = []
    flapping: set[int] = set()
    for fault, which in found:
        if fault.flaps is None:
            continue
        rows = _capacities(which, numbers, now)
        if flapping & set(rows):
            raise CommsError("a link flaps in two ways", fault.where, "describe it once")
        flapping |= set(rows)
        flaps = fault.flaps
        for number in range(ceil((horizon_s - flaps.first_s) / flaps.every_s)):
            at_s = flaps.first_s + number * flaps.every_s
            for row in rows:
                changes.append(Change(at_s, row, 0.0))
                changes.append(Change(at_s + flaps.down_s, row, factors.get(row, 1.0)))
    return tuple(sorted(changes, key=lambda change: (change.at_s, change.wire)))


def _of_chips(described: Described) -> tuple[dict[int, float], dict[int, float]]:
    """By chip, what it adds before each message, and how many times as long its work takes, where that is not usual."""
    delays: dict[int, float] = {}
    factors: dict[int, float] = {}
    for fault in described.chips:
        for chip in fault.chips:
            if fault.delay_s:
                delays[chip] = delays.get(chip, 0.0) + fault.delay_s
            if fault.slowdown != 1.0:
                factors[chip] = factors.get(chip, 1.0) * fault.slowdown
    return delays, factors
