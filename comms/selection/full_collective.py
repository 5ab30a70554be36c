"""Full collectives: one collective moved message by message on a network in the state that it is in.

A site is a network with its conditions: links that are gone or slow, chips that are late, noise, jobs of others in
the background. What the library adds (setup, the price of handing pieces on) is that of the tier, as everywhere.
A schedule that nobody calibrated (a user's own, a synthesized one) is charged the same, with what it takes for no
bytes as its latencies.

Importing this loads the compiled loops; who only wants closed forms leaves it alone.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeAlias

import numpy as np

from comms.algorithms import ring
from comms.algorithms.rounds import Ranks
from comms.collectives.schedule import Op, Schedule
from comms.networks.conditions import CALM, Described, Resolved, may_relay, resolve
from comms.networks.fabrics.edge_list import Rerouted
from comms.networks.fabrics.torus_mesh import Torus
from comms.networks.groups import Lattice, mesh_group
from comms.networks.links import Link, Protocol
from comms.networks.network import Network, Tier
from comms.networks.tiered import TieredTopology
from comms.networks.topology import FloatArray, Topology
from comms.selection.candidate_jobs import MOST_MESSAGES, check_messages, jobs_of
from comms.selection.choice import Choice, choose
from comms.selection.node_names import node_names
from comms.selection.pricing import job_of
from comms.selection.topology_aware import Laid
from comms.simulation.compiled import Job
from comms.simulation.full import FullResult, Method, simulate, simulate_within
from comms.simulation.incremental import Live
from comms.simulation.work_budget import UNLIMITED, GivenUp, Limit, Watch, unwatched
from comms.synthesis.synthesis import WORTH, improve, synthesize

SEED = 0  # of what is synthesized: the same question, the same schedule


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

    @property
    def work(self) -> int:
        """As limits count it."""
        return self.result.work


@dataclass(frozen=True, slots=True)
class Effort:
    """What it is worth to time a collective."""

    most_messages: int = MOST_MESSAGES
    limit: Limit = UNLIMITED  # with the setup
    watch: Watch = unwatched


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


Attempt: TypeAlias = Callable[[Limit], FullTiming | GivenUp]


def site_of(network: Network, num_chips: int, described: Described = CALM) -> Site:
    """The site of the first `num_chips` chips. Raises CommsError for conditions that it cannot have."""
    own = network.take(num_chips)
    whole = own.topology()
    return Site(own, num_chips, whole, resolve(described, whole))


def load_loops() -> None:
    """Have the loops compiled, or loaded if they were compiled before."""
    pair, jobs = (
        Torus((2,), (Link(1e-6, 1e9),)),
        [Job(ring.schedule(Op.ALL_REDUCE, Ranks(2)), np.arange(2), 1.0)],
    )
    for method in Method:
        simulate(pair, jobs, method=method)
    live = Live(pair, jobs)
    for at_s in (1.0, 2.0):  # the second time a job is wound back
        live.start(0, 0, at_s)
        live.advance(np.inf)


def timed_choice(
    site: Site, choice: Choice, most_messages: int = MOST_MESSAGES, watch: Watch = unwatched
) -> FullTiming:
    """A choice at full fidelity, by the fastest of its jobs. Raises TooManyMessages where that is too much."""
    return _finished(tried_choice(site, choice, Effort(most_messages, watch=watch)))


def timed_schedule(site: Site, laid: Laid, nbytes: float, watch: Watch = unwatched) -> FullTiming:
    """Any schedule over all chips, by the fastest protocol of the outermost tier."""
    return _finished(tried_schedule(site, laid, nbytes, Effort(watch=watch)))


def tried_choice(site: Site, choice: Choice, effort: Effort) -> FullTiming | GivenUp:
    """A choice, as far as it is worth it. Raises TooManyMessages."""

    def attempt(job: Job, limit: Limit) -> FullTiming | GivenUp:
        found = _moved(site, job, limit.before(choice.setup_s), effort.watch)
        if isinstance(found, GivenUp):
            return found.after(choice.setup_s)
        seconds = choice.setup_s + float(found.seconds[0])
        return FullTiming(choice.algorithm, seconds, choice.setup_s, choice.protocol, found)

    jobs = jobs_of(choice, site.members, site.whole, site.seen, effort.most_messages)
    return _fastest((partial(attempt, job) for job in jobs), effort.limit)


def tried_schedule(site: Site, laid: Laid, nbytes: float, effort: Effort) -> FullTiming | GivenUp:
    """A schedule, as far as it is worth it. Raises TooManyMessages."""
    check_messages(laid.schedule.num_messages, laid.schedule.algorithm, effort.most_messages)
    tier = site.network.tier_for((0, site.num_chips - 1))
    attempts = (
        partial(_under, site, laid, nbytes, tier, protocol, effort.watch) for protocol in tier.protocols
    )
    return _fastest(attempts, effort.limit)


def _fastest(attempts: Iterable[Attempt], limit: Limit) -> FullTiming | GivenUp:
    """Of several ways; each is given up when it is later than one before."""
    best: FullTiming | None = None
    given_up: list[GivenUp] = []
    for attempt in attempts:
        found = attempt(limit)
        if isinstance(found, GivenUp):
            given_up.append(found)
        elif best is None or found.seconds < best.seconds:
            best, limit = found, replace(limit, until_s=min(limit.until_s, found.seconds))
    if best is not None:
        return best
    at_least_s = min(each.at_least_s for each in given_up)
    work = sum(each.work for each in given_up)
    return GivenUp(at_least_s, all(each.is_late for each in given_up), work)


def _finished(found: FullTiming | GivenUp) -> FullTiming:
    assert isinstance(found, FullTiming), "nothing limits it"
    return found


def _moved(site: Site, job: Job, limit: Limit, watch: Watch) -> FullResult | GivenUp:
    """A job among those of others, under the conditions of the site."""
    jobs = [job, *background_jobs(site)]
    return simulate_within(site.topology, jobs, site.resolved.conditions, limit, watch)


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


def _under(
    site: Site, laid: Laid, nbytes: float, tier: Tier, protocol: Protocol, watch: Watch, limit: Limit
) -> FullTiming | GivenUp:
    inside, setup_s = site.network.inside(tier, protocol), tier.setup_s
    job = Job(laid.schedule, laid.chips, nbytes, protocol=protocol, inside=inside)
    result = _moved(site, job, limit.before(setup_s), watch)
    if isinstance(result, GivenUp):
        return result.after(setup_s)
    seconds = float(result.seconds[0])
    if protocol.pipelined:
        empty = _moved(site, replace(job, nbytes=0.0), UNLIMITED, unwatched)
        assert isinstance(empty, FullResult), "nothing limits it"
        latency_s = float(empty.seconds[0])
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
