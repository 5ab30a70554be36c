"""Jobs: what is trained and how; which hardware runs it is the cluster's business. Job files and `--set` overrides.

Precedence: the defaults below, then the file, then the overrides in order. An override `a.b=c` is typed by
the schema: text fields take `c` as it stands, all others read it as YAML. Environment variables play no part.

None stands for `auto` where the file says so: a number that a later step derives. Global batches are in
sequences; a step reads `global_batch` sequences of `seq` tokens. Not here: whether the plan fits a cluster (the
planner).
"""

import re
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, Field, GetPydanticSchema, PlainSerializer

from comms.errors import ConfigError, combined
from kernels.builtin_optimizers import BUILT_IN
from orchestrator.config.schema import Section, count_or, field_error, section_at, validate, word_field
from orchestrator.config.yaml_file import Document, Location, parse_scalar, read_yaml
from partitioner.layout.parallel_plan import BatchNorms
from partitioner.layout.pipeline_schedules import PipelineSchedule

Degree = Annotated[int | None, count_or("auto")]
Positive = Annotated[int, Field(ge=1)]
Natural = Annotated[int, Field(ge=0)]
Ratio = Annotated[float, Field(ge=0, le=1)]
Beta = Annotated[float, Field(ge=0, lt=1)]
_Betas = Annotated[
    list[Beta], Field(min_length=2, max_length=2), AfterValidator(tuple), PlainSerializer(list)
]


class Dtype(StrEnum):
    """The type of parameters and activations; optimizer state is at least fp32."""

    FP32 = "fp32"
    BF16 = "bf16"
    FP64 = "fp64"


class LrShape(StrEnum):
    """How the learning rate moves after the warm-up."""

    COSINE = "cosine"
    CONSTANT = "constant"
    LINEAR = "linear"


def _optimizer_name(name: str) -> str:
    if name not in BUILT_IN and re.fullmatch(r"[\w.]+:\w+", name) is None:
        hint = f"write {', '.join(BUILT_IN)} or pkg.module:factory"
        raise field_error(f"{name!r} is not an optimizer", hint)
    return name


class OptimizerSection(Section):
    """adamw, sgd, or a factory that is given the parameters; its own settings apply, with the lr of here."""

    name: Annotated[str, AfterValidator(_optimizer_name)] = "adamw"
    lr: Annotated[float, Field(gt=0)] = 3e-3
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    betas: Annotated[tuple[float, float], GetPydanticSchema(lambda _, read: read(_Betas))] = Field(
        default_factory=lambda: (0.9, 0.95)
    )
    eps: Annotated[float, Field(gt=0)] = 1e-8
    momentum: Beta = 0.0


class LrScheduleSection(Section):
    """Linear warm-up, then this shape down to `min_lr_ratio` of the peak."""

    name: Annotated[LrShape, word_field(LrShape)] = LrShape.COSINE
    warmup_steps: Natural = 20
    min_lr_ratio: Ratio = 0.1


class PlanSection(Section):
    """Degrees of parallelism; their product is the number of chips."""

    dp: Degree = None
    tp: Degree = None
    pp: Degree = None
    zero: Literal[0, 1] = 0  # 0: whole optimizer state on each chip; 1: sharded over dp
    schedule: Annotated[PipelineSchedule, word_field(PipelineSchedule)] = PipelineSchedule.ONE_F_ONE_B
    # Statistics of the whole batch, or of each replica's microbatch: the only key here that changes what is trained.
    batch_norm: Annotated[BatchNorms, word_field(BatchNorms)] = BatchNorms.SYNCHRONISED


class ValidationSection(Section):
    """Every how many steps (0: never), on how many global batches."""

    every: Natural = 100
    batches: Positive = 4


class CheckpointsSection(Section):
    """Every how many steps (0: only at the end), and how many to keep."""

    every: Natural = 0
    keep: Positive = 2


class Job(Section):
    """One job file."""

    model_config = ConfigDict(title="JobFile")

    kind: Literal["job"]
    version: Literal[1]
    # What `train` runs when nothing is said: a small GPT on the text that comes with the interpreter.
    model: str = "builtin:gpt-mini"  # builtin:NAME, hf:NAME, path.py:factory, pkg.module:factory
    model_args: dict[str, Any] = Field(default_factory=dict)
    data: str = "builtin:english"  # builtin:NAME, or a file or folder
    seq: Positive = 128
    global_batch: Positive = 32
    microbatches: Degree = None  # per step and data-parallel replica
    steps: Positive = 200
    seed: Natural = 0
    dtype: Annotated[Dtype, word_field(Dtype)] = Dtype.FP32
    optimizer: OptimizerSection = Field(default_factory=OptimizerSection)
    clip_norm: Annotated[float, Field(gt=0)] | None = 1.0  # None: gradients are not clipped
    lr_schedule: LrScheduleSection = Field(default_factory=LrScheduleSection)
    plan: PlanSection = Field(default_factory=PlanSection)
    validation: ValidationSection = Field(default_factory=ValidationSection)
    checkpoints: CheckpointsSection = Field(default_factory=CheckpointsSection)


def load_job(path: str | Path | None, overrides: Sequence[str] = ()) -> Job:
    """The job of the file at `path` (None: all defaults) with `a.b=c` overrides. Raises ConfigError."""
    defaults = Document("the defaults", {"kind": "job", "version": 1}, {})
    document = defaults if path is None else read_yaml(Path(path))
    return job_from(overridden(document, overrides))


def job_from(document: Document) -> Job:
    """The job that a document describes."""
    return validate(document, Job)


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
    section = section_at(Job, location[:-1])
    field = section.model_fields.get(str(location[-1])) if section else None
    return value if field is not None and field.annotation is str else parse_scalar(value, origin)


def _with(root: object, location: Location, value: object) -> dict[str, object]:
    """`root` with `value` at `location`; what is not a mapping on the way is replaced."""
    found = dict(root) if isinstance(root, dict) else {}
    key = str(location[0])
    found[key] = _with(found.get(key), location[1:], value) if len(location) > 1 else value
    return found
