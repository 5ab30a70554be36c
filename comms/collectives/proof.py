"""Proofs: a schedule is executed symbolically, with the ranks whose contribution is in each chunk as its data.

Taken round by round, every rank must end with what its operation promises (`collectives.schedule`), each contribution
exactly once. That is then so in whatever order messages come, if chips go by these rules, as programs do that
post a round's receives and sends, wait for them, and add:

* A message carries what its sender has of the earlier rounds, and nothing of its own round.
* What is to be added is received aside, and added when the chip's own messages of that round have left.
* What replaces a chunk is received in its place, at any moment of its round.

So three things are refused besides what is lost, doubled, or sent by those who do not have it. A chip must not
get a replacement for a chunk in a round in which it sends that chunk itself, unless it is given what it has:
what it sends would be the old or the new. Two replacements of one chunk in one round must be the same. And no
chunk may be in two channels, as these do not wait for each other. Pieces are parts of chunks that go the same
ways, so one stands for all; that chunks do not wait for each other (`by_chunk`) changes nothing here.

A chunk without bytes need not get anywhere. That equal sets of contributions have equal sums is assumed:
rounding, which depends on the order of additions, is not looked at.
"""

from dataclasses import dataclass
from math import lcm

import numpy as np
from numpy.typing import NDArray

from comms.collectives.schedule import Op, Round, Schedule
from comms.errors import CommsError
from comms.networks.topology import IntArray, run_starts

Counts = NDArray[np.int16]

MOST = 10_000  # contributions counted; beyond, they are as wrong
BLOCK = 1 << 25  # counts held at a time
REDUCING = frozenset({Op.ALL_REDUCE, Op.REDUCE_SCATTER, Op.REDUCE})
BY_RANK = frozenset({Op.ALL_GATHER, Op.REDUCE_SCATTER, Op.GATHER, Op.SCATTER, Op.BARRIER})


@dataclass(frozen=True, slots=True)
class _Moves:
    """One round taken apart: row i is one chunk that goes from src[i] to dst[i]."""

    where: str
    src: IntArray
    dst: IntArray
    chunk: IntArray
    reduces: bool


