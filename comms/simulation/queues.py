"""Queues: what leaves by each port in which order, and what each chip waits for, from compiled jobs."""

import numpy as np
from numpy.typing import NDArray

from comms.errors import CommsError
from comms.networks.topology import IntArray
from comms.simulation.compiled import Compiled
from comms.simulation.events import QUEUE

MOST = np.iinfo(np.uint16).max


def queues(compiled: Compiled) -> tuple[NDArray[np.void], IntArray]:
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
    queue["start"], queue["end"] = _runs(port[order], segment[order])
    return queue, first


def _runs(port: NDArray[np.int32], segment: NDArray[np.int32]) -> tuple[IntArray, IntArray]:
    """For each row, where its run of equal (port, segment) starts and ends."""
    num = len(port)
    new = np.ones(num, dtype=np.bool_)
    new[1:] = (port[1:] != port[:-1]) | (segment[1:] != segment[:-1])
    firsts = np.flatnonzero(new)
    run_of = np.cumsum(new) - 1
    return firsts[run_of], np.append(firsts[1:], num)[run_of]


def still_to_come(compiled: Compiled) -> NDArray[np.uint16]:
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
    if counts.max(initial=0) > MOST:
        problem = f"{counts.max()} messages to one chip in one round"
        raise CommsError(problem, "full fidelity", f"at most {MOST}: choose another algorithm or fidelity")
    return counts.reshape(ranks, groups)


def received_at_first(compiled: Compiled, left: NDArray[np.uint16]) -> NDArray[np.int32]:
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
