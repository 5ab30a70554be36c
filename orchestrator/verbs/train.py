"""train: run a plan with real tensors, with the prediction beside the measurement.

`main` serves the command line, `run` is the same from Python. Ray starts in the background while the model is
captured; Ctrl-C once ends the run after the current step and saves, twice ends it at once.
"""

import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from comms.errors import ConfigError, ModelError
from comms.wording import scaled, seconds
from orchestrator.config.hardware.cluster import Cluster, Device
from orchestrator.config.job import Job
from orchestrator.planning.preparation import Prepared, build_model, prepare
from orchestrator.runners.executing.measured_timeline import measured_timeline
from orchestrator.runs import metrics, run_dir
from orchestrator.runs.baselines import baseline_losses
from orchestrator.runs.data import NUM_BYTES, load_data
from orchestrator.runs.disk import write_whole
from orchestrator.runs.run_dir import RunDir
from orchestrator.runs.timeline import Timeline
from orchestrator.verbs.inputs.options import RunnerKind, SimulateOptions, TrainOptions
from orchestrator.verbs.inputs.planned_inputs import Inputs, from_config, read_plan, resolve
from orchestrator.verbs.simulate import SimulationResult, answer, simulate
from orchestrator.verbs.training import Prediction, Progress, Training
from orchestrator.views.console import Console, Table, pairs
from orchestrator.views.perfetto import trace_gz
from orchestrator.views.plots import LossCurves, loss_png, timeline_png
from partitioner.layout.parallel_plan import Plan, plan_to_yaml
from partitioner.program.program_codec import encode
from partitioner.program.program_text import to_text

if TYPE_CHECKING:
    from orchestrator.models.model_builder import BuiltModel
    from orchestrator.runners.starting import Launch

INTERRUPTED = 130
FIXED_BY_RUN = (
    "cluster", "job", "model", "data", "plan", "chips", "global_batch", "seq", "steps", "run_dir",
)  # fmt: skip
TEXT_INPUTS = ("input_ids", "labels")
PLAIN_LINES = 10  # a line for every so many steps, off a terminal


@dataclass(frozen=True, slots=True)
class TrainResult:
    """How a run ended."""

    final_loss: float
    val_loss: float | None
    tokens_per_s: float
    predicted_step_time_s: float
    run_dir: Path
    steps: int
    was_interrupted: bool
    baselines: Mapping[str, float]

    def document(self) -> dict[str, object]:
        """As JSON values."""
        return {
            "final_loss": self.final_loss, "val_loss": self.val_loss, "tokens_per_s": self.tokens_per_s,
            "predicted_step_time_s": self.predicted_step_time_s, "run_dir": str(self.run_dir), "steps": self.steps,
            "was_interrupted": self.was_interrupted, "baselines": dict(self.baselines),
        }  # fmt: skip


def main(options: TrainOptions, console: Console) -> int:
    """The `train` verb."""
    inputs, folder = _inputs(options)
    runner = options.runner or _usual_runner(options, folder)
    if options.dry_run or runner is RunnerKind.SIMULATED:
        prepared = prepare(inputs.cluster, inputs.job, inputs.plan, progress=console)
        return answer(prepared, SimulateOptions(run_dir=options.run_dir), console)
    result = _train(inputs, runner, folder, console, resume=options.resume is not None)
    console.results(result.document(), [pairs("trained", _rows(result))])
    return INTERRUPTED if result.was_interrupted else 0


def _usual_runner(options: TrainOptions, folder: RunDir) -> RunnerKind:
    """Ray, or what the run that is resumed was started with."""
    return (
        RunnerKind.RAY
        if options.resume is None
        else RunnerKind(str(folder.read_config().get("runner", RunnerKind.RAY)))
    )


def run(
    cluster: Cluster, job: Job, *, plan: Plan | None = None, runner: str = "inline", folder: str | Path | None = None,
    document: Mapping[str, object] | None = None, console: Console | None = None,
) -> TrainResult:  # fmt: skip
    """Train `job` on `cluster`; the run directory is `folder`, or a new one below runs/.

    `document` is the cluster file's content, needed only to resume the run from its folder alone.
    """
    inputs = Inputs(cluster, job, plan, document or {})
    made = run_dir.create(Path(folder) if folder else None, job=_name(job))
    return _train(inputs, RunnerKind(runner), made, console or Console(), resume=False)


