"""Results of training: what a run leaves in its folder at the end, and what it answers.

The prediction stands beside the measurement, in the timelines, in the picture, and in numbers (`runs.accuracy`).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from comms.units import DASH, format_percent, format_scaled, format_seconds
from orchestrator.config.hardware.cluster import Cluster, Device
from orchestrator.runners.runner import measured_timeline
from orchestrator.runners.timing.step_costs import NS_PER_S
from orchestrator.runs import metrics
from orchestrator.runs.accuracy import Accuracy, Basis, Pair, compare
from orchestrator.runs.disk import write_whole
from orchestrator.runs.timeline import Origin, Timeline
from orchestrator.verbs.training import Training, TrainingProgress
from orchestrator.views.console import Table, pairs
from orchestrator.views.perfetto import trace_gz
from orchestrator.views.plots import LossCurves, loss_png, timeline_png
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
    was_interrupted: bool
    baselines: Mapping[str, float]
    accuracy: Accuracy | None

    def document(self) -> dict[str, object]:
        """As JSON values."""
        return {
            "final_loss": self.final_loss, "val_loss": self.val_loss, "tokens_per_s": self.tokens_per_s,
            "predicted_step_time_s": self.predicted_step_time_s, "run_dir": str(self.run_dir), "steps": self.steps,
            "was_interrupted": self.was_interrupted, "baselines": dict(self.baselines),
            "accuracy": self.accuracy.document() if self.accuracy else None,
        }  # fmt: skip

    def tables(self) -> list[Table]:
        """The same to read."""
        tables = [pairs("trained", _rows(self))]
        return [*tables, _accuracy_table(self.accuracy)] if self.accuracy else tables


def write_results(
    training: Training, progress: TrainingProgress, baselines: Mapping[str, float]
) -> TrainResult:
    """Timelines, trace and plots; of a run that was resumed the curves are whole, from its metrics."""
    folder, predicted, job = training.run_dir, training.predicted, training.prepared.job
    records = metrics.read_metrics(folder.metrics)
    curve, points = (
        tuple((int(str(r["step"])), float(str(r[key]))) for r in records if r.get(key) is not None)
        for key in ("loss", "val_loss")
    )
    if curve:
        curves = LossCurves(train=curve, validation=points, baselines=baselines, unit="nats per byte")
        write_whole(folder.loss_plot, loss_png(curves))
    accuracy = _write_timelines(training, progress)
    step_s = progress.recent_step_seconds()
    return TrainResult(
        final_loss=progress.losses[-1][1] if progress.losses else float("nan"),
        val_loss=points[-1][1] if points else None,
        tokens_per_s=job.global_batch * job.seq / step_s if step_s else 0.0,
        predicted_step_time_s=predicted.step_time_s, run_dir=folder.root, steps=progress.step,
        was_interrupted=progress.was_interrupted, baselines=baselines, accuracy=accuracy,
    )  # fmt: skip


def _write_timelines(training: Training, progress: TrainingProgress) -> Accuracy | None:
    """What was predicted beside what was measured, if only before the run was resumed; None where no step was."""
    folder, result = training.run_dir, training.predicted
    basis = basis_of(training.prepared.cluster)
    predicted, program = result.timeline(), training.prepared.program
    marks = {step: each.marks for step, each in progress.measured.items() if each.marks}
    measured = (
        measured_timeline(program, marks).from_zero() if marks else folder.read_timeline(Origin.MEASURED)
    )
    folder.write_timeline(predicted)
    if measured is not None:
        folder.write_timeline(measured)
    write_whole(folder.trace, trace_gz(*(each for each in (predicted, measured) if each is not None)))
    write_whole(folder.timeline_plot, timeline_png(predicted, measured, by_shares=basis is Basis.SHARES))
    if measured is None:
        return None
    return compare(result.step.timeline(all_chips=True), measured, basis, _memory_pairs(training, measured))


def basis_of(cluster: Cluster) -> Basis:
    """Simulated chips are executed by another machine than the one that is described."""
    return Basis.SHARES if cluster.device is Device.SIMULATED else Basis.SECONDS


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
    for name, pair, unit in (("bytes", accuracy.nbytes, "B"), ("FLOPs", accuracy.flops, "")):
        rows.append(
            (name, DASH, format_scaled(pair.predicted, unit), format_scaled(pair.measured, unit), _off(pair))
        )
    for stage, pair in enumerate(accuracy.memory_bytes):
        held = (format_scaled(pair.predicted, "B"), format_scaled(pair.measured, "B"), _off(pair))
        rows.append((f"memory held, stage {stage}", DASH, *held))
    chips = f"{accuracy.chips_in_order} of {accuracy.num_chips} chips"
    rows.append(("order as predicted", DASH, DASH, chips, DASH))
    what = "seconds on these chips" if in_seconds else OTHER_MACHINE
    heads = ("per step, all chips", "instructions", "predicted", "measured", "off by")
    return Table(f"predicted against measured: {what}", tuple(rows), heads)


def _off(pair: Pair) -> str:
    return f"{(pair.predicted - pair.measured) / max(pair.measured, 1):+.1%}"


def _rows(result: TrainResult) -> list[tuple[str, str]]:
    validation = "not measured" if result.val_loss is None else f"{result.val_loss:.4f} nats/byte"
    return [
        ("final loss", f"{result.final_loss:.4f} nats/byte"),
        ("validation loss", validation),
        *((f"  {name} baseline", f"{loss:.4f} nats/byte") for name, loss in result.baselines.items()),
        ("tokens/s on this machine", format_scaled(result.tokens_per_s, "")),
        ("predicted step on the chips", format_seconds(result.predicted_step_time_s)),
        ("run directory", str(result.run_dir)),
    ]
