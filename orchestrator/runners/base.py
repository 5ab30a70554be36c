"""What every runner shares: the protocol, the result of a step, and the words for an instruction.

A runner carries out the steps of one Program: on the clock alone (`simulated`), or with real tensors in one
process or in actors. All of them name the spans of their timelines through `label`, so that predicted and
measured join on (step, chip, instr, microbatch) and read the same.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, TypeAlias, assert_never

from orchestrator.runs.timeline import Lane, Timeline
from partitioner.program.program import (
    Accumulate,
    Collective,
    CollectiveOp,
    Compute,
    Group,
    Instruction,
    Program,
    Recv,
    Role,
    Send,
    Update,
)

Working: TypeAlias = Compute | Accumulate | Update
Timed: TypeAlias = Working | Collective | Send | Recv

# Bodies whose name is not the kind of work they do; every other body's name is the kind.
KINDS = {"backward_last": "backward", "update": "optimizer"}
_LANES: Mapping[tuple[str, ...], Lane] = {
    ("tp",): Lane.TP,
    ("dp",): Lane.DP,
    ("cp",): Lane.CP,
    ("ep",): Lane.EP,
}


@dataclass(frozen=True, slots=True)
class StepResult:
    """One step as a runner saw it; loss and gradient norm only where there were tensors."""

    step: int
    duration_ns: int
    loss: float | None
    grad_norm: float | None
    timeline: Timeline | None


class Runner(Protocol):
    """Carries out training steps of the Program it was made for, in order."""

    def step(self, number: int) -> StepResult:
        """Carry out step `number`."""
        ...

    def close(self) -> None:
        """Give back processes and memory; no step after that."""
        ...


@dataclass(frozen=True, slots=True)
class Label:
    """How an instruction appears in a timeline."""

    lane: Lane
    kind: str
    name: str
    nbytes: int
    flops: int


def is_timed(instruction: Instruction) -> bool:
    """True for an instruction that gets a span: it works or communicates."""
    return isinstance(instruction, Compute | Accumulate | Update | Collective | Send | Recv)


def lane_of(group: Group) -> Lane:
    """The lane of a collective: that of its axis, the shared one for several axes or across stages."""
    return _LANES.get(group.axes, Lane.COLLECTIVE)


def collective_nbytes(role: Role, instruction: Collective) -> int:
    """The buffer by which a collective is priced: the gathered result, else what a chip puts in."""
    gathers = instruction.op is CollectiveOp.ALL_GATHER
    tensors = instruction.writes if gathers else instruction.reads
    return sum(role.tensors[tensor].spec.nbytes for tensor in tensors)


def accumulated_nbytes(role: Role, instruction: Accumulate) -> int:
    """Memory traffic of an accumulation: read both terms, write the sum."""
    read = sum(role.tensors[tensor].spec.nbytes for tensor in instruction.reads)
    return read + 2 * sum(role.tensors[tensor].spec.nbytes for tensor in instruction.writes)


def label(program: Program, role: Role, body: str, instruction: Timed) -> Label:
    """Lane, kind, name and size of an instruction in body `body` of `role`."""
    kind = KINDS.get(body, body)
    tensors = role.tensors
    match instruction:
        case Compute():
            segment = program.segments[instruction.segment]
            return Label(Lane.COMPUTE, kind, segment.name, segment.nbytes, segment.flops)
        case Accumulate():
            return Label(Lane.COMPUTE, kind, "accumulate", accumulated_nbytes(role, instruction), 0)
        case Update():
            param = tensors[instruction.param]
            return Label(Lane.OPTIMIZER, "optimizer", f"update {param.name}", param.spec.nbytes, 0)
        case Collective():
            name = f"{instruction.op} {instruction.group}"
            nbytes = collective_nbytes(role, instruction)
            return Label(lane_of(instruction.group), str(instruction.op), name, nbytes, 0)
        case Send():
            tensor = tensors[instruction.tensor]
            return Label(Lane.SEND, "send", f"{tensor.name} to stage {instruction.to}", tensor.spec.nbytes, 0)
        case Recv():
            tensor = tensors[instruction.tensor]
            name = f"{tensor.name} from stage {instruction.source}"
            return Label(Lane.RECV, "recv", name, tensor.spec.nbytes, 0)
        case _:
            assert_never(instruction)
