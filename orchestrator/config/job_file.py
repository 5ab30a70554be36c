"""Job files: the schema, `--set` overrides, and the way from both to a Job.

Precedence: the defaults below, then the file, then the overrides in order. An override `a.b=c` is typed by
the schema: text fields take `c` as it stands, all others read it as YAML. Environment variables play no part.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, Field

from comms.errors import ConfigError, combined
from kernels.builtin_optimizers import BUILT_IN
from orchestrator.config.job import (
    Checkpoints,
    Dtype,
    Job,
    LrSchedule,
    LrShape,
    Optimizer,
    PlanChoice,
    Validation,
)
from orchestrator.config.schema import CountOr, Section, field_error, section_at, validate
from orchestrator.config.yaml_file import Document, Location, parse_scalar, read_yaml
from partitioner.layout.parallel_plan import PipelineSchedule

# What `train` runs when nothing is said: a small GPT on the text that comes with the interpreter.
DEFAULT_MODEL = "builtin:gpt-mini"
DEFAULT_DATA = "builtin:english"
DEFAULT_SEQ = 128
DEFAULT_GLOBAL_BATCH = 32
DEFAULT_STEPS = 200
DEFAULT_LR = 3e-3
DEFAULT_WARMUP_STEPS = 20
DEFAULT_SCHEMA: Mapping[str, Any] = {"kind": "job", "version": 1}

Degree = Annotated[int | None, CountOr("auto")]
Positive = Annotated[int, Field(ge=1)]
Natural = Annotated[int, Field(ge=0)]
Ratio = Annotated[float, Field(ge=0, le=1)]
Beta = Annotated[float, Field(ge=0, lt=1)]
if TYPE_CHECKING:
    ScheduleName = str
else:
    ScheduleName = Literal[tuple(map(str, PipelineSchedule))]  # a new schedule is a new word here


def _optimizer_name(name: str) -> str:
    if name not in BUILT_IN and re.fullmatch(r"[\w.]+:\w+", name) is None:
        hint = f"write {', '.join(BUILT_IN)} or pkg.module:factory"
        raise field_error(f"{name!r} is not an optimizer", hint)
    return name


class OptimizerSection(Section):
    """adamw, sgd, or a factory that is given the parameters; its own settings apply, with the lr of here."""

    name: Annotated[str, AfterValidator(_optimizer_name)] = "adamw"
    lr: Annotated[float, Field(gt=0)] = DEFAULT_LR
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    betas: Annotated[list[Beta], Field(min_length=2, max_length=2)] = Field(
        default_factory=lambda: [0.9, 0.95]
    )
    eps: Annotated[float, Field(gt=0)] = 1e-8
    momentum: Beta = 0.0


class LrScheduleSection(Section):
    """Linear warm-up, then this shape down to `min_lr_ratio` of the peak."""

    name: Literal["cosine", "constant", "linear"] = "cosine"
    warmup_steps: Natural = DEFAULT_WARMUP_STEPS
    min_lr_ratio: Ratio = 0.1


class PlanSection(Section):
    """Degrees of parallelism; their product is the number of chips."""

    dp: Degree = None
    tp: Degree = None
    pp: Degree = None
    zero: Literal[0, 1] = 0
    schedule: ScheduleName = "1f1b"


class ValidationSection(Section):
    """Every how many steps (0: never), on how many global batches."""

    every: Natural = 100
    batches: Positive = 4


class CheckpointsSection(Section):
    """Every how many steps (0: only at the end), and how many to keep."""

    every: Natural = 0
    keep: Positive = 2


class JobFile(Section):
    """One job file."""

    kind: Literal["job"]
    version: Literal[1]
    model: str = DEFAULT_MODEL
    model_args: dict[str, Any] = Field(default_factory=dict)
    data: str = DEFAULT_DATA
    seq: Positive = DEFAULT_SEQ
    global_batch: Positive = DEFAULT_GLOBAL_BATCH
    microbatches: Annotated[int | None, CountOr("auto")] = None
    steps: Positive = DEFAULT_STEPS
    seed: Natural = 0
    dtype: Literal["fp32", "bf16", "fp64"] = "fp32"
    optimizer: OptimizerSection = Field(default_factory=OptimizerSection)
    clip_norm: Annotated[float, Field(gt=0)] | None = 1.0
    lr_schedule: LrScheduleSection = Field(default_factory=LrScheduleSection)
    plan: PlanSection = Field(default_factory=PlanSection)
    validation: ValidationSection = Field(default_factory=ValidationSection)
    checkpoints: CheckpointsSection = Field(default_factory=CheckpointsSection)


def load_job(path: str | Path | None, overrides: Sequence[str] = ()) -> Job:
    """The job of the file at `path` (None: all defaults) with `a.b=c` overrides. Raises ConfigError."""
    document = Document("the defaults", dict(DEFAULT_SCHEMA), {}) if path is None else read_yaml(Path(path))
    return job_from(overridden(document, overrides))


def job_from(document: Document) -> Job:
    """The job that a document describes."""
    file = validate(document, JobFile)
    optimizer, lr, plan = file.optimizer, file.lr_schedule, file.plan
    return Job(
        model=file.model,
        model_args=file.model_args,
        data=file.data,
        seq=file.seq,
        global_batch=file.global_batch,
        microbatches=file.microbatches,
        steps=file.steps,
        seed=file.seed,
        dtype=Dtype(file.dtype),
        optimizer=Optimizer(
            name=optimizer.name,
            lr=optimizer.lr,
            weight_decay=optimizer.weight_decay,
            betas=(optimizer.betas[0], optimizer.betas[1]),
            eps=optimizer.eps,
            momentum=optimizer.momentum,
        ),
        clip_norm=file.clip_norm,
        lr_schedule=LrSchedule(LrShape(lr.name), lr.warmup_steps, lr.min_lr_ratio),
        plan=PlanChoice(plan.dp, plan.tp, plan.pp, plan.zero, PipelineSchedule.named(plan.schedule)),
        validation=Validation(file.validation.every, file.validation.batches),
        checkpoints=Checkpoints(file.checkpoints.every, file.checkpoints.keep),
    )


def job_document(job: Job) -> dict[str, object]:
    """The job as the mapping of a job file that says everything: what a run directory keeps."""
    said = {**DEFAULT_SCHEMA, **asdict(job)}
    said["microbatches"] = said["microbatches"] or "auto"
    said["plan"] |= {degree: said["plan"][degree] or "auto" for degree in ("dp", "tp", "pp")}
    return _plain(said)


def _plain(said: Mapping[str, Any]) -> dict[str, object]:
    """Words in place of enumerations and lists in place of tuples, as files have them."""
    found: dict[str, object] = {}
    for key, value in said.items():
        match value:
            case StrEnum():
                found[key] = value.value
            case tuple():
                found[key] = list(value)
            case dict() if key != "model_args":  # which is the model's own affair
                found[key] = _plain(value)
            case _:
                found[key] = value
    return found


def overridden(document: Document, overrides: Sequence[str]) -> Document:
    """The document with each `a.b=c` laid over it, in order. Raises ConfigError for what cannot be read."""
    root, places = dict(document.root), dict(document.places)
    errors = []
    for text in overrides:
        path, separator, value = text.partition("=")
        origin = f"--set {text}"
        location: Location = tuple(path.strip().split("."))
        if not separator or "" in location:
            errors.append(
                ConfigError(f"cannot read the override {text!r}", origin, "write it like plan.dp=2")
            )
            continue
        try:
            root = _with(root, location, _typed(location, value, origin))
            places[location] = origin
        except ConfigError as error:
            errors.append(error)
    if errors:
        raise combined(errors)
    return Document(document.origin, root, places)


def _typed(location: Location, value: str, origin: str) -> object:
    section = section_at(JobFile, location[:-1])
    field = section.model_fields.get(str(location[-1])) if section else None
    return value if field is not None and field.annotation is str else parse_scalar(value, origin)


def _with(root: object, location: Location, value: object) -> dict[str, object]:
    """`root` with `value` at `location`; what is not a mapping on the way is replaced."""
    found = dict(root) if isinstance(root, dict) else {}
    key = str(location[0])
    found[key] = _with(found.get(key), location[1:], value) if len(location) > 1 else value
    return found
