"""Rules for operations that look entries up."""

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch.fx import Node

from partitioner.capture.samples.arithmetic_rules import aligned
from partitioner.capture.samples.shape_rules import creation
from partitioner.capture.samples.spread import (
    SAME,
    TOTAL,
    NeedsWhole,
    OperatorCall,
    Place,
    Position,
    Same,
    Split,
    Spread,
    Total,
    split_at,
)


def embedding(call: OperatorCall) -> Spread:
    """Rows of a table that all samples share."""
    table, ids = call.args[:2]
    counts = call.argument(
        "scale_grad_by_freq", False
    )  # gradients are divided by how often a row is looked up
    if (
        counts
        or not isinstance(call.spread(table), Same)
        or not isinstance(spread := call.spread(ids), Split)
    ):
        raise call.all_whole()
    return Split(spread.weight * call.shape(table)[1])


def index_select(call: OperatorCall) -> Spread:
    """Entries along one dim: of every sample the same ones, or for every sample others of a shared table."""
    source, dim, ids = call.args[:3]
    dim %= len(call.shape(source))
    if call.split() == [source] and call.place(source).dim != dim:
        place = call.place(source)
        return split_at(place.dim, place.inner, call.out)
    if call.split() == [ids] and isinstance(call.spread(source), Same):
        return split_at(dim, call.place(ids).inner, call.out)
    raise call.all_whole()


def gather(call: OperatorCall) -> Spread:
    """Entries along one dim, in every sample by its own numbers."""
    source, dim, ids = call.args[:3]
    if set(call.split()) != {source, ids} or call.place(source) != call.place(ids):
        raise call.all_whole()
    return _beside(call, source, dim)


def scatter(call: OperatorCall) -> Spread:
    """Entries along one dim replaced (or added to), in every sample by its own numbers."""
    source, dim = call.args[:2]
    nodes = call.split()
    if len(nodes) != len(call.operands) or len({call.place(n) for n in nodes}) != 1:
        raise call.all_whole()
    return _beside(call, source, dim)


def index_add(call: OperatorCall) -> Spread:
    """Of every sample the same entries along one dim replaced (or added to) by its own."""
    source, dim, ids, values = call.args[:4]
    nodes = call.split()
    if set(call.operands) - set(nodes) - {ids} or ids in nodes or call.totals() or source not in nodes:
        raise call.all_whole()
    if isinstance(values, Node) and (values not in nodes or call.place(values) != call.place(source)):
        raise call.all_whole()
    return _beside(call, source, dim)


def _beside(call: OperatorCall, source: Node, dim: int) -> Spread:
    """What works along a dim leaves samples where they are in another."""
    place = call.place(source)
    if dim % len(call.shape(source)) == place.dim:
        raise call.all_whole()
    return split_at(place.dim, place.inner, call.out)


def histogram(call: OperatorCall) -> Spread:
    """Counts of values between bounds that are given add up."""
    source, _, *bounds = call.args
    if not isinstance(call.spread(source), Split) or len(set(bounds)) < 2:
        raise call.all_whole()
    return TOTAL


def one_hot(call: OperatorCall) -> Spread:
    """A new last dim with a one at the class."""
    spread = call.spread(call.args[0])
    if not isinstance(spread, Split):
        raise call.all_whole()
    return Split(spread.weight * call.out[-1])


def ctc(call: OperatorCall) -> Spread:
    """One loss for each sample, which lie in the second dim of log_probs, and first in targets and lengths."""
    places = {n: call.place(n) for n in call.split()}
    if len(places) != len(call.operands) or len({place.inner for place in places.values()}) != 1:
        raise call.all_whole()
    if any(place.dim != (n is call.args[0]) for n, place in places.items()):
        raise call.all_whole()
    return split_at(0, places[call.args[0]].inner, call.out)


def searching(call: OperatorCall) -> Spread:
    """Places of values among sorted ones that all samples share."""
    if len(call.split()) != 1 or call.totals():
        raise call.all_whole()
    return Split(call.spread(call.split()[0]).weight)  # type: ignore[union-attr]


def keyed(call: OperatorCall) -> Spread:
    """Random numbers lie as what they are drawn for does."""
    like = call.args[2]
    spread = call.spread(like)
    if call.has_grown:
        return SAME
    if isinstance(spread, Same):
        return creation(call)
    if not isinstance(spread, Split):
        raise NeedsWhole([like])
    return spread


