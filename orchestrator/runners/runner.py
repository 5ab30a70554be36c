"""The seam between the verbs and what carries out a Program: the clock alone, one process, or Ray actors.

A runner is made for one Program and has one method that matters: `run` carries out a schedule once. `simulate`,
`train` and `verify` call it, and the conformance suite holds every runner to the same claims. Runners of chips that
hold tensors can also be given values, and give them back.

Values move as plain tensors: `batches[dp][microbatch, name]`, `states[chip][tensor name]`.

The timeline of a step is of what was timed (predicted, by `simulated`), or of what was executed (measured). Both name
their spans through `label`, so that they join on (step, chip, instr, microbatch) and read the same.
"""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeAlias

from orchestrator.config.hardware.cluster import Cluster
from orchestrator.runs.timeline import Counter, Lane, Mark, Origin, Recorder, Timeline, lane_of
from partitioner.program.instructions import accumulated_nbytes, collective_nbytes, named
from partitioner.program.program import (
    Accumulate,
    Collective,
    Compute,
    Instruction,
    Program,
    Recv,
    Role,
    Send,
    Update,
)

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from comms.selection.progress import Progress
    from kernels.optimizers import Factory, StepStatistics
    from orchestrator.models.own_modules import OwnModule

# Causes before effects: forward 0, backward 1, later 2; microbatch; stage along the flow; chip.
BadOrder: TypeAlias = tuple[int, int, int, int]
Batches: TypeAlias = "Mapping[int, Mapping[tuple[int, str], torch.Tensor]]"
States: TypeAlias = "Mapping[int, Mapping[str, torch.Tensor]]"
HANG_TIMEOUT_S = 300.0  # what a job without `hang_timeout` has
HELD = "held by tensors"  # the counter of a chip's memory
# Bodies whose name is not the kind of work they do; every other body's name is the kind.
KINDS = {"backward_last": "backward", "update": "optimizer"}


@dataclass(frozen=True, slots=True)
class StepRequest:
    """One execution of a schedule of the Program.

    `measure` records what every instruction took and what chips held; `check` looks for the first instruction with a
    non-finite result. Neither changes a result.
    """

    schedule: str = "step"
    lr: float = 0.0
    batches: Batches = field(default_factory=dict)
    measure: bool = False
    check: bool = False
    settings: Sequence[Mapping[str, Any]] = ()  # of the optimizer's groups; without them `lr`


class StepResult(Protocol):
    """What came of a request."""

    @property
    def step_ns(self) -> int:
        """How long it took, by the runner's own clock."""

    @property
    def stats(self) -> "StepStatistics | None":
        """Loss and norms; None where there are no tensors."""

    def timeline(self, step: int = 0) -> Timeline | None:
        """What every chip did, as step `step`; None where that was not recorded."""


class Runner(Protocol):
    """Carries out schedules of the Program that it was made for, one after the other."""

    def run(self, request: StepRequest) -> StepResult:
        """Carry out one schedule, once."""

    def close(self) -> None:
        """Give back processes and memory; nothing is run after that."""


@dataclass(frozen=True, slots=True)
class ExecutedStep:
    """What came of a request to chips that hold tensors; marks only where it was to be measured."""

    program: Program = field(repr=False)
    step_ns: int
    stats: "StepStatistics | None"
    marks: tuple[Mark, ...] = ()
    first_bad: tuple[BadOrder, str] | None = None

    def timeline(self, step: int = 0) -> Timeline | None:
        """See `StepResult`; on the clock of the chips."""
        return measured_timeline(self.program, {step: self.marks}) if self.marks else None


