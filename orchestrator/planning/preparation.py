"""Preparation: from a cluster, a job and perhaps a plan to a Program, with torch imported only if it must be.

What every verb starts with. A Program made before from the same content comes from a folder of the user's cache; then
neither torch nor the model is needed to simulate it. The key is a digest of everything that decides the result, the
code of the partitioner included, so an entry can be stale only if a model changes without its description changing;
models from the user's own files are therefore never cached. Entries are written whole or not at all, with a digest over
name and content, and what they say is held against what was asked for: a damaged or misplaced one is made again.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache, partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from comms.errors import DataError, ModelError, PartitionError, PlanError, UserError
from comms.kept_files import cache_folder, sealed, unsealed
from comms.selection.progress import Progress, quiet
from orchestrator.config.hardware.cluster import Cluster
from orchestrator.config.job_file import Job
from orchestrator.models.user_code import PACKAGE_FOLDERS, named_object
from orchestrator.planning.job_capture import JobCapture, model_content
from orchestrator.runs.disk import write_whole
from partitioner.layout.parallel_plan import Plan
from partitioner.program.program import Program
from partitioner.program.program_codec import decode, encode

if TYPE_CHECKING:
    from torch import Tensor, nn

    from orchestrator.planning.job_parts import JobParts

Made = TypeVar("Made")
PLANNED = ("plan", "microbatches")  # keys of a job that a plan stands for
# what turns a description into a Program: packages, and rooms of this one
CODE = ("partitioner", "kernels", "orchestrator/models", "orchestrator/planning")


@dataclass(frozen=True)
class Prepared:
    """A Program and all it came from. `was_cached`: nothing was captured this time."""

    cluster: Cluster
    job: Job
    plan: Plan
    program: Program
    was_cached: bool


def prepare(
    cluster: Cluster,
    job: Job,
    plan: Plan,
    *,
    progress: Progress = quiet,
    parts: "JobParts | None" = None,
    capture: JobCapture | None = None,
) -> Prepared:
    """Make the Program of `job` by `plan` on all chips of `cluster`. Raises PlanError, ModelError or CaptureError.

    `parts`, `capture`: those of the job, if they are there already.
    """
    require_there(job)
    _check(plan, job, cluster)
    program, was_cached = _program(job, plan, capture or JobCapture(job, progress, parts))
    return Prepared(cluster, job, replace(plan, microbatches=program.microbatches), program, was_cached)


def require_there(job: Job) -> None:
    """Raises DataError or ModelError for text or code that the job names and that is not there."""
    _require_text(job)
    _require_named(job)
    _require_weights(job)


def program_under(
    job: Job, plan: Plan, parts: "JobParts | None" = None, *, progress: Progress = quiet
) -> Program:
    """The Program of a job by any plan, whatever cluster there is. Raises UserError."""
    return _program(job, plan, JobCapture(job, progress, parts))[0]


def _program(job: Job, plan: Plan, capture: JobCapture) -> tuple[Program, bool]:
    entry = None if capture.content is None else f"{key_of(_content(job, plan))}.program"
    return remembered(entry, partial(_decoded, plan), lambda: capture.program(plan), encode)


def _decoded(plan: Plan, data: bytes) -> Program:
    """The Program of an entry. Raises ValueError for that of another plan."""
    program = decode(data)
    if program.axes != plan.axes or program.microbatches < 1:
        raise ValueError(f"a Program of {program.axes}")
    return program


def module_values(module: "nn.Module") -> "dict[str, Tensor]":
    """A module's parameters and buffers, under the names that chips ask for."""
    values = {f"params:{name}": value.detach() for name, value in module.named_parameters()}
    return values | {f"buffer:{name}": value.detach() for name, value in module.named_buffers()}


def _content(job: Job, plan: Plan) -> dict[str, object]:
    return model_content(job) | {"global_batch": job.global_batch, "plan": repr(plan)}


