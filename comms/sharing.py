"""Sharing: max-min fair rates of the flows that share wires, kept up to date flow by flow.

Rates are max-min fair when every flow has a bottleneck: a full resource on its route where no other flow is
faster (Bertsekas and Gallager, Data Networks, 1992, section 6.5.2). The condition is necessary and sufficient,
and there is one such set of rates. So when flows come or go, only a few are solved anew by progressive filling,
with the others' rates taken as given; whoever's bottleneck breaks by that is drawn in, until all hold. What is
found is exact, and mostly the few are few.

A flow is the message under way at one port, so flows are numbered by port. Incidences (flow, hop) are doubly
linked lists, one per resource. Everything here is compiled; arrays are changed in place.
"""

from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

EPSILON = 1e-9  # relative; rates closer than this are equal
NONE = -1


class Flows(NamedTuple):
    """The flows under way and who shares what. `scratch_*` belong to the solver."""

    bytes_per_s: NDArray[np.float64]  # [resources] capacity
    head: NDArray[np.int64]  # [resources] first incidence
    count: NDArray[np.int64]  # [resources]
    after: NDArray[np.int64]  # [flows * hops] next incidence of the same resource
    before: NDArray[np.int64]
    resource: NDArray[np.int32]  # [flows * hops]
    num_hops: NDArray[np.int64]  # [flows]
    rate: NDArray[np.float64]  # [flows]
    bottleneck: NDArray[np.int64]  # [flows] resource
    scratch_in: NDArray[np.bool_]  # [flows] solved anew
    scratch_frozen: NDArray[np.bool_]  # [flows]
    scratch_flows: NDArray[np.int64]  # [flows] those solved anew
    scratch_old: NDArray[np.float64]  # [flows] rate before
    scratch_row: NDArray[np.int64]  # [resources] row among the touched, or NONE
    scratch_touched: NDArray[np.int64]  # [resources]
    scratch_room: NDArray[np.float64]  # [touched] capacity left for those solved anew
    scratch_open: NDArray[np.int64]  # [touched] how many of them are not settled
    heap_share: NDArray[np.float64]
    heap_row: NDArray[np.int64]


def empty_flows(bytes_per_s: NDArray[np.float64], num_flows: int, max_hops: int) -> Flows:
    """No flow under way."""
    resources, rows = len(bytes_per_s), num_flows * max(1, max_hops)
    return Flows(
        bytes_per_s=bytes_per_s.copy(),
        head=np.full(resources, NONE),
        count=np.zeros(resources, dtype=np.int64),
        after=np.full(rows, NONE),
        before=np.full(rows, NONE),
        resource=np.zeros(rows, dtype=np.int32),
        num_hops=np.zeros(num_flows, dtype=np.int64),
        rate=np.zeros(num_flows),
        bottleneck=np.full(num_flows, NONE),
        scratch_in=np.zeros(num_flows, dtype=np.bool_),
        scratch_frozen=np.zeros(num_flows, dtype=np.bool_),
        scratch_flows=np.zeros(num_flows, dtype=np.int64),
        scratch_old=np.zeros(num_flows),
        scratch_row=np.full(resources, NONE),
        scratch_touched=np.zeros(resources, dtype=np.int64),
        scratch_room=np.zeros(resources),
        scratch_open=np.zeros(resources, dtype=np.int64),
        heap_share=np.zeros(resources + 1),
        heap_row=np.zeros(resources + 1, dtype=np.int64),
    )


