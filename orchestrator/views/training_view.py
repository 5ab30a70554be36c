"""Training view: one step as a line of text, and the live panel that shows the last ones.

Field order is that of the field (step, loss, grad norm, step time, tokens/s, MFU, memory) followed by ours:
predicted chip time, exposed communication, cost so far, ETA. The panel needs rich, imported when it is drawn.
"""

from collections import deque
from dataclasses import dataclass
from math import isfinite
from typing import TYPE_CHECKING

from comms.units import DASH, format_dollars, format_duration, format_percent, format_scaled, format_seconds

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
    from rich.table import Table

NUM_ROWS = 10
CURVE_WIDTH = 48  # with its numbers it fits a terminal of 80 columns
_COLUMN, _FRAME = 9, 6  # a typical cell, and what the panel and the table's edges take
_BLOCKS = "\u2581\u2582\u2583\u2584\u2585\u2586\u2587\u2588"  # eighths of a cell, low to high


@dataclass(frozen=True, slots=True)
class StepLine:
    """What is shown of one step; None is a dash.

    `predicted_seconds` is chip time, not time on this machine.
    """

    step: int
    loss: float
    grad_norm: float | None = None
    step_seconds: float | None = None
    tokens_per_s: float | None = None
    mfu: float | None = None
    memory_bytes: int | None = None
    predicted_seconds: float | None = None
    exposed_communication: float | None = None
    cost_usd: float | None = None
    eta_seconds: float | None = None
    validation_loss: float | None = None


def fields(line: StepLine) -> tuple[tuple[str, str], ...]:
    """(head, text) of every field, in the order of all displays."""
    return (
        ("step", str(line.step)),
        ("loss", f"{line.loss:.4f}"),
        ("grad_norm", DASH if line.grad_norm is None else f"{line.grad_norm:.3f}"),
        ("step time", format_seconds(line.step_seconds)),
        ("tok/s", format_scaled(line.tokens_per_s, "")),
        ("MFU", format_percent(line.mfu)),
        ("mem", format_scaled(line.memory_bytes, "B")),
        ("predicted", format_seconds(line.predicted_seconds)),
        ("exposed comm", format_percent(line.exposed_communication)),
        ("cost", format_dollars(line.cost_usd)),
        ("ETA", format_duration(line.eta_seconds)),
    )


def plain_line(line: StepLine, num_steps: int) -> str:
    """One line for a log or a pipe; columns align from line to line."""
    (_, step), *others = fields(line)
    parts = [f"step {step:>{len(str(num_steps))}}/{num_steps}"]
    widths = {"loss": 7, "grad_norm": 6, "step time": 7, "tok/s": 6, "mem": 7, "predicted": 7}
    parts += [f"{head} {text:>{widths.get(head, 6)}}" for head, text in others]
    if line.validation_loss is not None:
        parts.append(f"val_loss {line.validation_loss:.4f}")
    return "  ".join(parts)


class TrainingView:
    """The live panel: progress, the curve of the loss, and the last steps. A rich renderable."""

    def __init__(self, title: str, num_steps: int) -> None:
        self._title, self._num_steps = title, num_steps
        self._recent: deque[StepLine] = deque(maxlen=NUM_ROWS)
        self._curve = LossCurve()
        self._validation: tuple[int, float] | None = None

    def add(self, line: StepLine) -> None:
        """Note one more step."""
        self._recent.append(line)
        self._curve.add(line.loss)
        if line.validation_loss is not None:
            self._validation = (line.step, line.validation_loss)

    def __rich_console__(self, console: "Console", options: "ConsoleOptions") -> "RenderResult":
        from rich.console import Group
        from rich.panel import Panel
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        last = self._recent[-1] if self._recent else None
        done = last.step if last else 0
        head = Table.grid(padding=(0, 2), expand=True)
        head.add_column(no_wrap=True)
        head.add_column(ratio=1)
        head.add_column(no_wrap=True, justify="right")
        eta = format_duration(last.eta_seconds) if last else DASH
        head.add_row(f"step {done}/{self._num_steps}", ProgressBar(self._num_steps, done), f"ETA {eta}")
        curve = Text.assemble(("loss ", "dim"), (self._curve.drawn(), "cyan"), f"  {self._curve.span()}")
        parts: list[RenderableType] = [head, curve, self._table(options.max_width)]
        if self._validation:
            step, loss = self._validation
            said = Text.assemble(("validation ", "dim"), (f"{loss:.4f}", "bold green"), f" at step {step}")
            parts.insert(2, said)
        yield Panel(Group(*parts), title=self._title, title_align="left", border_style="dim")

    def _table(self, width: int) -> "Table":
        from rich import box
        from rich.table import Table

        table = Table(box=box.SIMPLE_HEAD, expand=True, padding=(0, 1))
        styles = {"loss": "bold", "predicted": "magenta", "exposed comm": "magenta", "cost": "magenta"}
        heads = _fitting(width)
        for head in heads:
            table.add_column(head, justify="right", no_wrap=True, style=styles.get(head))
        for line in self._recent:
            table.add_row(*(text for head, text in fields(line) if head in heads))
        return table


def _fitting(width: int) -> list[str]:
    """Heads of the columns that fit, in order; the first to go are those shown elsewhere or least watched."""
    heads = [head for head, _ in fields(StepLine(0, 0.0))]
    for dropped in ("ETA", "mem", "grad_norm", "exposed comm"):
        if sum(max(len(head), _COLUMN) + 2 for head in heads) + _FRAME <= width:
            break
        heads.remove(dropped)
    return heads


class LossCurve:
    """A curve of bounded size for any number of steps: when full, neighbours are averaged two by two."""

    def __init__(self) -> None:
        self._means: list[float] = []
        self._pending: list[float] = []
        self._per_mean = 1

    def add(self, loss: float) -> None:
        """Note one more loss."""
        self._pending.append(loss)
        if len(self._pending) == self._per_mean:
            self._means.append(sum(self._pending) / self._per_mean)
            self._pending = []
        if len(self._means) == CURVE_WIDTH:
            self._means = [(a + b) / 2 for a, b in zip(self._means[::2], self._means[1::2], strict=True)]
            self._per_mean *= 2

    def span(self) -> str:
        """From the first to the last mean."""
        return f"{self._means[0]:.3f} -> {self._means[-1]:.3f}" if self._means else ""

    def drawn(self) -> str:
        """One block per mean, the highest finite loss on top."""
        finite = [mean for mean in self._means if isfinite(mean)]
        low, high = min(finite, default=0.0), max(finite, default=0.0)
        span = high - low or 1.0
        return "".join(
            _BLOCKS[min(7, int(8 * (mean - low) / span))] if isfinite(mean) else "!" for mean in self._means
        )
