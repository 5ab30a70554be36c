"""Schemas: strict sections of configuration files, fields with units, and errors that say file, line and
remedy.

A `Section` accepts exactly its keys and exact types: no text for a number, no number for a quantity.
`validate` reports everything that is wrong with a document at once. Sections are frozen: that of a job is the
job itself; of hardware, the modules that define one make other values, and nothing else ever sees it.
"""

import difflib
import math
from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from typing import Annotated, Any, TypeVar, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    ValidationError,
)
from pydantic_core import CoreSchema, ErrorDetails, PydanticCustomError, PydanticKnownError, core_schema

from comms.errors import ConfigError, UnitError, combined
from comms.units import EXAMPLES, Quantity, format_quantity, parse, pattern
from orchestrator.config.yaml_file import Document, Location

_MAY_BE_ZERO = {Quantity.TIME, Quantity.POWER, Quantity.HOURLY_PRICE, Quantity.PRICE}
MOST_LETTERS = 100  # of a word that may be misspelt
EXACT = 17  # digits that tell one float from another

# Far beyond anything that is built: what is outside is a slip of the pen, and times of hundreds of digits.
_LIMITS: Mapping[Quantity, tuple[float, float]] = {
    Quantity.TIME: (0.0, 24 * 3600.0),
    Quantity.DATA_RATE: (1.0, 1e18),
    Quantity.SIZE: (1.0, 1e18),
}


class Section(BaseModel):
    """One mapping of a file."""

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, hide_input_in_errors=True, allow_inf_nan=False
    )


@dataclass(frozen=True, eq=False)
class FieldType:
    """A field that is read by a rule of its own, in the way that pydantic asks for."""

    read: Callable[[object], object]  # what stands in the file, as what it means; raises `field_error`
    json_schema: Mapping[str, Any]  # what editors check while the file is typed
    written: Callable[[Any], object] = lambda value: value  # what stands in a file that means it

    def __get_pydantic_core_schema__(self, source: object, handler: GetCoreSchemaHandler) -> CoreSchema:
        written = core_schema.plain_serializer_function_ser_schema(self.written)
        return core_schema.no_info_plain_validator_function(self.read, serialization=written)

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        return deepcopy(dict(self.json_schema))


def quantity_field(quantity: Quantity) -> FieldType:
    """A field that is a quantity: text with a unit in the file, a float in base units after it."""
    examples = EXAMPLES[quantity].split(" or ")
    schema = {"type": "string", "pattern": pattern(quantity), "examples": examples}
    written = partial(format_quantity, quantity=quantity, digits=EXACT)
    return FieldType(partial(read_quantity, quantity), schema, written)


def read_quantity(quantity: Quantity, value: object) -> float:
    """The value in base units; zero only where nothing divides by it."""
    try:
        number = parse(value, quantity)
    except UnitError as error:
        raise field_error(error.problem, error.hint) from error
    if number == 0 and quantity not in _MAY_BE_ZERO:
        raise field_error(f"a {quantity} of zero", "give a value above zero, or remove the key")
    least, most = _LIMITS.get(quantity, (0.0, math.inf))
    if number < least:
        hint = f"give at least {format_quantity(least, quantity)}"
        raise field_error(f"{short(value)} is less than any {quantity} here", hint)
    if number > most:
        hint = f"give at most {format_quantity(most, quantity)}"
        raise field_error(f"{short(value)} is more than any {quantity} here", hint)
    return number


def count_or(word: str) -> FieldType:
    """A field that is a whole number of at least one, or a word that stands for None."""

    def read(value: object) -> int | None:
        if value == word:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            problem = f"{value!r} is not a count"
            raise field_error(problem, f"write a whole number above zero, or {word!r}")
        return value

    schema = {"anyOf": [{"type": "integer", "minimum": 1}, {"const": word}]}
    return FieldType(read, schema, lambda value: word if value is None else value)


def word_field(known: Iterable[StrEnum]) -> FieldType:
    """A field that is one of an enumeration, by its word."""

    def read(value: object) -> StrEnum:
        for member in known:
            if member == value:
                return member
        raise PydanticKnownError("literal_error", {"expected": ", ".join(known)})

    return FieldType(read, {"type": "string", "enum": list(map(str, known))}, str)


def _whole(value: object) -> object:
    """A whole number: to Python true is 1 and so is 1.0."""
    if type(value) is not int:
        raise PydanticKnownError("int_type")
    return value


WHOLE = BeforeValidator(_whole)  # before literal numbers
Size = Annotated[float, quantity_field(Quantity.SIZE)]
DataRate = Annotated[float, quantity_field(Quantity.DATA_RATE)]
Time = Annotated[float, quantity_field(Quantity.TIME)]
Power = Annotated[float, quantity_field(Quantity.POWER)]
HourlyPrice = Annotated[float, quantity_field(Quantity.HOURLY_PRICE)]

SectionT = TypeVar("SectionT", bound=Section)


