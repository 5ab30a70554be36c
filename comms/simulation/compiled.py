"""Compiled: jobs on a topology as flat arrays, which is what the compiled loops of full fidelity read.

A stream is one channel of one job, for all its groups; a run is one group of one job. Streams number their ranks,
rounds, pieces and chunk groups from 0; the arrays of all streams are laid end to end. A chunk group is what waits
together: all chunks of a channel, or each chunk in a channel `by_chunk`. A port is one wire by which one rank of one
stream leaves: its messages go one after another, one at a time. A message that spreads over several ways is as many
messages, each with a part of its bytes and a port of its own. A resource is a wire's capacity (`Wires.shares`).
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from comms.collectives.schedule import Channel, Pattern, PieceOrder, Round, Schedule
from comms.errors import CommsError
from comms.networks.links import PLAIN, Protocol
from comms.networks.topology import (
    FloatArray,
    IntArray,
    Routes,
    Topology,
    Wires,
    repeats_before,
    route_latencies,
)

Int32Array = NDArray[np.int32]
MAX_PIECES = 1 << 20  # a timer's number holds a message and a piece


@dataclass(frozen=True, slots=True, eq=False)
class CollectiveJob:
    """One collective to be timed: rank i of the schedule sits on node places[i].

    Several groups may do the same at once, each starting and ending for itself: places[group, i].
    """

    schedule: Schedule
    places: IntArray  # [ranks] or [groups, ranks]
    nbytes: float
    start_s: float = 0.0
    repeats: bool = False  # background: starts again when it is done, and is not waited for
    protocol: Protocol = PLAIN  # of messages that cross the outermost tier,
    inside: tuple[tuple[str, Protocol], ...] = ()  # and of those that go no further than these tiers, by name

    @property
    def by_group(self) -> IntArray:
        """[groups, ranks] The places."""
        return np.atleast_2d(np.asarray(self.places, dtype=np.int64))


STREAM = np.dtype(
    [
        ("ranks", "i8"),  # of all its groups
        ("members", "i8"),  # ranks of one group
        ("run0", "i8"),  # the run of its first group; a run is one group of a job
        ("pieces", "i8"),
        ("groups", "i8"),
        ("rounds", "i8"),
        ("round0", "i8"),  # first row among the rounds
        ("rank0", "i8"),  # first row among the ranks
        # chain (piece, rank, group) is row chain0 + (piece * ranks + rank) * groups + group
        ("chain0", "i8"),
        ("left0", "i8"),  # what a chain still gets in round s is row left0 + chain * rounds + s
        ("serial", "?"),
        ("by_chunk", "?"),
    ],
    align=True,
)
ROUND = np.dtype(
    [
        ("edge0", "i8"),  # message i of the round goes along edge edge0 + i
        ("first", "i8"),  # its messages, pieces not counted
        ("last", "i8"),  # exclusive
        ("stream", "i4"),
        ("number", "i4"),  # in its stream
        ("phase_start", "i4"),  # number of the first round of its phase
        ("phase_end", "i4"),  # exclusive
    ],
    align=True,
)
RUN = np.dtype(
    [
        ("job", "i8"),
        ("group", "i8"),
        ("stream0", "i8"),
        ("stream1", "i8"),  # exclusive
        ("messages", "i8"),
        ("left", "i8"),  # messages still to arrive
        ("start_s", "f8"),
        ("end_s", "f8"),
        ("repeats", "?"),
    ],
    align=True,
)
EDGE = np.dtype(  # who sends to whom, by which wires: one row per message of a pattern
    [
        ("src", "i4"),  # rank in the stream
        ("dst", "i4"),
        ("port", "i8"),
        ("latency_s", "f8"),
        ("share", "f8"),  # of the rate of wires that a message fills
        ("route0", "i8"),
        ("route1", "i8"),  # exclusive
    ],
    align=True,
)


class MessageTable(NamedTuple):
    """What is to be sent, as the compiled loops read it."""

    streams: NDArray[np.void]  # STREAM
    rounds: NDArray[np.void]  # ROUND
    edges: NDArray[np.void]  # EDGE
    route: Int32Array  # resources
    nbytes: FloatArray  # [messages] of one piece
    round_of: Int32Array  # [messages]
    chunk: Int32Array  # [messages], empty where no channel is by_chunk
    num_chunks: Int32Array
    forward_nbytes: FloatArray  # [resources] as Wires.forward_nbytes; empty where every switch cuts through


@dataclass(frozen=True, slots=True, eq=False)
class Compiled:
    """All jobs, ready to be timed."""

    work: MessageTable
    runs: NDArray[np.void]  # RUN, job by job
    num_ports: int
    num_chains: int
    num_left: int
    port_rank: Int32Array  # [ports] row of the rank that sends by it, over all streams
    rank_node: IntArray  # [rank rows] node of the topology
    bytes_per_s: FloatArray  # [resources]
    shares: IntArray  # [wires] resource that each uses
    # [2, resources] bytes of all messages but those of jobs that repeat, and what they fill of a wire's rate
    crossings: FloatArray = field(repr=False)


def compile_jobs(topology: Topology, jobs: Sequence[CollectiveJob]) -> Compiled:
    """Routes, ports and sizes of everything that the jobs send. Raises CommsError for impossible places."""
    wires = topology.wires()
    building = _Building(topology, wires)
    for job in jobs:
        _check_places(topology, job)
        building.add_job(job)
    return building.done()


def _check_places(topology: Topology, job: CollectiveJob) -> None:
    ranks, places = job.schedule.num_ranks + job.schedule.num_helpers, job.by_group
    where = job.schedule.algorithm
    if places.shape[1] != ranks:
        problem = f"{places.shape[1]} places for {ranks} ranks"
        raise CommsError(problem, where, "name one node per rank of the schedule")
    outside = places[(places < 0) | (places >= topology.num_nodes)]
    if len(outside):
        problem = f"node {outside[0]} is outside a topology of {topology.num_nodes} nodes"
        raise CommsError(problem, where, "place ranks on nodes that there are")
    if not 0 <= job.nbytes < np.inf:
        raise CommsError(f"{job.nbytes} bytes", where, "give a size of zero or more")
    for pieces in (channel.pieces for channel in job.schedule.channels):
        if not 1 <= pieces < MAX_PIECES:
            raise CommsError(f"{pieces} pieces", where, f"cut it into 1 to {MAX_PIECES - 1} pieces")


# A round, and its phase: the first round, the one after the last, and all of it.
PhasedRound: TypeAlias = tuple[Round, tuple[int, int, tuple[Round, ...]]]


@dataclass(slots=True, eq=False)
class _Routed:
    """A pattern on wires: one row for each way of each message."""

    src: IntArray  # ranks in the stream
    dst: IntArray
    message: IntArray  # of the pattern, in all groups
    part: FloatArray  # of its bytes
    head: IntArray  # the resource by which it leaves, -1 for none
    offsets: IntArray  # [rows + 1] of its resources
    resources: IntArray
    latency_s: FloatArray
    rate_share: FloatArray  # that its protocol gets
    edge0: int = -1  # its first row among the edges

    def port_keys(self, num_wires: int) -> IntArray:
        """[rows] One number per rank and resource by which it leaves; what has no wire has a port of its own."""
        return self.src * (num_wires + 1) + self.head + 1

    def lanes(self) -> IntArray:
        """[rows] How many ways of the same message leave by the same resource before each."""
        if (self.part == 1.0).all():  # the usual case, in no time
            return np.zeros_like(self.message)
        return repeats_before(self.message * (int(self.head.max(initial=-1)) + 2) + self.head + 1)


class _Building:
    """Columns that grow stream by stream."""

    def __init__(self, topology: Topology, wires: Wires) -> None:
        self.topology, self.wires = topology, wires
        self.streams: list[tuple[float, ...]] = []
        self.rounds: list[tuple[NDArray[np.generic], ...]] = []
        self.edges: list[tuple[NDArray[np.generic], ...]] = []
        self.sizes: list[FloatArray] = []
        self.chunks: list[tuple[IntArray, IntArray]] = []
        self.rank_node: list[IntArray] = []
        self.port_rank: list[IntArray] = []
        self.runs: list[tuple[float, ...]] = []
        names = ("jobs", "rounds", "ranks", "chains", "left", "edges", "messages", "ports", "route")
        self.num = dict.fromkeys(names, 0)

    def add_job(self, job: CollectiveJob) -> None:
        """One more job: a stream per channel, a run per group."""
        stream0, messages = len(self.streams), np.zeros(len(job.by_group), dtype=np.int64)
        for channel in job.schedule.channels:
            messages += self._add_channel(job, channel)
        self.num["jobs"] += 1
        for group, number in enumerate(messages.tolist()):
            times = (number, number, job.start_s, job.start_s, job.repeats)
            self.runs.append((self.num["jobs"] - 1, group, stream0, len(self.streams), *times))

    def _add_channel(self, job: CollectiveJob, channel: Channel) -> IntArray:
        """[groups] How many messages there are in each."""
        rounds = [(each, phase) for phase in _phase_bounds(channel) for each in phase[2]]
        num_groups, members = job.by_group.shape
        ranks, pieces = num_groups * members, channel.pieces
        groups = job.schedule.num_chunks if channel.by_chunk else 1
        chains = pieces * ranks * groups
        self.streams.append(
            (ranks, members, len(self.runs), pieces, groups, len(rounds), self.num["rounds"])
            + (self.num["ranks"], self.num["chains"], self.num["left"])
            + (channel.order is PieceOrder.SERIAL, channel.by_chunk)
        )
        routed = self._patterns(rounds, job, channel)
        self._add_rounds(rounds, routed, job, pieces)
        self.rank_node.append(job.by_group.ravel())
        self.num["rounds"] += len(rounds)
        self.num["ranks"] += ranks
        self.num["chains"] += chains
        self.num["left"] += chains * len(rounds)
        counts = np.zeros(num_groups, dtype=np.int64)
        for key, times in Counter(id(each.pattern) for each, _ in rounds).items():
            counts += times * np.bincount(routed[key].src // members, minlength=num_groups)
        return counts * pieces

    def _patterns(
        self, rounds: Sequence[PhasedRound], job: CollectiveJob, channel: Channel
    ) -> dict[int, _Routed]:
        """Each distinct pattern on its wires; ports are numbered per stream, over all its patterns."""
        # By identity: a ring has one pattern for all its rounds, whose routes are then looked up once.
        distinct = {id(each.pattern): each.pattern for each, _ in rounds}
        phase = {id(each.pattern): bounds[0] for each, bounds in rounds}
        routed = {key: self._routed(_in_groups(pattern, job), job) for key, pattern in distinct.items()}
        keys = [each.port_keys(self.wires.num_wires) for each in routed.values()]
        # Ways of a message that leave by one wire share it: each has a lane of it.
        numbers = [each.lanes() for each in routed.values()]
        lanes = 1 + max((int(each.max(initial=0)) for each in numbers), default=0)
        keys = [each * lanes + number for each, number in zip(keys, numbers, strict=True)]
        # So have messages that need not wait for each other.
        if channel.at_once or channel.apart:
            numbers = [repeats_before(each) * channel.at_once for each in keys]
            more = 1 + max(int(each.max(initial=0)) for each in numbers)
            if channel.apart:
                numbers = [n + more * phase[key] for n, key in zip(numbers, distinct, strict=True)]
                more *= len(rounds)
            keys = [each * more + number for each, number in zip(keys, numbers, strict=True)]
            lanes *= more
        every = np.unique(np.concatenate(keys)) if keys else np.zeros(0, dtype=np.int64)
        for each, wanted in zip(routed.values(), keys, strict=True):
            each.edge0 = self.num["edges"]
            port = np.searchsorted(every, wanted) + self.num["ports"]
            route = each.offsets + self.num["route"]
            columns = (each.src, each.dst, port, each.latency_s, each.rate_share, route[:-1], route[1:])
            self.edges.append((*columns, each.resources))
            self.num["edges"] += len(each.src)
            self.num["route"] += len(each.resources)
        self.port_rank.append(every // lanes // (self.wires.num_wires + 1) + self.num["ranks"])
        self.num["ports"] += len(every)
        return routed

    def _routed(self, pattern: Pattern, job: CollectiveJob) -> _Routed:
        places = job.by_group.ravel()
        ways = self.topology.ways(places[pattern.src], places[pattern.dst])
        routes, src, dst = ways.routes, pattern.src[ways.message], pattern.dst[ways.message]
        resources = self.wires.shares[routes.wires]
        heads = np.full(routes.num_messages, -1, dtype=np.int64)
        taken = routes.offsets[1:] > routes.offsets[:-1]
        heads[taken] = resources[routes.offsets[:-1][taken]]
        members, chips = job.by_group.shape[1], job.schedule.num_ranks
        # A message up to a switch that reduces and the one down from it are one message to a library.
        stages = np.where((src % members >= chips) | (dst % members >= chips), 0.5, 1.0)
        stage_s, share = self._moved_by(job, routes)
        latency = route_latencies(self.wires, routes) + stage_s * stages
        return _Routed(src, dst, ways.message, ways.share, heads, routes.offsets, resources, latency, share)

    def _moved_by(self, job: CollectiveJob, routes: Routes) -> tuple[FloatArray, FloatArray]:
        """[messages] What the protocol of the outermost tier of its route adds to each, and the share that it gets."""
        inside = dict(job.inside)
        protocols = [inside.get(tier, job.protocol) for tier in self.topology.tiers] or [job.protocol]
        # A library picks its protocol by how far a message goes: by the outermost tier that it crosses.
        outermost = np.full(routes.num_messages, len(protocols) - 1)
        taken = np.diff(routes.offsets) > 0
        if taken.any():
            outermost[taken] = np.maximum.reduceat(self.wires.tier[routes.wires], routes.offsets[:-1][taken])
        columns = np.array([(each.latency_s, each.share) for each in protocols])[outermost]
        return columns[:, 0], columns[:, 1]

    def _add_rounds(
        self, rounds: Sequence[PhasedRound], routed: dict[int, _Routed], job: CollectiveJob, pieces: int
    ) -> None:
        groups = len(job.by_group)
        on_wires = [routed[id(each.pattern)] for each, _ in rounds]
        lengths = np.array([len(each.src) for each in on_wires], dtype=np.int64)
        first = np.cumsum(lengths) - lengths + self.num["messages"]
        edge0 = np.array([each.edge0 for each in on_wires], dtype=np.int64)
        start = np.array([phase[0] for _, phase in rounds], dtype=np.int64)
        end = np.array([phase[1] for _, phase in rounds], dtype=np.int64)
        stream = np.full(len(rounds), len(self.streams) - 1, dtype=np.int64)
        self.rounds.append((edge0, first, first + lengths, stream, np.arange(len(rounds)), start, end))
        for (each, _), way in zip(rounds, on_wires, strict=True):
            of, shares = way.message, job.schedule.message_shares(each) * (job.nbytes / pieces)
            # A protocol that leaves a part of the rate unused keeps wires busy like a longer message.
            self.sizes.append(np.tile(shares, groups)[of] * way.part / way.rate_share)
            self.chunks.append((np.tile(each.first, groups)[of], np.tile(each.count, groups)[of]))
        self.num["messages"] += int(lengths.sum())

    def done(self) -> Compiled:
        """Everything laid end to end."""
        rounds, streams = _records(ROUND, self.rounds), np.array(self.streams, dtype=STREAM)
        runs = np.array(self.runs, dtype=RUN)
        chunks = self.chunks if streams["by_chunk"].any() else []
        work = MessageTable(
            streams=streams,
            rounds=rounds,
            edges=_records(EDGE, [columns[:-1] for columns in self.edges]),
            route=_column([columns[-1] for columns in self.edges]).astype(np.int32),
            nbytes=_column(self.sizes).astype(np.float64),
            round_of=np.repeat(np.arange(len(rounds), dtype=np.int32), rounds["last"] - rounds["first"]),
            chunk=_column([first for first, _ in chunks]).astype(np.int32),
            num_chunks=_column([count for _, count in chunks]).astype(np.int32),
            forward_nbytes=self.wires.forward_nbytes if self.wires.forward_nbytes.any() else np.zeros(0),
        )
        return Compiled(
            work=work,
            runs=runs,
            num_ports=self.num["ports"],
            num_chains=self.num["chains"],
            num_left=self.num["left"],
            port_rank=_column(self.port_rank).astype(np.int32),
            rank_node=_column(self.rank_node).astype(np.int64),
            bytes_per_s=self.wires.bytes_per_s.astype(np.float64),
            shares=self.wires.shares,
            crossings=_crossings(work, runs, self.wires.num_wires),
        )


def _in_groups(pattern: Pattern, job: CollectiveJob) -> Pattern:
    """A pattern of one group, for all groups: group after group."""
    groups, members = job.by_group.shape
    shift = np.arange(groups)[:, np.newaxis] * members
    return Pattern((pattern.src + shift).ravel(), (pattern.dst + shift).ravel())


def _phase_bounds(channel: Channel) -> Iterator[tuple[int, int, tuple[Round, ...]]]:
    start = 0
    for phase in channel.phases:
        yield start, start + len(phase), phase
        start += len(phase)


def _crossings(work: MessageTable, runs: NDArray[np.void], num_resources: int) -> FloatArray:
    """See Compiled, of runs that come to an end: summed per edge, of which there are few, then along its route."""
    totals, counts = np.zeros(len(work.edges)), np.ones(len(work.streams), dtype=np.bool_)
    for each in runs[runs["repeats"]]:
        counts[each["stream0"] : each["stream1"]] = False
    for each in work.rounds[counts[work.rounds["stream"]]]:
        pieces = work.streams["pieces"][each["stream"]]
        edges = slice(each["edge0"], each["edge0"] + each["last"] - each["first"])
        totals[edges] += work.nbytes[each["first"] : each["last"]] * pieces
    lengths = work.edges["route1"] - work.edges["route0"]
    along = [np.repeat(each, lengths) for each in (totals * work.edges["share"], totals)]
    return np.array([np.bincount(work.route, weights=each, minlength=num_resources) for each in along])


def _records(dtype: np.dtype[np.void], blocks: Sequence[tuple[NDArray[np.generic], ...]]) -> NDArray[np.void]:
    """Columns block by block, as records."""
    table = np.zeros(sum(len(columns[0]) for columns in blocks), dtype=dtype)
    for number, name in enumerate(dtype.names or ()):
        table[name] = _column([columns[number] for columns in blocks])
    return table


def _column(blocks: Sequence[NDArray[np.generic]]) -> NDArray[np.generic]:
    return np.concatenate(blocks) if blocks else np.zeros(0, dtype=np.int64)
