"""Events: full fidelity, message by message, with max-min fair sharing of wires. Compiled.

Three kinds of things happen: a message arrives (its receiver may go on), a flow ends (its port and its share of
the wires are free), a wire's capacity changes. Whatever happens at one instant is done before rates are solved
anew, and only for the flows it disturbs (`simulation.sharing`); a flow alone on its wires costs no solving at all.

Not modelled: packets, queues in switches, loss and congestion control, which max-min fairness stands for.
"""

import numpy as np
from numpy.typing import NDArray

from comms.simulation.compiled import MAX_PIECES
from comms.simulation.heaps import Finishes, Timers, add_timer, clear_finish, set_finish, take_timer
from comms.simulation.jit import compiled, compiled_inside, wide
from comms.simulation.sharing import draw_in, draw_in_all, insert, remove, solve
from comms.simulation.world import (
    ARRIVED,
    ENDED,
    FLOW_EVENTS,
    IDLE,
    MOST_WORK,
    RESTARTS,
    SENDING,
    SOLVED,
    STARTING,
    WAITED_FOR,
    Changes,
    World,
)

# Relative, a few hundred roundings. What happens together must stay so: chips that share links in lockstep are not
# stable, one that is ahead by a rounding gets ahead by some times that in every round.
SAME_INSTANT = 1e-13

MOST_RESTARTS = 10**6  # of background runs while others are waited for, which then never end


@compiled
def next_instant(timers: Timers, finishes: Finishes, changes: Changes, next_change: int) -> float:
    """When something happens next; inf where nothing does any more. (To pass the whole world is slow.)"""
    now = np.inf  # nothing can happen any more: runs that are still waited for never end
    if timers.size[0] > 0:
        now = timers.heap[0].time
    if finishes.size[0] > 0:
        now = min(now, finishes.port[finishes.heap[0]].time)
    if next_change < len(changes.at_s):
        now = min(now, changes.at_s[next_change])
    return now


@compiled
def work_done(w: World) -> int:
    """Messages that arrived, flows that started, ended or were solved anew."""
    return w.counters[ARRIVED] + w.counters[FLOW_EVENTS] + w.counters[SOLVED]  # type: ignore[no-any-return]


@compiled
def run(w: World, changes: Changes, next_change: int, until_s: float, run_by_run: bool) -> int:
    """On until all runs that are waited for have ended, or any (`run_by_run`), or nothing happens by `until_s`.

    It also stops after MOST_WORK, and when timers need more room. Returns the next change of capacity.
    """
    timers, finishes = w.timers, w.finishes
    # What the events of one instant may add: a timer for each port, one for each run that starts again.
    room = len(timers.heap) - 2 * len(w.port) - 2 * len(w.run) - 2
    # The caller doubles the heap and comes back: numba cannot replace an array of a named tuple.
    while w.counters[WAITED_FOR] > 0 and timers.size[0] < room:
        if (run_by_run and w.counters[ENDED] > 0) or w.counters[RESTARTS] > MOST_RESTARTS:
            break
        now = next_instant(timers, finishes, changes, next_change)
        done = w.counters[ARRIVED] + w.counters[FLOW_EVENTS] + w.counters[SOLVED]
        if now == np.inf or now > until_s or done >= w.counters[MOST_WORK]:
            break
        # Ends of flows come first, so that a port that falls free and the message that it sends next are solved
        # together. What arrives then may send a message of no bytes, which ends at this instant too: the next turn
        # finds it, as time has not gone on.
        until = now * (1.0 + SAME_INSTANT)
        drawn = wide(0)
        while (
            finishes.size[0] > 0 and finishes.port[finishes.heap[0]].time <= until and timers.size[0] < room
        ):
            port = finishes.heap[0]
            drawn = _leave(w, port, now, drawn)
            drawn = _try(w, port, now, drawn)
        while timers.size[0] > 0 and timers.heap[0].time <= until and timers.size[0] < room:
            drawn = _happen(w, take_timer(timers), now, drawn)
        while next_change < len(changes.at_s) and changes.at_s[next_change] <= until:
            resource = changes.resource[next_change]
            w.flows.resource[resource].bytes_per_s = changes.bytes_per_s[next_change]
            drawn = draw_in_all(w.flows, resource, drawn, False)
            next_change += 1
        if drawn > 0:
            _settle(w, now, drawn)
    return next_change


@compiled_inside
def _settle(w: World, now: float, drawn: int) -> None:
    """Solve what was disturbed, and move the ends of the flows whose rate changed."""
    flows = w.flows
    drawn = solve(flows, drawn)
    w.counters[SOLVED] += drawn
    for index in range(drawn):
        number = flows.drawn[index]
        flow = flows.flow[number]
        port = w.port[number]
        flow.drawn = False
        # Drawn in, and gone again at the same instant.
        if port.state != SENDING or flow.hops == 0:
            continue
        # What is left to send is brought up to date only where the rate changes: a flow that keeps its rate keeps
        # its end, and nothing is added up that could round differently.
        port.nbytes = max(0.0, port.nbytes - flow.old_rate * (now - port.since))
        port.since = now
        set_finish(w.finishes, number, now + port.nbytes / flow.rate if flow.rate > 0.0 else np.inf)


