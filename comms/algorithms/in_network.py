"""In-network: switches add what comes up and copy what goes down (NVLS on NVSwitch, SHARP on InfiniBand).

Chips send what they have to the switch over them, which sends the sum to all of them, each by its own wire: a
buffer crosses every wire once each way, whatever the number of chips, so that an all-reduce can beat the bandwidth
bound of chips that add by themselves (Graham et al., SHARP, COMHPC 2016; Klenk et al., ISCA 2020). Over two levels
leaf switches send their sums on to the spine. Pieces follow each other: one comes down while the next goes up.

Helper ranks follow the chips' ranks: one switch, or one leaf per bunch and then the spine. A chip is not sent what
it has: in a reduce-scatter it adds its own part itself.

Outlines are for levels whose switches reduce. Switches add and copy as fast as their wires; a message up and one
down have the level's latency together, and with it a protocol's only once. What a leaf sends to the spine has the
rate of its bunch together: a trunk wider than that is quicker, by less than one piece takes on a chip's wire.
Not modelled: how many collectives a switch can hold.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import ceil

import numpy as np

from comms.algorithms.rounds import Outlines, Schedules, check_ranks, checked_fanouts, folds
from comms.collectives.outline import Hop, Outline, Stage
from comms.collectives.schedule import Channel, Op, Order, Pattern, Round, Schedule
from comms.errors import CommsError
from comms.networks.levels import Levels, num_members
from comms.networks.topology import IntArray

NAME = "in-network"
WHOLE = frozenset({Op.ALL_REDUCE, Op.REDUCE, Op.BROADCAST})  # the buffer is one chunk
ADDS_UP = frozenset({Op.ALL_REDUCE, Op.REDUCE, Op.REDUCE_SCATTER})
ADDS_DOWN = frozenset({Op.REDUCE, Op.REDUCE_SCATTER})  # to what the receiver has
OPS = (Op.ALL_REDUCE, Op.REDUCE_SCATTER, Op.ALL_GATHER, Op.BROADCAST, Op.REDUCE, Op.BARRIER)
# One pass through a reducing switch takes a library as long as this many ring hops: 25 us and 3.4 us per hop on
# NVLink in the table of latencies that NCCL chooses its algorithms by (src/graph/tuning.cc).
IN_NETWORK_STAGES = 25.0 / 3.4
FILLING = 1 / 32  # of the time with endless pieces, what filling the pipeline may cost more


def schedule(
    op: Op, num_ranks: int, root: int = 0, *, fanouts: Sequence[int] | None = None, pieces: int = 1
) -> Schedule:
    """One of OPS by one level of switches, or with two fanouts by two."""
    check_ranks(num_ranks, root, pieces)
    parts = checked_fanouts(num_ranks, fanouts)
    if len(parts) > 2:
        raise CommsError(f"{len(parts)} levels of switches", NAME, "take one or two")
    num_chunks = 1 if op in WHOLE else num_ranks
    share = 0.0 if op is Op.BARRIER else 1.0 / num_chunks
    if not parts:
        return Schedule(op, NAME, num_ranks, num_chunks, share, (), root)
    num_leaves = num_ranks // parts[0]
    leaves, spine = num_ranks + np.arange(num_leaves), num_ranks + num_leaves
    chips = np.arange(num_ranks)
    own_chip, own_leaf = chips == root, np.arange(num_leaves) == root // parts[0]
    chip_loads, leaf_loads = (_loads(op, num_ranks, size) for size in (1, parts[0]))
    ups = [_round(op, True, chips, leaves[chips // parts[0]], own_chip, chip_loads)]
    downs = [_round(op, False, chips, leaves[chips // parts[0]], own_chip, chip_loads)]
    if num_leaves > 1:
        ups.append(_round(op, True, leaves, np.full_like(leaves, spine), own_leaf, leaf_loads))
        downs.append(_round(op, False, leaves, np.full_like(leaves, spine), own_leaf, leaf_loads))
    phases = tuple((each,) for each in (*ups, *reversed(downs)))
    channels = (Channel(phases, pieces, Order.INTERLEAVED, at_once=True),)
    num_helpers = num_leaves + (num_leaves > 1)
    return Schedule(op, NAME, num_ranks, num_chunks, share, channels, root, num_helpers)


def outline(op: Op, nbytes: float, levels: Levels, *, pieces: int = 1) -> Outline | None:
    """Over one level or two whose switches reduce; up, further up, down and further down by wires of their own."""
    spans = folds(levels)
    one_tree = len({level.port for level, _ in spans}) <= 1  # else no wires join a leaf and the spine
    if len(spans) > 2 or not one_tree or not all(level.reduces for level, _ in spans):
        return None
    n, reached_s = num_members(levels), 0.0
    part = 0.0 if op is Op.BARRIER else nbytes if op in WHOLE else nbytes / n
    ups: list[tuple[Stage, ...]] = []
    downs: list[tuple[Stage, ...]] = []
    for level, inner in spans:
        hop = Hop(max(0.0, level.latency_s - reached_s) / 2, inner * level.rate(inner))
        loads = _loads(op, n, inner)
        ups.append((Stage(1, loads.num_up * part, (hop,)),))
        downs.insert(0, (Stage(1, loads.num_down * part, (hop,)),))
        reached_s = level.latency_s
    phases = (*ups, *downs)
    return Outline(NAME, phases, tuple(range(len(phases))), pieces, Order.INTERLEAVED)


def pipeline_pieces(op: Op, nbytes: float, levels: Levels) -> int:
    """The fewest pieces with which filling the pipeline costs at most FILLING of the time with endless pieces."""
    whole = outline(op, nbytes, levels)
    if whole is None or not whole.phases:
        return 1
    stages = [stage for phase in whole.phases for stage in phase]
    moving = [stage.nbytes / stage.hops[0].bytes_per_s for stage in stages]
    endless = max(moving) + sum(stage.hops[0].latency_s for stage in stages)
    return max(1, ceil((sum(moving) - max(moving)) / (FILLING * endless))) if endless > 0 else 1


def hidden_latency_s(levels: Levels) -> float:
    """What a library takes for one pass through the switches beyond the latency of a message up and one down."""
    return (IN_NETWORK_STAGES - 1) * folds(levels)[-1][0].latency_s


@dataclass(frozen=True, slots=True, eq=False)
class _Loads:
    """What goes between a chip, or a leaf with all its chips, and the switch over it, in chunks."""

    first_up: IntArray  # [chips or leaves]
    num_up: int
    first_down: IntArray
    num_down: int


def _loads(op: Op, num_ranks: int, size: int) -> _Loads:
    """For blocks of `size` chips: their own chunks, all others, or the whole buffer."""
    own = np.arange(0, num_ranks, size)
    if op in WHOLE:
        return _Loads(0 * own, 1, 0 * own, 1)
    others, num_others = (own + size) % num_ranks, num_ranks - size
    if op is Op.REDUCE_SCATTER:
        return _Loads(others, num_others, own, size)
    return _Loads(own, size, others, num_others)


def _round(op: Op, up: bool, lower: IntArray, upper: IntArray, has_root: np.ndarray, loads: _Loads) -> Round:
    """All messages up to one layer of switches, or down from it; with a root, only those towards or from it."""
    rows = np.arange(len(lower))
    if op in (Op.BROADCAST, Op.REDUCE):
        towards = op is Op.REDUCE
        rows = np.flatnonzero(has_root == (up != towards))
    first, num = (loads.first_up, loads.num_up) if up else (loads.first_down, loads.num_down)
    src, dst = (lower[rows], upper[rows]) if up else (upper[rows], lower[rows])
    reduces = op in (ADDS_UP if up else ADDS_DOWN)
    return Round(Pattern(src, dst), first[rows], np.full(len(rows), num), reduces)


SCHEDULES: Schedules = {NAME: {op: partial(schedule, op) for op in OPS}}
OUTLINES: Outlines = {NAME: {op: partial(outline, op) for op in OPS}}
PIECES: Mapping[str, Mapping[Op, Callable[[float, Levels], int]]] = {
    NAME: {op: partial(pipeline_pieces, op) for op in OPS if op is not Op.BARRIER}
}
