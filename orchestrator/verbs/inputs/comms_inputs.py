"""Comms inputs: from what the command line says of a collective to values, with errors that name the flag."""

import csv
from collections.abc import Mapping
from io import StringIO
from pathlib import Path

import numpy as np

from comms.algorithms.catalog import names
from comms.collectives.schedule import Op, Schedule
from comms.collectives.schedule_text import load_schedule
from comms.errors import CommsError, ConfigError, located
from comms.networks.topology import FloatArray
from comms.selection.choice import AUTO
from comms.selection.size_sweep import sizes_between
from comms.synthesis.synthesis import NAME as SYNTHESIZED
from comms.text_files import read_text
from comms.units import Quantity, parse
from orchestrator.config.schema import nearest
from orchestrator.runs.disk import write_whole
from orchestrator.views.console import Console

UNEVEN = "all_to_allv"  # an all-to-all with parts of all sizes
MOST_NBYTES = 2**60  # of one collective
# Of a table of parts: for empty lines, and for each part (a size with blanks around it).
MOST_NBYTES_OF_LINES, MOST_NBYTES_OF_PART = 100_000, 64
OTHERWISE = "change what is asked for"  # where whoever found the mistake knows nothing better
FLAGS = {"algorithm": "--algorithm", "size": "--size"}  # what the network calls it, and what people type


def read_op(text: str | None) -> Op:
    """The operation that --op names; all-reduce by default."""
    if text is None:
        return Op.ALL_REDUCE
    known = (*map(str, Op), UNEVEN)
    word = text.lower().replace("-", "_")
    if word not in known:
        raise ConfigError(f"there is no operation {text!r}", "--op", nearest(text, known))
    return Op.ALL_TO_ALL if word == UNEVEN else Op(word)


def is_uneven(text: str | None) -> bool:
    """Whether --op names the all-to-all of a table."""
    return text is not None and text.lower().replace("-", "_") == UNEVEN


def read_size(text: str, flag: str) -> float:
    """A whole number of bytes, with its unit."""
    with located(flag):
        nbytes = parse(text, Quantity.SIZE)
    if nbytes != int(nbytes):
        raise ConfigError(f"{text} is {nbytes:g} bytes", flag, "give a whole number of bytes")
    if nbytes > MOST_NBYTES:
        raise ConfigError(f"{text} is more than any chip holds", flag, "give at most 1 EiB, such as 64 MiB")
    return nbytes


def read_parts(text: str | None, num_chips: int) -> FloatArray:
    """[chips, chips] Bytes from chip to chip, from a CSV file with a row per sender: numbers, or sizes with units."""
    if text is None or not Path(text).is_file():
        problem = f"{UNEVEN} needs a table of bytes" if text is None else f"there is no file {text}"
        hint = "give a CSV file: a row per sending chip, a column per receiving one"
        raise ConfigError(problem, "--size", hint)
    rows = _rows(Path(text), num_chips)
    if not rows:
        raise ConfigError("the table is empty", text, f"give {num_chips} rows of {num_chips} sizes")
    if len(rows) != num_chips or any(len(row) != num_chips for row in rows):
        found = f"{len(rows)} rows of {', '.join(map(str, sorted({len(row) for row in rows})))} columns"
        problem = f"{found} for {num_chips} chips"
        raise ConfigError(problem, text, "give a row and a column per chip, or --chips")
    parts = np.array(
        [[_part(cell.strip(), f"{text}, row {row + 1}") for cell in cells] for row, cells in enumerate(rows)]
    )
    if num_chips > 1 and not (parts - np.diag(np.diag(parts))).any():
        problem = "no chip sends another one anything"
        raise ConfigError(problem, text, "give sizes above zero off the diagonal")
    return parts


def _rows(path: Path, num_chips: int) -> list[list[str]]:
    """The cells of a CSV file, empty lines left out."""
    hint = "give a plain text CSV file"
    text = read_text(path, hint, MOST_NBYTES_OF_LINES + MOST_NBYTES_OF_PART * num_chips**2)
    try:
        return [row for row in csv.reader(StringIO(text, newline="")) if row]
    except csv.Error as error:
        raise ConfigError(f"not CSV: {error}", str(path), hint) from error


def _part(cell: str, where: str) -> float:
    digits = cell.replace(".", "", 1)  # other scripts have digits too
    return read_size(f"{cell} B" if digits.isascii() and digits.isdecimal() else cell, where)


def read_sizes(text: str) -> tuple[float, ...]:
    """The sizes of `--sweep 1KiB..1GiB`."""
    low, dots, high = text.partition("..")
    if not dots:
        raise ConfigError(f"{text!r} is not a range", "--sweep", "write it like 1KiB..1GiB")
    ends = read_size(low, "--sweep"), read_size(high, "--sweep")
    try:
        return sizes_between(*ends)
    except CommsError as error:
        raise ConfigError(f"there are no sizes in {text}", "--sweep", error.hint) from error


def read_algorithm(text: str | None, op: str | None) -> str | Schedule:
    """A name, or the schedule in a file: proved, and of the operation that is asked for."""
    if text is None:
        return AUTO
    if not Path(text).is_file():
        if "/" in text or Path(text).suffix:
            problem = f"there is no file {text}"
            raise ConfigError(problem, "--algorithm", "check the path, or give the name of an algorithm")
        known = (AUTO, SYNTHESIZED, *names(read_op(op)))
        if text not in known:
            hint = nearest(text, known)
            if not hint.startswith("did you mean"):  # names may have commas in them
                hint = f"one of {'; '.join(known)}; or a file with a schedule"
            raise ConfigError(f"{read_op(op)} has no algorithm {text!r}", "--algorithm", hint)
        return text
    with located("--algorithm", OTHERWISE):
        schedule = load_schedule(Path(text))
    if op is not None and read_op(op) is not schedule.op:
        problem = f"a schedule for {schedule.op}, but --op is {read_op(op)}"
        raise ConfigError(problem, text, "leave --op out")
    if schedule.num_helpers:
        problem = f"{schedule.num_helpers} of its ranks are switches, which have no place here"
        raise ConfigError(problem, text, "leave helpers out; --algorithm in-network uses the switches")
    return schedule


def check_picture(path: Path | None) -> None:
    """Before anything takes time: can a picture be written there?"""
    if path is None:
        return
    if path.suffix.lower() != ".png":
        raise ConfigError("pictures are PNG files", f"--plot {path}", "give a name that ends in .png")
    if path.is_dir() or not path.parent.is_dir():
        problem = "a picture cannot be written there"
        raise ConfigError(problem, f"--plot {path}", "give a file in a folder that exists")


def write_picture(png: bytes, path: Path, console: Console) -> None:
    """The picture, whole or not at all."""
    write_whole(path, png)
    console.say(f"picture in {path}")


def say_ignored(console: Console, given: Mapping[str, object], why: str) -> None:
    """Say which of these flags have no effect."""
    for flag, value in given.items():
        if value is not None:
            console.warn(f"{flag} has no effect: {why}")
