"""Measured tables: what nccl-tests prints, and CSV files, as sizes and seconds.

The text of nccl-tests is read by its own column header, so that versions with and without `redop`, `root`,
per-iteration columns and time stamps all work; output of NCCL itself and tags of mpirun or srun in between are
passed over. The number of chips comes from its `Rank` lines, the operation from the name of the program.

Bus bandwidth is nccl-tests' own (doc/PERFORMANCE.md there): payload / seconds times 2 (n - 1) / n in an
all_reduce, (n - 1) / n in all_gather, reduce_scatter and all_to_all, 1 in all else. A table in which seconds and
bus bandwidth do not fit together is refused: its operation or its number of chips is another one.

A point keeps how far its last printed digit leaves it open: 0.04 GB/s is known to one part in eight.
Not read: the JSON output of nccl-tests, and tables before its version 2, whose times are in milliseconds.
"""

import csv
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from itertools import pairwise

from comms.collectives.schedule import Op, bus_factor
from comms.errors import CommsError, located
from comms.units import Quantity, parse


@dataclass(frozen=True, slots=True)
class MeasuredPoint:
    """One size and its time."""

    nbytes: float
    seconds: float
    rounding: float = 0.0  # half of the last printed digit, relative

    def __post_init__(self) -> None:
        if not (self.nbytes > 0 and 0 < self.seconds < math.inf and self.rounding >= 0):
            raise CommsError(
                f"a measured point needs a size and a time above zero, got {self.nbytes:g} bytes in {self.seconds:g} s",
                hint="leave out sizes of 0 and failed runs",
            )


@dataclass(frozen=True, slots=True)
class MeasuredCurve:
    """What one operation took over sizes; without `op` it is a message from one chip to another."""

    op: Op | None
    num_chips: int
    points: tuple[MeasuredPoint, ...]  # by size


PROGRAMS = {
    "all_reduce": Op.ALL_REDUCE, "all_gather": Op.ALL_GATHER, "reduce_scatter": Op.REDUCE_SCATTER,
    "alltoall": Op.ALL_TO_ALL, "broadcast": Op.BROADCAST, "reduce": Op.REDUCE, "gather": Op.GATHER,
    "scatter": Op.SCATTER, "sendrecv": None,
}  # fmt: skip
_PROGRAM = re.compile(rf"\b({'|'.join(PROGRAMS)})_perf")
_RANK = re.compile(r"#\s+Rank\s+(\d{1,9})\s")
_THREADS = re.compile(r"#\s+nThreads?:?\s+(\d{1,9})\s+nGpus:?\s+(\d{1,9})")
_TAG = re.compile(r"^(?:\[\d+,\d+\]<std(?:out|err)>:|\s*\d+: )")  # mpirun --tag-output, srun --label
_ROW = re.compile(r"\s*\d+\s+\d+\s+[a-z]\w*\s")  # size, count, type
_TOLERANCE = 0.03  # between seconds and bus bandwidth, on top of what rounding explains


def read_table(
    text: str, where: str = "table", op: Op | None = None, num_chips: int | None = None
) -> MeasuredCurve:
    """Read nccl-tests output or CSV, whichever it is. `where` names the text in messages.

    `op` and `num_chips` are needed where the text does not say them; a text that says otherwise is an error.
    """
    if any(_ROW.match(_TAG.sub("", line)) for line in text.splitlines()):
        return read_nccl_tests(text, where, op, num_chips)
    return read_csv(text, where, op, num_chips)


def read_nccl_tests(
    text: str, where: str = "table", op: Op | None = None, num_chips: int | None = None
) -> MeasuredCurve:
    """Read what an nccl-tests program printed."""
    lines = [_TAG.sub("", line) for line in text.splitlines()]
    op, is_known = _program(lines, where, op)
    num_chips = _chips(lines, where, num_chips)
    columns: list[str] | None = None
    rows: list[_MeasuredRow] = []
    for number, line in enumerate(lines, 1):
        words = line.replace("#wrong", "wrong").lstrip("#").split()
        if line.startswith("#") and {"size", "count", "type", "algbw", "busbw"} <= set(words):
            columns = words
        elif _ROW.match(line) and line.split()[0] != "0":  # fewer bytes than chips: rounded down to nothing
            rows.append(_nccl_row(line.split(), columns, f"{where}, line {number}"))
    if not rows:
        raise CommsError(
            "no rows of numbers", where, "give the whole output of e.g. all_reduce_perf, or CSV with a header"
        )
    if not is_known:
        raise CommsError(
            "the table does not say which operation it measured",
            where,
            "keep the line with the program's name, or say the operation",
        )
    _check_bus_bandwidth(max(rows, key=lambda row: row.point.nbytes), op, num_chips, where)
    return _curve(op, num_chips, [row.point for row in rows], where)


