"""Structure: what can be said about a Program without following its execution, and how findings are worded.

Tables are numbered by position, every reference points into its table, operations read values that are defined
before, segments fit the tensors they are called with, collectives fit the size of their group.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

from partitioner.program.instructions import FIELDS, instruction_text, named
from partitioner.program.program import (
    MICROBATCH_KINDS,
    Accumulate,
    Body,
    Call,
    Collective,
    CollectiveOp,
    Compute,
    Group,
    Holds,
    Instruction,
    Program,
    Role,
    Segment,
    Tensor,
    TensorSpec,
    Update,
)

STATS_SHAPE = (3,)


@dataclass(frozen=True, slots=True)
class Finding:
    """One broken rule, and where: a chip stands for all chips of its role."""

    where: str
    problem: str

    def __str__(self) -> str:
        return f"{self.where}: {self.problem}"


class InstructionPlace(NamedTuple):
    """An instruction of a role, in a body or in one call of it; `chip` stands for all chips of the role."""

    chip: int
    role: Role
    called: Call | str
    instruction: Instruction

    def __str__(self) -> str:
        """`chip 4 (stage 1), forward(0), instruction 3 'recv t1 from 0'`."""
        said = f"instruction {self.instruction.id} '{instruction_text(self.instruction)}'"
        return f"chip {self.chip} ({self.role.name}), {self.called}, {said}"

    def finding(self, problem: str) -> Finding:
        """What is wrong with the instruction."""
        return Finding(str(self), problem)


def representative(program: Program, role: Role) -> int:
    """The first chip of a role, which speaks for all of them."""
    return program.chip_at({axis: role.stage if axis == "pp" else 0 for axis, _ in program.axes})


def check_structure(program: Program) -> Iterator[Finding]:
    """All findings, in the order of the text form."""
    mesh = list(_mesh(program))
    yield from mesh
    for position, segment in enumerate(program.segments):
        for problem in _segment(position, segment):
            yield Finding(f"segment {position}", problem)
    if mesh:
        return
    for role in program.roles:
        yield from _Checked(program, role).findings()


def _mesh(program: Program) -> Iterator[Finding]:
    names = [axis for axis, _ in program.axes]
    stages = [role.stage for role in program.roles]
    schedules = {tuple(sorted(role.schedule)) for role in program.roles}
    problems = {
        f"the axes {names} repeat a name": len(set(names)) < len(names),
        f"an axis of {dict(program.axes)} is empty": any(size < 1 for _, size in program.axes),
        f"microbatches is {program.microbatches}": program.microbatches < 1,
        "there is no axis pp": "pp" not in names,
        f"the roles are stages {stages}, pp has {program.size('pp')}": stages
        != list(range(program.size("pp"))),
        "the roles have different sets of schedules": len(schedules) > 1,
    }
    for problem, holds in problems.items():
        if holds:
            yield Finding("program", problem)


def _segment(position: int, segment: Segment) -> Iterator[str]:
    if segment.id != position:
        yield f"it is numbered {segment.id}"
    for value, op in enumerate(segment.ops, len(segment.inputs)):
        late = [v for v in op.operands if v >= value]
        if late:
            yield f"v{value} = {op.code} reads v{late[0]} before it is defined"
    count = len(segment.inputs) + len(segment.ops)
    for value in segment.outputs:
        if not 0 <= value < count:
            yield f"it returns v{value}, which it does not define"
        elif value >= len(segment.inputs) and len(segment.ops[value - len(segment.inputs)].outs) != 1:
            yield f"it returns v{value}, which is not one tensor"


class _Checked:
    """One role under check."""

    def __init__(self, program: Program, role: Role) -> None:
        self.program, self.role, self.chip = program, role, representative(program, role)

    def findings(self) -> Iterator[Finding]:
        where = f"chip {self.chip} ({self.role.name})"
        before = [
            *(p for i, tensor in enumerate(self.role.tensors) for p in self._tensor(i, tensor)),
            *self._schedules(),
        ]
        for problem in before:
            yield Finding(where, problem)
        for body in self.role.bodies:
            yield from self._body(body)

    def _tensor(self, position: int, tensor: Tensor) -> Iterator[str]:
        if tensor.id != position:
            yield f"tensor {position} is numbered {tensor.id}"
        unknown = [axis for _, axis in tensor.shards if axis not in dict(self.program.axes)]
        if unknown:
            yield f"t{position} is cut along {unknown[0]!r}, which is no axis"
        if tensor.base is None:
            return
        if not 0 <= tensor.base < len(self.role.tensors) or tensor.base == position:
            yield f"t{position} is a view of t{tensor.base}, which does not exist"
            return
        base = self.role.tensors[tensor.base]
        if (base.kind in MICROBATCH_KINDS) != (tensor.kind in MICROBATCH_KINDS):
            yield f"t{position} and its buffer t{base.id} differ in lifetime"
        if not 0 <= tensor.offset <= base.spec.numel - tensor.spec.numel:
            yield f"t{position} does not lie within its buffer t{base.id}"
        if tensor.spec.dtype != base.spec.dtype:
            yield f"t{position} is {tensor.spec.dtype}, its buffer t{base.id} is {base.spec.dtype}"

    def _schedules(self) -> Iterator[str]:
        for name, calls in self.role.schedules:
            missing = sorted({call.body for call in calls} - set(self.role.body))
            if missing:
                yield f"schedule {name} calls {missing[0]!r}, a body that does not exist"
            beyond = [call for call in calls if not 0 <= call.microbatch < self.program.microbatches]
            if beyond:
                yield f"schedule {name} calls {beyond[0].body} for microbatch {beyond[0].microbatch}"

    def _body(self, body: Body) -> Iterator[Finding]:
        count = len(self.role.tensors)
        for ins in body.instructions:
            outside = [t for t in named(ins) if not 0 <= t < count]
            problems = [f"t{outside[0]} does not exist"] if outside else self._instruction(ins)
            for problem in problems:
                yield InstructionPlace(self.chip, self.role, body.name, ins).finding(problem)

    def _instruction(self, ins: Instruction) -> Iterator[str]:
        problems = [
            p for name, holds, _ in FIELDS[type(ins)] if (p := self._field(holds, getattr(ins, name)))
        ]
        yield from problems
        match ins:
            case _ if problems:
                pass
            case Compute():
                yield from self._compute(ins)
            case Accumulate():
                yield from self._accumulate(ins)
            case Collective():
                yield from self._collective(ins)
            case Update():
                yield from self._update(ins)

    def _field(self, holds: Holds, value: Any) -> str | None:
        """What is wrong with a field, of any instruction, by what it holds (tensors: see `_body`)."""
        match holds:
            case Holds.SEGMENT if not 0 <= value < len(self.program.segments):
                return f"segment {value} does not exist"
            case Holds.STAGE if value == self.role.stage or not 0 <= value < len(self.program.roles):
                return f"stage {value} is no other stage"
            case Holds.GROUP:
                return self._group(value)
            case _:
                return None

    def _spec(self, tensor: int) -> TensorSpec:
        return self.role.tensors[tensor].spec

    def _compute(self, ins: Compute) -> Iterator[str]:
        segment = self.program.segments[ins.segment]
        if any(v >= len(segment.inputs) + len(segment.ops) for v in segment.outputs):
            return  # said about the segment
        made = [*((spec,) for spec in segment.inputs), *(op.outs for op in segment.ops)]
        yield from self._fits(ins.reads, [(spec,) for spec in segment.inputs], "reads", "takes")
        yield from self._fits(ins.writes, [made[v] for v in segment.outputs], "writes", "returns")

    def _fits(
        self, tensors: Sequence[int], specs: Sequence[Sequence[TensorSpec]], verb: str, does: str
    ) -> Iterator[str]:
        if len(tensors) != len(specs):
            yield f"it {verb} {len(tensors)} tensors, its segment {does} {len(specs)}"
        for tensor, wanted in zip(tensors, specs, strict=False):
            if tuple(wanted) != (self._spec(tensor),):
                yield f"it {verb} t{tensor} as {self._spec(tensor)}, its segment {does} {', '.join(map(str, wanted))}"

    def _accumulate(self, ins: Accumulate) -> Iterator[str]:
        if len(ins.reads) != len(ins.writes):
            yield f"{len(ins.reads)} terms for {len(ins.writes)} accumulators"
        for read, write in zip(ins.reads, ins.writes, strict=False):
            if self.role.tensors[write].is_per_microbatch:
                yield f"the accumulator t{write} does not outlive its microbatch"
            if self._spec(read).shape != self._spec(write).shape:
                yield f"t{read} is {self._spec(read)}, its accumulator t{write} is {self._spec(write)}"

    def _collective(self, ins: Collective) -> Iterator[str]:
        if len(ins.reads) != len(ins.writes):
            yield f"it reads {len(ins.reads)} tensors and writes {len(ins.writes)}"
        size = prod(len(self.program.along(ins.group, axis)) for axis in ins.group.axes)
        for read, write in zip(ins.reads, ins.writes, strict=False):
            given, wanted = self._spec(read), _result(ins, self._spec(read), size)
            if wanted is None:
                yield f"t{read} is {given}, which cannot be cut into {size} along dim {ins.dim}"
            elif wanted != self._spec(write):
                yield f"t{read} is {given}, so over {size} chips t{write} must be {wanted}, not {self._spec(write)}"

    def _group(self, group: Group) -> str | None:
        known = dict(self.program.axes)
        if not group.axes or len(set(group.axes)) < len(group.axes) or not known.keys() >= set(group.axes):
            return f"the group '{group}' is not made of axes of the mesh ({', '.join(known)})"
        outside = [s for s in group.stages if not 0 <= s < len(self.program.roles)]
        if outside or len(set(group.stages)) < len(group.stages):
            return f"the group '{group}' names stages that do not exist, or one twice"
        if group.stages and (self.role.stage not in group.stages or "pp" not in group.axes):
            return f"the chip is not a member of the group '{group}'"
        return None

    def _update(self, ins: Update) -> Iterator[str]:
        tensors = self.role.tensors
        persistent = [t for t in (ins.param, ins.grad, ins.stats, ins.target) if tensors[t].is_per_microbatch]
        if persistent:
            yield f"t{persistent[0]} does not outlive its microbatch"
        for name, tensor in (("gradient", ins.grad), ("target", ins.target)):
            if self._spec(tensor).shape != self._spec(ins.param).shape:
                yield f"t{ins.param} is {self._spec(ins.param)}, its {name} t{tensor} is {self._spec(tensor)}"
        gathered = (self._spec(ins.param).numel * self.program.size("tp"),)
        for tensor in ins.whole:
            if self._spec(tensor).shape != gathered:
                yield f"t{ins.param} of all tp chips is {list(gathered)}, t{tensor} is {self._spec(tensor)}"
        if self._spec(ins.stats).shape != STATS_SHAPE:
            yield f"the statistics t{ins.stats} are {self._spec(ins.stats)}, not three numbers"


def _result(ins: Collective, given: TensorSpec, size: int) -> TensorSpec | None:
    """The spec that a collective over `size` chips makes of `given`; None if it does not divide."""
    if ins.op in (CollectiveOp.ALL_REDUCE, CollectiveOp.BROADCAST, CollectiveOp.ALL_TO_ALL):
        return given
    if not 0 <= ins.dim < len(given.shape):
        return None
    shape = list(given.shape)
    if ins.op is CollectiveOp.ALL_GATHER:
        shape[ins.dim] *= size
    elif shape[ins.dim] % size:
        return None
    else:
        shape[ins.dim] //= size
    return TensorSpec(tuple(shape), given.dtype)
