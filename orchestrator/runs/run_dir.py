"""Run directory: everything one run leaves behind, under fixed names, portable as a folder.

    run.yaml            the effective configuration and the versions it ran with
    plan.yaml           how the model was split; can be given back with --plan
    program.txt         what every role executes, to read; program.msgpack, to load
    metrics.jsonl       one line per step
    predicted.msgpack   timelines; measured.msgpack
    trace.json.gz       both, for Perfetto
    loss.png            pictures; timeline.png
    result.json         of `simulate`, as --json prints it
    checkpoints/        step-000100/ and so on
    log.txt             what was said on the terminal

Names inside are relative: the folder may be moved or copied. Every file but the two logs is written whole or
not at all. A run never writes into a directory that exists, except to resume it.

A timeline is one msgpack map with a format name and a version; each column is little-endian bytes under zlib. No
pickle: reading a file runs no code. Lanes are stored by name, so that a new lane does not change the meaning of old
files. Same timeline, same bytes (with one zlib build).
"""

import re
import zlib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from platform import python_version
from typing import Any

import msgpack
import numpy as np
import yaml

from comms.errors import ConfigError, RunError, TimelineFormatError
from orchestrator.config.yaml_file import read_yaml
from orchestrator.runs.disk import explained, write_whole
from orchestrator.runs.timeline import COUNTER_ROW, FLOW_ROW, LANES, SPAN_ROW, Lane, Origin, Rows, Timeline

FORMAT = "orchestrate.timeline"
VERSION = 1
PARENT = Path("runs")
CONFIG = "run.yaml"
_PACKAGES = ("torch", "ray", "numpy", "safetensors", "transformers")


def encode(timeline: Timeline) -> bytes:
    """The timeline as bytes."""
    document = {
        "format": FORMAT,
        "version": VERSION,
        "origin": str(timeline.origin),
        "chips": [list(pair) for pair in timeline.chips],
        "texts": list(timeline.texts),
        "lanes": [str(lane) for lane in LANES],
        "spans": _columns(timeline.span_rows),
        "flows": _columns(timeline.flow_rows),
        "counters": _columns(timeline.counter_rows),
    }
    packed: bytes = msgpack.packb(document)
    return packed


def decode(data: bytes) -> Timeline:
    """The timeline that `encode` was given. Raises TimelineFormatError for anything else."""
    try:
        document = msgpack.unpackb(data)
    except Exception as error:  # msgpack raises a dozen unrelated types for bytes that are not msgpack
        raise TimelineFormatError(f"not a msgpack document: {str(error) or type(error).__name__}") from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise TimelineFormatError(f"not a timeline: the format is not {FORMAT!r}")
    if document.get("version") != VERSION:
        raise TimelineFormatError(f"timeline version {document.get('version')}; this reads version {VERSION}")
    try:
        return _timeline(document)
    except (KeyError, TypeError, ValueError, IndexError, zlib.error) as error:
        raise TimelineFormatError(f"damaged timeline: {type(error).__name__}: {error}") from error


def _timeline(document: dict[str, Any]) -> Timeline:
    texts = tuple(str(text) for text in document["texts"])
    spans = _rows(document["spans"], SPAN_ROW)
    counters = _rows(document["counters"], COUNTER_ROW)
    lane_codes = np.array([LANES.index(Lane(name)) for name in document["lanes"]], dtype=np.uint8)
    spans["lane"] = lane_codes[spans["lane"]]
    for codes in (spans["kind"], spans["name"], counters["name"]):
        if len(codes) and codes.max() >= len(texts):
            raise ValueError("a row refers to a text that is not there")
    chips = tuple((int(chip), str(name)) for chip, name in document["chips"])
    flows = _rows(document["flows"], FLOW_ROW)
    return Timeline(Origin(document["origin"]), chips, texts, spans, flows, counters)


def _columns(rows: Rows) -> dict[str, bytes]:
    assert rows.dtype.names is not None
    return {name: zlib.compress(rows[name].tobytes(), 1) for name in rows.dtype.names}


def _rows(columns: dict[str, bytes], row: np.dtype[np.void]) -> Rows:
    assert row.names is not None
    arrays = {name: np.frombuffer(zlib.decompress(columns[name]), dtype=row[name]) for name in row.names}
    lengths = {len(values) for values in arrays.values()}
    if len(lengths) != 1:
        raise ValueError(f"columns of different length: {sorted(lengths)}")
    rows = np.empty(lengths.pop(), dtype=row)
    for name, values in arrays.items():
        rows[name] = values
    return rows


class _Name(str):
    """A file or folder of a run directory, by its fixed name."""

    __slots__ = ()

    def __get__(self, run: "RunDir", owner: type["RunDir"]) -> Path:
        return run.root / self


