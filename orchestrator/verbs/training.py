"""The training loop: steps, validation, checkpoints and what is shown of them, for any executor.

Assumes nothing about where chips are. Everything that may be lost is written as it happens: metrics line by line,
checkpoints whole or not at all; Ctrl-C and a failed step save what can be saved.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from comms.errors import RunError
from kernels.optimizers import StepStatistics
from orchestrator.planning.preparation import Prepared
from orchestrator.runners.executing.chip import Mark
from orchestrator.runners.executing.executor import Batches, Executor
from orchestrator.runs import checkpoint
from orchestrator.runs.batches import split_batch
from orchestrator.runs.data import TokenData
from orchestrator.runs.lr_schedule import learning_rate
from orchestrator.runs.metrics import MetricsWriter, eta_s
from orchestrator.runs.run_dir import RunDir
from orchestrator.views.training_view import StepLine

RECENT_STEPS = 20  # step times that the throughput and the ETA are taken from
MEASURED_STEPS = 2  # steps after the first whose intervals are recorded for the timeline


@dataclass(frozen=True, slots=True)
class Prediction:
    """What the simulator says of a step on the described chips."""

    step_time_s: float
    mfu: float
    exposed_communication: float
    cost_usd_per_step: float | None
    peak_memory_bytes: int


@dataclass
class Progress:
    """What has happened so far; enough for the final summary."""

    step: int = 0
    losses: list[tuple[int, float]] = field(default_factory=list)
    validation: list[tuple[int, float]] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)
    marks: dict[int, tuple[Mark, ...]] = field(default_factory=dict)
    was_interrupted: bool = False

    def recent_step_seconds(self) -> float:
        """Median of the last step times: the first ones include warm-up."""
        recent = sorted(self.step_seconds[-RECENT_STEPS:])
        return recent[len(recent) // 2] if recent else 0.0


@dataclass(frozen=True)
class Training:
    """Everything a loop needs, put together by `verbs.train`."""

    prepared: Prepared
    executor: Executor
    data: TokenData
    run_dir: RunDir
    prediction: Prediction
    clock: Callable[[], float]
    warn: Callable[[str], None]
    saved: set[int] = field(default_factory=set)  # steps that this process has written

    def run(
        self, progress: Progress, show: Callable[[StepLine], None], is_stopping: Callable[[], bool]
    ) -> None:
        """Train from `progress.step` to the job's last step, or to the step at whose end `is_stopping()`; then save."""
        job = self.prepared.job
        with MetricsWriter(self.run_dir.metrics) as metrics:
            while progress.step < job.steps and not progress.was_interrupted:
                show(self._step(progress, metrics))
                if self._is_due(progress.step, job.checkpoints.every):
                    self.save(progress.step)
                progress.was_interrupted = is_stopping() and progress.step < job.steps
        self.save(progress.step)

    def _is_due(self, step: int, every: int) -> bool:
        return every > 0 and step % every == 0

    def _step(self, progress: Progress, metrics: MetricsWriter) -> StepLine:
        job, step = self.prepared.job, progress.step
        lr = learning_rate(step, peak=job.optimizer.lr, schedule=job.lr_schedule, steps=job.steps)
        first = step * job.global_batch
        batches = split_batch(self.data.batch(range(first, first + job.global_batch)), self.prepared.plan)
        measure = 1 <= len(progress.step_seconds) <= MEASURED_STEPS
        start = self.clock()
        outcome = self.executor.step(lr, batches, measure=measure)
        seconds = self.clock() - start
        assert outcome.stats is not None
        if not outcome.stats.is_finite:
            self._explain_nan(step, lr, batches)
        progress.step = step + 1
        progress.losses.append((progress.step, outcome.stats.loss))
        progress.step_seconds.append(seconds)
        if measure:
            progress.marks[progress.step] = outcome.marks
        validation = None
        is_last = progress.step == job.steps and job.validation.every > 0
        if is_last or self._is_due(progress.step, job.validation.every):
            validation = self.validate()
            progress.validation.append((progress.step, validation))
        line = self._line(progress, outcome.stats, seconds, validation)
        metrics.write(self._record(line, lr))
        return line

    def _explain_nan(self, step: int, lr: float, batches: Batches) -> None:
        """Run the same step again looking at every result: the optimizer has skipped it, so nothing has changed."""
        outcome = self.executor.step(lr, batches, check=True)
        self.save(step)
        raise RunError(
            f"the loss or a gradient is not finite at step {step + 1}",
            outcome.first_bad[1] if outcome.first_bad else "the optimizer's statistics",
            "lower optimizer.lr or lengthen the warm-up; the checkpoint before this step is saved",
        )

    def validate(self) -> float:
        """Mean loss per token over the job's validation batches."""
        job = self.prepared.job
        total, count = 0.0, 0.0
        for batch in range(job.validation.batches):
            first = batch * job.global_batch
            samples = self.data.validation_batch(range(first, first + job.global_batch))
            stats = self.executor.evaluate(split_batch(samples, self.prepared.plan)).stats
            assert stats is not None
            total, count = total + stats.loss_sum, count + stats.count
        return total / count

    def _line(
        self, progress: Progress, stats: StepStatistics, seconds: float, validation: float | None
    ) -> StepLine:
        job, prediction = self.prepared.job, self.prediction
        tokens = job.global_batch * job.seq
        cost = prediction.cost_usd_per_step
        return StepLine(
            step=progress.step, loss=stats.loss, grad_norm=stats.grad_norm, step_seconds=seconds,
            tokens_per_s=tokens / seconds, mfu=prediction.mfu, memory_bytes=prediction.peak_memory_bytes,
            predicted_seconds=prediction.step_time_s, exposed_communication=prediction.exposed_communication,
            cost_usd=None if cost is None else cost * progress.step,
            eta_seconds=eta_s(progress.step_seconds[-RECENT_STEPS:], job.steps - progress.step),
            validation_loss=validation,
        )  # fmt: skip

    def _record(self, line: StepLine, lr: float) -> dict[str, float | int | str | None]:
        return {
            "step": line.step, "loss": line.loss, "grad_norm": line.grad_norm, "lr": lr,
            "step_time_s": line.step_seconds, "tokens_per_s": line.tokens_per_s, "val_loss": line.validation_loss,
            "predicted_step_time_s": line.predicted_seconds, "predicted_mfu": line.mfu,
            "predicted_cost_usd": line.cost_usd,
        }  # fmt: skip

    def save(self, step: int) -> None:
        """Write the checkpoint of `step` (once) and drop old ones."""
        job = self.prepared.job
        if step in self.saved:
            return
        self.saved.add(step)
        manifest = checkpoint.Manifest(
            step=step, sample=step * job.global_batch, seed=job.seed,
            layout={"plan": str(self.prepared.plan), "stages": str(self.prepared.program.facts["stages"])},
            extra={"data": self.data.digest},
        )  # fmt: skip
        states = {f"chip-{chip:05d}": dict(state) for chip, state in self.executor.states().items() if state}
        checkpoint.save(self.run_dir.checkpoints, manifest, states)
        checkpoint.prune(self.run_dir.root, job.checkpoints.keep)

    def restore(self) -> Progress:
        """Continue from the newest complete checkpoint of the run directory."""
        found = checkpoint.latest(self.run_dir.root)
        if found.checkpoint is None:
            raise RunError("there is no complete checkpoint", str(self.run_dir.root), "start a new run")
        for warning in found.warnings:
            self.warn(warning)
        checkpoint.remove_newer(self.run_dir.root, found.checkpoint)
        manifest = found.checkpoint.manifest
        if manifest.extra.get("data") != self.data.digest:
            raise RunError(
                "the data is not what the run was trained on", self.data.name, "give the same data"
            )
        shards = {
            int(name.rsplit("-", 1)[1]): tensors
            for name, tensors in checkpoint.load(found.checkpoint).items()
        }
        self.executor.restore({chip: shards.get(chip, {}) for chip in range(self.prepared.program.num_chips)})
        return Progress(step=manifest.step)
