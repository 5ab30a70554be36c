"""Synthesis: a schedule made for one network, where no fixed algorithm fits it.

Several forests of trees are packed onto the wires (`synthesis.forest`), each is cut into as many pieces as help and
put into a timetable (`synthesis.timetable`), and the best few are timed at full fidelity, which decides. All-gather
and broadcast run down trees, reduce-scatter and reduce up, all-reduce both ways over the same roots, so that the
way back of the first pieces goes on beside the way there of the last; all-to-all takes the paths of trees.

What comes out is the best that was found, not the best there is; `least_s` says how far it can be from it.
Not modelled: switches that reduce, what a chip needs to start a message (small pieces cost nothing but latency),
and room for pieces on the way.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import numpy as np

from comms.collectives.schedule import Op, Schedule
from comms.errors import CommsError
from comms.networks.topology import IntArray, Topology
from comms.synthesis.bisection import makespan_bound, narrow_cuts
from comms.synthesis.forest import Forest, Hops, Wanted, fullest_seconds, hops_of, pack
from comms.synthesis.timetable import Sends, Timetable, channels_of, sends_of, timetable

NAME = "synthesized"
WORTH = 1.01  # a schedule of its own must be faster by this factor
LEANS = (0.0, 0.2, 1.0)  # the cheapest tree, one near it, and the tree of cheapest paths
SWEEPS = 30
PACE = 0.8  # pieces follow each other a little faster than the fullest wire lets them
HELPS = 1.02  # twice the pieces must shorten the timetable by this factor
MAX_PACKED = 2**20  # trees x chips^2
MAX_SENDS = 2**16
MAX_SHARED_SENDS = 12_000  # events cost more than a sweep
# Chunks x chips x rounds of all channels: what full fidelity keeps of who waits for what.
MAX_CELLS = 2**25
# Times effort: timed at full fidelity where wires are shared; elsewhere a timetable says the same.
FINALISTS = 3
SHARED_CHANNELS = (1, 16)
TREES = {
    Op.ALL_REDUCE: (1, 2, 4, 8, 16, 24, 32, 48),
    Op.BROADCAST: (1, 2, 4, 8, 16),
    Op.REDUCE: (1, 2, 4, 8, 16),
    Op.ALL_GATHER: (1, 2, 3, 4, 6),  # per root from here on
    Op.REDUCE_SCATTER: (1, 2, 3, 4, 6),
    Op.ALL_TO_ALL: (1, 2, 4),
}
PER_ROOT = (Op.ALL_GATHER, Op.REDUCE_SCATTER, Op.ALL_TO_ALL)


@dataclass(frozen=True, slots=True, eq=False)
class Synthesized:
    """A schedule made for one network and size."""

    schedule: Schedule
    seconds: float  # at full fidelity
    planned_s: float  # by its own timetable, with one message at a time on a wire
    least_s: float  # no schedule among chips is faster


@dataclass(frozen=True, slots=True, eq=False)
class Verdict:
    """Whether a schedule of its own is worth it, and why."""

    found: Synthesized | None  # None: the fixed algorithm is kept
    reason: str


@dataclass(frozen=True, slots=True, eq=False)
class _SynthesisTask:
    """What is asked for."""

    op: Op
    topology: Topology
    nbytes: float
    root: int
    seed: int
    effort: int
    hops: Hops


@dataclass(frozen=True, slots=True, eq=False)
class _Packed:
    """A forest and how long it keeps the fullest wire busy."""

    forest: Forest
    nbytes: float  # of a share
    fullest_s: float


@dataclass(frozen=True, slots=True, eq=False)
class _Draft:
    """The messages of a forest, cut into pieces, and when they leave."""

    num_trees: int
    sends: Sends
    planned: Timetable


def improve(
    op: Op,
    topology: Topology,
    nbytes: float,
    fixed: str,
    seconds: float,
    *,
    seed: int,
    effort: int = 1,
) -> Verdict:
    """A schedule that beats a fixed algorithm of `seconds`, or the word that this is kept; with the reason."""
    task = _task(op, topology, nbytes, 0, seed, effort)
    least = _least(task)
    if seconds <= least * WORTH:
        over = max(0.0, seconds / least - 1) if least else 0.0
        return Verdict(None, f"keeps {fixed}: within {over:.1%} of what wires allow")
    drafts = _drafts(task)
    planned = drafts[0].planned.seconds
    if seconds <= planned * WORTH:
        times = planned / seconds
        return Verdict(None, f"keeps {fixed}: the best plan found takes {times:.2f} times as long")
    found = _fastest(task, drafts)
    if seconds <= found.seconds * WORTH:
        times = found.seconds / seconds
        return Verdict(None, f"keeps {fixed}: the best schedule found takes {times:.2f} times as long")
    return Verdict(found, f"{seconds / found.seconds:.2f} times faster than {fixed}")


def synthesize(
    op: Op, topology: Topology, nbytes: float, *, seed: int, effort: int = 1, root: int = 0
) -> Synthesized:
    """The best schedule found over all chips of a topology; the same for the same seed.

    `effort` is how often forests are packed anew. Time grows with effort x trees x chips^2 and with the messages,
    of which there are at most MAX_SENDS or those of uncut shares.
    """
    task = _task(op, topology, nbytes, root, seed, effort)
    if topology.num_chips > 1:
        return _fastest(task, _drafts(task))
    schedule = Schedule(op, NAME, 1, 1, 1.0, (), root)
    return Synthesized(schedule, 0.0, 0.0, 0.0)


def _task(op: Op, topology: Topology, nbytes: float, root: int, seed: int, effort: int) -> _SynthesisTask:
    if op not in TREES:
        raise CommsError(f"cannot synthesize {op}", "synthesis", f"ask for one of {', '.join(TREES)}")
    if nbytes < 0:
        raise CommsError(f"{nbytes} bytes", "synthesis", "give a size of zero or more")
    if not 0 <= root < topology.num_chips:
        raise CommsError(f"there is no chip {root}", "synthesis", f"chips are 0 to {topology.num_chips - 1}")
    if effort < 1:
        raise CommsError(f"an effort of {effort}", "synthesis", "give 1 or more")
    hops = hops_of(topology)
    if not np.isfinite(hops.ways(np.ones(hops.num_hops))).all():
        raise CommsError("chips cannot reach each other hop by hop", "synthesis", "join them by links")
    return _SynthesisTask(op, topology, nbytes, root, seed, effort, hops)


def _drafts(task: _SynthesisTask) -> list[_Draft]:
    """Timetables, the shortest first. Forests whose fullest wire alone takes longer than the best are left out."""
    most = MAX_SENDS if task.hops.is_single_wires else MAX_SHARED_SENDS
    drafts: list[_Draft] = []
    for each in sorted(_forests(task), key=lambda packed: packed.fullest_s):
        if not drafts or each.fullest_s < min(draft.planned.seconds for draft in drafts):
            drafts.append(_cut(task, each, most))
    return sorted(drafts, key=lambda draft: draft.planned.seconds)


def _forests(task: _SynthesisTask) -> Iterator[_Packed]:
    """One per number of trees, way of growing them and start; many trees are left out where they take too long."""
    for trees in TREES[task.op]:
        wanted = _wanted(task, trees)
        if trees > 1 and len(wanted.roots) * task.hops.num_chips**2 > MAX_PACKED:
            break
        for start, lean in product(range(task.effort), LEANS):
            forest = pack(task.hops, wanted, lean=lean, sweeps=SWEEPS, seed=task.seed + start)
            yield _Packed(forest, wanted.nbytes, fullest_seconds(task.hops, forest, wanted.nbytes))


def _wanted(task: _SynthesisTask, trees: int) -> Wanted:
    op, n = task.op, task.hops.num_chips
    down = op not in (Op.REDUCE, Op.REDUCE_SCATTER)
    up = op in (Op.ALL_REDUCE, Op.REDUCE, Op.REDUCE_SCATTER)
    if op in PER_ROOT:
        roots = tuple(np.repeat(np.arange(n), trees).tolist())
        return Wanted(roots, task.nbytes / n / trees, down, up, op is Op.ALL_TO_ALL)
    share = task.nbytes / trees
    if op is Op.ALL_REDUCE:
        near = np.resize(_central(task.hops, share), trees)
        return Wanted(tuple(near.tolist()), share, down, up)
    return Wanted((task.root,) * trees, share, down, up)


def _central(hops: Hops, nbytes: float) -> IntArray:
    """The chips that are no farther from all others, there and back, than most are; the nearest first."""
    far = hops.ways(hops.latency_s + nbytes / hops.bytes_per_s)
    from_all = (far + far.T).sum(axis=0)
    order = np.argsort(from_all, kind="stable")
    near: IntArray = order[from_all[order] <= np.median(from_all) * (1 + 1e-9)]
    return near


def _cut(task: _SynthesisTask, packed: _Packed, most: int) -> _Draft:
    """As many pieces as help: their number doubles while the timetable gets shorter by enough."""
    best: _Draft | None = None
    pieces = 1
    while True:
        sends = sends_of(task.hops, packed.forest, pieces)
        if best is not None and len(sends.hop) > most:
            return best
        pace_s = PACE * packed.fullest_s / pieces
        planned = timetable(task.hops, sends, packed.nbytes / pieces, pace_s, task.seed)
        if best is not None and planned.seconds * HELPS > best.planned.seconds:
            return best
        best = _Draft(packed.forest.num_trees, sends, planned)
        pieces *= 2


def _fastest(task: _SynthesisTask, drafts: list[_Draft]) -> Synthesized:
    """The fastest schedule of the best few drafts, at full fidelity."""
    from comms.simulation.compiled import CollectiveJob
    from comms.simulation.full import simulate  # compiled loops, only where they are needed

    chips = np.arange(task.hops.num_chips)
    best: Synthesized | None = None
    for draft in drafts[: 1 if task.hops.is_single_wires else FINALISTS * task.effort]:
        for deal in _deals(task.hops, draft):
            schedule = _schedule(task, draft, deal)
            rounds = sum(len(channel.rounds) for channel in schedule.channels)
            if best is not None and schedule.num_chunks * len(chips) * rounds > MAX_CELLS:
                continue
            seconds = float(simulate(task.topology, [CollectiveJob(schedule, chips, task.nbytes)]).seconds[0])
            if best is None or seconds < best.seconds:
                best = Synthesized(schedule, seconds, draft.planned.seconds, _least(task))
    assert best is not None
    return best


def _deals(hops: Hops, draft: _Draft) -> list[IntArray]:
    """[chunks] Ways to deal chunks to channels. One keeps the timetable where hops share no wires.

    Elsewhere a chip with one queue waits while its message shares a wire further on, so there are more of them:
    one for every so many pieces, or for each tree.
    """
    chunk = np.arange(draft.sends.num_chunks)
    if hops.is_single_wires:
        return [np.zeros_like(chunk)]
    return [*(chunk % count for count in SHARED_CHANNELS), chunk * draft.num_trees // len(chunk)]


def _schedule(task: _SynthesisTask, draft: _Draft, deal: IntArray) -> Schedule:
    n, chunks = task.hops.num_chips, draft.sends.num_chunks
    share = n / chunks if task.op is Op.ALL_TO_ALL else 1.0 / chunks
    channels = channels_of(task.hops, draft.sends, draft.planned, deal)
    return Schedule(task.op, NAME, n, chunks, share, channels, task.root)


def _least(task: _SynthesisTask) -> float:
    """No schedule among chips is faster: what chips, all of them and halves of them must send, and the longest way.

    All-reduce needs 2 (chips - 1) messages for each byte, as gossip in a directed graph does (Harary and Schwenk,
    Pacific Journal of Mathematics 54, 1974). Switches that reduce can be faster.
    """
    if task.hops.num_chips < 2:
        return 0.0
    bound = makespan_bound(
        task.topology, task.op, task.nbytes, root=task.root, cuts=narrow_cuts(task.topology)
    )
    return max(bound, _relayed_seconds(task.hops, task.nbytes)) if task.op is Op.ALL_TO_ALL else bound


def _relayed_seconds(hops: Hops, nbytes: float) -> float:
    """What an all-to-all keeps all wires of chips busy for at least: every part goes hop by hop."""
    total = float(hops.ways(np.ones(hops.num_hops)).sum()) * nbytes / hops.num_chips
    first, last = hops.routes.wires[hops.routes.offsets[:-1]], hops.routes.wires[hops.routes.offsets[1:] - 1]
    return total / float(min(hops.capacity[np.unique(wires)].sum() for wires in (first, last)))
