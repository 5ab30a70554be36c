"""Re-ordering: the same computation with its sums in another order, which is what rounding alone may change.

Operators that add up run on operands whose summed dim is shuffled and cut in two, as chips and microbatches cut it, and
the parts' results, each rounded, are added; what comes out along that dim is put back. Samples stay where they are, so
random numbers, masks and whatever else depends on a place are the same. Not re-ordered: operators that are not listed,
softmax and attention in one operator among them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import numpy as np
import torch
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class Sum:
    """The dims that an operator adds along, by argument, and those of results that follow their order.

    Of all other results the parts' add up. `once`: arguments that are themselves added, to one part only.
    """

    dims: Mapping[int, int]
    results: Mapping[int, int] = field(default_factory=dict)
    once: Mapping[int, object] = field(default_factory=dict)  # with what stands for them in the other part
    is_linear: bool = True  # else it is not cut


Rule: TypeAlias = Callable[[Sequence[Any]], Sum | None]


def _always(*dims: int, results: Mapping[int, int] | None = None, is_linear: bool = True) -> Rule:
    """The first arguments' dims; -1 for one without."""
    found = {place: dim for place, dim in enumerate(dims) if dim >= 0}
    return lambda args: Sum(found, results or {}, is_linear=is_linear)


def _plus(*dims: int) -> Rule:
    """The first argument is added to a product of the others."""
    found = {place + 1: dim for place, dim in enumerate(dims)}
    return lambda args: Sum(found, once={0: torch.zeros((), dtype=args[0].dtype).expand(args[0].shape)})


def _convolution(args: Sequence[Any]) -> Sum | None:
    transposed, groups = args[6], args[8]
    return Sum({0: 1, 1: 1}, once={2: None}) if groups == 1 and not transposed else None


def _reduction(args: Sequence[Any]) -> Sum | None:
    dims = args[1] if len(args) > 1 and args[1] else (0,)
    return Sum({0: dims[0] % args[0].dim()}) if args[0].dim() else None


def _mean(args: Sequence[Any]) -> Sum | None:
    found = _reduction(args)
    return replace(found, is_linear=False) if found else None


def _mean_loss(args: Sequence[Any]) -> Sum | None:
    return Sum({0: 0, 1: 0}, is_linear=False) if args[0].dim() > 1 and args[3] else None


BY_ROW = {0: 0}
RULES: Mapping[OpOverload, Rule] = {
    aten.mm.default: _always(1, 0),
    aten.addmm.default: _plus(1, 0),
    aten.bmm.default: _always(2, 1),
    aten.baddbmm.default: _plus(2, 1),
    aten.convolution.default: _convolution,
    aten.convolution_backward.default: _always(0, 0, results=BY_ROW),
    aten.native_layer_norm_backward.default: _always(0, 0, -1, 0, 0, results=BY_ROW),
    aten._fused_rms_norm_backward.default: _always(0, 0, -1, 0, results=BY_ROW),
    aten.native_batch_norm.default: _always(0, results=BY_ROW, is_linear=False),
    aten.native_batch_norm_backward.default: _always(0, 0, results=BY_ROW, is_linear=False),
    aten.embedding_dense_backward.default: _always(0, 0),
    aten.sum.default: _reduction,
    aten.sum.dim_IntList: _reduction,
    aten.mean.default: _mean,
    aten.mean.dim: _mean,
    aten.logsumexp.default: _mean,
    aten.nll_loss_forward.default: _mean_loss,
}


class Reordered(TorchDispatchMode):
    """Every listed sum is taken in an order that follows from `number` and the sum's place in the run."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.random = np.random.default_rng(number)  # torch's are replaced while keys draw

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> object:
        rule = RULES.get(func)
        found = rule(args) if rule is not None else None
        if found is None:
            return func(*args, **(kwargs or {}))
        place, dim = next(iter(found.dims.items()))
        order = torch.from_numpy(self.random.permutation(args[place].shape[dim]))
        is_cut = found.is_linear and len(order) > 1
        parts = []
        for number, chosen in enumerate(order.tensor_split(2) if is_cut else [order]):
            given = {i: args[i].index_select(d, chosen) for i, d in found.dims.items() if args[i] is not None}
            given |= found.once if number else {}
            result = func(*(given.get(i, value) for i, value in enumerate(args)), **(kwargs or {}))
            parts.append(result if isinstance(result, tuple) else (result,))
        joined = [
            _joined(of_one, found.results.get(i), order) for i, of_one in enumerate(zip(*parts, strict=True))
        ]
        return tuple(joined) if isinstance(result, tuple) else joined[0]


def _joined(
    parts: Sequence[torch.Tensor | None], dim: int | None, order: torch.Tensor
) -> torch.Tensor | None:
    there = [part for part in parts if part is not None]
    if dim is not None and there:
        return torch.cat(there, dim).index_select(dim, order.argsort())
    return there[0] + there[1] if len(there) > 1 else there[0] if there else None
