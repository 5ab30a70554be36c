"""Training view: one step as a line of text, and the live panel that shows the last ones.

Times and rates are measured on this machine; beside a step's time stands what is predicted for the chips, which is the
same for every step. The panel needs rich, imported when it is drawn.
"""

from collections import deque
from dataclasses import dataclass
from math import isfinite
from typing import TYPE_CHECKING

from comms.units import DASH, format_duration, format_scaled, format_seconds

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
    from rich.table import Table

NUM_ROWS = 10
CURVE_WIDTH = 48  # with its numbers it fits a terminal of 80 columns
_BLOCKS = "\u2581\u2582\u2583\u2584\u2585\u2586\u2587\u2588"  # eighths of a cell, low to high


@dataclass(frozen=True, slots=True)
class StepLine:
    """What is shown of one step; None is a dash. `rate` is in `rate_unit`, of this machine as the times are.

    The one figure that is not measured here is `predicted_seconds`, of the step on the chips that are described.
    """

    step: int
    loss: float
    grad_norm: float | None = None
    step_seconds: float | None = None
    rate: float | None = None
    eta_seconds: float | None = None
    validation_loss: float | None = None
    rate_unit: str = "tok/s"
    predicted_seconds: float | None = None


def fields(line: StepLine) -> tuple[tuple[str, str], ...]:
    """(head, text) of every field, in the order of all displays."""
    return (
        ("step", str(line.step)),
        ("loss", f"{line.loss:.4f}"),
        ("grad_norm", DASH if line.grad_norm is None else f"{line.grad_norm:.3f}"),
        ("measured", format_seconds(line.step_seconds)),
        ("predicted", format_seconds(line.predicted_seconds)),
        (line.rate_unit, format_scaled(line.rate, "")),
        ("ETA", format_duration(line.eta_seconds)),
    )


def plain_line(line: StepLine, num_steps: int) -> str:
    """One line for a log or a pipe; columns align from line to line."""
    (_, step), *others = fields(line)
    parts = [f"step {step:>{len(str(num_steps))}}/{num_steps}"]
    widths = {"loss": 7, "measured": 7, "predicted": 7}
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
        parts: list[RenderableType] = [head, curve, self._table()]
        if self._validation:
            step, loss = self._validation
            said = Text.assemble(("validation ", "dim"), (f"{loss:.4f}", "bold green"), f" at step {step}")
            parts.insert(2, said)
        yield Panel(Group(*parts), title=self._title, title_align="left", border_style="dim")

    def _table(self) -> "Table":
        from rich import box
        from rich.table import Table

        table = Table(box=box.SIMPLE_HEAD, expand=True, padding=(0, 1))
        columns = [fields(line)[:-1] for line in self._recent]  # the ETA is in the head
        for head, _ in columns[0] if columns else ():
            table.add_column(head, justify="right", no_wrap=True, style="bold" if head == "loss" else None)
        for column in columns:
            table.add_row(*(text for _, text in column))
        return table


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
