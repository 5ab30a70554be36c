"""Full collectives: one collective moved message by message on a network in the state that it is in.

A site is a network with its conditions: links that are gone or slow, chips that are late, noise, jobs of others in
the background. What the library adds (setup, the price of handing pieces on) is that of the tier, as everywhere.
A schedule that nobody calibrated (a user's own, a synthesized one) is charged the same, with what it takes for no
bytes as its latencies.

Importing this loads the compiled loops; who only wants closed forms leaves it alone.
"""

from dataclasses import dataclass, replace

import numpy as np

from comms.algorithms import direct, doubling, ring
from comms.algorithms.catalog import outline_of
from comms.algorithms.hierarchical import Way
from comms.choice import Choice, choose
from comms.compiled import Job
from comms.conditions import CALM, Described, Resolved, may_relay, resolve
from comms.errors import TooManyMessages
from comms.full import FullResult, Method, simulate
from comms.graph import Rerouted
from comms.groups import Lattice, mesh_group
from comms.links import Link, Protocol
from comms.live import Live
from comms.network import Network, Tier
from comms.pricing import groups_of, job_of
from comms.schedule import Op, Schedule
from comms.suggested import RING, Laid, laid_hierarchies, laid_rings
from comms.synthesis import WORTH, improve, synthesize
from comms.tiered import TieredTopology
from comms.topology import FloatArray, Topology
from comms.torus import Torus
from orchestrator.node_names import node_names

SEED = 0  # of what is synthesized: the same question, the same schedule
MOST_MESSAGES = 2**24  # some 2 GB
EASILY_MADE = 2**22  # up to so many sends a schedule is made to know how many messages it has


@dataclass(frozen=True, slots=True, eq=False)
class Site:
    """A network of exactly `num_chips`, and the state it is in."""

    network: Network
    num_chips: int
    whole: TieredTopology
    resolved: Resolved

    @property
    def members(self) -> Lattice:
        """All chips."""
        return mesh_group((("all", self.num_chips),), ("all",))

    @property
    def topology(self) -> Topology:
        """Without what is down."""
        return self.resolved.topology

    @property
    def seen(self) -> Topology:
        """The topology with what is slow as it is, for those who look at wires only."""
        factors = self.resolved.conditions.factors
        slow = {wire: factor for wire, factor in factors.items() if 0 < factor < 1}
        return Rerouted(self.topology, (), slow, may_relay(self.whole)) if slow else self.topology


@dataclass(frozen=True, slots=True, eq=False)
class FullTiming:
    """What a collective took; `seconds` is with `setup_s`."""

    algorithm: str
    seconds: float
    setup_s: float
    protocol: Protocol
    result: FullResult


@dataclass(frozen=True, slots=True)
class WireLoad:
    """A wire by its ends, and for which part of the time it was busy."""

    tier: str
    tail: str
    head: str
    nbytes: float
    bytes_per_s: float
    busy: float


@dataclass(frozen=True, slots=True)
class TierLoad:
    """What crossed the wires of a tier in all, and the busiest of them."""

    tier: str
    nbytes: float
    busiest: WireLoad


def site_of(network: Network, num_chips: int, described: Described = CALM) -> Site:
    """The site of the first `num_chips` chips. Raises CommsError for conditions that it cannot have."""
    own = network.take(num_chips)
    whole = own.topology()
    return Site(own, num_chips, whole, resolve(described, whole))


def load_loops() -> None:
    """Have the loops compiled, or loaded if they were compiled before."""
    pair, jobs = Torus((2,), (Link(1e-6, 1e9),)), [Job(ring.all_reduce(2), np.arange(2), 1.0)]
    for method in Method:
        simulate(pair, jobs, method=method)
    live = Live(pair, jobs)
    for at_s in (1.0, 2.0):  # the second time a job is wound back
        live.start(0, 0, at_s)
        live.advance(np.inf)


