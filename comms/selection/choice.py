"""Choice: the algorithm and protocol with which a group carries out a collective fastest, and why.

All algorithms of the catalog that suit the levels of the group are timed by their closed forms under each protocol
of the tiers that the group spans; the fastest is taken, of equally fast ones the first. A library that pays for
every collective once (`Tier.setup_s`) and hands pieces on between its stages (`Protocol.pipelined`) is charged so.

A group that does not fold into levels, or that nothing suits as it folds, counts as if its subgroups were all alike
further out (33 hosts on two sets of leaves), or as one flat level over its outermost tier, with what its chips have
there when all of them send, whichever is faster; `Choice.is_folded` says so. Full fidelity needs no such assumption.
"""

from dataclasses import dataclass, replace
from math import prod

import numpy as np

from comms.algorithms.catalog import Algorithm, algorithm_of, algorithms, considered, names
from comms.collectives.outline import Outline
from comms.collectives.outline_time import closed_seconds, folded_seconds
from comms.collectives.schedule import Op, Schedule
from comms.errors import CommsError
from comms.networks.groups import Level, Levels, Members, group_size
from comms.networks.links import PLAIN, Protocol
from comms.networks.network import Network, Tier
from comms.networks.tiered import TieredTopology
from comms.networks.topology import IntArray
from comms.simulation.compiled import CollectiveJob

AUTO = "auto"
NOTHING = "none"  # one chip: no algorithm
FREE = 1e9  # how much better a tier is made to see what it costs


@dataclass(frozen=True, slots=True)
class TierShare:
    """One tier that a collective crosses."""

    tier: str
    fanout: int
    latency_s: float  # of one stage, by the protocol taken
    bytes_per_s: float  # of a chip, when all chips of a group send to others at once
    saved_s: float  # what would be saved if this tier cost nothing


@dataclass(frozen=True, slots=True)
class Choice:
    """How a collective is carried out, and what that takes by its closed form."""

    op: Op
    nbytes: float
    num_chips: int
    algorithm: str
    protocol: Protocol
    setup_s: float  # charged once, whatever the fidelity: launch, and handing pieces on
    transfer_s: float  # what the messages take
    levels: Levels
    is_folded: bool
    inside: tuple[tuple[str, Protocol], ...] = ()  # protocols of tiers within the outermost one, by tier
    others: tuple[tuple[str, float], ...] = ()  # what else suits, and its seconds, fastest first
    hosts: Levels = ()  # of what counts as one flat level, its subgroups: messages leave in the order of these

    @property
    def seconds(self) -> float:
        return self.setup_s + self.transfer_s

    @property
    def tier(self) -> str:
        """The outermost tier that the collective crosses; empty for one chip."""
        return self.levels[-1].tier if self.levels else ""

    @property
    def shape(self) -> str:
        """The levels in words."""
        return " x ".join(f"{level.fanout} ({level.tier})" for level in self.levels)

    @property
    def reason(self) -> str:
        """Why this algorithm, in one sentence."""
        if not self.levels:
            return "one chip has all it needs"
        if len(self.others) < 1:
            return f"nothing else comes into question for {self.shape}"
        name, seconds = self.others[0]
        times = f"{seconds / self.seconds:.2f} times as long" if self.seconds > 0 else "no less"
        return f"fastest of {len(self.others) + 1} for {self.shape}; {name} takes {times}"

    def priced(self, level: Level) -> Level:
        """A level with what the protocol of its tier adds and leaves."""
        return level.under(dict(self.inside).get(level.tier, self.protocol))

    @property
    def priced_levels(self) -> Levels:
        """All levels so."""
        return tuple(self.priced(level) for level in self.levels)

    @property
    def _algorithm(self) -> Algorithm:
        return algorithm_of(self.op, self.algorithm)

    def outline(self) -> Outline:
        """What representative chips send; of several chips only."""
        outline = self._algorithm.outline(self.op, self.nbytes, self.priced_levels)
        assert outline is not None
        return outline

    def schedule(self) -> Schedule:
        """The messages of all ranks, in the order of the members; of one chip none."""
        if not self.levels:
            return Schedule(self.op, self.algorithm, 1, 1, 1.0, ())
        levels = tuple(self.priced(level) for level in self.hosts or self.levels)
        return self._algorithm.schedule(self.op, self.num_chips, self.nbytes, levels)

    def folded_s(self) -> float:
        """What the messages take by the sweep over representative chips."""
        return folded_seconds(self.outline()) if self.levels else 0.0

    def tier_shares(self) -> tuple[TierShare, ...]:
        """Per level that the group spans, what it costs: by the closed form with that level free."""
        shares = []
        # Levels overlap where pieces are pipelined, so that their times do not add up: each is taken away in turn.
        for at, level in enumerate(self.levels):
            free = replace(
                level,
                latency_s=0.0,
                hop_latency_s=0.0,
                bytes_per_s=level.bytes_per_s * FREE,
                pool_bytes_per_s=level.pool_bytes_per_s * FREE,
            )
            levels = tuple(
                self.priced(free if other == at else each) for other, each in enumerate(self.levels)
            )
            outline = self._algorithm.outline(self.op, self.nbytes, levels)
            saved = self.transfer_s - closed_seconds(outline) if outline is not None else 0.0
            inner = prod(each.fanout for each in self.levels[:at])
            seen = self.priced(level)
            rate = seen.rate(inner)
            shares.append(TierShare(level.tier, level.fanout, seen.latency_s, rate, max(0.0, saved)))
        return tuple(shares)

    def job(self, groups: IntArray, topology: TieredTopology) -> CollectiveJob:
        """The messages for groups of chips ([groups, chips], members in order) on a topology."""
        places = np.array([self._places(members, topology) for members in groups])
        return CollectiveJob(self.schedule(), places, self.nbytes, protocol=self.protocol, inside=self.inside)

    def _places(self, members: IntArray, topology: TieredTopology) -> IntArray:
        """The members, and after them the switches that add for them: one per group, then the one over all."""
        layers = self._algorithm.adding_switches if len(members) > 1 else 0
        if layers == 0:
            return members
        size = self.levels[0].fanout
        groups = [members[first : first + size] for first in range(0, len(members), size)]
        switches = [topology.switch_over(each.tolist()) for each in groups]
        if min(layers, len(self.levels)) > 1:
            switches.append(topology.switch_over(members.tolist()))
        return np.concatenate([members, np.array(switches, dtype=np.int64)])