def _inputs(options: TrainOptions) -> tuple[Inputs, RunDir]:
    if options.resume is None:
        inputs = resolve(options, demonstrate=True)
        if options.dry_run or options.runner is RunnerKind.SIMULATED:
            return inputs, RunDir(Path())
        return inputs, run_dir.create(options.run_dir, job=_name(inputs.job))
    given = [name for name in FIXED_BY_RUN if getattr(options, name) is not None]
    if given or options.overrides:
        flag = f"--{given[0].replace('_', '-')}" if given else "--set"
        raise ConfigError(
            f"{flag} cannot change a run that is resumed", "--resume", "leave it out, or start a new run"
        )
    folder = run_dir.resume(options.resume)
    return from_config(folder.read_config(), read_plan(folder.plan), str(folder.config)), folder


def _name(job: Job) -> str:
    return job.model.rpartition(":")[2] if job.model.startswith(("builtin:", "hf:")) else "run"


def _train(
    inputs: Inputs, runner: RunnerKind, folder: RunDir, console: Console, *, resume: bool
) -> TrainResult:
    console.log_to(folder.log)
    data = load_data(inputs.job.data, seq=inputs.job.seq, seed=inputs.job.seed)
    launch = _launch(inputs.cluster, runner)
    try:
        prepared = prepare(inputs.cluster, inputs.job, inputs.plan, progress=console)
        if not resume:
            _write_inputs(folder, inputs, prepared, runner)
        with console.phase("simulate"):
            predicted = simulate(prepared.program, prepared.cluster)
        executor = launch.connect(prepared, console)
    except BaseException:
        launch.close()
        raise
    try:
        training = Training(
            prepared, executor, data, folder, _prediction(predicted), time.perf_counter, console.warn
        )
        return _loop(training, predicted, console, resume=resume)
    finally:
        executor.close()


def _launch(cluster: Cluster, runner: RunnerKind) -> "Launch":
    if runner is RunnerKind.RAY:
        from orchestrator.runners.on_ray.ray_start import RayLaunch

        return RayLaunch(cluster)
    from orchestrator.runners.starting import InlineLaunch

    return InlineLaunch(cluster)


def _write_inputs(folder: RunDir, inputs: Inputs, prepared: Prepared, runner: RunnerKind) -> None:
    folder.write_config(inputs.config(runner.value))
    folder.write_plan(plan_to_yaml(prepared.plan))
    folder.write_program(to_text(prepared.program), encode(prepared.program))


def _prediction(result: SimulationResult) -> Prediction:
    exposed = sum(s for _, s in result.breakdown.exposed_communication_s)
    return Prediction(
        result.step_time_s, result.mfu, exposed / result.step_time_s, result.cost_usd_per_step,
        max(role.peak_bytes for role in result.memory),
    )  # fmt: skip


def _loop(training: Training, predicted: SimulationResult, console: Console, *, resume: bool) -> TrainResult:
    job, data, folder = training.prepared.job, training.data, training.run_dir
    with console.phase("load parameters"):
        model = build_model(job, "cpu")
        _require_bytes(model, job)
        values = {f"params:{k}": v.detach() for k, v in model.module.named_parameters()}
        values |= {f"buffer:{k}": v for k, v in model.module.named_buffers()}
        training.executor.load(values.__getitem__)
    progress = training.restore() if resume else Progress()
    if resume:
        metrics.rewind_metrics(folder.metrics, progress.step)
        console.say(f"resumed at step {progress.step} of {job.steps}")
    with console.phase("n-gram baselines"):
        baselines = baseline_losses(data.train, data.validation)
    console.show([_facts(training, predicted, baselines), console.phase_table()])
    with console.training(job.model, job.steps, every=PLAIN_LINES) as show, _stopping() as stop:
        training.run(progress, show, stop.is_set)
    _write_results(training, progress, predicted.timeline(), baselines)
    earlier = [r for r in metrics.read_metrics(folder.metrics) if r.get("val_loss") is not None]
    step_s = progress.recent_step_seconds()
    return TrainResult(
        final_loss=progress.losses[-1][1] if progress.losses else float("nan"),
        val_loss=float(str(earlier[-1]["val_loss"])) if earlier else None,
        tokens_per_s=job.global_batch * job.seq / step_s if step_s else 0.0,
        predicted_step_time_s=predicted.step_time_s, run_dir=folder.root, steps=progress.step,
        was_interrupted=progress.was_interrupted, baselines=baselines,
    )  # fmt: skip


