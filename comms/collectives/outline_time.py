"""The time of an outline (`collectives.outline`): by arithmetic, or played round by round for its representatives.

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
sweep, which is used for them.

The sweep (folded fidelity): when a message leaves depends on when its sender has what it needs and on when the
message before it has left, so times follow a recurrence in maxima and sums (a max-plus linear system; Baccelli,
Cohen, Olsder and Quadrat, Synchronization and Linearity, 1992). After some rounds such a system repeats itself, later
by a constant per period (chapter 3, theorem 3.109); as soon as that is seen, the remaining periods are taken in one
step.

A stage with one hop in an outline with more positions has each position exchange with its counterpart. Rounds with
ports of their own are those of other chips: pieces queue there, but neither wait for a chip to be done with the
piece before nor hold its port.

Channels side by side send one message after another, each when the one before has arrived. Those that use a port at
the same time share its rate equally, as max-min fairness has it for flows with one wire each (processor sharing;
Kleinrock, Queueing Systems II, 1976, section 4.4). Where all chips stand alike, as around the rings of a torus, this
is what happens at every chip.

Exact for what an outline says, up to rounding; what it leaves out (chips that differ) is not modelled.
"""

from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil

import numpy as np

from comms.collectives.outline import Hop, Outline, OutlineStage
from comms.collectives.schedule import PieceOrder
from comms.networks.topology import FloatArray

MAX_POSITIONS = 512  # the form of a ring takes the square of it
FILLING = 1 / 32  # of the time with endless pieces, what filling a pipeline may cost more
ROUNDING = 1e-12  # of a message: what is left of it is nothing
STEADY = 1e-12  # relative: states that differ by a constant up to this are the same


@dataclass(frozen=True, slots=True)
class _PieceCosts:
    """One stage, per position and piece."""

    repeat: int
    latency_s: FloatArray
    wire_s: FloatArray  # until the last byte has left
    passes_on: bool  # to the next position, else to its counterpart
    own_ports: bool


@dataclass(slots=True)
class _Message:
    """What is left of a message, in seconds: on the wire if it had the port alone, and after that on its way."""

    port: int
    wire_s: float
    way_s: float

    def next_event_s(self, senders: Counter[int]) -> float:
        return self.wire_s * senders[self.port] if self.wire_s > 0 else self.way_s

    def moved_on(self, seconds: float, senders: Counter[int]) -> "_Message":
        """The same after so long, in which nothing began or ended."""
        if self.wire_s > 0:
            left = self.wire_s - seconds / senders[self.port]
            return _Message(self.port, left if left > self.wire_s * ROUNDING else 0.0, self.way_s)
        left = self.way_s - seconds
        return _Message(self.port, 0.0, left if left > self.way_s * ROUNDING else 0.0)


def closed_seconds(outline: Outline) -> float:
    """Time until everything has arrived, everyone being ready at 0."""
    if outline.beside:
        return folded_seconds(outline)
    if _num_positions(outline) == 1:
        return _uniform(outline)
    stages = [stage for phase in outline.phases for stage in phase if stage.repeat]
    if len(stages) != 1 or stages[0].own_ports or len(stages[0].hops) > MAX_POSITIONS:
        return folded_seconds(outline)
    if outline.order is PieceOrder.INTERLEAVED and outline.pieces > 1:
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


def folded_seconds(outline: Outline) -> float:
    """Time until everything has arrived, everyone being ready at 0."""
    if outline.beside:
        return _side_by_side_seconds(outline)
    positions = _num_positions(outline)
    ready = np.zeros((outline.pieces, positions))
    free: dict[int, FloatArray] = {}
    for phase, port in zip(outline.phases, outline.ports, strict=True):
        port_free = free.get(port, np.zeros(positions))
        for block in _blocks(phase, outline.order):
            costs = [_costs(stage, positions, outline.pieces) for stage in block]
            if len(block) > 1 or (outline.order is PieceOrder.SERIAL and not block[0].own_ports):
                ready, port_free = _piece_by_piece(costs, ready, port_free)
            else:
                ready, port_free = _round_by_round(costs[0], ready, port_free)
        free[port] = port_free
    return float(ready.max())


