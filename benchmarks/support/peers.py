"""Peers: what ASTRA-sim and SimGrid themselves would answer, from the choices their sources make.

For parity only: nothing else of this package uses these rules. Here a switch stores a message before it forwards it,
and a "GB" of the network is 2^30 bytes. ASTRA-sim counts whole nanoseconds; so do we, truncating where it does.

ASTRA-sim, analytical back ends (astra-sim/astra-sim; astra-sim/astra-network-analytical):

* Bandwidth is nominal GB/s x 2^30 / 10^9 bytes a ns (common/NetworkFunction.cpp).
* Congestion-unaware: a message takes hops x latency + bytes / bandwidth, truncated; a Switch is two hops, a Ring the
  shorter way round, each axis a network of its own (congestion_unaware/basic-topology/{BasicTopology,Switch,Ring}.cpp,
  multi-dim-topology/MultiDimTopology.cpp).
* Congestion-aware, one axis: the same per hop, one hop after another at full size (store and forward); a link is taken
  for bytes / bandwidth, first come first served (congestion_aware/network/{Link,Chunk}.cpp).
* A collective is cut into `preferred-dataset-splits` chunks of nbytes // splits, each at least as many bytes as there
  are chips; a remainder becomes one more chunk of full size (astra-sim/system/Sys.cc, determine_chunk_size).
* A chunk goes through phases. All-reduce with `localBWAware`: reduce-scatter on each axis upwards, all-reduce on the
  last, all-gather downwards on what is left; `baseline`: a whole all-reduce on each. All-gather takes the axes
  downwards, the others upwards (Sys.cc, generate_collective).
* An axis has one queue, and `active-chunks-per-dimension` chunks of it run at a time, in order of arrival: a chunk's
  all-gather waits behind all reduce-scatters of its axis, queued before it (Sys.cc, SchedulerUnit, insert_stream,
  proceed_to_next_vnet_baseline; QueueLevelHandler.cc). LIFO ranks collectives, and two never meet: see traces.
* Within a phase a chip sends one message, waits for its neighbour's, then sends the next. Each message, and the end
  of the phase, waits `endpoint-delay` (system/MemBus.cc). A reducing step also waits 3 x trunc(bytes / local-mem-bw)
  for one write and two reads (system/PacketBundle.cc).
* Ring: 2 (n - 1) messages of D / n for an all-reduce, of which the first n - 1 reduce; n - 1 for its halves; an
  all-to-all is n (n - 1) / 2 between neighbours (system/astraccl/native_collectives/collective_algorithm/Ring.cc).
* Halving-doubling: D/2, D/4 .. D/n and back; what is reduced after message r is counted as D / 2^(r+1), the size of
  the next message, and the last of the log2 n as nothing (same folder, HalvingDoubling.cc).
* A trace: one computation and one collective of a chip at a time; ready nodes start in the order of their ids
  (astra-sim/workload/{Workload,HardwareResource}.cc).

SimGrid, default flow-level model LV08 (simgrid/simgrid, src/kernel/resource/models/network_cm02.cpp and
NetworkModel.cpp): latency x 13.01, rate x 0.97; the acknowledgements of a flow take 5 % of its rate on the way back;
the rate is at most TCP-gamma / (2 x latency of the route).

Not modelled: other algorithms, FullyConnected, several queues an axis, the shared memory bus, rendezvous,
halving-doubling on a congestion-aware Ring (its messages share links), uneven chips. All chips do the same at the same
time, so one stands for all: exact for what is modelled.
"""

import heapq
import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from graphlib import TopologicalSorter
from itertools import count

from comms.collectives.schedule import Op
from comms.errors import CommsError

GIB_PER_GB = 2**30 / 1e9
SWITCH_HOPS = 2  # chip to switch, switch to chip
REDUCTION_PASSES = 3  # write what arrived, read it and one's own
STAR_LINKS = 2  # of a route between two hosts of a star


class AstraShape(StrEnum):
    """Building blocks of an ASTRA-sim network."""

    RING = "Ring"
    SWITCH = "Switch"


