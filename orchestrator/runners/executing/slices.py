"""Slices: what a chip holds of a whole tensor, and the whole of what chips hold."""

from collections.abc import Mapping, Sequence

import torch

from partitioner.program.program import Program, Tensor, local_length


def cut(program: Program, tensor: Tensor, whole: torch.Tensor, at: Mapping[str, int]) -> torch.Tensor:
    """A chip's shard: its slice of every section."""
    for dim, axis in tensor.shards:
        sections = tensor.sections or (whole.shape[dim],)
        parts = [_own(part, dim, program.size(axis), at[axis]) for part in whole.split(list(sections), dim)]
        whole = torch.cat(parts, dim) if len(parts) > 1 else parts[0]
    return whole


def _own(part: torch.Tensor, dim: int, parts: int, at: int) -> torch.Tensor:
    """Slice `at` of a section; zeros stand for what is missing at the end."""
    length = local_length((part.shape[dim],), parts)
    first = min(at * length, part.shape[dim])
    found = part.narrow(dim, first, min(length, part.shape[dim] - first))
    missing = list(part.shape)
    missing[dim] = length - found.shape[dim]
    return torch.cat([found, part.new_zeros(missing)], dim) if missing[dim] else found


def joined(tensor: Tensor, pieces: Sequence[torch.Tensor]) -> torch.Tensor:
    """The whole of what chips hold, in the order of their coordinates (inverse of `cut`, along one axis)."""
    dim = tensor.shards[0][0]
    if not tensor.sections:
        return torch.cat(list(pieces), dim)
    lengths = [local_length((section,), len(pieces)) for section in tensor.sections]
    by_section = zip(*(piece.split(lengths, dim) for piece in pieces), strict=True)
    wholes = (torch.cat(own, dim) for own in by_section)
    return torch.cat([w.narrow(dim, 0, n) for w, n in zip(wholes, tensor.sections, strict=True)], dim)
