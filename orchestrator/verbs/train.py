"""train: run a plan with real tensors, with the prediction beside the measurement.

`main` serves the command line, `run` is the same from Python. Ray starts in the background while the model is
captured; Ctrl-C once ends the run after the current step and saves, twice ends it at once.

With --resume the run directory says what is trained (`planned_inputs.from_config`), and its newest complete checkpoint
from where (`runs.checkpoint.latest`).
"""

import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from types import FrameType

from comms.errors import ConfigError, ModelError
from comms.units import format_dollars, format_percent, format_scaled, format_seconds
from orchestrator.config.hardware.cluster import Cluster, Device
from orchestrator.config.job_file import Job
from orchestrator.config.schema import nearest
from orchestrator.models.model_builder import BuiltModel
from orchestrator.planning.job_parts import JobParts, LrSchedule, job_parts, validation_data
from orchestrator.planning.preparation import Prepared
from orchestrator.runners.failure import RunEnd, interrupted
from orchestrator.runners.runner import Launch
from orchestrator.runners.timing.fastest_plan import prepare
from orchestrator.runners.timing.prediction import SimulationResult, simulate
from orchestrator.runs import metrics, run_dir
from orchestrator.runs.data import NUM_BYTES, TokenData, baseline_losses, load_data
from orchestrator.runs.own_data import OwnData
from orchestrator.runs.run_dir import RunDir
from orchestrator.verbs.distribute import launch_of
from orchestrator.verbs.inputs.options import INTERRUPTED, RunnerKind, SimulateOptions, TrainOptions
from orchestrator.verbs.inputs.planned_inputs import Inputs, from_config, read_plan, resolve, write_prepared
from orchestrator.verbs.job_step import step_of_job
from orchestrator.verbs.simulate import answer, memory_short
from orchestrator.verbs.training_loop import Training, TrainResult, write_results
from orchestrator.verbs.verification.job_steps import TEXT_INPUTS
from orchestrator.views.console import Console, Table
from orchestrator.views.split_notes import say_split
from partitioner.layout.parallel_plan import Plan

FIXED_BY_RUN = (
    "cluster", "job", "model", "data", "plan", "chips", "global_batch", "seq", "steps", "run_dir",
)  # fmt: skip
PLAIN_LINES = 10  # a line for every so many steps, off a terminal


def main(options: TrainOptions, console: Console) -> int:
    """The `train` verb. The simulated runner has no tensors to train: its answer is that of `simulate`."""
    inputs, folder = _inputs(options)
    runner = options.runner or (RunnerKind.RAY if options.resume is None else _runner_of(folder))
    if options.dry_run or runner is RunnerKind.SIMULATED:
        if options.verify_first:
            raise ConfigError("nothing is trained that could be verified", "--verify-first", "leave it out")
        prepared = prepare(inputs.cluster, inputs.job, inputs.plan, progress=console.phase)
        return answer(prepared, SimulateOptions(run_dir=options.run_dir), console)
    result = _train(
        inputs, runner, folder, console, resume=options.resume is not None, verify_first=options.verify_first
    )
    console.results(result.document(), result.tables())
    return INTERRUPTED if result.was_interrupted else 0


def run(
    cluster: Cluster, job: Job, *, plan: Plan | None = None, runner: str = "inline", folder: str | Path | None = None,
    document: Mapping[str, object] | None = None, console: Console | None = None, verify_first: bool = False,
) -> TrainResult:  # fmt: skip
    """Train `job` on `cluster`; the run directory is `folder`, or a new one below runs/.

    `document` is the cluster file's content, needed only to resume the run from its folder alone.
    `verify_first`: the run ends with a DifferenceError if its first step is not the same as one chip's.
    """
    inputs = Inputs(cluster, job, plan, document or {})
    made = run_dir.create(Path(folder) if folder else None, job=_name(job))
    return _train(
        inputs, RunnerKind(runner), made, console or Console(), resume=False, verify_first=verify_first
    )


