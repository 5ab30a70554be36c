"""How a value spreads over the parts of a batch, and what an operation's rule may ask for.

The model is traced for a whole batch and for one of its `n` parts. Of every value of the small trace is known:

    Same      every part computes it alike, and it is the whole trace's value
    Split     the parts lie side by side in the whole value: in row-major order a step to the next sample is a step of
              `weight` elements
    Total     the whole value is the sum of the parts' values
    Position  the numbers of the samples: 0, 1, 2, ... in every part

This is what DTensor calls Replicate, Shard and Partial, on an axis of samples that covers replicas and microbatches.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, TypeAlias

import torch
from torch.fx import Node

Shape: TypeAlias = Sequence[int]


@dataclass(frozen=True, slots=True)
class Same:
    """Equal in every part, and in the whole."""


@dataclass(frozen=True, slots=True)
class Split:
    """Parts lie side by side; `weight`: elements (in row-major order) from a sample to the next."""

    weight: int


@dataclass(frozen=True, slots=True)
class Total:
    """The sum over parts is the whole value."""


@dataclass(frozen=True, slots=True)
class Position:
    """The sample's number within its part; `weight` as in Split."""

    weight: int


# of several results one each
Spread: TypeAlias = Same | Split | Total | Position | tuple[Any, ...]
SAME, TOTAL = Same(), Total()


class NeedsWhole(Exception):
    """A rule cannot do with parts of these operands: they must be made Same first."""

    def __init__(self, operands: Iterable[Node]) -> None:
        super().__init__()
        self.operands = list(dict.fromkeys(operands))


@dataclass(frozen=True, slots=True)
class Place:
    """Where samples lie in a shape: `dim` is [outer, samples, inner]."""

    dim: int
    inner: int


def place_of(spread: Split | Position, shape: Shape, samples: int) -> Place | None:
    """The dim of the whole shape that holds all `samples`; None if they reach over a dim's border."""
    for dim in range(len(shape)):
        step, size = extent(shape[dim + 1 :]), max(shape[dim], 1)
        if step <= spread.weight < step * size:
            fits = spread.weight % step == 0 and (step * size) % (spread.weight * samples) == 0
            return Place(dim, spread.weight // step) if fits else None
    return None


def split_at(dim: int, inner: int, shape: Shape) -> Split:
    """Samples in `dim` of a whole value, every `inner` entries a sample."""
    return Split(inner * extent(shape[dim + 1 :]))


def extent(shape: Shape) -> int:
    """Number of elements, where a dim without any counts as one: samples lie somewhere in empty tensors too."""
    return prod(max(size, 1) for size in shape)


class OperatorCall:
    """An operation in both traces, and how its operands spread. Rules are functions of it."""

    def __init__(
        self,
        node: Node,
        whole: Node,
        spreads: dict[Node, Spread],
        wholes: dict[Node, Node],
        parts: int,
        samples: int,
    ) -> None:
        self.node, self.whole, self.parts, self.samples = node, whole, parts, samples
        self._spreads, self._wholes = spreads, wholes
        self.args: tuple[Any, ...] = node.args
        self.operands: list[Node] = list(node.all_input_nodes)
        self.has_grown = (
            False  # an operand is whole though the part's was shorter: the result is whole as well
        )
        self.shared: list[
            int
        ] = []  # arguments that are Same where a Total is needed: each part takes its share
        self.is_mean = False  # the result of a part is to be divided by their number

    def spread(self, value: Any) -> Spread:
        """Of an operand; what is no tensor is the same for all."""
        return self._spreads.get(value, SAME) if isinstance(value, Node) else SAME

    def shape(self, value: Node) -> tuple[int, ...]:
        """The whole trace's shape of an operand."""
        return tuple(self._wholes[value].meta["val"].shape)

    @property
    def out(self) -> tuple[int, ...]:
        """The whole trace's shape of the result (of the first, if there are several)."""
        value = self.whole.meta["val"]
        return tuple((value[0] if isinstance(value, tuple | list) else value).shape)

    def place(self, value: Node) -> Place:
        """Where samples lie in a Split operand. Raises NeedsWhole."""
        spread = self.spread(value)
        assert isinstance(spread, Split | Position)
        found = place_of(spread, self.shape(value), self.samples * self.parts)
        if found is None:
            raise NeedsWhole([value])
        return found

    def split(self) -> list[Node]:
        """The operands that are Split."""
        return [n for n in self.operands if isinstance(self.spread(n), Split)]

    def totals(self) -> list[Node]:
        """The operands that are Totals."""
        return [n for n in self.operands if isinstance(self.spread(n), Total)]

    def all_whole(self) -> NeedsWhole:
        """What to raise where no rule holds."""
        return NeedsWhole(n for n in self.operands if not isinstance(self.spread(n), Same))

    def argument(self, name: str, default: Any = None) -> Any:
        """An argument by its name in the operator's schema, or what the schema says."""
        if name in self.node.kwargs:
            return self.node.kwargs[name]
        assert isinstance(self.node.target, torch._ops.OpOverload)
        for index, argument in enumerate(self.node.target._schema.arguments):
            if argument.name == name:
                if index < len(self.args):
                    return self.args[index]
                return argument.default_value if argument.has_default_value() else default
        return default