def read_csv(
    text: str, where: str = "table", op: Op | None = None, num_chips: int | None = None
) -> MeasuredCurve:
    """Read CSV with a header: a size column, and one of time, algbw or busbw with its unit.

    `size` (bytes, or a unit in the header or in each cell), `time_us`, `seconds`, `latency (ms)`, `busbw_GB_s`,
    `algbw (Gb/s)`; `op` and `num_chips` columns are optional. Comma, semicolon or tab; lines with # are comments.
    Without any word of an operation it is point to point.
    """
    kept = [
        (number, line)
        for number, line in enumerate(text.splitlines(), 1)
        if line.strip() and not line.lstrip().startswith("#")
    ]
    if len(kept) < 2:
        raise CommsError("no rows of numbers", where, "give a header line, then one line per size")
    separator = max(",;\t", key=kept[0][1].count)
    try:
        cells = list(csv.reader((line for _, line in kept), delimiter=separator))
    except csv.Error as error:
        raise CommsError(f"not CSV: {error}", where, "give a header line, then one line per size") from error
    header = [_heading(word) for word in cells[0]]
    size, measure = _measure_columns(header, f"{where}, line {kept[0][0]}")
    rows = [
        (f"{where}, line {number}", _full_row(row, len(header), f"{where}, line {number}"))
        for (number, _), row in zip(kept[1:], cells[1:], strict=True)
    ]
    names = [name for name, _ in header]
    op = _agreed_op(_constant(names, rows, ("op", "collective")), op, where)
    said = _constant(names, rows, ("num_chips", "chips", "ranks"))
    if said is not None and not re.fullmatch("[0-9]{1,9}", said):
        raise CommsError(f"{said!r} is not a number of chips", where, "give a whole number")
    num_chips = _agreed_chips(None if said is None else int(said), num_chips, op, where)
    points = [
        _csv_point(row[size], header[size], row[measure], header[measure], bus_factor(op, num_chips), place)
        for place, row in rows
    ]
    return _curve(op, num_chips, points, where)


@dataclass(frozen=True, slots=True)
class _MeasuredRow:
    point: MeasuredPoint
    bus_bytes_per_s: float
    bus_rounding: float


def _program(lines: Sequence[str], where: str, given: Op | None) -> tuple[Op | None, bool]:
    """The operation (None: point to point), and whether anything says so."""
    found = {match.group(1) for line in lines for match in _PROGRAM.finditer(line)}
    if len(found) > 1:
        problem = f"the table holds runs of {' and '.join(sorted(found))}"
        raise CommsError(problem, where, "give one run at a time")
    if not found:
        return given, given is not None
    op = PROGRAMS[found.pop()]
    if given not in (None, op):
        problem = f"the table is of {op or 'sendrecv'}, not of {given}"
        raise CommsError(problem, where, "leave the operation out")
    return op, True


def _chips(lines: Sequence[str], where: str, given: int | None) -> int:
    ranks = [int(match.group(1)) for line in lines if (match := _RANK.match(line))]
    if len(set(ranks)) < len(ranks):
        raise CommsError(
            "the same rank appears twice",
            where,
            "give one run at a time; if every process is rank 0, nccl-tests was built without MPI=1",
        )
    threads = [match for line in lines if (match := _THREADS.match(line))]
    of_process = math.prod(int(number) for number in threads[0].groups()) if threads else 0
    found = max(len(ranks), of_process)  # rank lines of one process may be cut, or of its first chip only
    return _agreed_chips(found or None, given, Op.ALL_REDUCE, where)


