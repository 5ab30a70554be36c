"""Timeline: what every chip did, or is predicted to do, in integer nanoseconds.

A value made of spans (work on one lane of one chip), flows (arrows from a send to its recv) and counters
(bytes held). Rows live in packed NumPy columns (55 bytes a span) with names interned, so a million spans cost
some 55 MB; `Span`, `Flow` and `Counter` are decoded only when somebody looks. The form is canonical: the same
set of rows gives the same bytes, in whatever order they were recorded.

Assumes one clock. A recv span covers the time in which bytes move, not the time since it was posted: waiting is
idle time, not communication. Not modelled: what happens inside a span, and preemption (spans of one lane follow
each other).
"""

from array import array
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any, Generic, NamedTuple, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

Rows: TypeAlias = NDArray[np.void]
Ints: TypeAlias = NDArray[np.int64]
Row = TypeVar("Row")

NONE = -1  # instr or microbatch of a span that belongs to no instruction or to no microbatch


class Origin(StrEnum):
    """Where the numbers come from."""

    PREDICTED = "predicted"
    MEASURED = "measured"


class Lane(StrEnum):
    """The things of one chip that can be busy at the same time; the order is the order on screen."""

    COMPUTE = "compute"
    OPTIMIZER = "optimizer"
    HOST = "host"
    COPY = "copy"
    SEND = "send"
    RECV = "recv"
    TP = "tp"
    CP = "cp"
    EP = "ep"
    DP = "dp"
    COLLECTIVE = "collective"


LANES: tuple[Lane, ...] = tuple(Lane)
# lanes of collectives along one mesh axis; those along several axes or across stages share one
AXIS_LANES: Mapping[tuple[str, ...], Lane] = {
    ("tp",): Lane.TP, ("dp",): Lane.DP, ("cp",): Lane.CP, ("ep",): Lane.EP,
}  # fmt: skip
_LANE_CODE = dict(zip(LANES, range(len(LANES)), strict=True))


def lane_of(axes: tuple[str, ...]) -> Lane:
    """The lane of a collective along mesh axes."""
    return AXIS_LANES.get(axes, Lane.COLLECTIVE)


class Span(NamedTuple):
    """One piece of work.

    `kind` groups (forward, all_reduce, ...), `name` tells, `instr` keys to the Program.
    """

    step: int
    chip: int
    lane: Lane
    kind: str
    name: str
    instr: int
    start_ns: int
    end_ns: int
    nbytes: int = 0
    flops: int = 0
    microbatch: int = NONE


class Flow(NamedTuple):
    """An arrow from a send to its recv, by instruction: the times are those of the two spans."""

    step: int
    microbatch: int
    source_chip: int
    source_instr: int
    target_chip: int
    target_instr: int


class Counter(NamedTuple):
    """From `at_ns` on, `name` (weights, activations, ...) holds `nbytes` on this chip."""

    step: int
    chip: int
    name: str
    at_ns: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Mark:
    """One measured interval, not yet a span: `instruction` of call `call` on `chip`, by the chip's clock."""

    chip: int
    call: int
    microbatch: int
    instruction: int
    start_ns: int
    end_ns: int
    held_bytes: int = 0  # by the chip's tensors at the end; 0 where nobody looked


_INT, _LONG = "<i4", "<i8"
SPAN_ROW = np.dtype(
    [
        *(("start_ns", _LONG), ("end_ns", _LONG), ("step", _INT), ("chip", _INT), ("instr", _INT)),
        *(("microbatch", _INT), ("lane", "<u1"), ("kind", "<u2"), ("name", "<u4")),
        *(("nbytes", _LONG), ("flops", _LONG)),
    ]
)
FLOW_ROW = np.dtype(
    [
        *(("step", _INT), ("microbatch", _INT), ("source_chip", _INT), ("source_instr", _INT)),
        *(("target_chip", _INT), ("target_instr", _INT)),
    ]
)
COUNTER_ROW = np.dtype([("at_ns", _LONG), ("step", _INT), ("chip", _INT), ("name", "<u4"), ("nbytes", _LONG)])


