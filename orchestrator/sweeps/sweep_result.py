"""Sweep: the points of one experiment with what they came to; it prints, draws and describes itself.

    sweep = orchestrator.scale("dgx-a100", job, chips=[8, 64, 512])
    print(sweep); sweep.plot("scaling.png"); sweep          # a page, in a notebook

Throughput is what counts as work a second; efficiency, speed-up and knees are those of `curves`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from comms.errors import ConfigError
from comms.units import DASH, format_percent, format_scaled, format_seconds
from orchestrator.config.sweep_file import Scaling
from orchestrator.runs.disk import write_whole
from orchestrator.sweeps.curves import GAIN, CurvePoint, curve, knee
from orchestrator.sweeps.point_pool import Levers
from orchestrator.sweeps.points import AUTO, Point, PointResult, Series, Status
from orchestrator.views.console import Table
from orchestrator.views.scaling.scaling_plot import ChipLine, ChipPanel, Stroke, panels_png, panels_svg
from orchestrator.views.scaling.sweep_page import sweep_body, sweep_page

PICTURES = {".png": panels_png, ".svg": panels_svg}
MODES = {
    Scaling.WEAK: "weak scaling: the global batch grows in proportion to the chips (the batch per chip is fixed)",
    Scaling.STRONG: "strong scaling: the global batch is the same on all numbers of chips",
}
THROUGHPUT = "throughput: tokens (or samples) of the global batch over the time of a step, each counted once"
EFFICIENCY = (
    "efficiency: throughput per chip over that on the fewest chips that fit; speed-up: throughput over theirs"
)
IDEAL = "ideal (dotted): throughput in proportion to the chips, from the fewest that fit"
MFU = """MFU: FLOPs that forward and backward of the model need for the global batch, over step time x chips x peak of a
 chip for the job's dtype; what is computed again or on several chips counts once"""
KNEE = f"""knee: the fewest chips beyond which every doubling adds less than {GAIN:.0%} throughput; what moves it:
 efficiency there against the fewest chips, same plans, one resource twice as good on both, by the closed form"""
SIMULATED = """step time, its parts and memory: the simulation of the fastest plan that fits, found anew for each point,
 as `orchestrate simulate` gives them; waits: exposed communication along an axis, a mean over chips"""
MEASURED = """measured (squares): real steps of the same plan on simulated chips of this machine, which share its cores,
 so that throughput can grow with the cores at most, not with the chips; p10, p50, p90 of the steps after the warm-up"""
DEFINITIONS = tuple(
    text.replace("\n", "")
    for text in (*MODES.values(), THROUGHPUT, EFFICIENCY, MFU, KNEE, SIMULATED, MEASURED)
)


