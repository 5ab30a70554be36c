"""Forests: trees over chips along which the shares of a buffer move, packed so that no wire is overloaded.

A tree brings one equal share of the buffer from its root to all chips, adds it up at the root, or both; or it
brings every chip a part of its own (`personal`). A hop is a pair of chips with no third chip between them, and
the wires of its route. Trees are packed one after another, each over the hops that are cheap where a wire costs
the more the fuller it is: exponential lengths, as in Plotkin, Shmoys and Tardos (Mathematics of Operations
Research 20, 1995) and Garg and Koenemann (SIAM Journal on Computing 37, 2007). Then each is taken out and laid
anew for some sweeps, and the best state is kept.

That packed trees reach the least congestion of a network is known from Edmonds (1973) for one root, and for
all-gather from Zhao et al. (ForestColl, 2024); Wang et al. (Blink, MLSys 2020) pack trees for all-reduce. Here
one tree is grown as in Alpert et al. (Prim-Dijkstra tradeoffs, IEEE TCAD 14, 1995): `lean` 0 is the cheapest
tree, 1 the tree of cheapest paths. With one-way wires of unequal cost the grown tree need not be the cheapest.

Not modelled here: time. Who waits for what is seen to in `timetable`. Memory grows with the pairs of chips.
"""

from dataclasses import dataclass

import numpy as np

from comms.networks.topology import FloatArray, IntArray, Routes, Topology

BASE = 4.0  # a wire costs this much more with one tree more, near the fullest
STEEPEST = 40.0  # logarithm of the most that the cost of two wires may differ by, for the same rate
PATIENCE = 8  # sweeps without progress before it stops
NONE = -1


@dataclass(frozen=True, slots=True, eq=False)
class Hops:
    """Pairs of chips with no third chip between them."""

    num_chips: int
    src: IntArray  # [hops]
    dst: IntArray  # [hops]
    routes: Routes  # [hops] the resources of each: numbers of wires whose capacity it uses
    bytes_per_s: FloatArray  # [hops] of its slowest wire
    latency_s: FloatArray  # [hops]
    number: IntArray  # [chips, chips] hop from one to the other, or NONE
    capacity: FloatArray  # [resources] bytes per second

    @property
    def num_hops(self) -> int:
        return len(self.src)

    @property
    def is_single_wires(self) -> bool:
        """Whether every hop has one wire, and for itself."""
        return len(np.unique(self.routes.wires)) == len(self.routes.wires) == self.num_hops

    def loads(self, uses: FloatArray) -> FloatArray:
        """[resources] How often each is used when hop h is used uses[h] times."""
        loads = np.zeros(len(self.capacity))
        np.add.at(loads, self.routes.wires, np.repeat(uses, np.diff(self.routes.offsets)))
        return loads

    def costs(self, lengths: FloatArray) -> FloatArray:
        """[chips, chips] Latency of each hop and lengths[r] for each resource r; inf where there is no hop."""
        costs = np.full((self.num_chips, self.num_chips), np.inf)
        over = np.add.reduceat(lengths[self.routes.wires], self.routes.offsets[:-1])
        costs[self.src, self.dst] = over + self.latency_s
        return costs

    def ways(self, costs: FloatArray) -> FloatArray:
        """[chips, chips] Cost of the cheapest way when hop h costs costs[h] (Floyd and Warshall, 1962)."""
        far = np.full((self.num_chips, self.num_chips), np.inf)
        far[self.src, self.dst] = costs
        np.fill_diagonal(far, 0.0)
        for chip in range(self.num_chips):
            np.minimum(far, far[:, chip, None] + far[chip], out=far)
        return far


def hops_of(topology: Topology) -> Hops:
    """All hops that the routes of a topology offer."""
    n = topology.num_chips
    wires = topology.wires()
    src, dst = (each.ravel() for each in np.nonzero(~np.eye(n, dtype=np.bool_)))
    routes = topology.routes(src, dst)
    # A route with a chip on the way is two hops: it enters chips twice.
    ends = np.concatenate([[0], np.cumsum(wires.head[routes.wires] < n)])
    kept = np.flatnonzero(ends[routes.offsets[1:]] - ends[routes.offsets[:-1]] == 1)
    taken = routes.take(kept)
    number = np.full((n, n), NONE)
    number[src[kept], dst[kept]] = np.arange(len(kept))
    resources, starts = wires.shares[taken.wires], taken.offsets[:-1]
    rates = wires.bytes_per_s[resources]
    return Hops(
        n,
        src[kept],
        dst[kept],
        Routes(taken.offsets, resources),
        np.minimum.reduceat(rates, starts) if len(kept) else rates,
        np.add.reduceat(wires.latency_s[taken.wires], starts) if len(kept) else rates,
        number,
        wires.bytes_per_s.astype(np.float64),
    )


@dataclass(frozen=True, slots=True, eq=False)
class Forest:
    """Trees of equal shares. `personal`: each chip gets a part of its own, from the root, instead of the same."""

    roots: IntArray  # [trees]
    down: IntArray  # [trees, chips] hop by which a chip gets the share, or NONE
    up: IntArray  # [trees, chips] hop by which a chip passes on its sum, or NONE
    personal: bool = False

    @property
    def num_trees(self) -> int:
        return len(self.roots)