@njit(cache=True)
def insert(flows: Flows, flow: int, route: NDArray[np.int32], start: int, end: int) -> bool:
    """Put a flow on route[start:end]. True when it is alone on all of it: its rate is then known at once."""
    stride = len(flows.after) // len(flows.rate)
    alone = True
    slowest = np.inf
    where = NONE
    for hop in range(end - start):
        resource = route[start + hop]
        row = flow * stride + hop
        first = flows.head[resource]
        if first != NONE:
            alone = False
            flows.before[first] = row
        flows.after[row], flows.before[row] = first, NONE
        flows.resource[row] = resource
        flows.head[resource] = row
        flows.count[resource] += 1
        if flows.bytes_per_s[resource] < slowest:
            slowest, where = flows.bytes_per_s[resource], resource
    flows.num_hops[flow] = end - start
    flows.rate[flow] = slowest if alone else 0.0
    flows.bottleneck[flow] = where
    return alone


@njit(cache=True)
def remove(flows: Flows, flow: int) -> bool:
    """Take a flow off its route. True when nobody shared any of it: no rate changes then."""
    stride = len(flows.after) // len(flows.rate)
    alone = True
    for row in range(flow * stride, flow * stride + flows.num_hops[flow]):
        resource = flows.resource[row]
        before, after = flows.before[row], flows.after[row]
        if before == NONE:
            flows.head[resource] = after
        else:
            flows.after[before] = after
        if after != NONE:
            flows.before[after] = before
        flows.count[resource] -= 1
        if flows.count[resource] > 0:
            alone = False
    flows.num_hops[flow] = 0
    flows.rate[flow] = 0.0
    return alone


@njit(cache=True)
def draw_in(flows: Flows, flow: int, num: int) -> int:
    """Mark a flow to be solved anew; the new number of those."""
    if flows.scratch_in[flow]:
        return num
    flows.scratch_in[flow] = True
    flows.scratch_old[flow] = flows.rate[flow]
    flows.scratch_flows[num] = flow
    return num + 1


@njit(cache=True)
def draw_in_all(flows: Flows, resource: int, num: int, only_bound: bool) -> int:
    """Draw in the flows on a resource, or only those whose bottleneck it is."""
    stride = len(flows.after) // len(flows.rate)
    row = flows.head[resource]
    while row != NONE:
        flow = row // stride
        if not only_bound or flows.bottleneck[flow] == resource:
            num = draw_in(flows, flow, num)
        row = flows.after[row]
    return num


@njit(cache=True)
def solve(flows: Flows, num: int) -> int:
    """Max-min rates for scratch_flows[:num] and all that they disturb; the number solved in the end.

    Old rates are in scratch_old; the caller clears scratch_in of the flows it gets back.
    """
    while True:
        touched = _touch(flows, num)
        _fill(flows, num, touched)
        grown = _check(flows, num, touched)
        for row in range(touched):
            flows.scratch_row[flows.scratch_touched[row]] = NONE
        if grown == num:
            return num
        num = grown


@njit(cache=True)
def _touch(flows: Flows, num: int) -> int:
    """The resources of the flows to be solved, and what the others leave of them."""
    stride = len(flows.after) // len(flows.rate)
    touched = 0
    for index in range(num):
        flow = flows.scratch_flows[index]
        flows.scratch_frozen[flow] = False
        for at in range(flow * stride, flow * stride + flows.num_hops[flow]):
            resource = flows.resource[at]
            if flows.scratch_row[resource] == NONE:
                flows.scratch_row[resource] = touched
                flows.scratch_touched[touched] = resource
                flows.scratch_room[touched] = flows.bytes_per_s[resource]
                flows.scratch_open[touched] = 0
                touched += 1
    for place in range(touched):
        row = flows.head[flows.scratch_touched[place]]
        while row != NONE:
            flow = row // stride
            if flows.scratch_in[flow]:
                flows.scratch_open[place] += 1
            else:
                flows.scratch_room[place] -= flows.rate[flow]
            row = flows.after[row]
        flows.scratch_room[place] = max(0.0, flows.scratch_room[place])
    return touched


