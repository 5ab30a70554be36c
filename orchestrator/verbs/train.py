"""train: run a plan with real tensors, with the prediction beside the measurement.

`main` serves the command line, `run` is the same from Python. Ray starts in the background while the model is
captured. A run directory can be resumed from the moment it is there; what signals do is said in `runners.signals`.

With --resume the run directory says what is trained (`training.resuming`), and its newest complete checkpoint from
where.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path

from comms.errors import ConfigError, ModelError
from comms.units import format_dollars, format_percent, format_scaled, format_seconds
from kernels.memory import keep_memory
from orchestrator.config.hardware.cluster import Cluster, Device
from orchestrator.config.job_file import Job
from orchestrator.models.model_builder import BuiltModel
from orchestrator.planning.job_parts import JobParts, LrSchedule, job_parts, validation_data
from orchestrator.planning.preparation import Prepared, program_under
from orchestrator.runners.failure import RunPhase
from orchestrator.runners.on_ray.ray_connection import is_job
from orchestrator.runners.runner import Launch
from orchestrator.runners.signals import OF_TERMINALS, StopRequest, StopSignal, held_back, stop_request
from orchestrator.runners.timing.fastest_plan import prepare
from orchestrator.runners.timing.prediction import SimulationResult, simulate
from orchestrator.runs import run_dir
from orchestrator.runs.data import NUM_BYTES, TokenData, baseline_losses, load_data
from orchestrator.runs.own_data import OwnData
from orchestrator.runs.run_dir import RunDir
from orchestrator.runs.run_lock import locked
from orchestrator.runs.sinks import Sink
from orchestrator.verbs.inputs.launch import cluster_sinks, launch_of
from orchestrator.verbs.inputs.options import RunnerKind, SimulateOptions, TrainOptions
from orchestrator.verbs.inputs.planned_inputs import Inputs, resolve
from orchestrator.verbs.simulate import answer, memory_short
from orchestrator.verbs.training.job_step import step_of_job
from orchestrator.verbs.training.results import TrainResult, write_results
from orchestrator.verbs.training.resuming import Resumed, keep, require_free, restore, resumed
from orchestrator.verbs.training.training_loop import Training
from orchestrator.verbs.verification.job_steps import TEXT_INPUTS
from orchestrator.views.console import Console, Table
from orchestrator.views.split_notes import say_split
from partitioner.layout.parallel_plan import Plan
from partitioner.program.program import Program

# Where runs of jobs are kept, in the home of who runs Ray, on the head's machine
OF_JOBS = "orchestrate-runs"
PLAIN_LINES = 10  # a line for every so many steps, off a terminal


def main(options: TrainOptions, console: Console) -> int:
    """The `train` verb. The simulated runner has no tensors to train: its answer is that of `simulate`."""
    keep_memory()
    if options.resume is not None:
        require_free(options)
        return _resume(options, run_dir.resume(options.resume), console)
    inputs, kind = resolve(options, demonstrate=True), options.runner or RunnerKind.RAY
    if _is_predicted(options, kind):
        return _predict(options, inputs, console)
    if options.run_dir is not None and is_job() and not options.run_dir.is_absolute():
        console.warn(
            f"--run-dir {options.run_dir} is in the job's own folder, which Ray removes: give a whole path"
        )
    folder = _created(options.run_dir, inputs, kind)
    with locked(folder.root, console.warn):
        made = _train(
            inputs, kind, folder, console, verify_first=options.verify_first, address=options.address
        )
        return _answer(made, console)


def _resume(options: TrainOptions, folder: RunDir, console: Console) -> int:
    with locked(folder.root, console.warn):
        with console.phase("verify the checkpoint"):
            going = resumed(options, folder)
        if _is_predicted(options, going.runner):
            return _predict(options, going.inputs, console)
        made = _train(
            going.inputs, going.runner, folder, console, going, verify_first=options.verify_first,
            address=options.address,
        )  # fmt: skip
        return _answer(made, console)


def run(
    cluster: Cluster, job: Job, *, plan: Plan | None = None, runner: str = "inline", folder: str | Path | None = None,
    document: Mapping[str, object] | None = None, console: Console | None = None, verify_first: bool = False,
    address: str | None = None,
) -> TrainResult:  # fmt: skip
    """Train `job` on `cluster`; the run directory is `folder`, or a new one below runs/.

    `document` is the cluster file's content, needed only to resume the run from its folder alone. `address`: of the
    Ray cluster to train on with runner "ray", as `train --address` takes it.
    `verify_first`: the run ends with a DifferenceError if its first step is not the same as one chip's.
    """
    inputs, kind = Inputs(cluster, job, plan, document or {}), RunnerKind(runner)
    made, console = _created(Path(folder) if folder else None, inputs, kind), console or Console()
    with locked(made.root, console.warn):
        return _train(inputs, kind, made, console, verify_first=verify_first, address=address)


def _is_predicted(options: TrainOptions, kind: RunnerKind) -> bool:
    is_predicted = options.dry_run or kind is RunnerKind.SIMULATED
    if is_predicted and options.address is not None:
        raise ConfigError("nothing is started that could use a Ray", "--address", "leave it out")
    if is_predicted and options.verify_first:
        raise ConfigError("nothing is trained that could be verified", "--verify-first", "leave it out")
    return is_predicted


def _predict(options: TrainOptions, inputs: Inputs, console: Console) -> int:
    prepared = prepare(inputs.cluster, inputs.job, inputs.plan, progress=console.phase)
    return answer(prepared, SimulateOptions(run_dir=options.run_dir), console)


def _created(folder: Path | None, inputs: Inputs, kind: RunnerKind) -> RunDir:
    """A new run directory, which can be resumed as soon as it is there."""
    # A job's working folder is Ray's and goes with the job.
    parent = Path.home() / OF_JOBS if is_job() else run_dir.PARENT
    with held_back():
        made = run_dir.create(folder, job=_name(inputs.job), parent=parent)
        made.write_config(inputs.config(kind.value))
    return made


def _answer(result: TrainResult, console: Console) -> int:
    console.results(result.document(), result.tables())
    return result.exit_code


def _name(job: Job) -> str:
    """What the run's folder is called after: a model, class or file."""
    words = job.model.split(":")
    return Path(words[1 if words[0] == "hf" else -1]).name


