"""Closed forms: the time of an outline (`collectives.outline`) by arithmetic, with no loop over rounds or pieces.

With one representative, a round takes w (its wire is busy) and then l (latency). Of q pieces only the first and
the last need be followed: when piece k is ready is convex in k at first (0 for all), and every stage keeps it so,
hence whatever holds the last piece up is either itself or the first one. For S equal rounds that start when the
first piece is ready at a, the last one at z, both not before the port is free:

    ports of their own     a' = a + S (w + l)                     z' = max(z, a + (q - 1) w) + S (w + l)
    SERIAL, D = S (w + l)  a' = a + D                             z' = max(z, a + (q - 1) D) + D
    INTERLEAVED            y = max(z, a + (q - 1) w), then B = max(w + l, q w) a round for the last piece:
                           a' = max(a + (S - 1) (w + l), y + w + (S - 2) B) + w + l    (S > 1)
                           z' = y + (S - 1) B + w + l

From a = z = 0 the last line is max(S (w + l) + (q - 1) w, q S w + l). Phases with ports of their own make a flow
shop: the sum over all of them, and q - 1 times the longest.

With p positions in a ring (hop i: w_i, l_i) the time is that of the longest path on which each step either waits
for the port (w_i) or follows the message (w_i + l_i, to position i + 1), the last step being such a move. A path
with m moves visits m positions and waits at the one with the largest w; of paths all the way around, which have
the same largest w, one with the fewest turns (none or one more) or one with the most is the longest. Ring outlines
with several stages, or with pieces between each other, and channels side by side have no form shorter than their
sweep, `collectives.folded`, which is used for them.
"""

from math import ceil

import numpy as np

from comms.collectives.folded import blocks, folded_seconds, num_positions
from comms.collectives.outline import Hop, Outline, Stage
from comms.collectives.schedule import Order
from comms.networks.topology import FloatArray

MAX_POSITIONS = 512  # the form of a ring takes the square of it
FILLING = 1 / 32  # of the time with endless pieces, what filling a pipeline may cost more


def closed_seconds(outline: Outline) -> float:
    """Time until everything has arrived, everyone being ready at 0."""
    if outline.beside:
        return folded_seconds(outline)
    if num_positions(outline) == 1:
        return _uniform(outline)
    stages = [stage for phase in outline.phases for stage in phase if stage.repeat]
    if len(stages) != 1 or stages[0].own_ports or len(stages[0].hops) > MAX_POSITIONS:
        return folded_seconds(outline)
    if outline.order is Order.INTERLEAVED and outline.pieces > 1:
        return folded_seconds(outline)
    return _ring(stages[0], outline.pieces)


def pieces_to_fill(whole: Outline) -> int:
    """Of an outline in one piece whose rounds have ports of their own, so many that filling them hardly counts."""
    stages = [(stage, stage.hops[0]) for phase in whole.phases for stage in phase]
    wire_s = [stage.nbytes / hop.bytes_per_s for stage, hop in stages]
    slowest_s = max(wire_s, default=0.0)
    through_s = sum(stage.repeat * wire for (stage, _), wire in zip(stages, wire_s, strict=True))
    latency_s = sum(stage.repeat * hop.latency_s for stage, hop in stages)
    return fewest_pieces(through_s - slowest_s, latency_s + slowest_s)


def fewest_pieces(filling_s: float, endless_s: float) -> int:
    """With which filling costs at most FILLING of the time with endless pieces; one piece fills in `filling_s`."""
    return max(1, ceil(filling_s / (FILLING * endless_s))) if endless_s > 0 else 1


def _uniform(outline: Outline) -> float:
    first = last = 0.0
    free: dict[int, float] = {}
    for phase, port in zip(outline.phases, outline.ports, strict=True):
        for block in blocks(phase, outline.order):
            if len(block) == 1 and block[0].own_ports:
                first, last = _own_ports(block[0], outline.pieces, first, last)
                continue
            start, end = max(first, free.get(port, 0.0)), max(last, free.get(port, 0.0))
            if outline.order is Order.SERIAL:
                first, last, free[port] = _serial(block, outline.pieces, start, end)
            else:
                first, last, free[port] = _interleaved(block[0], outline.pieces, start, end)
    return last


def _wire_s(stage: Stage, hop: Hop, pieces: int) -> float:
    return stage.nbytes / pieces / hop.bytes_per_s


def _own_ports(stage: Stage, pieces: int, first: float, last: float) -> tuple[float, float]:
    wire_s = _wire_s(stage, stage.hops[0], pieces)
    through = stage.repeat * (wire_s + stage.hops[0].latency_s)
    return first + through, max(last, first + (pieces - 1) * wire_s) + through


def _serial(block: tuple[Stage, ...], pieces: int, first: float, last: float) -> tuple[float, float, float]:
    """First and last piece there, port free. A block ends with a stage that holds the port."""
    rounds_s = [_wire_s(stage, stage.hops[0], pieces) + stage.hops[0].latency_s for stage in block]
    whole = sum(stage.repeat * seconds for stage, seconds in zip(block, rounds_s, strict=True))
    end = max(last, first + (pieces - 1) * whole) + whole
    return first + whole, end, end - block[-1].hops[0].latency_s


def _interleaved(stage: Stage, pieces: int, first: float, last: float) -> tuple[float, float, float]:
    """First and last piece there, port free."""
    wire_s, more = _wire_s(stage, stage.hops[0], pieces), stage.repeat - 1
    through = wire_s + stage.hops[0].latency_s
    pace = max(through, pieces * wire_s)
    last = max(last, first + (pieces - 1) * wire_s)
    if more:
        first = max(first + more * through, last + wire_s + (more - 1) * pace)
        last += more * pace
    return first + through, last + through, last + wire_s


def _ring(stage: Stage, pieces: int) -> float:
    """The longest path; pieces one after another are further rounds."""
    wire = np.array([_wire_s(stage, hop, pieces) for hop in stage.hops])
    moves = wire + np.array([hop.latency_s for hop in stage.hops])
    rounds = stage.repeat * pieces
    positions = len(wire)
    path = (np.arange(positions)[:, np.newaxis] + np.arange(positions)) % positions  # [start, move]
    moved: FloatArray = np.cumsum(moves[path], axis=1)
    slowest = np.maximum.accumulate(wire[path], axis=1)
    num = np.arange(1, positions + 1)
    waits = rounds - num
    once = np.where(num <= rounds, moved + waits * slowest, 0.0).max()
    most = (rounds - num) // positions
    times = [once]
    for turns in (np.minimum(most, 1), most):
        waits = rounds - num - turns * positions
        around = moved + turns * moves.sum() + waits * wire.max()
        times.append(np.where(turns > 0, around, 0.0).max())
    return float(max(times))