@dataclass(frozen=True, slots=True)
class Wanted:
    """What to pack: one tree per root named, down from it, up to it or both."""

    roots: tuple[int, ...]
    nbytes: float  # of a tree's share, or of one part where they are personal
    down: bool = True
    up: bool = False
    personal: bool = False


def pack(hops: Hops, wanted: Wanted, *, lean: float, sweeps: int, seed: int) -> Forest:
    """Trees with a small load on the fullest wire. Time grows with sweeps x trees x chips^2."""
    packing = _Packing(hops, wanted, lean, np.random.default_rng(seed))
    # A sweep may make things worse, as each tree is laid against all others as they are: the best state is kept.
    best, fullest, last = packing.forest(), np.inf, 0
    for each in range(sweeps + 1):
        packing.sweep()
        if packing.fullest() < fullest:
            best, fullest, last = packing.forest(), packing.fullest(), each
        if each - last == PATIENCE:
            break
    return best


def fullest_seconds(hops: Hops, forest: Forest, nbytes: float) -> float:
    """How long the fullest wire moves bytes, with `nbytes` in each share (each part, where they are personal)."""
    uses = np.zeros(hops.num_hops)
    for ways in (*forest.down, *forest.up):
        uses += _uses(hops, ways, forest.personal)
    return float((hops.loads(uses) / hops.capacity).max()) * nbytes


def _uses(hops: Hops, ways: IntArray, personal: bool) -> FloatArray:
    """[hops] How many shares of one tree cross each hop."""
    uses = np.zeros(hops.num_hops)
    taken = ways[ways >= 0]
    uses[taken] = 1.0
    # One part for each chip below: a hop carries as many as hang on it.
    if personal:
        uses[taken] = 0.0
        for way in ways.tolist():
            while way >= 0:
                uses[way] += 1.0
                way = int(ways[hops.src[way]])
    return uses


class _Packing:
    """Trees and the load of each, laid one at a time."""

    def __init__(self, hops: Hops, wanted: Wanted, lean: float, rng: np.random.Generator) -> None:
        self.hops, self.wanted, self.lean, self.rng = hops, wanted, lean, rng
        trees = len(wanted.roots)
        self.ways = {
            way: np.full((trees, hops.num_chips), NONE)
            for way, asked in (("down", wanted.down), ("up", wanted.up))
            if asked
        }
        self.load = {way: np.zeros((trees, len(hops.capacity))) for way in self.ways}
        self.total = np.zeros(len(hops.capacity))

    def sweep(self) -> None:
        """Lay every tree anew, in a new order."""
        for tree in self.rng.permutation(len(self.wanted.roots)).tolist():
            for way in self.ways:
                self._lay(way, tree)

    def _lay(self, way: str, tree: int) -> None:
        from comms.synthesis.loops import path_tree  # compiled, and loaded only where it is needed

        # Taken out before it is laid anew, so that it does not avoid itself.
        self.total -= self.load[way][tree]
        costs = self.hops.costs(self._lengths())
        into = costs if way == "down" else np.ascontiguousarray(costs.T)
        parent = path_tree(into, self.wanted.roots[tree], self.lean)
        chips = np.flatnonzero(parent >= 0)
        ends = (parent[chips], chips) if way == "down" else (chips, parent[chips])
        self.ways[way][tree, chips] = self.hops.number[ends]
        uses = _uses(self.hops, self.ways[way][tree], self.wanted.personal)
        self.load[way][tree] = self.hops.loads(uses)
        self.total += self.load[way][tree]

    def _lengths(self) -> FloatArray:
        """[resources] Seconds that each costs now: those of a share where it is fullest, exponentially less else.

        A little noise is against ties.
        """
        # exp(steep * (full - worst)) is 1 where a wire is fullest and one BASE-th where it carries one tree less: the
        # smaller the load, the steeper, so that a few trees avoid each other as much as many do. Held to STEEPEST:
        # what costs less than that vanishes beside the others anyway.
        full = self.total / self.hops.capacity
        worst = int(np.argmax(full))
        steep = min(np.log(BASE) * self.total[worst], STEEPEST) / full[worst] if full[worst] > 0 else 0.0
        noise = 1.0 + 0.01 * self.rng.random(len(full))
        share_s = self.wanted.nbytes / self.hops.capacity
        lengths: FloatArray = np.exp(steep * (full - full[worst])) * share_s * noise
        return lengths

    def fullest(self) -> float:
        """Seconds per byte of a share on the fullest wire."""
        return float((self.total / self.hops.capacity).max())

    def forest(self) -> Forest:
        """The trees as they lie now."""
        none = np.full((len(self.wanted.roots), self.hops.num_chips), NONE)
        down, up = (self.ways.get(way, none).copy() for way in ("down", "up"))
        return Forest(np.array(self.wanted.roots), down, up, self.wanted.personal)