@dataclass(frozen=True, slots=True)
class RunDir:
    """One run's folder and the names in it."""

    root: Path

    config = _Name(CONFIG)
    plan = _Name("plan.yaml")  # as --plan takes it
    program_text = _Name("program.txt")
    program = _Name("program.msgpack")
    metrics = _Name("metrics.jsonl")
    trace = _Name("trace.json.gz")
    loss_plot = _Name("loss.png")
    timeline_plot = _Name("timeline.png")
    checkpoints = _Name("checkpoints")
    result = _Name("result.json")  # of a prediction, as --json prints it
    log = _Name("log.txt")
    logs = _Name("logs")  # what other processes of the run printed

    def timeline(self, origin: Origin) -> Path:
        """`predicted.msgpack` or `measured.msgpack`."""
        return self.root / f"{origin}.msgpack"

    def write_config(self, config: Mapping[str, object]) -> None:
        """Write run.yaml; `config` is plain data (strings, numbers, lists, mappings)."""
        document = {"config": dict(config), "versions": versions()}
        write_whole(self.config, yaml.safe_dump(document, sort_keys=False, width=110).encode())

    def read_config(self) -> dict[str, object]:
        """The `config` that `write_config` was given."""
        try:
            document: Any = read_yaml(self.config).root
            return dict(document["config"])
        except (ConfigError, KeyError, TypeError, ValueError) as error:
            raise _unreadable(self.config, error) from error

    def write_plan(self, text: str) -> None:
        """Write plan.yaml."""
        write_whole(self.plan, text.encode())

    def write_program(self, text: str, packed: bytes) -> None:
        """Write the Program in both forms."""
        write_whole(self.program_text, text.encode())
        write_whole(self.program, packed)

    def write_timeline(self, timeline: Timeline) -> None:
        """Write the timeline under the name of its origin."""
        write_whole(self.timeline(timeline.origin), encode(timeline))

    def read_timeline(self, origin: Origin) -> Timeline | None:
        """The predicted or the measured timeline; None where the run wrote none."""
        path = self.timeline(origin)
        if not path.exists():
            return None
        try:
            return decode(path.read_bytes())
        except (OSError, TimelineFormatError) as error:
            raise _unreadable(path, error) from error


def create(root: Path | None = None, *, job: str = "run", parent: Path = PARENT) -> RunDir:
    """Make a new run directory: `root`, or the next free `parent/job-0001`.

    Raises ConfigError if `root` exists, or cannot be.
    """
    if root is None:
        return _create_numbered(parent, _safe_name(job))
    with explained(root):
        try:
            root.mkdir(parents=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise ConfigError(
                problem="the run directory exists, and a run never overwrites another",
                where=str(root),
                hint=f"give another --run-dir, or continue that run with --resume {root}",
            ) from error
        except FileNotFoundError as error:
            problem = "the run directory cannot be made"
            raise ConfigError(problem, str(root), "give another --run-dir") from error
        (root / "checkpoints").mkdir()
    return RunDir(root)


def resume(root: Path) -> RunDir:
    """An existing run directory. Raises ConfigError where there is none."""
    if not (root / CONFIG).is_file():
        near = sorted(path.parent.name for path in root.parent.glob(f"*/{CONFIG}"))[-3:] if root.name else []
        known = f"; here are {', '.join(near)}" if near else ""
        raise ConfigError(
            problem=f"there is no run to resume: {CONFIG} is missing",
            where=str(root),
            hint=f"give the folder that `orchestrate train` printed{known}",
        )
    with explained(root):
        (root / "checkpoints").mkdir(exist_ok=True)
    return RunDir(root)


def versions() -> dict[str, str]:
    """Versions of Python and of the distributions that are installed, without importing them."""
    found = {"python": python_version()}
    for name in _PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def _create_numbered(parent: Path, job: str) -> RunDir:
    """Count on from the highest number there; two runs that start together get two numbers."""
    taken = (re.fullmatch(rf"{re.escape(job)}-(\d+)", path.name) for path in parent.glob(f"{job}-*"))
    number = 1 + max((int(match[1]) for match in taken if match), default=0)
    while True:
        root = parent / f"{job}-{number:04d}"
        if not root.exists():
            try:
                return create(root)
            except ConfigError as error:
                if not isinstance(error.__cause__, FileExistsError):
                    raise
        number += 1


def _safe_name(job: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", job).strip(".-") or "run"


def _unreadable(path: Path, error: Exception) -> RunError:
    return RunError(
        problem=f"cannot be read: {type(error).__name__}: {error}",
        where=str(path),
        hint="the file is missing or damaged; restore it or start a new run",
    )
