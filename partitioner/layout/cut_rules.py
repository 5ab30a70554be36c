"""What an operation does to cut values, as rules by the operator's name: `RULES[name](call)`.

A rule gives the result on one chip, cut or whole, or None where it does not know: the operation then gets whole
values, on every chip. An operator without a rule here, in `cut_products` or in `vocabulary` always does.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from math import prod
from typing import Any, TypeAlias

import torch
from torch.utils._pytree import tree_leaves, tree_map

from partitioner.capture.captured_graph import op_name
from partitioner.capture.products.dim_places import RESHAPES, STRIDED, indexed_place, place_in, strided_views
from partitioner.layout.cut_values import CutTensor, TpGroup, Value, is_any_cut
from partitioner.program.program import local_length

aten = torch.ops.aten
Rule: TypeAlias = Callable[["CutCall"], Any]
LAST_TWO = 2


@dataclass(frozen=True, slots=True)
class CutCall:
    """An operation with some cut operands. `out`: its result of whole operands, for shapes alone."""

    group: TpGroup
    target: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    out: Any

    @property
    def x(self) -> Any:
        """The first operand."""
        return self.args[0]

    def get(self, place: int, name: str, default: Any = None) -> Any:
        """An argument by its place or name."""
        return self.args[place] if len(self.args) > place else self.kwargs.get(name, default)

    def run(self, *args: Any) -> Any:
        """The operation on these operands."""
        return self.target(*args, **self.kwargs)

    def on_local(self, *rest: Any) -> Any:
        """The operation on the local part of the first operand."""
        return self.run(self.x.local, *rest)


def pointwise(call: CutCall) -> Any:
    """Operands cut alike as the result is; what has only one entry there is used by all chips."""
    if not isinstance(call.out, torch.Tensor):
        return None
    operands = [
        leaf
        for leaf in tree_leaves((call.args, dict(call.kwargs)))
        if isinstance(leaf, CutTensor | torch.Tensor)
    ]
    rank = call.out.dim()
    leader = max(
        (o for o in operands if isinstance(o, CutTensor)), key=lambda o: (o.shape.numel(), not o.is_weight)
    )
    place = leader.dim + rank - len(leader.shape)
    if call.out.shape[place] != sum(leader.sections):
        return None
    is_sum = op_name(call.target) in ("add", "sub")
    if is_sum and any(_is_bigger_whole(o, call.out) for o in operands):
        return None

    def own(operand: Any) -> Any:
        if not isinstance(operand, CutTensor | torch.Tensor):
            return operand
        dim = place - (rank - len(operand.shape))
        if dim >= 0 and operand.shape[dim] > 1:
            return call.group.at(operand, dim, leader.sections)
        return call.group.entered(call.group.whole(operand))

    args, kwargs = tree_map(own, (call.args, dict(call.kwargs)))
    is_weight = all(isinstance(o, CutTensor) and o.is_weight for o in operands)
    is_weight &= not is_sum or call.group.is_even(leader.sections)  # what fills up is no longer zeros
    return CutTensor(call.target(*args, **kwargs), place, leader.sections, is_weight)


def added(group: TpGroup, one: Value, other: Value) -> Value:
    """The sum of two values of any cut."""
    if not is_any_cut((one, other)):
        return torch.add(one, other)  # type: ignore[arg-type]
    out = torch.empty(torch.broadcast_shapes(one.shape, other.shape), device="meta")
    made: Value | None = pointwise(CutCall(group, aten.add.Tensor, (one, other), {}, out))
    return group.whole(one) + group.whole(other) if made is None else made


def _is_bigger_whole(operand: Any, out: torch.Tensor) -> bool:
    """A whole activation as large as the result (a residual): the sum is wanted whole, too, and so one gather less."""
    is_whole = isinstance(operand, torch.Tensor) and operand.requires_grad and not operand.is_leaf
    return is_whole and operand.shape == out.shape


def viewed(call: CutCall) -> Any:
    """The same entries with other dims, see `seen_dim`."""
    x: CutTensor = call.x
    found = seen_dim(x, tuple(call.out.shape), call.group.size)
    if found is None:
        return None
    dim, sections = found
    shape = list(call.out.shape)
    shape[dim] = local_length(sections, call.group.size)
    return CutTensor(x.local.reshape(shape), dim, sections, x.is_weight)


def seen_dim(x: CutTensor, shape: Sequence[int], parts: int) -> tuple[int, tuple[int, ...]] | None:
    """Where the cut is when `x` is seen with another shape: (dim, sections); None if slices do not stay together.

    Of a dim that consists of others the outermost that is cut must divide; equal sections lie side by side in the
    dim around them.
    """
    old = list(x.shape)
    for dim, size in enumerate(shape):
        if size == old[x.dim] and prod(shape[:dim]) == prod(old[: x.dim]):
            return dim, x.sections
    length = x.sections[0]
    if any(section != length for section in x.sections) or length % parts:
        return None
    before = prod(old[: x.dim]) * len(x.sections)
    for dim, size in enumerate(shape):
        outer = prod(shape[:dim])
        if size > 1 and outer <= before < outer * size:
            around = before // outer
            if before % outer or size % around or (size // around) % parts:
                return None
            return dim, (size // around,) * around
    return None


def rearranged(call: CutCall) -> Any:
    """Dims move, appear, vanish or are taken apart, but not the cut one; on that, whole sections are taken."""
    x: CutTensor = call.x
    seen, views = strided_views(lambda probe: call.run(probe, *call.args[1:]), x.shape)
    places = [place_in(view, x.dim, x.shape[x.dim]) for view in views]
    if None in places:
        return _sections_of(call, views) if all(len(v.shape) == len(x.shape) for v in views) else None
    args = list(call.args[1:])
    if op_name(call.target) == "expand":
        args[0] = [-1 if d == places[0] else size for d, size in enumerate(args[0])]
    is_many = isinstance(seen, tuple | list)
    made = call.on_local(*args)
    if any(m.dim() != v.dim() for m, v in zip(made if is_many else [made], views, strict=True)):
        return None  # a slice of one entry was squeezed
    results = [x.with_local(m, p) for m, p in zip(made if is_many else [made], places, strict=True)]
    return results if is_many else results[0]


def _sections_of(call: CutCall, views: Sequence[torch.Tensor]) -> Any:
    """Parts of the cut dim that consist of whole sections."""
    x: CutTensor = call.x
    starts, results = list(accumulate(x.sections, initial=0)), []
    for view in views:
        first, length = view.storage_offset() // 2**x.dim, view.shape[x.dim]
        others = [size for d, size in enumerate(view.shape) if d != x.dim]
        is_part = view.stride(x.dim) == 2**x.dim and others == [
            n for d, n in enumerate(x.shape) if d != x.dim
        ]
        if not is_part or first not in starts or first + length not in starts:
            return None
        begin, end = starts.index(first), starts.index(first + length)
        own, before = x.sections[begin:end], x.sections[:begin]
        local = x.local.narrow(
            x.dim, local_length(before, call.group.size), local_length(own, call.group.size)
        )
        results.append(replace(x, local=local, sections=own))
    return results if isinstance(call.out, tuple | list) else results[0]


def put_together(call: CutCall) -> Any:
    """`cat` and `stack` of values cut alike; along the cut dim itself, sections lie side by side."""
    parts, rank = list(call.x), len(call.out.shape)
    leader = next(p for p in parts if isinstance(p, CutTensor))
    dim = call.get(1, "dim", 0) % rank
    is_stack = op_name(call.target) == "stack"
    if not is_stack and dim == leader.dim:
        if not all(isinstance(p, CutTensor) and p.dim == dim for p in parts):
            return None
        sections = tuple(s for p in parts for s in p.sections)
        return CutTensor(torch.cat([p.local for p in parts], dim), dim, sections)
    own = [call.group.at(p, leader.dim, leader.sections) for p in parts]
    return leader.with_local(call.target(own, dim), leader.dim + (is_stack and dim <= leader.dim))


def repeated(call: CutCall) -> Any:
    """Entries one after the other several times; those of the cut dim make longer slices."""
    x, times, dim = call.x, call.get(1, "repeats"), call.get(2, "dim")
    if dim is None or not isinstance(times, int):
        return None
    factor = times if dim % len(x.shape) == x.dim else 1
    if not call.group.is_even(x.sections):
        return None
    local = torch.repeat_interleave(x.local, times, dim)  # not into as many entries as the whole has
    return replace(x, local=local, sections=tuple(n * factor for n in x.sections))


def tiled(call: CutCall) -> Any:
    """All entries side by side several times, along dims that are not cut."""
    x, times = call.x, call.get(1, "repeats")
    place = x.dim + len(times) - len(x.shape)
    return x.with_local(call.on_local(times), place) if times[place] == 1 else None


def along(dims: Callable[[CutCall], Any]) -> Rule:
    """The rule for operators that treat the entries of all dims apart from `dims(call)` by themselves."""

    def rule(call: CutCall) -> Any:
        x, taken = call.x, dims(call)
        rank = len(x.shape)
        if taken is None or not isinstance(x, CutTensor) or is_any_cut((call.args[1:], dict(call.kwargs))):
            return None
        if x.dim in {d % rank for d in taken}:
            return None
        rest = [call.group.entered(a) if isinstance(a, torch.Tensor) else a for a in call.args[1:]]
        made = call.on_local(*rest)
        return tuple(map(x.with_local, made)) if isinstance(made, tuple | list) else x.with_local(made)

    return rule


def last(count: int) -> Rule:
    """The rule for operators on the last dims."""
    return along(lambda call: range(-count, 0))


def _dim(place: int, default: Any = None) -> Callable[[CutCall], Any]:
    def dims(call: CutCall) -> Any:
        found = call.get(place, "dim", default)
        return [found] if isinstance(found, int) else found or None

    return dims


def reduced(call: CutCall) -> Any:
    """Sums, means and the like over dims; over the cut one, sums and means of slices are added up."""
    x, name = call.x, op_name(call.target)
    rank, given = len(x.shape), call.get(2 if "norm" in name else 1, "dim")
    if isinstance(given, bool | float):
        return None
    dims = {d % rank for d in ([given] if isinstance(given, int) else given or range(rank))}
    made = call.on_local(*call.args[1:])
    if x.dim not in dims:
        results = call.out if isinstance(call.out, tuple | list) else [call.out]
        dim = x.dim - (0 if results[0].dim() == rank else sum(d < x.dim for d in dims))
        if isinstance(made, tuple | list):
            return [x.with_local(m, dim) for m in made]
        return x.with_local(made, dim)
    if name not in ("sum", "mean") or len(x.sections) > 1:
        return None
    return call.group.total(made / call.group.size if name == "mean" else made)


def gated(call: CutCall) -> Any:
    """One half times the sigmoid of the other: halves of the cut dim are sections."""
    x, dim = call.x, call.get(1, "dim", -1) % len(call.x.shape)
    if x.dim != dim:
        return x.with_local(call.on_local(*call.args[1:]))
    first, *rest = x.sections
    return replace(x, local=call.on_local(*call.args[1:]), sections=(first,)) if rest == [first] else None


def by_channel(call: CutCall) -> Any:
    """Norms that treat channels (dim 1), or groups of them, by themselves: their parameters are cut along."""
    x, name = call.x, op_name(call.target)
    if x.dim != 1 or not call.group.is_even(x.sections):
        return None
    args = list(call.args[1:])
    if name == "group_norm":
        if args[0] % call.group.size or len(x.sections) > 1:
            return None
        args[0] //= call.group.size
    if name == "prelu" and args[0].numel() == 1:
        return x.with_local(call.on_local(call.group.entered(args[0])))
    own = [call.group.at(a, 0, x.sections) if isinstance(a, torch.Tensor | CutTensor) else a for a in args]
    made = call.on_local(*own)
    if not isinstance(made, tuple | list):
        return x.with_local(made)
    first, *others = made  # statistics of channels, which evaluation leaves empty
    return (x.with_local(first), *(x.with_local(o, 0) if o.numel() else o for o in others))


def indexed(call: CutCall) -> Any:
    """Entries looked up by whole indices, in dims that are not cut."""
    x, indices = call.x, list(call.args[1])
    place = None if is_any_cut(indices) else indexed_place(indices, x.dim)
    return None if place is None else x.with_local(call.on_local(indices), place)


def _padded(call: CutCall) -> Any:
    pad, rank = call.get(1, "pad"), len(call.x.shape)
    return [rank - 1 - n // 2 for n, size in enumerate(pad) if size]


def _normalized(call: CutCall) -> Any:
    return range(-len(call.args[1]), 0)


RULES: dict[str, Rule] = {
    **dict.fromkeys(RESHAPES, viewed),
    **dict.fromkeys(STRIDED, rearranged),
    "expand_as": lambda call: rearranged(replace(call, target=aten.expand.default, args=(call.x, call.out.shape))),
    **dict.fromkeys(("cat", "stack", "concat"), put_together),
    "repeat_interleave": repeated, "repeat": tiled,
    **dict.fromkeys((
        "sum", "mean", "amax", "amin", "logsumexp", "var", "std", "var_mean", "norm", "linalg_vector_norm",
        "any", "all"
    ), reduced),
    **dict.fromkeys((
        "softmax", "_safe_softmax", "log_softmax", "_softmax", "_log_softmax", "cumsum", "cumprod", "flip",
        "index_select"
    ), along(_dim(1))),
    **dict.fromkeys(("topk",), along(_dim(2, -1))),
    **dict.fromkeys(("sort", "argsort"), along(_dim(1, -1))),
    "glu": gated,
    "roll": along(_dim(2)),
    **dict.fromkeys(("layer_norm", "rms_norm"), along(_normalized)),
    **dict.fromkeys((
        "group_norm", "batch_norm", "_native_batch_norm_legit_functional", "instance_norm", "prelu"
    ), by_channel),
    **dict.fromkeys(("constant_pad_nd", "pad", "_pad_enum"), along(_padded)),
    **dict.fromkeys(("tril", "triu"), last(LAST_TWO)),
    **{
        f"{name}{dims}d": last(dims)
        for dims in (1, 2, 3)
        for name in ("max_pool", "avg_pool", "adaptive_avg_pool", "adaptive_max_pool", "reflection_pad",
                     "replication_pad", "upsample_nearest")
    },
    "max_pool2d_with_indices": last(2), "upsample_bilinear2d": last(2), "upsample_bicubic2d": last(2),
    "upsample_linear1d": last(1), "upsample_trilinear3d": last(3),
    "index": indexed,
}  # fmt: skip
