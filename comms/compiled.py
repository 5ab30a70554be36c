"""Compiled: jobs on a topology as flat arrays, which is what the compiled loops of full fidelity read.

A stream is one channel of one job. Streams number their ranks, rounds, pieces and groups from 0; the arrays of
all streams are laid end to end. A group is what waits together: all chunks of a channel, or each chunk in a
channel `by_chunk`. A port is one wire by which one rank of one stream leaves: its messages go one after another,
so a port has at most one message under way. A resource is a wire's capacity (`Wires.shares`).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from comms.errors import CommsError
from comms.links import PLAIN, Protocol
from comms.schedule import Channel, Order, Pattern, Round, Schedule
from comms.topology import FloatArray, IntArray, Topology, Wires, route_latencies

Int32Array = NDArray[np.int32]


@dataclass(frozen=True, slots=True, eq=False)
class Job:
    """One collective to be timed: rank i of the schedule sits on node places[i]."""

    schedule: Schedule
    places: IntArray
    nbytes: float
    start_s: float = 0.0
    repeats: bool = False  # background: starts again when it is done, and nobody waits for it
    protocol: Protocol = PLAIN


class Streams(NamedTuple):
    """One row per stream; `*0` is where its rows start in the arrays that it indexes."""

    job: IntArray
    ranks: IntArray
    pieces: IntArray
    groups: IntArray
    rounds: IntArray
    round0: IntArray
    rank0: IntArray
    chain0: IntArray  # chain (piece, rank, group) is row chain0 + (piece * ranks + rank) * groups + group
    left0: IntArray  # what a chain still gets in round s is row left0 + chain * rounds + s
    start_s: FloatArray
    serial: NDArray[np.bool_]
    by_chunk: NDArray[np.bool_]


class Messages(NamedTuple):
    """Rounds point to rows of patterns (who, by which route) and of messages (how much, which chunks)."""

    pattern0: IntArray  # [rounds] first row in the pattern arrays
    first: IntArray  # [rounds + 1] first message of each round, pieces not counted
    phase_start: Int32Array  # [rounds] number of the first round of its phase, in the stream
    phase_end: Int32Array  # [rounds] number after the last round of its phase, in the stream
    stream: Int32Array  # [rounds]
    src: Int32Array  # [pattern rows] rank in the stream
    dst: Int32Array
    port: Int32Array
    latency_s: FloatArray
    route0: IntArray  # [pattern rows + 1]
    route: Int32Array  # resources
    nbytes: FloatArray  # [messages] of one piece
    round: Int32Array  # [messages]
    chunk: Int32Array  # [messages], empty where no channel is by_chunk
    num_chunks: Int32Array
    forward_nbytes: FloatArray  # [resources] as Wires.forward_nbytes; empty where every switch cuts through


@dataclass(frozen=True, slots=True, eq=False)
class Compiled:
    """All jobs, ready to be timed."""

    streams: Streams
    messages: Messages
    num_ports: int
    num_chains: int
    num_left: int
    num_jobs: int
    port_rank: Int32Array  # [ports] row of the rank that sends by it, over all streams
    rank_node: IntArray  # [rank rows] node of the topology
    bytes_per_s: FloatArray  # [resources]
    crossings: FloatArray = field(
        repr=False
    )  # [resources] bytes that all messages bring, repeats not counted

    @property
    def num_messages(self) -> int:
        """Messages of all jobs, with every piece counted."""
        m, streams = self.messages, self.streams
        per_round = np.diff(m.first)
        return int((per_round * streams.pieces[m.stream]).sum())


def compile_jobs(topology: Topology, jobs: Sequence[Job]) -> Compiled:
    """Routes, ports and sizes of everything that the jobs send. Raises CommsError for impossible places."""
    wires = topology.wires()
    building = _Building(topology, wires)
    for number, job in enumerate(jobs):
        _check_places(topology, job)
        for channel in job.schedule.channels:
            building.add(number, job, channel)
    return building.done(len(jobs))


def _check_places(topology: Topology, job: Job) -> None:
    ranks = job.schedule.num_ranks + job.schedule.num_helpers
    if len(job.places) != ranks:
        problem = f"{len(job.places)} places for {ranks} ranks"
        raise CommsError(problem, job.schedule.algorithm, "name one node per rank of the schedule")
    if len(np.unique(job.places)) != ranks:
        raise CommsError("two ranks on one node", job.schedule.algorithm, "give every rank a node of its own")
    if ranks and (job.places.min() < 0 or job.places.max() >= topology.num_nodes):
        outside = int(job.places[(job.places < 0) | (job.places >= topology.num_nodes)][0])
        problem = f"node {outside} is outside a topology of {topology.num_nodes} nodes"
        raise CommsError(problem, job.schedule.algorithm, "place ranks on nodes that there are")
    if job.nbytes < 0:
        raise CommsError(f"{job.nbytes} bytes", job.schedule.algorithm, "give a size of zero or more")


class _Building:
    """Columns that grow stream by stream."""

    def __init__(self, topology: Topology, wires: Wires) -> None:
        self.topology, self.wires = topology, wires
        self.streams: list[tuple[float, ...]] = []
        self.rounds: list[tuple[NDArray[np.generic], ...]] = []
        self.patterns: list[tuple[NDArray[np.generic], ...]] = []
        self.sizes: list[FloatArray] = []
        self.chunks: list[tuple[IntArray, IntArray]] = []
        self.rank_node: list[IntArray] = []
        self.port_rank: list[IntArray] = []
        self.num = dict.fromkeys(("rounds", "ranks", "chains", "left", "pattern", "messages", "ports"), 0)
        self.num["route"] = 0
        self.crossings = np.zeros(wires.num_wires)

    def add(self, number: int, job: Job, channel: Channel) -> None:
        """One more stream."""
        rounds = [(each, phase) for phase in _phase_bounds(channel) for each in phase[2]]
        ranks, pieces = len(job.places), max(1, channel.pieces)
        groups = job.schedule.num_chunks if channel.by_chunk else 1
        chains = pieces * ranks * groups
        order = channel.order is Order.SERIAL
        self.streams.append(
            (number, ranks, pieces, groups, len(rounds), self.num["rounds"], self.num["ranks"])
            + (self.num["chains"], self.num["left"], job.start_s, order, channel.by_chunk)
        )
        patterns = self._patterns([each.pattern for each, _ in rounds], job)
        self._add_rounds(rounds, patterns, job, pieces)
        self.rank_node.append(np.asarray(job.places, dtype=np.int64))
        self.num["rounds"] += len(rounds)
        self.num["ranks"] += ranks
        self.num["chains"] += chains
        self.num["left"] += chains * len(rounds)

    def _patterns(self, patterns: Sequence[Pattern], job: Job) -> dict[int, int]:
        """First row of each distinct pattern; ports are numbered per stream, over all its patterns."""
        distinct = {id(pattern): pattern for pattern in patterns}
        routed = {key: self._routed(pattern, job) for key, pattern in distinct.items()}
        keys = [_port_keys(p, routed[key][0], self.wires.num_wires) for key, p in distinct.items()]
        every = np.unique(np.concatenate(keys)) if keys else np.zeros(0, dtype=np.int64)
        rows: dict[int, int] = {}
        for (key, pattern), wanted in zip(distinct.items(), keys, strict=True):
            rows[key] = self.num["pattern"]
            _, offsets, resources, latency = routed[key]
            port = np.searchsorted(every, wanted) + self.num["ports"]
            route0 = offsets[:-1] + self.num["route"]
            self.patterns.append((pattern.src, pattern.dst, port, latency, route0, resources))
            self.num["pattern"] += len(pattern.src)
            self.num["route"] += len(resources)
        self.port_rank.append(every // (self.wires.num_wires + 1) + self.num["ranks"])
        self.num["ports"] += len(every)
        return rows

    def _routed(self, pattern: Pattern, job: Job) -> tuple[IntArray, IntArray, IntArray, FloatArray]:
        routes = self.topology.routes(job.places[pattern.src], job.places[pattern.dst])
        resources = self.wires.shares[routes.wires]
        heads = np.full(routes.num_messages, -1, dtype=np.int64)
        taken = routes.offsets[1:] > routes.offsets[:-1]
        heads[taken] = resources[routes.offsets[:-1][taken]]
        latency = route_latencies(self.wires, routes) + job.protocol.latency_s
        return heads, routes.offsets, resources, latency

    def _add_rounds(
        self,
        rounds: Sequence[tuple[Round, tuple[int, int, tuple[Round, ...]]]],
        patterns: dict[int, int],
        job: Job,
        pieces: int,
    ) -> None:
        lengths = np.array([len(each.pattern.src) for each, _ in rounds], dtype=np.int64)
        first = np.cumsum(lengths) - lengths + self.num["messages"]
        pattern0 = np.array([patterns[id(each.pattern)] for each, _ in rounds], dtype=np.int64)
        start = np.array([phase[0] for _, phase in rounds], dtype=np.int64)
        end = np.array([phase[1] for _, phase in rounds], dtype=np.int64)
        stream = np.full(len(rounds), len(self.streams) - 1, dtype=np.int64)
        self.rounds.append((pattern0, first, start, end, stream))
        scale = job.nbytes / pieces / job.protocol.share
        for each, _ in rounds:
            self.sizes.append(job.schedule.message_shares(each) * scale)
            self.chunks.append((each.first, each.count))
        self.num["messages"] += int(lengths.sum())
        self._count_crossings(rounds, patterns, job, pieces)

    def _count_crossings(
        self, rounds: Sequence[tuple[Round, object]], patterns: dict[int, int], job: Job, pieces: int
    ) -> None:
        """Bytes over each resource, from the sum of a pattern's rounds: one pass per distinct pattern."""
        totals: dict[int, FloatArray] = {}
        sizes = self.sizes[len(self.sizes) - len(rounds) :]
        for (each, _), nbytes in zip(rounds, sizes, strict=True):
            row = patterns[id(each.pattern)]
            totals[row] = totals[row] + nbytes if row in totals else nbytes.copy()
        starts = dict(self._pattern_blocks())
        for row, total in totals.items():
            _, _, _, _, route0, resources = self.patterns[starts[row]]
            hops = np.diff(np.concatenate([route0 - route0[:1], [len(resources)]])) if len(route0) else route0
            np.add.at(self.crossings, resources, np.repeat(total * pieces, hops))

    def _pattern_blocks(self) -> Iterator[tuple[int, int]]:
        row = 0
        for block, columns in enumerate(self.patterns):
            yield row, block
            row += len(columns[0])

    def done(self, num_jobs: int) -> Compiled:
        """Everything laid end to end."""
        columns = list(zip(*self.streams, strict=True)) if self.streams else [()] * 12
        kinds = [np.int64] * 9 + [np.float64, np.bool_, np.bool_]
        streams = Streams(*(np.array(c, dtype=k) for c, k in zip(columns, kinds, strict=True)))
        pattern0, first, start, end, stream = _joined(self.rounds, 5)
        src, dst, port, latency, route0, route = _joined(self.patterns, 6)
        by_chunk = bool(streams.by_chunk.any())
        chunk, num_chunks = _joined(self.chunks if by_chunk else [], 2)
        forward = self.wires.forward_nbytes
        messages = Messages(
            pattern0=pattern0.astype(np.int64),
            first=np.append(first, self.num["messages"]).astype(np.int64),
            phase_start=start.astype(np.int32),
            phase_end=end.astype(np.int32),
            stream=stream.astype(np.int32),
            src=src.astype(np.int32),
            dst=dst.astype(np.int32),
            port=port.astype(np.int32),
            latency_s=latency.astype(np.float64),
            route0=np.append(route0, self.num["route"]).astype(np.int64),
            route=route.astype(np.int32),
            nbytes=np.concatenate(self.sizes) if self.sizes else np.zeros(0),
            round=np.repeat(
                np.arange(len(first), dtype=np.int32), np.diff(np.append(first, self.num["messages"]))
            ),
            chunk=chunk.astype(np.int32),
            num_chunks=num_chunks.astype(np.int32),
            forward_nbytes=forward if forward.any() else np.zeros(0),
        )
        return Compiled(
            streams=streams,
            messages=messages,
            num_ports=self.num["ports"],
            num_chains=self.num["chains"],
            num_left=self.num["left"],
            num_jobs=num_jobs,
            port_rank=_column(self.port_rank).astype(np.int32),
            rank_node=_column(self.rank_node).astype(np.int64),
            bytes_per_s=self.wires.bytes_per_s.astype(np.float64),
            crossings=self.crossings,
        )


def _phase_bounds(channel: Channel) -> Iterator[tuple[int, int, tuple[Round, ...]]]:
    start = 0
    for phase in channel.phases:
        yield start, start + len(phase), phase
        start += len(phase)


def _port_keys(pattern: Pattern, heads: IntArray, num_wires: int) -> IntArray:
    """One number per (rank, resource by which it leaves); messages without a wire have a port of their own."""
    keys: IntArray = np.asarray(pattern.src, dtype=np.int64) * (num_wires + 1) + heads + 1
    return keys


def _joined(blocks: Sequence[tuple[NDArray[np.generic], ...]], width: int) -> list[NDArray[np.generic]]:
    if not blocks:
        return [np.zeros(0, dtype=np.int64) for _ in range(width)]
    return [_column(list(column)) for column in zip(*blocks, strict=True)]


def _column(blocks: Sequence[NDArray[np.generic]]) -> NDArray[np.generic]:
    return np.concatenate(blocks) if blocks else np.zeros(0, dtype=np.int64)
