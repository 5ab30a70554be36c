"""Schedules as text: a collective of one's own, written down line by line. What is read is proved.

    # Two ranks add what they have.
    op all_reduce
    ranks 2
    chunks 2
    channel pieces 4 order interleaved
    phase
    round 0: 0 -> 1 chunk 0 reduce
    round 0: 1 -> 0 chunk 1 reduce
    round 1: 0 -> 1 chunk 1
    round 1: 1 -> 0 chunk 0

`op`, `ranks` and `chunks` come first (`collectives.schedule` says what the chunks of each operation are), then where
needed `algorithm NAME`, `root RANK`, `helpers COUNT` and `shares` (bytes of a chunk over those of the collective:
one number, or one for each). A `channel` goes on independently of others; `pieces`, `order serial` (or
`interleaved`), `by_chunk`, `at_once` and `apart` may follow. A `phase` opens a group of rounds that use the same links.
Both may be left out where there is one. Rounds count from 0 in each channel. A message carries one chunk or a
range, which may wrap around (`chunk 3-0`), and replaces them at the receiver, or is added to them (`reduce`).
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from comms.collectives.proof import prove
from comms.collectives.schedule import Channel, Op, Pattern, PieceOrder, Round, Schedule
from comms.errors import CommsError
from comms.networks.topology import FloatArray
from comms.text_files import read_text

MESSAGE = re.compile(
    r"(\d{1,9})\s*->\s*(\d{1,9})\s+chunks?\s+(\d{1,9})(?:\s*-\s*(\d{1,9}))?(?:\s+(reduce|copy))?"
)
FLAGS = ("by_chunk", "at_once", "apart")
# What is written down message by message: a ring of 1,024 ranks, an all-to-all of 2,048.
MOST_NBYTES, MOST_RANKS, MOST_MOVED = 64_000_000, 2**12, 2**22
ROUND = re.compile(r"round\s+(\d{1,9})\s*:\s*(.*)")


@dataclass(slots=True)
class _Lines:
    """A round while it is read."""

    messages: list[tuple[int, int, int, int]] = field(default_factory=list)  # src, dst, first, count
    reduces: bool = False


@dataclass(slots=True)
class _ChannelLines:
    """A channel while it is read."""

    pieces: int = 1
    order: PieceOrder = PieceOrder.SERIAL
    by_chunk: bool = False
    at_once: bool = False
    apart: bool = False
    phases: list[list[_Lines]] = field(default_factory=list)

    @property
    def num_rounds(self) -> int:
        return sum(len(phase) for phase in self.phases)


@dataclass(slots=True)
class _Text:
    """A schedule while it is read."""

    op: Op | None = None
    algorithm: str = "user-defined"
    numbers: dict[str, int] = field(default_factory=dict)
    shares: list[float] = field(default_factory=list)
    channels: list[_ChannelLines] = field(default_factory=list)


def load_schedule(path: Path) -> Schedule:
    """The schedule in a file, proved. Raises ConfigError for a file that is none, CommsError for what it says."""
    return parse_schedule(read_text(path, "give a text file with a schedule", MOST_NBYTES), path.name)


def parse_schedule(text: str, name: str = "schedule") -> Schedule:
    """The schedule that a text says, proved. `name` is what errors call it."""
    read = _Text()
    for number, line in enumerate(text.splitlines(), start=1):
        statement = line.split("#")[0].strip()
        if statement:
            _read(read, statement, f"{name} line {number}")
    schedule = _schedule(read, name)
    try:
        prove(schedule)
    except CommsError as error:
        raise CommsError(error.problem, name, error.hint) from error
    return schedule


def schedule_text(schedule: Schedule) -> str:
    """The text of a schedule; `parse_schedule` makes the same schedule of it."""
    return "\n".join(_statements(schedule)) + "\n"


def _statements(schedule: Schedule) -> Iterator[str]:
    yield f"op {schedule.op}"
    yield f"algorithm {schedule.algorithm}"
    yield f"ranks {schedule.num_ranks}"
    yield f"chunks {schedule.num_chunks}"
    if schedule.root:
        yield f"root {schedule.root}"
    if schedule.num_helpers:
        yield f"helpers {schedule.num_helpers}"
    shares = [schedule.shares] if isinstance(schedule.shares, float) else schedule.shares.tolist()
    if shares != [_usual_share(schedule.op, schedule.num_ranks, schedule.num_chunks)]:
        yield " ".join(["shares", *(repr(share) for share in shares)])
    for channel in schedule.channels:
        flags = "".join(f" {flag}" for flag in FLAGS if getattr(channel, flag))
        yield f"channel pieces {channel.pieces} order {channel.order}{flags}"
        number = 0
        for phase in channel.phases:
            yield "phase"
            for each in phase:
                yield from _messages(each, number, schedule.num_chunks)
                number += 1


def _messages(each: Round, number: int, num_chunks: int) -> Iterator[str]:
    adds = " reduce" if each.reduces else ""
    if not len(each.pattern.src):
        yield f"round {number}:"
    columns = (each.pattern.src, each.pattern.dst, each.first, each.count)
    for src, dst, first, count in zip(*(column.tolist() for column in columns), strict=True):
        chunks = f"{first}" if count == 1 else f"{first}-{(first + count - 1) % num_chunks}"
        yield f"round {number}: {src} -> {dst} chunk {chunks}{adds}"


def _usual_share(op: Op, num_ranks: int, num_chunks: int) -> float:
    """A chunk's share of the bytes where all are alike."""
    match op:
        case Op.BARRIER:
            return 0.0
        case Op.ALL_TO_ALL:
            return num_ranks / num_chunks
        case _:
            return 1.0 / num_chunks


