"""Resuming: what a run directory and the options of `train --resume` make together, and the state to go on from.

A run fixes what is trained: model, data, optimizer, seed, batch. How it is carried out may change from one part of it
to the next: plan, cluster, number of chips, runner, checkpoints, and where it ends. What was used from which step on
stands in `run.yaml`. Nothing in the directory is touched before the state is on the chips, and compared.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from comms.errors import ConfigError, ModelError, RunError
from kernels.optimizers import entry_states, same_kind
from orchestrator.config.hardware.cluster import Cluster
from orchestrator.config.hardware.cluster_file import cluster_from
from orchestrator.config.job_file import Job, job_from, overridden
from orchestrator.config.schema import nearest
from orchestrator.config.yaml_file import Document, read_yaml
from orchestrator.planning.job_parts import JobParts
from orchestrator.planning.preparation import PLANNED, Prepared
from orchestrator.runners.executing.whole_state import MASTER
from orchestrator.runners.signals import held_back
from orchestrator.runs import metrics
from orchestrator.runs.checkpoints import checkpoint_folder as checkpoint
from orchestrator.runs.checkpoints.checkpoint_folder import Checkpoint, TrainingState
from orchestrator.runs.learning_rate import learning_rate
from orchestrator.runs.run_dir import RunDir
from orchestrator.verbs.inputs.options import RunnerKind, TrainOptions
from orchestrator.verbs.inputs.planned_inputs import Inputs, config_of, read_plan, write_prepared
from orchestrator.verbs.training.training_loop import Training
from orchestrator.verbs.verification.resumed_run import read_last, require_made, require_seen
from partitioner.layout.parallel_plan import Plan

FIXED_BY_RUN = ("job", "model", "data", "global_batch", "seq", "run_dir")
# Keys of a job that do not say what is trained
FREE = (*PLANNED, "checkpoints", "hang_timeout", "sinks", "steps")
USED = "used"  # in run.yaml: what was used from which step on


@dataclass(frozen=True)
class Resumed:
    """A run that is to go on: with what, from where; `config` is what run.yaml is to say from then on."""

    inputs: Inputs
    runner: RunnerKind
    found: Checkpoint | None  # None: from the start
    config: Mapping[str, object]
    said: tuple[str, ...]


def resumed(options: TrainOptions, folder: RunDir) -> Resumed:
    """What goes on in `folder` by these options. Raises UserError."""
    config, origin = folder.read_config(), str(folder.config)
    document, chips = config.get("cluster"), config.get("chips")
    if (
        not isinstance(document, dict)
        or not isinstance(config.get("job"), dict)
        or not isinstance(chips, int)
    ):
        raise ConfigError("not the configuration of a run", origin, "resume a folder that `train` made")
    runner = options.runner or _runner_of(config, origin)
    if options.cluster is not None:
        document, chips = dict(read_yaml(options.cluster).root), None
    found, given = _newest(folder), read_plan(options.plan)
    kept = _kept_plan(folder, found.checkpoint)
    whole = cluster_from(Document(str(options.cluster or origin), document, {}))
    cluster = whole.take(options.chips or (given.num_chips if given else chips))
    plan = given or (kept if not _asks_plan(options) and _is_for(kept, cluster) else None)
    job, kept_job = _job(config["job"], options, plan, origin)
    inputs = Inputs(cluster, job, plan, document)
    _require_steps(job, found.checkpoint)
    made = config_of(runner.value, cluster, document, kept_job) | {USED: config.get(USED, [])}
    return Resumed(inputs, runner, found.checkpoint, made, found.warnings)


def require_free(options: TrainOptions) -> None:
    """Raise ConfigError where an option says what is trained."""
    asked = [f"--{name.replace('_', '-')}" for name in FIXED_BY_RUN if getattr(options, name) is not None]
    keys = [text.partition("=")[0].strip() for text in options.overrides]
    asked += [f"--set {key}" for key in keys if key.partition(".")[0] not in FREE]
    if asked:
        problem = f"{asked[0]} cannot change a run that is resumed: it says what is trained"
        hint = "leave it out, or start a new run (free are --steps --plan --chips --cluster --runner, and "
        raise ConfigError(problem, "--resume", f"{hint}--set of {', '.join(FREE)})")


def _runner_of(config: Mapping[str, object], origin: str) -> RunnerKind:
    """What the run that is resumed was last carried out by."""
    usual = str(config.get("runner", RunnerKind.RAY))
    if usual not in list(RunnerKind):
        raise ConfigError(f"there is no runner {usual!r}", origin, nearest(usual, tuple(RunnerKind)))
    return RunnerKind(usual)


def _kept_plan(folder: RunDir, found: Checkpoint | None) -> Plan | None:
    """None where the run was stopped before it had one."""
    if folder.plan.exists():
        return read_plan(folder.plan)
    return found.manifest.planned if found else None


def _asks_plan(options: TrainOptions) -> bool:
    return any(text.partition("=")[0].strip().partition(".")[0] in PLANNED for text in options.overrides)


def _is_for(plan: Plan | None, cluster: Cluster) -> bool:
    return plan is not None and plan.num_chips == cluster.num_chips


def _job(kept: object, options: TrainOptions, plan: Plan | None, origin: str) -> tuple[Job, Job]:
    """The job beside its plan, which says more than what was asked for when it was chosen; and to be kept."""
    assert isinstance(kept, dict)
    steps = [] if options.steps is None else [f"steps={options.steps}"]
    bare = {key: value for key, value in kept.items() if key not in PLANNED}
    changes: Sequence[str] = (*steps, *options.overrides)
    job = job_from(overridden(Document(origin, bare if plan else kept, {}), changes))
    whole = job_from(overridden(Document(origin, bare if options.plan else kept, {}), changes))
    return job, whole


def _newest(folder: RunDir) -> checkpoint.NewestCheckpoint:
    found = checkpoint.latest(folder.root)
    if found.checkpoint is None and found.warnings:
        problem = f"there is no complete checkpoint: {found.warnings[0]}"
        raise RunError(problem, str(folder.root), "restore a checkpoint, or start a new run")
    return found


def _require_steps(job: Job, found: Checkpoint | None) -> None:
    reached = found.manifest.step if found else 0
    if job.steps < reached:
        problem = f"the run is at step {reached} already"
        raise ConfigError(problem, f"--steps {job.steps}", f"give at least {reached}")


def restore(training: Training, parts: JobParts, going: Resumed, say: Callable[[str], None]) -> None:
    """Put the state on the chips, compare what it was trained with, and only then touch the run directory."""
    for warning in going.said:
        training.warn(warning)
    job, found = training.prepared.job, going.found
    if found is not None:
        manifest = found.manifest
        require_made(training, manifest)
        held = checkpoint.load(found)
        _require_fit(training, held, found.folder)
        training.one_step.restore(held, manifest.step, parts.example_batch())
        training.step, training.schedule.steps = manifest.step, manifest.steps
        moves, last = training.one_step.traits.moves_groups, [manifest.evidence.program]
        training.schedule.replay(
            manifest.step, lambda: last.append(read_last(training, manifest)), moves_groups=moves
        )
        require_seen(training, manifest, last[-1])
        if (now := training.prepared.plan) != manifest.planned:
            say(f"goes on by the plan {now}; until now it was {manifest.planned}")
        _extend(training, manifest.steps, say)
    _settle(training, going)
    keep(training.run_dir, going.config, training.prepared, training.step)
    say(f"resumed at step {training.step} of {job.steps}")


def _require_fit(training: Training, held: TrainingState, folder: Path) -> None:
    """Names, shapes and dtypes of all that the chips take must be the model's."""
    module = training.one_step.model
    for what, there, here in (
        ("parameter", held.parameters, dict(module.named_parameters())),
        ("buffer", held.buffers, dict(module.named_buffers())),
    ):
        for name in sorted(there.keys() ^ here.keys()):
            side = "model" if name in there else "checkpoint"
            raise ModelError(
                f"the {side} has no {what} {name}", str(folder), "resume with the model as it was"
            )
        for name, value in here.items():
            if (value.shape, value.dtype) != (there[name].shape, there[name].dtype):
                was = f"{there[name].dtype} {list(there[name].shape)}"
                problem = (
                    f"the {what} {name} is {was} in the checkpoint, {value.dtype} {list(value.shape)} now"
                )
                raise ModelError(problem, str(folder), "resume with the model as it was")
    _require_states(training, held, folder)


