"""World: all that the event loop reads and writes, from compiled jobs and the conditions that they meet.

Queues say what leaves by each port and in which order; counts say what each chain of a chip still waits for.
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from comms.errors import CommsError
from comms.networks.topology import Conditions, FloatArray, IntArray, run_starts
from comms.simulation.compiled import Compiled
from comms.simulation.heaps import TIMER, Finishes, Timers, add_timer, empty_finishes, empty_timers
from comms.simulation.sharing import Flows, empty_flows
from comms.simulation.work_budget import ENDLESS

# States of a port.
IDLE, STARTING, SENDING = 0, 1, 2

# Counters: messages that have arrived, flows that started or ended, flows solved anew, runs under way that are
# waited for, runs in `World.ended`, restarts of background runs, and how much work (the first three) may be done.
ARRIVED, FLOW_EVENTS, SOLVED, WAITED_FOR, ENDED, RESTARTS, MOST_WORK = 0, 1, 2, 3, 4, 5, 6
NUM_COUNTERS = 7
MOST_IN_A_ROUND = np.iinfo(np.uint16).max


QUEUE = np.dtype(  # what leaves by the ports: one row per message, port by port, in the order they leave
    [
        ("message", "i4"),
        ("start", "i4"),  # of its segment: the pieces of a segment follow each other,
        ("end", "i4"),  # and in a piece its messages
    ],
    align=True,
)
PORT = np.dtype(
    [
        ("row", "i8"),  # of the queue: its next message
        ("last", "i8"),  # of the queue, exclusive
        ("first", "i8"),
        ("piece", "i8"),
        ("nbytes", "f8"),  # of that message, still to leave
        ("since", "f8"),  # when that was so
        ("stream", "i4"),
        ("rank", "i4"),  # in the stream
        ("state", "i4"),
    ],
    align=True,
)
RANK = np.dtype(
    [
        ("port0", "i8"),  # rows of World.ports_of_rank
        ("port1", "i8"),
    ],
    align=True,
)


class Noise(NamedTuple):
    """An exponential delay before each message; none with a mean of 0."""

    mean_s: float
    seed: int


class World(NamedTuple):
    """Everything the loop reads and writes."""

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
    flows: Flows
    timers: Timers
    finishes: Finishes
    noise: Noise
    queue: NDArray[np.void]  # QUEUE
    port: NDArray[np.void]  # PORT
    ports_of_rank: NDArray[np.int32]
    rank: NDArray[np.void]  # RANK
    overhead_s: NDArray[np.float64]  # [rank rows] before each message
    run: NDArray[np.void]  # compiled.RUN
    ended: NDArray[np.int64]  # [runs] those that ended since the caller looked
    got: NDArray[np.int32]  # [chains] rounds fully received
    left: NDArray[np.uint16]  # [chains * rounds] messages still to come
    left_again: NDArray[np.uint16]  # the same as it was at first, for runs that start again
    counters: NDArray[np.int64]


class Changes(NamedTuple):
    """Capacities that change, in order of time."""

    at_s: NDArray[np.float64]
    resource: NDArray[np.int64]
    bytes_per_s: NDArray[np.float64]


def rates_under(compiled: Compiled, conditions: Conditions) -> FloatArray:
    """[resources] Bytes per second."""
    lowest: dict[int, float] = {}
    for wire, factor in conditions.factors.items():
        resource = int(compiled.shares[wire])
        lowest[resource] = min(factor, lowest.get(resource, np.inf))
    rates = compiled.bytes_per_s.copy()
    for resource, factor in lowest.items():
        rates[resource] *= factor
    return rates


def overheads(compiled: Compiled, conditions: Conditions) -> FloatArray:
    """[rank rows] What each sender adds before a message."""
    extra = [conditions.overhead_s.get(int(node), 0.0) for node in compiled.rank_node]
    return np.array(extra, dtype=np.float64)


def timed_changes(compiled: Compiled, conditions: Conditions) -> Changes:
    """The changes of capacity, in order of time."""
    changes = sorted(conditions.changes, key=lambda change: (change.at_s, change.wire))
    resource = compiled.shares[np.array([change.wire for change in changes], dtype=np.int64)]
    factor = np.array([change.factor for change in changes], dtype=np.float64)
    at_s = np.array([change.at_s for change in changes], dtype=np.float64)
    return Changes(at_s, resource, compiled.bytes_per_s[resource] * factor)


def grown(timers: Timers) -> Timers:
    """The same timers with twice the room."""
    heap = np.zeros(2 * len(timers.heap), dtype=TIMER)
    heap[: len(timers.heap)] = timers.heap
    return Timers(heap, timers.size)


def is_short_of_timers(world: World) -> bool:
    """Whether the loop stopped for want of timers: it keeps some free for the events of one instant."""
    in_reserve = 2 * len(world.port) + 2 * len(world.run) + 2
    return bool(world.timers.size[0] >= len(world.timers.heap) - in_reserve)


def first_world(compiled: Compiled, rates: FloatArray, conditions: Conditions, *, again: bool) -> World:
    """Nothing started yet. `again`: runs may be rewound."""
    work = compiled.work
    left = _still_to_come(compiled)
    queue, first = _queues(compiled)
    rank, ports_of_rank = _ranks(compiled)
    hops = int((work.edges["route1"] - work.edges["route0"]).max(initial=1))
    return World(
        **work._asdict(),
        flows=empty_flows(rates, compiled.num_ports, hops),
        timers=empty_timers(8 * compiled.num_ports + 4 * len(compiled.runs) + 1024),
        finishes=empty_finishes(compiled.num_ports),
        noise=Noise(conditions.noise_s, conditions.seed),
        queue=queue,
        port=_port_records(compiled, first),
        ports_of_rank=ports_of_rank,
        rank=rank,
        overhead_s=overheads(compiled, conditions),
        run=compiled.runs,
        ended=np.zeros(len(compiled.runs), dtype=np.int64),
        got=_received_at_first(compiled, left),
        left=left,
        left_again=left.copy() if again else left[:0],
        counters=np.array([0] * (NUM_COUNTERS - 1) + [ENDLESS], dtype=np.int64),
    )


def start_runs(world: World, numbers: Iterable[int]) -> None:
    """Let runs start at their start_s. A run without messages ends there."""
    for number in numbers:
        its = world.run[number]
        if its["messages"] == 0:
            its["end_s"] = its["start_s"]
            continue
        add_timer(world.timers, float(its["start_s"]), -len(world.port) - 1 - number)
        world.counters[WAITED_FOR] += not its["repeats"]


def _port_records(compiled: Compiled, first: IntArray) -> NDArray[np.void]:
    streams = compiled.work.streams
    port = np.zeros(compiled.num_ports, dtype=PORT)
    stream = np.repeat(np.arange(len(streams)), streams["ranks"])[compiled.port_rank]
    port["row"], port["first"], port["last"] = first[:-1], first[:-1], first[1:]
    port["stream"], port["rank"] = stream, compiled.port_rank - streams["rank0"][stream]
    return port


def _ranks(compiled: Compiled) -> tuple[NDArray[np.void], NDArray[np.int32]]:
    """Records of the ranks, and their ports one rank after another."""
    rank = np.zeros(len(compiled.rank_node), dtype=RANK)
    ends = np.cumsum(np.bincount(compiled.port_rank, minlength=len(rank)))
    rank["port0"][1:], rank["port1"] = ends[:-1], ends
    return rank, np.argsort(compiled.port_rank, kind="stable").astype(np.int32)


def _queues(compiled: Compiled) -> tuple[NDArray[np.void], IntArray]:
    """The queue rows of all ports, port by port, and where each port's start ([ports + 1])."""
    work = compiled.work
    rounds = work.rounds
    shift = rounds["edge0"] - rounds["first"]
    port = work.edges["port"][shift[work.round_of] + np.arange(len(work.round_of))].astype(np.int32)
    order = np.argsort(port, kind="stable").astype(np.int32)
    first = np.zeros(compiled.num_ports + 1, dtype=np.int64)
    np.cumsum(np.bincount(port, minlength=compiled.num_ports), out=first[1:])
    stream = work.streams[rounds["stream"]]
    first_round = np.where(stream["serial"], rounds["phase_start"] + stream["round0"], np.arange(len(rounds)))
    segment = first_round.astype(np.int32)[work.round_of]
    queue = np.zeros(len(order), dtype=QUEUE)
    queue["message"] = order
    queue["start"], queue["end"] = _segments(port[order], segment[order])
    return queue, first