def _train(
    inputs: Inputs, kind: RunnerKind, folder: RunDir, console: Console, going: Resumed | None = None, *,
    verify_first: bool, address: str | None,
) -> TrainResult:  # fmt: skip
    console.log_to(folder.log)
    job = inputs.job
    if going is not None and going.found is not None:  # what is frozen is not on the chips alone
        job = job.model_copy(update={"weights": str(going.found.folder)})
    if going is None and kind is RunnerKind.INLINE and "hang_timeout" in job.model_fields_set:
        console.warn("hang_timeout has no effect: one process that cannot go on says so at once")
    text = None if job.has_own_data else load_data(job.data, seq=job.seq, seed=job.seed)
    with (
        _resumable(folder, console),
        stop_request() as stop,
        closing(_launched(inputs.cluster, kind, address)) as launch,
    ):
        launch.keep_logs(folder.logs)
        stop.enter(RunPhase.START)
        training, parts = _begun(inputs.cluster, job, inputs.plan, launch, text, folder, console, going)
        stop.enter(RunPhase.START)  # once more, as Ray is up
        if going is None:
            keep(folder, inputs.config(kind.value), training.prepared, 0)
        else:
            with console.phase("load the checkpoint"):
                restore(training, parts, going, console.say)
            if verify_first and training.step >= job.steps:
                raise ConfigError("no step is left that could be verified", "--verify-first", "leave it out")
        if verify_first:
            training.verify_next = console.say
        baselines: Mapping[str, float] = {}
        if text is not None:
            with console.phase("n-gram baselines"):
                baselines = baseline_losses(text.train, text.validation)
        console.show([_facts(training, baselines), console.phase_table()])
        return _trained(training, baselines, stop, console, cluster_sinks(launch, folder.root.name))