def _require_states(training: Training, held: TrainingState, folder: Path) -> None:
    """States with a number for every entry of a parameter must be of its shape, where shards of it are stepped on."""
    params, hint = dict(training.one_step.model.named_parameters()), "resume with the model as it was"
    if odd := sorted(held.states.keys() - params.keys()):
        problem = f"the checkpoint has optimizer states of {odd[0]}, which the model has not"
        raise ModelError(problem, str(folder), hint)
    entries = entry_states(same_kind(training.one_step.optimizer)) | {MASTER}
    if training.prepared.program.facts["whole_tensors"]:
        return
    for name, own in held.states.items():
        for key in sorted(own.keys() & entries):
            if own[key].shape != params[name].shape:
                was, now = list(own[key].shape), list(params[name].shape)
                problem = f"{key} of {name} is {was} in the checkpoint, the parameter {now}"
                raise ModelError(problem, str(folder), hint)


def _extend(training: Training, steps: int, say: Callable[[str], None]) -> None:
    """The schedule goes by the new end from the next step on; where that moves the rate, it is said."""
    job, schedule = training.prepared.job, training.schedule
    schedule.steps = job.steps
    if job.steps == steps:
        return
    say(f"the run now ends at step {job.steps} instead of {steps}")
    if schedule.shape is not None and training.step < job.steps:
        shape, peak = schedule.shape, schedule.peaks[0]
        before, after = (
            learning_rate(training.step, peak=peak, schedule=shape, steps=end) for end in (steps, job.steps)
        )
        if before != after:
            training.warn(
                f"the learning rate goes by the new end: {after:.3g} in step {training.step + 1}, "
                f"{before:.3g} by the old one"
            )