def _inputs(options: TrainOptions) -> tuple[Inputs, RunDir]:
    if options.resume is None:
        inputs = resolve(options, demonstrate=True)
        if options.dry_run or options.runner is RunnerKind.SIMULATED:
            return inputs, RunDir(Path())
        return inputs, run_dir.create(options.run_dir, job=_name(inputs.job))
    given = [name for name in FIXED_BY_RUN if getattr(options, name) is not None]
    if given or options.overrides:
        flag = f"--{given[0].replace('_', '-')}" if given else "--set"
        problem = f"{flag} cannot change a run that is resumed"
        raise ConfigError(problem, "--resume", "leave it out, or start a new run")
    folder = run_dir.resume(options.resume)
    return from_config(folder.read_config(), read_plan(folder.plan), str(folder.config)), folder


def _runner_of(folder: RunDir) -> RunnerKind:
    """What the run that is resumed was started with."""
    usual = str(folder.read_config().get("runner", RunnerKind.RAY))
    if usual not in list(RunnerKind):
        raise ConfigError(
            f"there is no runner {usual!r}", str(folder.config), nearest(usual, tuple(RunnerKind))
        )
    return RunnerKind(usual)


def _name(job: Job) -> str:
    """What the run's folder is called after: a model, class or file."""
    words = job.model.split(":")
    return Path(words[1 if words[0] == "hf" else -1]).name


def _train(
    inputs: Inputs, kind: RunnerKind, folder: RunDir, console: Console, *, resume: bool, verify_first: bool
) -> TrainResult:
    console.log_to(folder.log)
    job = inputs.job
    text = None if job.has_own_data else load_data(job.data, seq=job.seq, seed=job.seed)
    with closing(launch_of(inputs.cluster, kind)) as launch:
        parts = None
        if job.has_own_parts:
            with console.phase("load what the job names"):
                parts = job_parts(job, "cpu")
        prepared = prepare(inputs.cluster, job, inputs.plan, progress=console.phase, parts=parts)
        say_split(prepared, console, resumed=resume)
        if not resume:
            folder.write_config(inputs.config(kind.value))
            write_prepared(folder, prepared)
        with console.phase("simulate"):
            predicted = simulate(prepared.program, prepared.cluster)
        if (short := memory_short(predicted)) is not None:
            console.warn(f"{short.problem} ({short.where}): real chips would not train this")
        training = _training(prepared, parts, text, launch, folder, predicted, console)
        if resume:
            training.restore()
            metrics.rewind_metrics(folder.metrics, training.step)
            console.say(f"resumed at step {training.step} of {job.steps}")
            if verify_first and training.step >= job.steps:
                raise ConfigError("no step is left that could be verified", "--verify-first", "leave it out")
        if verify_first:
            training.verify_next = console.say
        baselines: Mapping[str, float] = {}
        if text is not None:
            with console.phase("n-gram baselines"):
                baselines = baseline_losses(text.train, text.validation)
        console.show([_facts(training, baselines), console.phase_table()])
        with console.training(job.model, job.steps, every=PLAIN_LINES) as show, _stopping() as stop:
            training.run(show, stop.is_set)  # steps, validates, saves
        result = write_results(training, baselines)
        if result.was_interrupted:
            console.say(f"interrupted at step {result.steps} of {result.job_steps}; saved; "
                        f"go on with `orchestrate train --resume {folder.root}`")  # fmt: skip
        return result


def _training(
    prepared: Prepared, parts: JobParts | None, text: TokenData | None, launch: Launch, folder: RunDir,
    predicted: SimulationResult, console: Console,
) -> Training:  # fmt: skip
    """The loop, with parameters on the chips."""
    job, plan = prepared.job, prepared.plan
    with console.phase("load parameters"):
        parts = parts or job_parts(job, "cpu")
        for said in parts.model.said:
            console.warn(said)
        data = parts.data or text
        assert data is not None, "there is text where there is no data of the user's"
        if text is not None:
            _require_bytes(parts.model, job)
        held_out = text or validation_data(parts)
        for own in (parts.data, held_out):
            if isinstance(own, OwnData):
                own.require_parts(plan.dp * plan.microbatches)
        schedule = LrSchedule(job, parts.optimizer)
    step = step_of_job(prepared, parts, parts.optimizer, launch, console.phase)
    return Training(prepared, step, schedule, data, held_out, folder, predicted, console.warn)