def _num_positions(outline: Outline) -> int:
    """How many chips stand for all. An outline's stages have this many hops, or one."""
    counts = {len(stage.hops) for phase in outline.phases for stage in phase if stage.repeat} - {1}
    assert len(counts) <= 1, f"stages of {outline.algorithm} differ in their positions: {counts}"
    return counts.pop() if counts else 1


def _blocks(phase: tuple[OutlineStage, ...], order: PieceOrder) -> tuple[tuple[OutlineStage, ...], ...]:
    """What the pieces go through one after another: single stages, and SERIAL all that hold the chip's port."""
    stages = tuple(stage for stage in phase if stage.repeat)
    shared = [index for index, stage in enumerate(stages) if not stage.own_ports]
    if order is PieceOrder.INTERLEAVED or not shared:
        return tuple((stage,) for stage in stages)
    first, last = shared[0], shared[-1] + 1
    own_before = tuple((stage,) for stage in stages[:first])
    return (*own_before, stages[first:last], *((stage,) for stage in stages[last:]))


def _uniform(outline: Outline) -> float:
    first = last = 0.0
    free: dict[int, float] = {}
    for phase, port in zip(outline.phases, outline.ports, strict=True):
        for block in _blocks(phase, outline.order):
            if len(block) == 1 and block[0].own_ports:
                first, last = _own_ports(block[0], outline.pieces, first, last)
                continue
            start, end = max(first, free.get(port, 0.0)), max(last, free.get(port, 0.0))
            if outline.order is PieceOrder.SERIAL:
                first, last, free[port] = _serial(block, outline.pieces, start, end)
            else:
                first, last, free[port] = _interleaved(block[0], outline.pieces, start, end)
    return last


def _wire_s(stage: OutlineStage, hop: Hop, pieces: int) -> float:
    return stage.nbytes / pieces / hop.bytes_per_s


def _own_ports(stage: OutlineStage, pieces: int, first: float, last: float) -> tuple[float, float]:
    wire_s = _wire_s(stage, stage.hops[0], pieces)
    through = stage.repeat * (wire_s + stage.hops[0].latency_s)
    return first + through, max(last, first + (pieces - 1) * wire_s) + through


def _serial(
    block: tuple[OutlineStage, ...], pieces: int, first: float, last: float
) -> tuple[float, float, float]:
    """First and last piece there, port free. A block ends with a stage that holds the port."""
    rounds_s = [_wire_s(stage, stage.hops[0], pieces) + stage.hops[0].latency_s for stage in block]
    whole = sum(stage.repeat * seconds for stage, seconds in zip(block, rounds_s, strict=True))
    end = max(last, first + (pieces - 1) * whole) + whole
    return first + whole, end, end - block[-1].hops[0].latency_s


def _interleaved(stage: OutlineStage, pieces: int, first: float, last: float) -> tuple[float, float, float]:
    """First and last piece there, port free."""
    wire_s, more = _wire_s(stage, stage.hops[0], pieces), stage.repeat - 1
    through = wire_s + stage.hops[0].latency_s
    pace = max(through, pieces * wire_s)
    last = max(last, first + (pieces - 1) * wire_s)
    if more:
        first = max(first + more * through, last + wire_s + (more - 1) * pace)
        last += more * pace
    return first + through, last + through, last + wire_s


def _ring(stage: OutlineStage, pieces: int) -> float:
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


def _costs(stage: OutlineStage, positions: int, pieces: int) -> _PieceCosts:
    latency = np.broadcast_to([hop.latency_s for hop in stage.hops], positions)
    wire = np.broadcast_to([_wire_s(stage, hop, pieces) for hop in stage.hops], positions)
    return _PieceCosts(stage.repeat, latency, wire, len(stage.hops) > 1, stage.own_ports)