class PeerAlgorithm(StrEnum):
    """Algorithms, as ASTRA-sim's files name them. SimGrid's `lr` is RING, its `rab` HALVING_DOUBLING."""

    RING = "ring"
    HALVING_DOUBLING = "halvingDoubling"


@dataclass(frozen=True, slots=True)
class AstraAxis:
    """One dimension of an ASTRA-sim network, and the algorithm that its collectives use there."""

    shape: AstraShape
    chips: int
    nominal_gb_per_s: float  # of 2^30 bytes, whatever the name says
    latency_ns: float  # of one hop
    algorithm: PeerAlgorithm = PeerAlgorithm.RING

    def __post_init__(self) -> None:
        where = f"ASTRA-sim {self.shape} of {self.chips}"
        if self.chips < 1:
            raise CommsError("an axis has at least one chip", where)
        if self.nominal_gb_per_s <= 0 or self.latency_ns < 0:
            raise CommsError("bandwidth must be positive and latency at least zero", where)
        if self.algorithm is PeerAlgorithm.HALVING_DOUBLING and self.chips & (self.chips - 1):
            raise CommsError("halving-doubling pairs chips", where, "take a power of two, or ring")

    @property
    def bytes_per_ns(self) -> float:
        """Bandwidth of one link."""
        return self.nominal_gb_per_s * GIB_PER_GB


@dataclass(frozen=True, slots=True)
class AstraSystem:
    """ASTRA-sim's system file (and the choice of back end), with the values its examples ship."""

    congestion_aware: bool = False
    endpoint_delay_ns: int = 10
    local_memory_gb_per_s: float = 1600.0  # of 10^9 bytes, unlike the network's
    dataset_splits: int = 4
    active_chunks: int = 1
    local_bw_aware: bool = True  # False: `baseline`

    def __post_init__(self) -> None:
        least = min(self.local_memory_gb_per_s, self.dataset_splits, self.active_chunks)
        if least <= 0 or self.endpoint_delay_ns < 0:
            raise CommsError("figures must be positive, the delay at least zero", "ASTRA-sim system")

    def reduction_ns(self, nbytes: int) -> int:
        """What a received message of this size waits for local memory."""
        return REDUCTION_PASSES * int(nbytes / (self.local_memory_gb_per_s * 1e9) * 1e9)


@dataclass(frozen=True, slots=True)
class AstraNode:
    """One node of a trace; its id is its place in it."""

    ns: int
    is_collective: bool
    needs: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class AstraStep:
    """A step of tp on axis 0, an all-reduce after each half layer, and dp on axis 1, one after each backward layer.

    Only the optimizer waits for the gradients.
    """

    layers: int = 32
    forward_ns: int = 1_000_000  # of half a layer
    backward_ns: int = 2_000_000  # of half a layer
    optimizer_ns: int = 500_000
    activation_nbytes: int = 64 * 2**20
    gradient_nbytes: int = 48 * 2**20


@dataclass(frozen=True, slots=True)
class SimGridStar:
    """A star of full-duplex links without a limit in the middle, under the default network model LV08."""

    bytes_per_s: float = 50e9
    link_latency_s: float = 1e-6
    latency_factor: float = 13.01
    bandwidth_factor: float = 0.97
    cross_traffic: float = 0.05  # share of a flow's rate that goes back
    tcp_window_nbytes: float = 4_194_304.0  # network/TCP-gamma

    def __post_init__(self) -> None:
        if self.bytes_per_s <= 0 or self.bandwidth_factor <= 0 or self.link_latency_s < 0:
            raise CommsError("rates must be positive and latency at least zero", "SimGrid star")

    @property
    def message_latency_s(self) -> float:
        """What a message of any size waits before its first byte counts."""
        return self.latency_factor * STAR_LINKS * self.link_latency_s

    @property
    def flow_bytes_per_s(self) -> float:
        """Rate of a flow while every host sends one message and receives one."""
        rate = self.bytes_per_s / (1 + self.cross_traffic)
        if self.link_latency_s > 0:
            rate = min(rate, self.tcp_window_nbytes / (2 * STAR_LINKS * self.link_latency_s))
        return self.bandwidth_factor * rate