def _require_bytes(model: BuiltModel, job: Job) -> None:
    """Training feeds text: the model must take it."""
    inputs = sorted(model.example_batch(1, job.seq))
    if inputs != sorted(TEXT_INPUTS) or not model.takes_text:
        what = f"takes {', '.join(inputs)}" if model.takes_text else "predicts something else"
        problem = f"the model {what}, but text is fed as {', '.join(TEXT_INPUTS)}: bytes and the next ones"
        raise ModelError(problem, job.model, "give batches of your own: --data file.py:name")
    if model.vocab_size is not None and model.vocab_size < NUM_BYTES:
        raise ModelError(f"a vocabulary of {model.vocab_size} is too small for bytes", job.model,
                         f"give it at least {NUM_BYTES} entries")  # fmt: skip


@contextmanager
def _stopping() -> Iterator[threading.Event]:
    """Set by the first SIGINT; what the second does is decided by `failure`: it ends the run at once."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = signal.getsignal(signal.SIGINT)

    def ask(number: int, frame: FrameType | None) -> None:
        if interrupted(2 if stop.is_set() else 1) is RunEnd.AT_ONCE:
            signal.default_int_handler(number, frame)
        stop.set()

    signal.signal(signal.SIGINT, ask)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)


def _facts(training: Training, baselines: Mapping[str, float]) -> Table:
    prepared, data = training.prepared, training.data
    program, cluster = prepared.program, prepared.cluster
    chip = "simulated " if cluster.device is Device.SIMULATED else ""
    rows = [
        ("model", f"{prepared.job.model}, {format_scaled(float(program.facts['params']), '')} parameters"),
        ("plan", f"{prepared.plan} on {cluster.num_chips} {chip}{cluster.chip(0).name}"),
        ("data", _data_words(data, training)),
        ("predicted step on these chips", _predicted_words(training.predicted, prepared.job.steps)),
        ("measured on this machine", f"step time, {training.predicted.rate_unit} and ETA of the lines below"),
        *((f"validation loss of a {name}", f"{loss:.3f} nats/byte") for name, loss in baselines.items()),
        ("run directory", str(training.run_dir.root)),
    ]
    return Table("training", rows)


def _predicted_words(predicted: SimulationResult, steps: int) -> str:
    """What is the same for every step."""
    exposed = sum(seconds for _, seconds in predicted.breakdown.exposed_communication_s)
    cost = predicted.cost_usd_per_step
    words = [
        format_seconds(predicted.step_time_s), f"MFU {format_percent(predicted.mfu)}",
        f"exposed comm {format_percent(exposed / (predicted.step_time_s or 1.0))}",
        f"peak memory {format_scaled(max(role.peak_bytes for role in predicted.memory), 'B')}",
        *([] if cost is None else [f"{format_dollars(cost)} per step, {format_dollars(cost * steps)} in all"]),
    ]  # fmt: skip
    return f"{', '.join(words)} (fidelity {predicted.step.fidelity})"


def _data_words(data: TokenData | OwnData, training: Training) -> str:
    if isinstance(data, TokenData):
        sizes = [format_scaled(len(part), "B") for part in (data.train, data.validation)]
        return f"{data.name}: {sizes[0]} to train on, {sizes[1]} held out"
    size = f"{len(data.source)} samples" if data.is_indexed else "a loader" if data.is_loader else "a stream"
    held_out = training.prepared.job.validation.data
    return f"{data.name}: {size}, as {', '.join(data.batch(training.step))}; validated on {held_out or 'nothing'}"
