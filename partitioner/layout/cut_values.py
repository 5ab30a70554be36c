"""Values cut along tp while a unit is traced, and how they become whole and back, with their gradients.

A whole value is a plain tensor, the same on every chip, and so is its gradient. A cut one is a `CutTensor`: each chip
has its slice, and of the gradient the same slice. What moves between the two is an explicit collective, and a chip's
place is the tensor `coordinate`, so that one trace serves every chip.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import torch
from torch.utils._pytree import tree_leaves

import kernels.ops  # noqa: F401  (registers orchestrate::shard_slice)
from partitioner.program.program import local_length

functional = torch.ops._c10d_functional
TP = "tp"  # the name that collectives carry
Memory: TypeAlias = dict[tuple[object, ...], tuple[object, torch.Tensor]]


@dataclass(frozen=True, slots=True, eq=False)
class CutTensor:
    """A chip's slice of a value along `dim`, which consists of `sections`, each cut by itself (see `Tensor`).

    `is_weight`: it is a parameter, perhaps seen otherwise; what it is multiplied with adapts to it. What fills a slice
    of it up is zeros; of others it is anything.
    """

    local: torch.Tensor
    dim: int
    sections: tuple[int, ...]
    is_weight: bool = False

    @property
    def shape(self) -> torch.Size:
        """Of the whole value."""
        return torch.Size(
            [*self.local.shape[: self.dim], sum(self.sections), *self.local.shape[self.dim + 1 :]]
        )

    def with_local(self, local: torch.Tensor, dim: int | None = None) -> "CutTensor":
        """The same cut of another value."""
        return replace(self, local=local, dim=self.dim if dim is None else dim)


Value: TypeAlias = torch.Tensor | CutTensor


def is_any_cut(arguments: object) -> bool:
    """Whether there is a cut value among arguments."""
    return any(isinstance(leaf, CutTensor) for leaf in tree_leaves(arguments))


@dataclass(slots=True)
class TpGroup:
    """The chips that share a unit: how many, and which of them this one is. Remembers what it has moved already."""

    size: int
    coordinate: torch.Tensor
    moved: Memory = field(default_factory=dict)

    def whole(self, value: Any) -> Any:
        """A value as every chip's own; the gradient of it is whole, of which each chip keeps its slice."""
        if not isinstance(value, CutTensor):
            return value
        return self._once("whole", value, lambda: self._gathered(value))

    def sliced(self, x: torch.Tensor, dim: int, sections: Sequence[int]) -> torch.Tensor:
        """A chip's slice of a whole value; gradients are gathered."""
        return self._once(
            ("slice", dim, tuple(sections)), x, lambda: _through(_Slice, x, self, dim, tuple(sections))
        )

    def entered(self, x: torch.Tensor) -> torch.Tensor:
        """A whole value that each chip uses for something of its own: gradients are added up (Megatron's f)."""
        return self._once("enter", x, lambda: _through(_SumBackward, x))

    def total(self, x: torch.Tensor) -> torch.Tensor:
        """What the chips' values add up to, as a whole value (Megatron's g)."""
        return _through(_SumForward, x)

    def at(self, value: Value, dim: int, sections: Sequence[int]) -> torch.Tensor:
        """A chip's slice of a value that is to be cut so."""
        if isinstance(value, CutTensor) and value.dim == dim and value.sections == tuple(sections):
            return value.local
        return self.sliced(self.whole(value), dim, sections)

    def is_even(self, sections: Sequence[int]) -> bool:
        """Whether sections divide, so that no slice is padded."""
        return all(length % self.size == 0 for length in sections)

    def _gathered(self, cut: CutTensor) -> torch.Tensor:
        return _through(_Gather, cut.local, self, cut.dim, cut.sections)

    def _once(self, what: object, value: object, make: Callable[[], torch.Tensor]) -> torch.Tensor:
        # keeps the value, as another could get its number; without gradients it is another result
        key = (what, id(value), torch.is_grad_enabled())
        if key not in self.moved:
            self.moved[key] = value, make()
        return self.moved[key][1]


def _through(function: Any, x: torch.Tensor, *more: Any) -> torch.Tensor:
    """A movement, recorded by autograd where that is needed."""
    move = function.apply if x.requires_grad and torch.is_grad_enabled() else function.moved
    moved: torch.Tensor = move(x, *more)
    return moved


def _slice(x: torch.Tensor, group: TpGroup, dim: int, sections: Sequence[int]) -> torch.Tensor:
    parts = []
    for part in x.split(list(sections), dim) if len(sections) > 1 else [x]:
        missing = -part.shape[dim] % group.size
        if missing:
            part = torch.cat(
                [part, part.new_zeros([missing if d == dim else n for d, n in enumerate(part.shape)])], dim
            )
        parts.append(torch.ops.orchestrate.shard_slice(part, dim, group.coordinate, group.size))
    return torch.cat(parts, dim) if len(parts) > 1 else parts[0]


def _gather(x: torch.Tensor, group: TpGroup, dim: int, sections: Sequence[int]) -> torch.Tensor:
    is_bool = x.dtype is torch.bool
    rows = (x.to(torch.uint8) if is_bool else x).movedim(dim, 0).contiguous()
    gathered = functional.wait_tensor(functional.all_gather_into_tensor(rows, group.size, TP))
    lengths = [local_length((section,), group.size) for section in sections]
    parts = []
    for part, section in zip(
        gathered.unflatten(0, (group.size, -1)).split(lengths, 1), sections, strict=True
    ):
        parts.append(part.flatten(0, 1).narrow(0, 0, section))
    whole = (torch.cat(parts) if len(parts) > 1 else parts[0]).movedim(0, dim).contiguous()
    return whole.to(torch.bool) if is_bool else whole


def all_reduce(x: torch.Tensor, reduction: str = "sum") -> torch.Tensor:
    """All-reduce over the chips, without a gradient of its own."""
    waited: torch.Tensor = functional.wait_tensor(functional.all_reduce(x.contiguous(), reduction, TP))
    return waited


class _Slice(torch.autograd.Function):
    moved = staticmethod(_slice)

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, *how: Any) -> torch.Tensor:
        ctx.how = how
        return _slice(x, *how)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        return _gather(grads[0], *ctx.how), None, None, None


class _Gather(torch.autograd.Function):
    moved = staticmethod(_gather)

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, *how: Any) -> torch.Tensor:
        ctx.how = how
        return _gather(x, *how)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        return _slice(grads[0], *ctx.how), None, None, None


class _SumBackward(torch.autograd.Function):
    @staticmethod
    def moved(x: torch.Tensor) -> torch.Tensor:
        return x

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        return all_reduce(grads[0])


class _SumForward(torch.autograd.Function):
    moved = staticmethod(all_reduce)

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return all_reduce(x)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        return grads[0]