@dataclass(frozen=True, slots=True)
class _Message:
    """`repeat` equal steps: send, receive the same, reduce `reduced` bytes (0: only keep them)."""

    nbytes: int
    reduced: int
    distance: int = 1  # in places of the axis
    repeat: int = 1


@dataclass(frozen=True, slots=True)
class _Phase:
    """What a chunk does on one axis, and the number of that axis."""

    queue: int
    axis: AstraAxis
    messages: tuple[_Message, ...]


def astra_collective_ns(
    op: Op,
    nbytes: int,
    axes: Sequence[AstraAxis],
    system: AstraSystem | None = None,
    involved: Sequence[int] | None = None,
) -> int:
    """Nanoseconds of one collective on the axes numbered in `involved` (all by default).

    `nbytes` is what a chip brings: for an all-gather its own part, not the result.
    """
    system = system or AstraSystem()
    numbers = range(len(axes)) if involved is None else involved
    used = [(number, axis) for number, axis in enumerate(axes) if axis.chips > 1 and number in numbers]
    _check(op, axes, [axis for _, axis in used], system)
    num_chips = math.prod(axis.chips for axis in axes)
    chunk, num_chunks = _chunks(op, nbytes, num_chips, system.dataset_splits)
    phases = list(_phases(op, chunk, used, system))
    if system.congestion_aware:
        return _shared_links_ns(phases, num_chunks, system)
    return _queues_ns(phases, num_chunks, system)


def astra_trace_ns(nodes: Sequence[AstraNode]) -> int:
    """When the last node of a chip's trace ends: one computation and one collective at a time, lowest id first."""
    sorter = TopologicalSorter({number: node.needs for number, node in enumerate(nodes)})
    sorter.prepare()
    ready: tuple[list[int], list[int]] = ([], [])  # computations, collectives
    running: list[tuple[int, int, int]] = []  # end, order of start, node
    is_busy, now, order = [False, False], 0, count()
    while sorter.is_active():
        for number in sorter.get_ready():
            heapq.heappush(ready[nodes[number].is_collective], number)
        for lane in (False, True):
            if ready[lane] and not is_busy[lane]:
                number = heapq.heappop(ready[lane])
                is_busy[lane] = True
                heapq.heappush(running, (now + nodes[number].ns, next(order), number))
        now, _, ended = heapq.heappop(running)
        is_busy[nodes[ended].is_collective] = False
        sorter.done(ended)
    return now


def astra_step_ns(
    axes: Sequence[AstraAxis], step: AstraStep | None = None, system: AstraSystem | None = None
) -> int:
    """Nanoseconds of one training step on two axes, tp then dp."""
    step = step or AstraStep()
    if len(axes) != 2:
        raise CommsError("the step is laid out on two axes, tp then dp", f"ASTRA-sim network of {len(axes)}")
    tp = AstraNode(astra_collective_ns(Op.ALL_REDUCE, step.activation_nbytes, axes, system, (0,)), True)
    dp = AstraNode(astra_collective_ns(Op.ALL_REDUCE, step.gradient_nbytes, axes, system, (1,)), True)
    nodes: list[AstraNode] = []
    last: tuple[int, ...] = ()
    gradients: list[int] = []
    for is_backward in (False, True):
        compute_ns = step.backward_ns if is_backward else step.forward_ns
        for half in range(2 * step.layers):
            nodes.append(AstraNode(compute_ns, False, last))
            nodes.append(replace(tp, needs=(len(nodes) - 1,)))
            last = (len(nodes) - 1,)
            if is_backward and half % 2:
                gradients.append(len(nodes))
                nodes.append(replace(dp, needs=last))
    nodes.append(AstraNode(step.optimizer_ns, False, (*last, *gradients)))
    return astra_trace_ns(nodes)