@njit(cache=True)
def _fill(flows: Flows, num: int, touched: int) -> None:
    """Progressive filling: the resource with the least share settles its flows; shares only grow."""
    stride = len(flows.after) // len(flows.rate)
    size = 0
    for place in range(touched):
        size = _push(flows, size, flows.scratch_room[place] / flows.scratch_open[place], place)
    while size > 0:
        share, place = flows.heap_share[0], flows.heap_row[0]
        size = _pop(flows, size)
        if flows.scratch_open[place] == 0:
            continue
        now = max(0.0, flows.scratch_room[place]) / flows.scratch_open[place]
        if now > share * (1.0 + EPSILON):  # others settled here since it was put in
            size = _push(flows, size, now, place)
            continue
        resource = flows.scratch_touched[place]
        row = flows.head[resource]
        while row != NONE:
            flow = row // stride
            if flows.scratch_in[flow] and not flows.scratch_frozen[flow]:
                flows.scratch_frozen[flow] = True
                flows.rate[flow] = now
                flows.bottleneck[flow] = resource
                for at in range(flow * stride, flow * stride + flows.num_hops[flow]):
                    other = flows.scratch_row[flows.resource[at]]
                    flows.scratch_room[other] -= now
                    flows.scratch_open[other] -= 1
            row = flows.after[row]


@njit(cache=True)
def _check(flows: Flows, num: int, touched: int) -> int:
    """Draw in whoever has no bottleneck now, or is faster than a flow on that flow's bottleneck."""
    stride = len(flows.after) // len(flows.rate)
    for place in range(touched):
        resource = flows.scratch_touched[place]
        fastest, bound = 0.0, np.inf
        row = flows.head[resource]
        while row != NONE:
            flow = row // stride
            if flows.scratch_in[flow]:
                fastest = max(fastest, flows.rate[flow])
                if flows.bottleneck[flow] == resource:
                    bound = min(bound, flows.rate[flow])
            row = flows.after[row]
        full = flows.scratch_room[place] <= EPSILON * flows.bytes_per_s[resource]
        row = flows.head[resource]
        while row != NONE:
            flow = row // stride
            if not flows.scratch_in[flow]:
                rate = flows.rate[flow]
                lost = flows.bottleneck[flow] == resource and (not full or fastest > rate * (1 + EPSILON))
                if lost or rate > bound * (1 + EPSILON):
                    num = draw_in(flows, flow, num)
            row = flows.after[row]
    return num


@njit(cache=True)
def _push(flows: Flows, size: int, share: float, row: int) -> int:
    at = size
    while at > 0:
        parent = (at - 1) // 2
        if flows.heap_share[parent] <= share:
            break
        flows.heap_share[at], flows.heap_row[at] = flows.heap_share[parent], flows.heap_row[parent]
        at = parent
    flows.heap_share[at], flows.heap_row[at] = share, row
    return size + 1


@njit(cache=True)
def _pop(flows: Flows, size: int) -> int:
    size -= 1
    share, row = flows.heap_share[size], flows.heap_row[size]
    at = 0
    while 2 * at + 1 < size:
        child = 2 * at + 1
        if child + 1 < size and flows.heap_share[child + 1] < flows.heap_share[child]:
            child += 1
        if flows.heap_share[child] >= share:
            break
        flows.heap_share[at], flows.heap_row[at] = flows.heap_share[child], flows.heap_row[child]
        at = child
    flows.heap_share[at], flows.heap_row[at] = share, row
    return size


def fair_rates(
    bytes_per_s: NDArray[np.float64], offsets: NDArray[np.int64], resources: NDArray[np.int32]
) -> NDArray[np.float64]:
    """[flows] Max-min fair rates of flows with routes resources[offsets[i] : offsets[i + 1]], all at once."""
    num = len(offsets) - 1
    flows = empty_flows(bytes_per_s, num, int(np.diff(offsets).max(initial=0)))
    drawn = 0
    for flow in range(num):
        insert(flows, flow, resources, offsets[flow], offsets[flow + 1])
        drawn = draw_in(flows, flow, drawn)
    solve(flows, drawn)
    return flows.rate