def _read(read: _Text, statement: str, where: str) -> None:
    word, _, rest = statement.partition(" ")
    statements: dict[str, Callable[[_Text, str, str], None]] = {
        "op": _read_op,
        "algorithm": _read_algorithm,
        "shares": _read_shares,
        "channel": _read_channel,
        "phase": _read_phase,
    }
    if word in statements:
        statements[word](read, rest.strip(), where)
    elif word in ("ranks", "chunks", "root", "helpers"):
        if word in read.numbers:
            raise CommsError(f"says {word} twice", where, "say it once")
        read.numbers[word] = _count(rest, word, where)
    elif word == "round":
        _read_round(read, statement, where)
    else:
        known = ", ".join((*statements, "ranks", "chunks", "root", "helpers", "round"))
        raise CommsError(f"starts with {word!r}", where, f"a line starts with one of {known}")


def _count(text: str, word: str, where: str) -> int:
    if not re.fullmatch(r"\d{1,9}", text.strip()):
        raise CommsError(f"{word} is {text.strip()!r}", where, f"write {word} and one whole number")
    return int(text)


def _read_op(read: _Text, rest: str, where: str) -> None:
    if rest not in list(Op):
        raise CommsError(f"there is no operation {rest!r}", where, f"one of {', '.join(Op)}")
    read.op = Op(rest)


def _read_algorithm(read: _Text, rest: str, where: str) -> None:
    if not rest:
        raise CommsError("has no name", where, "write algorithm and a name")
    read.algorithm = rest


def _read_shares(read: _Text, rest: str, where: str) -> None:
    try:
        read.shares = [float(share) for share in rest.split()]
    except ValueError as error:
        raise CommsError(f"shares are {rest!r}", where, "write numbers, such as 0.25") from error


def _read_channel(read: _Text, rest: str, where: str) -> None:
    channel, words = _ChannelLines(), rest.split()
    while words:
        match words:
            case ["pieces", number, *left]:
                channel.pieces = _count(number, "pieces", where)
            case ["order", order, *left] if order in list(PieceOrder):
                channel.order = PieceOrder(order)
            case [flag, *left] if flag in FLAGS:
                setattr(channel, flag, True)
            case _:
                hint = f"pieces and a number, order serial or interleaved, {', '.join(FLAGS)}"
                raise CommsError(f"says {' '.join(words)!r} of a channel", where, hint)
        words = left
    read.channels.append(channel)


def _read_phase(read: _Text, rest: str, where: str) -> None:
    if rest:
        raise CommsError(f"says {rest!r} of a phase", where, "write phase on a line of its own")
    if not read.channels:
        read.channels.append(_ChannelLines())
    read.channels[-1].phases.append([])


def _read_round(read: _Text, statement: str, where: str) -> None:
    matched = ROUND.fullmatch(statement)
    if not matched:
        raise CommsError(f"says {statement!r}", where, "write round 0: 0 -> 1 chunk 0 reduce")
    if not read.channels or not read.channels[-1].phases:
        _read_phase(read, "", where)
    channel = read.channels[-1]
    number, expected = int(matched[1]), channel.num_rounds
    if number == expected:
        channel.phases[-1].append(_Lines())
    elif number != expected - 1 or not channel.phases[-1]:
        raise CommsError(f"round {number} where round {expected} comes next", where, "count rounds from 0 on")
    if matched[2]:
        _read_message(read, channel.phases[-1][-1], matched[2], where)


