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
from numpy.typing import NDArray

from comms.simulation.jit import compiled, compiled_inside, wide

EPSILON = 1e-9  # relative; rates closer than this are equal
NONE = -1


FLOW = np.dtype(
    [
        ("rate", "f8"),
        ("old_rate", "f8"),  # before it was drawn in
        ("bottleneck", "i8"),  # resource
        ("row0", "i8"),  # first of its incidences
        ("hops", "i8"),
        ("drawn", "?"),  # is being solved anew
        ("settled", "?"),
    ],
    align=True,
)
RESOURCE = np.dtype(
    [
        ("bytes_per_s", "f8"),
        ("head", "i8"),  # first incidence
        ("count", "i8"),
        ("row", "i8"),  # among the touched
    ],
    align=True,
)
INCIDENCE = np.dtype([("after", "i8"), ("before", "i8"), ("resource", "i8"), ("flow", "i8")], align=True)
TOUCHED = np.dtype([("resource", "i8"), ("room", "f8"), ("open", "i8")], align=True)
SHARE = np.dtype([("share", "f8"), ("row", "i8")], align=True)


class Flows(NamedTuple):
    """The flows under way and who shares what; the last three belong to the solver."""

    flow: NDArray[np.void]  # [flows] FLOW
    resource: NDArray[np.void]  # [resources] RESOURCE
    incidence: NDArray[np.void]  # [flows * hops] INCIDENCE, lists by resource
    drawn: NDArray[np.int64]  # [flows] those to be solved anew
    touched: NDArray[np.void]  # [resources] TOUCHED: theirs, and what is left of them
    heap: NDArray[np.void]  # [resources + 1] SHARE


def empty_flows(bytes_per_s: NDArray[np.float64], num_flows: int, max_hops: int) -> Flows:
    """No flow under way."""
    resources = np.zeros(len(bytes_per_s), dtype=RESOURCE)
    resources["bytes_per_s"], resources["head"], resources["row"] = bytes_per_s, NONE, NONE
    flows = np.zeros(num_flows, dtype=FLOW)
    flows["row0"] = np.arange(num_flows) * max_hops
    return Flows(
        flow=flows,
        resource=resources,
        incidence=np.zeros(num_flows * max_hops, dtype=INCIDENCE),
        drawn=np.zeros(num_flows, dtype=np.int64),
        touched=np.zeros(len(bytes_per_s), dtype=TOUCHED),
        heap=np.zeros(len(bytes_per_s) + 1, dtype=SHARE),
    )


@compiled
def insert(flows: Flows, flow: int, route: NDArray[np.int32], start: int, end: int) -> bool:
    """Put a flow on route[start:end]. True when it is alone on all of it: its rate is then known at once."""
    # The slowest wire is the bottleneck of a flow alone, and a guess for any other: the solver says. Until then such a
    # flow has rate 0, so that it takes nothing from what is left for others.
    alone = True
    slowest = np.inf
    where = NONE
    for hop in range(end - start):
        resource = wide(route[start + hop])
        row = flows.flow[flow].row0 + hop
        first = flows.resource[resource].head
        if first != NONE:
            alone = False
            flows.incidence[first].before = row
        flows.incidence[row].after, flows.incidence[row].before = first, NONE
        flows.incidence[row].resource, flows.incidence[row].flow = resource, flow
        flows.resource[resource].head = row
        flows.resource[resource].count += 1
        if flows.resource[resource].bytes_per_s < slowest:
            slowest, where = flows.resource[resource].bytes_per_s, resource
    flows.flow[flow].hops = end - start
    flows.flow[flow].rate = slowest if alone else 0.0
    flows.flow[flow].bottleneck = where
    return alone


@compiled
def remove(flows: Flows, flow: int) -> bool:
    """Take a flow off its route. True when no other flow shared any of it: no rate changes then."""
    alone = True
    for row in range(flows.flow[flow].row0, flows.flow[flow].row0 + flows.flow[flow].hops):
        resource = flows.incidence[row].resource
        before, after = flows.incidence[row].before, flows.incidence[row].after
        if before == NONE:
            flows.resource[resource].head = after
        else:
            flows.incidence[before].after = after
        if after != NONE:
            flows.incidence[after].before = before
        flows.resource[resource].count -= 1
        if flows.resource[resource].count > 0:
            alone = False
    flows.flow[flow].hops = 0
    flows.flow[flow].rate = 0.0
    return alone


@compiled
def draw_in(flows: Flows, flow: int, num: int) -> int:
    """Mark a flow to be solved anew; the new number of those."""
    if flows.flow[flow].drawn:
        return num
    flows.flow[flow].drawn = True
    flows.flow[flow].old_rate = flows.flow[flow].rate
    flows.drawn[num] = flow
    return num + 1


@compiled
def draw_in_all(flows: Flows, resource: int, num: int, only_bound: bool) -> int:
    """Draw in the flows on a resource, or only those whose bottleneck it is."""
    row = flows.resource[resource].head
    while row != NONE:
        flow = flows.incidence[row].flow
        if not only_bound or flows.flow[flow].bottleneck == resource:
            num = draw_in(flows, flow, num)
        row = flows.incidence[row].after
    return num


