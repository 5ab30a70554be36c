"""Question: what is asked about a collective, and the answer to it.

Assumes that all chips take part, rank r on chip r, and are ready at once. Not modelled: see LEFT_OUT.
"""

from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property

from comms.collectives.schedule import Op, Schedule, bus_factor
from comms.networks.conditions import HEALTHY, Described
from comms.networks.groups import Lattice
from comms.networks.network import Network
from comms.selection.choice import AUTO, TierShare
from comms.selection.site import FullTiming, Site, TierLoad, WireLoad, all_chips, tier_loads
from comms.synthesis.bisection import Cut, bisection
from comms.synthesis.synthesis import NAME as SYNTHESIZED

SYNTHESIS_CHIPS = 64  # up to here a schedule made for the network is looked for without being asked for
BISECTION_CHIPS = 16_384  # up to here the halves of a network are looked at


class Fidelity(StrEnum):
    """How closely a collective is timed. What the library adds is the same in all (`Choice.setup_s`).

    On groups that fold evenly the three agree; others need full, and a topology of few enough chips.
    """

    CLOSED = "closed"  # arithmetic over the levels of the group, in microseconds of work
    FOLDED = "folded"  # the same messages, swept over representative chips
    FULL = "full"  # every message of every chip on the topology, wires shared max-min fairly


_NEVER = ("packets, queues and loss in switches", "what chips do beside the collective")
_REAL = ("contention with other jobs, degraded links and late chips",)
LEFT_OUT = {Fidelity.CLOSED: (*_REAL, *_NEVER), Fidelity.FOLDED: (*_REAL, *_NEVER), Fidelity.FULL: _NEVER}


@dataclass(frozen=True, slots=True, eq=False)
class Question:
    """One collective over all chips of a network."""

    network: Network  # of exactly num_chips
    num_chips: int
    op: Op
    nbytes: float
    algorithm: str = AUTO  # or a name of the catalog, or SYNTHESIZED
    schedule: Schedule | None = None  # used instead of an algorithm
    fidelity: Fidelity | None = None
    described: Described = HEALTHY
    chips_per_host: int = 1  # for the names of chips only
    looks_for_better: bool = True  # auto may take long to look for a schedule of its own

    @property
    def members(self) -> Lattice:
        """All chips."""
        return all_chips(self.num_chips)

    @property
    def has_own_schedule(self) -> bool:
        """Whether no fixed algorithm is asked for: a schedule of the user's own, or one made for the network."""
        return self.schedule is not None or self.algorithm == SYNTHESIZED

    @property
    def is_auto(self) -> bool:
        """Whether an algorithm is to be chosen."""
        return self.algorithm == AUTO and self.schedule is None and self.num_chips > 1

    @property
    def is_uneven(self) -> bool:
        """Whether chips send parts of all sizes to each other."""
        made = self.schedule
        return made is not None and self.op is Op.ALL_TO_ALL and not isinstance(made.shares, float)

    @property
    def even_nbytes(self) -> float:
        """What one chip would have for all, its own part among it, if as much left the chips in even parts."""
        if not self.is_uneven:
            return self.nbytes
        assert self.schedule is not None and not isinstance(self.schedule.shares, float)
        n = self.num_chips
        table = self.schedule.shares.reshape(n, n, -1).sum(axis=2)  # from chip to chip
        leaves = float(table.sum() - table.trace())  # n - 1 parts of each chip; its own stays where it is
        return self.nbytes * leaves / (n - 1)

    def algbw(self, seconds: float) -> float:
        """Bytes per second as nccl-tests count them: nbytes over time."""
        return self.nbytes / seconds if seconds > 0 and self.op is not Op.BARRIER else 0.0

    def busbw(self, seconds: float) -> float:
        """What a link carries, as nccl-tests count it: comparable over numbers of chips."""
        return self.algbw(seconds) * bus_factor(self.op, self.num_chips)


@dataclass(frozen=True, slots=True)
class AlgorithmTime:
    """What an algorithm that was looked at takes, and by which fidelity."""

    algorithm: str
    seconds: float
    fidelity: Fidelity


@dataclass(frozen=True, eq=False)
class Answer:
    """What a collective takes. `setup_s` is part of `seconds`."""

    question: Question = field(repr=False)
    algorithm: str
    protocol: str
    fidelity: Fidelity
    seconds: float
    setup_s: float
    reason: str
    tiers: tuple[TierShare, ...]  # of a group that folds
    candidates: tuple[AlgorithmTime, ...]  # with the algorithm itself, fastest first
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    full: FullTiming | None = field(default=None, repr=False)
    site: Site | None = field(default=None, repr=False)
    loading_s: float = 0.0  # for the event loop, not in elapsed_s
    elapsed_s: float = 0.0

    @property
    def algbw_bytes_per_s(self) -> float:
        return self.question.algbw(self.seconds)

    @property
    def busbw_bytes_per_s(self) -> float:
        return self.question.busbw(self.seconds)

    @cached_property
    def loads(self) -> tuple[TierLoad, ...]:
        """What crossed the wires of each tier; none where messages were not moved."""
        return tier_loads(self.site, self.full) if self.site and self.full else ()

    @property
    def busiest_wire(self) -> WireLoad | None:
        """Of all that crossed wires, where messages were moved."""
        return max((load.busiest for load in self.loads), key=lambda wire: wire.busy, default=None)

    @cached_property
    def bisection(self) -> Cut | None:
        """The narrowest cut of the network into halves; None for one chip, and where it is too large to look at."""
        if not 1 < self.question.num_chips <= BISECTION_CHIPS:
            return None
        return bisection(self.site.seen if self.site else self.question.network.topology())

    @property
    def left_out(self) -> tuple[str, ...]:
        """What this fidelity does not model."""
        return LEFT_OUT[self.fidelity]

    @property
    def limiting_tier(self) -> TierShare | None:
        """The tier that would save most if it cost nothing."""
        best = max(self.tiers, key=lambda share: share.saved_s, default=None)
        return best if best is not None and best.saved_s > 0 else None


def conditions_in_words(described: Described) -> str:
    """What of the conditions touches a collective; empty where nothing does."""
    flapping = sum(fault.flaps is not None for fault in described.links)
    down = sum(fault.factor == 0 and fault.flaps is None for fault in described.links)
    slow = sum(0 < fault.factor < 1 for fault in described.links)
    late = sum(len(fault.chips) for fault in described.chips if fault.delay_s)
    counted = (
        (down, "link down", "links down"),
        (slow, "slow link", "slow links"),
        (flapping, "flapping link", "flapping links"),
        (late, "late chip", "late chips"),
        (len(described.background), "job in the background", "jobs in the background"),
    )
    parts = [f"{count} {one if count == 1 else many}" for count, one, many in counted if count]
    if described.jitter.rate or described.jitter.delay_s:
        parts.append("jitter")
    if described.rates:
        parts.append("chips of several kinds, with links of their own")
    return ", ".join(parts)
