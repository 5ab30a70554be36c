"""Timetables: when each message of a forest leaves, with one message at a time on a wire.

A network expanded in time (Won et al., TACOS, MICRO 2024): whenever a wire falls free, it is given the most
pressing message that waits for it, which is the one with the longest way still to go behind it (list scheduling,
Graham 1969), the earlier piece first, then by lot. A message holds all wires of its hop for nbytes over the rate
of the slowest, and has arrived one latency later.

The order on the wires is what a schedule keeps of it: one channel whose chunks do not wait for each other.
Played at full fidelity it takes as long as planned where hops are single wires; where hops share switches,
it is only close: a slow wire holds a fast one in the plan, and shares it in the schedule.
"""

from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import pairwise

import numpy as np

from comms.forest import NONE, Forest, Hops
from comms.schedule import Channel, Pattern, Round
from comms.topology import FloatArray, IntArray


@dataclass(frozen=True, slots=True, eq=False)
class Sends:
    """Messages, each after those that it needs."""

    hop: IntArray  # [sends]
    chunk: IntArray  # [sends]
    reduces: IntArray  # [sends] 1 where the receiver adds
    piece: IntArray  # [sends]
    needs: tuple[IntArray, IntArray]  # (send, one that it needs), sorted by send
    num_chunks: int


@dataclass(frozen=True, slots=True, eq=False)
class Timetable:
    """When everything leaves."""

    start_s: FloatArray  # [sends]
    seconds: float
    busy_s: FloatArray  # [resources]


def sends_of(hops: Hops, forest: Forest, pieces: int) -> Sends:
    """All messages of a forest, every share cut into pieces. Chunks are numbered as `comms.schedule` says."""
    rows: list[tuple[int, int, int]] = []  # hop, chunk without pieces, reduces
    needs: list[tuple[int, int]] = []
    for tree in range(forest.num_trees):
        if forest.personal:
            _add_parts(hops, forest, tree, rows, needs)
        else:
            _add_tree(hops, forest, tree, rows, needs)
    hop, chunk, reduces = np.array(rows, dtype=np.int64).reshape(-1, 3).T
    num = len(hop)
    piece = np.arange(pieces)
    shift = (piece * num)[:, None]
    pairs = np.array(sorted(needs), dtype=np.int64).reshape(-1, 2)
    chunks = forest.num_trees * (hops.num_chips if forest.personal else 1)
    return Sends(
        np.tile(hop, pieces),
        (chunk[None, :] * pieces + piece[:, None]).ravel(),
        np.tile(reduces, pieces),
        np.repeat(piece, num),
        ((pairs[:, 0] + shift).ravel(), (pairs[:, 1] + shift).ravel()),
        chunks * pieces,
    )


def _add_tree(
    hops: Hops, forest: Forest, tree: int, rows: list[tuple[int, int, int]], needs: list[tuple[int, int]]
) -> None:
    """Sums on their way to the root, deepest first, then copies on their way from it."""
    into: dict[int, list[int]] = {}
    for chip in reversed(_outwards(forest.up[tree], hops.dst)):
        needs.extend((len(rows), child) for child in into.get(chip, ()))
        hop = int(forest.up[tree][chip])
        into.setdefault(int(hops.dst[hop]), []).append(len(rows))
        rows.append((hop, tree, 1))
    root = int(forest.roots[tree])
    known = {root: into.get(root, [])}
    for chip in _outwards(forest.down[tree], hops.src):
        hop = int(forest.down[tree][chip])
        needs.extend((len(rows), before) for before in known[int(hops.src[hop])])
        known[chip] = [len(rows)]
        rows.append((hop, tree, 0))


def _add_parts(
    hops: Hops, forest: Forest, tree: int, rows: list[tuple[int, int, int]], needs: list[tuple[int, int]]
) -> None:
    """Each chip's own part, hop by hop from the root; trees of one root share its parts out."""
    root = forest.roots[tree]
    alike = np.flatnonzero(forest.roots == root)
    first, number = int(root) * hops.num_chips * len(alike), int(np.searchsorted(alike, tree))
    for chip in range(hops.num_chips):
        way: list[int] = []
        hop = int(forest.down[tree][chip])
        while hop != NONE:
            way.append(hop)
            hop = int(forest.down[tree][hops.src[hop]])
        for hops_before, each in enumerate(reversed(way)):
            if hops_before:
                needs.append((len(rows), len(rows) - 1))
            rows.append((each, first + chip * len(alike) + number, 0))


def _outwards(ways: IntArray, towards_root: IntArray) -> list[int]:
    """The chips of a tree but its root, parents before children."""
    moves = ways >= 0
    parent = np.where(moves, towards_root[ways], np.arange(len(ways)))
    depth, at = moves.astype(np.int64), parent
    while moves[at].any():
        depth += moves[at]
        at = parent[at]
    order: list[int] = np.argsort(depth, kind="stable")[np.count_nonzero(~moves) :].tolist()
    return order


def timetable(hops: Hops, sends: Sends, nbytes: float, pace_s: float, seed: int) -> Timetable:
    """Plan all messages of `nbytes` each, as if a new piece began every `pace_s` seconds.

    Time grows with the messages, and with how many wait for a wire beyond a switch.
    """
    moving_s = nbytes / hops.bytes_per_s[sends.hop]
    arriving_s = moving_s + hops.latency_s[sends.hop]
    lot = np.random.default_rng(seed).random(len(sends.hop))
    turn = np.empty(len(lot), dtype=np.int64)
    turn[np.lexsort((lot, sends.piece * pace_s - _ways_behind(sends, arriving_s)))] = np.arange(len(lot))
    start = _Clock(hops, sends, turn, moving_s, arriving_s).run()
    busy = np.bincount(sends.hop, moving_s, minlength=hops.num_hops)
    return Timetable(start, float((start + arriving_s).max(initial=0.0)), hops.loads(busy))


