"""The plan: degrees, schedule and cuts, everything that decides how a model is split.

A plan is a small YAML file that can be saved, edited and given back. Mesh axes are (pp, dp, tp), tp fastest, so
that the chips of a tensor-parallel group are neighbours on the fastest links.
"""

import reprlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from enum import StrEnum
from typing import Any

import yaml

from comms.errors import PartitionError, located
from partitioner.layout.pipeline_schedules import PipelineSchedule

VERSION = 1
HINT = "see the plan.yaml of a run"
MOST_MICROBATCHES = 2**14  # each is in every Program; the largest runs that are published have some thousand
MOST = 2**40  # of a number in a plan file; that of bytes in a bucket is the largest


class BatchNorms(StrEnum):
    """By whose statistics a batch norm normalises: of the whole batch, or of each part (replica and microbatch)."""

    SYNCHRONISED = "synchronised"
    PER_PART = "per_part"


DEFAULT_BUCKET_BYTES = 25_000_000  # gradient bucket, torch DDP's default


@dataclass(frozen=True, slots=True)
class Plan:
    """How a model is split over `dp * tp * pp` chips.

    `stages[s]` is the number of units in pipeline stage s; empty = balance them by FLOPs. `zero` 1 shards the
    optimizer state over dp. `bucket_bytes`: gradients are reduced in buckets of at least this size. `batch_norm` alone
    changes what is trained.
    """

    dp: int = 1
    tp: int = 1
    pp: int = 1
    zero: int = 0
    schedule: PipelineSchedule = PipelineSchedule.ONE_F_ONE_B
    microbatches: int = 1
    stages: tuple[int, ...] = ()
    bucket_bytes: int = DEFAULT_BUCKET_BYTES
    batch_norm: BatchNorms = BatchNorms.SYNCHRONISED

    def __post_init__(self) -> None:
        for name in ("dp", "tp", "pp", "microbatches"):
            if type(getattr(self, name)) is not int or getattr(self, name) < 1:
                raise PartitionError(
                    f"{name} is {getattr(self, name)!r}", "plan", f"{name} must be at least 1"
                )
        if self.microbatches > MOST_MICROBATCHES:
            hint = f"at most {MOST_MICROBATCHES}: take fewer, larger ones, or a smaller batch"
            raise PartitionError(f"microbatches is {self.microbatches}", "plan", hint)
        if type(self.zero) is not int or self.zero not in (0, 1):
            raise PartitionError(f"zero is {self.zero!r}", "plan", "zero must be 0 or 1")
        if any(size < 1 for size in self.stages):
            raise PartitionError(f"stages {list(self.stages)} has an empty stage", "plan",
                                 "give every stage at least one unit")  # fmt: skip
        if self.stages and len(self.stages) != self.pp:
            raise PartitionError(f"{len(self.stages)} stages listed for pp = {self.pp}", "plan",
                                 "give one unit count per stage, or none")  # fmt: skip

    @property
    def num_chips(self) -> int:
        return self.dp * self.tp * self.pp

    @property
    def norm_parts(self) -> int:
        """Into how many parts, each normalised by itself, a batch norm cuts the batch."""
        return self.dp * self.microbatches if self.batch_norm is BatchNorms.PER_PART else 1

    @property
    def axes(self) -> tuple[tuple[str, int], ...]:
        return (("pp", self.pp), ("dp", self.dp), ("tp", self.tp))

    def __str__(self) -> str:
        norms = "" if self.batch_norm is BatchNorms.SYNCHRONISED else f" batch norm {self.batch_norm}"
        return (
            f"dp{self.dp} tp{self.tp} pp{self.pp} zero{self.zero} {self.schedule} x{self.microbatches}{norms}"
        )


def plan_to_yaml(plan: Plan) -> str:
    """The plan as an editable file."""
    words = {"schedule": str(plan.schedule), "batch_norm": str(plan.batch_norm)}
    fields = asdict(plan) | words | {"stages": list(plan.stages)}
    return yaml.safe_dump(
        {"kind": "plan", "version": VERSION} | fields, sort_keys=False, default_flow_style=None
    )