@compiled_inside
def _happen(w: World, number: int, now: float, drawn: int) -> int:
    """An arrival (number >= 0), the end of a port's overhead, or the start of a run."""
    # One number for three kinds of events. Ties are broken by it: at one instant runs start, then overheads end, then
    # messages arrive, each kind in an order that does not depend on what was put into the heap first.
    num_ports = len(w.port)
    if number >= 0:
        rank = _deliver(w, number // MAX_PIECES, number % MAX_PIECES, now)
        return _try_all(w, rank, rank + 1, now, drawn)
    if -number <= num_ports:
        return _send(w, -number - 1, now, drawn)
    started = w.run[-number - 1 - num_ports]
    for each in range(started.stream0, started.stream1):
        stream = w.streams[each]
        first = stream.rank0 + started.group * stream.members
        drawn = _try_all(w, first, first + stream.members, now, drawn)
    return drawn


@compiled_inside
def _try_all(w: World, first: int, last: int, now: float, drawn: int) -> int:
    """Start what can leave from ranks first .. last - 1."""
    for rank in range(first, last):
        for index in range(w.rank[rank].port0, w.rank[rank].port1):
            drawn = _try(w, wide(w.ports_of_rank[index]), now, drawn)
    return drawn


@compiled_inside
def _deliver(w: World, message: int, piece: int, now: float) -> int:
    """Note an arrival; the row of the rank that may go on by it."""
    each = w.rounds[w.round_of[message]]
    stream = w.streams[each.stream]
    dst = w.edges[each.edge0 + message - each.first].dst
    chunk, num = 0, 1
    if stream.by_chunk:
        chunk, num = w.chunk[message], w.num_chunks[message]
    for offset in range(num):
        chain = (piece * stream.ranks + dst) * stream.groups + (chunk + offset) % stream.groups
        base = stream.left0 + chain * stream.rounds
        w.left[base + each.number] -= 1
        # A later round may be complete before an earlier one; a chain goes on when all up to it are.
        got = w.got[stream.chain0 + chain]
        while got < stream.rounds and w.left[base + got] == 0:
            got += 1
        w.got[stream.chain0 + chain] = got
    w.counters[ARRIVED] += 1
    number = stream.run0 + dst // stream.members
    its = w.run[number]
    its.left -= 1
    if its.left == 0:
        _end(w, number, now)
    return stream.rank0 + dst  # type: ignore[no-any-return]


@compiled_inside
def _end(w: World, number: int, now: float) -> None:
    """All messages of a run have arrived."""
    if w.run[number].repeats:
        # By a timer, as every run starts: its first messages wait their turn at this instant.
        rewind(w, number)
        w.run[number].start_s = now
        w.counters[RESTARTS] += 1
        add_timer(w.timers, now, -len(w.port) - 1 - number)
        return
    w.run[number].end_s = now
    w.ended[w.counters[ENDED]] = number
    w.counters[ENDED] += 1
    w.counters[WAITED_FOR] -= 1


@compiled
def rewind(w: World, number: int) -> None:
    """Make a run ready to start again."""
    its = w.run[number]
    its.left = its.messages
    for each in range(its.stream0, its.stream1):
        stream = w.streams[each]
        first = its.group * stream.members
        for piece in range(stream.pieces):
            base = (piece * stream.ranks + first) * stream.groups
            for chain in range(base, base + stream.members * stream.groups):
                left = stream.left0 + chain * stream.rounds
                for row in range(left, left + stream.rounds):
                    w.left[row] = w.left_again[row]
                got = 0
                while got < stream.rounds and w.left[left + got] == 0:
                    got += 1
                w.got[stream.chain0 + chain] = got
        for rank in range(stream.rank0 + first, stream.rank0 + first + stream.members):
            for index in range(w.rank[rank].port0, w.rank[rank].port1):
                port = w.port[w.ports_of_rank[index]]
                port.row, port.piece = port.first, 0


@compiled_inside
def _ready(w: World, port: int, message: int) -> bool:
    """Whether the sender has all that the message at the head of its port waits for."""
    each, sender = w.rounds[w.round_of[message]], w.port[port]
    stream, piece = w.streams[each.stream], sender.piece
    base = stream.chain0 + (piece * stream.ranks + sender.rank) * stream.groups
    if stream.by_chunk:
        for offset in range(w.num_chunks[message]):
            if w.got[base + (w.chunk[message] + offset) % stream.groups] < each.number:
                return False
    elif w.got[base] < each.number:
        return False
    # A chip starts on a piece of a phase when it is done with the piece before, in all chunks.
    if stream.serial and piece > 0:
        before = base - stream.ranks * stream.groups
        for group in range(stream.groups):
            if w.got[before + group] < each.phase_end:
                return False
    return True


@compiled_inside
def _try(w: World, number: int, now: float, drawn: int) -> int:
    """Start what can leave by a port, if it is idle."""
    port = w.port[number]
    if port.state != IDLE or port.row == port.last:
        return drawn
    message = wide(w.queue[port.row].message)
    if not _ready(w, number, message):
        return drawn
    delay = w.overhead_s[w.streams[port.stream].rank0 + port.rank]
    # -log of a uniform number is exponential. (What is drawn belongs to the message, not to the order of events.)
    if w.noise.mean_s > 0.0:
        delay -= w.noise.mean_s * np.log(uniform(w.noise.seed, message, port.piece, _started(w, number)))
    if delay > 0.0:
        port.state = STARTING
        add_timer(w.timers, now + delay, -number - 1)
        return drawn
    return _send(w, number, now, drawn)


@compiled_inside
def _started(w: World, number: int) -> float:
    """When the run of a port's messages started: what happens again does not happen the same way."""
    stream = w.streams[w.port[number].stream]
    return w.run[stream.run0 + w.port[number].rank // stream.members].start_s  # type: ignore[no-any-return]


@compiled_inside
def _send(w: World, number: int, now: float, drawn: int) -> int:
    """The message at the head of a port leaves."""
    flows = w.flows
    port = w.port[number]
    message = wide(w.queue[port.row].message)
    each = w.rounds[w.round_of[message]]
    edge = w.edges[each.edge0 + message - each.first]
    nbytes = w.nbytes[message]
    port.state, port.nbytes, port.since = SENDING, nbytes, now
    if edge.route0 == edge.route1 or nbytes == 0.0:
        set_finish(w.finishes, number, now)
        return drawn
    w.counters[FLOW_EVENTS] += 1
    # The common case of schedules made for their network: alone on all its wires, so its end is known at once.
    alone = insert(flows, number, w.route, edge.route0, edge.route1)
    rate = flows.flow[number].rate
    if alone and rate > 0.0:
        set_finish(w.finishes, number, now + nbytes / rate)
        return drawn
    # A newcomer may take from everyone on its wires. Its own end is set when rates are solved.
    set_finish(w.finishes, number, np.inf)
    drawn = draw_in(flows, number, drawn)
    for hop in range(edge.route0, edge.route1):
        drawn = draw_in_all(flows, wide(w.route[hop]), drawn, False)
    return drawn


@compiled_inside
def _leave(w: World, number: int, now: float, drawn: int) -> int:
    """The last byte of a port's message has left: free the wires, let it arrive, turn to the next one."""
    flows = w.flows
    port = w.port[number]
    queued = w.queue[port.row]
    each = w.rounds[w.round_of[queued.message]]
    edge = w.edges[each.edge0 + queued.message - each.first]
    clear_finish(w.finishes, number)
    if flows.flow[number].hops > 0:
        w.counters[FLOW_EVENTS] += 1
        # Only flows whose bottleneck was here can gain from its going; all others are held back elsewhere.
        if not remove(flows, number):
            for hop in range(edge.route0, edge.route1):
                drawn = draw_in_all(flows, wide(w.route[hop]), drawn, True)
    came = (
        now
        + edge.latency_s
        + forwarding_s(
            w.forward_nbytes, w.route, flows.resource, edge.route0, edge.route1, w.nbytes[queued.message]
        )
    )
    add_timer(w.timers, came, queued.message * MAX_PIECES + port.piece)
    port.state = IDLE
    # A segment is sent once for each piece, which keeps the queue as short as one piece of it.
    port.row += 1
    if port.row == queued.end:
        if port.piece + 1 < w.streams[port.stream].pieces:
            port.piece += 1
            port.row = queued.start
        else:
            port.piece = 0
    return drawn


@compiled_inside
def uniform(seed: int, message: int, piece: int, started_s: float) -> float:
    """In (0, 1], from a hash of the message and its run's start (splitmix64): no state, no order to depend on."""
    x = np.uint64(seed + 1) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(message) * np.uint64(
        0xD1B54A32D192ED03
    )
    x += np.uint64(piece) * np.uint64(0x8CB92BA72F3D8DD7)
    x += np.uint64(np.int64(started_s * 1e12)) * np.uint64(0xAEF17502108EF2D9)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    x = x ^ (x >> np.uint64(31))
    return (np.float64(x >> np.uint64(11)) + 1.0) / 9007199254740992.0


@compiled_inside
def forwarding_s(
    forward_nbytes: NDArray[np.float64],
    route: NDArray[np.int32],
    resources: NDArray[np.void],
    start: int,
    end: int,
    nbytes: float,
) -> float:
    """What switches add that take a packet, or the whole message, in before they send on."""
    total = 0.0
    if len(forward_nbytes) > 0:
        for hop in range(start, end - 1):
            held = min(forward_nbytes[route[hop]], nbytes)
            if held > 0.0:
                total += held / resources[route[hop]].bytes_per_s
    return total
