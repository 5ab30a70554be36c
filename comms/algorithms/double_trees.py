"""Double trees: an all-reduce of few stages for buffers of any size, over all ranks or between subgroups.

The double binary tree reduces one half of the buffer up one tree and broadcasts it down again, the other half by a
second tree in which the inner ranks of the first are leaves, so that everyone sends and receives the buffer twice
(Sanders, Speck and Traeff, Parallel Computing 35, 2009; NCCL 2.4). Each half goes in pieces, one a round. The way
down begins when the last piece has reached the root: both ways keep all wires busy, so that overlapping them gains
nothing but the filling of one pipeline.

Its outline has siblings send to their parent, and a parent to its two children, at once at half the rate. So it is
exact for 2**k and 2**k - 1 ranks, and an upper bound for others, by less than the time of two pieces (15 % for one
piece, under 1 % for 32). Where a parent serves one child after the other by one port, what comes down one tree meets
what comes down the other, and the outline is too low, by up to a quarter; with a wire per child, as on a board, it is
exact again.

With trees between subgroups: reduce-scatter within a subgroup (a host), all-reduce of each share among counterparts
in all subgroups by a double binary tree, all-gather within. Inside it goes around a ring, by halving and doubling,
directly, or through a switch that adds and copies. NCCL's Tree and NVLSTree are the first and the last (its chains
through a host send what a ring does).

Each of the two trees carries half of the buffer, from the reduce-scatter on. A chip sends its share twice between
subgroups (once where there are two): as much as around a long ring there, but in 2 log2 n stages instead of 2 (n - 1).

Pieces follow each other from phase to phase. In the trees each goes up in parts, all of them before the first comes
down, so many that filling the trees costs at most FILLING.

Outlines are exact for 2**k subgroups of one level in one piece, and for others an upper bound by less than two parts.
In pieces they are one by less than a tenth inside by chips (but for 1 %). Through switches full fidelity takes up to
1.2 times as long: what is scattered and what is gathered get in each other's way. Where trees cross several levels
all wires are taken to be as slow as the slowest, which is up to twice too slow. In one of ten such networks it is up to
1.4 times too fast (the worst of 155 random ones of three levels; the middle level was the slowest). A switch that adds
is one on wires of its own: where one tree of switches joins all chips, in-network algorithms are better.
"""

from collections.abc import Sequence
from functools import cache, partial
from math import ceil, prod

import numpy as np

from comms.algorithms.catalog import Algorithm, Joined, Needs, cut_by, spans
from comms.algorithms.hierarchical.hierarchical import (
    Blocks,
    Crossing,
    fastest_cut,
    gathered,
    most_peers,
    scattered,
    stages,
    suits,
)
from comms.algorithms.in_network import IN_NETWORK_STAGES
from comms.algorithms.rounds import Ranks
from comms.collectives.outline import Hop, Outline, OutlineStage
from comms.collectives.outline_time import fewest_pieces
from comms.collectives.schedule import Channel, Op, Pattern, Round, Schedule
from comms.errors import CommsError
from comms.networks.groups import Level, Levels, num_members
from comms.networks.topology import IntArray

DOUBLE = "double tree"
BY_SWITCH = f"hierarchical in-network, {DOUBLE}"
FILLING = 1 / 16  # of the time with endless parts, what filling the trees may cost more
UP, DOWN, BETWEEN = range(3)  # ports of a chip whose host has a switch that adds


def schedule(op: Op, ranks: Ranks) -> Schedule:
    """Half of the buffer up and down either tree, cut into pieces that are chunks of their own."""
    pieces = ranks.pieces
    channels = tuple(
        up_and_down(parents, np.arange(pieces) + tree * pieces)
        for tree, parents in enumerate(double_trees(ranks.num))
        if ranks.num > 1
    )
    return Schedule(op, DOUBLE, ranks.num, 2 * pieces, 0.5 / pieces, channels)


def outline(op: Op, nbytes: float, levels: Levels, pieces: int = 1) -> Outline:
    """One tree up and down again; see `_way_up`."""
    parts = spans(levels)
    up = _way_up(nbytes / 2 / pieces, pieces, parts, own_ports=True) if parts else ()
    return Outline(DOUBLE, (up, up[::-1]), (0, 0))


