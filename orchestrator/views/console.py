"""Console: the only printer. Talk goes to stderr, results to stdout, and nothing else prints.

On a terminal: spinners for phases that last, a live panel for training. Elsewhere: plain lines, the same
words. With `as_json` stdout carries exactly one JSON document. rich and units are imported when first needed,
so that a help text costs nothing; rich honours NO_COLOR by itself. What is said is also kept in the
run's log file once `log_to` names it.

Results that cannot be written are an error, whose end is the command's; talk that cannot be is left unsaid. What a
stream's encoding lacks is written as ASCII.
"""

import json
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TextIO

from comms.errors import RunError, UserError

if TYPE_CHECKING:
    from rich.console import Console as RichConsole
    from rich.status import Status

    from orchestrator.views.training_view import StepLine

PATIENCE_S = 2.0  # a phase shorter than this is nobody's business
MIN_WIDTH = 20  # of a terminal in which lines are broken between words
PIPE_WIDTH = 1000  # a table in a pipe is as wide as its content
RULE = "\N{BOX DRAWINGS LIGHT HORIZONTAL}"  # what tables are ruled with


class Table(NamedTuple):
    """A result to read: a title, column heads (none for name-value pairs) and rows of finished texts."""

    title: str
    rows: Sequence[tuple[str, ...]]
    heads: tuple[str, ...] = ()


@dataclass(slots=True, eq=False, repr=False)
class Phase:
    """One phase of start-up; `depth` counts the phases around it."""

    name: str
    depth: int
    seconds: float | None = None  # once it ended


