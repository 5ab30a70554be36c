"""Chips: the figures of one chip, and the catalog of known ones (kernels/catalog, one YAML file each).

A figure in a catalog file is `{value: 312 TFLOP/s, source: where it comes from}`, or the bare value where the
file itself is the source. Here it is a plain number in base units; `Chip.sources` keeps the words.

Assumes dense peaks, one direction for links (all links of a chip together), and gigabytes as published. On
chips without main memory (wafer-scale, tile processors) the on-chip SRAM is the memory: `memory_is_sram`.
Not modelled here: efficiency by operand size, clocks under load, and sparsity (kept in `notes`).
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cache
from math import prod
from pathlib import Path

import yaml

from comms.errors import ChipError, UnitError
from comms.units import Quantity, parse

CATALOG = Path(__file__).parent / "catalog"
UNSOURCED = "as given in the cluster file"
MOST_DIMS, MOST_CORES = 4, 2**24  # of an on-chip network; a wafer has a million cores
_SIZE = re.compile(r"\s*[0-9]{1,8}\s*")


class ChipKind(StrEnum):
    """What sort of processor a chip is."""

    GPU = "gpu"
    ASIC = "asic"
    CPU = "cpu"
    SOC = "soc"
    EDGE_SOC = "edge_soc"
    WAFER = "wafer"
    DATAFLOW = "dataflow"


# Defaults, where a chip's file gives no figure of its own; each with its reason, which becomes its source.
DEFAULT_MATMUL_EFFICIENCY = (
    0.75,
    "default: the best matrix multiplications of 12 measured parts reach 0.51 to 0.97 of peak, median 0.78",
)
DEFAULT_MEMORY_EFFICIENCY = (
    0.85,
    "default: streaming kernels on the measured parts reach 0.83 to 0.93 of the published bandwidth",
)
DEFAULT_PORT_LATENCY_S = (2e-6, "default: a small message inside a host takes 1.5 to 3 us (recalled)")
DEFAULT_HOST_LATENCY_S = (1.3e-6, "default: one DMA write measured on a PCIe 4 x16 card (Wormhole)")
DEFAULT_PORT_EFFICIENCY = (1.0, "default: the published rate, not derated")
DEFAULT_LAUNCH_S: dict[ChipKind, tuple[float, str]] = {
    ChipKind.GPU: (5e-6, "default: an eager framework issues about 200 thousand kernels a second (recalled)"),
    ChipKind.EDGE_SOC: (1e-5, "default: as a GPU, issued by cores half as fast (recalled)"),
    ChipKind.SOC: (5e-6, "default: as a GPU (recalled)"),
    ChipKind.CPU: (2e-6, "default: an operator call of an eager framework without a device queue (recalled)"),
    ChipKind.ASIC: (2e-6, "default: compiled ahead of time, the host only starts programs (recalled)"),
    ChipKind.WAFER: (1e-6, "default: the whole step is one compiled program (recalled)"),
    ChipKind.DATAFLOW: (1e-6, "default: the whole step is one compiled program (recalled)"),
}

# Where a dtype has no published peak: the first listed dtype that has one, times the factor.
# bf16 and fp16 stand for each other; without either, the fp32 pipes do the work at their own rate.
# tf32 without tensor pipes runs at the fp32 rate, else at half of bf16, as on the parts that have both.
# fp32 without a figure: half of tf32, or an eighth of bf16 (published parts range from 1/16 to 1/4).
# fp64 without a figure: half of what fp32 gives. 8-bit types without pipes of their own run as bf16.
# A chip that publishes only 8-bit figures runs 16-bit types at half that rate, 32-bit types at a quarter.
FALLBACKS: dict[str, tuple[tuple[str, float], ...]] = {
    "bf16": (("fp16", 1.0), ("tf32", 1.0), ("fp32", 1.0), ("int8", 0.5)),
    "fp16": (("bf16", 1.0), ("tf32", 1.0), ("fp32", 1.0), ("int8", 0.5)),
    "tf32": (("fp32", 1.0), ("bf16", 0.5), ("fp16", 0.5), ("int8", 0.25)),
    "fp32": (("tf32", 0.5), ("bf16", 0.125), ("fp16", 0.125), ("int8", 0.25)),
    "fp64": (("fp32", 0.5), ("tf32", 0.25), ("bf16", 0.0625), ("fp16", 0.0625), ("int8", 0.125)),
    "fp8": (("bf16", 1.0), ("fp16", 1.0), ("int8", 1.0), ("fp32", 1.0)),
    "int8": (("fp8", 1.0), ("bf16", 1.0), ("fp16", 1.0), ("fp32", 1.0)),
}


@dataclass(frozen=True, slots=True)
class Port:
    """All links of one sort that leave a chip, taken together, one direction."""

    name: str  # nvlink3, pcie4_x16, ...
    bytes_per_s: float  # published
    latency_s: float  # small message, one way
    efficiency: float = 1.0  # measured share of bytes_per_s that large messages reach
    domain: int | None = None  # most chips that one fabric of these links joins, where published


class NocShape(StrEnum):
    """How the cores of a chip are joined, where they stand in rows and columns."""

    MESH = "mesh"
    TORUS = "torus"
    ONE_WAY_TORUS = "one-way torus"  # every second of its networks runs the other way


@dataclass(frozen=True, slots=True)
class Noc:
    """The network between the cores of one chip; None where a figure is not published."""

    topology: str
    shape: NocShape | None = None
    dims: tuple[int, ...] = ()  # of one network, in routers; empty where not known
    networks: int = 1
    hop_latency_s: float | None = None  # from router to router
    entry_latency_s: float = 0.0  # from a core to its router, and the same again at the other end
    hop_bytes_per_s: float | None = None  # one hop, one direction
    aggregate_bytes_per_s: float | None = None
    memory_latency_s: float | None = None  # of a core's own memory
    loaded_latency_factor: float | None = None  # with all cores sending, over one alone
    multicasts: bool = False  # routers copy what goes to several cores


@dataclass(frozen=True, slots=True)
class Chip:
    """One chip type. Rates are peaks; the efficiencies say how much of them large kernels reach."""

    key: str
    name: str
    vendor: str
    year: int
    kind: ChipKind
    peak_flops_per_s: Mapping[str, float] = field(hash=False)  # by dtype, dense
    memory_bytes: int
    memory_bytes_per_s: float
    memory_type: str
    memory_is_sram: bool
    cores: int
    clock_hz: float | None
    sram_bytes: int | None  # scratchpads, else the last-level cache
    sram_bytes_per_s: float | None
    noc: Noc | None
    scaleup: Port | None
    host_link: Port | None
    tdp_w: float | None
    usd_per_hour: float | None
    list_usd: float | None
    launch_s: float  # host time to issue one kernel
    matmul_efficiency: float
    memory_efficiency: float
    notes: Mapping[str, str] = field(hash=False)  # figures that no model uses yet, as text
    sources: Mapping[str, str] = field(hash=False)  # dotted figure -> where it comes from, in words

    def peak(self, dtype: str) -> float:
        """Dense peak FLOP/s for `dtype` (fp64 fp32 tf32 fp16 bf16 fp8 int8): published, else by FALLBACKS."""
        if dtype in self.peak_flops_per_s:
            return self.peak_flops_per_s[dtype]
        for other, factor in FALLBACKS.get(dtype, ()):
            if other in self.peak_flops_per_s:
                return factor * self.peak_flops_per_s[other]
        known = ", ".join(self.peak_flops_per_s)
        raise ChipError(f"chip {self.key} has no peak for {dtype!r}; it has {known}")


def chip_keys() -> tuple[str, ...]:
    """Keys of the catalog, sorted: what `like:` in a cluster file accepts."""
    return tuple(sorted(path.stem for path in CATALOG.glob("*.yaml")))


@cache
def load_chip(key: str) -> Chip:
    """The catalog chip `key`. Raises ChipError for an unknown key."""
    return parse_chip(chip_document(key))


def chip_document(key: str) -> dict[str, object]:
    """The catalog file of `key` as plain mappings, so that a cluster file can lay its own figures over it."""
    path = CATALOG / f"{key}.yaml"
    if key not in chip_keys():
        raise ChipError(f"chip {key!r} is not in the catalog")
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    document = yaml.load(path.read_text(encoding="utf-8"), Loader=loader)
    assert isinstance(document, dict), path
    return document


def parse_chip(document: Mapping[str, object]) -> Chip:
    """The chip that a catalog document (`kind: chip`) describes. Raises ChipError and names the figure."""
    figures = _Figures(document)
    kind = _class_of(figures.text("class"))
    peaks = {dtype: figures.number(f"peak.{dtype}", Quantity.COMPUTE_RATE) for dtype in figures.keys("peak")}
    if not any(dtype in peaks for dtype in ("bf16", "fp16", "tf32", "fp32", "int8")):
        raise ChipError("peak needs a figure for one of bf16, fp16, tf32, fp32, int8")
    memory_type = figures.text("memory.type")
    return Chip(
        key=figures.text("key"),
        name=figures.text("name"),
        vendor=figures.text("vendor"),
        year=int(figures.number("year", None)),
        kind=kind,
        peak_flops_per_s=peaks,
        memory_bytes=int(figures.number("memory.capacity", Quantity.SIZE)),
        memory_bytes_per_s=figures.number("memory.bandwidth", Quantity.DATA_RATE),
        memory_type=memory_type,
        memory_is_sram="sram" in memory_type,
        cores=int(figures.number("cores.count", None)),
        clock_hz=figures.optional("cores.clock", Quantity.FREQUENCY),
        sram_bytes=figures.optional_integer("sram.capacity", Quantity.SIZE),
        sram_bytes_per_s=figures.optional("sram.bandwidth", Quantity.DATA_RATE),
        noc=_noc(figures),
        scaleup=_port(figures, "scale_up", DEFAULT_PORT_LATENCY_S),
        host_link=_port(figures, "host_link", DEFAULT_HOST_LATENCY_S),
        tdp_w=figures.optional("tdp", Quantity.POWER),
        usd_per_hour=figures.optional("price", Quantity.HOURLY_PRICE),
        list_usd=figures.optional("list_price", Quantity.PRICE),
        launch_s=figures.number("launch", Quantity.TIME, DEFAULT_LAUNCH_S[kind]),
        matmul_efficiency=figures.number("efficiency.matmul", None, DEFAULT_MATMUL_EFFICIENCY),
        memory_efficiency=figures.number("efficiency.memory", None, DEFAULT_MEMORY_EFFICIENCY),
        notes={name: figures.text(f"notes.{name}") for name in figures.keys("notes")},
        sources=figures.sources,
    )


def _class_of(text: str) -> ChipKind:
    if text not in list(ChipKind):
        raise ChipError(f"class must be one of {', '.join(ChipKind)}, got {text!r}")
    return ChipKind(text)


class _Figures:
    """Typed access to the figures of one document by dotted path; remembers the source of each that can have one."""

    def __init__(self, document: Mapping[str, object]) -> None:
        self._document = document
        self.sources: dict[str, str] = {}

    def keys(self, section: str) -> tuple[str, ...]:
        """The figures that `section` has; none when it is absent."""
        found = self._document.get(section)
        return tuple(found) if isinstance(found, Mapping) else ()

    def number(self, path: str, quantity: Quantity | None, default: tuple[float, str] | None = None) -> float:
        """The figure at `path` in base units (without a quantity a bare number), or the default with its reason."""
        found = self.optional(path, quantity)
        if found is not None:
            return found
        if default is None:
            raise ChipError(f"{path} is missing")
        found, self.sources[path] = default
        return found

    def optional(self, path: str, quantity: Quantity | None) -> float | None:
        """As `number`, but None where the figure is not published."""
        value = self._value(path)
        if value is None:
            return None
        if quantity is None:
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise ChipError(f"{path} must be a bare number, got {value!r}")
            return float(value)
        try:
            return parse(value, quantity)
        except UnitError as error:
            raise ChipError(f"{path}: {error.problem}", hint=error.hint) from error

    def optional_integer(self, path: str, quantity: Quantity | None) -> int | None:
        """As `optional`, for figures that count."""
        value = self.optional(path, quantity)
        return None if value is None else int(value)

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


def _noc(figures: _Figures) -> Noc | None:
    keys = figures.keys("noc")
    if not keys:
        return None
    return Noc(
        topology=figures.text("noc.topology"),
        shape=_noc_shape(figures.text("noc.shape")) if "shape" in keys else None,
        dims=_dims(figures.text("noc.dims")) if "dims" in keys else (),
        networks=figures.optional_integer("noc.networks", None) or 1,
        hop_latency_s=figures.optional("noc.hop_latency", Quantity.TIME),
        entry_latency_s=figures.optional("noc.entry_latency", Quantity.TIME) or 0.0,
        hop_bytes_per_s=figures.optional("noc.hop_bandwidth", Quantity.DATA_RATE),
        aggregate_bytes_per_s=figures.optional("noc.aggregate_bandwidth", Quantity.DATA_RATE),
        memory_latency_s=figures.optional("noc.memory_latency", Quantity.TIME),
        loaded_latency_factor=figures.optional("noc.loaded_latency_factor", None),
        multicasts=_yes_or_no("noc.multicast", figures.text("noc.multicast"))
        if "multicast" in keys
        else False,
    )


def _yes_or_no(path: str, word: str) -> bool:
    if word not in ("yes", "no"):
        raise ChipError(f"{path} must be yes or no, got {word!r}")
    return word == "yes"


def _noc_shape(word: str) -> NocShape:
    if word not in tuple(NocShape):
        raise ChipError(f"noc.shape must be one of {', '.join(NocShape)}, got {word!r}")
    return NocShape(word)


def _dims(text: str) -> tuple[int, ...]:
    """Sizes such as 10 x 12."""
    sizes = [int(size) if _SIZE.fullmatch(size) else 0 for size in text.split("x")]
    if not 0 < prod(sizes) <= MOST_CORES or len(sizes) > MOST_DIMS:
        most = f"{MOST_DIMS} of them and {MOST_CORES} cores at most"
        raise ChipError(f"noc.dims must be sizes such as 10 x 12, {most}, got {text!r}")
    return tuple(sizes)


def _port(figures: _Figures, section: str, latency: tuple[float, str]) -> Port | None:
    if not figures.keys(section):
        return None
    return Port(
        name=figures.text(f"{section}.type"),
        bytes_per_s=figures.number(f"{section}.bandwidth", Quantity.DATA_RATE),
        latency_s=figures.number(f"{section}.latency", Quantity.TIME, latency),
        efficiency=figures.number(f"{section}.efficiency", None, DEFAULT_PORT_EFFICIENCY),
        domain=figures.optional_integer(f"{section}.domain", None),
    )