def timed_choice(site: Site, choice: Choice, most_messages: int = MOST_MESSAGES) -> FullTiming:
    """A choice at full fidelity. Raises TooManyMessages where that is too much.

    On a network without levels, or with links down or slow, rings go from chip to neighbouring chip, as many as its
    wires bear, where that is faster than by number.
    """
    sends, pieces = _most_sends(choice)
    if sends > EASILY_MADE:
        check_messages(sends * pieces, choice.algorithm, most_messages)
    job = job_of(choice, groups_of(site.members, site.num_chips), site.whole)
    jobs = [job]
    if choice.algorithm == RING and not (choice.is_folded and site.seen is site.whole):
        laid = laid_rings(choice.op, site.seen)
        jobs += [replace(job, schedule=each.schedule, places=each.chips) for each in laid]
    timings = []
    for job in jobs:
        check_messages(job.schedule.num_messages, choice.algorithm, most_messages)
        result = simulate(site.topology, [job, *background_jobs(site)], site.resolved.conditions)
        seconds = choice.setup_s + float(result.seconds[0])
        timings.append(FullTiming(choice.algorithm, seconds, choice.setup_s, choice.protocol, result))
    return min(timings, key=lambda timing: timing.seconds)


def _most_sends(choice: Choice) -> tuple[int, int]:
    """(sends, pieces of each) of a choice, without its schedule, if every chip sends in every round to all peers.

    Where what a chip holds is not one range of chunks, as many as there are chunks of others: between all pairs, and
    in halves of an all-reduce over several levels.
    """
    outline = outline_of(choice.algorithm, choice.op, choice.nbytes, choice.moved)
    assert outline is not None
    phases = [phase for channel in outline.channels for phase in channel.phases]
    rounds = sum(stage.repeat for phase in phases for stage in phase)
    others, peers = choice.num_chips - 1, 1
    if choice.algorithm in direct.SCHEDULES:
        peers = others
    elif Way.DIRECT in choice.algorithm:
        peers = max(level.fanout for level in choice.levels) - 1
    halves = choice.op in (Op.ALL_GATHER, Op.REDUCE_SCATTER)
    in_parts = halves and (len(choice.levels) > 1 or choice.algorithm in doubling.SCHEDULES)
    chunks = others if in_parts or choice.op is Op.ALL_TO_ALL else 0
    return choice.num_chips * max(rounds * peers, chunks), outline.pieces


def timed_schedule(site: Site, laid: Laid, nbytes: float) -> FullTiming:
    """Any schedule over all chips, by the fastest protocol of the outermost tier."""
    check_messages(laid.schedule.num_messages, laid.schedule.algorithm)
    tier = site.network.tier_for((0, site.num_chips - 1))
    timings = [_under(site, laid, nbytes, tier, protocol) for protocol in tier.protocols]
    return min(timings, key=lambda timing: timing.seconds)


def timed_hierarchies(site: Site, op: Op, nbytes: float, most_messages: int) -> list[FullTiming]:
    """Hierarchical algorithms over the bunches of chips that the network shows, of so many messages at most."""
    laid = [each for each in laid_hierarchies(op, site.seen) if each.schedule.num_messages <= most_messages]
    return [timed_schedule(site, each, nbytes) for each in laid]


def by_number(schedule: Schedule) -> Laid:
    """Rank r on chip r."""
    return Laid(schedule, np.arange(schedule.num_ranks))


def synthesized(site: Site, op: Op, nbytes: float) -> FullTiming:
    """The best schedule found for this site."""
    return timed_schedule(site, by_number(synthesize(op, site.seen, nbytes, seed=SEED).schedule), nbytes)