def pieces_to_pipeline(op: Op, nbytes: float, levels: Levels) -> int:
    """So many that filling the pipelines hardly counts."""
    parts = spans(levels)
    if not parts or num_members(levels) < 4:
        return 1
    level, n = parts[0][0], num_members(levels)
    depth = n.bit_length() - 1
    half_s = nbytes / 2 / level.rate(2)
    return fewest_pieces((depth - 1) * half_s, depth * level.latency_s + half_s)


def between_schedule(op: Op, ranks: Ranks, *, way: Crossing | None) -> Schedule:
    """Subgroups of the first fanout; None for a way: through a switch per subgroup, the helper ranks."""
    digits, n, name = ranks.digits, ranks.num, _name(way)
    if n == 1:
        return Schedule(op, name, 1, 1, 1.0, ())
    if len(digits) < 2:
        raise CommsError(f"{n} ranks on one level", name, "take several subgroups of several ranks")
    size, subgroups = digits[0], n // digits[0]
    num_parts = parts_of_piece(subgroups)
    channels = []
    for half, parents in enumerate(double_trees(subgroups)):
        blocks = Blocks((size, subgroups), (1, 0), (0,), half * size)
        inward = (scattered(blocks, 0, way),) if way else _through_switches(blocks, gathers=False)
        outward = (gathered(blocks, 0, way),) if way else _through_switches(blocks, gathers=True)
        across = _among_counterparts(up_and_down(parents, np.arange(num_parts)).rounds, blocks, num_parts)
        phases = (*(_in_parts(each, num_parts) for each in inward), across)
        phases += tuple(_in_parts(each, num_parts) for each in outward)
        channels.append(Channel(phases, ranks.pieces, at_once=True, apart=way is None))
    num_chunks, helpers = 2 * size * num_parts, 0 if way else subgroups
    return Schedule(op, name, n, num_chunks, 1.0 / num_chunks, tuple(channels), num_helpers=helpers)


def parts_of_piece(subgroups: int) -> int:
    """The fewest parts with which filling the trees costs at most FILLING of the time with endless ones."""
    return max(1, ceil((_depth(subgroups) - 1) / FILLING))


def between_outline(
    op: Op, nbytes: float, levels: Levels, pieces: int = 1, *, way: Crossing | None
) -> Outline | None:
    """None where the way does not suit the innermost level."""
    parts = spans(levels)
    level, inner = parts[0]
    if way is None:
        if level.port in {each.port for each, _ in parts[1:]}:
            return None
        across = _tree_stages(nbytes / level.fanout, parts[1:])
        # A wire carries a chip's n-th, too, up to be gathered and down when it has been scattered.
        wire = OutlineStage(1, nbytes, (Hop(0.0, level.rate()),))
        passes = OutlineStage(1, 0.0, (Hop(level.latency_s, level.rate()),), own_ports=True)
        return Outline(_name(way), ((wire, passes), across, (passes, wire)), (UP, BETWEEN, DOWN), pieces)
    if not suits(way, level):
        return None
    inside = stages(way, nbytes, level, inner)
    across = _tree_stages(nbytes / level.fanout, parts[1:])
    port, between = level.port, parts[-1][0].port
    return Outline(_name(way), (inside, across, inside[::-1]), (port, between, port), pieces)


def hidden_latency_s(levels: Levels) -> float:
    """What a library takes for its two passes through the switches of hosts beyond the latency of messages."""
    return (IN_NETWORK_STAGES - 2) * spans(levels)[0][0].latency_s


def double_trees(num_ranks: int) -> tuple[IntArray, IntArray]:
    """Parents of all ranks in two binary trees, -1 for the root; no rank has children in both.

    In order of number, 1 to n, odd numbers are leaves: the second tree is the first one mirrored, or for an odd n
    turned by one.
    """
    number = np.arange(1, num_ranks + 1)
    # The lowest bit that is set is the height: the parent has it cleared and the next one set, or where there is no
    # such rank only cleared.
    low = number & -number
    up = (number - low) | (2 * low)
    parent = np.where(up <= num_ranks, up, number - low)
    other = num_ranks + 1 - number if num_ranks % 2 == 0 else number % num_ranks + 1
    second = np.empty_like(parent)
    second[other - 1] = np.where(parent > 0, other[parent - 1], 0)
    return parent - 1, second - 1


