"""Jobs: what is trained and how; which hardware runs it is the cluster's business. Job files and `--set` overrides.

Precedence: the defaults below, then the file, then the overrides in order. An override `a.b=c` is typed by
the schema: text fields take `c` as it stands, all others read it as YAML. Environment variables play no part.

None stands for `auto` where the file says so: a number that a later step derives. Global batches are in
sequences; a step reads `global_batch` sequences of `seq` tokens. Not here: whether the plan fits a cluster (the
planner).
"""

import re
from collections.abc import Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    ConfigDict,
    Field,
    GetPydanticSchema,
    JsonValue,
    PlainSerializer,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from comms.errors import ConfigError, combined
from kernels.builtin_optimizers import BUILT_IN
from orchestrator.config.schema import (
    WHOLE,
    FieldType,
    Section,
    Time,
    count_or,
    field_error,
    nearest,
    section_at,
    validate,
    word_field,
)
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


SINKS = ("csv", "tensorboard", "wandb", "mlflow")
FIVE_MINUTES: dict[str, JsonValue] = {"default": "300 s", "examples": ["600 s"]}


class Dtype(StrEnum):
    """The type of parameters and activations; optimizer state is at least fp32."""

    FP32 = "fp32"
    BF16 = "bf16"
    FP64 = "fp64"


class Gives(StrEnum):
    """What data of the user's own gives one by one."""

    SAMPLES = "samples"
    BATCHES = "batches"


class LrShape(StrEnum):
    """How the learning rate moves after the warm-up."""

    COSINE = "cosine"
    CONSTANT = "constant"
    LINEAR = "linear"


_REFERENCE = re.compile(r"([^:]+\.py|[A-Za-z_][\w.]*):([A-Za-z_][\w.]*)")


def is_reference(text: str) -> bool:
    """Whether a name stands for an object in Python code: `file.py:name` or `pkg.module:name`."""
    return _REFERENCE.fullmatch(text) is not None and not text.startswith(("builtin:", "hf:"))


def _optimizer_name(name: str) -> str:
    if name not in BUILT_IN and not is_reference(name):
        hint = f"write {', '.join(BUILT_IN)}, file.py:name or pkg.module:name"
        raise field_error(f"{name!r} is not an optimizer", hint)
    return name


def _require_reference(text: str) -> str:
    if not is_reference(text):
        raise field_error(f"{text!r} names no Python object", "write file.py:name or pkg.module:name")
    return text


_Reference = Annotated[str, AfterValidator(_require_reference)]


def _named(value: object) -> object:
    """A section that is a name alone."""
    return {"name": value} if isinstance(value, str) else value


def _sink_name(name: str) -> str:
    if name not in SINKS and not is_reference(name):
        hint = f"{nearest(name, SINKS)}; yours is file.py:name or pkg.module:name"
        raise field_error(f"{name!r} takes no numbers", hint)
    return name


