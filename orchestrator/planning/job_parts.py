"""Job parts: the objects that a job names, made: model, loss, optimizer, scheduler, data; and what a step is made for.

A name stands for an object or for a function that returns one (with `..._args`). A function of an optimizer is given
the parameters, as a list, or the module if its first argument is called so (`MODULE_NAMES`) or said to be one; so is
a class of optimizers. A loss may be a class. With the built-in optimizers matrices decay and all else does not.
"""

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import cached_property, partial
from typing import Any
from zlib import crc32

import torch
from torch import nn
from torch.utils.data import RandomSampler

from comms.errors import (
    ConfigError,
    DataError,
    ModelError,
    PlanError,
    UserError,
)
from kernels.optimizers import (
    OptimizerSpec,
    group_settings,
    same_kind,
    states_per_element,
)
from kernels.trials.optimizer_trials import Scope, advance
from orchestrator.config.job_file import Dtype, Job
from orchestrator.models.model_builder import BuiltModel, build
from orchestrator.models.user_code import RAISED, called, first_parameter, named_object, raised
from orchestrator.planning.start_weights import started_from
from orchestrator.planning.weights_elsewhere import WeightsElsewhere
from orchestrator.runs.data import step_key
from orchestrator.runs.learning_rate import learning_rate
from orchestrator.runs.own_data import Named, OwnData, Reading, drawing, passes
from partitioner.capture.batch_inputs import Batch, tensors_of
from partitioner.capture.captured_graph import TORCH, Graph
from partitioner.capture.forwards.step_loss import LossFunction, keeping, parameters_of
from partitioner.layout.parallel_plan import Plan
from partitioner.lowering.lower import MATRIX, StepShape, step_shape

SHORT_DTYPES = {Dtype.FP32: "f32", Dtype.FP64: "f64", Dtype.BF16: "bf16"}  # as a Program names them
MODULE_NAMES = ("model", "module", "net", "network")
PLATEAU = torch.optim.lr_scheduler.ReduceLROnPlateau


@dataclass(frozen=True)
class JobParts:
    """What a job names; its optimizer is made of the model when it is needed."""

    job: Job
    model: BuiltModel
    loss_fn: LossFunction | None
    data: OwnData | None  # None: text, or example batches
    graphs: dict[tuple[Plan, int], Graph] = field(default_factory=dict)  # by plan and microbatches

    @cached_property
    def optimizer(self) -> torch.optim.Optimizer:
        """Made once, as a function of the user's may do something to the model besides. Raises ModelError."""
        return job_optimizer(self.job, self.model.module)

    def optimizer_anew(self) -> torch.optim.Optimizer:
        """Another one of the same settings, over the same parameters."""
        made = same_kind(self.optimizer)([])
        made.param_groups = [
            {**copy.deepcopy(own), "params": list(group["params"])}
            for own, group in zip(group_settings(self.optimizer), self.optimizer.param_groups, strict=True)
        ]
        return made

    def example_batch(self) -> Batch:
        """A batch of the kind that a step takes."""
        if self.data is not None:
            return self.data.batch(0)
        if self.job.has_own_model and self.model.example is None:
            _require_text_inputs(self.job, self.model.module)
        batch = self.model.example_batch(self.job.global_batch, self.job.seq)
        if self.job.has_own_model and self.model.example is not None:
            _require_example(self.job, batch)
        return batch


def job_parts(job: Job, device: str) -> JobParts:
    """The parts of a job; "meta": shapes only, if the model's code takes that. Raises ModelError or DataError."""
    model, loss_fn = started_from(build_model(job, device), job.weights), job_loss(job)
    data = None
    if job.has_own_data:
        loss_fn, data = _own_data(job, job.data, model.module, loss_fn)
        _require_order(job, data)
        _require_seq(job, data.batch(0), job.data)
    return JobParts(job, model, loss_fn, data)


def build_model(job: Job, device: str) -> BuiltModel:
    """The job's model; "meta" for shapes only, where its code can do with them."""
    dtype, shifted = TORCH[SHORT_DTYPES[job.dtype]], not job.has_own_data
    try:
        return build(job.model, job.model_args, device=device, dtype=dtype, seed=job.seed, shifted=shifted)
    except ModelError:
        if device != "meta":
            raise  # on shapes alone much code fails that reads values as it starts
    return build(job.model, job.model_args, device="cpu", dtype=dtype, seed=job.seed, shifted=shifted)


