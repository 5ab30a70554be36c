"""Timelines on disk: `predicted.msgpack` and `measured.msgpack`.

One msgpack map with a format name and a version; each column is little-endian bytes under zlib. No pickle:
reading a file runs no code. Lanes are stored by name, so that a new lane does not change the meaning of old
files. Same timeline, same bytes (with one zlib build).
"""

import zlib
from typing import Any

import msgpack
import numpy as np

from comms.errors import TimelineFormatError
from orchestrator.runs.timeline import COUNTER_ROW, FLOW_ROW, LANES, SPAN_ROW, Lane, Origin, Rows, Timeline

FORMAT = "orchestrate.timeline"
VERSION = 1


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