def up_and_down(parents: IntArray, chunks: IntArray) -> Channel:
    """One tree up, then down: in each round every rank that has the next chunk by then sends it on."""
    pieces, depth = len(chunks), _depths(parents)
    deepest = int(depth.max())
    ranks = np.flatnonzero(parents >= 0)
    one = np.ones(len(ranks), dtype=np.int64)
    patterns: dict[tuple[bool, int, int], Pattern] = {}
    ways: list[tuple[Round, ...]] = []
    for upwards, turn in ((True, deepest - depth[ranks]), (False, depth[ranks] - 1)):
        rounds = []
        for each in range(pieces + deepest - 1):
            low, high = max(0, each - pieces + 1), min(each, deepest - 1)
            taken = (turn >= low) & (turn <= high)
            if (upwards, low, high) not in patterns:
                here, there = ranks[taken], parents[ranks[taken]]
                patterns[upwards, low, high] = Pattern(here, there) if upwards else Pattern(there, here)
            pattern = patterns[upwards, low, high]
            rounds.append(Round(pattern, chunks[each - turn[taken]], one[: len(pattern.src)], upwards))
        ways.append(tuple(rounds))
    return Channel(tuple(ways), at_once=True)


def _depths(parents: IntArray) -> IntArray:
    depth, at = np.zeros_like(parents), parents
    while (at >= 0).any():
        depth += at >= 0
        at = np.where(at >= 0, parents[at], -1)
    return depth


def _name(way: Crossing | None) -> str:
    return BY_SWITCH if way is None else f"hierarchical {way}, {DOUBLE}"


def _tree_stages(share: float, parts: Sequence[tuple[Level, int]]) -> tuple[OutlineStage, ...]:
    """Half of a share up one tree and down again, in parts."""
    num_parts = parts_of_piece(prod(level.fanout for level, _ in parts))
    up = _way_up(share / 2 / num_parts, num_parts, parts)
    return (*up, *reversed(up))


def _way_up(
    part: float, num_parts: int, parts: Sequence[tuple[Level, int]], own_ports: bool = False
) -> tuple[OutlineStage, ...]:
    """All parts leave the leaf that is longest on its way, and the last one goes up to the root.

    Siblings share their parent's wire, but the root of 2**k has one child. All wires are as slow as the slowest.
    """
    fanouts = tuple(level.fanout for level, _ in parts)
    subgroups = prod(fanouts)
    pair, single = (min(level.rate(flows * inner) for level, inner in parts) for flows in (2, 1))
    latencies = [level.latency_s for level, _ in parts]
    longest = max(
        _ways_up(fanouts), key=lambda counts: sum(c * s for c, s in zip(counts, latencies, strict=True))
    )
    alone = subgroups & (subgroups - 1) == 0
    last = max((at for at, count in enumerate(longest) if count), default=0)  # by it the root is reached
    way = [
        (num_parts - 1, Hop(0.0, single if subgroups == 2 else pair)),
        *(
            (count - (alone and at == last), Hop(latency, pair))
            for at, (count, latency) in enumerate(zip(longest, latencies, strict=True))
        ),
        (int(alone), Hop(latencies[last], single)),
    ]
    return tuple(OutlineStage(repeat, part, (hop,), own_ports) for repeat, hop in way)


