"""Rules by shapes: operations that move entries, make tensors from numbers, or work on matrices in the last dims."""

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch.fx import Node

from partitioner.capture.captured_graph import op_name
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
    place_of,
    split_at,
)

MATRIX, VECTOR = 2, 1  # dims that an operand's entries of one sample have
VECTORS = {"linalg_lu_solve": 1, "linalg_householder_product": 1, "ormqr": 1}  # operands that are so
SOLVES = {"linalg_solve": 1, "linalg_solve_ex": 1, "_linalg_solve_ex": 1}  # operands that may be so


def has_parts(call: OperatorCall, spread: Any) -> bool:
    """Whether the shapes of both traces differ in the samples' dim alone, by the number of parts; of every result."""
    value, whole = call.node.meta["val"], call.whole.meta["val"]
    if isinstance(whole, tuple | list):
        spreads = spread if isinstance(spread, tuple) else (spread,) * len(whole)
        if not len(value) == len(whole) == len(spreads):
            return False
        return all(_has_parts(call, *each) for each in zip(spreads, value, whole, strict=True))
    return _has_parts(call, spread, value, whole)


def _has_parts(call: OperatorCall, spread: Any, value: torch.Tensor, whole: torch.Tensor) -> bool:
    small, large = tuple(value.shape), tuple(whole.shape)
    if not isinstance(spread, Split | Position):
        return small == large
    place = place_of(spread, large, call.samples * call.parts)
    if place is None or len(small) != len(large):
        return False
    return all(
        a * (call.parts if d == place.dim else 1) == b
        for d, (a, b) in enumerate(zip(small, large, strict=True))
    )


def _moved(call: OperatorCall, source: Node, dim: int, inner: int) -> Spread:
    """Samples of `source` now lie in `dim` of the result."""
    kind = type(call.spread(source))
    found = split_at(dim, inner, call.out)
    return Position(found.weight) if kind is Position else found


def _only(call: OperatorCall) -> Node:
    source = call.args[0]
    if call.operands[:1] != [source] or any(not isinstance(call.spread(n), Same) for n in call.operands[1:]):
        raise call.all_whole()
    assert isinstance(source, Node)
    return source


def reshaping(call: OperatorCall) -> Spread:
    """The same entries in the same order: a step to the next sample is as long as before."""
    source = call.args[0]
    spread = call.spread(source)
    if isinstance(spread, Split | Position) and place_of(spread, call.out, call.samples * call.parts) is None:
        raise NeedsWhole([source])
    return spread


def permuting(call: OperatorCall) -> Spread:
    """Dims change their order."""
    source = _only(call)
    if isinstance(call.spread(source), Total):
        return TOTAL
    place, rank = call.place(source), len(call.shape(source))
    name, args = op_name(call.node.target), call.args
    order = list(range(rank))
    if name == "permute":
        order = [d % rank for d in args[1]]
    else:
        first, second = (args[1] % rank, args[2] % rank) if len(args) > 2 else (rank - 2, rank - 1)
        if rank > 1:
            order[first], order[second] = order[second], order[first]
    return _moved(call, source, order.index(place.dim), place.inner)


def expanding(call: OperatorCall) -> Spread:
    """Dims of one entry become longer, or a tensor is laid out several times."""
    source, name = call.args[0], op_name(call.node.target)
    spread = call.spread(source)
    if isinstance(spread, Same):
        return (
            creation(call)
            if name in ("expand", "repeat", "broadcast_to", "expand_as")
            else _unless_longer(call)
        )
    if isinstance(spread, Total):
        return TOTAL
    place, shape = call.place(source), call.shape(source)
    if name == "repeat_interleave":
        times, dim = call.args[1], call.argument("dim")
        if isinstance(times, Node) or dim is None:
            raise NeedsWhole([source])
        is_here = dim % len(shape) == place.dim
        return _moved(call, source, place.dim, place.inner * (times if is_here else 1))
    return _moved(call, source, place.dim + len(call.out) - len(shape), place.inner)