@dataclass(frozen=True)
class Sweep:
    """What is known of a sweep: a result for every point, None where it was interrupted before."""

    cluster: str
    points: tuple[Point, ...] = field(repr=False)
    results: tuple[PointResult | None, ...] = field(repr=False)
    levers: tuple[Levers, ...] = field(default=(), repr=False)
    left_out: tuple[str, ...] = ()

    @cached_property
    def series(self) -> Mapping[Series, tuple[PointResult, ...]]:
        """The results by series, few chips first."""
        found: dict[Series, list[PointResult]] = {}
        for point, result in zip(self.points, self.results, strict=True):
            row = found.setdefault(point.series, [])
            if result is not None:
                row.append(result)
        return {series: tuple(results) for series, results in found.items()}

    @property
    def is_complete(self) -> bool:
        """Whether every point has a result."""
        return None not in self.results

    def curve(self, series: Series) -> tuple[CurvePoint, ...]:
        """Throughput, speed-up and efficiency of the points that fit."""
        fit = [r for r in self.series[series] if r.status is Status.OK]
        return curve([(r.chips, r.tokens_per_s) for r in fit])

    @cached_property
    def names(self) -> Mapping[Series, str]:
        """What tells a series from the others."""
        kinds = {name: {getattr(s, name) for s in self.series} for name in Series.__dataclass_fields__}

        def name(series: Series) -> str:
            parts = [series.model.removeprefix("builtin:")] if len(kinds["model"]) > 1 else []
            parts += [str(series.mode)] if len(kinds["mode"]) > 1 else []
            per_mode = {s.batch for s in self.series if s.mode is series.mode}
            parts += [series.batch_text] if len(per_mode) > 1 else []
            parts += [f"seq {series.seq}"] if len(kinds["seq"]) > 1 else []
            parts += [f"bandwidth x{series.bandwidth:g}"] if len(kinds["bandwidth"]) > 1 else []
            parts += [f"latency x{series.latency:g}"] if len(kinds["latency"]) > 1 else []
            parts += [f"plan {series.plan}"] if len(kinds["plan"]) > 1 else []
            parts += [_actors(series)] if len(kinds["actors"]) > 1 else []
            return ", ".join(parts) or series.model.removeprefix("builtin:")

        return {series: name(series) for series in self.series}

    @property
    def title(self) -> str:
        """What was swept."""
        models = dict.fromkeys(series.model.removeprefix("builtin:") for series in self.series)
        modes = dict.fromkeys(str(series.mode) for series in self.series)
        chips = sorted({point.chips for point in self.points})
        span = f"{chips[0]:,} to {chips[-1]:,}" if len(chips) > 1 else f"{chips[0]:,}"
        return f"{' and '.join(modes)} scaling of {', '.join(models)} on {span} chips of {self.cluster}"

    @property
    def findings(self) -> list[str]:
        """The knee of each series and what moves it, and what is not known."""
        odd = [
            f"{self.names[series]}, {result.chips:,} chips: {result.reason}"
            for series, results in self.series.items() for result in results
            if result.reason and result.status is Status.OK
        ]  # fmt: skip
        return [*map(self._finding, self.series), *odd, *self.left_out]

    def _finding(self, series: Series) -> str:
        name, points = self.names[series], self.curve(series)
        if len(points) < 2:
            return f"{name}: {len(points)} of {len(self.series[series])} points fit, no curve"
        at, last = knee([*points]), points[-1]
        said = (
            f"beyond {at:,} chip{'s' * (at > 1)} a doubling buys under {GAIN:.0%}"
            if at
            else f"no knee up to {last.chips:,} chips"
        )
        lever = next((each for each in self.levers if each.row.points[0].series == series), None)
        said += f", efficiency there {last.efficiency:.0%}" * (at is None)
        if lever is None:
            return f"{name}: {said}"
        base = lever.efficiencies["as it is"]
        best = max((k for k in lever.efficiencies if k != "as it is"), key=lambda k: lever.efficiencies[k])
        moved = lever.efficiencies[best]
        what = f"{best} moves it most" if moved > base else "no resource alone moves it up"
        return f"{name}: {said}; {what} (efficiency on {lever.beyond:,} chips {base:.1%} to {moved:.1%})"

    @cached_property
    def panels(self) -> tuple[ChipPanel, ...]:
        """Throughput and efficiency, of each mode."""
        found: list[ChipPanel] = []
        for mode in dict.fromkeys(series.mode for series in self.series):
            wanted = [s for s in self.series if s.mode is mode and self.curve(s)]
            if wanted:
                found += [self._throughput(mode, wanted), self._efficiency(mode, wanted)]
        return tuple(found)

    def _predicted(self, series: Series) -> str:
        """The name of a predicted line, told apart from what was measured where anything was."""
        is_measured = any(result.measured for result in self.series[series])
        return f"{self.names[series]}, predicted" if is_measured else self.names[series]

    def _throughput(self, mode: Scaling, wanted: Sequence[Series]) -> ChipPanel:
        lines: list[ChipLine] = []
        for colour, series in enumerate(wanted):
            points, first = self.curve(series), self.curve(series)[0]
            lines.append(
                _line(self._predicted(series), Stroke.PREDICTED, colour, [(p.chips, p.rate) for p in points])
            )
            ideal = [(p.chips, first.rate * p.chips / first.chips) for p in (first, points[-1])]
            lines.append(_line("ideal" if not colour else "", Stroke.IDEAL, colour, ideal))
            if measured := [(r.chips, r.measured.tokens_per_s) for r in self.series[series] if r.measured]:
                lines.append(_line("measured here" if not colour else "", Stroke.MEASURED, colour, measured))
        unit = next((r.rate_unit for s in wanted for r in self.series[s] if r.tokens_per_s), "tok/s")
        notes = (MODES[mode], THROUGHPUT, IDEAL, *self._measured_note())
        return ChipPanel(f"{mode} scaling: throughput", unit, tuple(lines), is_share=False, notes=notes)

    def _efficiency(self, mode: Scaling, wanted: Sequence[Series]) -> ChipPanel:
        lines: list[ChipLine] = []
        for colour, series in enumerate(wanted):
            places = [(p.chips, p.efficiency) for p in self.curve(series)]
            lines.append(_line(self._predicted(series), Stroke.PREDICTED, colour, places))
            if measured := [(r.chips, r.measured.tokens_per_s) for r in self.series[series] if r.measured]:
                places = [(p.chips, p.efficiency) for p in curve(measured)]
                lines.append(_line("measured here" if not colour else "", Stroke.MEASURED, colour, places))
        ends = sorted({chips for line in lines for chips, _ in line.places})
        lines.append(_line("ideal", Stroke.IDEAL, 5, [(ends[0], 1.0), (ends[-1], 1.0)]))
        notes = (MODES[mode], EFFICIENCY, *self._measured_note())
        return ChipPanel(
            f"{mode} scaling: efficiency", "efficiency", tuple(lines), is_share=True, notes=notes
        )

    def _measured_note(self) -> tuple[str, ...]:
        return DEFINITIONS[-1:] if any(result and result.measured for result in self.results) else ()

    def tables(self) -> list[Table]:
        """Of each series its points, then what was found."""
        tables = [self._table(series) for series in self.series]
        return [*tables, Table("what is found", tuple((line,) for line in self.findings), ("finding",))]

    def _table(self, series: Series) -> Table:
        by_chips = {point.chips: point for point in self.curve(series)}
        rows = [_row(result, by_chips.get(result.chips)) for result in self.series[series]]
        shown = len(HEADS) if any(result.measured for result in self.series[series]) else -1
        title = f"{series.mode} scaling of {series.model}, {series.batch_text}, seq {series.seq}"
        title += f", plan {series.plan}" * (series.plan != AUTO)
        title += f", bandwidth x{series.bandwidth:g}" * (series.bandwidth != 1)
        title += f", latency x{series.latency:g}" * (series.latency != 1)
        title += f", {_actors(series)}" * (series.actors is not None)
        return Table(title, tuple(row[:shown] for row in rows), HEADS[:shown])

    def plot(self, path: str | Path) -> None:
        """Draw all panels into a .png or .svg file."""
        draw = PICTURES.get(Path(path).suffix)
        if draw is None:
            raise ConfigError("a picture is a .png or .svg file", str(path), "change its name")
        write_whole(Path(path), draw(self.panels))

    def page(self) -> str:
        """One HTML file with everything."""
        return sweep_page(self.title, self.findings, self.panels, self.tables()[:-1], DEFINITIONS)

    def html(self) -> str:
        """The same for a notebook, which shows it by itself."""
        return sweep_body([self.title, *self.findings], self.panels, self.tables()[:-1], DEFINITIONS)

    _repr_html_ = html

    def __str__(self) -> str:
        lines = [self.title]
        for table in self.tables():
            lines += ["", table.title, "\t".join(table.heads), *("\t".join(row) for row in table.rows)]
        return "\n".join(lines)