@compiled
def solve(flows: Flows, num: int) -> int:
    """Max-min rates for drawn[:num] and all that they disturb; the number solved in the end.

    Old rates are in old_rate; the caller clears drawn of the flows it gets back.
    """
    # Ends, as each turn draws in more flows or is the last. A turn costs what lies on the wires of those drawn in, and
    # not what is under way elsewhere.
    while True:
        touched = _touch(flows, num)
        _fill(flows, touched)
        grown = _check(flows, num, touched)
        for row in range(touched):
            flows.resource[flows.touched[row].resource].row = NONE
        if grown == num:
            return num
        num = grown


@compiled_inside
def _touch(flows: Flows, num: int) -> int:
    """The resources of the flows to be solved, and what the others leave of them."""
    touched = 0
    for index in range(num):
        flow = flows.drawn[index]
        flows.flow[flow].settled = False
        for at in range(flows.flow[flow].row0, flows.flow[flow].row0 + flows.flow[flow].hops):
            resource = flows.incidence[at].resource
            if flows.resource[resource].row == NONE:
                flows.resource[resource].row = touched
                flows.touched[touched].resource = resource
                flows.touched[touched].room = flows.resource[resource].bytes_per_s
                flows.touched[touched].open = 0
                touched += 1
    # What flows that are not drawn in have now is taken as given: if that turns out wrong, `_check` draws them in.
    for place in range(touched):
        row = flows.resource[flows.touched[place].resource].head
        while row != NONE:
            flow = flows.incidence[row].flow
            if flows.flow[flow].drawn:
                flows.touched[place].open += 1
            else:
                flows.touched[place].room -= flows.flow[flow].rate
            row = flows.incidence[row].after
        # The given rates may add up to a rounding more than there is.
        flows.touched[place].room = max(0.0, flows.touched[place].room)
    return touched


@compiled_inside
def _fill(flows: Flows, touched: int) -> None:
    """Progressive filling: the resource with the least share settles its flows; shares only grow."""
    # Settling a flow at the least share leaves no resource with a smaller share than it had. So an entry of the heap
    # that is out of date is too small, never too large: it comes up early, and is put in again as it is now.
    size = wide(0)
    for place in range(touched):
        size = _push(flows, size, flows.touched[place].room / flows.touched[place].open, place)
    while size > 0:
        share, place = flows.heap[0].share, flows.heap[0].row
        size = _pop(flows, size)
        # Its flows have all been settled on other resources.
        if flows.touched[place].open == 0:
            continue
        now = max(0.0, flows.touched[place].room) / flows.touched[place].open
        if now > share * (1.0 + EPSILON):  # others settled here since it was put in
            size = _push(flows, size, now, place)
            continue
        resource = flows.touched[place].resource
        row = flows.resource[resource].head
        while row != NONE:
            flow = flows.incidence[row].flow
            if flows.flow[flow].drawn and not flows.flow[flow].settled:
                flows.flow[flow].settled = True
                flows.flow[flow].rate = now
                flows.flow[flow].bottleneck = resource
                for at in range(flows.flow[flow].row0, flows.flow[flow].row0 + flows.flow[flow].hops):
                    other = flows.resource[flows.incidence[at].resource].row
                    flows.touched[other].room -= now
                    flows.touched[other].open -= 1
            row = flows.incidence[row].after


@compiled_inside
def _check(flows: Flows, num: int, touched: int) -> int:
    """Draw in whoever has no bottleneck now, or is faster than a flow on that flow's bottleneck."""
    for place in range(touched):
        resource = flows.touched[place].resource
        fastest, bound = 0.0, np.inf
        row = flows.resource[resource].head
        while row != NONE:
            flow = flows.incidence[row].flow
            if flows.flow[flow].drawn:
                fastest = max(fastest, flows.flow[flow].rate)
                if flows.flow[flow].bottleneck == resource:
                    bound = min(bound, flows.flow[flow].rate)
            row = flows.incidence[row].after
        # A flow that was left alone keeps its rate if its bottleneck is still full with no faster flow on it, and if no
        # flow that was solved has this as its bottleneck and is slower. Nothing changed on resources not touched.
        full = flows.touched[place].room <= EPSILON * flows.resource[resource].bytes_per_s
        row = flows.resource[resource].head
        while row != NONE:
            flow = flows.incidence[row].flow
            if not flows.flow[flow].drawn:
                rate = flows.flow[flow].rate
                lost = flows.flow[flow].bottleneck == resource and (
                    not full or fastest > rate * (1 + EPSILON)
                )
                if lost or rate > bound * (1 + EPSILON):
                    num = draw_in(flows, flow, num)
            row = flows.incidence[row].after
    return num


@compiled_inside
def _push(flows: Flows, size: int, share: float, row: int) -> int:
    at = size
    while at > 0:
        parent = (at - 1) // 2
        if flows.heap[parent].share <= share:
            break
        flows.heap[at].share, flows.heap[at].row = flows.heap[parent].share, flows.heap[parent].row
        at = parent
    flows.heap[at].share, flows.heap[at].row = share, row
    return size + 1


@compiled_inside
def _pop(flows: Flows, size: int) -> int:
    size -= 1
    share, row = flows.heap[size].share, flows.heap[size].row
    at = 0
    while 2 * at + 1 < size:
        child = 2 * at + 1
        if child + 1 < size and flows.heap[child + 1].share < flows.heap[child].share:
            child += 1
        if flows.heap[child].share >= share:
            break
        flows.heap[at].share, flows.heap[at].row = flows.heap[child].share, flows.heap[child].row
        at = child
    flows.heap[at].share, flows.heap[at].row = share, row
    return size