def validation_data(parts: JobParts) -> OwnData | None:
    """What is validated on: the job's own, in order."""
    job = parts.job
    if job.validation.data is None:
        return None
    quiet = job.model_copy(update={"shuffle": False, "drop_last": False, "data_args": {}, "data_gives": None})
    return _own_data(quiet, job.validation.data, parts.model.module, job_loss(job), "validation.data")[1]


def job_loss(job: Job) -> LossFunction | None:
    """The job's own loss."""
    if job.loss is None:
        return None
    found = named_object(job.loss, "loss")
    if isinstance(found, type) or job.loss_args:
        found = _made(job, found, job.loss, "loss", **job.loss_args)
    return _function(found, job.loss, "loss")


def _made(job: Job, found: object, text: str, key: str, *args: object, **kwargs: object) -> Any:
    """What a function of the user's returns; random numbers that it draws follow from the job's seed and the key."""
    with drawing(step_key(job.seed, crc32(key.encode()))):
        return called(_function(found, text, key), text, key, *args, **kwargs)


def _function(found: object, text: str, key: str) -> Callable[..., Any]:
    if not callable(found):
        raise ModelError(f"{text} is a {type(found).__name__}", key, "name a function or a class")
    return found


def job_optimizer(job: Job, module: nn.Module) -> torch.optim.Optimizer:
    """The job's optimizer over the parameters of a module. Raises ModelError."""
    wanted = job.optimizer
    if not wanted.is_own:
        matrices = [p for p in module.parameters() if p.dim() >= MATRIX]
        others = [p for p in module.parameters() if p.dim() < MATRIX]
        groups: Any = [{"params": matrices}, {"params": others, "weight_decay": 0.0}]
        return OptimizerSpec(wanted.name, wanted.lr, wanted.weight_decay, wanted.betas, wanted.eps, wanted.momentum)(
            groups)  # fmt: skip
    make = _function(named_object(wanted.name, "optimizer"), wanted.name, "optimizer")
    given = module if _takes_module(make) else list(module.parameters())
    made = _made(job, make, wanted.name, "optimizer", given, **wanted.given)
    if not isinstance(made, torch.optim.Optimizer):
        problem = f"{wanted.name} returned a {type(made).__name__}"
        raise ModelError(problem, "optimizer", "return a torch.optim.Optimizer")
    own = {id(p) for p in module.parameters()}
    if any(id(p) not in own for group in made.param_groups for p in group["params"]):
        raise ModelError(f"{wanted.name} optimizes tensors that are no parameters of the model", "optimizer",
                         "give it the parameters that it is called with")  # fmt: skip
    return made


def _needs_arguments(step: object) -> bool:
    return callable(step) and any(
        p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters_of(step)
    )


def _takes_module(make: Callable[..., object]) -> bool:
    first = first_parameter(make)
    if isinstance(make, type) or first is None:
        return False
    note = first.annotation
    is_noted = (isinstance(note, type) and issubclass(note, nn.Module)) or "Module" in str(note)
    return is_noted or first.name in MODULE_NAMES


