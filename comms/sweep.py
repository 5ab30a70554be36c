"""Sweep: full fidelity without an event queue, for schedules in which no two messages meet on a wire. Compiled.

Where every message has its wires to itself, its start depends only on what its sender has received and on its
port, so the messages can be timed one after another in the order of the schedule. That nothing meets is not
assumed but checked on the way: as soon as a message starts on a wire before the last one there has left, the
sweep gives up and the event loop takes over. When it does not give up, its answer is that of the event loop.
"""

from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from comms.compiled import Messages, Streams
from comms.events import SAME_INSTANT, Noise, forwarding_s, uniform

NONE = -1


class Sweep(NamedTuple):
    """Where everything is."""

    ready: NDArray[np.float64]  # [chains] when the chain has all of the rounds so far
    staged: NDArray[np.float64]  # [chains] the same with the round that is being sent
    free: NDArray[np.float64]  # [ports]
    rate: NDArray[np.float64]  # [pattern rows]
    busy_until: NDArray[np.float64]  # [resources]
    owner: NDArray[np.int64]  # [resources] the stream that uses it
    rank_end: NDArray[np.float64]  # [rank rows]
    job_end: NDArray[np.float64]  # [jobs]
    starts: NDArray[np.float64]  # [message and piece] empty where nothing is recorded
    arrivals: NDArray[np.float64]
    record0: NDArray[np.int64]  # [streams]


@njit(cache=True)
def sweep(
    streams: Streams, messages: Messages, bytes_per_s: NDArray[np.float64], noise: Noise, state: Sweep
) -> bool:
    """Time everything; False as soon as two messages meet."""
    for row in range(len(messages.src)):
        slowest = np.inf
        for hop in range(messages.route0[row], messages.route0[row + 1]):
            slowest = min(slowest, bytes_per_s[messages.route[hop]])
        state.rate[row] = slowest
    for stream in range(len(streams.job)):
        first, rounds = streams.round0[stream], streams.rounds[stream]
        chains = streams.pieces[stream] * streams.ranks[stream] * streams.groups[stream]
        base = streams.chain0[stream]
        state.ready[base : base + chains] = streams.start_s[stream]
        state.staged[base : base + chains] = streams.start_s[stream]
        segment = 0
        while segment < rounds:
            end = messages.phase_end[first + segment] if streams.serial[stream] else segment + 1
            for piece in range(streams.pieces[stream]):
                if streams.serial[stream] and piece > 0:
                    _after_piece_before(streams, state, stream, piece)
                for each in range(first + segment, first + end):
                    if not _round(streams, messages, bytes_per_s, noise, state, stream, each, piece):
                        return False
            segment = end
    return True


@njit(cache=True)
def _after_piece_before(streams: Streams, state: Sweep, stream: int, piece: int) -> None:
    """A chip starts on a piece when it is done with the one before."""
    ranks, groups = streams.ranks[stream], streams.groups[stream]
    for rank in range(ranks):
        here = streams.chain0[stream] + (piece * ranks + rank) * groups
        done = state.ready[here - ranks * groups]
        for group in range(1, groups):
            done = max(done, state.ready[here - ranks * groups + group])
        for group in range(groups):
            state.ready[here + group] = max(state.ready[here + group], done)
            state.staged[here + group] = state.ready[here + group]


@njit(cache=True)
def _round(
    streams: Streams,
    messages: Messages,
    bytes_per_s: NDArray[np.float64],
    noise: Noise,
    state: Sweep,
    stream: int,
    each: int,
    piece: int,
) -> bool:
    """One piece of one round."""
    ranks, groups, by_chunk = streams.ranks[stream], streams.groups[stream], streams.by_chunk[stream]
    rank0, job = streams.rank0[stream], streams.job[stream]
    base = streams.chain0[stream] + piece * ranks * groups
    shift = messages.pattern0[each] - messages.first[each]
    chunk, num = 0, 1
    for message in range(messages.first[each], messages.first[each + 1]):
        row = message + shift
        src, dst = messages.src[row], messages.dst[row]
        if by_chunk:
            chunk, num = messages.chunk[message], messages.num_chunks[message]
        start = 0.0
        for offset in range(num):
            start = max(start, state.ready[base + src * groups + (chunk + offset) % groups])
        start = max(start, state.free[messages.port[row]])
        start += noise.overhead_s[rank0 + src]
        if noise.mean_s > 0.0:
            start -= noise.mean_s * np.log(uniform(noise.seed, message, piece))
        end = start + messages.nbytes[message] / state.rate[row]
        if not _take(messages, state, stream, row, start, end):
            return False
        state.free[messages.port[row]] = end
        came = end + messages.latency_s[row]
        if len(messages.forward_nbytes) > 0:
            came += forwarding_s(
                messages, bytes_per_s, messages.route0[row], messages.route0[row + 1], message
            )
        for offset in range(num):
            chain = base + dst * groups + (chunk + offset) % groups
            state.staged[chain] = max(state.staged[chain], came)
        state.rank_end[rank0 + src] = max(state.rank_end[rank0 + src], end)
        state.rank_end[rank0 + dst] = max(state.rank_end[rank0 + dst], came)
        state.job_end[job] = max(state.job_end[job], came)
        if len(state.starts) > 0:
            at = message - messages.first[streams.round0[stream]]
            at = state.record0[stream] + at * streams.pieces[stream] + piece
            state.starts[at], state.arrivals[at] = start, came
    for message in range(messages.first[each], messages.first[each + 1]):
        if by_chunk:
            chunk, num = messages.chunk[message], messages.num_chunks[message]
        dst = messages.dst[message + shift]
        for offset in range(num):
            chain = base + dst * groups + (chunk + offset) % groups
            state.ready[chain] = state.staged[chain]
    return True


@njit(cache=True)
def _take(messages: Messages, state: Sweep, stream: int, row: int, start: float, end: float) -> bool:
    """Take the wires of a route from start to end; False where they are taken."""
    for hop in range(messages.route0[row], messages.route0[row + 1]):
        resource = messages.route[hop]
        owner = state.owner[resource]
        if owner != stream and owner != NONE:
            return False
        if start < state.busy_until[resource] * (1.0 - SAME_INSTANT):
            return False
        state.owner[resource] = stream
        state.busy_until[resource] = end
    return True
