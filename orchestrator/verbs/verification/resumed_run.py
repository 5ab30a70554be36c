"""Resumed runs: all that a checkpoint does not hold must be the same, or the run does not go on.

A checkpoint holds parameters, buffers and the optimizer's states. The rest is made anew by the same code when a run is
resumed: the Program with the numbers in it, settings, batches. Digests of it stand in the manifest and are compared
before a step is taken. A Program is one of a plan: where a run goes on by another plan, that of the plan before is made
once more to be compared. What code does later cannot be: of files of the user's that were edited since, and of other
versions of libraries, there is a warning.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Protocol

from comms.errors import RunError
from kernels.optimizers import group_settings
from orchestrator.planning.job_parts import LrSchedule
from orchestrator.planning.preparation import Prepared
from orchestrator.runs.checkpoints.manifest import Evidence, Manifest, SeenAgain
from orchestrator.runs.data import TokenData
from orchestrator.runs.own_data import OwnData, digest_of
from orchestrator.runs.run_dir import RunDir, versions
from orchestrator.verbs.distribute import DistributedStep
from partitioner.capture.batch_inputs import Batch
from partitioner.layout.parallel_plan import Plan
from partitioner.program.program import Program
from partitioner.program.program_codec import encode
from partitioner.program.program_text import to_text

SAID = (
    "merged",
    "model",
)  # facts of Programs: microbatches that could not be kept apart, and what the model is called
# What is not the same, and what to do: first of what the states are loaded into, then by key of what is compared.
MADE = ("the Program is another than the run was started with",
        "undo what was changed in the model, the loss or their files, or start a new run")  # fmt: skip
SEEN = {
    "settings": ("a setting is not what it was", "give the optimizer, scheduler and job that the run was started with"),
    "batch": ("the last batch before the checkpoint is read as another one",
              "draw from torch, numpy or random rather than a generator of your own; give the same data"),
    "last_program": ("numbers that the model's or the loss's code reads are not what they were in the last step",
                     "let them follow from the step, or start a new run"),
    "validation": ("what is validated on is read as something else",
                   "draw from torch, numpy or random rather than a generator of your own; give the same data"),
}  # fmt: skip


@dataclass(slots=True)
class HeldOut:
    """What has been validated on: how often, digests of the first and last time, and whether all were the same."""

    count: int = 0
    digest: str = ""
    is_same: bool = True

    def add(self, digest: str) -> None:
        self.is_same &= self.count == 0 or digest == self.digest
        self.count, self.digest = self.count + 1, digest


class Resumable(Protocol):
    """What a training loop is, as far as it is compared (see `training_loop.Training`)."""

    prepared: Prepared
    one_step: DistributedStep
    schedule: LrSchedule
    data: TokenData | OwnData
    run_dir: RunDir
    step: int
    last_batch: Batch | None
    last_program: Program | None
    held_out: HeldOut
    sources: Mapping[str, str]

    @property
    def warn(self) -> Callable[[str], None]: ...

    @property
    def program_under(self) -> Callable[[Plan], Program]: ...

    def batch(self, step: int) -> Batch: ...

    def held_out_batches(self) -> Iterator[Batch]: ...


def evidence(training: Resumable) -> Evidence:
    """What is kept beside a checkpoint."""
    program, batch = training.prepared.program, training.last_batch
    return Evidence(
        data=training.data.digest, program=_digest(program), last_program=_digest(training.last_program or program),
        settings=_settings(training), batch=digest_of(batch) if batch else "",
        validation=SeenAgain(**asdict(training.held_out)), sources=dict(training.sources), versions=versions(),
    )  # fmt: skip


def require_made(training: Resumable, manifest: Manifest) -> None:
    """Raise RunError where what states are to be loaded into is not what it was."""
    if manifest.evidence.data != training.data.digest:
        problem = "the data is not what the run was trained on"
        raise RunError(problem, training.data.name, "give the same data")
    _require_norms(training, manifest.planned)
    if _digest(program := _as_before(training, manifest)) != manifest.evidence.program:
        more, where = _first_line(training, program, manifest)
        raise RunError(f"{MADE[0]}{more}", where, MADE[1])


def _require_norms(training: Resumable, before: Plan) -> None:
    """Batch norms by the statistics of each part are trained as so many parts."""
    now = training.prepared.plan
    if now.norm_parts != before.norm_parts:
        problem = (
            f"batch norms saw {before.norm_parts} parts of a batch, by this plan they see {now.norm_parts}"
        )
        raise RunError(problem, f"plan {now}", "keep batch_norm, and dp x microbatches where it is per_part")


def _as_before(training: Resumable, manifest: Manifest) -> Program:
    """The Program by the plan of the checkpoint."""
    is_same = manifest.planned == training.prepared.plan
    return training.prepared.program if is_same else training.program_under(manifest.planned)


def read_last(training: Resumable, manifest: Manifest) -> str:
    """Read the batch of the last step again, before what the schedule does after a step. The digest of its Program, by
    the plan of the checkpoint."""
    was = manifest.evidence
    training.last_batch = training.batch(training.step - 1)
    training.last_program = training.one_step.ready(training.last_batch)[1]
    found = _digest(training.last_program)
    if manifest.planned == training.prepared.plan:
        return found
    if was.last_program == was.program and found == _digest(training.prepared.program):
        return was.program  # which was compared
    return _digest(training.one_step.program_by(training.last_batch, manifest.planned))


def require_seen(training: Resumable, manifest: Manifest, last_program: str) -> None:
    """Raise RunError where anything that was read last (see `read_last`) is not what it was; then warn."""
    was = manifest.evidence
    # All times where they differed: a generator that goes on from one to the next must come as far.
    for _ in range(was.validation.count if not was.validation.is_same else min(was.validation.count, 1)):
        training.held_out.add(" ".join(map(digest_of, training.held_out_batches())))
    training.held_out.count = was.validation.count
    found = evidence(training).model_copy(update={"last_program": last_program})
    if tuple(training.schedule.rates) != manifest.rates:
        problem = "the learning rate is not what it was when the run was saved"
        raise RunError(
            problem, "lr_schedule", "give the optimizer and the scheduler that it was started with"
        )
    for key, (problem, hint) in SEEN.items():
        if getattr(found, key) != getattr(was, key):
            more, where = _difference(training, key, getattr(was, key), getattr(found, key))
            raise RunError(f"{problem}{more}", where, hint)
    _warn(training, was)


def _warn(training: Resumable, was: Evidence) -> None:
    for name, digest in was.sources.items():
        if training.sources.get(name, digest) != digest:
            training.warn(f"{name} was edited since the run was started; what it says holds from step "
                          f"{training.step + 1} on")  # fmt: skip
    for name, version in versions().items():
        if (before := was.versions.get(name, version)) != version:
            model = training.prepared.job.model
            training.warn(f"{name} is {version}, the run of {model} was trained by {before} until now")


def _difference(training: Resumable, key: str, was: object, now: object) -> tuple[str, str]:
    """Which part of it differs, if that can be told, and where."""
    places = {"batch": training.data.name, "validation": str(training.prepared.job.validation.data)}
    if key == "settings" and isinstance(was, dict) and isinstance(now, dict):
        name = next(each for each in (*was, *now) if was.get(each) != now.get(each))
        return f": {name} was {was.get(name)}, is {now.get(name)}", "optimizer"
    return "", places.get(key, training.prepared.job.model)


def _first_line(training: Resumable, program: Program, manifest: Manifest) -> tuple[str, str]:
    """Where the text of the Program first differs from what the run directory has, if that is by the same plan."""
    path, plan = training.run_dir.program_text, training.run_dir.plan
    is_kept = path.exists() and plan.exists() and plan.read_text(encoding="utf-8") == manifest.plan
    before = path.read_text(encoding="utf-8").splitlines() if is_kept else []
    lines = tuple(f"meta {name} " for name in SAID)
    numbered = [(number, line) for number, line in enumerate(before, 1) if not line.strip().startswith(lines)]
    now = to_text(_of_plan(program)).splitlines()
    for (number, old), new in zip([*numbered, (len(before), "")], [*now, ""], strict=False):
        if old != new and before:
            return f": `{old.strip()}` has become `{new.strip()}`", f"{path}:{number}"
    return "", str(path)


def _digest(program: Program) -> str:
    return hashlib.sha256(encode(_of_plan(program))).hexdigest()


def _of_plan(program: Program) -> Program:
    """As it is made from the plan that was kept, which says nothing of the one that was asked for."""
    return replace(program, meta=tuple((name, fact) for name, fact in program.meta if name not in SAID))


def _settings(training: Resumable) -> dict[str, str]:
    """By name, as text: repr of a number is exact."""
    step, optimizer = training.one_step, training.one_step.optimizer
    groups = enumerate(group_settings(optimizer))
    found = {f"{name} of group {i}": repr(value) for i, group in groups for name, value in group.items()}
    kind = type(optimizer).__name__
    return {"the kind": kind, "seed": str(step.seed), "clip_norm": repr(step.clip_norm), **found}
