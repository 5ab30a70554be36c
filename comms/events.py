"""Events: full fidelity, message by message, with max-min fair sharing of wires. Compiled.

Three kinds of things happen: a message arrives (its receiver may go on), a flow ends (its port and its share of
the wires are free), a wire's capacity changes. Whatever happens at one instant is done before rates are solved
anew, and only for the flows it disturbs (`comms.sharing`); a flow alone on its wires costs no solving at all.

Not modelled: packets, queues in switches, loss and congestion control, which max-min fairness stands for.
"""

from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from comms.compiled import Messages, Streams
from comms.heaps import Finishes, Timers, add_timer, clear_finish, set_finish, take_timer
from comms.sharing import Flows, draw_in, draw_in_all, insert, remove, solve

SAME_INSTANT = 1e-12  # relative: rounding must not split what happens together

# States of a port.
IDLE, STARTING, SENDING = 0, 1, 2

# Counters: messages that have arrived, flows that started or ended, flows solved anew, foreground jobs left.
ARRIVED, FLOW_EVENTS, SOLVED, JOBS_LEFT = 0, 1, 2, 3
MAX_PIECES = 1 << 20  # a timer's number holds a message and a piece


class Ports(NamedTuple):
    """What leaves by each port in which order: rows first[port] .. first[port + 1] of the lists."""

    first: NDArray[np.int64]  # [ports + 1]
    message: NDArray[np.int32]
    segment_start: NDArray[np.int32]  # [rows] the pieces of a segment follow each other: segment by segment,
    segment_end: NDArray[np.int32]  # [rows] there piece by piece, there message by message
    stream: NDArray[np.int32]  # [ports]
    rank: NDArray[np.int32]  # [ports] in the stream
    of_rank_first: NDArray[np.int64]  # [rank rows + 1]
    of_rank: NDArray[np.int32]


class Noise(NamedTuple):
    """What sending costs a chip beyond its wires."""

    overhead_s: NDArray[np.float64]  # [rank rows] before each message
    mean_s: float  # of an exponential delay before each message
    seed: int


class State(NamedTuple):
    """Where everything is."""

    got: NDArray[np.int32]  # [chains] rounds fully received
    left: NDArray[np.uint16]  # [chains * rounds] messages still to come
    row: NDArray[np.int64]  # [ports] next message
    piece: NDArray[np.int64]  # [ports] its piece
    state: NDArray[np.int8]  # [ports]
    nbytes: NDArray[np.float64]  # [ports] still to leave
    since: NDArray[np.float64]  # [ports] when that was so
    job_left: NDArray[np.int64]  # [jobs] messages still to arrive
    job_messages: NDArray[np.int64]  # [jobs]
    repeats: NDArray[np.bool_]  # [jobs] background
    left_again: NDArray[np.uint16]  # `left` as it was at first, for jobs that repeat
    job_end: NDArray[np.float64]  # [jobs]
    rank_end: NDArray[np.float64]  # [rank rows] when its last message came or left
    starts: NDArray[np.float64]  # [message and piece] empty where nothing is recorded
    arrivals: NDArray[np.float64]
    record0: NDArray[np.int64]  # [streams]
    counters: NDArray[np.int64]


class World(NamedTuple):
    """Everything the loop reads and writes."""

    streams: Streams
    messages: Messages
    ports: Ports
    flows: Flows
    timers: Timers
    finishes: Finishes
    state: State
    noise: Noise


class Changes(NamedTuple):
    """Capacities that change, in order of time."""

    at_s: NDArray[np.float64]
    resource: NDArray[np.int64]
    bytes_per_s: NDArray[np.float64]


@njit(cache=True)
def run(w: World, changes: Changes, next_change: int) -> int:
    """Until all foreground jobs are done, nothing can happen any more, or timers need more room.

    Returns the next change of capacity.
    """
    timers, finishes = w.timers, w.finishes
    # What one event may add: a timer for each port, and one for each stream that starts again.
    room = len(timers.time) - 2 * len(w.ports.stream) - 2 * len(w.streams.job) - 2
    while w.state.counters[JOBS_LEFT] > 0 and timers.size[0] < room:
        now = np.inf
        if timers.size[0] > 0:
            now = timers.time[0]
        if finishes.size[0] > 0:
            now = min(now, finishes.time[finishes.port[0]])
        if next_change < len(changes.at_s):
            now = min(now, changes.at_s[next_change])
        if now == np.inf:
            break
        until = now * (1.0 + SAME_INSTANT)
        drawn = 0
        while finishes.size[0] > 0 and finishes.time[finishes.port[0]] <= until and timers.size[0] < room:
            port = finishes.port[0]
            drawn = _leave(w, port, now, drawn)
            drawn = _try(w, port, now, drawn)
        while timers.size[0] > 0 and timers.time[0] <= until and timers.size[0] < room:
            drawn = _happen(w, take_timer(timers), now, drawn)
        while next_change < len(changes.at_s) and changes.at_s[next_change] <= until:
            resource = changes.resource[next_change]
            w.flows.bytes_per_s[resource] = changes.bytes_per_s[next_change]
            drawn = draw_in_all(w.flows, resource, drawn, False)
            next_change += 1
        if drawn > 0:
            _settle(w.flows, finishes, w.state, now, drawn)
    return next_change


