"""Resumed runs: all that a checkpoint does not hold must be the same, or the run does not go on.

A checkpoint holds parameters, buffers that the forward changes and the optimizer's states. The rest is made anew by the
same code when a run is resumed: the Program with the numbers in it, other buffers, settings, batches. Digests of it
stand in the manifest and are compared before a step is taken. What code does later cannot be: of files of the user's
that were edited since, and of other versions of libraries, there is a warning.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

from comms.errors import RunError
from kernels.optimizers import group_settings
from orchestrator.planning.preparation import Prepared
from orchestrator.runs.data import TokenData
from orchestrator.runs.own_data import OwnData, digest_of
from orchestrator.runs.run_dir import RunDir, versions
from orchestrator.verbs.distribute import DistributedStep
from partitioner.capture.batch_inputs import Batch
from partitioner.program.program import Program, TensorKind
from partitioner.program.program_codec import encode
from partitioner.program.program_text import to_text

SAID = (
    "merged",
    "model",
)  # facts of Programs: microbatches that could not be kept apart, and what the model is called
# By key of what is compared: what is not the same, and what to do. First what the states are loaded into.
MADE = {
    "program": ("the Program is another than the run was started with",
                "undo what was changed in the plan, the model, the loss or their files, or start a new run"),
    "buffers": ("a buffer of the model does not begin as it did", "draw what it holds from torch, numpy or random"),
}  # fmt: skip
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
    data: TokenData | OwnData
    run_dir: RunDir
    step: int
    last_batch: Batch | None
    last_program: Program | None
    held_out: HeldOut
    sources: Mapping[str, str]

    @property
    def warn(self) -> Callable[[str], None]: ...

    def batch(self, step: int) -> Batch: ...

    def held_out_batches(self) -> Iterator[Batch]: ...


def evidence(training: Resumable) -> dict[str, Any]:
    """What is kept beside a checkpoint, as JSON values."""
    program, batch = training.prepared.program, training.last_batch
    return {
        "program": _digest(program),
        "buffers": _buffers(training),
        "settings": _settings(training),
        "batch": digest_of(batch) if batch else "",
        "last_program": _digest(training.last_program or program),
        "validation": asdict(training.held_out),
        "sources": dict(training.sources), "versions": versions(),
    }  # fmt: skip


def require_made(training: Resumable, extra: Mapping[str, Any]) -> None:
    """Raise RunError where what states are to be loaded into is not what it was."""
    _require(training, extra, MADE)


def require_seen(training: Resumable, extra: Mapping[str, Any]) -> None:
    """Go through what was read last, and raise RunError where anything is not what it was; then warn."""
    job, step = training.prepared.job, training.step
    if step:
        training.last_batch = training.batch(step - 1)
        training.last_program = training.one_step.ready(training.last_batch)[1]
    was = extra.get("validation", {})
    # All times where they differed: a generator that goes on from one to the next must come as far.
    for _ in range(was.get("count", 0) if not was.get("is_same") else min(was["count"], 1)):
        training.held_out.add(" ".join(map(digest_of, training.held_out_batches())))
    training.held_out.count = was.get("count", 0)
    _require(training, extra, SEEN)
    for name, digest in extra["sources"].items():
        if training.sources.get(name, digest) != digest:
            training.warn(
                f"{name} was edited since the run was started; what it says holds from step {step + 1} on"
            )
    for name, version in versions().items():
        if (before := extra["versions"].get(name, version)) != version:
            training.warn(f"{name} is {version}, the run of {job.model} was trained by {before} until now")


def _require(training: Resumable, extra: Mapping[str, Any], keys: Mapping[str, tuple[str, str]]) -> None:
    found = evidence(training)
    for key, (problem, hint) in keys.items():
        if found[key] != extra.get(key):
            more, where = _difference(training, key, extra.get(key), found[key])
            raise RunError(f"{problem}{more}", where, hint)


def _difference(training: Resumable, key: str, was: object, now: object) -> tuple[str, str]:
    """Which part of it differs, if that can be told, and where."""
    if key == "program":
        return _first_line(training)
    places = {"batch": training.data.name, "validation": str(training.prepared.job.validation.data)}
    if key in ("buffers", "settings") and isinstance(was, dict) and isinstance(now, dict):
        name = next(each for each in (*was, *now) if was.get(each) != now.get(each))
        values = "" if key == "buffers" else f" was {was.get(name)}, is {now.get(name)}"
        return f": {name}{values}", training.prepared.job.model if key == "buffers" else "optimizer"
    return "", places.get(key, training.prepared.job.model)


def _first_line(training: Resumable) -> tuple[str, str]:
    """Where the text of the Program first differs from what the run directory has."""
    path = training.run_dir.program_text
    before = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    lines = tuple(f"meta {name} " for name in SAID)
    numbered = [(number, line) for number, line in enumerate(before, 1) if not line.strip().startswith(lines)]
    now = to_text(_of_plan(training.prepared.program)).splitlines()
    for (number, old), new in zip([*numbered, (len(before), "")], [*now, ""], strict=False):
        if old != new and before:
            return f": `{old.strip()}` has become `{new.strip()}`", f"{path}:{number}"
    return "", str(path)


def _digest(program: Program) -> str:
    return hashlib.sha256(encode(_of_plan(program))).hexdigest()


def _of_plan(program: Program) -> Program:
    """As it is made from the plan that was kept, which says nothing of the one that was asked for."""
    return replace(program, meta=tuple((name, fact) for name, fact in program.meta if name not in SAID))


def _buffers(training: Resumable) -> dict[str, str]:
    """Digests of those that no checkpoint holds, as the forward does not change them."""
    roles, model = training.prepared.program.roles, training.one_step.model
    held = {tensor.source for role in roles for tensor in role.tensors if tensor.kind is TensorKind.BUFFER}
    return {n: digest_of({n: value}) for n, value in model.named_buffers() if f"buffer:{n}" not in held}


def _settings(training: Resumable) -> dict[str, str]:
    """By name, as text: repr of a number is exact."""
    step, optimizer = training.one_step, training.one_step.optimizer
    groups = enumerate(group_settings(optimizer))
    found = {f"{name} of group {i}": repr(value) for i, group in groups for name, value in group.items()}
    kind = type(optimizer).__name__
    return {"the kind": kind, "seed": str(step.seed), "clip_norm": repr(step.clip_norm), **found}