class Console:
    """Where everything that a person or a pipe reads goes through."""

    def __init__(
        self,
        *,
        as_json: bool = False,
        verbose: bool = False,
        out: TextIO | None = None,
        err: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.as_json, self.verbose = as_json, verbose
        self._out = sys.stdout if out is None else out
        self._err = err or sys.stderr or StringIO()  # either stream may be closed
        self._clock = clock
        self._log: Path | None = None
        self._notes: dict[str, object] = {}
        self._document: dict[str, object] | None = None  # that waits
        self._holds = False
        self._rich_err: RichConsole | None = None
        self._open: list[str] = []
        self._phases: list[Phase] = []
        # Started by a timer's thread, moved and stopped by the one that works.
        self._spinner: Status | None = None
        self._spinning = threading.Lock()

    @property
    def is_live(self) -> bool:
        """True where stderr is a terminal: displays move instead of scrolling."""
        return self._err.isatty()

    def log_to(self, path: Path) -> None:
        """From now on keep what is said in this file as well."""
        self._log = path

    def say(self, text: str) -> None:
        """A line for the person who waits."""
        self._keep(text)
        self._print(text)

    def detail(self, text: str) -> None:
        """A line that only -v shows; the log always has it."""
        self._keep(text)
        if self.verbose:
            self._print(text)

    def warn(self, text: str) -> None:
        """Something to know that does not stop the work."""
        self.say(f"warning: {text}")

    def error(self, error: UserError) -> None:
        """What, where and what to do, one line each, for the error and those it leads."""
        for finding in error.findings:
            self.say(f"error: {finding.text}")
        self.note_error(error)

    def note_error(self, error: UserError) -> None:
        """Have an error in the document: `error` is the first that it leads, `errors` are all where there are more."""
        found = [
            {part: getattr(each, part) for part in ("problem", "where", "hint")} for each in error.findings
        ]
        self._document = {**(self._document or {}), "error": found[0]}
        if len(found) > 1:
            self._document["errors"] = found

    def hold(self) -> None:
        """From now on the document waits for `close`, so that an error that comes after the answer is in it."""
        self._holds = True

    def close(self) -> None:
        """Write the document that waits, if there is one. Raises RunError if it is not taken."""
        document, self._document = self._document, None
        if self.as_json and document is not None:
            self._answer(json.dumps(_strict(document), indent=2, allow_nan=False) + "\n")

    def note(self, facts: Mapping[str, object]) -> None:
        """What the answer's document is to have as well."""
        self._notes |= facts

    def stream(self, text: str) -> None:
        """A part of an answer that comes bit by bit, as it is."""
        if self._out is not None:
            self._out.write(_as_taken(text, self._out))
            self._out.flush()

    def results(
        self, document: Mapping[str, object], tables: Sequence[Table] = (), *, text: str = ""
    ) -> None:
        """The answer: `document` as JSON with `as_json`, otherwise the tables, or a text as it is.

        Raises RunError if it is not taken.

        A reader that has gone is no error: BrokenPipeError ends a command quietly.
        """
        if not self.as_json:
            self._answer(text, tables)
            return
        self._document = self.whole(document)
        if not self._holds:
            self.close()

    def whole(self, document: Mapping[str, object]) -> dict[str, object]:
        """An answer with what was noted on the way to it, as JSON shows it."""
        return {**document, **self._notes}

    def _answer(self, text: str, tables: Sequence[Table] = ()) -> None:
        hint = "give it a file with room, or a pipe"
        if self._out is None:
            raise RunError("the answer cannot be written: it is closed", "stdout", hint)
        try:
            if text:
                self._out.write(_as_taken(text, self._out))
            else:
                self._draw(tables, self._out)
            self._out.flush()
        except BrokenPipeError:
            raise
        except OSError as error:
            give_up(self._out)
            raise RunError(f"the answer cannot be written: {error.strerror}", "stdout", hint) from error

    def show(self, tables: Sequence[Table]) -> None:
        """Tables that are talk, not results: on stderr."""
        with suppress(OSError):
            self._draw(tables, self._err)
        for table in tables:
            self._keep("\n".join((table.title, *("  ".join(row) for row in table.rows))))

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time a phase. If it lasts, say so while it runs and how long it took; phases may nest."""
        phase = Phase(name, len(self._open))
        self._phases.append(phase)
        self._open.append(name)
        started = self._clock()
        ended = threading.Event()
        path = " > ".join(self._open)
        timer = threading.Timer(PATIENCE_S, lambda: self._spin(path, ended))
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            ended.set()
            timer.cancel()
            seconds = self._clock() - started
            self._open.pop()
            self._move_spinner(" > ".join(self._open))
            phase.seconds = seconds
            if seconds >= PATIENCE_S:
                from comms.units import format_seconds

                self.say(f"{'  ' * len(self._open)}{name}: {format_seconds(seconds)}")

    def phase_table(self) -> Table:
        """Where the start-up time went; shares are of the outermost phases."""
        from comms.units import format_percent, format_seconds

        ended = [(phase, phase.seconds) for phase in self._phases if phase.seconds is not None]
        total = sum(seconds for phase, seconds in ended if phase.depth == 0) or 1.0
        rows = [
            ("  " * phase.depth + phase.name, format_seconds(seconds), format_percent(seconds / total))
            for phase, seconds in ended
        ]
        rows.append(("total", format_seconds(total), ""))
        return Table("start-up", rows, ("phase", "time", "share"))

    @contextmanager
    def training(
        self, title: str, num_steps: int, *, every: int = 1
    ) -> Iterator["Callable[[StepLine], None]"]:
        """A display of steps: call what this yields once a step.

        Off a terminal every `every`-th is a line.
        """
        if not self.is_live:
            yield lambda line: self._step(line, num_steps, every)
            return
        from rich.live import Live

        from orchestrator.views.training_view import TrainingView, plain_line

        self._move_spinner("")
        view = TrainingView(title, num_steps)
        with Live(view, console=self._rich_stderr(), refresh_per_second=8) as live:

            def update(line: "StepLine") -> None:
                view.add(line)
                self._keep(plain_line(line, num_steps))
                live.update(view)

            yield update

    def _step(self, line: "StepLine", num_steps: int, every: int) -> None:
        from orchestrator.views.training_view import plain_line

        shown = line.step % every == 0 or line.step in (1, num_steps) or line.validation_loss is not None
        (self.say if shown else self._keep)(plain_line(line, num_steps))

    def _spin(self, path: str, ended: threading.Event) -> None:
        """Show this phase, unless it ended while the timer fired."""
        with self._spinning:
            if ended.is_set():
                return
            if not self.is_live:
                self._print(f"{path} ...")
            elif self._spinner is not None:
                self._spinner.update(path)
            else:
                self._spinner = self._rich_stderr().status(path)
                self._spinner.start()

    def _move_spinner(self, path: str) -> None:
        """Name what goes on now, or stop where nothing does."""
        with self._spinning:
            if self._spinner is None:
                return
            if path:
                self._spinner.update(path)
            else:
                self._spinner.stop()
                self._spinner = None

    def _keep(self, text: str) -> None:
        if self._log is None:
            return
        try:
            with self._log.open("a", encoding="utf-8") as file:
                file.write(text + "\n")
        except OSError as error:  # a log that cannot be written must not hide what was to be said
            self._log = None
            self._print(f"warning: the log ends here: {error}")

    def _print(self, text: str) -> None:
        with suppress(OSError):
            if self.is_live:
                text = _wrapped(text, _width(self._err))
            if self._rich_err is not None:  # a live display may be up: only rich can print above it
                self._rich_err.print(text, markup=False, highlight=False, soft_wrap=True)
            else:
                self._err.write(_as_taken(text + "\n", self._err))
                self._err.flush()

    def _rich_stderr(self) -> "RichConsole":
        if self._rich_err is None:
            from rich.console import Console as RichConsole

            self._rich_err = RichConsole(file=self._err)
        return self._rich_err

    def _draw(self, tables: Sequence[Table], file: TextIO) -> None:
        from rich.console import Console as RichConsole

        from orchestrator.views.table_drawing import draw_table

        if file.isatty() and _as_taken(RULE, file) == RULE:
            for table in tables:
                draw_table(RichConsole(file=file), *table)
            return
        plain = StringIO()  # rich fills lines with blanks, which a pipe has no use for
        for table in tables:
            draw_table(RichConsole(file=plain, width=PIPE_WIDTH), *table)
        lines = (f"{line.rstrip()}\n" for line in plain.getvalue().splitlines())
        file.write(_as_taken("".join(lines), file))


def give_up(stream: TextIO) -> None:
    """Let what a stream still holds go nowhere, so that the interpreter does not try once more as it ends."""
    with suppress(OSError), Path(os.devnull).open("w") as nowhere:
        os.dup2(nowhere.fileno(), stream.fileno())


def _width(terminal: TextIO) -> int:
    """In characters, by the same sources as rich has it from; 0 where nobody knows."""
    if (said := os.environ.get("COLUMNS", "")).isdecimal():
        return int(said)
    with suppress(OSError):
        return os.get_terminal_size(terminal.fileno()).columns
    return 0


def _wrapped(text: str, width: int) -> str:
    """Lines as wide as the terminal, broken between words; what continues a line is indented."""
    lines = text.split("\n")
    if width < MIN_WIDTH or max(map(len, lines)) <= width:
        return text
    import textwrap

    found = []
    for line in lines:
        indent = " " * (len(line) - len(line.lstrip()) + 2)
        found += textwrap.wrap(
            line, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
        ) or [""]
    return "\n".join(found)


def _as_taken(text: str, stream: TextIO) -> str:
    """The text with what the stream's encoding has."""
    encoding = stream.encoding or "utf-8"
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        return text.replace(RULE, "-").encode(encoding, "backslashreplace").decode(encoding)
    return text


def _strict(value: object) -> object:
    """JSON has no NaN and no tuple keys; a number that does not exist is null."""
    match value:
        case float() if not math.isfinite(value):
            return None
        case Mapping():
            return {str(name): _strict(part) for name, part in value.items()}
        case str() | int() | float() | None:
            return value
        case Sequence():
            return [_strict(part) for part in value]
        case _:
            return str(value)