@njit(cache=True)
def _settle(flows: Flows, finishes: Finishes, state: State, now: float, drawn: int) -> None:
    """Solve what was disturbed, and move the ends of the flows whose rate changed."""
    drawn = solve(flows, drawn)
    state.counters[SOLVED] += drawn
    for index in range(drawn):
        flow = flows.scratch_flows[index]
        flows.scratch_in[flow] = False
        if state.state[flow] != SENDING or flows.num_hops[flow] == 0:
            continue
        gone = flows.scratch_old[flow] * (now - state.since[flow])
        state.nbytes[flow] = max(0.0, state.nbytes[flow] - gone)
        state.since[flow] = now
        rate = flows.rate[flow]
        set_finish(finishes, flow, now + state.nbytes[flow] / rate if rate > 0.0 else np.inf)


@njit(cache=True)
def _happen(w: World, number: int, now: float, drawn: int) -> int:
    """An arrival (number >= 0), the end of a port's overhead, or the start of a stream."""
    num_ports = len(w.ports.stream)
    if number < 0 and -number <= num_ports:
        return _send(w, -number - 1, now, drawn)
    if number >= 0:
        message, piece = number // MAX_PIECES, number % MAX_PIECES
        stream = w.messages.stream[w.messages.round[message]]
        first = _deliver(w, message, piece, now)
        last = first + 1
    else:
        stream = -number - 1 - num_ports
        first = w.streams.rank0[stream]
        last = first + w.streams.ranks[stream]
    for index in range(w.ports.of_rank_first[first], w.ports.of_rank_first[last]):
        drawn = _try(w, w.ports.of_rank[index], now, drawn)
    return drawn


@njit(cache=True)
def _deliver(w: World, message: int, piece: int, now: float) -> int:
    """Note an arrival; the row of the rank that may go on by it."""
    streams, messages, state = w.streams, w.messages, w.state
    where = messages.round[message]
    stream = messages.stream[where]
    rank = messages.dst[messages.pattern0[where] + message - messages.first[where]]
    ranks, groups, rounds = streams.ranks[stream], streams.groups[stream], streams.rounds[stream]
    each = where - streams.round0[stream]
    num, first = 1, 0
    if streams.by_chunk[stream]:
        first, num = messages.chunk[message], messages.num_chunks[message]
    for offset in range(num):
        chain = (piece * ranks + rank) * groups + (first + offset) % groups
        base = streams.left0[stream] + chain * rounds
        state.left[base + each] -= 1
        got = state.got[streams.chain0[stream] + chain]
        while got < rounds and state.left[base + got] == 0:
            got += 1
        state.got[streams.chain0[stream] + chain] = got
    row = streams.rank0[stream] + rank
    state.rank_end[row] = max(state.rank_end[row], now)
    if len(state.arrivals) > 0:
        state.arrivals[_record_row(w, stream, message, piece)] = now
    state.counters[ARRIVED] += 1
    job = streams.job[stream]
    state.job_left[job] -= 1
    if state.job_left[job] == 0 and state.repeats[job]:
        _restart(w, job, now)
    elif state.job_left[job] == 0:
        state.job_end[job] = now
        state.counters[JOBS_LEFT] -= 1
    return row


@njit(cache=True)
def _restart(w: World, job: int, now: float) -> None:
    """A background job starts again."""
    streams, state = w.streams, w.state
    state.job_left[job] = state.job_messages[job]
    for stream in range(len(streams.job)):
        if streams.job[stream] != job:
            continue
        rounds = streams.rounds[stream]
        chains = streams.pieces[stream] * streams.ranks[stream] * streams.groups[stream]
        first = streams.left0[stream]
        state.left[first : first + chains * rounds] = state.left_again[first : first + chains * rounds]
        for chain in range(chains):
            got, base = 0, first + chain * rounds
            while got < rounds and state.left[base + got] == 0:
                got += 1
            state.got[streams.chain0[stream] + chain] = got
        add_timer(w.timers, now, -len(w.ports.stream) - 1 - stream)
    for port in range(len(w.ports.stream)):
        if streams.job[w.ports.stream[port]] == job:
            state.row[port] = w.ports.first[port]
            state.piece[port] = 0


@njit(cache=True)
def _ready(w: World, stream: int, rank: int, message: int, piece: int) -> bool:
    """Whether the sender has all that the message waits for."""
    streams, messages, got = w.streams, w.messages, w.state.got
    where = messages.round[message]
    each, groups, ranks = where - streams.round0[stream], streams.groups[stream], streams.ranks[stream]
    base = streams.chain0[stream] + (piece * ranks + rank) * groups
    if streams.by_chunk[stream]:
        for offset in range(messages.num_chunks[message]):
            if got[base + (messages.chunk[message] + offset) % groups] < each:
                return False
    elif got[base] < each:
        return False
    if streams.serial[stream] and piece > 0:
        for group in range(groups):
            if got[base - ranks * groups + group] < messages.phase_end[where]:
                return False
    return True


