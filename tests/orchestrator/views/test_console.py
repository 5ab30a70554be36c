"""Console: talk on stderr, results on stdout, plain off a terminal, alive on one, rich only when drawn."""

import errno
import io
import json
import math
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from comms.errors import PlanError, RunError, combined
from comms.units import format_dollars, format_duration, format_percent, format_scaled, format_seconds
from orchestrator.views.console import Console, Table
from orchestrator.views.training_view import CURVE_WIDTH, LossCurve, StepLine, fields, plain_line

LINE = StepLine(
    step=10, loss=2.34567, grad_norm=0.91, step_seconds=0.812, rate=10_123.0, eta_seconds=185.0, validation_loss=2.5,
    predicted_seconds=0.004269,
)  # fmt: skip


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class AtOnce:
    """A timer whose time has come."""

    daemon = False

    def __init__(self, seconds: float, call: Callable[[], None]) -> None:
        self.call = call

    def start(self) -> None:
        self.call()

    def cancel(self) -> None:
        pass


def clock(*ticks: float) -> Callable[[], float]:
    times: Iterator[float] = iter(ticks)
    return lambda: next(times)


@pytest.fixture
def streams() -> tuple[io.StringIO, io.StringIO]:
    return io.StringIO(), io.StringIO()


def test_an_error_is_three_short_lines_on_stderr(streams: tuple[io.StringIO, io.StringIO]) -> None:
    out, err = streams
    Console(out=out, err=err).error(PlanError(problem="dp x tp is 6", where="plan.yaml:3", hint="make it 8"))
    assert err.getvalue() == "error: dp x tp is 6\n  at: plan.yaml:3\n  do: make it 8\n"
    assert out.getvalue() == ""


def test_talk_is_broken_between_words_where_a_terminal_is_narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "24")
    for err, lines in (
        (
            Terminal(),
            [
                "error: it is",
                "  /a/path/that/is/one/word",
                "  and more",
                "  do: this and that and",
                "    those",
            ],
        ),
        (io.StringIO(), ["error: it is /a/path/that/is/one/word and more", "  do: this and that and those"]),
    ):
        Console(out=io.StringIO(), err=err).error(
            RunError("it is /a/path/that/is/one/word and more", hint="this and that and those")
        )
        assert err.getvalue().splitlines() == lines


def test_an_error_waits_for_the_document_that_it_belongs_to(streams: tuple[io.StringIO, io.StringIO]) -> None:
    out, err = streams
    console = Console(as_json=True, out=out, err=err)
    console.hold()
    console.results({"n": 1})
    console.error(combined([RunError("a", "b", "c"), RunError("d", "e", "f")]))
    assert out.getvalue() == ""
    console.close()
    first, second = ({"problem": p, "where": w, "hint": h} for p, w, h in ("abc", "def"))
    assert json.loads(out.getvalue()) == {"n": 1, "error": first, "errors": [first, second]}


def test_every_finding_of_an_error_is_told(streams: tuple[io.StringIO, io.StringIO]) -> None:
    out, err = streams
    Console(out=out, err=err).error(combined([RunError("a", "b", "c"), RunError("d", "e", "f")]))
    assert err.getvalue().count("error: ") == 2


def test_json_results_are_one_strict_document_on_stdout(streams: tuple[io.StringIO, io.StringIO]) -> None:
    out, err = streams
    document = {"loss": math.nan, "steps": (1, 2.5), "dir": Path("runs/0001"), "by": {3: math.inf}}
    Console(as_json=True, out=out, err=err).results(document, [Table("t", [("a", "1 s")])])
    assert json.loads(out.getvalue()) == {
        "loss": None,
        "steps": [1, 2.5],
        "dir": "runs/0001",
        "by": {"3": None},
    }
    assert err.getvalue() == ""


def test_tables_in_a_pipe_are_plain_text_and_never_cut(streams: tuple[io.StringIO, io.StringIO]) -> None:
    out, err = streams
    long = "x" * 300
    table = Table("Memory [per chip]", (("weights", "1.2 GB"), ("[bold]odd[/bold]", long)), ("class", "size"))
    Console(out=out, err=err).results({}, [table])
    text = out.getvalue()
    assert "Memory [per chip]" in text
    assert "[bold]odd[/bold]" in text
    assert long in text
    assert "\x1b" not in text


def test_talk_goes_to_stderr_and_to_the_log(streams: tuple[io.StringIO, io.StringIO], tmp_path: Path) -> None:
    console = Console(out=streams[0], err=streams[1])
    console.log_to(tmp_path / "log.txt")
    console.say("hello")
    console.detail("only with -v")
    console.warn("careful")
    assert streams[1].getvalue() == "hello\nwarning: careful\n"
    assert (tmp_path / "log.txt").read_text() == "hello\nonly with -v\nwarning: careful\n"
    assert streams[0].getvalue() == ""