class LrSchedule:
    """What moves the learning rate from step to step: the job's shape, a scheduler of the user's, or nothing."""

    def __init__(self, job: Job, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer, self.steps, self.shape = optimizer, job.steps, job.shape_of_lr
        self.peaks = [group["lr"] for group in optimizer.param_groups] if self.shape else []
        self.own: Any = None
        if job.lr_schedule.is_own:
            text = str(job.lr_schedule.name)
            make = named_object(text, "lr_schedule")
            self.own = _made(job, make, text, "lr_schedule", optimizer, **job.lr_schedule.args)
            self._require_scheduler(text)

    def _require_scheduler(self, text: str) -> None:
        if isinstance(self.own, PLATEAU) or _needs_arguments(getattr(self.own, "step", None)):
            hint = "take one that counts steps, or step it yourself beside orchestrator.distribute"
            raise ModelError(f"{text} steps on a metric", "lr_schedule", hint)
        if getattr(self.own, "optimizer", self.optimizer) is not self.optimizer:
            problem = f"{text} returned a scheduler of another optimizer"
            raise ModelError(problem, "lr_schedule", "make it of the optimizer that it is called with")
        if not all(hasattr(self.own, name) for name in ("step", "state_dict", "load_state_dict")):
            problem = f"{text} returned a {type(self.own).__name__}"
            raise ModelError(problem, "lr_schedule", "return a scheduler of torch.optim.lr_scheduler")

    def before(self, step: int) -> None:
        """Set what step `step` (from 0) is to run with."""
        if self.shape is not None:
            for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
                group["lr"] = learning_rate(step, peak=peak, schedule=self.shape, steps=self.steps)

    def replay(self, step: int, last: Callable[[], None], *, moves_groups: bool) -> None:
        """Go through the steps before `step`, with `last()` in the last one, to the settings that this one had."""
        self.optimizer._opt_called = True  # type: ignore[attr-defined]  # what schedulers ask for
        for number in range(step):
            if moves_groups:
                self.before(number)
                advance(self.optimizer)
            if number == step - 1:
                last()
            self.after()
        self.before(max(step - 1, 0))

    @property
    def rates(self) -> list[float]:
        """The learning rate of every group."""
        return [float(group.get("lr", 0.0)) for group in self.optimizer.param_groups]

    def after(self) -> None:
        """A step has been taken."""
        if self.own is not None:
            params = (p for group in self.optimizer.param_groups for p in group["params"])
            name = type(self.own).__name__
            try:
                with WeightsElsewhere(params, name):
                    self.own.step()
            except UserError:
                raise
            except RAISED as error:
                raise raised(error, name, "lr_schedule") from error


def optimized_shape(
    module: nn.Module, batch: Batch, optimizer: torch.optim.Optimizer, scope: Scope, clip_norm: float | None,
    ages: Mapping[str, object],
) -> tuple[StepShape, frozenset[str]]:  # fmt: skip
    """What a step on `batch` processes by the optimizer's own groups, and the parameters that are in none of them.

    Parameters of one group whose states differ in `ages` are not stepped on together.
    """
    names = {id(p): name for name, p in module.named_parameters()}
    groups = {
        names[id(p)]: (index, ages.get(names[id(p)]))
        for index, group in enumerate(optimizer.param_groups) for p in group["params"] if id(p) in names
    }  # fmt: skip
    apart = frozenset(names.values()) - set(groups)
    free = [n for n, p in module.named_parameters() if n in apart and p.requires_grad]
    if free and clip_norm is not None:
        problem = (
            f"{free[0]} takes a gradient but is in no group of the optimizer: clip it with the others or not?"
        )
        raise PlanError(problem, "clip_norm", "freeze it (requires_grad_(False)), or add it to a group")
    shape = step_shape(module, batch, states_per_element(same_kind(optimizer)))
    return replace(shape, groups=groups, whole_tensors=scope is Scope.PARAMETER), apart


def _own_data(
    job: Job, text: str, module: nn.Module, loss_fn: LossFunction | None, key: str = "data"
) -> tuple[LossFunction | None, OwnData]:
    """The data of a name, and the loss as it reads that."""
    found = named_object(text, "data")
    is_made = callable(found) and not hasattr(found, "__getitem__") and not hasattr(found, "__iter__")
    is_made |= isinstance(found, type)
    if is_made:
        source = passes(partial(_made, job, found, text, key, **job.data_args))
    elif job.data_args:
        raise ModelError(f"{text} takes no data_args", "data", "name a function that makes the data")
    elif isinstance(found, Iterator):
        raise DataError(f"{text} can be read only once", "data", "name a function that returns it")
    else:
        source = found
    inputs = PositionalInputs(module, loss_fn, text)
    dtype = TORCH[SHORT_DTYPES[job.dtype]]
    reading = Reading(job.global_batch, job.seed, dtype, job.shuffle, job.drop_last, job.data_gives)
    data = OwnData(text, source, reading, inputs.named)
    return inputs.loss_fn, data


class PositionalInputs:
    """Names for batches that have none: a tuple is forward's arguments in order, and then those of the loss."""

    def __init__(self, module: nn.Module, loss_fn: LossFunction | None, text: str) -> None:
        self.text, self._loss = text, loss_fn
        self._names, self._num_forward = tuple[str, ...](), 0
        self.forward = _positional(module.forward)
        targets = _positional(loss_fn)[1:] if loss_fn is not None else []
        self.reads_batch = any(p.name == "batch" for p in targets)
        self.targets = [p for p in targets if p.name != "batch"]

    @property
    def loss_fn(self) -> LossFunction | None:
        """The loss as it reads batches of the kind seen."""
        if self._loss is None:
            return None
        given = self._on_tuple if self.reads_batch else self._loss
        return given if not self._names else keeping(given, frozenset(self._names[self._num_forward :]))

    def _on_tuple(self, output: object, batch: Batch) -> Any:
        """A loss that takes the batch gets what the data gives: a tuple where that has no names."""
        assert self._loss is not None
        return self._loss(output, tuple(batch[n] for n in self._names) if self._names else batch)

    def named(self, value: object) -> Named:
        """The entries of what the data gives, by name. Raises DataError."""
        if isinstance(value, Mapping):
            if odd := [key for key in value if not isinstance(key, str)]:
                hint = "name entries by the arguments of forward and loss"
                raise DataError(f"an entry of a batch is called {odd[0]!r}", self.text, hint)
            return dict(value)
        if hasattr(value, "_asdict"):
            return dict(value._asdict())
        if is_dataclass(value) and not isinstance(value, type):
            return {each.name: getattr(value, each.name) for each in fields(value)}
        entries = (value,) if isinstance(value, torch.Tensor) else value
        if not isinstance(entries, tuple | list):
            raise DataError(
                f"a batch is a {type(value).__name__}", self.text, "give dicts, tuples or tensors"
            )
        self._names = self._names_of(len(entries))
        return dict(zip(self._names, entries, strict=True))

    def _names_of(self, count: int) -> tuple[str, ...]:
        required = [p.name for p in self.forward if p.default is p.empty]
        names = [p.name for p in self.forward]
        wanted = sum(p.default is p.empty for p in self.targets)
        if self.reads_batch and count > len(required) and len(names) > len(required):
            raise DataError(f"which of {count} entries are for forward({', '.join(names)})?", self.text,
                            "give dicts with the names of its arguments")  # fmt: skip
        if self._loss is None and (rest := count - len(names)) > 0:
            left = "1 entry is" if rest == 1 else f"{rest} entries are"
            raise DataError(f"{left} left over for the loss, and the job has none; forward takes ({', '.join(names)})",
                            self.text, "--set loss=file.py:name; or give dicts with the names of forward")  # fmt: skip
        num = min(len(names), max(len(required), count - wanted))
        rest, self._num_forward = count - num, min(num, count)
        more = (
            [f"entry_{i}" for i in range(rest)]
            if self.reads_batch
            else [p.name for p in self.targets[: max(rest, 0)]]
        )
        found = (*names[: min(num, count)], *more)
        if len(found) != count or len(set(found)) != count:
            takes = f"forward takes ({', '.join(names)})"
            takes += f"; after the output the loss takes ({', '.join(p.name for p in self.targets)})" * (
                self._loss is not None
            )
            raise DataError(f"a batch has {count} entries without names; by name {takes}", self.text,
                            "name as many arguments there, or give dicts with these names")  # fmt: skip
        return found


def _require_text_inputs(job: Job, module: nn.Module) -> None:
    """A model of the user's that is given no data must take text."""
    taken = parameters_of(module.forward)
    if not any(p.name == "input_ids" or p.kind is p.VAR_KEYWORD for p in taken):
        names = ", ".join(p.name for p in taken)
        problem = (
            f"no data was given, so a batch of text was made (input_ids, labels), but forward takes ({names})"
        )
        raise ModelError(
            problem, job.model, "give --data file.py:name, or example_batch(samples, seq) in the module"
        )


def _positional(function: Callable[..., object]) -> list[inspect.Parameter]:
    return [p for p in parameters_of(function) if p.kind is p.POSITIONAL_OR_KEYWORD]


def _require_order(job: Job, data: OwnData) -> None:
    """An order that was asked for must be that of the data."""
    is_shuffled = isinstance(getattr(data.source, "sampler", None), RandomSampler)
    if "shuffle" in job.model_fields_set and not data.is_indexed and job.shuffle != is_shuffled:
        problem = f"shuffle is {str(job.shuffle).lower()}, but what {job.data} gives has an order of its own"
        raise ConfigError(problem, "shuffle", "leave it out, or give the dataset itself")


def _require_example(job: Job, batch: Batch) -> None:
    """An example has the sizes that it was asked for: times and memory are taken from it."""
    found = sorted({value.shape[0] for value in tensors_of(batch).values() if value.dim()})
    if found and job.global_batch not in found:
        problem = f"example_batch gives {', '.join(map(str, found))} samples, not {job.global_batch}"
        raise ModelError(problem, job.model, "give as many samples as it is called with")
    _require_seq(job, batch, "example_batch")


def _require_seq(job: Job, batch: Batch, name: str) -> None:
    """A length that was asked for must be that of the data."""
    lengths = {v.shape[1] for v in tensors_of(batch).values() if v.dim() > 1}
    if "seq" in job.model_fields_set and lengths and job.seq not in lengths:
        found = ", ".join(map(str, sorted(lengths)))
        raise ConfigError(f"seq is {job.seq}, the samples of {name} have {found}", "seq", "leave it out")