def field_error(problem: str, hint: str, *at: str) -> PydanticCustomError:
    """What a field's reader raises, so that both parts reach the user; `at`: the keys inside of the field."""
    return PydanticCustomError("field", "{problem}", {"problem": problem, "hint": hint, "at": at})


def validate(document: Document, model: type[SectionT]) -> SectionT:
    """The document as `model`. Raises one ConfigError that leads all findings, in the order of the schema."""
    try:
        return model.model_validate(document.root)
    except ValidationError as error:
        findings = [_finding(details, document, model) for details in error.errors(include_url=False)]
    raise combined(findings)


def nearest(word: object, known: Mapping[str, object] | tuple[str, ...]) -> str:
    """A hint that names the known word most like `word`, or all of them."""
    text = str(word)[:MOST_LETTERS]  # likeness takes the square of the length
    best = max(known, key=lambda other: _likeness(text, other), default="")
    if best and _likeness(text, best) >= 0.6:
        return f"did you mean {best!r}?"
    return f"known here: {', '.join(known)}" if best else "remove it"


def _likeness(word: str, other: str) -> float:
    """Share of common letters in order, from 0 to 1; swapped letters and wrong case count as very alike."""
    if sorted(word.lower()) == sorted(other.lower()):
        return 0.95
    return difflib.SequenceMatcher(None, word.lower(), other.lower()).ratio()


_HINTS = {
    "int_type": "write a whole number",
    "int_from_float": "write a whole number",
    "float_type": "write a number without quotes",
    "finite_number": "write a number that is not infinite",
    "string_type": "write text (in quotes if it looks like a number)",
    "bool_type": "write true or false",
    "list_type": "write a list, `- item` lines",
    "too_short": "give at least one item",
    "model_type": "write a mapping, indented `key: value` lines",
    "dict_type": "write a mapping, indented `key: value` lines",
    "greater_than": "choose a value inside the bounds",
    "greater_than_equal": "choose a value inside the bounds",
    "less_than": "choose a value inside the bounds",
    "less_than_equal": "choose a value inside the bounds",
}


def _finding(details: ErrorDetails, document: Document, model: type[Section]) -> ConfigError:
    location: Location = tuple(details["loc"])
    where, name, context = document.where(*location), _dotted(location), details.get("ctx", {})
    kind, given = details["type"], details["input"]
    if kind == "extra_forbidden":
        return ConfigError(
            f"unknown key {name!r}", where, nearest(location[-1], _keys_at(model, location[:-1]))
        )
    if kind == "missing":
        first, *others = _words_for(model, location) or [""]
        hint = f"add `{location[-1]}:{first and ' '}{first}`" + f" (or {', '.join(others)})" * bool(others)
        return ConfigError(f"the key {name!r} is missing", document.where(*location[:-1]), hint)
    if kind == "field":
        prefix = f"{name}: " if name else ""
        place = document.where(*location, *context["at"])
        return ConfigError(f"{prefix}{context['problem']}", place, str(context["hint"]))
    if kind == "literal_error":
        known = tuple(str(context["expected"]).replace(" or ", ", ").replace("'", "").split(", "))
        return ConfigError(f"{name} cannot be {given!r}", where, nearest(given, known))
    message = details["msg"].removeprefix("Input ").removeprefix("Value error, ")
    return ConfigError(f"{name} {message}, got {short(given)}", where, _HINTS.get(kind, "change the value"))


def _words_for(model: type[Section], location: Location) -> list[str]:
    """What a key may be, where that is one of a few words or numbers."""
    section = section_at(model, location[:-1])
    fields = section.model_fields.items() if section else ()
    field = next((field for name, field in fields if location[-1] in (name, field.alias)), None)
    if field is None:
        return []
    rules = (rule for rule in field.metadata if isinstance(rule, FieldType))
    words = next((rule.json_schema.get("enum", ()) for rule in rules), None) or get_args(field.annotation)
    return [str(word) for word in words if isinstance(word, str | int)]


def _dotted(location: Location) -> str:
    text = ""
    for part in location:
        text += f"[{part}]" if isinstance(part, int) else f".{part}"
    return text.removeprefix(".")


def short(value: object) -> str:
    """A value in a message, however large it is."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _keys_at(model: type[Section], location: Location) -> tuple[str, ...]:
    section = section_at(model, location)
    if section is None:
        return ()
    return tuple(field.alias or name for name, field in section.model_fields.items())


def section_at(model: type[Section], location: Location) -> type[Section] | None:
    """The section that `location` lies in, or None where the schema has none there."""
    section: type[Section] | None = model
    for part in location:
        if isinstance(part, int):
            continue
        fields = section.model_fields if section else {}
        found = next((field for name, field in fields.items() if part in (name, field.alias)), None)
        section = _section_in(found.annotation) if found else None
    return section


def _section_in(annotation: object) -> type[Section] | None:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    return next((inner for part in get_args(annotation) if (inner := _section_in(part))), None)