def _unless_longer(call: OperatorCall) -> Spread:
    if tuple(call.node.meta["val"].shape) != call.out:
        raise call.all_whole()
    return SAME


def slicing(call: OperatorCall) -> Spread:
    """Some entries along a dim, or all of them in several tensors."""
    source, name = _only(call), op_name(call.node.target)
    spread, shape = call.spread(source), call.shape(source)
    if isinstance(spread, Total):
        size = shape[call.argument("dim", 0) % len(shape)] if name == "slice" else 0
        if _bounds(call.args, name, size) != _bounds(call.whole.args, name, size):
            raise NeedsWhole([source])
        return TOTAL
    place = call.place(source)
    if name == "diagonal":
        raise NeedsWhole([source])
    dim = call.argument("dim", call.argument("dimension", 0)) % len(shape)
    whole = call.whole.meta["val"]
    if isinstance(whole, tuple | list):
        return _pieces(call, source, place, dim)
    if dim == place.dim:
        is_all = name == "slice" and tuple(whole.shape) == shape
        if not is_all:
            raise NeedsWhole([source])
    elif _bounds(call.args, name, shape[dim]) != _bounds(call.whole.args, name, shape[dim]):
        raise NeedsWhole([source])
    return _moved(call, source, place.dim - (name == "select" and dim < place.dim), place.inner)


def _bounds(args: Sequence[Any], name: str, size: int) -> tuple[Any, ...]:
    """Which entries are taken, the same for the same ones."""
    if name != "slice":
        return tuple(args[1:])
    given = list(args[2:5])
    start, end, step = given + [None, None, 1][len(given) :]
    return slice(start, end, step).indices(size)


def _pieces(call: OperatorCall, source: Node, place: Place, dim: int) -> Spread:
    """Several tensors: apart from each other in a dim without samples, or between rounds of all samples."""
    values, name = call.whole.meta["val"], op_name(call.node.target)
    if dim == place.dim:
        rounds = call.samples * call.parts * place.inner
        if name == "unbind" or any(v.shape[dim] % rounds for v in values):
            raise NeedsWhole([source])
    at = place.dim - (name == "unbind" and dim < place.dim)
    return tuple(split_at(at, place.inner, v.shape) for v in values)


def joining(call: OperatorCall) -> Spread:
    """Tensors one after the other, or side by side in a new dim."""
    values, name = call.args[0], op_name(call.node.target)
    spreads = [call.spread(v) for v in values]
    if all(isinstance(s, Total) for s in spreads):
        return TOTAL
    filled = [v for v in values if prod(call.shape(v))]
    if any(not isinstance(call.spread(v), Split) for v in filled):
        raise call.all_whole()
    places = {call.place(v) for v in filled}
    if len(places) != 1:
        raise call.all_whole()
    place, rank = places.pop(), len(call.out)
    dim = call.argument("dim", 0) % rank
    at = place.dim + (name == "stack" and dim <= place.dim)
    return split_at(at, place.inner, call.out)