class OptimizerSection(Section):
    """adamw, sgd, or your own: a class of optimizers, or a function that returns one; it is given the parameters.

    What is written here goes to yours as keyword arguments, `args` too; what is not stays as your code has it.
    """

    name: Annotated[str, AfterValidator(_optimizer_name)] = "adamw"
    args: dict[str, Any] = Field(default_factory=dict)
    lr: Annotated[float, Field(gt=0)] = 3e-3
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    betas: Annotated[tuple[float, float], GetPydanticSchema(lambda _, read: read(_Betas))] = Field(
        default_factory=lambda: (0.9, 0.95)
    )
    eps: Annotated[float, Field(gt=0)] = 1e-8
    momentum: Beta = 0.0

    @property
    def is_own(self) -> bool:
        """Whether it is made by the user's code."""
        return self.name not in BUILT_IN

    @property
    def given(self) -> dict[str, Any]:
        """The keyword arguments for an optimizer of the user's."""
        return {n: getattr(self, n) for n in self.model_fields_set - {"name", "args"}} | self.args

    @model_validator(mode="after")
    def _args_reach_someone(self) -> "OptimizerSection":
        if self.args and not self.is_own:
            hint = "write its settings beside its name: lr, betas, ..."
            raise field_error(f"{self.name} takes no args", hint, "args")
        for name in sorted(set(self.args) & (self.model_fields_set - {"name", "args"})):
            raise field_error(f"{name} stands twice, in args too", "leave one out", "args")
        return self

    @model_serializer(mode="wrap")
    def _written(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {k: v for k, v in write(self).items() if not self.is_own or k in self.model_fields_set}


def _schedule_name(name: object) -> LrShape | str:
    if isinstance(name, str) and name in list(LrShape):
        return LrShape(name)
    if isinstance(name, str) and is_reference(name):
        return name
    hint = "file.py:name or pkg.module:name"
    raise field_error(
        f"{name!r} is no schedule", f"{nearest(name, tuple(map(str, LrShape)))}; yours is {hint}"
    )


class LrScheduleSection(Section):
    """Linear warm-up, then this shape down to `min_lr_ratio` of the peak; or a function of yours.

    Yours is given the optimizer (and `args`) and returns a scheduler of torch, which is stepped after every step.
    """

    name: Annotated[
        LrShape | str, FieldType(_schedule_name, {"type": "string", "examples": list(map(str, LrShape))}, str)
    ] = LrShape.COSINE
    args: dict[str, Any] = Field(default_factory=dict)
    warmup_steps: Natural = 20
    min_lr_ratio: Ratio = 0.1

    @property
    def is_own(self) -> bool:
        """Whether it is a scheduler of the user's."""
        return not isinstance(self.name, LrShape)

    @model_validator(mode="after")
    def _all_reaches_someone(self) -> "LrScheduleSection":
        if not self.is_own and self.args:
            raise field_error(f"{self.name} takes no args", "they are for a scheduler of yours", "args")
        for name in sorted(self.model_fields_set & {"warmup_steps", "min_lr_ratio"}) if self.is_own else ():
            problem = f"{name} beside a scheduler of yours, which has its own warm-up and end"
            raise field_error(problem, "leave it out, or use args", name)
        return self

    @model_serializer(mode="wrap")
    def _written(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {k: v for k, v in write(self).items() if not self.is_own or k in self.model_fields_set}


class PlanSection(Section):
    """Degrees of parallelism; their product is the number of chips."""

    dp: Degree = None
    tp: Degree = None
    pp: Degree = None
    zero: Annotated[Literal[0, 1], WHOLE] = 0  # 0: whole optimizer state on each chip; 1: sharded over dp
    schedule: Annotated[PipelineSchedule, word_field(PipelineSchedule)] = PipelineSchedule.ONE_F_ONE_B
    # Statistics of the whole batch, or of each replica's microbatch: the only key here that changes what is trained.
    batch_norm: Annotated[BatchNorms, word_field(BatchNorms)] = BatchNorms.SYNCHRONISED


def _above_zero(seconds: float) -> float:
    if not seconds:
        raise field_error("a wait of zero", "give a time above zero, as 10 s")
    return seconds


class ValidationSection(Section):
    """Every how many steps (0: never), on how many global batches; of text a tenth is held out, else of `data`."""

    data: _Reference | None = None
    every: Natural = 100
    batches: Positive = 4


class CheckpointsSection(Section):
    """Every how many steps and after how much time (0: not by that), besides the end; and how many to keep."""

    every: Natural = 0
    interval: Time = Field(default=300.0, json_schema_extra=FIVE_MINUTES)
    keep: Positive = 3


class Job(Section):
    """One job file."""

    model_config = ConfigDict(title="JobFile")

    kind: Literal["job"]
    version: Annotated[Literal[1], WHOLE]
    # What `train` runs when nothing is said: a small GPT on the text that comes with the interpreter.
    # builtin:NAME, hf:NAME, a folder with weights, path.py:factory, pkg.module:factory
    model: str = "builtin:gpt-mini"
    model_args: dict[str, Any] = Field(default_factory=dict)
    weights: str | None = (
        None  # a checkpoint, run, safetensors or DCP folder to start from instead of the seed
    )
    # builtin:NAME, a file or folder of text, or path.py:name or pkg.module:name of datasets and loaders
    data: str = "builtin:english"
    data_args: dict[str, Any] = Field(default_factory=dict)
    data_gives: Annotated[Gives, word_field(Gives)] | None = None  # None: loaders batches, all else samples
    shuffle: bool = True  # datasets of yours, by the seed
    drop_last: bool = False  # of data of yours: a last batch that is smaller
    loss: _Reference | None = None
    loss_args: dict[str, Any] = Field(default_factory=dict)
    seq: Annotated[Positive, Field(le=2**24)] = 128
    global_batch: Annotated[Positive, Field(le=2**24)] = 32
    microbatches: Degree = None  # per step and data-parallel replica
    steps: Positive = 200
    seed: Natural = 0
    dtype: Annotated[Dtype, word_field(Dtype)] = Dtype.FP32
    optimizer: Annotated[OptimizerSection, BeforeValidator(_named, str | OptimizerSection)] = Field(
        default_factory=OptimizerSection
    )
    clip_norm: Annotated[float, Field(gt=0)] | None = 1.0  # None: gradients are not clipped
    lr_schedule: Annotated[LrScheduleSection, BeforeValidator(_named, str | LrScheduleSection)] = Field(
        default_factory=LrScheduleSection
    )
    plan: PlanSection = Field(default_factory=PlanSection)
    validation: ValidationSection = Field(default_factory=ValidationSection)
    checkpoints: CheckpointsSection = Field(default_factory=CheckpointsSection)
    # where the numbers of every step go besides metrics.jsonl: csv, tensorboard, wandb, mlflow, file.py:name
    sinks: list[Annotated[str, AfterValidator(_sink_name)]] = Field(default_factory=list)
    # of a step in which no chip has moved for so long, every actor is ended
    hang_timeout: Annotated[Time, AfterValidator(_above_zero)] = Field(
        default=300.0, json_schema_extra=FIVE_MINUTES
    )

    @property
    def has_own_data(self) -> bool:
        """Whether batches come from the user's code."""
        return is_reference(self.data)

    @property
    def has_own_model(self) -> bool:
        """Whether the model is made by the user's code."""
        return is_reference(self.model)

    @property
    def has_own_parts(self) -> bool:
        """Whether the step depends on code besides the model's."""
        return self.has_own_data or self.optimizer.is_own or self.loss is not None

    @property
    def shape_of_lr(self) -> LrScheduleSection | None:
        """How the learning rate moves by a shape of ours; an optimizer of the user's is left alone unless asked."""
        is_moved = not self.optimizer.is_own or "lr_schedule" in self.model_fields_set
        return self.lr_schedule if is_moved and not self.lr_schedule.is_own else None

    @property
    def clip_limit(self) -> float | None:
        """What gradients are clipped to; with an optimizer of the user's they are not unless asked."""
        is_clipped = not self.optimizer.is_own or "clip_norm" in self.model_fields_set
        return self.clip_norm if is_clipped else None

    @model_validator(mode="after")
    def _all_reaches_someone(self) -> "Job":
        if not self.has_own_data:
            for name in sorted(self.model_fields_set & OF_OWN_DATA):
                hint = "leave it out, or name data of your own"
                raise field_error(f"{name} has no effect on text", hint, name)
            if self.validation.data is not None:
                problem = "validation.data beside text, of which a tenth is held out"
                raise field_error(problem, "leave one out", "validation", "data")
        if self.loss_args and self.loss is None:
            raise field_error("loss_args without a loss", "name one: loss: file.py:name", "loss_args")
        return self

    @model_serializer(mode="wrap")
    def _written(self, write: SerializerFunctionWrapHandler) -> Mapping[str, Any]:
        """All keys that mean something, so that a reader of the document means the same."""
        unset = set(Job.model_fields) - self.model_fields_set
        moot = unset & (OF_OWN_DATA | {"loss", "loss_args"})
        moot |= unset & {"lr_schedule", "clip_norm"} if self.optimizer.is_own else set()
        moot |= unset & {"seq"} if self.has_own_data else set()
        return {name: value for name, value in write(self).items() if name not in moot}


OF_OWN_DATA = frozenset({"data_args", "data_gives", "shuffle", "drop_last"})


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
            root = _with(root, location, _typed(location, value, origin), origin)
            places = {at: place for at, place in places.items() if at[: len(location)] != location}
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


def _with(root: object, location: Location, value: object, origin: str) -> dict[str, object]:
    """`root` with `value` at `location`. Raises ConfigError where that is inside of what has no keys."""
    found = {} if root is None else _named(root)
    if not isinstance(found, dict):
        raise ConfigError(f"{root!r} has no key {location[0]!r}", origin, "write a mapping, or leave one out")
    key = str(location[0])
    inner = _with(found.get(key), location[1:], value, origin) if len(location) > 1 else value
    return found | {key: inner}
