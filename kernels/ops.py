"""Operators of our own that appear in traced graphs, registered under `orchestrate::`.

`shard_slice(x, dim, coordinate, chunks)`: the equal slice of `x` along `dim` that belongs to mesh coordinate
`coordinate`, a 0-dim tensor. A slice at a constant offset would make every chip's graph different.

`precise_norm(x)`: the L2 norm of all entries, 0-dim, in double precision. Squares of entries beyond 1e19 are infinite
where entries have single precision, as in torch's own clipping.

`keyed_uniform`: random numbers by counters, see `partitioner.capture.forwards.keyed_random`. A part's samples lie
`weight` elements apart; it has `samples` of `whole`, from number `first` on (a weight of 0: the tensor is the whole
one).

The others stand for communication between the parts of a batch; they are lowered to collectives, never executed. In
captured graphs: `sum_parts(x)`, the sum over all replicas; `gather_parts(x, dim, outer, parts)`, the replicas' values
side by side in `dim`, which is [outer, samples ...]; `known_total(x)`, the sum over all parts of what only depends on
the batch, known before the forward; `final_total(x)`, the sum over all parts, known when every forward has ended. In
traced ones: `all_gather_parts(x, parts)` and `reduce_scatter_parts(x, parts)`, along the first dim.
"""

import math
from typing import Any

import torch

GOLDEN = -0x61C8864680B583EB  # 2^64 / the golden ratio, as a signed number
NORM_ROW = 4096  # entries that are summed in single precision: the error is that of rounding a few of them
_LIBRARY = torch.library.Library("orchestrate", "FRAGMENT")
_LIBRARY.define("shard_slice(Tensor x, int dim, Tensor coordinate, int chunks) -> Tensor")


def _shard_slice(x: torch.Tensor, dim: int, coordinate: torch.Tensor, chunks: int) -> torch.Tensor:
    length = x.shape[dim] // chunks
    return x.narrow(dim, int(coordinate) * length, length).clone()


def _shape_only(x: torch.Tensor, dim: int, coordinate: torch.Tensor, chunks: int) -> torch.Tensor:
    shape = list(x.shape)
    shape[dim] //= chunks
    return x.new_empty(shape)


_LIBRARY.define("precise_norm(Tensor x) -> Tensor")


def _precise_norm(x: torch.Tensor) -> torch.Tensor:
    """The L2 norm of all entries in double precision: rows in their own one, as casting all of them takes ten times."""
    flat = x.reshape(-1)
    if x.dtype is not torch.float32 or x.device.type != "cpu":
        return torch.linalg.vector_norm(flat, dtype=torch.float64)
    whole = flat.numel() // NORM_ROW * NORM_ROW
    rows = torch.linalg.vector_norm(flat[:whole].view(-1, NORM_ROW), dim=1)
    norms = torch.stack((torch.linalg.vector_norm(rows, dtype=torch.float64),
                         torch.linalg.vector_norm(flat[whole:], dtype=torch.float64)))  # fmt: skip
    return torch.linalg.vector_norm(norms)


def _norm_shape(x: torch.Tensor) -> torch.Tensor:
    return x.new_empty((), dtype=torch.float64)


_LIBRARY.define("sum_parts(Tensor x) -> Tensor")
_LIBRARY.define("gather_parts(Tensor x, int dim, int outer, int parts) -> Tensor")
_LIBRARY.define("known_total(Tensor x) -> Tensor")
_LIBRARY.define("final_total(Tensor x) -> Tensor")
_LIBRARY.define("all_gather_parts(Tensor x, int parts) -> Tensor")
_LIBRARY.define("reduce_scatter_parts(Tensor x, int parts) -> Tensor")


def _gathered(x: torch.Tensor, dim: int, outer: int, parts: int) -> torch.Tensor:
    del outer
    return x.new_empty([size * (parts if d == dim else 1) for d, size in enumerate(x.shape)])


def _all_gathered(x: torch.Tensor, parts: int) -> torch.Tensor:
    return x.new_empty([x.shape[0] * parts, *x.shape[1:]])


