"""Parameters in products, seen through what only moves their entries: which of their dims a product makes or sums over.

And the sections that a dim consists of: how the model takes apart what comes of it.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import Any, TypeAlias

import torch
from torch.fx import Node

from partitioner.capture.captured_graph import op_name, operand
from partitioner.capture.products.dim_places import (
    RESHAPES,
    SAME_PLACE,
    STRIDED,
    followed,
    is_pointwise,
    strided_views,
)
from partitioner.capture.products.product_letters import GROUPS, Product, operands_of, product_of

Origins: TypeAlias = Mapping[Node, Mapping[int, int]]  # parameter -> (dim of a value -> dim of the parameter)
Part: TypeAlias = tuple[Node | None, int, int, int]  # value to follow, its dim, first entry, entries
SPLITS = frozenset(["split", "split_with_sizes", "chunk"])
LOOKUPS = {"embedding": (0, 1), "embedding_bag": (1,), "_embedding_bag": (1,)}
PARTS = frozenset(["slice", "narrow", "select", "unbind"]) | SPLITS


@dataclass(frozen=True, slots=True)
class ProductUse:
    """A parameter in a product: its dims that the product makes, that both operands have, and that are summed over.

    `other`: the other operand. `groups`: of a convolution, where `shared` is groups of channels.
    """

    param: Node
    node: Node
    other: Node
    made: tuple[int, ...]
    shared: tuple[int, ...]
    summed: tuple[int, ...]
    groups: int


def letters_at(node: Node) -> Product | None:
    """The letters of a product, or None."""
    values: Any = torch.fx.node.map_arg((node.args, dict(node.kwargs)), lambda n: n.meta.get("val"))
    return product_of(node.target, *values) if node.op == "call_function" else None


def product_uses(nodes: Iterable[Node], params: Mapping[Node, object]) -> Iterator[ProductUse]:
    """Every parameter in every product of `nodes`, in their order."""
    for node in nodes:
        found = letters_at(node)
        if found is None:
            continue
        operands = operands_of(found, node.args)
        for own, letters, other in zip(operands, found.letters, reversed(operands), strict=True):
            for param, places in (origins(own, params) or {}).items():
                dims: dict[str, list[int]] = {"made": [], "shared": [], "summed": []}
                for dim, letter in enumerate(letters):
                    if letter is not None and dim in places:
                        is_summed = letter not in found.out
                        kind = "summed" if is_summed else "shared" if letter in found.shared else "made"
                        dims[kind].append(places[dim])
                groups = found.groups if GROUPS in letters else 1
                made, shared, summed = map(tuple, dims.values())
                yield ProductUse(param, node, other, made, shared, summed, groups)


def lookups(nodes: Iterable[Node], params: Mapping[Node, object]) -> Iterator[tuple[Node, tuple[int, ...]]]:
    """Tables that rows are looked up in, with the dims along which they can be cut."""
    for node in nodes:
        dims = LOOKUPS.get(op_name(node.target))
        if dims is not None and node.args[0] in params:
            yield operand(node, 0), dims


def bias_of(node: Node, params: Mapping[Node, object]) -> Node | None:
    """The parameter that a product adds."""
    found = letters_at(node)
    place = found.bias if found is not None else None
    bias = node.args[place] if place is not None and place < len(node.args) else None
    return bias if isinstance(bias, Node) and bias in params else None


def origins(value: Node, params: Mapping[Node, object]) -> Origins | None:
    """The parameters that a value is made of, and of nothing else, with their dims; None if of other things too."""
    if value in params:
        return {value: {d: d for d in range(value.meta["val"].dim())}}
    name = op_name(value.target)
    moves = name in RESHAPES | STRIDED | {"index", "index_select", "batch_norm"}
    if value.op != "call_function" or not (moves or name == "getitem" or is_pointwise(value.target)):
        return None
    if name == "getitem":  # of a weight that is split
        source = value.args[0]
        if not isinstance(source, Node) or op_name(source.target) not in SPLITS:
            return None
        return origins(source.all_input_nodes[0], params)
    result: dict[Node, dict[int, int]] = {}
    for source in value.all_input_nodes[:1] if moves else value.all_input_nodes:
        found = origins(source, params)
        if found is None:
            return None
        for param, places in found.items():
            moved = {followed(value, source, dim): at for dim, at in places.items()}
            result[param] = {dim: at for dim, at in moved.items() if dim is not None}
    return result


def sections_of(param: Node, dim: int, tp: int) -> tuple[int, ...]:
    """The lengths of the parts into which the model takes a dim of a parameter, or what products make of it."""
    length = int(param.meta["val"].shape[dim])
    borders = {0, length}
    open_, seen = [(param, dim, 0, length)], set()
    while open_:
        item = open_.pop()
        if item in seen:
            continue
        seen.add(item)
        value, at, offset, _ = item
        for user in value.users:
            for result, place, start, size in _parts(user, value, at, tp):
                borders |= {offset + start, offset + start + size}
                if result is not None:
                    open_.append((result, place, offset + start, size))
    ordered = sorted(borders)
    return tuple(b - a for a, b in pairwise(ordered))


def _parts(user: Node, value: Node, dim: int, tp: int) -> Iterator[Part]:
    """What becomes of a dim: every part of it that is used."""
    name, size = op_name(user.target), int(value.meta["val"].shape[dim])
    if name in PARTS and user.args[0] is value:
        yield from _taken(user, value, dim)
    elif name == "glu" and user.meta["val"].shape[dim] != size:
        yield from ((None, dim, start, size // 2) for start in (0, size // 2))
    elif name in RESHAPES:
        yield from _seen_apart(user, value, dim, tp)
    elif (product := letters_at(user)) is not None:
        for own, letters in zip(operands_of(product, user.args), product.letters, strict=True):
            letter = letters[dim] if own is value else None
            place = product.out.index(letter) if letter is not None and letter in product.out else None
            if (
                place is not None and user.meta["val"].shape[place] == size
            ):  # groups may get wider or narrower
                yield user, place, 0, size
    elif (moved := followed(user, value, dim)) is not None:
        yield user, moved, 0, size


def _taken(user: Node, value: Node, dim: int) -> Iterator[Part]:
    shape = tuple(value.meta["val"].shape)
    _, views = strided_views(lambda x: user.target(x, *user.args[1:], **user.kwargs), shape)  # type: ignore[operator]
    is_many = op_name(user.target) in SPLITS | {"unbind"}
    results: dict[Any, Node] = {0: user}
    if is_many:
        results = {n.args[1]: n for n in user.users if op_name(n.target) == "getitem"}
    for index, result in results.items():
        view = views[index]
        found = [d for d, stride in enumerate(view.stride()) if stride == 2**dim]
        if found and view.dim() == len(shape) - (op_name(user.target) in ("select", "unbind")):
            first = view.storage_offset() // 2**dim if view.shape[found[0]] != shape[dim] else 0
            yield result, found[0], first, int(view.shape[found[0]])


def _seen_apart(user: Node, value: Node, dim: int, tp: int) -> Iterator[Part]:
    """A dim seen as several: the outermost that is not taken apart is cut, in every entry of those around it."""
    place = followed(user, value, dim)
    if place is None:
        return
    size, after = int(value.meta["val"].shape[dim]), tuple(user.meta["val"].shape)
    dims: list[int] = []
    while prod(dims) < size and place + len(dims) < len(after):
        dims.append(after[place + len(dims)])
    if prod(dims) != size:
        return
    apart = _taken_apart(user, place, len(dims))
    kept = next((d for d in range(len(dims)) if d not in apart), None)
    if kept is not None and dims[kept] % tp == 0:
        length = prod(dims[kept:])
        yield from ((None, place + kept, n * length, length) for n in range(size // length) if kept)
        if len(dims) == 1:
            yield user, place, 0, size


def _taken_apart(view: Node, first: int, number: int) -> set[int]:
    """Which of `number` dims of a view, from `first` on, are selected from or split, through moves of dims."""
    found: set[int] = set()
    for which in range(number):
        open_ = [(view, first + which)]
        while open_:
            node, dim = open_.pop()
            for user in node.users:
                place = followed(user, node, dim)
                name = op_name(user.target)
                if name in PARTS and user.args[0] is node:
                    parts = list(_taken(user, node, dim))
                    if not parts or any(size != node.meta["val"].shape[dim] for _, _, _, size in parts):
                        found.add(which)
                if place is not None and (name in STRIDED or name in SAME_PLACE):
                    open_.append((user, place))
    return found