@contextmanager
def _resumable(folder: RunDir, console: Console) -> Iterator[None]:
    """A signal before the first step has its words, too."""
    try:
        yield
    except StopSignal as stopped:
        console.say(f"{stopped.name}: ended before a step was taken; "
                    f"go on with `orchestrate train --resume {folder.root}`")  # fmt: skip
        raise


def _launched(cluster: Cluster, kind: RunnerKind, address: str | None) -> Launch:
    """What is started for a run is not to be ended by signals that are meant for this process."""
    with held_back(OF_TERMINALS):
        return launch_of(cluster, kind, address)


def _begun(
    cluster: Cluster, job: Job, plan: Plan | None, launch: Launch, text: TokenData | None, folder: RunDir,
    console: Console, going: Resumed | None,
) -> tuple[Training, JobParts]:  # fmt: skip
    """The loop before its first step, and what the job names."""
    parts = None
    if job.has_own_parts:
        with console.phase("load what the job names"):
            parts = job_parts(job, "cpu")
    prepared = prepare(cluster, job, plan, progress=console.phase, parts=parts)
    say_split(prepared, console, resumed=going is not None)
    with console.phase("simulate"):
        predicted = simulate(prepared.program, prepared.cluster)
    if (short := memory_short(predicted)) is not None:
        console.warn(f"{short.problem} ({short.where}): real chips would not train this")
    return _training(prepared, parts, text, launch, folder, predicted, console)


def _trained(
    training: Training,
    baselines: Mapping[str, float],
    stop: StopRequest,
    console: Console,
    sinks: Sequence[Sink],
) -> TrainResult:
    """Steps, validation and checkpoints to the end or to a signal, and what is to be seen of it all."""
    job = training.prepared.job
    stop.enter(RunPhase.TRAINING)
    with console.training(job.model, job.steps, every=PLAIN_LINES) as show:
        training.run(show, stop.is_set, sinks)
    with console.phase("write the checkpoint"):
        training.save_now()
    stop.enter(RunPhase.OVER)
    result = write_results(training, baselines, stop.exit_code if training.was_interrupted else 0)
    if result.was_interrupted:
        console.say(f"{stop.name}: interrupted at step {result.steps} of {result.job_steps}; saved; "
                    f"go on with `orchestrate train --resume {training.run_dir.root}`")  # fmt: skip
    return result


def _training(
    prepared: Prepared, parts: JobParts | None, text: TokenData | None, launch: Launch, folder: RunDir,
    predicted: SimulationResult, console: Console,
) -> tuple[Training, JobParts]:  # fmt: skip
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
    under = partial(_program_under, job, parts, console)
    return Training(prepared, step, schedule, data, held_out, folder, predicted, console.warn, under), parts


def _program_under(job: Job, parts: JobParts, console: Console, plan: Plan) -> Program:
    with console.phase("compare with the plan before"):
        own = parts if job.has_own_parts else None  # as they were given when the Program was prepared
        return program_under(job, plan, own, progress=console.phase)


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


def _facts(training: Training, baselines: Mapping[str, float]) -> Table:
    prepared, data = training.prepared, training.data
    program, cluster = prepared.program, prepared.cluster
    chip = "simulated " if cluster.device is Device.SIMULATED else ""
    rows = [
        ("model", f"{prepared.job.model}, {format_scaled(float(program.facts['params']), '')} parameters"),
        ("plan", f"{prepared.plan} on {cluster.num_chips} {chip}{cluster.chip(0).name}"),
        ("data", _data_words(data, training)),
        ("predicted step on these chips", _predicted_words(training.predicted, prepared.job.steps)),
        ("measured on this machine", f"step, {training.predicted.rate_unit} and ETA of the lines below"),
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
