"""Training: steps, validation, checkpoints, and what a run leaves in its folder at the end, for any runner.

Assumes nothing about where chips are. Everything that may be lost is written as it happens: metrics line by line,
checkpoints whole or not at all, beside the steps; what becomes of a signal and of a step that fails is decided by
`failure`. When a checkpoint is taken changes no result. At the end the prediction stands beside the measurement, in
the timelines, in the picture, and in numbers (`runs.accuracy`).
"""

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from math import nan
from pathlib import Path

from comms.errors import DataError, ModelError
from comms.units import DASH, format_percent, format_scaled, format_seconds
from kernels.optimizers import StepStatistics
from orchestrator.config.hardware.cluster import Device
from orchestrator.models.model_specs import SourceKind, parse_model
from orchestrator.models.user_code import own_sources
from orchestrator.planning.job_parts import LrSchedule
from orchestrator.planning.preparation import Prepared
from orchestrator.runners.failure import not_finite
from orchestrator.runners.runner import ExecutedStep, measured_timeline
from orchestrator.runners.timing.prediction import SimulationResult
from orchestrator.runners.timing.step_costs import NS_PER_S
from orchestrator.runs.accuracy import Accuracy, Basis, Pair, compare
from orchestrator.runs.checkpoints import checkpoint
from orchestrator.runs.checkpoints.manifest import Manifest
from orchestrator.runs.checkpoints.saver import Saver
from orchestrator.runs.data import TokenData
from orchestrator.runs.disk import write_whole
from orchestrator.runs.metrics import eta_s, metrics_writer, read_metrics
from orchestrator.runs.own_data import OwnData, digest_of, num_samples
from orchestrator.runs.run_dir import RunDir
from orchestrator.runs.timeline import Origin, Timeline
from orchestrator.verbs.distribute import DistributedStep
from orchestrator.verbs.verification.first_step import verified_step
from orchestrator.verbs.verification.resumed_run import HeldOut, evidence
from orchestrator.views.console import Table
from orchestrator.views.perfetto import trace_gz
from orchestrator.views.plots import loss_png, timeline_png
from orchestrator.views.training_view import StepLine
from partitioner.capture.batch_inputs import Batch
from partitioner.layout.parallel_plan import Plan, plan_to_yaml
from partitioner.program.peak_memory import MemoryClass
from partitioner.program.program import Program

RECENT_STEPS = 20  # step times that the throughput is taken from
MEASURED_STEPS = 2  # steps after the first whose intervals are recorded for the timeline
OTHER_MACHINE = "shares of time, as the chips are simulated on this machine"