class TensorRunner(Runner, Protocol):
    """A runner whose chips hold tensors."""

    def run(self, request: StepRequest) -> ExecutedStep:
        """See `Runner`."""

    def load(self, values: "Callable[[str], torch.Tensor]") -> None:
        """Give parameters ("params:NAME") and buffers ("buffer:NAME") to the chips that need them."""

    def states(self) -> States:
        """What a checkpoint holds, by chip."""

    def restore(self, states: States) -> None:
        """Put a checkpoint back."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What every chip needs besides the Program: optimizer, clipping, where tensors live, and how long it may be still.

    `hang_timeout_s`: without any chip that moves, after which a call to actors has failed.
    """

    optimizer: "Factory"
    clip_norm: float | None
    device: str = "cpu"
    groups: tuple[Mapping[str, object], ...] = (
        {},
        {"weight_decay": 0.0},
    )  # settings of the optimizer's groups
    modules: "tuple[OwnModule, ...]" = ()  # of the user's, for other processes that execute operators of theirs
    hang_timeout_s: float = HANG_TIMEOUT_S


class Launch(Protocol):
    """A runner that is coming up: what can begin before there is a Program has begun."""

    def connect(self, program: Program, settings: Settings, progress: "Progress") -> TensorRunner:
        """A runner of `program`, in place of any other of this launch, once what is starting is there."""

    def keep_logs(self, folder: "Path") -> None:
        """Have what other processes of the run print in this folder at the end, a file each."""

    def close(self) -> None:
        """Give back all that was started."""


def num_workers(cluster: Cluster) -> int:
    """Threads or actors that execute simulated chips: what the cluster file says, else one per core."""
    return cluster.actors or len(os.sched_getaffinity(0))


class Label(NamedTuple):
    """How an instruction appears in a timeline."""

    lane: Lane
    kind: str
    name: str
    nbytes: int
    flops: int


def label(program: Program, role: Role, body: str, instruction: Instruction) -> Label:
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
            return Label(lane_of(instruction.group.axes), str(instruction.op), name, nbytes, 0)
        case Send():
            tensor = tensors[instruction.tensor]
            return Label(Lane.SEND, "send", f"{tensor.name} to stage {instruction.to}", tensor.spec.nbytes, 0)
        case Recv():
            tensor = tensors[instruction.tensor]
            name = f"{tensor.name} from stage {instruction.source}"
            return Label(Lane.RECV, "recv", name, tensor.spec.nbytes, 0)
        case _:
            nbytes = sum(tensors[tensor].spec.nbytes for tensor in named(instruction))
            return Label(Lane.COMPUTE, kind, type(instruction).__name__.lower(), nbytes, 0)


class StepSpans:
    """Rows of one step, each instruction labelled once."""

    def __init__(self, recorder: Recorder, program: Program, step: int) -> None:
        self.recorder, self.program, self.step = recorder, program, step
        self._labels: dict[tuple[int, int], Label] = {}

    def label(self, role: Role, body: str, instruction: Instruction) -> Label:
        """As `label`; ids are unique within a role."""
        key = (role.stage, instruction.id)
        if key not in self._labels:
            self._labels[key] = label(self.program, role, body, instruction)
        return self._labels[key]

    def add(
        self, chips: tuple[int, ...], said: Label, instr: int, microbatch: int, start_ns: int, end_ns: int
    ) -> None:
        """One span on each of these chips."""
        lane, kind, name, nbytes, flops = said
        for chip in chips:
            self.recorder.span(  # by place: this runs once per span
                self.step, chip, lane, kind, name, instr, start_ns, end_ns, nbytes, flops, microbatch
            )


def measured_timeline(program: Program, marks: Mapping[int, Iterable[Mark]]) -> Timeline:
    """The marks of each step as spans, on the clock that took them."""
    names = {chip: f"chip {chip} ({program.role_of(chip).name})" for chip in range(program.num_chips)}
    recorder = Recorder(Origin.MEASURED, names)
    known = {
        (role.stage, instruction.id): (body.name, instruction)
        for role in program.roles for body in role.bodies for instruction in body.instructions
    }  # fmt: skip
    for step, of_step in marks.items():
        spans = StepSpans(recorder, program, step)
        for mark in of_step:
            role = program.role_of(mark.chip)
            body, instruction = known[role.stage, mark.instruction]
            said = spans.label(role, body, instruction)
            spans.add((mark.chip,), said, mark.instruction, mark.microbatch, mark.start_ns, mark.end_ns)
            if mark.held_bytes:
                recorder.counter(Counter(step, mark.chip, HELD, mark.end_ns, mark.held_bytes))
    return recorder.timeline()
