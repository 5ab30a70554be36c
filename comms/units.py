"""Quantities with units: the only way a dimensional number enters or leaves a file.

`parse("200 Gb/s", Quantity.DATA_RATE)` is 25e9 (bytes per second) and `format_quantity` is its inverse.
Decimal prefixes are powers of ten (GB is 10^9 bytes), binary prefixes powers of two (GiB is 2^30);
a small `b` is a bit. Upper and lower case differ, as they must: `MB`, `Mb` and `mb` are three things.

A bare number where a unit belongs is an error, and so is a unit of another quantity.
Not here: arithmetic with units. A parsed value is a plain float in base units (bytes, seconds, W, ...).
"""

import difflib
import math
import re
from decimal import Decimal
from enum import StrEnum

from comms.errors import UnitError


class Quantity(StrEnum):
    """What a number measures; the value is the word used in messages."""

    SIZE = "size"
    DATA_RATE = "data rate"
    TIME = "time"
    COMPUTE_RATE = "compute rate"
    FREQUENCY = "frequency"
    POWER = "power"
    HOURLY_PRICE = "price per hour"
    PRICE = "price"


_DECIMAL = {"n": -9, "u": -6, "m": -3, "": 0, "k": 3, "M": 6, "G": 9, "T": 12, "P": 15, "E": 18}
_BINARY = {"Ki": 10, "Mi": 20, "Gi": 30, "Ti": 40, "Pi": 50, "Ei": 60}


def _decimal(base: str, prefixes: str, scale: Decimal = Decimal(1)) -> dict[str, Decimal]:
    """The base unit, then those with prefixes, smallest first."""
    return {prefix + base: scale.scaleb(_DECIMAL[prefix]) for prefix in ("", *prefixes)}


def _binary(base: str) -> dict[str, Decimal]:
    return {prefix + base: Decimal(2**bits) for prefix, bits in _BINARY.items()}


# Units that format_quantity may choose: powers of a thousand, no bits, no OP/s. The base unit comes first.
_LADDERS: dict[Quantity, dict[str, Decimal]] = {
    Quantity.SIZE: _decimal("B", "kMGTPE"),
    Quantity.DATA_RATE: _decimal("B/s", "kMGTPE"),
    Quantity.TIME: _decimal("s", "num"),
    Quantity.COMPUTE_RATE: _decimal("FLOP/s", "kMGTPE"),
    Quantity.FREQUENCY: _decimal("Hz", "kMG"),
    Quantity.POWER: _decimal("W", "mkM"),
    Quantity.HOURLY_PRICE: _decimal("USD/h", ""),
    Quantity.PRICE: _decimal("USD", ""),
}

# Per quantity: unit -> how many base units it is. The base unit comes first.
UNITS: dict[Quantity, dict[str, Decimal]] = _LADDERS | {
    Quantity.SIZE: _LADDERS[Quantity.SIZE] | _binary("B"),
    Quantity.DATA_RATE: _LADDERS[Quantity.DATA_RATE]
    | _binary("B/s")
    | _decimal("b/s", "kMGTPE", Decimal("0.125")),
    Quantity.COMPUTE_RATE: _LADDERS[Quantity.COMPUTE_RATE] | _decimal("OP/s", "kMGTPE"),
}

EXAMPLES: dict[Quantity, str] = {
    Quantity.SIZE: "80 GB or 80 GiB",
    Quantity.DATA_RATE: "25 GB/s or 200 Gb/s",
    Quantity.TIME: "1.3 us",
    Quantity.COMPUTE_RATE: "312 TFLOP/s",
    Quantity.FREQUENCY: "1.4 GHz",
    Quantity.POWER: "400 W",
    Quantity.HOURLY_PRICE: "2.5 USD/h",
    Quantity.PRICE: "9999 USD",
}

# For the eye only: three significant digits, no way back; None is a dash.
_PREFIXES = ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, ""))
_SECONDS = ((1.0, "s"), (1e-3, "ms"), (1e-6, "us"), (1e-9, "ns"))
DASH = "-"

_NUMBER = r"[0-9]+(?:\.[0-9]*)?(?:[eE][-+]?[0-9]+)?|\.[0-9]+(?:[eE][-+]?[0-9]+)?"
_TEXT = re.compile(rf"\s*([-+]?(?:{_NUMBER}))\s*(\S.*?)?\s*")