@dataclass
class Training:
    """Everything a loop needs, put together by `verbs.train`, and how far it is."""

    prepared: Prepared
    one_step: DistributedStep
    schedule: LrSchedule
    data: TokenData | OwnData
    validation: TokenData | OwnData | None
    run_dir: RunDir
    predicted: SimulationResult
    warn: Callable[[str], None]
    program_under: Callable[[Plan], Program]  # that of the job by another plan
    clock: Callable[[], float] = time.monotonic
    step: int = 0
    loss: float = nan  # of the last step
    step_seconds: list[float] = field(default_factory=list)
    measured: dict[int, ExecutedStep] = field(default_factory=dict)  # by step
    was_interrupted: bool = False
    saved: set[int] = field(default_factory=set)  # steps that this process has written, or is about to
    saver: Saver = field(default_factory=Saver)
    saved_at_s: float = 0.0
    verify_next: Callable[[str], None] | None = None  # is told that the step that comes next is one chip's
    # what a resumed run must find again
    last_batch: Batch | None = None
    last_program: Program | None = None
    held_out: HeldOut = field(default_factory=HeldOut)
    sources: Mapping[str, str] = field(
        default_factory=own_sources
    )  # as they were read: they may change meanwhile

    ends_s: list[float] = field(default_factory=list)  # of steps that this process made, after its start

    def recent_step_seconds(self) -> float:
        """Median of the last step times: the first ones include warm-up."""
        recent = sorted(self.step_seconds[-RECENT_STEPS:])
        return recent[len(recent) // 2] if recent else 0.0

    def run(self, show: Callable[[StepLine], None], is_stopping: Callable[[], bool]) -> None:
        """Train from `step` to the job's last step, or to the step at whose end `is_stopping()`; then save."""
        job = self.prepared.job
        self.ends_s.append(time.monotonic())
        self.saved_at_s = self.clock()
        with metrics_writer(self.run_dir.metrics) as write:
            while self.step < job.steps and not self.was_interrupted:
                try:
                    line, rate = self._step()
                except (DataError, ModelError):  # the chips are well
                    self.save_now()
                    raise
                write(self._record(line, rate))
                show(line)
                if self._is_to_be_saved():
                    self.save()
                self.was_interrupted = is_stopping() and self.step < job.steps
        self.save_now()

    def _is_to_be_saved(self) -> bool:
        wanted = self.prepared.job.checkpoints
        is_late = 0 < wanted.interval <= self.clock() - self.saved_at_s
        return is_late or _is_due(self.step, wanted.every)

    def _step(self) -> tuple[StepLine, float]:
        """One step, and the learning rate that it had."""
        job, step = self.prepared.job, self.step
        batch = self.batch(step)
        self.schedule.before(step)
        rate = self.schedule.rates[0]
        measure = 1 <= len(self.step_seconds) <= MEASURED_STEPS
        if self.verify_next is None:
            result = self.one_step.execute(batch, measure=measure)
        else:
            say, self.verify_next = self.verify_next, None
            result = verified_step(self.one_step, batch, say)
        assert result.stats is not None
        if not result.stats.is_finite:
            # The same once more, looking at every result: the optimizer has skipped it, so nothing has changed.
            found = self.one_step.execute(batch, check=True).first_bad
            error = not_finite(step + 1, found[1] if found else None)
            self.save_now()
            raise error
        self.step, self.last_batch, self.last_program = step + 1, batch, result.program
        self.schedule.after()
        self.loss = result.stats.loss
        self.step_seconds.append(result.step_ns / NS_PER_S)
        if measure and result.program is self.prepared.program:
            self.measured[self.step] = result
        is_last = self.step == job.steps and job.validation.every > 0
        is_validated = self.validation is not None and (is_last or _is_due(self.step, job.validation.every))
        return self._line(result.stats, self.validate() if is_validated else None), rate

    def batch(self, step: int) -> Batch:
        """What step `step` (from 0) trains on."""
        return _batch(self.data, step, self.prepared.job.global_batch)

    def held_out_batches(self) -> Iterator[Batch]:
        """What is validated on each time."""
        job, data = self.prepared.job, self.validation
        assert data is not None
        per_pass = data.batches_per_pass if isinstance(data, OwnData) else None
        for number in range(min(job.validation.batches, per_pass or job.validation.batches)):
            yield _batch(data, number, job.global_batch, held_out=True)

    def validate(self) -> float:
        """Mean loss over what is validated on, of the model as it is in use."""
        job, model = self.prepared.job, self.one_step.model
        modes = {module: module.training for module in model.modules()}
        if parse_model(job.model).kind is not SourceKind.BUILTIN:  # which are the same in use
            model.eval()
        total, count, seen = 0.0, 0.0, []
        for batch in self.held_out_batches():
            seen.append(digest_of(batch))
            stats = self.one_step.execute(batch, "evaluate").stats
            assert stats is not None
            # what is not counted is a mean, and the last batch may be smaller
            weight = num_samples(batch) if stats.nominal_count == 1 else 1
            total, count = total + weight * stats.loss_sum, count + weight * stats.count
        for module, is_training in modes.items():
            module.training = is_training
        self.held_out.add(" ".join(seen))
        if (
            self.last_batch is not None
        ):  # a checkpoint holds what a step changes, not what an evaluation reads
            self.one_step.ready(self.last_batch)
        return total / count if count else nan

    def _line(self, stats: StepStatistics, validation: float | None) -> StepLine:
        seconds = self.step_seconds[-1]
        self.ends_s.append(time.monotonic())
        return StepLine(
            step=self.step, loss=stats.loss, grad_norm=stats.grad_norm, step_seconds=seconds,
            rate=tokens_of(self.prepared) / seconds, rate_unit=self.predicted.rate_unit,
            eta_seconds=eta_s(self.ends_s, self.prepared.job.steps - self.step), validation_loss=validation,
        )  # fmt: skip

    def _record(self, line: StepLine, rate: float) -> dict[str, float | int | str | None]:
        predicted = self.predicted
        cost = predicted.cost_usd_per_step
        return {
            "step": line.step, "loss": line.loss, "grad_norm": line.grad_norm, "lr": rate,
            "step_time_s": line.step_seconds, "tokens_per_s": line.rate, "val_loss": line.validation_loss,
            "predicted_step_time_s": predicted.step_time_s, "predicted_mfu": predicted.mfu,
            "predicted_cost_usd": None if cost is None else cost * self.step,
        }  # fmt: skip

    def save(self) -> None:
        """Begin to write the checkpoint of the last step (once), and to drop old ones; what goes wrong with that is
        raised by the next call, or by `save_now`."""
        job, step = self.prepared.job, self.step
        if step in self.saved:
            return
        self.saver.wait()  # before there is a second copy of what chips hold
        self.saved.add(step)
        own = self.data if isinstance(self.data, OwnData) else None
        manifest = Manifest(
            step=step, steps=job.steps, sample=own.position(step) if own else step * job.global_batch, seed=job.seed,
            plan=plan_to_yaml(self.prepared.plan), rates=tuple(self.schedule.rates), evidence=evidence(self),
        )  # fmt: skip
        self.saver.begin(
            partial(_write, self.run_dir, manifest, self.one_step.training_state(), job.checkpoints.keep)
        )
        self.saved_at_s = self.clock()

    def save_now(self) -> None:
        """The checkpoint of the last step is there when this returns."""
        self.save()
        self.saver.wait()


def _write(run_dir: RunDir, manifest: Manifest, state: checkpoint.TrainingState, keep: int) -> None:
    checkpoint.save(run_dir.checkpoints, manifest, state)
    checkpoint.prune(run_dir.root, keep)


def tokens_of(prepared: Prepared) -> int:
    """What a step processes, over all chips: tokens, or samples of what has none."""
    return int(prepared.program.facts["tokens"])


def _batch(data: TokenData | OwnData, number: int, samples: int, *, held_out: bool = False) -> Batch:
    """The batch of a step, or the one of so many on which is validated."""
    if isinstance(data, OwnData):
        return data.batch(number)
    wanted = range(number * samples, (number + 1) * samples)
    return data.validation_batch(wanted) if held_out else data.batch(wanted)


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


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