def _segments(port: NDArray[np.int32], segment: NDArray[np.int32]) -> tuple[IntArray, IntArray]:
    """For each row, where its run of equal (port, segment) starts and ends."""
    firsts = run_starts(port, segment)
    lengths = np.diff(firsts, append=len(port))
    return np.repeat(firsts, lengths), np.repeat(firsts + lengths, lengths)


def _still_to_come(compiled: Compiled) -> NDArray[np.uint16]:
    """[chains and rounds] Messages that each chain gets in each round."""
    left = np.zeros(compiled.num_left, dtype=np.uint16)
    work = compiled.work
    for stream in work.streams:
        pieces, ranks, groups = (int(stream[name]) for name in ("pieces", "ranks", "groups"))
        size = pieces * ranks * groups * int(stream["rounds"])
        table = left[stream["left0"] : stream["left0"] + size].reshape(pieces, ranks, groups, -1)
        known: dict[int, NDArray[np.int64]] = {}
        for each in work.rounds[stream["round0"] : stream["round0"] + stream["rounds"]]:
            first, last, edge0 = int(each["first"]), int(each["last"]), int(each["edge0"])
            if stream["by_chunk"] or edge0 not in known:
                dst = work.edges["dst"][edge0 : edge0 + last - first].astype(np.int64)
                chunks = (work.chunk[first:last], work.num_chunks[first:last]) if stream["by_chunk"] else None
                known[edge0] = _counts(dst, ranks, groups, chunks)
            table[:, :, :, each["number"]] = known[edge0]
    return left


