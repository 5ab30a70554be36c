"""Choice: the algorithm and protocol with which a group carries out a collective fastest, and why.

All algorithms of the catalog that suit the levels of the group are timed by their closed forms under each protocol
of the tiers that the group spans; the fastest is taken, of equally fast ones the first. A library that pays for
every collective once (`Tier.setup_s`) and hands pieces on between its stages (`Protocol.pipelined`) is charged so.

A group that does not fold into levels, or that nothing suits as it folds, counts as if its bunches were all alike
further out (33 hosts on two sets of leaves), or as one flat level over its outermost tier, with what its chips have
there when all of them send, whichever is faster; `Choice.is_folded` says so. Full fidelity needs no such assumption.
"""

from dataclasses import dataclass, replace

from comms.algorithms.catalog import (
    BY_SWITCHES,
    considered,
    has_many_peers,
    hidden_latency_s,
    joins_likes,
    names,
    outline_of,
    schedule_of,
)
from comms.collectives.closed_form import closed_seconds
from comms.collectives.folded import folded_seconds
from comms.collectives.outline import Outline
from comms.collectives.schedule import Op, Schedule
from comms.errors import CommsError
from comms.networks.groups import Lattice, Members, group_size
from comms.networks.levels import Level, Levels
from comms.networks.links import PLAIN, Protocol
from comms.networks.network import Network, Tier

AUTO = "auto"
NOTHING = "none"  # one chip: no algorithm


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
    hosts: Levels = ()  # of what counts as one flat level, its bunches: the order in which messages leave goes by them

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

    def seen(self, level: Level) -> Level:
        """A level as the messages that cross it see it."""
        return level.under(dict(self.inside).get(level.tier, self.protocol))

    @property
    def moved(self) -> Levels:
        """All levels so."""
        return tuple(self.seen(level) for level in self.levels)

    def schedule(self) -> Schedule:
        """The messages of all ranks, in the order of the members."""
        levels = tuple(self.seen(level) for level in self.hosts or self.levels)
        return schedule_of(self.algorithm, self.op, self.num_chips, self.nbytes, levels)

    def folded_s(self) -> float:
        """What the messages take by the sweep over representative chips."""
        if not self.levels:
            return 0.0
        outline = outline_of(self.algorithm, self.op, self.nbytes, self.moved)
        assert outline is not None
        return folded_seconds(outline)


def choose(op: Op, nbytes: float, members: Members, network: Network, algorithm: str = AUTO) -> Choice:
    """The fastest way for `op` over these chips, or `algorithm`. Raises CommsError where that does not suit."""
    num_chips = group_size(members)
    if nbytes < 0:
        raise CommsError(f"{nbytes} bytes", "size", "give a size of zero or more")
    if algorithm not in (AUTO, *names(op)):
        known = ", ".join(names(op))
        raise CommsError(f"no algorithm {algorithm!r} for {op}", "algorithm", f"known: auto, {known}")
    tried = _tried(op, nbytes, members, network, algorithm)
    if not tried:
        tried = _tried(op, nbytes, members, network, algorithm, flat=True)
    if num_chips == 1:
        return Choice(op, nbytes, 1, NOTHING, PLAIN, 0.0, 0.0, (), True)
    if not tried:
        hint = "leave it to auto, or take one that suits these levels"
        raise CommsError(f"{algorithm} does not suit this group of {num_chips} chips", "algorithm", hint)
    best = min(tried, key=lambda choice: choice.seconds)
    seen = {best.algorithm}
    others = []
    for choice in sorted(tried, key=lambda choice: choice.seconds):
        if choice.algorithm not in seen:
            seen.add(choice.algorithm)
            others.append((choice.algorithm, choice.seconds))
    return replace(best, others=tuple(others))


def _tried(
    op: Op, nbytes: float, members: Members, network: Network, algorithm: str, flat: bool = False
) -> list[Choice]:
    num_chips = group_size(members)
    if num_chips == 1:
        return []
    tier = _outermost(members, network)
    choices = []
    pairs = _offered(op, num_chips, tier, algorithm)
    folds = {
        aligned: _folds(members, network, aligned, flat)
        for aligned in {joins_likes(name) for name, _ in pairs}
    }
    for name, protocol in pairs:
        inside = network.inside(tier, protocol)
        for levels, is_folded, hosts in folds[joins_likes(name)]:
            blank = Choice(
                op, nbytes, num_chips, name, protocol, 0.0, 0.0, levels, is_folded, inside, hosts=hosts
            )
            outline = outline_of(name, op, nbytes, blank.moved)
            if outline is None or (name in BY_SWITCHES and not is_folded):
                continue
            if algorithm == AUTO and has_many_peers(name, op, levels):
                continue
            latency, wire = _latency_and_wire(outline)
            hidden = hidden_latency_s(name, blank.moved) if protocol.pipelined else 0.0
            setup = tier.setup_s + hidden + protocol.pipeline_fill_s(latency + hidden, wire)
            choices.append(replace(blank, setup_s=setup, transfer_s=closed_seconds(outline)))
    exact = [choice for choice in choices if choice.is_folded]
    return exact or choices  # a guess is no match for what is known


def _folds(
    members: Members, network: Network, aligned: bool, flat: bool
) -> list[tuple[Levels, bool, Levels]]:
    """The levels to try, whether they are what the group folds into, and the bunches of a flat level."""
    levels = None if flat else network.levels(members, aligned)
    if levels is not None:
        return [(levels, True, ())]
    as_if_even = network.levels_as_if_even(members, aligned)
    one_level = _flat(group_size(members), _outermost(members, network))
    if as_if_even is None:
        return [(one_level, False, ())]
    return [(as_if_even, False, ()), (one_level, False, as_if_even)]


def offered(op: Op, members: Members, network: Network) -> tuple[str, ...]:
    """The algorithms among which an automatic choice is made."""
    pairs = _offered(op, group_size(members), _outermost(members, network), AUTO)
    return tuple(dict.fromkeys(name for name, _ in pairs))


def is_limited(members: Members, network: Network) -> bool:
    """Whether the library names the algorithms that it has for these chips."""
    return all(protocol.algorithms for protocol in _outermost(members, network).protocols)


def _offered(op: Op, num_chips: int, tier: Tier, algorithm: str) -> list[tuple[str, Protocol]]:
    """Algorithms with the protocols of the outermost tier: a library moves a whole collective in one way.

    What the library offers, if that is anything for this operation, else all with all; an operation that no protocol
    is named for goes by the first.
    """
    protocols = [each for each in tier.protocols if not each.ops or op in each.ops]
    protocols = protocols or [replace(tier.protocols[0], algorithms=())]
    named = {name for protocol in protocols for name in protocol.algorithms}
    usual = considered(op, num_chips)
    known = tuple(name for name in names(op) if name in usual or name in named)
    wanted = known if algorithm == AUTO else (algorithm,)
    every = [(name, protocol) for name in wanted for protocol in protocols]
    offered = [pair for pair in every if not pair[1].algorithms or pair[0] in pair[1].algorithms]
    return offered or every


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


def _outermost(members: Members, network: Network) -> Tier:
    """The innermost tier in which all members meet; of a Lattice, those of any copy."""
    if isinstance(members, Lattice):
        return network.tiers[network.meeting(members)]
    return network.tier_for(members)


def _flat(num_chips: int, tier: Tier) -> Levels:
    """All members as if no two shared a tier further in."""
    link = tier.loaded_link
    return (Level(tier.name, num_chips, link.latency_s, link.bytes_per_s, link.bytes_per_s),)