def padding(call: OperatorCall) -> Spread:
    """More entries at the ends of the last dims."""
    source = _only(call)
    if isinstance(call.spread(source), Total):
        if call.argument("value", 0):
            raise NeedsWhole([source])
        return TOTAL
    place, rank = call.place(source), len(call.shape(source))
    pads = call.args[1]
    padded = {rank - 1 - index // 2 for index, size in enumerate(pads) if size}
    if place.dim in padded:
        raise NeedsWhole([source])
    return _moved(call, source, place.dim, place.inner)


def item(call: OperatorCall) -> Spread:
    """One of several results."""
    spread: Any = call.spread(call.args[0])
    return spread[call.args[1]] if isinstance(spread, tuple) else spread


def writing(call: OperatorCall) -> Spread:
    """A tensor with some entries of another one: along a dim without samples."""
    target, source = call.args[:2]
    if isinstance(call.spread(target), Total) and isinstance(call.spread(source), Total):
        return TOTAL
    if set(call.split()) != {target, source}:
        raise call.all_whole()
    place, other = call.place(target), call.place(source)
    dim = call.argument("dim", 0) % len(call.shape(target))
    removed = op_name(call.node.target) == "select_scatter" and dim < place.dim
    if dim == place.dim or other != Place(place.dim - removed, place.inner):
        raise call.all_whole()
    return split_at(place.dim, place.inner, call.out)


def views_of_numbers(call: OperatorCall) -> Spread:
    """Complex numbers as pairs, and pairs as complex numbers."""
    spread, makes_pairs = call.spread(call.args[0]), op_name(call.node.target) == "view_as_real"
    if isinstance(spread, Split):
        return Split(spread.weight * 2 if makes_pairs else spread.weight // 2)
    return spread


def masking_corners(call: OperatorCall) -> Spread:
    """Triangles of matrices in the last two dims."""
    source = _only(call)
    if isinstance(call.spread(source), Total):
        return TOTAL
    place = call.place(source)
    if place.dim >= len(call.shape(source)) - 2:
        raise NeedsWhole([source])
    return _moved(call, source, place.dim, place.inner)


def creation(call: OperatorCall) -> Spread:
    """Tensors made of numbers, or of one value many times: a dim that grows with the batch holds samples."""
    small, large = tuple(call.node.meta["val"].shape), call.out
    if small == large:
        return SAME
    name = op_name(call.node.target)
    differing = [d for d, (a, b) in enumerate(zip(small, large, strict=True)) if a != b]
    if (
        len(small) != len(large)
        or len(differing) != 1
        or name in ("linspace", "eye", "tril_indices", "triu_indices")
    ):
        raise call.all_whole()
    dim = differing[0]
    if small[dim] * call.parts != large[dim] or small[dim] % call.samples:
        raise call.all_whole()
    found = split_at(dim, small[dim] // call.samples, large)
    if name != "arange":
        return found
    counts_samples = (call.args[0] if len(call.args) > 1 else 0) == 0 and tuple(call.args[2:]) in ((), (1,))
    if large[dim] != call.samples * call.parts or not counts_samples:
        raise call.all_whole()
    return Position(found.weight)


def matrices(call: OperatorCall) -> Spread:
    """Inverses, determinants, solutions, decompositions: samples lie before the matrices' dims, alike in all."""
    if call.totals():
        raise call.all_whole()
    found, fronts = set[tuple[int, int]](), list[tuple[int, ...]]()
    for node in call.operands:
        front = call.shape(node)[: len(call.shape(node)) - _core(call, node)]
        fronts.append(front)
        if isinstance(call.spread(node), Split):
            place = call.place(node)
            found.add((place.dim - len(front), place.inner))
    if len(found) != 1:
        raise call.all_whole()
    ((dim, inner),) = found
    for node, front in zip(call.operands, fronts, strict=True):
        is_shared = isinstance(call.spread(node), Same)
        if dim >= 0 or (is_shared and -dim <= len(front) and front[dim] != 1):
            raise call.all_whole()
    at = max(map(len, fronts)) + dim
    values = call.whole.meta["val"]
    if not isinstance(values, tuple | list):
        return split_at(at, inner, values.shape)
    # what is not asked for comes back empty
    return tuple(split_at(at, inner, v.shape) if v.numel() else SAME for v in values)


def _core(call: OperatorCall, node: Node) -> int:
    name, shape = op_name(call.node.target), call.shape(node)
    place: Any = VECTORS.get(name)
    if place is not None and call.args[place] is node:
        return VECTOR
    if (place := SOLVES.get(name)) is not None and call.args[place] is node:
        matrix = call.shape(call.args[0])
        return VECTOR if len(shape) == 1 or shape == matrix[:-1] else MATRIX
    return MATRIX
