"""In-network: switches add what comes up and copy what goes down (NVLS on NVSwitch, SHARP on InfiniBand).

Chips send what they have to the switch over them, which sends the sum to all of them, each by its own wire: a
buffer crosses every wire once each way, whatever the number of chips, so that an all-reduce can beat the bandwidth
bound of chips that add by themselves (Graham et al., SHARP, COMHPC 2016; Klenk et al., ISCA 2020). Over two levels
leaf switches send their sums on to the spine. Pieces follow each other: one comes down while the next goes up.

Helper ranks follow the chips' ranks: one switch, or one leaf per subgroup and then the spine. A chip is not sent what
it has: in a reduce-scatter it adds its own part itself.

Outlines are for levels whose switches reduce. Switches add and copy as fast as their wires; a message up and one
down have the level's latency together, and with it a protocol's only once. What a leaf sends to the spine has the
rate of its chips together: a trunk wider than that is quicker, by less than one piece takes on a chip's wire.
Not modelled: how many collectives a switch can hold.
"""

import numpy as np

from comms.algorithms.catalog import Algorithm, Joined, Needs, cut_by, spans
from comms.algorithms.rounds import Ranks
from comms.collectives.outline import Hop, Outline, OutlineStage
from comms.collectives.outline_time import pieces_to_fill
from comms.collectives.schedule import Channel, Op, Pattern, PieceOrder, Round, Schedule
from comms.networks.groups import Levels, num_members
from comms.networks.topology import IntArray

NAME = "in-network"
WHOLE = frozenset({Op.ALL_REDUCE, Op.REDUCE, Op.BROADCAST})  # the buffer is one chunk
ADDS_UP = frozenset({Op.ALL_REDUCE, Op.REDUCE, Op.REDUCE_SCATTER})
ADDS_DOWN = frozenset({Op.REDUCE, Op.REDUCE_SCATTER})  # to what the receiver has
OPS = (Op.ALL_REDUCE, Op.REDUCE_SCATTER, Op.ALL_GATHER, Op.BROADCAST, Op.REDUCE, Op.BARRIER)
# One pass through a reducing switch takes a library as long as this many ring hops: 25 us and 3.4 us per hop on
# NVLink in the table of latencies that NCCL chooses its algorithms by (src/graph/tuning.cc).
IN_NETWORK_STAGES = 25.0 / 3.4


def schedule(op: Op, ranks: Ranks) -> Schedule:
    """One of OPS by one level of switches, or with two fanouts by two."""
    parts, n = ranks.digits, ranks.num
    num_chunks = 1 if op in WHOLE else n
    share = 0.0 if op is Op.BARRIER else 1.0 / num_chunks
    if not parts:
        return Schedule(op, NAME, n, num_chunks, share, (), ranks.root)
    num_leaves = n // parts[0]
    chips, leaves, spine = np.arange(n), n + np.arange(num_leaves), n + num_leaves
    layers = [(chips, leaves[chips // parts[0]], chips == ranks.root, 1)]
    if num_leaves > 1:
        has_root = np.arange(num_leaves) == ranks.root // parts[0]
        layers.append((leaves, np.full_like(leaves, spine), has_root, parts[0]))
    ups, downs = ([_round(op, up, n, *layer) for layer in layers] for up in (True, False))
    phases = tuple((each,) for each in (*ups, *reversed(downs)))
    channels = (Channel(phases, ranks.pieces, PieceOrder.INTERLEAVED, at_once=True),)
    num_helpers = num_leaves + (num_leaves > 1)
    return Schedule(op, NAME, n, num_chunks, share, channels, ranks.root, num_helpers)


def outline(op: Op, nbytes: float, levels: Levels, pieces: int = 1) -> Outline | None:
    """Up, further up, down and further down by wires of their own."""
    parts = spans(levels)
    if len({level.port for level, _ in parts}) > 1:
        return None  # no wires join a leaf and the spine
    n, reached_s = num_members(levels), 0.0
    part = 0.0 if op is Op.BARRIER else nbytes if op in WHOLE else nbytes / n
    ups: list[tuple[OutlineStage, ...]] = []
    downs: list[tuple[OutlineStage, ...]] = []
    for level, inner in parts:
        # A message between leaves also crosses those: what is further out has only the rest of its latency.
        hop = Hop(max(0.0, level.latency_s - reached_s) / 2, inner * level.rate(inner))
        num_up, num_down = (_load(op, n, inner, up)[1] for up in (True, False))
        ups.append((OutlineStage(1, num_up * part, (hop,)),))
        downs.insert(0, (OutlineStage(1, num_down * part, (hop,)),))
        reached_s = level.latency_s
    phases = (*ups, *downs)
    return Outline(NAME, phases, tuple(range(len(phases))), pieces, PieceOrder.INTERLEAVED)


def hidden_latency_s(levels: Levels) -> float:
    """What a library takes for one pass through the switches beyond the latency of a message up and one down."""
    return (IN_NETWORK_STAGES - 1) * spans(levels)[-1][0].latency_s


def _load(op: Op, num_ranks: int, size: int, up: bool) -> tuple[IntArray, int]:
    """Of each block of `size` chips the first chunk that goes up to its switch, or down, and how many go."""
    own = np.arange(0, num_ranks, size)
    if op in WHOLE:
        return 0 * own, 1
    # Up goes what the chips brought, their own chunks, and down all others; what is scattered the other way round.
    if up == (op is not Op.REDUCE_SCATTER):
        return own, size
    return (own + size) % num_ranks, num_ranks - size


def _round(
    op: Op, up: bool, num_ranks: int, lower: IntArray, upper: IntArray, has_root: np.ndarray, size: int
) -> Round:
    """All messages up to one layer of switches, or down from it; with a root, only those towards or from it."""
    rows = np.arange(len(lower))
    if op in (Op.BROADCAST, Op.REDUCE):
        towards = op is Op.REDUCE
        rows = np.flatnonzero(has_root == (up != towards))
    first, num = _load(op, num_ranks, size, up)
    src, dst = (lower[rows], upper[rows]) if up else (upper[rows], lower[rows])
    reduces = op in (ADDS_UP if up else ADDS_DOWN)
    return Round(Pattern(src, dst), first[rows], np.full(len(rows), num), reduces)


ALGORITHMS = (
    Algorithm(
        name=NAME,
        rank=13,
        ops=OPS,
        make=schedule,
        sketch=outline,
        cut=cut_by(pieces_to_fill, outline),
        needs=Needs(Joined.BY_ADDING_SWITCH, Joined.BY_ADDING_SWITCH, max_levels=2, most_shared=1),
        adding_switches=2,
        hidden_latency_s=hidden_latency_s,
    ),
)