def simgrid_all_reduce_seconds(
    nbytes: int, chips: int, algorithm: PeerAlgorithm, star: SimGridStar | None = None
) -> float:
    """Seconds of an all-reduce whose steps wait for each other: ring, or halving then doubling (`rab`).

    Ring: 2 (n - 1) messages of B / n. rab: B/2, B/4 .. B/n and back.
    """
    star = star or SimGridStar()
    if chips < 1 or nbytes < 1:
        raise CommsError("an all-reduce has at least one chip and one byte", f"SimGrid star of {chips}")
    if algorithm is PeerAlgorithm.HALVING_DOUBLING and chips & (chips - 1):
        raise CommsError("halving-doubling pairs hosts", f"SimGrid star of {chips}", "take ring")
    rounds = chips - 1 if algorithm is PeerAlgorithm.RING else chips.bit_length() - 1
    sent_nbytes = nbytes * (chips - 1) / chips
    return 2 * (rounds * star.message_latency_s + sent_nbytes / star.flow_bytes_per_s)


def _check(op: Op, axes: Sequence[AstraAxis], used: Sequence[AstraAxis], system: AstraSystem) -> None:
    where = f"ASTRA-sim {op}"
    if op not in (Op.ALL_REDUCE, Op.ALL_GATHER, Op.REDUCE_SCATTER, Op.ALL_TO_ALL):
        raise CommsError("no such collective", where, "take all_reduce, all_gather, .. all_to_all")
    if not used:
        raise CommsError("no axis with more than one chip takes part", where)
    halves = any(axis.algorithm is PeerAlgorithm.HALVING_DOUBLING for axis in used)
    if op is Op.ALL_TO_ALL and halves:
        raise CommsError("halving-doubling knows no all-to-all", where, "take ring")
    if system.congestion_aware and (len(axes) > 1 or (halves and axes[0].shape is AstraShape.RING)):
        raise CommsError("the congestion-aware back end takes one axis, a Switch for halving-doubling", where)


