"""Training: steps, validation and checkpoints, for any runner.

Assumes nothing about where chips are. Everything that may be lost is written as it happens: metrics line by line,
checkpoints whole or not at all, beside the steps; what becomes of a signal and of a step that fails is decided by
`failure`. When a checkpoint is taken changes no result.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from math import nan

from comms.errors import DataError, ModelError, UserError
from kernels.optimizers import StepStatistics
from orchestrator.models.model_specs import SourceKind, parse_model
from orchestrator.models.user_code import own_sources
from orchestrator.planning.job_parts import LrSchedule
from orchestrator.planning.preparation import Prepared
from orchestrator.runners.failure import not_finite
from orchestrator.runners.runner import ExecutedStep
from orchestrator.runners.timing.prediction import SimulationResult
from orchestrator.runners.timing.step_costs import NS_PER_S
from orchestrator.runs.checkpoints import checkpoint_folder as checkpoint
from orchestrator.runs.checkpoints.manifest import Manifest
from orchestrator.runs.checkpoints.saver import Saver
from orchestrator.runs.data import TokenData
from orchestrator.runs.metrics import Record, eta_s, metrics_writer
from orchestrator.runs.own_data import OwnData, digest_of, num_samples
from orchestrator.runs.run_dir import RunDir
from orchestrator.runs.sinks import Sink, sinks_of
from orchestrator.verbs.distribute import DistributedStep
from orchestrator.verbs.verification.first_step import verified_step
from orchestrator.verbs.verification.resumed_run import HeldOut, evidence
from orchestrator.views.training_view import StepLine
from partitioner.capture.batch_inputs import Batch
from partitioner.layout.parallel_plan import Plan, plan_to_yaml
from partitioner.program.program import Program

RECENT_STEPS = 20  # step times that the throughput is taken from
MEASURED_STEPS = 2  # steps after the first whose intervals are recorded for the timeline


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

    def run(
        self, show: Callable[[StepLine], None], is_stopping: Callable[[], bool], sinks: Sequence[Sink] = ()
    ) -> None:
        """Train from `step` to the job's last step, or to the one at whose end `is_stopping()`; begin to save that.

        Where it fails, what is being written is written to its end.
        """
        job = self.prepared.job
        self.ends_s.append(time.monotonic())
        self.saved_at_s = self.clock()
        try:
            with self._told(sinks) as tell:
                while self.step < job.steps and not self.was_interrupted:
                    line, rate = self._step()
                    tell(self._record(line, rate))
                    show(line)
                    if self._is_to_be_saved():
                        self.save()
                    self.was_interrupted = is_stopping() and self.step < job.steps
            self.save()
        except Exception as error:
            self._save_after(error)
            raise

    def _save_after(self, error: Exception) -> None:
        """What can be saved where a step failed; that error is the one to be told."""
        try:
            if isinstance(error, DataError | ModelError):  # the chips are well
                self.save()
            self.saver.wait()
        except UserError as other:
            self.warn(f"nothing was saved: {other.problem} ({other.where})")

    @contextmanager
    def _told(self, sinks: Sequence[Sink]) -> Iterator[Callable[[Record], None]]:
        """What writes down the record of a step and hands it to all who are to have it."""
        job, folder = self.prepared.job, self.run_dir
        facts = {"plan": str(self.prepared.plan), **job.model_dump()}
        with (
            metrics_writer(folder.metrics) as write,
            sinks_of(job.sinks, folder.root, facts, sinks, self.warn) as hand_on,
        ):

            def tell(record: Record) -> None:
                write(record)
                hand_on(record)

            yield tell

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
            predicted_seconds=self.predicted.step_time_s,
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