def _read_message(read: _Text, lines: _Lines, text: str, where: str) -> None:
    matched = MESSAGE.fullmatch(text)
    if not matched:
        raise CommsError(f"says {text!r}", where, "write 0 -> 1 chunk 0-3 and, to add them, reduce")
    src, dst = int(matched[1]), int(matched[2])
    nodes = read.numbers.get("ranks", 0) + read.numbers.get("helpers", 0)
    if src >= nodes or dst >= nodes:
        hint = f"ranks are 0 .. {nodes - 1}" if nodes else "write ranks and their number before the rounds"
        raise CommsError(f"there is no rank {max(src, dst)}", where, hint)
    if src == dst:
        raise CommsError(f"rank {src} sends to itself", where, "leave that message out")
    chunks = read.numbers.get("chunks", 0)
    first = int(matched[3])
    last = first if matched[4] is None else int(matched[4])
    if not (first < chunks and last < chunks):
        hint = (
            f"chunks are 0 .. {chunks - 1}" if chunks else "write chunks and their number before the rounds"
        )
        raise CommsError(f"there is no chunk {max(first, last)}", where, hint)
    reduces = matched[5] == "reduce"
    if lines.messages and lines.reduces != reduces:
        raise CommsError("a round both adds and replaces", where, "put those messages into two rounds")
    lines.reduces = reduces
    lines.messages.append((src, dst, first, (last - first) % chunks + 1))


def _schedule(read: _Text, name: str) -> Schedule:
    missing = [word for word in ("ranks", "chunks") if word not in read.numbers]
    if read.op is None or missing:
        problem = f"does not say {'op' if read.op is None else missing[0]}"
        raise CommsError(problem, name, "start with op, ranks and chunks")
    ranks, chunks = read.numbers["ranks"], read.numbers["chunks"]
    if not ranks or not chunks:
        raise CommsError("has no ranks or no chunks", name, "there must be at least one of each")
    _hold_to_limits(read, name)
    patterns: dict[tuple[bytes, bytes], Pattern] = {}
    shares: float | FloatArray
    if len(read.shares) > 1:
        shares = np.array(read.shares)
    else:
        shares = read.shares[0] if read.shares else _usual_share(read.op, ranks, chunks)
    return Schedule(
        op=read.op,
        algorithm=read.algorithm,
        num_ranks=ranks,
        num_chunks=chunks,
        shares=shares,
        channels=tuple(_channel(channel, patterns) for channel in read.channels),
        root=read.numbers.get("root", 0),
        num_helpers=read.numbers.get("helpers", 0),
    )


def _hold_to_limits(read: _Text, name: str) -> None:
    """A proof keeps what each rank has of each other's, and every chunk of every message."""
    nodes, chunks = read.numbers["ranks"] + read.numbers.get("helpers", 0), read.numbers["chunks"]
    moved = sum(
        count
        for channel in read.channels
        for phase in channel.phases
        for each in phase
        for *_, count in each.messages
    )
    for number, most, what in (
        (nodes, MOST_RANKS, "ranks"), (chunks, MOST_MOVED, "chunks"), (moved, MOST_MOVED, "chunks in messages")
    ):  # fmt: skip
        if number > most:
            raise CommsError(f"has {number} {what}", name, f"give up to {most}")


def _channel(lines: _ChannelLines, patterns: dict[tuple[bytes, bytes], Pattern]) -> Channel:
    phases = []
    for phase in lines.phases:
        if lines.apart:
            patterns = {}  # each phase has its own
        phases.append(tuple(_round(each, patterns) for each in phase))
    return Channel(tuple(phases), lines.pieces, lines.order, lines.by_chunk, lines.at_once, lines.apart)


def _round(lines: _Lines, patterns: dict[tuple[bytes, bytes], Pattern]) -> Round:
    """Rounds between the same ranks share one pattern, which makes them cheap to time."""
    table = np.array(lines.messages, dtype=np.int64).reshape(-1, 4)
    src, dst, first, count = (np.ascontiguousarray(column) for column in table.T)
    pattern = patterns.setdefault((src.tobytes(), dst.tobytes()), Pattern(src, dst))
    return Round(pattern, first, count, lines.reduces)