@cache
def _ways_up(fanouts: tuple[int, ...]) -> frozenset[tuple[int, ...]]:
    """Of ranks of both trees, those further on the way left out, how many messages to the root cross each level."""
    if len(fanouts) == 1:
        return frozenset({(_depth(fanouts[0]),)})
    ranks = np.arange(prod(fanouts))
    ways: set[tuple[int, ...]] = set()
    for parents in double_trees(len(ranks)):
        counts, at = np.zeros((len(ranks), len(fanouts)), dtype=np.int64), ranks
        while (parents[at] >= 0).any():
            up = np.where(parents[at] >= 0, parents[at], at)
            differs = [
                at // prod(fanouts[:place]) != up // prod(fanouts[:place]) for place in range(len(fanouts))
            ]
            crossed = np.sum(differs, axis=0)  # levels are nested: so many from the inside
            counts[ranks[crossed > 0], crossed[crossed > 0] - 1] += 1
            at = up
        ways.update(map(tuple, np.unique(counts, axis=0).tolist()))
    return frozenset(ways)


def _depth(ranks: int) -> int:
    """Of a leaf furthest from the root of a tree of `double_trees`."""
    return ranks.bit_length() - 1


def _in_parts(rounds: tuple[Round, ...], num_parts: int) -> tuple[Round, ...]:
    """Of chunks in so many parts all at once."""
    return tuple(
        Round(each.pattern, each.first * num_parts, each.count * num_parts, each.reduces) for each in rounds
    )


def _among_counterparts(rounds: tuple[Round, ...], blocks: Blocks, num_parts: int) -> tuple[Round, ...]:
    """What subgroups send each other, by each member to its counterpart: so many parts of the chunk of its digit."""
    size = blocks.fanouts[0]
    member = np.arange(size)
    patterns: dict[int, Pattern] = {}
    made = []
    for each in rounds:
        known = each.pattern
        if id(known) not in patterns:
            src, dst = ((ends[:, np.newaxis] * size + member).ravel() for ends in (known.src, known.dst))
            patterns[id(known)] = Pattern(src, dst)
        chunk = (each.first[:, np.newaxis] + (blocks.start + member) * num_parts).ravel()
        made.append(Round(patterns[id(known)], chunk, np.ones_like(chunk), each.reduces))
    return tuple(made)


def _through_switches(blocks: Blocks, gathers: bool) -> tuple[tuple[Round, ...], ...]:
    """To the switch of each subgroup and from it: all but a chip's own chunk the one way, its own the other."""
    chips, size = np.arange(blocks.num_ranks), blocks.fanouts[0]
    switch = blocks.num_ranks + chips // size
    own = Round(
        Pattern(chips, switch) if gathers else Pattern(switch, chips),
        blocks.start + chips % size,
        np.ones_like(chips),
        reduces=not gathers,
    )
    member = chips % size
    below, above = member > 0, member < size - 1  # chunks of members before and after the own one
    rows = np.concatenate([chips[below], chips[above]])
    first = np.concatenate([0 * chips[below], member[above] + 1]) + blocks.start
    count = np.concatenate([member[below], size - 1 - member[above]])
    ends = (switch[rows], rows) if gathers else (rows, switch[rows])
    others = Round(Pattern(*ends), first, count, reduces=not gathers)
    return ((own,), (others,)) if gathers else ((others,), (own,))


ALGORITHMS: tuple[Algorithm, ...] = (
    Algorithm(
        name=DOUBLE,
        rank=4,
        ops=(Op.ALL_REDUCE,),
        make=schedule,
        sketch=outline,
        cut=pieces_to_pipeline,
        needs=Needs(Joined.BY_SWITCH, Joined.BY_SWITCH, max_levels=1, most_shared=0),
    ),
)
for _way in (*Crossing, None):
    ALGORITHMS += (
        Algorithm(
            name=_name(_way),
            rank=8,
            ops=(Op.ALL_REDUCE,),
            make=partial(between_schedule, way=_way),
            sketch=partial(between_outline, way=_way),
            cut=cut_by(fastest_cut, partial(between_outline, way=_way)),
            needs=Needs(
                Joined.ANYHOW if _way else Joined.BY_ADDING_SWITCH,
                Joined.BY_SWITCH,
                min_levels=2,
                most_shared=0,
            ),
            rail_aligned=True,
            is_hierarchy=_way is not None,
            peers=partial(most_peers, ways=(_way, None)),
            adding_switches=0 if _way else 1,
            hidden_latency_s=None if _way else hidden_latency_s,
        ),
    )
