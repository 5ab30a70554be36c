"""The training loop: steps, validation, checkpoints and what is shown of them, for any runner.

Assumes nothing about where chips are. Everything that may be lost is written as it happens: metrics line by line,
checkpoints whole or not at all; what becomes of an interrupt and of a step that fails is decided by `failure`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from comms.errors import RunError
from kernels.optimizers import StepStatistics
from orchestrator.planning.preparation import Prepared
from orchestrator.runners.failure import not_finite
from orchestrator.runners.runner import Batches, ExecutedStep, StepRequest, TensorRunner
from orchestrator.runners.timing.prediction import SimulationResult
from orchestrator.runners.timing.step_costs import NS_PER_S
from orchestrator.runs import checkpoint
from orchestrator.runs.data import TokenData, split_batch
from orchestrator.runs.learning_rate import learning_rate
from orchestrator.runs.metrics import eta_s, metrics_writer
from orchestrator.runs.run_dir import RunDir
from orchestrator.views.training_view import StepLine

RECENT_STEPS = 20  # step times that the throughput and the ETA are taken from
MEASURED_STEPS = 2  # steps after the first whose intervals are recorded for the timeline


@dataclass
class TrainingProgress:
    """What has happened so far; enough for the final summary."""

    step: int = 0
    losses: list[tuple[int, float]] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)
    measured: dict[int, ExecutedStep] = field(default_factory=dict)  # by step
    was_interrupted: bool = False

    def recent_step_seconds(self) -> float:
        """Median of the last step times: the first ones include warm-up."""
        recent = sorted(self.step_seconds[-RECENT_STEPS:])
        return recent[len(recent) // 2] if recent else 0.0


@dataclass(frozen=True)
class Training:
    """Everything a loop needs, put together by `verbs.train`."""

    prepared: Prepared
    runner: TensorRunner
    data: TokenData
    run_dir: RunDir
    predicted: SimulationResult
    warn: Callable[[str], None]
    saved: set[int] = field(default_factory=set)  # steps that this process has written

    def run(
        self, progress: TrainingProgress, show: Callable[[StepLine], None], is_stopping: Callable[[], bool]
    ) -> None:
        """Train from `progress.step` to the job's last step, or to the step at whose end `is_stopping()`; then save."""
        job = self.prepared.job
        with metrics_writer(self.run_dir.metrics) as write:
            while progress.step < job.steps and not progress.was_interrupted:
                line = self._step(progress)
                write(self._record(line))
                show(line)
                if _is_due(progress.step, job.checkpoints.every):
                    self.save(progress.step)
                progress.was_interrupted = is_stopping() and progress.step < job.steps
        self.save(progress.step)

    def _step(self, progress: TrainingProgress) -> StepLine:
        job, step = self.prepared.job, progress.step
        first = step * job.global_batch
        batches = split_batch(self.data.batch(range(first, first + job.global_batch)), self.prepared.plan)
        measure = 1 <= len(progress.step_seconds) <= MEASURED_STEPS
        result = self.runner.run(StepRequest("step", self._lr(step), batches, measure=measure))
        assert result.stats is not None
        if not result.stats.is_finite:
            error = not_finite(step + 1, self._cause(step, batches))
            self.save(step)
            raise error
        progress.step = step + 1
        progress.losses.append((progress.step, result.stats.loss))
        progress.step_seconds.append(result.step_ns / NS_PER_S)
        if measure:
            progress.measured[progress.step] = result
        is_last = progress.step == job.steps and job.validation.every > 0
        is_validated = is_last or _is_due(progress.step, job.validation.every)
        return self._line(progress, result.stats, self.validate() if is_validated else None)

    def _lr(self, step: int) -> float:
        job = self.prepared.job
        return learning_rate(step, peak=job.optimizer.lr, schedule=job.lr_schedule, steps=job.steps)

    def _cause(self, step: int, batches: Batches) -> str | None:
        """Run the same step again looking at every result: the optimizer has skipped it, so nothing has changed."""
        found = self.runner.run(StepRequest("step", self._lr(step), batches, check=True)).first_bad
        return found[1] if found else None

    def validate(self) -> float:
        """Mean loss per token over the job's validation batches."""
        job = self.prepared.job
        total, count = 0.0, 0.0
        for batch in range(job.validation.batches):
            first = batch * job.global_batch
            samples = self.data.validation_batch(range(first, first + job.global_batch))
            batches = split_batch(samples, self.prepared.plan)
            stats = self.runner.run(StepRequest("evaluate", batches=batches)).stats
            assert stats is not None
            total, count = total + stats.loss_sum, count + stats.count
        return total / count

    def _line(self, progress: TrainingProgress, stats: StepStatistics, validation: float | None) -> StepLine:
        job, predicted, seconds = self.prepared.job, self.predicted, progress.step_seconds[-1]
        exposed = sum(s for _, s in predicted.breakdown.exposed_communication_s)
        cost = predicted.cost_usd_per_step
        return StepLine(
            step=progress.step, loss=stats.loss, grad_norm=stats.grad_norm, step_seconds=seconds,
            tokens_per_s=job.global_batch * job.seq / seconds, mfu=predicted.mfu,
            memory_bytes=max(role.peak_bytes for role in predicted.memory),
            predicted_seconds=predicted.step_time_s, exposed_communication=exposed / predicted.step_time_s,
            cost_usd=None if cost is None else cost * progress.step,
            eta_seconds=eta_s(progress.step_seconds[-RECENT_STEPS:], job.steps - progress.step),
            validation_loss=validation,
        )  # fmt: skip

    def _record(self, line: StepLine) -> dict[str, float | int | str | None]:
        return {
            "step": line.step, "loss": line.loss, "grad_norm": line.grad_norm, "lr": self._lr(line.step - 1),
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
        states = {f"chip-{chip:05d}": dict(state) for chip, state in self.runner.states().items() if state}
        checkpoint.save(self.run_dir.checkpoints, manifest, states)
        checkpoint.prune(self.run_dir.root, job.checkpoints.keep)

    def restore(self) -> TrainingProgress:
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
        self.runner.restore({chip: shards.get(chip, {}) for chip in range(self.prepared.program.num_chips)})
        return TrainingProgress(step=manifest.step)


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