def parse(text: object, quantity: Quantity) -> float:
    """The value of `text` in base units of `quantity`. Raises UnitError, which says what to write instead."""
    example = f"write it like {EXAMPLES[quantity]}"
    if not isinstance(text, str):
        raise UnitError(f"a {quantity} needs a unit, got the bare value {text!r}", hint=example)
    match = _TEXT.fullmatch(text)
    if match is None:
        raise UnitError(f"{text!r} is not a number with a unit", hint=example)
    number, unit = match.groups()
    if unit is None:
        raise UnitError(f"a {quantity} needs a unit, got the bare number {text.strip()}", hint=example)
    if unit not in UNITS[quantity]:
        raise _wrong_unit(text.strip(), unit, quantity)
    try:
        value = float(Decimal(number) * UNITS[quantity][unit])
    except ArithmeticError:  # an exponent beyond those of Decimal
        value = math.inf
    if value < 0 or math.isinf(value):
        raise UnitError(f"{text.strip()!r} must be finite and not negative", hint=example)
    return value


def pattern(quantity: Quantity) -> str:
    """A regular expression for the texts that `parse` accepts, for editors."""
    units = "|".join(re.escape(unit).replace(r"\ ", " ") for unit in UNITS[quantity])
    return rf"^\s*\+?(?:{_NUMBER})\s*(?:{units})\s*$"


def format_quantity(value: float, quantity: Quantity, digits: int = 4) -> str:
    """`value` (base units) in the largest unit that keeps it at one or more, to `digits` digits."""
    ladder = _LADDERS[quantity]
    rounded = Decimal(f"{value:.{digits - 1}e}")  # rounded first: 999.96 GB is 1 TB, never 1000 GB
    base, smallest = next(iter(ladder)), min(ladder, key=ladder.__getitem__)
    fitting = [unit for unit, size in ladder.items() if size <= abs(rounded)] or [smallest]
    chosen = max(fitting, key=ladder.__getitem__) if value else base
    return f"{(rounded / ladder[chosen]).normalize():f} {chosen}"


def _wrong_unit(text: str, unit: str, expected: Quantity) -> UnitError:
    example = f"write it like {EXAMPLES[expected]}"
    for quantity, units in UNITS.items():
        if unit in units:
            return UnitError(f"{text!r} is a {quantity}, but a {expected} is expected", hint=example)
    near = difflib.get_close_matches(unit, UNITS[expected], n=1, cutoff=0.5)
    if near:
        return UnitError(f"{text!r} has an unknown unit {unit!r}", hint=f"did you mean {near[0]!r}?")
    known = ", ".join(UNITS[expected])
    return UnitError(f"{text!r} has an unknown unit {unit!r}", hint=f"a {expected} has one of {known}")


def format_scaled(value: float | None, unit: str) -> str:
    """With a decimal prefix: `format_scaled(3.2e9, "B")` is `3.2 GB`, `format_scaled(812, "tok/s")` is `812 tok/s`."""
    if value is None:
        return DASH
    if not math.isfinite(value):
        return f"{value} {unit}"
    size, prefix = next((pair for pair in _PREFIXES if abs(value) >= pair[0] * 0.9995), (1.0, ""))
    return f"{_three_digits(value / size)} {prefix}{unit}".rstrip()


def format_seconds(value: float | None) -> str:
    """A short time: `38.2 ms`; from two minutes on as `format_duration`."""
    if value is None:
        return DASH
    if not math.isfinite(value):
        return f"{value} s"
    if abs(value) >= 120:
        return format_duration(value)
    if value == 0:
        return "0 s"
    size, unit = next((pair for pair in _SECONDS if abs(value) >= pair[0] * 0.9995), _SECONDS[-1])
    return f"{_three_digits(value / size)} {unit}"


def format_duration(value: float | None) -> str:
    """A long time in its two largest units: `42 s`, `3 min 05 s`, `2 h 07 min`, `12 d 04 h`."""
    if value is None or not math.isfinite(value):
        return DASH
    whole = round(value)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 86400} d {whole % 86400 // 3600:02d} h"


def format_percent(value: float | None) -> str:
    """A share of one: `41.3 %`."""
    return DASH if value is None else f"{100 * value:.1f} %"


def format_dollars(value: float | None) -> str:
    """US dollars: cents from one dollar on, three digits below."""
    if value is None:
        return DASH
    if abs(value) >= 1 or value == 0:
        return f"{value:,.2f} USD"
    return f"{value:#.3g} USD" if abs(value) >= 1e-4 else f"{value:.1e} USD"


def _three_digits(value: float) -> str:
    magnitude = abs(value)
    return f"{value:.{0 if magnitude >= 99.95 else 1 if magnitude >= 9.995 else 2}f}"