def _check(plan: Plan, job: Job, cluster: Cluster) -> None:
    if plan.num_chips != cluster.num_chips:
        raise PlanError(
            f"dp {plan.dp} x tp {plan.tp} x pp {plan.pp} = {plan.num_chips} chips, the cluster has {cluster.num_chips}",
            "plan", f"change a degree, or take --chips {plan.num_chips}",
        )  # fmt: skip
    parts = plan.dp * plan.microbatches
    if job.global_batch % parts:
        raise PlanError(
            f"global_batch {job.global_batch} does not split into dp {plan.dp} x {plan.microbatches} microbatches",
            "plan",
            f"use a multiple of {parts}",
        )


def require_same(job: Job, plan: Plan | None) -> None:
    """What the job asks for itself must be what a plan has that is given beside it. Raises PlanError."""
    if plan is None:
        return
    asked = {f"plan.{name}": getattr(job.plan, name) for name in sorted(job.plan.model_fields_set)}
    for key, wanted in {**asked, "microbatches": job.microbatches}.items():
        held = getattr(plan, key.removeprefix("plan."))
        if wanted not in (None, held):
            raise PlanError(f"{key} is {wanted} in the job, {held} in the plan", key, "leave one out")


def _require_named(job: Job) -> None:
    """What only `train` calls must be there too."""
    schedule = str(job.lr_schedule.name) if job.lr_schedule.is_own else None
    for key, text in (("lr_schedule", schedule), ("validation.data", job.validation.data)):
        if text is not None:
            named_object(text, key)


def _require_weights(job: Job) -> None:
    """Only what has tensors reads them, but they must be there."""
    if job.weights is not None and not Path(job.weights).exists():
        hint = (
            "give a run, a checkpoint, a .safetensors file or folder, or one of torch.distributed.checkpoint"
        )
        raise ModelError(f"there are no weights {job.weights!r}", "weights", hint)


def _require_text(job: Job) -> None:
    """Text is read by `train` and `verify` only, but must be there."""
    default = Job.model_fields["data"].default
    if not (job.has_own_data or job.data == default or Path(job.data).exists()):
        hint = f"give {default}, a text file or a folder of them, or file.py:name of a dataset or loader"
        raise DataError(f"there is no data {job.data!r}", "data", hint)


@cache
def code_digest(rooms: tuple[str, ...] = CODE) -> str:
    """Digest of the sources in these rooms, and of the libraries, that turn a model into a Program."""
    digest = hashlib.sha256()
    for room in rooms:
        package, *inside = room.split("/")
        for path in sorted(PACKAGE_FOLDERS[package].joinpath(*inside).rglob("*.py")):
            digest.update(path.name.encode() + path.read_bytes())
    for package in ("torch", "transformers"):
        try:
            digest.update(version(package).encode())
        except PackageNotFoundError:
            digest.update(b"-")
    return digest.hexdigest()


def key_of(facts: Mapping[str, object], rooms: tuple[str, ...] = CODE) -> str:
    """The cache key of a description (JSON values) of what the code in `rooms` makes."""
    text = json.dumps({"code": code_digest(rooms), **facts}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def remembered(
    entry: str | None, read: Callable[[bytes], Made], make: Callable[[], Made], write: Callable[[Made], bytes]
) -> tuple[Made, bool]:
    """What was made before under this name (None: nothing is kept), else what is made now; whether it was there."""
    if entry is None:
        return make(), False
    with suppress(OSError, PartitionError, ValueError):
        return read(recall(entry)), True
    made = make()
    remember(entry, write(made))
    return made, False


def recall(entry: str) -> bytes:
    """What was remembered under this name. Raises OSError, and ValueError for what is damaged."""
    return unsealed(entry, (cache_folder() / entry).read_bytes())


def remember(entry: str, data: bytes) -> None:
    """Keep `data`, whole or not at all; a cache that cannot be written is not an error."""
    try:
        cache_folder().mkdir(parents=True, exist_ok=True)
        write_whole(cache_folder() / entry, sealed(entry, data))
    except (OSError, UserError):
        return