def improved(site: Site, op: Op, nbytes: float, fixed: FullTiming) -> tuple[FullTiming | None, str]:
    """A schedule for this site that beats a fixed algorithm, or None where that is kept; and why."""
    verdict = improve(op, site.seen, nbytes, fixed.algorithm, fixed.seconds - fixed.setup_s, seed=SEED)
    if verdict.found is None:
        return None, verdict.reason
    timing = timed_schedule(site, by_number(verdict.found.schedule), nbytes)
    ratio = timing.seconds / fixed.seconds
    if ratio * WORTH >= 1:
        return None, f"keeps {fixed.algorithm}: the best found takes {ratio:.2f} times as long"
    return timing, f"{1 / ratio:.2f} times faster than {fixed.algorithm}"


def tier_loads(site: Site, timing: FullTiming, chips_per_host: int) -> tuple[TierLoad, ...]:
    """Per tier that bytes crossed, from the inside; the share of time is of the whole collective."""
    wires, nbytes = site.topology.wires(), timing.result.wire_nbytes
    rate, busy = _rates(site), _busy(site, timing)
    names = node_names(site.whole, chips_per_host)
    loads: list[TierLoad] = []
    for number, tier in enumerate(site.topology.tiers):
        own = np.flatnonzero((wires.tier == number) & (nbytes > 0))
        if len(own):
            wire = int(own[busy[own].argmax()])
            ends = names[wires.tail[wire]], names[wires.head[wire]]
            worst = WireLoad(tier, *ends, round(float(nbytes[wire]), 3), float(rate[wire]), float(busy[wire]))
            loads.append(TierLoad(tier, round(float(nbytes[own].sum()), 3), worst))
    return tuple(loads)


def busy_by_wire(site: Site, timing: FullTiming) -> dict[int, float]:
    """By number in the whole network the share of time that each wire moves bytes; none for those that are down."""
    wires = site.topology.wires()
    busy = _busy(site, timing)[wires.shares]
    kept = site.topology.kept if isinstance(site.topology, Rerouted) else range(wires.num_wires)
    return {int(wire): float(share) for wire, share in zip(kept, busy, strict=True)}


def _busy(site: Site, timing: FullTiming) -> FloatArray:
    """[wires] Share of the collective's time."""
    rate = _rates(site)
    return timing.result.wire_load / rate / timing.seconds if timing.seconds else np.zeros(len(rate))


def _rates(site: Site) -> FloatArray:
    """[wires] Bytes per second as they are at the start."""
    rate = site.topology.wires().bytes_per_s.copy()
    for wire, factor in site.resolved.conditions.factors.items():
        rate[wire] *= factor
    return rate


def _under(site: Site, laid: Laid, nbytes: float, tier: Tier, protocol: Protocol) -> FullTiming:
    inside, setup_s = site.network.inside(tier, protocol), tier.setup_s

    def run(size: float) -> FullResult:
        job = Job(laid.schedule, laid.chips, size, protocol=protocol, inside=inside)
        return simulate(site.topology, [job, *background_jobs(site)], site.resolved.conditions)

    result = run(nbytes)
    seconds = float(result.seconds[0])
    if protocol.pipelined:
        latency_s = float(run(0.0).seconds[0])
        setup_s += protocol.handing_on_s(latency_s, max(0.0, seconds - latency_s))
    return FullTiming(laid.schedule.algorithm, setup_s + seconds, setup_s, protocol, result)


def background_jobs(site: Site) -> list[Job]:
    """The jobs of others, each again and again from the start."""
    jobs = []
    for each in site.resolved.background:
        chips = tuple(sorted(each.chips))
        job = job_of(choose(each.op, each.nbytes, chips, site.network), np.array([chips]), site.whole)
        jobs.append(replace(job, repeats=True))
    return jobs


def check_messages(count: int, algorithm: str, most: int = MOST_MESSAGES) -> None:
    """Raises TooManyMessages for more than are to be moved one by one."""
    if count > most:
        raise TooManyMessages(
            f"{algorithm} sends about {count / 1e6:.0f} million messages, too many to move one by one",
            "--fidelity full",
            "ask for folded, for fewer chips, or for an algorithm with fewer rounds",
        )
