"""Timelines of a step: of what was timed (predicted), and of what was executed (measured).

Both name their spans through `label`, so that they join on (step, chip, instr, microbatch) and read the same.

Predicted times are those of each role's representative. With several chips shown for it every one gets the same
spans, so that a trace of a small mesh shows every chip; transfers then join chips of equal coordinates.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from orchestrator.runners.timing.step_costs import accumulated_nbytes, collective_nbytes
from orchestrator.runners.timing.timed_segments import Piece, lane_of
from orchestrator.runs.timeline import Lane, Mark, Origin, Recorder, Timeline
from partitioner.program.instructions import named
from partitioner.program.machine import Key, Post
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

# Bodies whose name is not the kind of work they do; every other body's name is the kind.
HELD = "held by tensors"  # the counter of a chip's memory
KINDS = {"backward_last": "backward", "update": "optimizer"}


class Ran(NamedTuple):
    """One execution of a timed segment: pieces of body `body` that start at `start_ns`."""

    start_ns: int
    microbatch: int
    body: str
    pieces: tuple[Piece, ...]


@dataclass(frozen=True, slots=True)
class TimedCommunication:
    """A transfer or a collective: all its chips had posted it at `ready_ns`, bytes moved from start to end."""

    key: Key
    posts: Mapping[int, Post]  # by what was timed: stages, or chips
    ready_ns: int
    start_ns: int
    end_ns: int


@dataclass(frozen=True, slots=True)
class Label:
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
            return Label(lane_of(instruction.group), str(instruction.op), name, nbytes, 0)
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


def measured_timeline(program: Program, marks: Iterable[Mark], step: int) -> Timeline:
    """The marks of one step as spans, on the clock that took them."""
    names = {chip: f"chip {chip} ({program.role_of(chip).name})" for chip in range(program.num_chips)}
    spans = _Spans(Recorder(Origin.MEASURED, names), program, step)
    known = {
        (role.stage, instruction.id): (body.name, instruction)
        for role in program.roles for body in role.bodies for instruction in body.instructions
    }  # fmt: skip
    for mark in marks:
        role = program.role_of(mark.chip)
        body, instruction = known[role.stage, mark.instruction]
        said = spans.label(role, body, instruction)
        spans.add((mark.chip,), said, mark.instruction, mark.microbatch, mark.start_ns, mark.end_ns)
        if mark.held_bytes:
            spans.recorder.counter(
                step=step, chip=mark.chip, name=HELD, at_ns=mark.end_ns, nbytes=mark.held_bytes
            )
    return spans.recorder.timeline()


def predicted_timeline(
    program: Program,
    ran: Sequence[Sequence[Ran]],
    communications: Sequence[TimedCommunication],
    step: int,
    shown: Sequence[tuple[int, ...]],
) -> Timeline:
    """Every span and arrow of the step; `shown` are the chips that get the spans of each that was timed."""
    roles = [program.roles[program.size("pp") * number // len(shown)] for number in range(len(shown))]
    names = {
        chip: f"chip {chip} (stage {role.stage})"
        for role, chips in zip(roles, shown, strict=True)
        for chip in chips
    }
    spans = _Spans(Recorder(Origin.PREDICTED, names), program, step)
    for role, chips, rows in zip(roles, shown, ran, strict=True):
        for row in rows:
            spans.segment(chips, role, row)
    for each in communications:
        for number, post in each.posts.items():
            said = spans.label(roles[number], "", post.instruction)
            spans.add(shown[number], said, post.instruction.id, post.microbatch, each.start_ns, each.end_ns)
        if each.key.kind == "p2p":
            spans.flow(each, shown)
    return spans.recorder.timeline()


class _Spans:
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

    def segment(self, chips: tuple[int, ...], role: Role, row: Ran) -> None:
        """The pieces of one execution of a timed segment."""
        instructions = role.body[row.body].instructions
        for piece in row.pieces:
            instruction = instructions[piece.at]
            said = self.label(role, row.body, instruction)
            if piece.lane is Lane.HOST:
                said = replace(said, lane=Lane.HOST, kind="host", nbytes=0, flops=0)
            start, end = row.start_ns + piece.start_ns, row.start_ns + piece.end_ns
            self.add(chips, said, instruction.id, row.microbatch, start, end)

    def flow(self, transfer: TimedCommunication, shown: Sequence[tuple[int, ...]]) -> None:
        """The arrows of a transfer, between chips of equal coordinates."""
        source, target = transfer.key.chips
        send, recv = transfer.posts[source], transfer.posts[target]
        for source_chip, target_chip in zip(shown[source], shown[target], strict=True):
            self.recorder.flow(
                step=self.step,
                microbatch=send.microbatch,
                source_chip=source_chip,
                source_instr=send.instruction.id,
                target_chip=target_chip,
                target_instr=recv.instruction.id,
            )

    def add(
        self, chips: tuple[int, ...], said: Label, instr: int, microbatch: int, start_ns: int, end_ns: int
    ) -> None:
        """One span on each of these chips."""
        for chip in chips:
            self.recorder.span(
                step=self.step,
                chip=chip,
                lane=said.lane,
                kind=said.kind,
                name=said.name,
                instr=instr,
                start_ns=start_ns,
                end_ns=end_ns,
                nbytes=said.nbytes,
                flops=said.flops,
                microbatch=microbatch,
            )
