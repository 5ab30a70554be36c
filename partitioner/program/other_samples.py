"""Other samples: the Program for any number of samples per microbatch, from those for two.

Lowering a graph anew for every size of a microbatch costs a capture each, yet all that changes are numbers: shapes,
FLOPs and bytes grow by the same step with every sample. What comes out is for the clock: shapes written into the code
of operations stay as they were. Where two Programs differ in more than numbers, or in one that does not divide, there
is none.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import starmap
from typing import TypeVar

from comms.errors import PartitionError
from partitioner.program.program import Operation, Program, Role, Segment, TensorSpec

Value = TypeVar("Value")
SAMPLES = "samples_per_part"


class _Unlike(Exception):
    """The two differ in more than numbers that grow with the samples."""


def with_samples(first: Program, second: Program, samples: int) -> Program:
    """What lowering gives for `samples` where it gave these two. Raises PartitionError where that cannot be told."""
    at, other = int(first.facts[SAMPLES]), int(second.facts[SAMPLES])
    if samples == at:
        return first
    try:
        return _SampleLine(samples - at, other - at).program(first, second)
    except _Unlike as error:
        raise PartitionError(
            f"a microbatch of {samples} samples is not between those of {at} and {other}", hint="capture it"
        ) from error


def _each(
    a: Sequence[Value], b: Sequence[Value], between: Callable[[Value, Value], Value]
) -> tuple[Value, ...]:
    if len(a) != len(b):
        raise _Unlike
    return tuple(starmap(between, zip(a, b, strict=True)))


@dataclass(frozen=True, slots=True)
class _SampleLine:
    """Where values lie `steps` of `span` on the way from one to another."""

    steps: int
    span: int

    def number(self, a: int, b: int) -> int:
        grown, left = divmod((b - a) * self.steps, self.span)
        if left or a + grown < 0:
            raise _Unlike
        return a + grown

    def program(self, a: Program, b: Program) -> Program:
        if (a.axes, a.microbatches) != (b.axes, b.microbatches):
            raise _Unlike
        segments = _each(a.segments, b.segments, self._segment)
        roles = _each(a.roles, b.roles, self._role)
        return replace(a, segments=segments, roles=roles, meta=self._meta(a, b))

    def _meta(self, a: Program, b: Program) -> tuple[tuple[str, str | int | float], ...]:
        def fact(name: str, value: str | float) -> str | int | float:
            other = b.facts[name]
            if isinstance(value, int) and isinstance(other, int):
                return self.number(value, other)
            if isinstance(value, float) and isinstance(other, float | int):
                return value + (other - value) * self.steps / self.span
            return value

        return tuple((name, fact(name, value)) for name, value in a.meta)

    def _segment(self, a: Segment, b: Segment) -> Segment:
        if a == b:
            return a
        if a.outputs != b.outputs:
            raise _Unlike
        inputs = _each(a.inputs, b.inputs, self._spec)
        return replace(a, inputs=inputs, ops=_each(a.ops, b.ops, self._operation))

    def _operation(self, a: Operation, b: Operation) -> Operation:
        if a == b:
            return a
        if a.target != b.target or a.operands != b.operands:
            raise _Unlike
        return Operation(
            a.code, _each(a.outs, b.outs, self._spec), a.is_tuple, self.number(a.flops, b.flops),
            self.number(a.read_bytes, b.read_bytes), self.number(a.write_bytes, b.write_bytes),
        )  # fmt: skip

    def _spec(self, a: TensorSpec, b: TensorSpec) -> TensorSpec:
        if a == b:
            return a
        if a.dtype != b.dtype:
            raise _Unlike
        return TensorSpec(_each(a.shape, b.shape, self.number), a.dtype)

    def _role(self, a: Role, b: Role) -> Role:
        if a.bodies != b.bodies or a.schedules != b.schedules or len(a.tensors) != len(b.tensors):
            raise _Unlike
        tensors = tuple(
            x if x.spec == y.spec else replace(x, spec=self._spec(x.spec, y.spec))
            for x, y in zip(a.tensors, b.tensors, strict=True)
        )
        if any(replace(x, spec=y.spec) != y for x, y in zip(a.tensors, b.tensors, strict=True)):
            raise _Unlike
        return Role(a.stage, tensors, a.bodies, a.schedules)
