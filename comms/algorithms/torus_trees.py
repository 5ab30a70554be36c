"""Trees on tori and meshes: line by line from the root, so that every message goes to a neighbour.

A broadcast goes from the root along the first dimension both ways, from all chips of that line along the second,
and so on; backwards it is a reduce. An all-reduce is a reduce to a chip in the middle and a broadcast from it; a
barrier is a gather there and a broadcast, with nothing to send. A chip passes the buffer on by up to two wires per
dimension, and over each wire it goes once, so that all of them work side by side on its pieces, like the machines
of a flow shop: with q pieces of p bytes, and in dimension d a depth of h_d hops at r_d bytes/s and l_d seconds,

    sum of h_d (p / r_d + l_d) + (q - 1) max p / r_d

A ring of f chips is gone round half way in each direction, f // 2 hops at most, a line from the root to both ends.
From the middle both are the same, and no ring is closed.

A scatter deals blocks out along the outermost dimension, those for the furthest chips first, then along the next
dimension inwards; a gather is that backwards. Every part moves one chip a round, so that all parts of a line arrive
together, after h_d rounds. (Saad and Schultz, Parallel Computing 11, 1989.)

Rotated, several trees share the buffer out and have no wire in common: tree j starts along dimension j, spreads along
the others from all chips of that line but the root, and what is left, the chips with the root's digit j, hear of it
from their neighbours. An outward wire of dimension d then belongs to tree j only if j is the first dimension after d,
around, in which its chip is not where the root is. Where all dimensions are rings of three or more, each is gone
round in either direction by a tree of its own, which makes two trees per dimension. (Edge-disjoint spanning trees,
after Johnsson and Ho, IEEE Transactions on Computers 38, 1989; on tori the colours of Faraj, Kumar, Smith, Mamidala
and Gunnels, Hot Interconnects 2009.) They scatter chip by chip, to the furthest first and without a stop: the part
that leaves as number k and goes d hops is there after (k + d - 1) p / r + d l, as none waits for a wire that is not
slower than the first.

Outlines have the root at the first chip, at the end of all lines, and are exact for chips with a wire of their own to
each neighbour. Parts by several trees over links of different rates are an exception: there an outline may be an upper
bound, by at most 5 %. Not modelled: chips that hang on a router by one wire, by which all that they send would leave.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import TypeAlias

import numpy as np

from comms.algorithms.catalog import Algorithm, Joined, Needs, spans
from comms.algorithms.rounds import Ranks, moved, reversed_rounds
from comms.algorithms.torus_rings import BOTH_WAYS, gone_round, has_own_wires
from comms.collectives.outline import Hop, Outline, OutlineStage
from comms.collectives.outline_time import closed_seconds, pieces_to_fill
from comms.collectives.schedule import Channel, Op, Pattern, Round, Schedule
from comms.networks.groups import Level, Levels, inner_sizes, num_members
from comms.networks.topology import IntArray

TORUS_TREE, MESH_TREE = "torus tree", "mesh tree"
ROTATED_TORUS_TREE, ROTATED_MESH_TREE = "rotated torus tree", "rotated mesh tree"
ROTATED, MESHES = (ROTATED_TORUS_TREE, ROTATED_MESH_TREE), (MESH_TREE, ROTATED_MESH_TREE)
WHOLE = (Op.BROADCAST, Op.REDUCE, Op.ALL_REDUCE)  # these go in pieces
IN_PARTS = (Op.SCATTER, Op.GATHER)
ONCE = (Op.BROADCAST, Op.REDUCE, *IN_PARTS)  # over a wire: there or back, so that several trees have room
FROM_THE_MIDDLE = (Op.ALL_REDUCE, Op.BARRIER)
QUEUING = 1.05  # how much longer than what it takes at least an upper bound may be that is given
MOST_CHIPS = 2**17  # whose ways are looked at one by one

Phases: TypeAlias = tuple[tuple[Round, ...], ...]
Sides: TypeAlias = tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class _Dim:
    """A dimension of more than one chip."""

    fanout: int
    inner: int
    ring: bool

    def digit(self, rank: int) -> int:
        return rank // self.inner % self.fanout

    def moved(self, ranks: IntArray, by: int | IntArray) -> IntArray:
        return moved(ranks, self.inner, self.fanout, by)

    def sides(self, start: int, step: int = 0) -> Sides:
        """(step, hops) of the ways from a digit to all others: both, or the one way round that `step` says."""
        if step:
            return ((step, self.fanout - 1),)
        up = self.fanout // 2 if self.ring else self.fanout - 1 - start
        return tuple((way, hops) for way, hops in ((1, up), (-1, self.fanout - 1 - up)) if hops)


Legs: TypeAlias = tuple[tuple[_Dim, IntArray], ...]


@dataclass(frozen=True, slots=True)
class _SpanningTree:
    """A spanning tree. `step`: the one way round all rings, 0 for both ways along all dimensions."""

    dims: tuple[_Dim, ...]  # in the order in which it spreads
    step: int = 0
    spares_root: bool = False  # the root sends along the first dimension only

    def sides(self, dim: _Dim, root: int) -> Sides:
        return dim.sides(dim.digit(root), self.step)


def schedule(op: Op, ranks: Ranks, *, name: str) -> Schedule:
    """One channel per tree; of what goes through the middle there is one tree."""
    n = ranks.num
    dims = _dims(name, ranks.digits, ranks.of_digits(ranks.wraps, False))
    trees = _trees(dims, name)
    start = sum((dim.fanout - 1) // 2 * dim.inner for dim in dims) if op in FROM_THE_MIDDLE else ranks.root
    ways = [_phases(op, n, tree, start, number, len(trees)) for number, tree in enumerate(trees)]
    num_chunks = max(1, len(trees)) * (1 if op in WHOLE else n)
    share = 0.0 if op is Op.BARRIER else 1.0 / num_chunks
    channels = tuple(Channel(phases, ranks.pieces) for phases in ways if phases)
    return Schedule(op, name, n, num_chunks, share, channels, ranks.root)


def outline(op: Op, nbytes: float, levels: Levels, pieces: int = 1, *, name: str) -> Outline | None:
    """Rotated, of two trees or more the one that takes longest.

    None for parts cut into pieces, for parts by several trees where these may queue for long, and where lines from
    the middle are the same as rings.
    """
    parts = [level for level, _ in spans(levels)]
    dims = _dims(name, [level.fanout for level in parts], tuple(level.wraps for level in parts))
    trees = _trees(dims, name)
    if not dims or len(trees) < 1 + (name in ROTATED) or not all(map(_suits, dims, parts)):
        return None
    hops = {dim: Hop(level.latency_s, level.bytes_per_s) for dim, level in zip(dims, parts, strict=True)}
    is_torus_tree = op in FROM_THE_MIDDLE and not all(dim.ring for dim in dims) and all(map(_closes, parts))
    if is_torus_tree or (op in IN_PARTS and pieces > 1):
        return None
    part = nbytes / num_members(levels) / len(trees)
    if op in IN_PARTS and name in ROTATED:
        if num_members(levels) > MOST_CHIPS:
            return None
        return _parts_in_turn(name, num_members(levels), trees, part, hops)
    found = []
    for tree in trees:
        held = 0.0 if op is Op.BARRIER else nbytes / len(trees)
        sizes = {dim: part * dim.inner if op in IN_PARTS else held for dim in dims}
        way = tuple(_stages(tree, sizes, hops, op in FROM_THE_MIDDLE))
        phases = way[::-1] + way if op in FROM_THE_MIDDLE else way
        found.append(Outline(name, phases, tuple(range(len(phases))), pieces))
    return max(found, key=closed_seconds)


def tree_pieces(op: Op, nbytes: float, levels: Levels, *, name: str) -> int:
    """What is whole goes in so many that filling the wires hardly counts; over a mesh as if no dimension closed."""
    if op not in WHOLE:
        return 1
    lines = tuple(replace(level, wraps=False) for level in levels) if name in MESHES else levels
    whole = outline(op, nbytes, lines, name=name)
    return pieces_to_fill(whole) if whole is not None else 1


def _suits(dim: _Dim, level: Level) -> bool:
    return has_own_wires(level, dim.inner) and (_closes(level) or not dim.ring)


def _closes(level: Level) -> bool:
    return level.wraps or level.fanout == 2


def _dims(name: str, fanouts: Sequence[int], wraps: tuple[bool, ...]) -> tuple[_Dim, ...]:
    """The dimensions of more than one chip, innermost first."""
    around = gone_round(wraps, is_mesh=name in MESHES)
    return tuple(_Dim(*each) for each in zip(fanouts, inner_sizes(fanouts), around, strict=True))


def _trees(dims: tuple[_Dim, ...], name: str) -> tuple[_SpanningTree, ...]:
    """Those that share the buffer out."""
    if name not in ROTATED:
        return (_SpanningTree(dims),)
    steps = BOTH_WAYS if all(dim.ring and dim.fanout > 2 for dim in dims) else (0,)
    orders = [dims[first:] + dims[:first] for first in range(len(dims))]
    return tuple(_SpanningTree(order, step, spares_root=True) for order in orders for step in steps)


def _stages(
    tree: _SpanningTree, sizes: Mapping[_Dim, float], hops: Mapping[_Dim, Hop], from_the_middle: bool
) -> Iterator[tuple[OutlineStage, ...]]:
    """The longest way down a tree, a phase per dimension.

    One hop to a neighbour of the root, and the one back to the root's digit, are hops of the first dimension.
    """
    for place, dim in enumerate(tree.dims):
        start = (dim.fanout - 1) // 2 if from_the_middle else 0
        depth = max(far for _, far in dim.sides(start, tree.step))
        if tree.spares_root and place == 0 and len(tree.dims) > 1:
            depth = max(depth, 2)
        yield (OutlineStage(depth, sizes[dim], (hops[dim],), own_ports=True),)


def _parts_in_turn(
    name: str, num_ranks: int, trees: tuple[_SpanningTree, ...], part: float, hops: Mapping[_Dim, Hop]
) -> Outline | None:
    """The tree that takes longest, exact if it is one that starts along the slowest links.

    In others parts queue on their way. They take at least what they would if they did not, and at most as long as if
    they left the root at the slowest rate too: that stands for them where it is at most QUEUING times as long as what
    all take at least. Else None.
    """
    slowest = min(hop.bytes_per_s for hop in hops.values())
    least: list[Outline] = []
    most: list[Outline] = []
    for tree in trees:
        held_back = {**hops, tree.dims[0]: replace(hops[tree.dims[0]], bytes_per_s=slowest)}
        for found, rates in ((least, hops), (most, held_back)):
            found.append(Outline(name, (_last_part(num_ranks, tree, part, rates),), (0,)))
    longest = max(most, key=closed_seconds)
    least_s = max(map(closed_seconds, least))
    return longest if closed_seconds(longest) <= least_s * QUEUING else None


def _last_part(
    num_ranks: int, tree: _SpanningTree, part: float, hops: Mapping[_Dim, Hop]
) -> tuple[OutlineStage, ...]:
    """What leaves the root by the same wire before the part that arrives last, and the way of that part."""
    legs, target, turn = _in_turn(num_ranks, tree, 0)
    ahead = Hop(0.0, hops[tree.dims[0]].bytes_per_s)
    seconds = turn * (part / ahead.bytes_per_s)
    for dim, far in legs:
        seconds += np.abs(far[target]) * (part / hops[dim].bytes_per_s + hops[dim].latency_s)
    last = int(seconds.argmax())
    way = ((abs(int(far[target[last]])), hops[dim]) for dim, far in legs)
    return tuple(
        OutlineStage(each, part, (hop,), own_ports=True) for each, hop in ((int(turn[last]), ahead), *way)
    )


def _phases(op: Op, num_ranks: int, tree: _SpanningTree, root: int, number: int, num_trees: int) -> Phases:
    """What one tree does; of parts it has chunk rank * num_trees + number."""
    if op in WHOLE:
        there = _spread(num_ranks, tree, root, number, 1)
    elif tree.spares_root:
        there = (tuple(_one_by_one(num_ranks, tree, root, number, num_trees)),)
    else:
        there = _dealt(num_ranks, tree.dims, root)
    back = tuple(reversed_rounds(phase, reduces=op in WHOLE) for phase in reversed(there))
    match op:
        case Op.BROADCAST | Op.SCATTER:
            return there
        case Op.REDUCE | Op.GATHER:
            return back
        case Op.ALL_REDUCE:
            return back + there
        case _:
            return back + _spread(num_ranks, tree, root, 0, num_ranks)


def _spread(num_ranks: int, tree: _SpanningTree, root: int, chunk: int, count: int) -> Phases:
    """Phases after which everyone has what the root has of `count` chunks."""
    ranks, phases = np.arange(num_ranks), []
    away = {dim: ranks // dim.inner % dim.fanout != dim.digit(root) for dim in tree.dims}
    for place, dim in enumerate(tree.dims):
        holds = ~np.any([away[each] for each in tree.dims[place:]], axis=0)
        if place and tree.spares_root:
            holds &= away[tree.dims[0]]
        phases.append(tuple(_copies(dim, ranks[holds], tree.sides(dim, root), chunk, count)))
    if tree.spares_root and len(tree.dims) > 1:
        first = tree.dims[0]
        step, _ = tree.sides(first, root)[0]
        missing = ~away[first] & np.any([away[each] for each in tree.dims], axis=0)
        next_to_it = first.moved(ranks[missing], step)
        phases.append(tuple(_copies(first, next_to_it, ((-step, 1),), chunk, count)))
    return tuple(phases)


def _copies(dim: _Dim, holders: IntArray, sides: Sides, chunk: int, count: int) -> Iterator[Round]:
    """Rounds in which all lines with a holder pass on what it has, one hop a round."""
    for each in range(max(hops for _, hops in sides)):
        steps = [step for step, hops in sides if each < hops]
        src = np.concatenate([dim.moved(holders, step * each) for step in steps])
        dst = np.concatenate([dim.moved(holders, step * (each + 1)) for step in steps])
        yield Round(Pattern(src, dst), np.full_like(src, chunk), np.full_like(src, count), reduces=False)


def _dealt(num_ranks: int, dims: tuple[_Dim, ...], root: int) -> Phases:
    """Phases after which everyone has its own chunk, the outermost dimension first."""
    phases = []
    for dim in reversed(dims):
        size = dim.inner * dim.fanout
        holders = np.arange(root % size, num_ranks, size)
        phases.append(tuple(_deals(dim, holders, dim.sides(dim.digit(root)))))
    return tuple(phases)


def _deals(dim: _Dim, holders: IntArray, sides: Sides) -> Iterator[Round]:
    """Rounds of one dimension: the blocks for the furthest chips leave first, and all go on one hop a round."""
    for each in range(max(hops for _, hops in sides)):
        columns = []
        for step, hops in sides:
            at = np.arange(each + 1)[:, np.newaxis] if each < hops else np.zeros((0, 1), dtype=np.int64)
            src, dst, target = (
                dim.moved(holders, step * place).ravel() for place in (at, at + 1, at + hops - each)
            )
            columns.append((src, dst, target // dim.inner * dim.inner))
        src, dst, first = (np.concatenate(column) for column in zip(*columns, strict=True))
        yield Round(Pattern(src, dst), first, np.full_like(first, dim.inner), reduces=False)


def _one_by_one(
    num_ranks: int, tree: _SpanningTree, root: int, number: int, per_rank: int
) -> Iterator[Round]:
    """Rounds in which one part leaves the root by each of its wires, and all under way go on one hop."""
    legs, target, turn = _in_turn(num_ranks, tree, root)
    arrival = turn + np.sum([np.abs(far[target]) for _, far in legs], axis=0)
    patterns: dict[bytes, Pattern] = {}
    for each in range(int(arrival.max())):
        on_way = (turn <= each) & (each < arrival)
        to, hop = target[on_way], each - turn[on_way]
        src, dst = _on_the_way(legs, root, to, hop), _on_the_way(legs, root, to, hop + 1)
        pattern = patterns.setdefault(src.tobytes() + dst.tobytes(), Pattern(src, dst))
        yield Round(pattern, to * per_rank + number, np.ones_like(to), reduces=False)


@lru_cache(maxsize=16)
def _in_turn(num_ranks: int, tree: _SpanningTree, root: int) -> tuple[Legs, IntArray, IntArray]:
    """The hops to each rank, all ranks but the root, and how many leave the root before each, by the same wire.

    The furthest leave first. Hops by dimension, below 0 downwards.
    """
    ranks, legs = np.arange(num_ranks), []
    for dim in tree.dims:
        up = (ranks // dim.inner - root // dim.inner) % dim.fanout
        most_up = dict(tree.sides(dim, root)).get(1, 0)
        legs.append((dim, np.where(up <= most_up, up, up - dim.fanout)))
    first, along = legs[0]
    step, _ = tree.sides(first, root)[0]
    legs = [(first, np.where(along == 0, step, along)), *legs[1:], (first, np.where(along == 0, -step, 0))]
    hops = np.sum([np.abs(far) for _, far in legs], axis=0)
    sides = [ranks[(legs[0][1] * way > 0) & (ranks != root)] for way in BOTH_WAYS]
    target = np.concatenate([side[np.argsort(-hops[side], kind="stable")] for side in sides])
    return tuple(legs), target, np.concatenate([np.arange(len(side)) for side in sides])


def _on_the_way(legs: Legs, root: int, to: IntArray, hop: IntArray) -> IntArray:
    """Where what goes from the root to others is after so many hops each."""
    here, left = np.full_like(to, root), hop
    for dim, far in legs:
        taken = np.minimum(left, np.abs(far[to]))
        here, left = dim.moved(here, np.sign(far[to]) * taken), left - taken
    return here


ALGORITHMS: tuple[Algorithm, ...] = ()
for _name, _ops in (
    (TORUS_TREE, (*ONCE, *FROM_THE_MIDDLE)),
    (MESH_TREE, (*ONCE, *FROM_THE_MIDDLE)),
    (ROTATED_TORUS_TREE, ONCE),
    (ROTATED_MESH_TREE, ONCE),
):
    ALGORITHMS += (
        Algorithm(
            name=_name,
            rank=11,
            ops=_ops,
            make=partial(schedule, name=_name),
            sketch=partial(outline, name=_name),
            cut=partial(tree_pieces, name=_name),
            needs=Needs(Joined.IN_RING, Joined.IN_RING),
        ),
    )
