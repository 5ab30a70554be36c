"""Rules for operations that compute: pointwise, reductions, products, norms, convolutions, attention, losses."""

from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Node

from partitioner.capture.captured_graph import op_name
from partitioner.capture.samples.batch_norms import PER_PART
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

NONE, MEAN, SUM = 0, 1, 2  # torch's codes of a loss's reduction
KEEPS_VALUES = {"to", "_to_copy", "clone", "contiguous", "alias", "detach", "lift_fresh_copy", "lift_fresh"}
LIKES = {"zeros_like", "ones_like", "full_like", "empty_like"}
IMAGES = 4  # dims of a batch of them
OF_IMAGES = {
    "pixel_shuffle",
    "pixel_unshuffle",
    "channel_shuffle",
    "im2col",
}  # take single ones too, channels first
ADDITIVE = {"add", "sub", "rsub", "subtract"}
CLASS_DIM = 1
# position of the hidden states' samples, and results besides the output
RECURRENT_STATES = {"lstm": 2, "gru": 1, "rnn_tanh": 1, "rnn_relu": 1}


def pointwise(call: OperatorCall) -> Spread:
    """Entries are computed one by one; operands are broadcast."""
    name = op_name(call.node.target)
    if name in ("max", "min") and call.node.target._overloadname != "other":  # type: ignore[union-attr]
        return reduction(call)
    if name in LIKES and not call.split():
        return SAME
    positions = [n for n in call.operands if isinstance(call.spread(n), Position)]
    if positions and name in KEEPS_VALUES:
        return call.spread(positions[0])
    if positions:
        raise NeedsWhole(positions)
    if call.totals():
        return _linear(call, name)
    return aligned(call, call.operands, call.out)


def aligned(call: OperatorCall, operands: Sequence[Node], out: Sequence[int]) -> Spread:
    """Of operands that are broadcast to `out`: samples must lie in the same place of all that have them."""
    found: set[Place] = set()
    for node in operands:
        if isinstance(call.spread(node), Split):
            place = call.place(node)
            found.add(Place(place.dim - len(call.shape(node)), place.inner))  # counted from the end
    if len(found) != 1:
        if not found:
            return SAME
        raise call.all_whole()
    place = found.pop()
    for node in operands:
        shape = call.shape(node)
        is_same = not isinstance(call.spread(node), Split)
        if is_same and -place.dim <= len(shape) and shape[place.dim] != 1:
            raise NeedsWhole(call.split())
    return split_at(len(out) + place.dim, place.inner, out)


def _linear(call: OperatorCall, name: str) -> Spread:
    """A pointwise operation on totals, if it is linear in them."""
    totals = call.totals()
    if call.split():
        raise NeedsWhole(totals)
    if name in KEEPS_VALUES or name in ("neg", "positive", "negative"):
        value = call.whole.meta["val"]
        if value.dtype.is_floating_point or value.dtype == call.whole.args[0].meta["val"].dtype:  # type: ignore[union-attr]
            return TOTAL
    if name in ADDITIVE:
        shared = [i for i in (0, 1) if not isinstance(call.spread(call.args[i]), Total)]
        if shared and not is_inexact(call.whole.meta["val"]):  # a share of a whole number may be none
            raise NeedsWhole(totals)
        call.shared = shared
        return TOTAL
    if name in ("mul", "multiply") and len(totals) == 1 and call.args[0] is not call.args[1]:
        return TOTAL
    is_quotient = name in ("div", "divide", "true_divide") and not call.node.kwargs.get("rounding_mode")
    if is_quotient and isinstance(call.spread(call.args[1]), Total):
        raise NeedsWhole([call.args[1]])
    if is_quotient and totals == [call.args[0]]:
        return TOTAL
    raise NeedsWhole(totals)


def is_inexact(value: torch.Tensor) -> bool:
    """Whether a part of a number can be told in a value's dtype."""
    return value.dtype.is_floating_point or value.dtype.is_complex