@njit(cache=True)
def _try(w: World, port: int, now: float, drawn: int) -> int:
    """Start what can leave by a port, if it is idle."""
    ports, state = w.ports, w.state
    stream, rank = ports.stream[port], ports.rank[port]
    while state.state[port] == IDLE and state.row[port] < ports.first[port + 1]:
        message, piece = ports.message[state.row[port]], state.piece[port]
        if not _ready(w, stream, rank, message, piece):
            return drawn
        delay = w.noise.overhead_s[w.streams.rank0[stream] + rank]
        if w.noise.mean_s > 0.0:
            delay -= w.noise.mean_s * np.log(uniform(w.noise.seed, message, piece))
        if delay > 0.0:
            state.state[port] = STARTING
            add_timer(w.timers, now + delay, -port - 1)
            return drawn
        drawn = _send(w, port, now, drawn)
    return drawn


@njit(cache=True)
def uniform(seed: int, message: int, piece: int) -> float:
    """In (0, 1], from a hash of the message's number (splitmix64): no state, so no order to depend on."""
    x = np.uint64(seed) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(message) * np.uint64(0xD1B54A32D192ED03)
    x += np.uint64(piece) * np.uint64(0x8CB92BA72F3D8DD7)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    x = x ^ (x >> np.uint64(31))
    return (np.float64(x >> np.uint64(11)) + 1.0) / 9007199254740992.0


@njit(cache=True)
def _send(w: World, port: int, now: float, drawn: int) -> int:
    """The message at the head of a port leaves."""
    messages, state, flows = w.messages, w.state, w.flows
    message = w.ports.message[state.row[port]]
    where = messages.round[message]
    pattern = messages.pattern0[where] + message - messages.first[where]
    start, end = messages.route0[pattern], messages.route0[pattern + 1]
    state.state[port] = SENDING
    state.nbytes[port] = messages.nbytes[message]
    state.since[port] = now
    if len(state.starts) > 0:
        state.starts[_record_row(w, w.ports.stream[port], message, state.piece[port])] = now
    if end == start or messages.nbytes[message] == 0.0:
        flows.num_hops[port] = 0
        set_finish(w.finishes, port, now)
        return drawn
    state.counters[FLOW_EVENTS] += 1
    if insert(flows, port, messages.route, start, end) and flows.rate[port] > 0.0:
        set_finish(w.finishes, port, now + state.nbytes[port] / flows.rate[port])
        return drawn
    set_finish(w.finishes, port, np.inf)
    drawn = draw_in(flows, port, drawn)
    for hop in range(start, end):
        drawn = draw_in_all(flows, messages.route[hop], drawn, False)
    return drawn


@njit(cache=True)
def _leave(w: World, port: int, now: float, drawn: int) -> int:
    """The last byte of a port's message has left: free the wires, let it arrive, turn to the next one."""
    messages, state, flows = w.messages, w.state, w.flows
    row, piece, stream = state.row[port], state.piece[port], w.ports.stream[port]
    message = w.ports.message[row]
    where = messages.round[message]
    pattern = messages.pattern0[where] + message - messages.first[where]
    start, end = messages.route0[pattern], messages.route0[pattern + 1]
    clear_finish(w.finishes, port)
    if flows.num_hops[port] > 0:
        state.counters[FLOW_EVENTS] += 1
        if not remove(flows, port):
            for hop in range(start, end):
                drawn = draw_in_all(flows, messages.route[hop], drawn, True)
    latency = messages.latency_s[pattern] + forwarding_s(messages, flows.bytes_per_s, start, end, message)
    add_timer(w.timers, now + latency, message * MAX_PIECES + piece)
    state.state[port] = IDLE
    sender = w.streams.rank0[stream] + w.ports.rank[port]
    state.rank_end[sender] = max(state.rank_end[sender], now)
    row += 1
    if row == w.ports.segment_end[row - 1]:
        if piece + 1 < w.streams.pieces[stream]:
            piece += 1
            row = w.ports.segment_start[row - 1]
        else:
            piece = 0
    state.row[port], state.piece[port] = row, piece
    return drawn


@njit(cache=True)
def _record_row(w: World, stream: int, message: int, piece: int) -> int:
    first = w.messages.first[w.streams.round0[stream]]
    return w.state.record0[stream] + (message - first) * w.streams.pieces[stream] + piece  # type: ignore[no-any-return]


@njit(cache=True)
def forwarding_s(
    messages: Messages, bytes_per_s: NDArray[np.float64], start: int, end: int, message: int
) -> float:
    """What switches add that take a packet, or the whole message, in before they send on."""
    total = 0.0
    if len(messages.forward_nbytes) > 0:
        for hop in range(start, end - 1):
            resource = messages.route[hop]
            held = min(messages.forward_nbytes[resource], messages.nbytes[message])
            if held > 0.0:
                total += held / bytes_per_s[resource]
    return total