def _chunks(op: Op, nbytes: int, num_chips: int, splits: int) -> tuple[int, int]:
    """Bytes of a chunk, and how many there are."""
    if nbytes < (splits if op is Op.ALL_GATHER else 1):
        raise CommsError("too few bytes: ASTRA-sim would not end", f"ASTRA-sim {op}", "raise nbytes")
    chunk = nbytes // splits
    if op is not Op.ALL_GATHER and chunk < num_chips:
        return num_chips, splits
    return chunk, -(-nbytes // chunk)


def _phases(
    op: Op, nbytes: int, axes: Sequence[tuple[int, AstraAxis]], system: AstraSystem
) -> Iterator[_Phase]:
    """What a chunk of this size goes through, in order; axes come with their numbers."""
    plan = [(op, axis) for axis in (reversed(axes) if op is Op.ALL_GATHER else axes)]
    if op is Op.ALL_REDUCE and system.local_bw_aware:
        plan = [(Op.REDUCE_SCATTER, axis) for axis in axes[:-1]]
        plan += [(Op.ALL_REDUCE, axes[-1])]
        plan += [(Op.ALL_GATHER, axis) for axis in reversed(axes[:-1])]
    for each, (number, axis) in plan:
        make = _ring if axis.algorithm is PeerAlgorithm.RING else _halving_doubling
        yield _Phase(number, axis, make(each, nbytes, axis.chips))
        if each is Op.REDUCE_SCATTER:
            nbytes //= axis.chips
        elif each is Op.ALL_GATHER:
            nbytes *= axis.chips


def _ring(op: Op, nbytes: int, chips: int) -> tuple[_Message, ...]:
    part, steps = nbytes // chips, chips - 1
    if op is Op.ALL_GATHER:
        return (_Message(nbytes, 0, repeat=steps),)
    if op is Op.ALL_TO_ALL:
        return (_Message(part, 0, repeat=chips * steps // 2),)
    reducing = _Message(part, part, repeat=steps)
    return (reducing,) if op is Op.REDUCE_SCATTER else (reducing, _Message(part, 0, repeat=steps))


def _halving_doubling(op: Op, nbytes: int, chips: int) -> tuple[_Message, ...]:
    rounds = chips.bit_length() - 1
    halving = tuple(
        _Message(nbytes >> r, nbytes >> (r + 1) if r < rounds else 0, distance=2 ** (r - 1))
        for r in range(1, rounds + 1)
    )
    # It halves once more and turns round by doubling, which drops an odd byte.
    smallest = nbytes if op is Op.ALL_GATHER else (nbytes >> (rounds + 1)) << 1
    doubling = tuple(_Message(smallest << r, 0, distance=chips >> (r + 1)) for r in range(rounds))
    return {Op.REDUCE_SCATTER: halving, Op.ALL_GATHER: doubling}.get(op, halving + doubling)


def _phase_ns(phase: _Phase, system: AstraSystem) -> int:
    """A phase on a network of its own (congestion-unaware)."""
    axis, total = phase.axis, system.endpoint_delay_ns
    for each in phase.messages:
        around = min(each.distance, axis.chips - each.distance)
        hops = SWITCH_HOPS if axis.shape is AstraShape.SWITCH else around
        wire_ns = int(hops * axis.latency_ns + each.nbytes / axis.bytes_per_ns)
        total += each.repeat * (wire_ns + system.endpoint_delay_ns + system.reduction_ns(each.reduced))
    return total


def _queues_ns(phases: Sequence[_Phase], num_chunks: int, system: AstraSystem) -> int:
    """Chunks through the queues of their axes, `active_chunks` of an axis at a time, first come first served."""
    phases_ns = [_phase_ns(phase, system) for phase in phases]
    waiting = {phase.queue: deque[int]() for phase in phases}  # a chunk is the number of its phase
    free = dict.fromkeys(waiting, system.active_chunks)
    waiting[phases[0].queue].extend([0] * num_chunks)
    running: list[tuple[int, int, int]] = []  # end, order of start, phase
    now, order = 0, count()
    while True:
        for queue, arrived in waiting.items():
            while arrived and free[queue]:
                number = arrived.popleft()
                free[queue] -= 1
                heapq.heappush(running, (now + phases_ns[number], next(order), number))
        if not running:
            return now
        now, _, number = heapq.heappop(running)
        free[phases[number].queue] += 1
        if number + 1 < len(phases):
            waiting[phases[number + 1].queue].append(number + 1)


def _shared_links_ns(phases: Sequence[_Phase], num_chunks: int, system: AstraSystem) -> int:
    """Messages of the active chunks on the way from a chip to its receiver, which stands for all ways."""
    axis = phases[0].axis
    messages = [each for phase in phases for each in phase.messages for _ in range(each.repeat)]
    hops = SWITCH_HOPS if axis.shape is AstraShape.SWITCH else 1
    free_ns = [0] * hops
    active = min(system.active_chunks, num_chunks)
    now, todo, order = 0, num_chunks - active, count(active)
    # when, order, which message asks for which link; equal times are a heap already
    events = [(system.endpoint_delay_ns, place, 0, 0) for place in range(active)]
    while events:
        now, _, number, hop = heapq.heappop(events)
        if number == len(messages):  # this chunk is done, the next one starts
            if todo:
                heapq.heappush(events, (now + system.endpoint_delay_ns, next(order), 0, 0))
                todo -= 1
            continue
        each = messages[number]
        if hop < hops:
            start, wire_ns = max(now, free_ns[hop]), each.nbytes / axis.bytes_per_ns
            free_ns[hop] = start + int(wire_ns)
            following = (start + int(axis.latency_ns + wire_ns), next(order), number, hop + 1)
        else:
            received_ns = now + system.endpoint_delay_ns + system.reduction_ns(each.reduced)
            following = (received_ns, next(order), number + 1, 0)
        heapq.heappush(events, following)
    return now