def index(call: OperatorCall) -> Spread:
    """Indexing with tensors: of every sample the same entries, of a shared table others, or of each sample its own."""
    source, given = call.args[:2]
    indices: list[Any] = [*given, *[None] * (len(call.shape(source)) - len(given))]
    used = [d for d, i in enumerate(indices) if i is not None]
    if any(isinstance(call.spread(n), Total) for n in call.operands):
        raise call.all_whole()
    nodes: list[Node] = [indices[d] for d in used]
    width = max(len(call.shape(n)) for n in nodes)
    if used != list(range(used[0], used[-1] + 1)):  # where indices stand apart their dims move to the front
        if not isinstance(call.spread(source), Split) or (place := call.place(source)).dim not in used:
            raise call.all_whole()
        return _own_entries(call, place, indices[place.dim], nodes, 0, width)
    positions = [n for n in nodes if isinstance(call.spread(n), Position)]
    if isinstance(call.spread(source), Split):
        place = call.place(source)
        if place.dim not in used:
            if any(not isinstance(call.spread(n), Same) for n in nodes):
                raise call.all_whole()
            dim = place.dim if place.dim < used[0] else place.dim - len(used) + width
            return split_at(dim, place.inner, call.out)
        return _own_entries(call, place, indices[place.dim], nodes, used[0], width)
    if positions:
        raise NeedsWhole(positions)
    out = call.out[used[0] : used[0] + width]
    spread = aligned(call, nodes, out)
    if not isinstance(spread, Split):
        raise call.all_whole()
    return Split(spread.weight * prod(call.out[used[0] + width :]))


def index_put(call: OperatorCall) -> Spread:
    """Entries replaced, or added to: of every sample the same, where a mask of it says, or its own by one value."""
    source, given, values = call.args[:3]
    nodes = [n for n in given if n is not None]
    source_is_split = isinstance(call.spread(source), Split)
    if source_is_split and values in call.split() and all(isinstance(call.spread(n), Same) for n in nodes):
        return _same_entries(call, source, [*given], values)
    one = not isinstance(values, Node) or (
        prod(call.shape(values)) == 1 and isinstance(call.spread(values), Same)
    )
    if not one or not source_is_split:
        raise call.all_whole()
    place = call.place(source)
    is_mask = len(given) == 1 and given[0].meta["val"].dtype is torch.bool
    if is_mask and isinstance(call.spread(given[0]), Split) and call.place(given[0]) == place:
        return split_at(place.dim, place.inner, call.out)
    if is_mask or place.dim >= len(given) or len(nodes) != len(given):
        raise call.all_whole()
    _own_entries(call, place, given[place.dim], nodes, 0, max(len(call.shape(n)) for n in nodes))
    return split_at(place.dim, place.inner, call.out)


def _same_entries(call: OperatorCall, source: Node, given: Sequence[Node | None], values: Node) -> Spread:
    """Entries at places that all samples share take values of the same samples."""
    place, rank = call.place(source), len(call.shape(source))
    used = [d for d, i in enumerate(given) if i is not None]
    if place.dim in used or used != list(range(used[0], used[-1] + 1)) or call.totals():
        raise call.all_whole()
    if any(n is not None and n.meta["val"].dtype is torch.bool for n in given):
        raise call.all_whole()
    width = max(len(call.shape(n)) for n in given if n is not None)
    dim = place.dim if place.dim < used[0] else place.dim - len(used) + width
    from_end = dim - (rank - len(used) + width)
    found = call.place(values)
    if (found.dim - len(call.shape(values)), found.inner) != (from_end, place.inner):
        raise call.all_whole()
    return split_at(place.dim, place.inner, call.out)


def _own_entries(
    call: OperatorCall, place: Place, chosen: Node, nodes: list[Node], first: int, width: int
) -> Spread:
    """Every sample's own entries: the index along samples counts them, the others follow its order."""
    number = call.spread(chosen)
    if not isinstance(number, Position) or place.inner != 1:
        raise call.all_whole()
    at = call.place(chosen).dim - len(call.shape(chosen))  # counted from the end
    for node in nodes:
        spread, shape = call.spread(node), call.shape(node)
        if isinstance(spread, Split | Position):
            found = call.place(node)
            if (found.dim - len(shape), found.inner) != (at, 1):
                raise call.all_whole()
        elif -at <= len(shape) and shape[at] != 1:
            raise call.all_whole()
    return split_at(first + width + at, 1, call.out)
