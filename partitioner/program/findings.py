"""Findings: what the static checks have to say about a Program, each with the chip and the instruction at fault."""

from dataclasses import dataclass
from enum import StrEnum

from partitioner.program.instructions import instruction_text
from partitioner.program.program import Call, Instruction, Program, Role


class Rule(StrEnum):
    """The family of rules that a finding is about."""

    STRUCTURE = "structure"  # tables, ids, shapes
    LIFETIME = "lifetime"  # reads, writes and frees in order
    COMMUNICATION = "communication"  # every meeting takes place, and its parties agree


@dataclass(frozen=True, slots=True)
class Finding:
    """One broken rule. `chip` stands for all chips of its role; `instruction` is its id in that role."""

    rule: Rule
    where: str
    problem: str
    chip: int | None = None
    instruction: int | None = None

    def __str__(self) -> str:
        return f"{self.where}: {self.problem}" if self.where else self.problem


def representative(program: Program, role: Role) -> int:
    """The first chip of a role, which speaks for all of them."""
    return program.chip_at({axis: role.stage if axis == "pp" else 0 for axis, _ in program.axes})


def place(chip: int, role: Role, body: str, ins: Instruction, call: Call | None = None) -> str:
    """`chip 4 (stage 1), forward(0), instruction 3 'recv t1 from 0'`."""
    called = body if call is None else f"{call.body}({call.microbatch})"
    return f"chip {chip} ({role.name}), {called}, instruction {ins.id} '{instruction_text(ins)}'"


def at(
    rule: Rule, chip: int, role: Role, body: str, ins: Instruction, problem: str, call: Call | None = None
) -> Finding:
    """A finding about one instruction."""
    return Finding(rule, place(chip, role, body, ins, call), problem, chip, ins.id)