def _agreed_chips(found: int | None, given: int | None, op: Op | None, where: str) -> int:
    if found == 1:
        raise CommsError(
            "the table is of 1 chip, which moves nothing",
            where,
            "give a run over two chips or more, with every line about its ranks",
        )
    if found is not None and given not in (None, found):
        problem = f"the table is of {found} chips, not of {given}"
        raise CommsError(problem, where, "leave the number of chips out")
    chips = found or given or (None if op else 2)
    if chips is None:
        raise CommsError("the table does not say over how many chips", where, "say the number of chips")
    if chips < 2:
        problem = f"a table of {chips} chip{'s' * (chips != 1)}, and that moves nothing"
        raise CommsError(problem, where, "give a run over two chips or more")
    return chips


def _agreed_op(found: str | None, given: Op | None, where: str) -> Op | None:
    if found is None:
        return given
    try:
        op = Op(found.strip().lower())
    except ValueError:
        raise CommsError(
            f"unknown operation {found!r}", where, f"known are {', '.join(sorted(Op))}"
        ) from None
    if given not in (None, op):
        raise CommsError(f"the table is of {op}, not of {given}", where, "leave the operation out")
    return op


def _nccl_row(cells: list[str], columns: list[str] | None, where: str) -> _MeasuredRow:
    broken = CommsError(
        "the row is cut short or has other text in it",
        where,
        "let NCCL write its messages to a file (NCCL_DEBUG_FILE) and measure again",
    )
    if columns is None:  # bare rows: 13, 12 or 11 columns by version, the two times always at the same place
        if not 11 <= len(cells) <= 13:
            raise broken
        at = len(cells) - 4
    else:
        starts = [i for i, name in enumerate(columns) if name in ("time", "cputime")]
        if len(starts) != 2:
            raise CommsError(
                "the header needs two time columns", where, "give the header as nccl-tests prints it"
            )
        # The second half is of results written over the input; a replay of traces prints that half only.
        at = starts[0] if len(cells) == starts[0] + 4 else starts[1]
    if len(cells) < at + 4:
        raise broken
    try:
        microseconds, bus = Decimal(cells[at]), Decimal(cells[at + 2])
        wrong = (
            0.0
            if cells[at + 3] == "N/A" or (columns is not None and "error" in columns)
            else float(cells[at + 3])
        )
    except (InvalidOperation, ValueError):
        raise broken from None
    if wrong:
        raise CommsError(f"{wrong:g} results were wrong", where, "a run with wrong results measures nothing")
    point = _point(float(cells[0]), float(microseconds) * 1e-6, _rounding(microseconds), where)
    return _MeasuredRow(point, float(bus) * 1e9, _rounding(bus))


def _check_bus_bandwidth(row: _MeasuredRow, op: Op | None, num_chips: int, where: str) -> None:
    expected = row.point.nbytes / row.point.seconds * bus_factor(op, num_chips)
    slack = (_TOLERANCE + row.point.rounding) * expected + row.bus_rounding * row.bus_bytes_per_s
    if row.bus_bytes_per_s and abs(row.bus_bytes_per_s - expected) > slack:
        raise CommsError(
            f"a bus bandwidth of {row.bus_bytes_per_s / 1e9:.4g} GB/s does not follow from {row.point.nbytes:.0f} "
            f"bytes in {row.point.seconds * 1e6:.4g} us, which is {expected / 1e9:.4g} GB/s in "
            f"{op or 'sendrecv'} over {num_chips} chips",
            where,
            "say the operation and the number of chips that were measured",
        )


_NAMES = {
    "size": "size", "bytes": "size", "nbytes": "size", "message": "size", "time": "time", "latency": "time",
    "duration": "time", "seconds": "time", "us": "time", "ms": "time", "algbw": "algbw", "bandwidth": "algbw",
    "busbw": "busbw",
}  # fmt: skip
_QUANTITIES = {
    "size": Quantity.SIZE,
    "time": Quantity.TIME,
    "algbw": Quantity.DATA_RATE,
    "busbw": Quantity.DATA_RATE,
}
_UNITS = {
    "bytes": "B", "nbytes": "B", "size": "B", "message": "B", "seconds": "s", "us": "us", "ms": "ms",
}  # fmt: skip
_SPELLINGS = {"bytes": "B", "bytes/s": "B/s", "seconds": "s", "sec": "s", "usec": "us", "msec": "ms"}