def _piece_by_piece(
    costs: list[_PieceCosts], ready: FloatArray, free: FloatArray
) -> tuple[FloatArray, FloatArray]:
    """Every position starts on a piece when it is done with the one before. [pieces, positions], [positions]

    A piece that starts like the one before it, only later, ends like it.
    """
    done, arrived = free, np.empty_like(ready)
    start_before = np.full_like(free, -np.inf)
    for piece in range(len(ready)):
        start = np.maximum(np.maximum(ready[piece], free), done)
        shift = _shift(start_before, start) if piece else None
        if shift is not None:
            done, free = done + shift, free + shift
        else:
            state = start[np.newaxis], start
            for cost in costs:
                state = _round_by_round(cost, *state)
            done, free = state[0][0], state[1]
        start_before = start
        arrived[piece] = done
    return arrived, free


def _round_by_round(cost: _PieceCosts, ready: FloatArray, free: FloatArray) -> tuple[FloatArray, FloatArray]:
    """All rounds of a stage, all pieces of each round after another."""
    period = len(free) if cost.passes_on else 1
    past: deque[tuple[FloatArray, FloatArray]] = deque(maxlen=period)
    left = cost.repeat
    while left:
        past.append((ready, free))
        ready, free = _round(cost, ready, free)
        left -= 1
        if left >= period == len(past):
            before_ready, before_free = past[0]
            if cost.own_ports:
                shift = _shift(before_ready.ravel(), ready.ravel())
            else:
                shift = _shift(np.append(before_ready, before_free), np.append(ready, free))
            if shift is not None:
                later = left // period * shift
                ready, left = ready + later, left % period
                free = free if cost.own_ports else free + later
                past.clear()
    return ready, free


def _round(cost: _PieceCosts, ready: FloatArray, free: FloatArray) -> tuple[FloatArray, FloatArray]:
    """One round: when all of it has arrived, and when the ports are free again."""
    leaves = ready.copy()
    if not cost.own_ports:
        np.maximum(leaves[0], free, out=leaves[0])
    if len(leaves) > 1:  # each piece leaves when the one before has, at the earliest
        ahead = np.arange(len(leaves))[:, np.newaxis] * cost.wire_s
        leaves = np.maximum.accumulate(leaves - ahead, axis=0) + ahead
    arrives = leaves + (cost.wire_s + cost.latency_s)
    if cost.passes_on:
        arrives = np.roll(arrives, 1, axis=1)
    return np.maximum(ready, arrives), free if cost.own_ports else leaves[-1] + cost.wire_s


def _shift(before: FloatArray, after: FloatArray) -> float | None:
    """By how much later all of it is, if all by the same."""
    later = after - before
    least, most = float(later.min()), float(later.max())
    return least if most - least <= STEADY * float(np.abs(after).max()) else None


def _side_by_side_seconds(outline: Outline) -> float:
    """Time until all channels of an outline have ended, everyone being ready at 0."""
    coming = [_messages(each) for each in outline.channels]
    under_way = [next(messages, None) for messages in coming]
    now = 0.0
    while any(under_way):
        senders = Counter(each.port for each in under_way if each and each.wire_s > 0)
        step = min(each.next_event_s(senders) for each in under_way if each)
        now += step
        for channel, each in enumerate(under_way):
            if each:
                left = each.moved_on(step, senders)
                ended = left.wire_s == left.way_s == 0
                under_way[channel] = next(coming[channel], None) if ended else left
    return now


def _messages(outline: Outline) -> Iterator[_Message]:
    """The messages of a channel, in order."""
    for phase, port in zip(outline.phases, outline.ports, strict=True):
        for stage in phase:
            (hop,) = stage.hops
            for _ in range(stage.repeat):
                yield _Message(port, stage.nbytes / hop.bytes_per_s, hop.latency_s)