HEADS = (
    "chips", "plan", "step", "throughput", "per chip", "speed-up", "efficiency", "doubling", "MFU", "memory",
    "tp wait", "dp wait", "pp wait", "all wait", "bubble", "measured p10 / p50 / p90",
)  # fmt: skip


def _actors(series: Series) -> str:
    return f"{series.actors} actor{'s' * (series.actors != 1)}"


def _line(label: str, stroke: Stroke, colour: int, places: Sequence[tuple[int, float]]) -> ChipLine:
    return ChipLine(label, stroke, colour, tuple(places))


def _row(result: PointResult, at: CurvePoint | None) -> tuple[str, ...]:
    memory = DASH
    if result.memory_bytes:
        share = format_percent(result.peak_memory_bytes / result.memory_bytes)
        memory = f"{format_scaled(result.peak_memory_bytes, 'B')} ({share})"
    if at is None:
        reason = f"{result.status}: {result.reason}"
        return f"{result.chips:,}", reason, *[DASH] * 7, memory, *[DASH] * 6
    step = result.step_time_s
    exposed = [result.exposed_communication_s.get(axis, 0.0) for axis in ("tp", "dp", "pp", "all")]
    measured = result.measured
    steps = (
        " / ".join(map(format_seconds, (measured.p10_s, measured.p50_s, measured.p90_s)))
        if measured
        else DASH
    )
    return (
        f"{result.chips:,}", result.plan, format_seconds(step), format_scaled(result.tokens_per_s, result.rate_unit),
        format_scaled(result.per_chip, result.rate_unit), f"{at.speed_up:.2f}", format_percent(at.efficiency),
        DASH if at.gain is None else format_percent(at.gain), format_percent(result.mfu), memory,
        *(format_percent(seconds / step) for seconds in (*exposed, result.bubble_s)), steps,
    )  # fmt: skip
