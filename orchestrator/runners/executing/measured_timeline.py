"""From measured marks to a timeline whose spans join the predicted ones on (step, chip, instruction, microbatch)."""

from collections.abc import Mapping, Sequence

from orchestrator.runners.base import Timed, is_timed, label
from orchestrator.runners.executing.chip import Mark
from orchestrator.runs.timeline import Origin, Recorder, Timeline
from partitioner.program.program import Program


def measured_timeline(program: Program, marks: Mapping[int, Sequence[Mark]]) -> Timeline:
    """Marks by step, as spans in nanoseconds from the first mark."""
    names = {chip: f"chip {chip} ({program.role_of(chip).name})" for chip in range(program.num_chips)}
    recorder = Recorder(Origin.MEASURED, names)
    zero = min(mark.start_ns for of_step in marks.values() for mark in of_step)
    known = {
        (role.stage, instruction.id): (body.name, instruction)
        for role in program.roles for body in role.bodies for instruction in body.instructions
    }  # fmt: skip
    for step, of_step in sorted(marks.items()):
        for mark in of_step:
            role = program.role_of(mark.chip)
            body, instruction = known[role.stage, mark.instruction]
            if not is_timed(instruction):
                continue
            timed: Timed = instruction  # type: ignore[assignment]
            said = label(program, role, body, timed)
            recorder.span(
                step=step, chip=mark.chip, lane=said.lane, kind=said.kind, name=said.name, instr=mark.instruction,
                start_ns=mark.start_ns - zero, end_ns=mark.end_ns - zero, nbytes=said.nbytes, flops=said.flops,
                microbatch=mark.microbatch,
            )  # fmt: skip
    return recorder.timeline()