def choose(op: Op, nbytes: float, members: Members, network: Network, algorithm: str = AUTO) -> Choice:
    """The fastest way for `op` over these chips, or `algorithm`. Raises CommsError where that does not suit."""
    if nbytes < 0:
        raise CommsError(f"{nbytes} bytes", "size", "give a size of zero or more")
    if algorithm not in (AUTO, *names(op)):
        known = ", ".join(names(op))
        raise CommsError(f"no algorithm {algorithm!r} for {op}", "algorithm", f"known: auto, {known}")
    num_chips = group_size(members)
    if num_chips == 1:
        return Choice(op, nbytes, 1, NOTHING, PLAIN, 0.0, 0.0, (), True)
    # What suits no way in which the group may fold may still suit one flat level.
    timed = _timed(op, nbytes, members, network, algorithm)
    timed = timed or _timed(op, nbytes, members, network, algorithm, flat=True)
    if not timed:
        hint = "leave it to auto, or take one that suits these levels"
        raise CommsError(f"{algorithm} does not suit this group of {num_chips} chips", "algorithm", hint)
    # Sorting keeps the order of the catalog among equally fast ones, and so of each algorithm's ways the first.
    fastest_first = sorted(timed, key=lambda choice: choice.seconds)
    by_name: dict[str, float] = {}
    for choice in fastest_first:
        by_name.setdefault(choice.algorithm, choice.seconds)
    return replace(fastest_first[0], others=tuple(by_name.items())[1:])


def _timed(
    op: Op, nbytes: float, members: Members, network: Network, algorithm: str, flat: bool = False
) -> list[Choice]:
    """All ways that suit, by their closed forms, in the order of the catalog."""
    tier = network.tier_for(members)
    pairs = _offered(op, group_size(members), tier, algorithm)
    blank = Choice(op, nbytes, group_size(members), NOTHING, PLAIN, 0.0, 0.0, (), False)
    aligned = {each.rail_aligned for each, _ in pairs}
    folds = {each: _folds(blank, members, network, each, flat) for each in aligned}
    # A protocol is laid over the levels once, not once for every algorithm.
    ways: dict[tuple[Protocol, bool], list[tuple[Choice, Levels]]] = {}
    for protocol in {protocol for _, protocol in pairs}:
        inside = network.inside(tier, protocol)
        for is_aligned, blanks in folds.items():
            filled = [replace(each, protocol=protocol, inside=inside) for each in blanks]
            ways[protocol, is_aligned] = [(way, way.priced_levels) for way in filled]
    choices = []
    for each, protocol in pairs:
        for way, levels in ways[protocol, each.rail_aligned]:
            # Which switches add is not known where the fold is an assumption.
            if not way.is_folded and each.adding_switches:
                continue
            if algorithm == AUTO and each.has_many_peers(op, levels):
                continue
            outline = each.outline(op, nbytes, levels)
            if outline is not None:
                setup_s = _setup_s(each, outline, levels, protocol, tier)
                transfer_s = closed_seconds(outline)
                choices.append(replace(way, algorithm=each.name, setup_s=setup_s, transfer_s=transfer_s))
    exact = [choice for choice in choices if choice.is_folded]
    return exact or choices  # a guess is no match for what is known


