"""Chip files: the schema of one chip, as the catalog has them and as cluster files override them.

Every figure is a value with a unit or `{value: ..., source: ...}`. The schema only checks; `kernels.chips`
reads the numbers, so that a cluster file's figures can be laid over a catalog file's before they are read.
"""

from collections.abc import Mapping
from functools import partial
from typing import Annotated, Any, Literal

from pydantic import Field

from comms.errors import ConfigError, located
from comms.units import Quantity
from kernels.chips import Chip, ChipKind, chip_document, chip_keys, parse_chip
from orchestrator.config.schema import (
    WHOLE,
    FieldType,
    Section,
    field_error,
    nearest,
    quantity_field,
    read_quantity,
    short,
    word_field,
)
from orchestrator.config.yaml_file import Document

_FIGURE_KEYS = ("value", "source")
MOST = 1e9  # of a figure without a unit: counts, shares, factors


def figure(quantity: Quantity | type[float] | type[str]) -> FieldType:
    """A field that is a value, or a value with its source: a quantity, a bare number or text."""
    bare = {"type": "string" if quantity is str else "number"}
    value = quantity_field(quantity).json_schema if isinstance(quantity, Quantity) else bare
    sourced = {
        "type": "object",
        "properties": {"value": value, "source": {"type": "string"}},
        "required": ["value"],
        "additionalProperties": False,
    }
    return FieldType(partial(_read_figure, quantity), {"anyOf": [value, sourced]})


def _read_figure(quantity: Quantity | type[float] | type[str], value: object) -> object:
    """Checks the value and hands it on unread."""
    inner = value
    if isinstance(value, Mapping):
        unknown = [key for key in value if key not in _FIGURE_KEYS]
        if unknown:
            problem = f"unknown key {unknown[0]!r} in a figure"
            raise field_error(problem, nearest(unknown[0], _FIGURE_KEYS))
        inner = value.get("value")
    if isinstance(quantity, Quantity):
        read_quantity(quantity, inner)
    elif quantity is float and (
        isinstance(inner, bool) or not isinstance(inner, int | float) or not 0 < inner <= MOST
    ):
        problem = f"{short(inner)} is not a number above zero, up to {MOST:g}"
        raise field_error(problem, "write a bare number")
    elif quantity is str and not isinstance(inner, str):
        raise field_error(f"{inner!r} is not text", "write text (in quotes if it looks like a number)")
    return value


Words = Annotated[object, figure(str)]
Number = Annotated[object, figure(float)]
SizeFigure = Annotated[object, figure(Quantity.SIZE)]
RateFigure = Annotated[object, figure(Quantity.DATA_RATE)]
TimeFigure = Annotated[object, figure(Quantity.TIME)]


class MemorySection(Section):
    """Main memory; on chips without one, their SRAM."""

    capacity: SizeFigure = None
    bandwidth: RateFigure = None
    type: Words = None


class SramSection(Section):
    """Scratchpads or the last-level cache."""

    capacity: SizeFigure = None
    bandwidth: RateFigure = None


class CoresSection(Section):
    """How many cores, and their clock."""

    count: Number = None
    clock: Annotated[object, figure(Quantity.FREQUENCY)] = None


class NocSection(Section):
    """The on-chip network; `shape` is mesh, torus or one-way torus, `dims` are as 10 x 12, `multicast` yes or no."""

    topology: Words = None
    shape: Words = None
    dims: Words = None
    networks: Number = None
    hop_latency: TimeFigure = None
    entry_latency: TimeFigure = None
    hop_bandwidth: RateFigure = None
    aggregate_bandwidth: RateFigure = None
    memory_latency: TimeFigure = None
    loaded_latency_factor: Number = None
    multicast: Words = None


class PortSection(Section):
    """All links of one sort that leave the chip, one direction."""

    type: Words = None
    bandwidth: RateFigure = None
    latency: TimeFigure = None
    efficiency: Number = None
    domain: Number = None


class EfficiencySection(Section):
    """Shares of the peaks that large kernels reach."""

    matmul: Number = None
    memory: Number = None


class ChipFigures(Section):
    """Everything a chip file can say; in a cluster file all of it is optional and overrides `like`."""

    name: str = ""
    vendor: str = ""
    year: int = 0
    class_: Annotated[ChipKind, word_field(ChipKind)] = Field(ChipKind.GPU, alias="class")
    peak: dict[str, Annotated[object, figure(Quantity.COMPUTE_RATE)]] = Field(default_factory=dict)
    memory: MemorySection | None = None
    sram: SramSection | None = None
    cores: CoresSection | None = None
    noc: NocSection | None = None
    scale_up: PortSection | None = None
    host_link: PortSection | None = None
    tdp: Annotated[object, figure(Quantity.POWER)] = None
    price: Annotated[object, figure(Quantity.HOURLY_PRICE)] = None
    list_price: Annotated[object, figure(Quantity.PRICE)] = None
    launch: TimeFigure = None
    efficiency: EfficiencySection | None = None
    notes: dict[str, Words] = Field(default_factory=dict)


class ChipFile(ChipFigures):
    """One file of the catalog."""

    kind: Literal["chip"]
    version: Annotated[Literal[1], WHOLE]
    key: str


def described_chip(place: Document, like: str | None) -> Chip:
    """The chip that is described at a place of a validated document: its figures over those of `like`, if any."""
    figures = _figures(place)
    own = {key: value for key, value in figures.items() if key not in ("like", "count", "kind", "version")}
    base = _catalog(place, like) if like else _BLANK
    if like and own:
        base = {**base, "key": f"{like}_with_overrides"}
    if not like:
        own.setdefault("key", own.get("name", "unnamed"))
        own.setdefault("name", own["key"])
    hint = "add the figure, or start from a catalog chip with `like:`"
    with located(place.where(), hint):
        return parse_chip(_laid_over(base, own))


_BLANK: dict[str, object] = {
    "vendor": "",
    "year": 0,
    "class": "gpu",
    "cores": {"count": 1},
    "memory": {"type": "dram"},
}


def _catalog(place: Document, like: str) -> dict[str, object]:
    if like not in chip_keys():
        hint = nearest(like, chip_keys())
        raise ConfigError(f"chip {like!r} is not in the catalog", place.where("like"), hint)
    return chip_document(like)


def _laid_over(base: Mapping[str, object], own: Mapping[str, object]) -> dict[str, object]:
    """`own` over `base`: sections merge key by key, figures replace each other whole."""
    merged = dict(base)
    for key, value in own.items():
        below = merged.get(key)
        if isinstance(value, Mapping) and "value" not in value and isinstance(below, Mapping):
            value = _laid_over(below, value)
        merged[key] = value
    return merged


def _figures(place: Document) -> Mapping[str, object]:
    found: Any = place.root
    for key in place.at:
        found = found[key]
    assert isinstance(found, Mapping), place.at
    return found
