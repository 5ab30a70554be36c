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
from typing import TYPE_CHECKING

import numpy as np

from comms.collectives.schedule import Channel, Pattern, Round
from comms.networks.topology import FloatArray, IntArray
from comms.synthesis.forest import NONE, Forest, Hops

if TYPE_CHECKING:
    from comms.synthesis.loops import SendTable


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


def sends_of(hops: Hops, forest: Forest, pieces: int) -> Sends:
    """All messages of a forest, every share cut into pieces. Chunks are numbered as `collectives.schedule` says."""
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
    from comms.synthesis.loops import (  # compiled loops, only where they are needed
        played,
        ways_behind,
    )

    work = _send_table(hops, sends, nbytes)
    lot = np.random.default_rng(seed).random(len(sends.hop))
    turn = np.empty(len(lot), dtype=np.int64)
    turn[np.lexsort((lot, sends.piece * pace_s - ways_behind(work)))] = np.arange(len(lot))
    start = played(work, turn, len(hops.capacity))
    return Timetable(start, float((start + work.arriving_s).max(initial=0.0)))


def _send_table(hops: Hops, sends: Sends, nbytes: float) -> "SendTable":
    from comms.synthesis.loops import SendTable

    late, early = sends.needs
    order = np.argsort(early, kind="stable")
    after0 = np.searchsorted(early[order], np.arange(len(sends.hop) + 1))
    moving_s = nbytes / hops.bytes_per_s[sends.hop]
    return SendTable(
        sends.hop,
        moving_s,
        moving_s + hops.latency_s[sends.hop],
        np.bincount(late, minlength=len(sends.hop)),
        after0,
        late[order],
        hops.routes.offsets,
        hops.routes.wires,
    )


def channels_of(hops: Hops, sends: Sends, planned: Timetable, deal: IntArray) -> tuple[Channel, ...]:
    """The order of a timetable as channels in which no chunk waits for another; chunk c is in channel deal[c]."""
    from comms.synthesis.loops import places

    channel = deal[sends.chunk]
    first_wire = hops.routes.wires[hops.routes.offsets[sends.hop]]
    port = (first_wire * hops.num_chips + hops.src[sends.hop]) * (int(deal.max()) + 1) + channel
    order = np.argsort(planned.start_s, kind="stable")
    place = places(_send_table(hops, sends, 0.0), order, np.unique(port, return_inverse=True)[1])
    place = place * 2 + sends.reduces  # what adds and what replaces cannot be in one round
    patterns: dict[tuple[bytes, bytes], Pattern] = {}
    channels = []
    for each in np.unique(channel):
        mine = order[channel[order] == each]
        by_round = mine[np.argsort(place[mine], kind="stable")]
        cuts = np.flatnonzero(np.diff(place[by_round])) + 1
        rounds = (_round(hops, sends, rows, patterns) for rows in np.split(by_round, cuts))
        channels.append(Channel((tuple(rounds),), by_chunk=True))
    return tuple(channels)


def _round(hops: Hops, sends: Sends, rows: IntArray, patterns: dict[tuple[bytes, bytes], Pattern]) -> Round:
    hop = sends.hop[rows]
    src, dst = hops.src[hop], hops.dst[hop]
    pattern = patterns.setdefault((src.tobytes(), dst.tobytes()), Pattern(src, dst))
    return Round(pattern, sends.chunk[rows], np.ones(len(rows), dtype=np.int64), bool(sends.reduces[rows[0]]))
