"""Sweep: full fidelity without an event queue, for schedules in which no two messages meet on a wire. Compiled.

Where every message has its wires to itself, its start depends only on what its sender has received and on its
port, so the messages can be timed one after another in the order of the schedule. That nothing meets is not
assumed but checked on the way: as soon as a message starts on a wire before the last one there has left, the
sweep gives up and the event loop takes over. When it does not give up, its answer is that of the event loop.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from comms.simulation.events import SAME_INSTANT, forwarding_s, uniform
from comms.simulation.jit import compiled, compiled_inside
from comms.simulation.world import Noise

NONE = -1


class SweepState(NamedTuple):
    """Where everything is."""

    # From here to forward_nbytes as in compiled.MessageTable: a tuple in a tuple costs time.
    streams: NDArray[np.void]
    rounds: NDArray[np.void]
    edges: NDArray[np.void]
    route: NDArray[np.int32]
    nbytes: NDArray[np.float64]
    round_of: NDArray[np.int32]
    chunk: NDArray[np.int32]
    num_chunks: NDArray[np.int32]
    forward_nbytes: NDArray[np.float64]
    noise: Noise
    overhead_s: NDArray[np.float64]  # [rank rows]
    resource: NDArray[np.void]  # [resources] sharing.RESOURCE, for the rates
    ready: NDArray[np.float64]  # [chains] when the chain has all of the rounds so far
    staged: NDArray[np.float64]  # [chains] the same with the round that is being sent
    free: NDArray[np.float64]  # [ports]
    rate: NDArray[np.float64]  # [edges]
    busy_until: NDArray[np.float64]  # [resources]
    owner: NDArray[np.int64]  # [resources] the stream that uses it
    run: NDArray[np.void]  # compiled.RUN


@compiled
def sweep(s: SweepState) -> bool:
    """Time everything; False as soon as two messages meet."""
    for number in range(len(s.edges)):
        slowest = np.inf
        for hop in range(s.edges[number].route0, s.edges[number].route1):
            slowest = min(slowest, s.resource[s.route[hop]].bytes_per_s)
        s.rate[number] = slowest
    # Stream by stream, though they run side by side: that is right only while no two use the same wire, which `_take`
    # checks. Within a stream the order of the schedule is one in which everything that a message waits for is known.
    for number in range(len(s.streams)):
        stream = s.streams[number]
        chains = stream.pieces * stream.ranks * stream.groups
        start = s.run[stream.run0].start_s
        s.ready[stream.chain0 : stream.chain0 + chains] = start
        s.staged[stream.chain0 : stream.chain0 + chains] = start
        segment = 0
        while segment < stream.rounds:
            end = s.rounds[stream.round0 + segment].phase_end if stream.serial else segment + 1
            for piece in range(stream.pieces):
                if stream.serial and piece > 0:
                    _after_piece_before(s, number, piece)
                for each in range(stream.round0 + segment, stream.round0 + end):
                    if not _round(s, each, piece):
                        return False
            segment = end
    return True


@compiled_inside
def _after_piece_before(s: SweepState, number: int, piece: int) -> None:
    """A chip starts on a piece when it is done with the one before."""
    stream = s.streams[number]
    for rank in range(stream.ranks):
        here = stream.chain0 + (piece * stream.ranks + rank) * stream.groups
        before = here - stream.ranks * stream.groups
        done = s.ready[before]
        for group in range(1, stream.groups):
            done = max(done, s.ready[before + group])
        for group in range(stream.groups):
            s.ready[here + group] = max(s.ready[here + group], done)
            s.staged[here + group] = s.ready[here + group]


@compiled_inside
def _round(s: SweepState, number: int, piece: int) -> bool:
    """One piece of one round."""
    each = s.rounds[number]
    stream = s.streams[each.stream]
    base, groups = stream.chain0 + piece * stream.ranks * stream.groups, stream.groups
    chunk, num = 0, 1
    for message in range(each.first, each.last):
        edge_number = each.edge0 + message - each.first
        edge = s.edges[edge_number]
        if stream.by_chunk:
            chunk, num = s.chunk[message], s.num_chunks[message]
        start = s.free[edge.port]
        for offset in range(num):
            start = max(start, s.ready[base + edge.src * groups + (chunk + offset) % groups])
        start += s.overhead_s[stream.rank0 + edge.src]
        if s.noise.mean_s > 0.0:
            start -= s.noise.mean_s * np.log(
                uniform(s.noise.seed, message, piece, s.run[stream.run0 + edge.src // stream.members].start_s)
            )
        end = start + s.nbytes[message] / s.rate[edge_number]
        if not _take(s, each.stream, edge_number, start, end):
            return False
        s.free[edge.port] = end
        came = end + edge.latency_s
        if len(s.forward_nbytes) > 0:
            came += forwarding_s(
                s.forward_nbytes, s.route, s.resource, edge.route0, edge.route1, s.nbytes[message]
            )
        # What arrives in a round is held back until the round is through: messages wait for earlier rounds only.
        for offset in range(num):
            chain = base + edge.dst * groups + (chunk + offset) % groups
            s.staged[chain] = max(s.staged[chain], came)
        its = s.run[stream.run0 + edge.dst // stream.members]
        its.end_s = max(its.end_s, came)
    for message in range(each.first, each.last):
        if stream.by_chunk:
            chunk, num = s.chunk[message], s.num_chunks[message]
        dst = s.edges[each.edge0 + message - each.first].dst
        for offset in range(num):
            chain = base + dst * groups + (chunk + offset) % groups
            s.ready[chain] = s.staged[chain]
    return True


@compiled_inside
def _take(s: SweepState, stream: int, edge: int, start: float, end: float) -> bool:
    """Take the wires of a route from start to end; False where they are taken."""
    for hop in range(s.edges[edge].route0, s.edges[edge].route1):
        resource = s.route[hop]
        # Another stream's messages may lie before or after this one in time: not known here, so nothing is claimed.
        if s.owner[resource] != stream and s.owner[resource] != NONE:
            return False
        # A start at the very end of the last message is no overlap, within the event loop's idea of one instant.
        if start < s.busy_until[resource] * (1.0 - SAME_INSTANT):
            return False
        s.owner[resource] = stream
        s.busy_until[resource] = end
    return True