def keep(folder: RunDir, config: Mapping[str, object], prepared: Prepared, step: int) -> None:
    """Write what a run is carried out by from `step` on, after what it was until then."""
    entry = {
        "from_step": step, "plan": str(prepared.plan), "chips": prepared.cluster.num_chips,
        "cluster": prepared.cluster.name, "runner": config["runner"], "steps": prepared.job.steps,
    }  # fmt: skip
    past = config.get(USED)
    used = [each for each in (past if isinstance(past, list) else ()) if _is_part(each)]
    if not used or {**used[-1], "from_step": step} != entry:
        used = [each for each in used if each["from_step"] < step] + [entry]
    with held_back():
        write_prepared(folder, prepared)
        folder.write_config({**config, USED: used})


def _is_part(entry: object) -> bool:
    """Whether it is what `keep` writes: run.yaml can be edited."""
    return isinstance(entry, dict) and isinstance(entry.get("from_step"), int)


def _settle(training: Training, going: Resumed) -> None:
    """From here on the directory is that of the run as it goes on."""
    folder = training.run_dir
    checkpoint.remove_partial(folder.root)
    for moved in checkpoint.set_aside(folder.root, going.found):
        training.warn(f"the damaged checkpoint is kept as {moved}")
    if missing := metrics.rewind_metrics(folder.metrics, training.step):
        problem = f"the metrics of steps {missing[0]} to {missing[-1]} are not there any more"
        training.warn(f"{problem} ({len(missing)} of {training.step}): {folder.metrics} was changed")
