"""Instructions: what follows from their declaration in `program.py`: a table of fields, their effects, their text.

The packed form (`program_codec.py`) and the static check read the same table, so a new instruction is declared once.
In its FORM a word is a field with what leads it (`grad={grad}`) or always the same (`to`); the first word tells the
instruction. A list of tensors ends at the arrow, or with the line.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from functools import cache
from operator import attrgetter
from typing import Any, NamedTuple, NoReturn, get_args, get_origin, get_type_hints

from partitioner.program.program import CollectiveOp, Group, Holds, Ids, Instruction, Reduction

NO_AXES = "-"
ARROW = "->"
DECAY = ("no_decay", "decay")  # False, True
REDUCTIONS = frozenset(Reduction) - {Reduction.NONE}
NOT_WRITTEN = {Holds.REDUCTION: Reduction.NONE, Holds.DIM: 0}  # values that leave no word behind
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


def instruction_text(ins: Instruction) -> str:
    """One instruction without its id, as messages quote it: `all_reduce sum tp t7 -> t9`."""
    words: list[str] = []
    for lead, field in _forms()[type(ins)].parts:
        if field is None:
            words.append(lead)
        elif field.is_many:
            words += [f"t{tensor}" for tensor in getattr(ins, field.name)]
        elif (value := getattr(ins, field.name)) != NOT_WRITTEN.get(field.holds):
            words.append(lead + WORDS[field.holds].write(value))
    return " ".join(words)


def read_instruction(words: list[str], number: str) -> Instruction:
    """Inverse of `instruction_text`, of the line's words. Raises ValueError."""
    form = _forms_by_verb().get(words[0])
    if form is None:
        raise ValueError(f"unknown instruction {words[0]!r}; known: {', '.join(_forms_by_verb())}")
    return form.read(read_number(number), words)


class _Form:
    """How one kind of instruction is written: its FORM taken apart into (what leads a field, the field or None)."""

    def __init__(self, kind: type[Instruction]) -> None:
        fields = {field.name: field for field in FIELDS[kind]}
        words = (word.rstrip("}").partition("{") for word in kind.FORM.split())
        self.kind, self.hint = kind, getattr(kind, "HINT", "")
        self.parts = tuple((lead, fields.get(name)) for lead, _, name in words)
        lists = [field for field in fields.values() if field.is_many]
        self.flow_from = lists[0] if (ARROW, None) in self.parts else None
        self.is_fixed = not lists and not any(field.holds in NOT_WRITTEN for field in fields.values())

    def read(self, number: int, words: list[str]) -> Instruction:
        """The instruction that `words`, the verb first, stand for."""
        try:
            if self.is_fixed:
                self._check_places(words)
            return self.kind(number, **self._values(words))
        except ValueError as error:
            raise ValueError(self.hint or str(error)) from error

    def _check_places(self, words: Sequence[str]) -> None:
        """Refuse words that are more or fewer than the places, or not led by what they should be."""
        pairs = zip(words, self.parts, strict=False)
        fits = (word.startswith(lead) if field else word == lead for word, (lead, field) in pairs)
        if len(words) != len(self.parts) or not all(fits):
            places = (lead + WORDS[field.holds].example if field else lead for lead, field in self.parts[1:])
            raise ValueError(f"expected '{' '.join(places)}', not {' '.join(words[1:])!r}")

    def _values(self, words: list[str]) -> dict[str, Any]:
        values: dict[str, Any] = {}
        lead, last = self.parts[-1]
        if last and last.holds is Holds.DIM:  # taken off first, as the list before it ends with the words
            values[last.name] = read_number(words.pop()[len(lead) :]) if words[-1].startswith(lead) else 0
        for lead, field in self.parts:
            if field is None:
                del words[0]
            elif field.is_many:
                stop = _arrow(words) if field is self.flow_from else len(words)
                values[field.name] = read_ids(words[:stop])
                del words[:stop]
            elif field.name not in values:
                values[field.name] = _value(lead, field, words)
        return values


def _value(lead: str, field: Field, words: list[str]) -> object:
    """What the next word stands for; a missing one is read as an empty one, a reduction may be left out."""
    word = words[0].removeprefix(lead) if words else ""
    if field.holds is Holds.REDUCTION and word not in REDUCTIONS:
        return Reduction.NONE
    del words[:1]
    return WORDS[field.holds].read(word)


@cache
def _forms() -> Mapping[type[Instruction], _Form]:
    return {kind: _Form(kind) for kind in INSTRUCTIONS}


@cache
def _forms_by_verb() -> Mapping[str, _Form]:
    """A collective starts with the name of its operation, every other instruction with a word of its own."""
    forms = _forms().values()
    fixed = {lead: form for form in forms for lead, field in form.parts[:1] if field is None}
    return fixed | {op: form for form in forms if form.parts[0][1] for op in CollectiveOp}


def _group(text: str) -> Group:
    axes, _, stages = text.partition("@")
    if not text:
        raise ValueError("a collective needs its group, for example tp or pp*dp or pp@0+3")
    return Group(
        () if axes == NO_AXES else tuple(axes.split("*")),
        tuple(read_number(stage) for stage in stages.split("+")) if stages else (),
    )


class _Word(NamedTuple):
    """How a field's value is written and read, and what a message shows for it."""

    write: Callable[[Any], str]
    read: Callable[[str], object]
    example: str


TENSOR = _Word("t{}".format, lambda word: read_id("t", word), "t4")
WORDS: Mapping[Holds, _Word] = {
    Holds.READ: TENSOR,
    Holds.WRITTEN: TENSOR,
    Holds.CHANGED: TENSOR,
    Holds.NAMED: TENSOR,
    Holds.SEGMENT: _Word("s{}".format, lambda word: read_id("s", word), "s4"),
    Holds.STAGE: _Word(str, lambda word: read_number(word), "1"),
    Holds.GROUP: _Word(lambda group: str(group) or NO_AXES, _group, "tp"),
    Holds.OP: _Word(str, CollectiveOp, "all_reduce"),
    Holds.REDUCTION: _Word(str, Reduction, "sum"),
    Holds.DIM: _Word(str, lambda word: read_number(word), "1"),
    Holds.DECAY: _Word(DECAY.__getitem__, lambda word: bool(DECAY.index(word)), "decay"),
}


def _arrow(words: Sequence[str]) -> int:
    return words.index(ARROW) if words.count(ARROW) == 1 else fail("expected 't1 t2 -> t3'")


def fail(problem: str) -> NoReturn:
    """Refuse a text; whoever reads the whole adds the line."""
    raise ValueError(problem)


def read_number(text: str) -> int:
    """A whole number, of digits only."""
    return int(text) if text.isascii() and text.isdecimal() else fail(f"{text!r} is not a whole number")


def read_id(letter: str, text: str) -> int:
    """The number behind a letter that says of what: `t4`."""
    return read_number(text[1:]) if text[:1] == letter else fail(f"expected {letter}<number>, found {text!r}")


def read_ids(words: Sequence[str]) -> Ids:
    """The numbers of tensors."""
    return tuple([read_id("t", word) for word in words])