def prove(schedule: Schedule) -> None:
    """Raise CommsError with the first fault: what is wrong, of which rank and chunk."""
    _check_shape(schedule)
    channels = [_moves(schedule, index) for index in range(len(schedule.channels))]
    _check_channels(schedule, channels)
    sources = schedule.num_ranks if schedule.op in REDUCING else 1
    nodes = schedule.num_ranks + schedule.num_helpers
    block = max(1, BLOCK // (nodes * sources))
    for low in range(0, schedule.num_chunks, block):
        chunks = np.arange(low, min(low + block, schedule.num_chunks))
        state = _start(schedule, chunks, nodes, sources)
        for each in (each for moves in channels for each in moves):
            _execute(schedule, state, _within(each, chunks), low)
        _check_end(schedule, state, chunks)


def _fault(schedule: Schedule, problem: str, hint: str) -> CommsError:
    return CommsError(problem, f"{schedule.algorithm} {schedule.op} of {schedule.num_ranks} ranks", hint)


def _check_shape(schedule: Schedule) -> None:
    n, chunks = schedule.num_ranks, schedule.num_chunks
    if n < 1 or chunks < 1 or schedule.num_helpers < 0:
        raise _fault(schedule, f"{n} ranks and {chunks} chunks", "there must be at least one of each")
    if not 0 <= schedule.root < n:
        raise _fault(schedule, f"root {schedule.root} is not a rank", f"ranks are 0 .. {n - 1}")
    multiple = lcm(n if schedule.op in BY_RANK else 1, n * n if schedule.op is Op.ALL_TO_ALL else 1)
    if chunks % multiple:
        raise _fault(schedule, f"{chunks} chunks", f"{schedule.op} needs a multiple of {multiple}")
    shares = np.asarray(schedule.shares)
    if shares.shape not in ((), (chunks,)) or not np.isfinite(shares).all() or (shares < 0).any():
        raise _fault(schedule, "shares do not fit the chunks", "give each of them a number of 0 or more")
    for index, channel in enumerate(schedule.channels):
        if channel.pieces < 1:
            raise _fault(
                schedule, f"channel {index} has {channel.pieces} pieces", "there must be at least one"
            )


def _moves(schedule: Schedule, index: int) -> list[_Moves]:
    """The rounds of one channel, every message checked to be one."""
    found = []
    for number, each in enumerate(schedule.channels[index].rounds):
        where = f"channel {index} round {number}"
        _check_messages(schedule, each, where)
        rows = np.repeat(np.arange(len(each.first)), each.count)
        offset = np.arange(len(rows)) - np.repeat(np.cumsum(each.count) - each.count, each.count)
        chunk = (each.first[rows] + offset) % schedule.num_chunks
        found.append(_Moves(where, each.pattern.src[rows], each.pattern.dst[rows], chunk, each.reduces))
    return found


def _check_messages(schedule: Schedule, each: Round, where: str) -> None:
    src, dst = each.pattern.src, each.pattern.dst
    if not len(src) == len(dst) == len(each.first) == len(each.count):
        raise _fault(schedule, f"columns of {where} differ in length", "give one row per message")
    nodes = schedule.num_ranks + schedule.num_helpers
    for rank in (src, dst):
        if outside := rank[(rank < 0) | (rank >= nodes)].tolist():
            raise _fault(schedule, f"{where}: there is no rank {outside[0]}", f"ranks are 0 .. {nodes - 1}")
    if itself := src[src == dst].tolist():
        raise _fault(schedule, f"{where}: rank {itself[0]} sends to itself", "leave that message out")
    bad = (each.first < 0) | (each.first >= schedule.num_chunks)
    bad |= (each.count < 1) | (each.count > schedule.num_chunks)
    if bad.any():
        row = int(np.flatnonzero(bad)[0])
        problem = f"{where}: rank {src[row]} sends {each.count[row]} chunks from chunk {each.first[row]} on"
        raise _fault(schedule, problem, f"chunks are 0 .. {schedule.num_chunks - 1}")


def _check_channels(schedule: Schedule, channels: list[list[_Moves]]) -> None:
    owner = np.full(schedule.num_chunks, -1)
    for index, moves in enumerate(channels):
        taken = np.unique(np.concatenate([each.chunk for each in moves])) if moves else np.zeros(0, np.int64)
        if (owner[taken] >= 0).any():
            chunk = int(taken[owner[taken] >= 0][0])
            problem = f"chunk {chunk} is in channels {owner[chunk]} and {index}"
            raise _fault(schedule, problem, "channels do not wait for each other: give each its own chunks")
        owner[taken] = index


def _within(each: _Moves, chunks: IntArray) -> _Moves:
    """The same of some neighbouring chunks."""
    inside = (each.chunk >= chunks[0]) & (each.chunk <= chunks[-1])
    return _Moves(each.where, each.src[inside], each.dst[inside], each.chunk[inside], each.reduces)


def _brought_by(schedule: Schedule, chunks: IntArray) -> IntArray:
    """Whose each chunk is at first, where it is one rank's."""
    match schedule.op:
        case Op.BROADCAST | Op.SCATTER:
            return np.full_like(chunks, schedule.root)
        case _:
            return chunks // (schedule.num_chunks // schedule.num_ranks)


def _start(schedule: Schedule, chunks: IntArray, nodes: int, sources: int) -> Counts:
    """[node, chunk, source] how often each source's contribution is in each chunk; helpers have nothing."""
    state = np.zeros((nodes, len(chunks), sources), dtype=np.int16)
    if schedule.op in REDUCING:
        ranks = np.arange(schedule.num_ranks)
        state[ranks, :, ranks] = 1
    else:
        state[_brought_by(schedule, chunks), np.arange(len(chunks)), 0] = 1
    return state


def _promised(schedule: Schedule, chunks: IntArray) -> NDArray[np.bool_]:
    """[rank, chunk] Whether the rank must end with the chunk."""
    n, num = schedule.num_ranks, schedule.num_chunks
    ranks = np.arange(n)[:, np.newaxis]
    match schedule.op:
        case Op.ALL_REDUCE | Op.ALL_GATHER | Op.BROADCAST | Op.BARRIER:
            promised = np.ones((n, len(chunks)), dtype=np.bool_)
        case Op.REDUCE_SCATTER | Op.SCATTER:
            promised = chunks // (num // n) == ranks
        case Op.ALL_TO_ALL:
            promised = chunks // (num // n**2) % n == ranks
        case Op.REDUCE | Op.GATHER:
            promised = np.broadcast_to(ranks == schedule.root, (n, len(chunks)))
    if not isinstance(schedule.shares, float):
        promised = promised & (schedule.shares[chunks] > 0)
    return promised


def _execute(schedule: Schedule, state: Counts, each: _Moves, low: int) -> None:
    """One round: everything is read before anything is written."""
    chunk = each.chunk - low
    carried = state[each.src, chunk]
    without = ~carried.any(axis=1)
    if without.any():
        row = int(np.flatnonzero(without)[0])
        problem = f"rank {each.src[row]} sends chunk {each.chunk[row]} in {each.where} without having it"
        raise _fault(schedule, problem, "let it arrive in an earlier round")
    if each.reduces:
        _add(schedule, state, each, chunk, carried)
    else:
        _replace(schedule, state, each, chunk, carried)


def _add(schedule: Schedule, state: Counts, each: _Moves, chunk: IntArray, carried: Counts) -> None:
    nothing = (each.dst < schedule.num_ranks) & ~state[each.dst, chunk].any(axis=1)
    if nothing.any():
        row = int(np.flatnonzero(nothing)[0])
        problem = f"rank {each.dst[row]} adds to chunk {each.chunk[row]} in {each.where} without having it"
        raise _fault(schedule, problem, "let the message replace the chunk")
    key = each.dst * state.shape[1] + chunk
    order = np.argsort(key, kind="stable")
    starts = run_starts(key[order])
    if len(starts):
        target, where = each.dst[order][starts], chunk[order][starts]
        sums = state[target, where] + np.add.reduceat(carried[order].astype(np.int64), starts, axis=0)
        state[target, where] = np.minimum(sums, MOST)


def _replace(schedule: Schedule, state: Counts, each: _Moves, chunk: IntArray, carried: Counts) -> None:
    width = state.shape[1]
    changes = (carried != state[each.dst, chunk]).any(axis=1)
    also_sent = changes & np.isin(each.dst * width + chunk, each.src * width + chunk)
    if also_sent.any():
        row = int(np.flatnonzero(also_sent)[0])
        problem = f"rank {each.dst[row]} sends chunk {each.chunk[row]} in {each.where} while it is replaced"
        raise _fault(schedule, problem, "let one of them have a round of its own")
    key = each.dst * width + chunk
    order = np.argsort(key, kind="stable")
    starts = run_starts(key[order])
    lengths = np.diff(np.append(starts, len(key)))
    differs = (carried[order] != np.repeat(carried[order][starts], lengths, axis=0)).any(axis=1)
    if differs.any():
        row = int(order[np.flatnonzero(differs)[0]])
        problem = f"rank {each.dst[row]} gets chunk {each.chunk[row]} twice in {each.where}, not the same"
        raise _fault(schedule, problem, "let one of them have a round of its own, or add")
    state[each.dst, chunk] = carried


def _check_end(schedule: Schedule, state: Counts, chunks: IntArray) -> None:
    wrong = (state[: schedule.num_ranks] != 1) & _promised(schedule, chunks)[:, :, np.newaxis]
    if not wrong.any():
        return
    rank, place, column = (int(index) for index in np.unravel_index(int(wrong.argmax()), wrong.shape))
    chunk = int(chunks[place])
    source = column if schedule.op in REDUCING else int(_brought_by(schedule, chunks)[place])
    times = int(state[rank, place, column])
    if times == 0:
        problem = f"rank {rank} never gets chunk {chunk} from rank {source}"
        hint = f"let what rank {source} has of chunk {chunk} come to rank {rank} once"
    else:
        often = {2: "twice", MOST: f"{MOST} times or more"}.get(times, f"{times} times")
        problem = f"rank {rank} has chunk {chunk} from rank {source} {often}"
        hint = f"let what rank {source} has of chunk {chunk} come to rank {rank} only once"
    raise _fault(schedule, problem, hint)
