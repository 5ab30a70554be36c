"""Figures: reading numbers with units and their sources out of a catalog document.

A figure is `{value: 80 GB, source: words}` or the bare value. A value is a number, a prefix and a base unit
(`2.039 TB/s`, `40 MiB`, `9 ns`); each figure of a chip has one base unit, so anything else is an error.
Sources are collected while reading, so that no figure enters a chip without one.
"""

import re
from collections.abc import Mapping
from decimal import Decimal

from comms.errors import ChipError

_SCALE = {
    "": Decimal(1),
    **{prefix: Decimal(10) ** power for prefix, power in zip("num", (-9, -6, -3), strict=True)},
    **{prefix: Decimal(10) ** power for prefix, power in zip("kMGTPE", (3, 6, 9, 12, 15, 18), strict=True)},
    **{f"{prefix}i": Decimal(2) ** power for prefix, power in zip("KMGT", (10, 20, 30, 40), strict=True)},
}
_VALUE = re.compile(
    r"\s*\+?([0-9.]+(?:[eE][-+]?[0-9]+)?)\s*([numkMGTPE]|[KMGT]i)?(B/s|B|b/s|s|FLOP/s|OP/s|Hz|W|USD/h|USD)\s*"
)
# Units that measure what a base unit does: integer operations stand in for floating ones, 8 bits are a byte.
_SAME = {"OP/s": ("FLOP/s", Decimal(1)), "b/s": ("B/s", Decimal("0.125"))}
UNSOURCED = "as given in the cluster file"


class Figures:
    """Typed access to the figures of one document by dotted path; remembers the source of each."""

    def __init__(self, document: Mapping[str, object]) -> None:
        self._document = document
        self.sources: dict[str, str] = {}

    def keys(self, section: str) -> tuple[str, ...]:
        """The figures that `section` has; none when it is absent."""
        found = self._document.get(section)
        return tuple(found) if isinstance(found, Mapping) else ()

    def number(self, path: str, unit: str) -> float:
        """The figure at `path` in base units; `unit` "" is a bare number."""
        value = self._value(path)
        if value is None:
            raise ChipError(f"{path} is missing")
        return _magnitude(path, value, unit)

    def optional(self, path: str, unit: str) -> float | None:
        """As `number`, but None where the figure is not published."""
        return None if self._value(path) is None else self.number(path, unit)

    def optional_integer(self, path: str, unit: str) -> int | None:
        """As `optional`, for figures that count."""
        value = self.optional(path, unit)
        return None if value is None else int(value)

    def default(self, path: str, unit: str, default: tuple[float, str]) -> float:
        """As `number`, or the default, whose reason becomes the source."""
        value = self.optional(path, unit)
        if value is not None:
            return value
        self.sources[path] = default[1]
        return default[0]

    def integer(self, path: str) -> int:
        """A bare count."""
        return int(self.number(path, ""))

    def text(self, path: str) -> str:
        """A word or a sentence."""
        value = self._value(path)
        if value is None:
            raise ChipError(f"{path} is missing")
        return str(value)

    def _value(self, path: str) -> object:
        found: object = self._document
        for part in path.split("."):
            found = found.get(part) if isinstance(found, Mapping) else None
        if isinstance(found, Mapping):
            self.sources[path] = str(found.get("source", UNSOURCED))
            return found.get("value")
        if found is not None and "." in path:
            self.sources[path] = UNSOURCED
        return found


def _magnitude(path: str, value: object, unit: str) -> float:
    if unit == "":
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ChipError(f"{path} must be a bare number, got {value!r}")
        return float(value)
    match = _VALUE.fullmatch(str(value))
    if match is None:
        raise ChipError(f"{path} must be a number with a unit of {unit}, got {value!r}")
    number, prefix, base = match.groups()
    base, scale = _SAME.get(base, (base, Decimal(1)))
    if base != unit:
        raise ChipError(f"{path} must be in {unit}, got {value!r}")
    return float(Decimal(number) * _SCALE[prefix or ""] * scale)