def test_a_log_on_a_full_disk_does_not_hide_the_message(
    streams: tuple[io.StringIO, io.StringIO], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "full")

    console = Console(out=streams[0], err=streams[1])
    console.log_to(tmp_path / "log.txt")
    monkeypatch.setattr(Path, "open", full)
    console.say("hello")
    console.say("again")
    assert streams[1].getvalue().splitlines()[1:] == ["hello", "again"]


def test_a_short_phase_is_silent_and_a_long_one_is_told(streams: tuple[io.StringIO, io.StringIO]) -> None:
    console = Console(out=streams[0], err=streams[1], clock=clock(0, 1, 10, 13.25))
    with console.phase("quick"):
        pass
    with console.phase("capture"):
        pass
    assert streams[1].getvalue() == "capture: 3.25 s\n"


def test_a_phase_that_lasts_is_announced_while_it_runs(
    streams: tuple[io.StringIO, io.StringIO], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threading, "Timer", AtOnce)
    console = Console(out=streams[0], err=streams[1], clock=clock(0, 0, 5, 6))
    with console.phase("start"), console.phase("actors"):
        assert streams[1].getvalue() == "start ...\nstart > actors ...\n"
    assert streams[1].getvalue().endswith("  actors: 5.00 s\nstart: 6.00 s\n")


def test_on_a_terminal_a_spinner_stops_with_its_phase(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threading, "Timer", AtOnce)
    err = Terminal()
    console = Console(out=io.StringIO(), err=err)
    with console.phase("capture"):
        console.say("in between")
    assert "in between" in err.getvalue()
    assert console._spinner is None


def test_the_phase_table_shows_outer_phases_before_inner_ones(
    streams: tuple[io.StringIO, io.StringIO],
) -> None:
    console = Console(out=streams[0], err=streams[1], clock=clock(0, 0, 1, 1, 3, 4, 4, 5))
    with console.phase("start"):
        with console.phase("import"):
            pass
        with console.phase("actors"):
            pass
    with console.phase("compile"):
        pass
    rows = console.phase_table().rows
    assert rows == [
        ("start", "4.00 s", "80.0 %"),
        ("  import", "1.00 s", "20.0 %"),
        ("  actors", "2.00 s", "40.0 %"),
        ("compile", "1.00 s", "20.0 %"),
        ("total", "5.00 s", ""),
    ]


def test_fields_come_in_the_order_of_the_field_and_are_measured_here() -> None:
    heads = "step, loss, grad_norm, measured, predicted, tok/s, ETA"
    assert ", ".join(head for head, _ in fields(LINE)) == heads
    text = plain_line(LINE, 300)
    start = "step  10/300  loss  2.3457  grad_norm  0.910  measured  812 ms  predicted 4.27 ms  tok/s 10.1 k"
    assert text.startswith(start)
    assert text.endswith("ETA 3 min 05 s  val_loss 2.5000")
    assert plain_line(StepLine(9, 2.0), 300).index("ETA") == text.index("ETA")
    images = StepLine(9, 2.0, rate=64.0, rate_unit="samples/s")
    assert "samples/s   64.0" in plain_line(images, 300) and "tok/s" not in plain_line(images, 300)


def test_off_a_terminal_training_prints_every_nth_step_and_logs_all(
    streams: tuple[io.StringIO, io.StringIO], tmp_path: Path
) -> None:
    console = Console(out=streams[0], err=streams[1])
    console.log_to(tmp_path / "log.txt")
    with console.training("gpt", 7, every=3) as show:
        for step in range(1, 8):
            show(StepLine(step, 2.0, validation_loss=1.0 if step == 5 else None))
    shown = [int(line.split()[1].split("/")[0]) for line in streams[1].getvalue().splitlines()]
    assert shown == [1, 3, 5, 6, 7]
    assert len((tmp_path / "log.txt").read_text().splitlines()) == 7


def test_on_a_terminal_training_is_a_live_panel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "140")
    monkeypatch.setenv("TERM", "xterm")
    err = Terminal()
    console = Console(out=io.StringIO(), err=err)
    with console.training("gpt on 8 chips", 20) as show:
        show(LINE)
        console.say("saved a checkpoint")
        show(StepLine(11, math.nan))
    last = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", err.getvalue()).rsplit("gpt on 8 chips", 1)[1]
    assert "step 11/20" in last
    assert "2.3457" in last
    assert "validation 2.5000" in last
    assert "saved a checkpoint" in err.getvalue()
    assert not re.search(r"\x1b\[[0-9;]*3[0-9]m", err.getvalue())


