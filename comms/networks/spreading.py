"""Spreading: what each of the ways of a message carries, so that its busiest wire carries as little as may be.

Shares are balanced from even ones on, which keeps like ways alike. Where they then carry less than the wires could (a
way that crosses others takes what those need), they are filled up to a maximum flow (Ford and Fulkerson, 1956;
shortest augmenting paths, Edmonds and Karp, 1972), which may take other ways over the same wires. A flow is known to be
one by a cut: every way crosses exactly one wire of a set of full ones. Nothing depends on the numbers of nodes.
"""

from collections.abc import Iterator

import numpy as np

from comms.networks.topology import FloatArray, IntArray, Routes, Ways, Wires, merged_ways

BALANCING = 4  # times that what they carry is balanced
SLACK = 1e-9  # of a rate: less is nothing


def spread(routes: Routes, message: IntArray, wires: Wires, *, exact: bool) -> Ways:
    """Ways over these routes, at least one of each message; `exact`: other ways too where these cannot carry as much.

    Never slower than the widest way alone.
    """
    rates = wires.bytes_per_s
    ways = Ways(routes, message, _balanced(routes, message, rates))
    if len(message) == message.max(initial=-1) + 1:
        return ways
    used, load = _loads(ways, rates)
    busiest = np.zeros(int(message[-1]) + 1)
    np.maximum.at(busiest, np.repeat(message, np.diff(routes.offsets)), load)
    lacking = _not_full(ways, used, load, busiest) if exact else _slower_than_one(ways, rates, busiest)
    if not len(lacking):
        return ways
    others = np.setdiff1d(message, lacking)
    parts = [(others, _of(ways, others))]
    if not exact:
        return merged_ways(len(busiest), [*parts, (lacking, _widest(_of(ways, lacking), rates))])
    for number in lacking.tolist():
        which = np.array([number])
        parts.append((which, _filled(_of(ways, which), wires, busiest[number])))
    return merged_ways(len(busiest), parts)


def _of(ways: Ways, which: IntArray) -> Ways:
    """Those of some messages, which are numbered anew."""
    rows = np.flatnonzero(np.isin(ways.message, which))
    return Ways(ways.routes.take(rows), np.searchsorted(which, ways.message[rows]), ways.share[rows])


def _loads(ways: Ways, rates: FloatArray) -> tuple[IntArray, FloatArray]:
    """By wire of each way: a number of its message and wire, and the seconds per byte that the message is on it."""
    lengths, wires = np.diff(ways.routes.offsets), ways.routes.wires
    _, used = np.unique(np.repeat(ways.message, lengths) * len(rates) + wires, return_inverse=True)
    return used, np.bincount(used, weights=np.repeat(ways.share, lengths))[used] / rates[wires]


def _not_full(ways: Ways, used: IntArray, load: FloatArray, busiest: FloatArray) -> IntArray:
    """Messages without a cut that proves that no more could be carried."""
    starts = ways.routes.offsets[:-1]
    of = np.repeat(np.arange(len(starts)), np.diff(ways.routes.offsets))
    full = np.where(load >= busiest[ways.message[of]] * (1 - SLACK), np.arange(len(load)), len(load))
    first = np.minimum.reduceat(full, starts)  # the first full wire of each way
    cut = np.zeros(len(load) + 1, dtype=np.int64)
    cut[used[first[first < len(load)]]] = 1
    return np.unique(ways.message[np.add.reduceat(cut[used], starts) != 1])


def _widths(ways: Ways, rates: FloatArray) -> FloatArray:
    return np.minimum.reduceat(rates[ways.routes.wires], ways.routes.offsets[:-1])


def _slower_than_one(ways: Ways, rates: FloatArray, busiest: FloatArray) -> IntArray:
    return np.unique(ways.message[_widths(ways, rates) * busiest[ways.message] > 1 + SLACK])


def _widest(ways: Ways, rates: FloatArray) -> Ways:
    """Only the widest ways of each message."""
    widths = _widths(ways, rates)
    most = np.zeros(int(ways.message[-1]) + 1)
    np.maximum.at(most, ways.message, widths)
    kept = np.flatnonzero(widths == most[ways.message])
    routes, message = ways.routes.take(kept), ways.message[kept]
    return Ways(routes, message, _balanced(routes, message, rates))


def _filled(ways: Ways, wires: Wires, busiest: float) -> Ways:
    """The ways of one message and others over the same wires, with all that these can carry at once."""
    own, of = np.unique(ways.routes.wires, return_inverse=True)
    carried = np.bincount(of, weights=np.repeat(ways.share, np.diff(ways.routes.offsets))) / busiest
    ends = [*zip(wires.tail[own].tolist(), wires.head[own].tolist(), strict=True)]
    source, target = ends[of[0]][0], ends[of[-1]][1]
    flow, room = carried.tolist(), wires.bytes_per_s[own].tolist()
    while path := _augmenting(ends, flow, room, source, target):
        more = min(room[wire] - flow[wire] if ahead else flow[wire] for wire, ahead in path)
        for wire, ahead in path:
            flow[wire] += more if ahead else -more
    found = [*_taken_apart(ends, flow, room, source, target)]
    offsets = np.cumsum([0, *(len(path) for path, _ in found)])
    routes = Routes(offsets, own[np.concatenate([path for path, _ in found])])
    amounts = np.array([amount for _, amount in found])
    return Ways(routes, np.zeros(len(found), dtype=np.int64), amounts / amounts.sum())


def _augmenting(
    ends: list[tuple[int, int]], flow: list[float], room: list[float], source: int, target: int
) -> list[tuple[int, bool]]:
    """The fewest wires, each ahead or back, over which more could flow; none where there are none."""
    came: dict[int, tuple[int, bool, int]] = {source: (-1, True, source)}
    queue = [source]
    for node in queue:
        for wire, (tail, head) in enumerate(ends):
            for ahead, here, there in ((True, tail, head), (False, head, tail)):
                left = room[wire] - flow[wire] if ahead else flow[wire]
                if here == node and there not in came and left > SLACK * room[wire]:
                    came[there] = wire, ahead, node
                    queue.append(there)
    path = list[tuple[int, bool]]()
    node = target if target in came else source
    while node != source:
        wire, ahead, node = came[node]
        path.append((wire, ahead))
    return path[::-1]


def _taken_apart(
    ends: list[tuple[int, int]], flow: list[float], room: list[float], source: int, target: int
) -> Iterator[tuple[list[int], float]]:
    """Ways and what each carries; at most one for each wire, as each takes all of one."""
    while True:
        path, node = list[int](), source
        while node != target:
            out = [w for w, (tail, _) in enumerate(ends) if tail == node and flow[w] > SLACK * room[w]]
            if not out:
                return
            path.append(out[0])
            node = ends[out[0]][1]
        amount = min(flow[wire] for wire in path)
        yield path, amount
        for wire in path:
            flow[wire] -= amount


def _balanced(routes: Routes, message: IntArray, bytes_per_s: FloatArray) -> FloatArray:
    """What each route carries: from even shares on, less where a wire of it is busier than those of others."""
    share = 1.0 / np.bincount(message)[message]
    if (share == 1.0).all():
        return share
    lengths = np.diff(routes.offsets)
    own = np.repeat(message, lengths)
    _, used = np.unique(own * len(bytes_per_s) + routes.wires, return_inverse=True)
    for _ in range(BALANCING):
        carried = np.bincount(used, weights=np.repeat(share, lengths))[used]
        share = share / np.maximum.reduceat(carried / bytes_per_s[routes.wires], routes.offsets[:-1])
        share = share / np.bincount(message, weights=share)[message]
    return share
