"""Predicted: the timeline of a simulated step, made from timed stretches and meetings when somebody asks for it.

Times are those of each role's representative. With `all_chips` every chip of the role gets the same spans, so
that a trace of a small mesh shows every chip; transfers then join chips of equal coordinates.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from orchestrator.runners.base import Label, Timed, label
from orchestrator.runners.stretch import Piece
from orchestrator.timeline import Lane, Origin, Recorder, Timeline
from partitioner.machine import Key, Post
from partitioner.program import Program, Role


class Ran(NamedTuple):
    """One execution of a stretch: pieces of body `body` that start at `start_ns`."""

    start_ns: int
    microbatch: int
    body: str
    pieces: tuple[Piece, ...]


@dataclass(frozen=True, slots=True)
class Meeting:
    """A transfer or a collective between stages: all had posted at `ready_ns`, bytes moved from start to end."""

    key: Key
    posts: Mapping[int, Post]  # by stage
    ready_ns: int
    start_ns: int
    end_ns: int


def predicted_timeline(
    program: Program, ran: Sequence[Sequence[Ran]], meetings: Sequence[Meeting], step: int, *, all_chips: bool
) -> Timeline:
    """Every span and arrow of the step; chips are named after their stage."""
    writer = _Writer(program, step, all_chips)
    for role, rows in zip(program.roles, ran, strict=True):
        for row in rows:
            writer.stretch(role, row)
    for meeting in meetings:
        writer.meeting(meeting)
    return writer.recorder.timeline()


class _Writer:
    def __init__(self, program: Program, step: int, all_chips: bool) -> None:
        self.program, self.step = program, step
        per_stage = program.num_chips // program.size("pp")
        shown = range(per_stage if all_chips else 1)
        self.chips = {
            role.stage: tuple(role.stage * per_stage + offset for offset in shown) for role in program.roles
        }
        names = {
            chip: f"chip {chip} (stage {stage})" for stage, chips in self.chips.items() for chip in chips
        }
        self.recorder = Recorder(Origin.PREDICTED, names)
        self.labels: dict[tuple[int, str, int], Label] = {}

    def stretch(self, role: Role, row: Ran) -> None:
        instructions = role.body[row.body].instructions
        for piece in row.pieces:
            instruction = instructions[piece.at]
            key = (role.stage, row.body, piece.at)
            if key not in self.labels:
                assert isinstance(instruction, Timed)
                self.labels[key] = label(self.program, role, row.body, instruction)
            said = self.labels[key]
            if piece.lane is Lane.HOST:
                said = replace(said, lane=Lane.HOST, kind="host", nbytes=0, flops=0)
            start, end = row.start_ns + piece.start_ns, row.start_ns + piece.end_ns
            self._span(role.stage, said, instruction.id, row.microbatch, start, end)

    def meeting(self, meeting: Meeting) -> None:
        for stage, post in meeting.posts.items():
            said = label(self.program, self.program.roles[stage], "", post.instruction)
            self._span(stage, said, post.instruction.id, post.microbatch, meeting.start_ns, meeting.end_ns)
        if meeting.key.kind == "p2p":
            self._flow(meeting)

    def _flow(self, meeting: Meeting) -> None:
        source, target = meeting.key.chips
        send, recv = meeting.posts[source], meeting.posts[target]
        for source_chip, target_chip in zip(self.chips[source], self.chips[target], strict=True):
            self.recorder.flow(
                step=self.step,
                microbatch=send.microbatch,
                source_chip=source_chip,
                source_instr=send.instruction.id,
                target_chip=target_chip,
                target_instr=recv.instruction.id,
            )

    def _span(self, stage: int, said: Label, instr: int, microbatch: int, start_ns: int, end_ns: int) -> None:
        for chip in self.chips[stage]:
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