def _counts(
    dst: IntArray, ranks: int, groups: int, chunks: tuple[NDArray[np.int32], NDArray[np.int32]] | None
) -> NDArray[np.int64]:
    """[ranks, groups] Messages of one round."""
    if chunks is None:
        counts = np.bincount(dst, minlength=ranks)
    else:
        first, num = chunks
        within = np.arange(num.sum()) - np.repeat(np.cumsum(num) - num, num)
        chunk = (np.repeat(first, num) + within) % groups
        counts = np.bincount(np.repeat(dst, num) * groups + chunk, minlength=ranks * groups)
    if counts.max(initial=0) > MOST_IN_A_ROUND:
        problem = f"{counts.max()} messages to one chip in one round"
        raise CommsError(
            problem, "full fidelity", f"at most {MOST_IN_A_ROUND}: choose another algorithm or fidelity"
        )
    return counts.reshape(ranks, groups)


def _received_at_first(compiled: Compiled, left: NDArray[np.uint16]) -> NDArray[np.int32]:
    """[chains] Rounds at the start in which a chain gets nothing: it need not wait for them."""
    got = np.zeros(compiled.num_chains, dtype=np.int32)
    for stream in compiled.work.streams:
        chains = int(stream["pieces"] * stream["ranks"] * stream["groups"])
        rounds, first = int(stream["rounds"]), int(stream["left0"])
        if not rounds:
            continue
        waits = left[first : first + chains * rounds].reshape(chains, rounds) > 0
        none = np.where(waits.any(axis=1), waits.argmax(axis=1), rounds)
        got[stream["chain0"] : stream["chain0"] + chains] = none
    return got