def _ways_behind(sends: Sends, arriving_s: FloatArray) -> FloatArray:
    """[sends] Seconds of the longest chain that starts with each, on empty wires."""
    behind = arriving_s.copy()
    own = arriving_s.tolist()
    reach = behind.tolist()
    for late, early in zip(sends.needs[0][::-1].tolist(), sends.needs[1][::-1].tolist(), strict=True):
        if own[early] + reach[late] > reach[early]:
            reach[early] = own[early] + reach[late]
    return np.array(reach)


class _Clock:
    """Runs the messages against the wires; nothing is left over for a second run."""

    def __init__(
        self, hops: Hops, sends: Sends, turn: IntArray, moving_s: FloatArray, arriving_s: FloatArray
    ) -> None:
        offsets, wires = hops.routes.offsets.tolist(), hops.routes.wires.tolist()
        routes = [wires[a:b] for a, b in pairwise(offsets)]
        self.routes = [routes[hop] for hop in sends.hop.tolist()]
        self.turn, self.moving_s, self.arriving_s = turn.tolist(), moving_s.tolist(), arriving_s.tolist()
        self.missing = np.bincount(sends.needs[0], minlength=len(turn)).tolist()
        self.after: list[list[int]] = [[] for _ in self.turn]
        for late, early in zip(sends.needs[0].tolist(), sends.needs[1].tolist(), strict=True):
            self.after[early].append(late)
        self.start = [-1.0] * len(turn)
        self.held = [False] * len(hops.capacity)
        self.waiting: list[list[tuple[int, int]]] = [[] for _ in self.held]  # heaps of (turn, send)
        self.events: list[tuple[float, int, int]] = []  # (time, 0 arrived or 1 left, send)

    def run(self) -> FloatArray:
        """[sends] When each leaves."""
        for send, missing in enumerate(self.missing):
            if not missing:
                heappush(self.waiting[self.routes[send][0]], (self.turn[send], send))
        for wire in range(len(self.waiting)):
            self._serve(wire, 0.0)
        while self.events:
            now = self.events[0][0]
            wires: list[int] = []
            while self.events and self.events[0][0] == now:
                _, left, send = heappop(self.events)
                wires.extend(self._left(send) if left else self._arrived(send))
            for wire in wires:
                self._serve(wire, now)
        return np.array(self.start)

    def _left(self, send: int) -> list[int]:
        for wire in self.routes[send]:
            self.held[wire] = False
        return self.routes[send]

    def _arrived(self, send: int) -> list[int]:
        wires = []
        for late in self.after[send]:
            self.missing[late] -= 1
            if not self.missing[late]:
                wires.append(self.routes[late][0])
                heappush(self.waiting[wires[-1]], (self.turn[late], late))
        return wires

    def _serve(self, wire: int, now: float) -> None:
        """Start the most pressing message that waits for this wire and finds all others free.

        One that finds another held moves over there, and is looked at again when that falls free.
        """
        queue = self.waiting[wire]
        while queue and not self.held[wire]:
            turn, send = heappop(queue)
            route = self.routes[send]
            held = next((each for each in route if self.held[each]), NONE)
            if held != NONE:
                heappush(self.waiting[held], (turn, send))
                continue
            for each in route:
                self.held[each] = True
            self.start[send] = now
            heappush(self.events, (now + self.moving_s[send], 1, send))
            heappush(self.events, (now + self.arriving_s[send], 0, send))


def channels_of(hops: Hops, sends: Sends, planned: Timetable, num_channels: int) -> tuple[Channel, ...]:
    """The order of a timetable as channels that share out the chunks and do not wait for each other."""
    order = np.argsort(planned.start_s, kind="stable")
    place = _rounds(hops, sends, order, num_channels)
    channels = []
    for channel in range(num_channels):
        mine = order[sends.chunk[order] % num_channels == channel]
        by_round = mine[np.argsort(place[mine], kind="stable")]
        rounds: list[Round] = []
        if len(by_round):
            cuts = np.flatnonzero(np.diff(place[by_round] * 2 + sends.reduces[by_round])) + 1
            rounds.extend(_round(hops, sends, rows) for rows in np.split(by_round, cuts))
        channels.append(Channel((tuple(rounds),), by_chunk=True))
    return tuple(channels)


def _round(hops: Hops, sends: Sends, rows: IntArray) -> Round:
    hop = sends.hop[rows]
    pattern = Pattern(hops.src[hop], hops.dst[hop])
    return Round(pattern, sends.chunk[rows], np.ones(len(rows), dtype=np.int64), bool(sends.reduces[rows[0]]))


def _rounds(hops: Hops, sends: Sends, order: IntArray, num_channels: int) -> IntArray:
    """[sends] The first round after those it needs and after the one before it on its first wire."""
    first_wire = hops.routes.wires[hops.routes.offsets[sends.hop]]
    port = (first_wire * hops.num_chips + hops.src[sends.hop]) * num_channels + sends.chunk % num_channels
    needed: list[list[int]] = [[] for _ in order]
    for late, early in zip(sends.needs[0].tolist(), sends.needs[1].tolist(), strict=True):
        needed[late].append(early)
    place = [0] * len(order)
    last: dict[int, int] = {}
    ports = port.tolist()
    for send in order.tolist():
        earliest = last.get(ports[send], -1)
        for early in needed[send]:
            earliest = max(earliest, place[early])
        place[send] = last[ports[send]] = earliest + 1
    return np.array(place, dtype=np.int64)