class View(Generic[Row]):
    """Rows as values, decoded on demand: indexing and iterating look like a tuple."""

    __slots__ = ("_make", "_rows")

    def __init__(self, rows: Rows, make: Callable[[tuple[Any, ...]], Row]) -> None:
        self._rows, self._make = rows, make

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Row:
        return self._make(self._rows[index].item())

    def __iter__(self) -> Iterator[Row]:
        for first in range(0, len(self._rows), 65536):  # bounded: a million tuples at once is 200 MB
            yield from map(self._make, self._rows[first : first + 65536].tolist())


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Timeline:
    """Canonical rows of one origin. Build it with a `Recorder`, never by hand."""

    origin: Origin
    chips: tuple[tuple[int, str], ...]  # (chip, its name), every chip that has a row, ascending
    texts: tuple[str, ...]  # sorted; rows refer to kinds and names by position
    span_rows: Rows
    flow_rows: Rows
    counter_rows: Rows

    @property
    def spans(self) -> View[Span]:
        """Every span, in order of (start, end, step, chip, instr)."""
        return View(self.span_rows, self._span)

    @property
    def flows(self) -> View[Flow]:
        """Every send -> recv arrow."""
        return View(self.flow_rows, Flow._make)

    @property
    def counters(self) -> View[Counter]:
        """Every counter sample, in order of time."""
        return View(self.counter_rows, self._counter)

    @property
    def steps(self) -> tuple[int, ...]:
        """The steps that have a span, ascending."""
        return tuple(np.unique(self.span_rows["step"]).tolist())

    @property
    def start_ns(self) -> int:
        """When the first span starts; 0 where there is none."""
        return int(self.span_rows["start_ns"].min()) if len(self.span_rows) else 0

    @property
    def end_ns(self) -> int:
        """When the last span ends; 0 where there is none."""
        return int(self.span_rows["end_ns"].max()) if len(self.span_rows) else 0

    @property
    def duration_ns(self) -> int:
        """From the first start to the last end."""
        return self.end_ns - self.start_ns

    def at_step(self, step: int) -> "Timeline":
        """Only the rows of one step; chips and their names stay."""
        rows = (self.span_rows, self.flow_rows, self.counter_rows)
        return _canonical(
            self.origin, dict(self.chips), self.texts, *(part[part["step"] == step] for part in rows)
        )

    def from_zero(self) -> "Timeline":
        """The same timeline on a clock on which the first span starts at 0."""
        spans, counters, zero = self.span_rows.copy(), self.counter_rows.copy(), self.start_ns
        for column in ("start_ns", "end_ns"):
            spans[column] -= zero
        counters["at_ns"] -= zero
        return replace(self, span_rows=spans, counter_rows=counters)

    def _span(self, row: tuple[Any, ...]) -> Span:
        start, end, step, chip, instr, microbatch, lane, kind, name, nbytes, flops = row
        texts = self.texts
        return Span(
            step, chip, LANES[lane], texts[kind], texts[name], instr, start, end, nbytes, flops, microbatch
        )

    def _counter(self, row: tuple[Any, ...]) -> Counter:
        at_ns, step, chip, name, nbytes = row
        return Counter(step, chip, self.texts[name], at_ns, nbytes)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Timeline):
            return NotImplemented
        mine = (self.origin, self.chips, self.texts)
        return mine == (other.origin, other.chips, other.texts) and all(
            np.array_equal(a, b)
            for a, b in (
                (self.span_rows, other.span_rows),
                (self.flow_rows, other.flow_rows),
                (self.counter_rows, other.counter_rows),
            )
        )

    __hash__ = None  # type: ignore[assignment]  # equality is over a million rows: not a key

    def __repr__(self) -> str:
        return (
            f"Timeline({self.origin}: {len(self.chips)} chips, {len(self.steps)} steps, "
            f"{len(self.span_rows)} spans, {len(self.flow_rows)} flows, {self.duration_ns / 1e6:.3f} ms)"
        )