def _scattered(x: torch.Tensor, parts: int) -> torch.Tensor:
    return x.new_empty([x.shape[0] // parts, *x.shape[1:]])


_LIBRARY.define(
    "keyed_uniform(Tensor key, Tensor first, Tensor? like, int call, SymInt[] shape, int weight, int samples, "
    "int whole) -> Tensor"
)


def _keyed_uniform(
    key: torch.Tensor, first: torch.Tensor, like: torch.Tensor | None, call: int, shape: list[int], weight: int,
    samples: int, whole: int,
) -> torch.Tensor:  # fmt: skip
    del like
    index = torch.arange(torch.Size(shape).numel(), device=key.device)
    if weight:  # [outer, samples, weight] of a whole [outer, whole, weight]
        outer, rest = index // (samples * weight), index % (samples * weight)
        index = outer * (whole * weight) + rest + first * weight
    mixed = _mixed(index + _mixed(_mixed(key) + call))
    return ((mixed >> 11) & ((1 << 53) - 1)).to(torch.float64).mul_(2.0**-53).view(shape)


def _mixed(z: torch.Tensor) -> torch.Tensor:
    """SplitMix64's finalizer after a step of its counter (Steele et al. 2014); whole numbers wrap around."""
    z = z * GOLDEN + GOLDEN
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        z = (z ^ ((z >> shift) & ((1 << (64 - shift)) - 1))) * factor
    return z ^ ((z >> 31) & ((1 << 33) - 1))


def _keyed_shape(
    key: torch.Tensor, first: torch.Tensor, like: torch.Tensor | None, call: int, shape: list[int], weight: int,
    samples: int, whole: int,
) -> torch.Tensor:  # fmt: skip
    del first, like, call, weight, samples, whole
    return key.new_empty(shape, dtype=torch.float64)


_LIBRARY.impl("keyed_uniform", _keyed_uniform, "CompositeExplicitAutograd")
_LIBRARY.impl("precise_norm", _precise_norm, "CompositeExplicitAutograd")
_LIBRARY.impl("shard_slice", _shard_slice, "CompositeExplicitAutograd")
torch.library.register_fake("orchestrate::precise_norm", _norm_shape, lib=_LIBRARY)
torch.library.register_fake("orchestrate::shard_slice", _shape_only, lib=_LIBRARY)
torch.library.register_fake("orchestrate::keyed_uniform", _keyed_shape, lib=_LIBRARY)
torch.library.register_fake("orchestrate::gather_parts", _gathered, lib=_LIBRARY)
torch.library.register_fake("orchestrate::all_gather_parts", _all_gathered, lib=_LIBRARY)
torch.library.register_fake("orchestrate::reduce_scatter_parts", _scattered, lib=_LIBRARY)
for _name in ("sum_parts", "known_total", "final_total"):
    torch.library.register_fake(f"orchestrate::{_name}", torch.empty_like, lib=_LIBRARY)


def _keep_layout(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    del output
    ctx.shape, ctx.layout = inputs[0].shape, inputs[1:]


def _sum_backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
    del ctx
    return torch.ops.orchestrate.sum_parts(grad)


def _gather_backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
    """The sum over replicas of what each has for this one's samples."""
    dim, outer, parts = ctx.layout
    before, after = math.prod(ctx.shape[:dim]), math.prod(ctx.shape[dim + 1 :])
    rows = grad.reshape(before, outer, grad.shape[dim] // outer, after).permute(2, 0, 1, 3).contiguous()
    own = torch.ops.orchestrate.reduce_scatter_parts(rows, parts)
    return own.permute(1, 2, 0, 3).reshape(ctx.shape), None, None, None


torch.library.register_autograd("orchestrate::sum_parts", _sum_backward, lib=_LIBRARY)
torch.library.register_autograd(
    "orchestrate::gather_parts", _gather_backward, setup_context=_keep_layout, lib=_LIBRARY
)