def _heading(text: str) -> tuple[str, str]:
    """A column's name and unit: `busbw (GB/s)`, `busbw_GB_s` and `busbw_bytes_per_s` say the same."""
    words = [word for word in re.split(r"[\s_()\[\]]+", text.strip()) if word]
    if not words:
        return "", ""
    first = words[0].lower()
    if first not in _NAMES:
        return text.strip().lower(), ""
    unit = "/".join(word for word in words[1:] if word not in ("per", "size")) or _UNITS.get(first, "")
    unit = _SPELLINGS.get(unit, unit)
    return _NAMES[first], re.sub(r"^([kMGTP]?i?[Bb])ps$", r"\1/s", unit)


def _measure_columns(header: Sequence[tuple[str, str]], where: str) -> tuple[int, int]:
    names = [name for name, _ in header]
    measure = next((name for name in ("time", "algbw", "busbw") if name in names), None)
    if "size" not in names or measure is None:
        raise CommsError(
            f"the header needs a size and a time or bandwidth, got {', '.join(names)}",
            where,
            "name them like size and time_us, or bytes and busbw_GB_s",
        )
    return names.index("size"), names.index(measure)


def _full_row(cells: list[str], wanted: int, where: str) -> list[str]:
    if len(cells) != wanted:
        raise CommsError(
            f"{len(cells)} cells, the header has {wanted}", where, "give one cell for every column"
        )
    return [cell.strip() for cell in cells]


def _constant(
    names: Sequence[str], rows: Sequence[tuple[str, list[str]]], wanted: tuple[str, ...]
) -> str | None:
    column = next((i for i, name in enumerate(names) if name in wanted), None)
    if column is None:
        return None
    for where, row in rows:
        if row[column] != rows[0][1][column]:
            raise CommsError(f"{names[column]} changes from row to row", where, "give one table for each")
    return rows[0][1][column]


def _csv_point(
    size: str, size_heading: tuple[str, str], value: str, heading: tuple[str, str], factor: float, where: str
) -> MeasuredPoint:
    name, unit = heading
    nbytes, _ = _quantity(size, size_heading[1], Quantity.SIZE, where)
    found, rounding = _quantity(value, unit, _QUANTITIES[name], where)
    if name == "time":
        return _point(nbytes, found, rounding, where)
    scale = factor if name == "busbw" else 1.0
    return _point(nbytes, nbytes * scale / found if found else 0.0, rounding, where)


def _quantity(cell: str, unit: str, quantity: Quantity, where: str) -> tuple[float, float]:
    """A cell in base units, and how far its last digit leaves it open; a unit in the cell comes first."""
    digits = re.match(r"[-+0-9.eE]*", cell)
    assert digits is not None
    try:
        number = Decimal(digits.group().rstrip("eE"))
        text = cell if cell[digits.end() :].strip() else f"{number} {unit}"
    except InvalidOperation:
        raise CommsError(f"{cell!r} is not a number", where, "give a number") from None
    with located(where):
        return parse(text, quantity), _rounding(number)


def _rounding(number: Decimal) -> float:
    exponent = number.as_tuple().exponent
    if not number or not isinstance(exponent, int):
        return 0.0
    return float(Decimal(5).scaleb(exponent - 1) / abs(number))


def _point(nbytes: float, seconds: float, rounding: float, where: str) -> MeasuredPoint:
    with located(where):
        return MeasuredPoint(nbytes, seconds, rounding)


def _curve(op: Op | None, num_chips: int, points: Sequence[MeasuredPoint], where: str) -> MeasuredCurve:
    ordered = tuple(sorted(points, key=lambda point: point.nbytes))
    for one, other in pairwise(ordered):
        if one.nbytes == other.nbytes:
            problem = f"the size of {one.nbytes:.0f} bytes appears twice"
            raise CommsError(problem, where, "give one run at a time")
    return MeasuredCurve(op, num_chips, ordered)