class Recorder:
    """The one mutable thing here: append rows as they happen, then ask for the `timeline()`."""

    def __init__(self, origin: Origin, chips: Mapping[int, str] | None = None) -> None:
        self._origin = origin
        self._chips = dict(chips or {})
        self._texts: dict[str, int] = {}
        self._spans, self._flows, self._counters = array("q"), array("q"), array("q")

    def span(
        self, step: int, chip: int, lane: Lane, kind: str, name: str, instr: int, start_ns: int, end_ns: int,
        nbytes: int = 0, flops: int = 0, microbatch: int = NONE,
    ) -> None:  # fmt: skip
        """Note one finished piece of work, what a `Span` holds: there are too many to make one of each."""
        texts = self._texts
        kind_id = texts.setdefault(kind, len(texts))
        name_id = texts.setdefault(name, len(texts))
        code = _LANE_CODE[lane]
        self._spans.extend(
            (start_ns, end_ns, step, chip, instr, microbatch, code, kind_id, name_id, nbytes, flops)
        )

    def flow(self, flow: Flow) -> None:
        """Note that a send feeds a recv (either side may say so, or both)."""
        self._flows.extend(flow)

    def counter(self, counter: Counter) -> None:
        """Note how many bytes something holds from now on."""
        step, chip, name, at_ns, nbytes = counter
        name_id = self._texts.setdefault(name, len(self._texts))
        self._counters.extend((at_ns, step, chip, name_id, nbytes))

    def timeline(self) -> Timeline:
        """All that was recorded so far, as a value."""
        return _canonical(
            self._origin,
            self._chips,
            tuple(self._texts),
            _packed(self._spans, SPAN_ROW),
            _packed(self._flows, FLOW_ROW),
            _packed(self._counters, COUNTER_ROW),
        )


def group_ids(*columns: NDArray[Any]) -> Ints:
    """Equal tuples over the columns get equal ids, counted from 0 in ascending order of the tuples."""
    order = np.lexsort(columns[::-1])
    changed = np.zeros(len(order), dtype=bool)
    for column in columns:
        in_order = column[order]
        changed[1:] |= in_order[1:] != in_order[:-1]
    ids = np.empty(len(order), dtype=np.int64)
    ids[order] = np.cumsum(changed)
    return ids


def _packed(flat: "array[int]", row: np.dtype[np.void]) -> Rows:
    """Columns of `row` from a flat list of int64, row after row."""
    assert row.names is not None
    wide = np.array(flat, dtype=np.int64).reshape(-1, len(row.names))
    rows = np.empty(len(wide), dtype=row)
    for position, column in enumerate(row.names):
        limits = np.iinfo(row[column])
        if len(wide) and not limits.min <= wide[:, position].min() <= wide[:, position].max() <= limits.max:
            raise ValueError(f"timeline column {column} holds a value outside {limits.min}..{limits.max}")
        rows[column] = wide[:, position]
    return rows


def _canonical(
    origin: Origin,
    chips: Mapping[int, str],
    texts: tuple[str, ...],
    spans: Rows,
    flows: Rows,
    counters: Rows,
) -> Timeline:
    """Sort rows and texts, drop unused texts and repeated flows, name every chip."""
    used = np.unique(np.concatenate([spans["kind"], spans["name"], counters["name"]]).astype(np.int64))
    words = tuple(sorted(texts[code] for code in used.tolist()))
    position = {word: code for code, word in enumerate(words)}
    table = np.array([position.get(text, 0) for text in texts], dtype=np.int64)
    spans, counters = spans.copy(), counters.copy()
    if len(table):
        spans["kind"], spans["name"] = table[spans["kind"]], table[spans["name"]]
        counters["name"] = table[counters["name"]]
    spans, flows, counters = map(_sorted, (spans, flows, counters))
    flows = flows[np.concatenate([[True], flows[1:] != flows[:-1]])] if len(flows) else flows
    seen = [spans["chip"], counters["chip"], flows["source_chip"], flows["target_chip"]]
    numbers = sorted({*chips, *np.unique(np.concatenate(seen)).tolist()})
    names = tuple((chip, chips.get(chip, f"chip {chip}")) for chip in numbers)
    return Timeline(origin, names, words, spans, flows, counters)


def _sorted(rows: Rows) -> Rows:
    """Rows in ascending order of their columns, first column first: no two orders of one set."""
    assert rows.dtype.names is not None
    return rows[np.lexsort([rows[column] for column in reversed(rows.dtype.names)])]
