"""Predicted: the timeline of a simulated step, made from timed stretches and meetings when somebody asks for it.

Times are those of each role's representative. With `all_chips` every chip of the role gets the same spans, so
that a trace of a small mesh shows every chip; transfers then join chips of equal coordinates.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from orchestrator.runners.base import Label, Timed, label
from orchestrator.runners.timing.timed_segments import Piece
from orchestrator.runs.timeline import Lane, Origin, Recorder, Timeline
from partitioner.program.machine import Key, Post
from partitioner.program.program import Program


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
    posts: Mapping[int, Post]  # by what was timed: stages, or chips
    ready_ns: int
    start_ns: int
    end_ns: int


def predicted_timeline(
    program: Program,
    ran: Sequence[Sequence[Ran]],
    meetings: Sequence[Meeting],
    step: int,
    shown: Sequence[tuple[int, ...]],
) -> Timeline:
    """Every span and arrow of the step; `shown` are the chips that get the spans of each that was timed."""
    writer = _Writer(program, step, shown)
    for number, rows in enumerate(ran):
        for row in rows:
            writer.stretch(number, row)
    for meeting in meetings:
        writer.meeting(meeting)
    return writer.recorder.timeline()


class _Writer:
    def __init__(self, program: Program, step: int, shown: Sequence[tuple[int, ...]]) -> None:
        self.program, self.step, self.chips = program, step, shown
        self.stages = [program.size("pp") * number // len(shown) for number in range(len(shown))]
        names = {
            chip: f"chip {chip} (stage {stage})"
            for stage, chips in zip(self.stages, shown, strict=True)
            for chip in chips
        }
        self.recorder = Recorder(Origin.PREDICTED, names)
        self.labels: dict[tuple[int, str, int], Label] = {}

    def stretch(self, number: int, row: Ran) -> None:
        role = self.program.roles[self.stages[number]]
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
            self._span(number, said, instruction.id, row.microbatch, start, end)

    def meeting(self, meeting: Meeting) -> None:
        for number, post in meeting.posts.items():
            said = label(self.program, self.program.roles[self.stages[number]], "", post.instruction)
            self._span(number, said, post.instruction.id, post.microbatch, meeting.start_ns, meeting.end_ns)
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

    def _span(
        self, number: int, said: Label, instr: int, microbatch: int, start_ns: int, end_ns: int
    ) -> None:
        for chip in self.chips[number]:
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
