"""Unit tables: what a search must know of a model's units, for one number of samples and one degree of tp.

A Program whose roles are the distinct units, each lowered as a stage of its own (`lowering.unit_roles`), with what the
buffers of whole stages follow from beside it. Torch-free, and kept on disk in the form of Programs. It is priced, never
run: its roles send to stages that are not there.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from partitioner.program.program import Program, Send, Tensor, TensorSpec

UNITS, COST = "unit_table", "unit_cost_"  # facts of such a Program: the table as JSON, and what units weigh


@dataclass(frozen=True, slots=True)
class UnitParam:
    """A parameter as one chip holds it; `unit` is the earliest of its stage that uses it. See `lowering.buckets`."""

    name: str
    spec: TensorSpec
    is_cut: bool
    group: int
    apart: int
    is_frozen: bool
    unit: int = 0
    tied: tuple[int, ...] = ()


@dataclass(frozen=True)
class UnitTable:
    """The table in a Program."""

    program: Program

    @cached_property
    def _described(self) -> Mapping[str, Any]:
        found: Mapping[str, Any] = json.loads(str(self.program.facts[UNITS]))
        return found

    @property
    def samples(self) -> int:
        """Samples of one microbatch of one replica."""
        return int(self.program.facts["samples_per_part"])

    @cached_property
    def role_of(self) -> tuple[int, ...]:
        """By unit, in the order of the model."""
        return tuple(self._described["role_of"])

    @cached_property
    def weights(self) -> tuple[float, ...]:
        """By unit, what stages are balanced by."""
        return tuple(float(self.program.facts[f"{COST}{role}"]) for role in self.role_of)

    @cached_property
    def params(self) -> tuple[tuple[UnitParam, ...], ...]:
        """By unit; a parameter that several use is in each of them."""
        rows: Sequence[Sequence[Sequence[Any]]] = self._described["params"]
        return tuple(
            tuple(
                UnitParam(name, TensorSpec(tuple(shape), dtype), *rest) for name, shape, dtype, *rest in unit
            )
            for unit in rows
        )

    @property
    def states(self) -> int:
        """Tensors that the optimizer keeps for each parameter."""
        return int(self._described["states"])

    @property
    def masters(self) -> bool:
        """Whether low-precision parameters have full-precision copies."""
        return bool(self._described["masters"])

    @property
    def whole(self) -> bool:
        """Whether the optimizer steps on one parameter at a time."""
        return bool(self._described["whole"])

    @property
    def has_tail(self) -> bool:
        """Whether all forwards come before the loss, whatever the schedule."""
        return bool(self._described["has_tail"])

    def sent(self, role: int, body: str) -> tuple[Tensor, ...]:
        """What goes from a unit to others, each once; `body` is send_forward or send_backward."""
        found = self.program.roles[role]
        calls = found.body[body].instructions if body in found.body else ()
        return tuple(dict.fromkeys(found.tensors[ins.tensor] for ins in calls if isinstance(ins, Send)))
