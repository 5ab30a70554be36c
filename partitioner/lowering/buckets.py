"""Buckets: which parameters of a role share a flat buffer, and in which order their gradients are complete.

Parameters are grouped by what must be done to them: the optimizer's settings, replicated over tp or cut, tied across
stages, and the bucket they fall in (filled in the order in which backward finishes them, so that reduction can start
early). Torch-free: the closed form of a step groups its parameters by the same rule.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeVar

from partitioner.program.program import TensorSpec

if TYPE_CHECKING:
    from partitioner.layout.param_cuts import ParamCut


class Bucketed(Protocol):
    """What the rule reads of a parameter as one chip of the role holds it."""

    @property
    def name(self) -> str: ...
    @property
    def spec(self) -> TensorSpec: ...
    @property
    def is_cut(self) -> bool: ...
    @property
    def tied(self) -> tuple[int, ...]: ...
    @property
    def unit(self) -> int: ...
    @property
    def is_frozen(self) -> bool: ...
    @property
    def group(self) -> int: ...
    @property
    def apart(self) -> object: ...


Kind = TypeVar("Kind", bound=Bucketed)


@dataclass(frozen=True, slots=True)
class Param:
    """A parameter as one chip of the role holds it."""

    name: str
    spec: TensorSpec
    cut: "ParamCut | None"  # by tp, or replicated
    sections: tuple[int, ...]  # of the cut dim where one length does not tell
    tied: tuple[int, ...]  # the stages that share it, empty if only one has it
    unit: int  # the earliest unit of the role that uses it: its gradient is complete when that unit's backward ends
    is_frozen: bool
    group: int  # of optimizer settings
    apart: object  # parameters are stepped on together where this is equal

    @property
    def is_cut(self) -> bool:
        """Whether tp cuts it."""
        return self.cut is not None


def buckets(params: Iterable[Kind], bucket_bytes: int, most: int | None) -> list[list[Kind]]:
    """Split by kind, then fill buckets from the last unit to the first; with `most` parameters, by size.

    Tied parameters come last and in the order of their names: the same in every stage that shares them.
    """
    by_kind: dict[tuple[object, ...], list[Kind]] = {}
    for param in sorted(params, key=lambda p: (p.tied, 0 if p.tied else -p.unit, p.name)):
        kind = (param.is_frozen, param.group, param.apart, param.tied, not param.is_cut, param.spec.dtype)
        by_kind.setdefault(kind, []).append(param)
    filled: list[list[Kind]] = []
    for members in by_kind.values():
        if most:
            members.sort(key=lambda p: p.spec.numel)  # those of a bucket get shards of one length
        current: list[Kind] = []
        nbytes = 0
        for param in members:
            current.append(param)
            nbytes += param.spec.nbytes
            if len(current) == most or (not most and nbytes >= bucket_bytes):
                filled.append(current)
                current, nbytes = [], 0
        if current:
            filled.append(current)
    return filled
