"""Schedules: a collective as data, who sends which chunks to whom in which order.

A schedule is written for ranks 0 .. num_ranks - 1 (and helper ranks after them, for switches that reduce); where
they sit in a network is said when it is timed. The buffer is cut into `num_chunks` chunks; channels share them
out and go on independently of each other. A channel's rounds are grouped into phases (those that use the same
links), and its chunks may be cut into `pieces` that follow each other.

What a schedule means, for the proof, for every fidelity of timing and for an executor alike:

* A message of round s may leave once its sender has everything that earlier rounds send to it, of the same
  channel and piece; in a channel `by_chunk`, only what they send to it of the chunks that the message carries.
* Messages of one channel that leave a chip by the same wire leave one after another, phase by phase; within a
  phase round by round and there piece by piece (INTERLEAVED), or piece by piece and there round by round
  (SERIAL: a chip starts on a piece when it is done with the one before, in that phase). In a channel `at_once`
  the messages of a round do not: the first of each round follow each other, the second ones, and so on. In a
  channel `apart` the messages of one phase do not wait for those of another (each has patterns of its own).
* Several messages to one chunk of a chip in one round all count: they are added, or carry the same.

Chunks by operation, with n = num_ranks (`nbytes` is what the caller of a collective names):

    all_reduce, broadcast, reduce   the buffer; nbytes is the buffer
    all_gather                      the result, rank r brings chunks [r, r + 1) * num_chunks / n; nbytes the result
    reduce_scatter                  the input, rank r ends with [r, r + 1) * num_chunks / n; nbytes the input
    all_to_all                      chunk (s * n + d) * per_pair + j goes from s to d; nbytes is what one rank sends
    gather, scatter                 as all_gather and its reverse, at rank `root`; nbytes is what the root holds
    barrier                         one chunk per rank, as an all_gather; nbytes is ignored (0)
"""

from dataclasses import dataclass, field
from enum import StrEnum

import numpy as np

from comms.networks.topology import FloatArray, IntArray


class Op(StrEnum):
    """Collective operations."""

    ALL_REDUCE = "all_reduce"
    ALL_GATHER = "all_gather"
    REDUCE_SCATTER = "reduce_scatter"
    ALL_TO_ALL = "all_to_all"
    BROADCAST = "broadcast"
    REDUCE = "reduce"
    GATHER = "gather"
    SCATTER = "scatter"
    BARRIER = "barrier"


def bus_factor(op: Op | None, num_chips: int) -> float:
    """Bus bandwidth over algorithm bandwidth, as nccl-tests defines it (its PERFORMANCE.md): what a link carries."""
    if num_chips == 1:
        return 0.0
    if op is Op.ALL_REDUCE:
        return 2 * (num_chips - 1) / num_chips
    if op in (Op.ALL_GATHER, Op.REDUCE_SCATTER, Op.ALL_TO_ALL, Op.GATHER, Op.SCATTER):
        return (num_chips - 1) / num_chips
    return 1.0


class PieceOrder(StrEnum):
    """Which message leaves first where a phase has several pieces."""

    SERIAL = "serial"
    INTERLEAVED = "interleaved"


@dataclass(frozen=True, slots=True, eq=False)
class Pattern:
    """Who sends to whom: message i goes from src[i] to dst[i]. Rounds alike share one (same object)."""

    src: IntArray
    dst: IntArray


@dataclass(frozen=True, slots=True, eq=False)
class Round:
    """Messages that do not wait for each other; message i carries chunks first[i] .. first[i] + count[i] - 1.

    Chunk numbers wrap around at num_chunks. `reduces`: the receiver adds the chunks to its own, else it
    replaces them.
    """

    pattern: Pattern
    first: IntArray
    count: IntArray
    reduces: bool


@dataclass(frozen=True, slots=True)
class Channel:
    """Rounds that follow each other, in phases; see the module for what pieces and order mean."""

    phases: tuple[tuple[Round, ...], ...]
    pieces: int = 1
    order: PieceOrder = PieceOrder.SERIAL
    by_chunk: bool = False  # chunks do not wait for each other, only for their turn on a wire
    at_once: bool = False  # messages of one round by the same wire share it, not one after another
    apart: bool = False  # so do messages of different phases

    @property
    def rounds(self) -> tuple[Round, ...]:
        """The rounds of all phases, in order."""
        return tuple(each for phase in self.phases for each in phase)


@dataclass(frozen=True, slots=True)
class Schedule:
    """One collective. `shares`: bytes of a chunk over `nbytes`, for all chunks or for each."""

    op: Op
    algorithm: str
    num_ranks: int
    num_chunks: int
    shares: float | FloatArray = field(repr=False)
    channels: tuple[Channel, ...] = field(repr=False)
    root: int = 0
    num_helpers: int = 0  # ranks num_ranks .. are switches that add and copy, with nothing of their own

    def message_shares(self, each: Round) -> FloatArray:
        """[messages] Bytes of each message of a round over nbytes, all pieces together."""
        if isinstance(self.shares, float):
            return np.asarray(each.count * self.shares, dtype=np.float64)
        ends = np.concatenate([[0.0], np.cumsum(np.concatenate([self.shares, self.shares]))])
        totals: FloatArray = ends[each.first + each.count] - ends[each.first]
        return totals

    @property
    def num_messages(self) -> int:
        """Messages in all, with every piece counted."""
        return sum(len(each.pattern.src) * c.pieces for c in self.channels for each in c.rounds)
