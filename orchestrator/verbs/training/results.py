"""What a run of training leaves: its result, and prediction beside measurement in timelines, pictures and numbers.

The curves of a run that was resumed are whole, from its metrics.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from comms.units import DASH, format_percent, format_scaled, format_seconds
from orchestrator.config.hardware.cluster import Device
from orchestrator.runners.runner import measured_timeline
from orchestrator.runners.timing.step_costs import NS_PER_S
from orchestrator.runs.accuracy import Accuracy, Basis, Pair, compare
from orchestrator.runs.disk import write_whole
from orchestrator.runs.metrics import read_metrics
from orchestrator.runs.timeline import Origin, Timeline
from orchestrator.verbs.training.training_loop import Training, tokens_of
from orchestrator.views.console import Table
from orchestrator.views.perfetto import trace_gz
from orchestrator.views.plots import loss_png, timeline_png
from partitioner.program.peak_memory import MemoryClass

OTHER_MACHINE = "shares of time, as the chips are simulated on this machine"


@dataclass(frozen=True, slots=True)
class TrainResult:
    """How a run ended; `accuracy` is None where no step was measured."""

    final_loss: float
    val_loss: float | None
    tokens_per_s: float
    predicted_step_time_s: float
    run_dir: Path
    steps: int
    job_steps: int
    was_interrupted: bool
    rate_unit: str  # of `tokens_per_s`
    baselines: Mapping[str, float]
    accuracy: Accuracy | None
    exit_code: int = 0  # 128 + the signal that ended it

    def document(self) -> dict[str, object]:
        """As JSON values."""
        return {
            "final_loss": self.final_loss, "val_loss": self.val_loss, "tokens_per_s": self.tokens_per_s,
            "rate_unit": self.rate_unit,
            "predicted_step_time_s": self.predicted_step_time_s, "run_dir": str(self.run_dir), "steps": self.steps,
            "was_interrupted": self.was_interrupted, "baselines": dict(self.baselines),
            "accuracy": self.accuracy.document() if self.accuracy else None,
        }  # fmt: skip

    def tables(self) -> list[Table]:
        """The same to read."""
        title = f"interrupted at step {self.steps} of {self.job_steps}" if self.was_interrupted else "trained"
        tables = [Table(title, _rows(self))]
        return [*tables, _accuracy_table(self.accuracy)] if self.accuracy else tables


def write_results(training: Training, baselines: Mapping[str, float], exit_code: int = 0) -> TrainResult:
    """Timelines, trace and plots; of a run that was resumed the curves are whole, from its metrics."""
    folder, predicted = training.run_dir, training.predicted
    records = read_metrics(folder.metrics)
    curve, points = (
        tuple((int(str(r["step"])), float(str(r[key]))) for r in records if r.get(key) is not None)
        for key in ("loss", "val_loss")
    )
    if curve:
        write_whole(folder.loss_plot, loss_png(curve, points, baselines))
    accuracy = _write_timelines(training)
    step_s = training.recent_step_seconds()
    return TrainResult(
        final_loss=curve[-1][1] if curve else training.loss,
        val_loss=points[-1][1] if points else None,
        tokens_per_s=tokens_of(training.prepared) / step_s if step_s else 0.0,
        predicted_step_time_s=predicted.step_time_s, run_dir=folder.root, steps=training.step,
        job_steps=training.prepared.job.steps, was_interrupted=training.was_interrupted,
        rate_unit=predicted.rate_unit, baselines=baselines, accuracy=accuracy,
        exit_code=exit_code,
    )  # fmt: skip


def _write_timelines(training: Training) -> Accuracy | None:
    """What was predicted beside what was measured, if only before the run was resumed; None where no step was."""
    folder, result = training.run_dir, training.predicted
    # Simulated chips are executed by another machine than the one that is described.
    is_described = training.prepared.cluster.device is not Device.SIMULATED
    basis = Basis.SECONDS if is_described else Basis.SHARES
    predicted, program = result.timeline(), training.prepared.program
    marks = {step: each.marks for step, each in training.measured.items() if each.marks}
    measured = (
        measured_timeline(program, marks).from_zero() if marks else folder.read_timeline(Origin.MEASURED)
    )
    both = [predicted] if measured is None else [predicted, measured]
    for timeline in both:
        folder.write_timeline(timeline)
    write_whole(folder.trace, trace_gz(*both))
    write_whole(folder.timeline_plot, timeline_png(both, by_shares=not is_described))
    if measured is None:
        return None
    return compare(result.step.timeline(all_chips=True), measured, basis, _memory_pairs(training, measured))


def _memory_pairs(training: Training, measured: Timeline) -> tuple[Pair, ...]:
    """Per stage: its fullest chip as predicted, and as it was; what is inside an instruction counts for neither."""
    program, fullest, rows = training.prepared.program, dict[int, int](), measured.counter_rows
    for chip, nbytes in zip(rows["chip"].tolist(), rows["nbytes"].tolist(), strict=True):
        stage = program.role_of(chip).stage
        fullest[stage] = max(fullest.get(stage, 0), nbytes)
    return tuple(
        Pair(role.peak_bytes - dict(role.classes)[MemoryClass.TEMPORARY], fullest.get(role.stage, 0))
        for role in training.predicted.memory
    )


def _accuracy_table(accuracy: Accuracy) -> Table:
    in_seconds = accuracy.basis is Basis.SECONDS
    rows = []
    for kind in accuracy.kinds:
        times = [ns / accuracy.num_steps / NS_PER_S for ns in (kind.predicted_ns, kind.measured_ns)]
        shares = accuracy.shares(kind)
        compared = (
            (*map(format_seconds, times), f"{kind.error:+.1%}")
            if in_seconds
            else (*map(format_percent, shares), f"{100 * (shares[0] - shares[1]):+.1f} points")
        )
        rows.append((kind.kind, str(kind.num_matched // accuracy.num_steps), *compared))
    totals = [("bytes", accuracy.nbytes, "B"), ("FLOPs", accuracy.flops, "")]
    totals += [(f"memory held, stage {stage}", pair, "B") for stage, pair in enumerate(accuracy.memory_bytes)]
    for name, pair, unit in totals:
        off = f"{(pair.predicted - pair.measured) / max(pair.measured, 1):+.1%}"
        both = (format_scaled(pair.predicted, unit), format_scaled(pair.measured, unit))
        rows.append((name, DASH, *both, off))
    chips = f"{accuracy.chips_in_order} of {accuracy.num_chips} chips"
    rows.append(("order as predicted", DASH, DASH, chips, DASH))
    what = "seconds on these chips" if in_seconds else OTHER_MACHINE
    heads = ("per step, all chips", "instructions", "predicted", "measured", "off by")
    return Table(f"predicted against measured: {what}", rows, heads)


def _rows(result: TrainResult) -> list[tuple[str, str]]:
    unit = " nats/byte" if result.baselines else ""  # known of text only
    validation = "not measured" if result.val_loss is None else f"{result.val_loss:.4f}{unit}"
    return [
        ("final loss", f"{result.final_loss:.4f}{unit}"),
        ("validation loss", validation),
        *((f"  {name} baseline", f"{loss:.4f} nats/byte") for name, loss in result.baselines.items()),
        ("measured on this machine", format_scaled(result.tokens_per_s, result.rate_unit)),
        ("predicted step on the chips", format_seconds(result.predicted_step_time_s)),
        ("run directory", str(result.run_dir)),
    ]