def plan_from_yaml(text: str, where: str = "plan") -> Plan:
    """Read a plan back; PartitionError names unknown keys and wrong values."""
    try:
        raw = yaml.safe_load(text)
    # Brackets by the thousand, !!int of a word, a date that there is not.
    except (
        yaml.YAMLError,
        RecursionError,
        ArithmeticError,
        AttributeError,
        LookupError,
        ValueError,
    ) as error:
        raise PartitionError(f"not YAML: {error}", where, HINT) from error
    return plan_from(raw, lambda *_: where)


def plan_from(raw: object, where: Callable[..., str]) -> Plan:
    """The plan that a file says; `where` names the place of a key (of none: the file). Raises PartitionError."""
    if not isinstance(raw, Mapping) or raw.get("kind") != "plan" or type(raw.get("version")) is not int:
        raise PartitionError("not a plan file", where(), f"it starts with kind: plan and version: {VERSION}")
    if raw["version"] != VERSION:
        problem = f"a plan file of version {_shown(raw['version'])}"
        raise PartitionError(problem, where("version"), f"this reads version {VERSION}")
    known = [field.name for field in fields(Plan)]
    values: dict[str, Any] = {}
    for key in (key for key in raw if key not in ("kind", "version")):
        if key not in known:
            hint = f"known keys: {', '.join(known)}"
            raise PartitionError(f"unknown key {_shown(key)}", where(key), hint)
        try:
            values[key] = _READERS.get(key, _whole)(raw[key])
        except ValueError as error:
            raise PartitionError(f"{key} {error}", where(key), HINT) from error
    with located(words={"plan": where()}):
        return Plan(**values)


def _whole(value: object) -> int:
    if type(value) is not int:
        raise ValueError(f"must be a whole number, not {_shown(value)}")
    if not 0 <= value <= MOST:
        raise ValueError(f"must be from 0 to {MOST}, not {_shown(value)}")
    return value


def _stages(value: object) -> tuple[int, ...]:
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise ValueError(f"must be a list of whole numbers, not {_shown(value)}")
    return tuple(map(_whole, value))


def _word(known: Iterable[StrEnum]) -> Callable[[object], StrEnum]:
    def read(value: object) -> StrEnum:
        for member in known:
            if member == value:
                return member
        raise ValueError(f"cannot be {_shown(value)}; known: {', '.join(known)}")

    return read


def _shown(value: object) -> str:
    """A value in a message, however large it is."""
    try:
        return reprlib.repr(value)
    except ValueError:  # a number of more digits than Python writes
        return "a number of thousands of digits"


_READERS: Mapping[str, Callable[[object], object]] = {
    "schedule": _word(PipelineSchedule), "stages": _stages, "batch_norm": _word(BatchNorms),
}  # fmt: skip


def balance(costs: Sequence[float], num_stages: int) -> tuple[int, ...]:
    """Sizes of `num_stages` contiguous non-empty groups of `costs` whose largest sum is smallest.

    Exact, by dynamic programming over prefixes (Alpa's inter-operator slicing without the device choice);
    O(stages * n^2). Ties go to earlier, larger groups.
    """
    count = len(costs)
    if count < num_stages:
        raise PartitionError(f"the model has {count} pieces for {num_stages} pipeline stages", "plan",
                             f"use pp <= {count}")  # fmt: skip
    prefix = [0.0]
    for cost in costs:
        prefix.append(prefix[-1] + cost)
    best = {0: (0.0, ())}  # type: dict[int, tuple[float, tuple[int, ...]]]
    for stage in range(1, num_stages + 1):
        found: dict[int, tuple[float, tuple[int, ...]]] = {}
        for end in range(stage, count - (num_stages - stage) + 1):
            options = ((max(worst, prefix[end] - prefix[start]), -start, (*cuts, end - start))
                       for start, (worst, cuts) in best.items() if start < end)  # fmt: skip
            worst, _, cuts = min(options)
            found[end] = (worst, cuts)
        best = found
    return best[count][1]
