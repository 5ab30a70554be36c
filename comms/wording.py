"""Wording: numbers as a person reads them, with a unit, in at most a handful of characters.

For the eye only: three significant digits, no round trip (that is `units`). Decimal prefixes; None is a
dash.
"""

import math

_PREFIXES = ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, ""))
_SECONDS = ((1.0, "s"), (1e-3, "ms"), (1e-6, "us"), (1e-9, "ns"))
DASH = "-"


def scaled(value: float | None, unit: str) -> str:
    """With a decimal prefix: `scaled(3.2e9, "B")` is `3.2 GB`, `scaled(812, "tok/s")` is `812 tok/s`."""
    if value is None:
        return DASH
    if not math.isfinite(value):
        return f"{value} {unit}"
    size, prefix = next((pair for pair in _PREFIXES if abs(value) >= pair[0] * 0.9995), (1.0, ""))
    return f"{_three_digits(value / size)} {prefix}{unit}".rstrip()


def seconds(value: float | None) -> str:
    """A short time: `38.2 ms`; from two minutes on as `duration`."""
    if value is None:
        return DASH
    if not math.isfinite(value):
        return f"{value} s"
    if abs(value) >= 120:
        return duration(value)
    if value == 0:
        return "0 s"
    size, unit = next((pair for pair in _SECONDS if abs(value) >= pair[0] * 0.9995), _SECONDS[-1])
    return f"{_three_digits(value / size)} {unit}"


def duration(value: float | None) -> str:
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


def percent(value: float | None) -> str:
    """A share of one: `41.3 %`."""
    return DASH if value is None else f"{100 * value:.1f} %"


def dollars(value: float | None) -> str:
    """US dollars: cents from one dollar on, three digits below."""
    if value is None:
        return DASH
    if abs(value) >= 1 or value == 0:
        return f"{value:,.2f} USD"
    return f"{value:#.3g} USD" if abs(value) >= 1e-4 else f"{value:.1e} USD"


def _three_digits(value: float) -> str:
    magnitude = abs(value)
    return f"{value:.{0 if magnitude >= 99.95 else 1 if magnitude >= 9.995 else 2}f}"