def _require_bytes(model: "BuiltModel", job: Job) -> None:
    """Training feeds text: the model must take it."""
    inputs = sorted(model.example_batch(1, job.seq))
    if inputs != sorted(TEXT_INPUTS):
        problem = f"the model takes {', '.join(inputs)}, but train feeds text as {', '.join(TEXT_INPUTS)}"
        raise ModelError(problem, job.model,
                         "use orchestrator.distribute(model, optimizer, cluster) with batches of your own")  # fmt: skip
    if model.vocab_size is not None and model.vocab_size < NUM_BYTES:
        raise ModelError(f"a vocabulary of {model.vocab_size} is too small for bytes", job.model,
                         f"give it at least {NUM_BYTES} entries")  # fmt: skip


@contextmanager
def _stopping() -> Iterator[threading.Event]:
    """The first SIGINT asks for the end after this step, the second ends at once."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = signal.getsignal(signal.SIGINT)

    def ask(number: int, frame: FrameType | None) -> None:
        if stop.is_set():
            signal.default_int_handler(number, frame)
        stop.set()

    signal.signal(signal.SIGINT, ask)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)


def _facts(training: Training, predicted: SimulationResult, baselines: Mapping[str, float]) -> Table:
    prepared, data = training.prepared, training.data
    program, cluster = prepared.program, prepared.cluster
    chip = "simulated " if cluster.device is Device.SIMULATED else ""
    rows = [
        ("model", f"{prepared.job.model}, {scaled(float(program.facts['params']), '')} parameters"),
        ("plan", f"{prepared.plan} on {cluster.num_chips} {chip}{cluster.chip(0).name}"),
        (
            "data",
            f"{data.name}: {scaled(len(data.train), 'B')} to train on, {scaled(len(data.validation), 'B')} held out",
        ),
        ("predicted step on these chips", f"{seconds(predicted.step_time_s)} (fidelity folded)"),
        *((f"validation loss of a {name}", f"{loss:.3f} nats/byte") for name, loss in baselines.items()),
        ("run directory", str(training.run_dir.root)),
    ]
    return pairs("training", rows)


def _write_results(
    training: Training, progress: Progress, predicted: Timeline, baselines: Mapping[str, float]
) -> None:
    """Timelines, trace and plots; of a run that was resumed the curves are whole, from its metrics."""
    folder, program = training.run_dir, training.prepared.program
    records = metrics.read_metrics(folder.metrics)
    curve = [(int(str(r["step"])), float(str(r["loss"]))) for r in records if r.get("loss") is not None]
    points = [
        (int(str(r["step"])), float(str(r["val_loss"]))) for r in records if r.get("val_loss") is not None
    ]
    if curve:
        curves = LossCurves(
            train=tuple(curve), validation=tuple(points), baselines=baselines, unit="nats per byte"
        )
        write_whole(folder.loss_plot, loss_png(curves))
    measured = measured_timeline(program, progress.marks) if progress.marks else None
    folder.write_timeline(predicted)
    if measured is not None:
        folder.write_timeline(measured)
    timelines = [t for t in (predicted, measured) if t is not None]
    write_whole(folder.trace, trace_gz(*timelines))
    write_whole(folder.timeline_plot, timeline_png(predicted, measured))


def _rows(result: TrainResult) -> list[tuple[str, str]]:
    validation = "not measured" if result.val_loss is None else f"{result.val_loss:.4f} nats/byte"
    return [
        ("final loss", f"{result.final_loss:.4f} nats/byte"),
        ("validation loss", validation),
        *((f"  {name} baseline", f"{loss:.4f} nats/byte") for name, loss in result.baselines.items()),
        ("tokens/s on this machine", scaled(result.tokens_per_s, "")),
        ("predicted step on the chips", seconds(result.predicted_step_time_s)),
        ("run directory", str(result.run_dir)),
    ]