def elementwise_loss(call: OperatorCall) -> Spread:
    """A loss of torch's that compares entry by entry, perhaps added up or averaged."""
    if call.totals():
        raise NeedsWhole(call.totals())
    shapes = [call.shape(n) for n in call.operands]
    spread = aligned(call, call.operands, torch.broadcast_shapes(*shapes))
    how = call.argument("reduction", MEAN)
    if how == NONE or isinstance(spread, Same):
        return spread
    call.is_mean = how == MEAN
    return TOTAL


def reduction(call: OperatorCall) -> Spread:
    """Sums, means, extremes, norms and variances over dims; over samples only sums and means are sums of parts."""
    name, source = op_name(call.node.target), call.args[0]
    overload = getattr(call.node.target, "_overloadname", "")
    if name in ("max", "min") and overload == "other":
        return pointwise(call)
    spread = call.spread(source)
    if PER_PART in call.node.meta and isinstance(spread, Split):
        call.is_mean = True
        return TOTAL
    if isinstance(spread, Total) and name in ("sum", "mean", "nansum") and (name != "nansum"):
        return TOTAL
    if not isinstance(spread, Split):
        raise call.all_whole()
    place, rank = call.place(source), len(call.shape(source))
    dims = _dims(call, rank)
    if place.dim in dims:
        if name not in ("sum", "mean", "nansum", "count_nonzero"):
            raise NeedsWhole([source])
        call.is_mean = name == "mean"
        return TOTAL
    keeps = bool(call.argument("keepdim", False))
    dim = place.dim if keeps else place.dim - sum(d < place.dim for d in dims)
    return split_at(dim, place.inner, call.out)


def _dims(call: OperatorCall, rank: int) -> set[int]:
    given = call.argument("dim")
    if given is None or given == []:
        return set(range(rank))
    return {d % max(rank, 1) for d in (given if isinstance(given, list | tuple) else [given])}


def along_dim(call: OperatorCall) -> Spread:
    """What mixes entries along some dims only: softmax, running sums, sorting."""
    source = call.args[0]
    if not isinstance(call.spread(source), Split) or call.operands != [source]:
        raise call.all_whole()
    place, rank = call.place(source), len(call.shape(source))
    given = call.argument("dims", call.argument("dim"))
    dims = {
        d % rank for d in (given if isinstance(given, list | tuple) else [-1 if given is None else given])
    }
    if place.dim in dims or given == []:
        raise NeedsWhole([source])
    return split_at(place.dim, place.inner, call.out)


def over_trailing(call: OperatorCall) -> Spread:
    """Normalisation over the last dims, with weights that all samples share."""
    source = call.args[0]
    if call.split() != [source] or call.totals():
        raise call.all_whole()
    place, rank = call.place(source), len(call.shape(source))
    if place.dim >= rank - len(call.args[1]):
        raise NeedsWhole([source])
    values = call.whole.meta["val"]
    if isinstance(values, tuple | list):
        return tuple(split_at(place.dim, place.inner, v.shape) for v in values)
    return split_at(place.dim, place.inner, call.out)


def matmul(call: OperatorCall) -> Spread:
    """Products of matrices, with the sum of what is added to them."""
    name, args = op_name(call.node.target), call.args
    if name == "linear":
        bias = args[2] if len(args) > 2 else None
        rank = len(call.shape(args[0]))
        lead = _letters(rank - 1)
        return _product(call, [(args[0], [*lead, "k"]), (args[1], ["n", "k"])], [*lead, "n"], bias)
    if name in ("addmm", "baddbmm"):
        labels = [["m", "k"], ["k", "n"]] if name == "addmm" else [["b", "m", "k"], ["b", "k", "n"]]
        out = ["m", "n"] if name == "addmm" else ["b", "m", "n"]
        return _product(call, list(zip(args[1:3], labels, strict=True)), out, args[0])
    first, second = len(call.shape(args[0])), len(call.shape(args[1]))
    batch = _letters(max(first, second) - 2)
    left = ["k"] if first == 1 else [*batch[len(batch) - (first - 2) :], "m", "k"]
    right = ["k"] if second == 1 else [*batch[len(batch) - (second - 2) :], "k", "n"]
    out = [*batch, *(["m"] if first > 1 else []), *(["n"] if second > 1 else [])]
    return _product(call, [(args[0], left), (args[1], right)], out, None)