def _folds(blank: Choice, members: Members, network: Network, aligned: bool, flat: bool) -> list[Choice]:
    """A choice over the levels to try; those of a group that does not fold are assumptions."""
    levels = None if flat else network.levels(members, aligned)
    if levels is not None:
        return [replace(blank, levels=levels, is_folded=True)]
    as_if_even = network.levels_as_if_even(members, aligned)
    one_level = replace(blank, levels=_flat(blank.num_chips, network.tier_for(members)))
    if as_if_even is None:
        return [one_level]
    return [replace(blank, levels=as_if_even), replace(one_level, hosts=as_if_even)]


def offered(op: Op, members: Members, network: Network) -> tuple[str, ...]:
    """The algorithms among which an automatic choice is made."""
    pairs = _offered(op, group_size(members), network.tier_for(members), AUTO)
    return tuple(dict.fromkeys(each.name for each, _ in pairs))


def is_limited(members: Members, network: Network) -> bool:
    """Whether the library names the algorithms that it has for these chips."""
    return all(protocol.algorithms for protocol in network.tier_for(members).protocols)


def _offered(op: Op, num_chips: int, tier: Tier, algorithm: str) -> list[tuple[Algorithm, Protocol]]:
    """Algorithms with the protocols of the outermost tier: a library moves a whole collective in one way.

    What the library offers, if that is anything for this operation, else all with all; an operation that no protocol
    is named for goes by the first.
    """
    protocols = [each for each in tier.protocols if not each.ops or op in each.ops]
    protocols = protocols or [replace(tier.protocols[0], algorithms=())]
    named = {name for protocol in protocols for name in protocol.algorithms}
    looked_at = {*considered(op, num_chips), *named} if algorithm == AUTO else {algorithm}
    wanted = [each for name, each in algorithms(op).items() if name in looked_at]
    every = [(each, protocol) for each in wanted for protocol in protocols]
    offered = [pair for pair in every if not pair[1].algorithms or pair[0].name in pair[1].algorithms]
    return offered or every


def _setup_s(algorithm: Algorithm, outline: Outline, levels: Levels, protocol: Protocol, tier: Tier) -> float:
    """What the library takes beyond what the messages do: once, and for handing pieces on between stages."""
    if not protocol.pipelined:
        return tier.setup_s
    hidden_s = algorithm.hidden_latency_s(levels) if algorithm.hidden_latency_s is not None else 0.0
    latency_s, wire_s = _latency_and_wire(outline)
    return tier.setup_s + hidden_s + protocol.pipeline_fill_s(latency_s + hidden_s, wire_s)


def _latency_and_wire(outline: Outline) -> tuple[float, float]:
    """Latencies along all stages, and the bytes of the busiest port, in seconds, for what handing pieces on costs."""
    if outline.beside:
        each = [_latency_and_wire(replace(channel, beside=())) for channel in outline.channels]
        latency = max(latency for latency, _ in each)
        return latency, max(closed_seconds(outline) - latency, max(wire for _, wire in each))
    latency, wires = 0.0, dict.fromkeys(outline.ports, 0.0)
    for phase, port in zip(outline.phases, outline.ports, strict=True):
        for stage in phase:
            latency += stage.repeat * max(hop.latency_s for hop in stage.hops)
            wires[port] += stage.repeat * stage.nbytes / min(hop.bytes_per_s for hop in stage.hops)
    return latency, max(wires.values(), default=0.0)


def _flat(num_chips: int, tier: Tier) -> Levels:
    """All members as if no two shared a tier further in."""
    link = tier.loaded_link
    return (Level(tier.name, num_chips, link.latency_s, link.bytes_per_s, link.bytes_per_s),)
