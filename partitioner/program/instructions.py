"""Instructions: what follows from their declaration in `program.py`: their fields, effects, bytes and text.

The packed form (`program_codec.py`) and the static check read the same table, so a new instruction is declared once.
In its FORM a word is a field with what leads it (`grad={grad}`) or always the same (`to`); the first word tells the
instruction. A list of tensors ends at the arrow, or with the line.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from operator import attrgetter
from typing import Any, NamedTuple, get_args, get_origin, get_type_hints

from partitioner.program.program import (
    Accumulate,
    Collective,
    CollectiveOp,
    Holds,
    Ids,
    Instruction,
    Reduction,
    Role,
)

NO_AXES = "-"
NOT_WRITTEN = {Holds.REDUCTION: Reduction.NONE, Holds.DIM: 0}  # values that leave no word behind
WORDS: Mapping[Holds, Callable[[Any], str]] = {
    Holds.READ: "t{}".format,
    Holds.WRITTEN: "t{}".format,
    Holds.CHANGED: "t{}".format,
    Holds.NAMED: "t{}".format,
    Holds.SEGMENT: "s{}".format,
    Holds.STAGE: str,
    Holds.GROUP: lambda group: str(group) or NO_AXES,
    Holds.OP: str,
    Holds.REDUCTION: str,
    Holds.DIM: str,
    Holds.SETTINGS: str,
}
INSTRUCTIONS: tuple[type[Instruction], ...] = get_args(Instruction)


class Field(NamedTuple):
    """One field of an instruction but for `id`; `is_many`: a tuple of tensors, not one."""

    name: str
    holds: Holds
    is_many: bool


def _declared(kind: type[Instruction]) -> tuple[Field, ...]:
    hints = get_type_hints(kind, include_extras=True)
    annotated = [(each.name, get_args(hints[each.name])) for each in fields(kind) if each.name != "id"]
    return tuple(Field(name, holds, get_origin(held) is tuple) for name, (held, holds) in annotated)


FIELDS: Mapping[type[Instruction], tuple[Field, ...]] = {kind: _declared(kind) for kind in INSTRUCTIONS}


def _getters(*wanted: Holds) -> Mapping[type[Instruction], Callable[[Any], Ids]]:
    """Of every kind of instruction what gives the tensors in its fields of these; checks ask for every instruction."""
    return {kind: _getter([f for f in FIELDS[kind] if f.holds in wanted]) for kind in INSTRUCTIONS}


def _getter(which: Sequence[Field]) -> Callable[[Any], Ids]:
    if len(which) == 1 and which[0].is_many:
        return attrgetter(which[0].name)

    def tensors(ins: Instruction) -> Ids:
        found: Ids = ()
        for name, _, is_many in which:
            found += getattr(ins, name) if is_many else (getattr(ins, name),)
        return found

    return tensors


_READ = _getters(Holds.READ, Holds.CHANGED)
_WRITTEN = _getters(Holds.WRITTEN, Holds.CHANGED)
_NAMED = _getters(Holds.NAMED)


def reads(ins: Instruction) -> Ids:
    """Tensors whose value the instruction uses."""
    return _READ[type(ins)](ins)


def writes(ins: Instruction) -> Ids:
    """Tensors that have a new value afterwards (for transfers: after the Wait)."""
    return _WRITTEN[type(ins)](ins)


def named(ins: Instruction) -> Ids:
    """Every tensor the instruction mentions."""
    kind = type(ins)
    return _READ[kind](ins) + _WRITTEN[kind](ins) + _NAMED[kind](ins)


def collective_nbytes(role: Role, instruction: Collective) -> int:
    """The buffer by which a collective is priced: the gathered result, else what a chip puts in."""
    gathers = instruction.op is CollectiveOp.ALL_GATHER
    tensors = instruction.writes if gathers else instruction.reads
    return sum(role.tensors[tensor].spec.nbytes for tensor in tensors)


def accumulated_nbytes(role: Role, instruction: Accumulate) -> int:
    """Memory traffic of an accumulation: read both terms, write the sum."""
    read = sum(role.tensors[tensor].spec.nbytes for tensor in instruction.reads)
    return read + 2 * sum(role.tensors[tensor].spec.nbytes for tensor in instruction.writes)


def _form(kind: type[Instruction]) -> tuple[tuple[str, Field | None], ...]:
    """The words of its FORM taken apart: what leads a field, and the field if there is one."""
    declared = {field.name: field for field in FIELDS[kind]}
    words = (word.rstrip("}").partition("{") for word in kind.FORM.split())
    return tuple((lead, declared.get(name)) for lead, _, name in words)


_FORMS = {kind: _form(kind) for kind in INSTRUCTIONS}


def instruction_text(ins: Instruction) -> str:
    """One instruction without its id, as messages quote it: `all_reduce sum tp t7 -> t9`."""
    words: list[str] = []
    for lead, field in _FORMS[type(ins)]:
        if field is None:
            words.append(lead)
        elif field.is_many:
            words += map(WORDS[field.holds], getattr(ins, field.name))
        elif (value := getattr(ins, field.name)) != NOT_WRITTEN.get(field.holds):
            words.append(lead + WORDS[field.holds](value))
    return " ".join(words)