def einsum(call: OperatorCall) -> Spread:
    """Einstein's sum, as its equation says."""
    equation, operands = call.args[0].replace(" ", ""), call.args[1]
    inputs, arrow, output = equation.partition("->")
    letters = [
        _spelled(each, len(call.shape(n))) for each, n in zip(inputs.split(","), operands, strict=True)
    ]
    if not arrow or any(len(set(each)) != len(each) for each in letters):
        raise call.all_whole()
    factors = list(zip(operands, letters, strict=True))
    return _product(call, factors, _spelled(output, len(call.out)), None)


def _spelled(term: str, rank: int) -> list[str]:
    """A term's labels; those behind its dots are counted from the last one."""
    before, dots, after = term.partition("...")
    hidden = rank - len(before) - len(after) if dots else 0
    return [*before, *(f"d{i}" for i in reversed(range(hidden))), *after]


def bilinear(call: OperatorCall) -> Spread:
    """Two rows of every sample, and a weight that all share."""
    first, second = call.args[:2]
    if set(call.split()) != {first, second} or call.totals() or call.place(first) != call.place(second):
        raise call.all_whole()
    place = call.place(first)
    if place.dim == len(call.shape(first)) - 1:
        raise call.all_whole()
    return split_at(place.dim, place.inner, call.out)


def trilinear(call: OperatorCall) -> Spread:
    """What a bilinear consists of: a sum of products of three tensors, each with new dims of one entry."""
    expanded, sums = [set(dims) for dims in call.args[3:6]], call.args[6]
    rank = len(call.shape(call.args[0])) + len(expanded[0])
    found: set[tuple[int, int]] = set()
    for node, new in zip(call.args[:3], expanded, strict=True):
        old = [d for d in range(rank) if d not in new]
        if isinstance(call.spread(node), Split):
            found.add((old[call.place(node).dim], call.place(node).inner))
    if len(found) != 1 or call.totals():
        raise call.all_whole()
    ((dim, inner),) = found
    for node, new in zip(call.args[:3], expanded, strict=True):
        if isinstance(call.spread(node), Same) and dim not in new:
            raise call.all_whole()
    if dim in sums:
        raise call.all_whole()
    return split_at(dim - sum(d < dim for d in sums), inner, call.out)


def _letters(number: int) -> list[str]:
    return [f"d{i}" for i in range(max(number, 0))]


def _product(
    call: OperatorCall, factors: Sequence[tuple[Node, list[str]]], out: list[str], added: Any
) -> Spread:
    """A sum of products over the labels that are not in `out`; `added` is broadcast and added."""
    totals = call.totals()
    if totals:
        if (
            len(totals) == 1
            and not call.split()
            and added is None
            and len({n for n, _ in factors}) == len(factors)
        ):
            return TOTAL
        raise NeedsWhole(totals)
    found = {
        (labels[(place := call.place(n)).dim], place.inner) for n, labels in factors if n in set(call.split())
    }
    if len(found) != 1:
        raise call.all_whole()
    label, inner = found.pop()
    for node, labels in factors:
        if (
            label in labels
            and not isinstance(call.spread(node), Split)
            and call.shape(node)[labels.index(label)] != 1
        ):
            raise call.all_whole()
    if label not in out:
        if isinstance(added, Node):
            raise call.all_whole()
        return TOTAL
    result = split_at(out.index(label), inner, call.out)
    if isinstance(added, Node):
        shape = call.shape(added)
        from_end = out.index(label) - len(out)
        if isinstance(call.spread(added), Split):
            place = call.place(added)
            if (place.dim - len(shape), place.inner) != (from_end, inner):
                raise call.all_whole()
        elif -from_end <= len(shape) and shape[from_end] != 1:
            raise call.all_whole()
    return result


