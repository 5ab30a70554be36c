"""Folded fidelity: an outline (`collectives.outline`) is played for its representative positions, round by round.

When a message leaves depends on when its sender has what it needs and on when the message before it has left, so
times follow a recurrence in maxima and sums (a max-plus linear system; Baccelli, Cohen, Olsder and Quadrat,
Synchronization and Linearity, 1992). After some rounds such a system repeats itself, later by a constant per
period (chapter 3, theorem 3.109); as soon as that is seen, the remaining periods are taken in one step.

A stage with one hop in an outline with more positions has each position exchange with its like. Rounds with
ports of their own are those of other chips: pieces queue there, but neither wait for a chip to be done with the
piece before nor hold its port. Channels side by side are `collectives.parallel_channels`.

Exact for what an outline says, up to rounding; what it leaves out (chips that differ) is not modelled.
"""

from collections import deque
from dataclasses import dataclass

import numpy as np

from comms.collectives.outline import Outline, Stage
from comms.collectives.parallel_channels import side_by_side_seconds
from comms.collectives.schedule import Order
from comms.networks.topology import FloatArray

STEADY = 1e-12  # relative: states that differ by a constant up to this are the same


@dataclass(frozen=True, slots=True)
class _Costs:
    """One stage, per position and piece."""

    repeat: int
    latency_s: FloatArray
    wire_s: FloatArray  # until the last byte has left
    passes_on: bool  # to the next position, else to its like
    own_ports: bool


def folded_seconds(outline: Outline) -> float:
    """Time until everything has arrived, everyone being ready at 0."""
    if outline.beside:
        return side_by_side_seconds(outline)
    positions = num_positions(outline)
    ready = np.zeros((outline.pieces, positions))
    free: dict[int, FloatArray] = {}
    for phase, port in zip(outline.phases, outline.ports, strict=True):
        port_free = free.get(port, np.zeros(positions))
        for block in blocks(phase, outline.order):
            costs = [_costs(stage, positions, outline.pieces) for stage in block]
            if len(block) > 1 or (outline.order is Order.SERIAL and not block[0].own_ports):
                ready, port_free = _piece_by_piece(costs, ready, port_free)
            else:
                ready, port_free = _round_by_round(costs[0], ready, port_free)
        free[port] = port_free
    return float(ready.max())


def num_positions(outline: Outline) -> int:
    """How many chips stand for all. An outline's stages have this many hops, or one."""
    counts = {len(stage.hops) for phase in outline.phases for stage in phase if stage.repeat} - {1}
    assert len(counts) <= 1, f"stages of {outline.algorithm} differ in their positions: {counts}"
    return counts.pop() if counts else 1


def blocks(phase: tuple[Stage, ...], order: Order) -> tuple[tuple[Stage, ...], ...]:
    """What the pieces go through one after another: single stages, and SERIAL all that hold the chip's port."""
    stages = tuple(stage for stage in phase if stage.repeat)
    shared = [index for index, stage in enumerate(stages) if not stage.own_ports]
    if order is Order.INTERLEAVED or not shared:
        return tuple((stage,) for stage in stages)
    first, last = shared[0], shared[-1] + 1
    own_before = tuple((stage,) for stage in stages[:first])
    return (*own_before, stages[first:last], *((stage,) for stage in stages[last:]))


def _costs(stage: Stage, positions: int, pieces: int) -> _Costs:
    latency = np.array([hop.latency_s for hop in stage.hops])
    wire = np.array([stage.nbytes / pieces / hop.bytes_per_s for hop in stage.hops])
    shape = (positions,)
    return _Costs(
        stage.repeat,
        np.broadcast_to(latency, shape),
        np.broadcast_to(wire, shape),
        len(stage.hops) > 1,
        stage.own_ports,
    )


def _piece_by_piece(
    costs: list[_Costs], ready: FloatArray, free: FloatArray
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


def _round_by_round(cost: _Costs, ready: FloatArray, free: FloatArray) -> tuple[FloatArray, FloatArray]:
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


def _round(cost: _Costs, ready: FloatArray, free: FloatArray) -> tuple[FloatArray, FloatArray]:
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