def test_the_panel_fits_a_terminal_of_eighty_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    err = Terminal()
    with Console(out=io.StringIO(), err=err).training("gpt", 20) as show:
        show(LINE)
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", err.getvalue())
    heads = next(line for line in plain.splitlines() if "tok/s" in line)
    assert [head for head, _ in fields(LINE) if head not in heads] == ["ETA"]  # which is above
    assert "ETA 3 min 05 s" in plain and "\u2026" not in plain


def test_the_curve_stays_bounded_and_falls_with_the_loss() -> None:
    curve = LossCurve()
    for step in range(10_000):
        curve.add(10_000.0 - step)
    drawn = curve.drawn()
    assert CURVE_WIDTH // 2 <= len(drawn) < CURVE_WIDTH
    assert list(drawn) == sorted(drawn, reverse=True)
    assert len(set(drawn)) == 8
    curve.add(math.nan)


@pytest.mark.parametrize(
    ("worded", "expected"),
    [
        (format_seconds(0.0382), "38.2 ms"),
        (format_seconds(1.3e-6), "1.30 us"),
        (format_seconds(0.99999), "1.00 s"),
        (format_seconds(0), "0 s"),
        (format_seconds(185), "3 min 05 s"),
        (format_seconds(None), "-"),
        (format_duration(7620), "2 h 07 min"),
        (format_duration(12 * 86400 + 4 * 3600), "12 d 04 h"),
        (format_duration(math.inf), "-"),
        (format_scaled(3.2e9, "B"), "3.20 GB"),
        (format_scaled(999_900, ""), "1.00 M"),
        (format_scaled(812, "tok/s"), "812 tok/s"),
        (format_scaled(0, "B"), "0.00 B"),
        (format_percent(0.4127), "41.3 %"),
        (format_dollars(1234.5), "1,234.50 USD"),
        (format_dollars(0.00421), "0.00421 USD"),
        (format_dollars(0.0000042), "4.2e-06 USD"),
    ],
)
def test_numbers_are_worded_with_a_unit(worded: str, expected: str) -> None:
    assert worded == expected


def test_importing_the_console_imports_neither_rich_nor_torch() -> None:
    heavy = "{'rich', 'torch', 'numpy', 'matplotlib'}"
    code = f"import sys, orchestrator.views.console as c; c.Console().say('x'); print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


@pytest.mark.parametrize("as_json", [True, False])
@pytest.mark.parametrize("where", ["> /dev/full", ">&-"])
def test_an_answer_that_cannot_be_written_is_one_error_and_no_more(as_json: bool, where: str) -> None:
    code = (
        "import sys; from comms.errors import RunError; from orchestrator.views.console import Console, Table\n"
        f"try: Console(as_json={as_json}).results({{'n': 1}}, [Table('t', [('a', 'b')] * 999)])\n"
        "except RunError as error: sys.exit(str(error))"
    )
    words = ["/bin/sh", "-c", f'"$0" -c "$1" {where}', sys.executable, code]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert re.fullmatch(r"the answer cannot be written: .+\n  at: stdout\n  do: .+\n", done.stderr)


@pytest.mark.parametrize(
    ("words", "where"), [("--help", "> /dev/full"), ("comms --cluster laptop", "| true")]
)
def test_a_help_text_without_room_and_a_reader_that_has_gone_end_without_a_traceback(
    words: str, where: str
) -> None:
    code = "from orchestrator.cli import main; main()"
    shell = ["/bin/sh", "-c", f'"$0" -c "$1" {words} {where}', sys.executable, code]
    done = subprocess.run(shell, capture_output=True, text=True, check=False)
    room = "error: stdout cannot be written: No space left on device\n"
    assert (done.returncode, done.stderr) == ((1, room) if "full" in where else (0, ""))


def test_talk_that_cannot_be_written_is_left_unsaid_and_what_an_encoding_lacks_is_spelled_in_ascii() -> None:
    class Full(io.StringIO):
        def write(self, _: str, /) -> int:
            raise OSError(errno.ENOSPC, "full")

    Console(out=io.StringIO(), err=Full()).say("words")
    Console(out=io.StringIO(), err=Full()).show([Table("title", [("a", "b")])])
    taken = io.BytesIO()
    with io.TextIOWrapper(taken, encoding="ascii") as out:
        Console(out=out).results({}, [Table("caf\u00e9", [("1", "2")], ("a", "b"))])
        lines = taken.getvalue().decode("ascii").splitlines()
    assert lines[0] == "caf\\xe9" and any(set(line.strip()) == {"-"} for line in lines)