def samples_first(call: OperatorCall) -> Spread:
    """Convolutions, pooling, resizing, norms of images: the first dim holds images."""
    source = call.args[0]
    others = [n for n in call.split() if n is not source]
    if not isinstance(call.spread(source), Split) or call.totals():
        raise call.all_whole()
    places = {call.place(n) for n in (source, *others)}
    name = op_name(call.node.target)
    rank = len(call.shape(source))
    weighs = ("conv" in name and len(call.shape(call.args[1])) != rank) or (
        name in OF_IMAGES and rank < IMAGES
    )
    if len(places) != 1 or next(iter(places)).dim != 0 or weighs or (others and "grid_sampler" not in name):
        raise call.all_whole()
    return _first_dims(call, places.pop().inner)


def _first_dims(call: OperatorCall, inner: int) -> Spread:
    values = call.whole.meta["val"]
    if isinstance(values, tuple | list):
        return tuple(split_at(0, inner, v.shape) for v in values)
    return split_at(0, inner, call.out)


def expert_product(call: OperatorCall) -> Spread:
    """Rows of samples, each with its own expert of matrices that all samples share."""
    rows, matrices, expert = call.args[:3]
    split = call.split()
    if set(split) != {rows, expert} or not isinstance(call.spread(matrices), Same):
        raise call.all_whole()
    if len(places := {call.place(n) for n in split}) != 1 or (place := places.pop()).dim != 0:
        raise call.all_whole()
    return _first_dims(call, place.inner)


def batch_norm(call: OperatorCall) -> Spread:
    """With given statistics each image is normalised by itself."""
    if call.argument("training", True) and PER_PART not in call.node.meta:
        raise call.all_whole()
    return samples_first(call)


def instance_norm(call: OperatorCall) -> Spread:
    """Each image has statistics of its own, or all have running ones."""
    if call.argument("running_mean") is not None and call.argument("use_input_stats"):
        raise call.all_whole()
    return samples_first(call)


def attention(call: OperatorCall) -> Spread:
    """Each sample attends to itself: samples lie in front of the last two dims, alike in all."""
    if call.totals():
        raise NeedsWhole(call.totals())
    query, operands = call.args[0], list(dict.fromkeys(call.operands))
    spread = aligned(call, operands, call.shape(query))
    if isinstance(spread, Split):
        place = call.place(query)
        if place.dim >= len(call.shape(query)) - 2:
            raise NeedsWhole(call.split())
        return split_at(place.dim, place.inner, call.out)
    raise call.all_whole()


def recurrent(call: OperatorCall) -> Spread:
    """A recurrent network over time steps; the states have their samples in the second dim."""
    source, batch_first = call.args[0], bool(call.args[-1])
    if getattr(call.node.target, "_overloadname", "") != "input":  # of packed sequences
        raise call.all_whole()
    if not isinstance(call.spread(source), Split) or call.totals():
        raise call.all_whole()
    place = call.place(source)
    states = [n for n in call.split() if n is not source]
    if place != Place(0 if batch_first else 1, place.inner) or any(
        call.place(n) != Place(1, place.inner) for n in states
    ):
        raise call.all_whole()
    values = call.whole.meta["val"]
    dims = [place.dim, *[1] * RECURRENT_STATES[op_name(call.node.target)]]
    return tuple(split_at(dim, place.inner, v.shape) for dim, v in zip(dims, values, strict=True))


def cross_entropy(call: OperatorCall) -> Spread:
    """Logits [samples, classes, ...] against classes or probabilities; means are taken apart before."""
    logits, target = call.args[:2]
    if set(call.split()) != {logits, target} or call.totals():
        raise call.all_whole()
    place, other = call.place(logits), call.place(target)
    rank, is_index = len(call.shape(logits)), len(call.shape(target)) != len(call.shape(logits))
    expected = place.dim - (place.dim > CLASS_DIM) if is_index else place.dim
    if rank < 2 or place.dim == CLASS_DIM or other != Place(expected, place.inner):
        raise call.all_whole()
    how = call.argument("reduction", MEAN)
    if how == NONE:
        return split_at(place.dim - (place.dim > CLASS_DIM), place.inner, call.out)
    if how == MEAN:
        raise call.all_whole()
    return TOTAL
