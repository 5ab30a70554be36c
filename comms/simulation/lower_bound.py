"""Lower bound: how soon jobs can be done at all, without moving their messages.

The later of two bounds holds: a wire is busy for as long as all that crosses it takes at its rate,
and no message leaves before what its sender waits for has arrived, each as if it had its wires to itself.

Where chunks of a channel do not wait for each other, only its longest message counts. Not counted: messages that
share a port, overheads and noise, all of which can only add.
"""

import numpy as np

from comms.networks.topology import FloatArray
from comms.simulation.compiled import Compiled


def end_lower_bound_s(compiled: Compiled, rates: FloatArray, until_s: float = np.inf) -> float:
    """The last job that is waited for ends no sooner; `rates`: of each resource, the most that it ever has.

    Where it is later than `until_s`, by how much need not be known.
    """
    waited = compiled.runs[~compiled.runs["repeats"]]
    if not len(waited):
        return 0.0
    with np.errstate(divide="ignore", invalid="ignore"):
        busy = np.nan_to_num(compiled.crossings[1] / rates, nan=0.0, posinf=np.inf)
    end_s = float(waited["start_s"].min() + busy.max(initial=0.0))
    if end_s > until_s:
        return end_s
    alone = _alone(compiled, rates)
    for each in waited[waited["group"] == 0]:
        for number in range(each["stream0"], each["stream1"]):
            end_s = max(end_s, _stream_end_s(compiled, alone, number, float(each["start_s"])))
    return end_s


def _alone(compiled: Compiled, rates: FloatArray) -> FloatArray:
    """[edges] The rate of a message that has its wires to itself."""
    edges = compiled.work.edges
    crosses = np.flatnonzero(edges["route1"] > edges["route0"])
    alone = np.full(len(edges), np.inf)
    if len(crosses):  # routes lie end to end, in the order of the edges
        alone[crosses] = np.minimum.reduceat(rates[compiled.work.route], edges["route0"][crosses])
    return alone


def _stream_end_s(compiled: Compiled, alone: FloatArray, number: int, start_s: float) -> float:
    """When a stream is done with its first piece."""
    work = compiled.work
    stream = work.streams[number]
    ready = np.full(stream["ranks"], start_s)
    end_s = start_s
    for each in work.rounds[stream["round0"] : stream["round0"] + stream["rounds"]]:
        first, last, edge0 = int(each["first"]), int(each["last"]), int(each["edge0"])
        if first == last:
            continue
        edges, nbytes = slice(edge0, edge0 + last - first), work.nbytes[first:last]
        with np.errstate(divide="ignore", invalid="ignore"):
            took = np.where(nbytes > 0, nbytes / alone[edges], 0.0)
        came = ready[work.edges["src"][edges]] + took + work.edges["latency_s"][edges]
        end_s = max(end_s, float(came.max()))
        if not stream["by_chunk"]:
            np.maximum.at(ready, work.edges["dst"][edges], came)
    return end_s
