"""Operators of our own that appear in traced graphs, registered under `orchestrate::`.

`shard_slice(x, dim, coordinate, chunks)`: the equal slice of `x` along `dim` that belongs to mesh coordinate
`coordinate`, a 0-dim tensor. A slice at a constant offset would make every chip's graph different.
"""

import torch

_LIBRARY = torch.library.Library("orchestrate", "FRAGMENT")
_LIBRARY.define("shard_slice(Tensor x, int dim, Tensor coordinate, int chunks) -> Tensor")


def _shard_slice(x: torch.Tensor, dim: int, coordinate: torch.Tensor, chunks: int) -> torch.Tensor:
    length = x.shape[dim] // chunks
    return x.narrow(dim, int(coordinate) * length, length).clone()


def _shape_only(x: torch.Tensor, dim: int, coordinate: torch.Tensor, chunks: int) -> torch.Tensor:
    shape = list(x.shape)
    shape[dim] //= chunks
    return x.new_empty(shape)


_LIBRARY.impl("shard_slice", _shard_slice, "CompositeExplicitAutograd")
torch.library.register_fake("orchestrate::shard_slice", _shape_only, lib=_LIBRARY)
