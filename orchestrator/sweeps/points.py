"""Points of a sweep: which job runs on which chips, and what it came to. Values alone, as files hold them.

A *series* is one line of a picture: the points that differ in the number of chips only.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from fractions import Fraction
from itertools import product
from re import findall

from comms.errors import ConfigError
from orchestrator.config.hardware.cluster import Cluster
from orchestrator.config.job_file import Job
from orchestrator.config.sweep_file import Scaling, SweepFile
from orchestrator.sweeps.what_if import Factors, scaled

AUTO = "auto"


class Status(StrEnum):
    """What became of a point."""

    OK = "ok"
    TOO_LARGE = "does not fit"
    REFUSED = "refused"


@dataclass(frozen=True, slots=True)
class Series:
    """What the points of one line have in common."""

    mode: Scaling
    model: str
    batch: Fraction  # samples: of all chips (strong), of each chip (weak)
    seq: int
    bandwidth: float = 1.0
    latency: float = 1.0
    plan: str = AUTO
    actors: int | None = None

    @property
    def batch_text(self) -> str:
        """The batch in words."""
        each = " per chip" if self.mode is Scaling.WEAK else " in all"
        return f"{float(self.batch):.12g} sample{'s' * (self.batch != 1)}{each}"


@dataclass(frozen=True, slots=True)
class Point:
    """One job on one cluster."""

    series: Series
    cluster: Cluster = field(repr=False)
    job: Job = field(repr=False)

    @property
    def chips(self) -> int:
        """How many."""
        return self.cluster.num_chips


@dataclass(frozen=True, slots=True)
class MeasuredSteps:
    """Real steps of a point on this machine: seconds, and what it processed in each."""

    steps: int
    p10_s: float
    p50_s: float
    p90_s: float
    tokens_per_s: float  # at the median step
    runner: str
    workers: int


@dataclass(frozen=True, slots=True)
class PointResult:
    """What a point came to: if it does not fit, the memory of its smallest plan; if it is refused, no figures.

    Shares are of the step, of one chip, mean over all.
    """

    status: Status
    chips: int
    global_batch: int
    reason: str = ""
    plan: str = ""
    degrees: Mapping[str, int | str] = field(default_factory=dict)
    step_time_s: float = 0.0
    tokens_per_s: float = 0.0
    rate_unit: str = "tok/s"
    mfu: float = 0.0
    model_flops: int = 0
    peak_memory_bytes: int = 0
    memory_bytes: int = 0
    compute_s: float = 0.0
    optimizer_s: float = 0.0
    host_s: float = 0.0
    bubble_s: float = 0.0
    exposed_communication_s: Mapping[str, float] = field(default_factory=dict)
    cost_usd_per_step: float | None = None
    energy_j_per_step: float | None = None
    measured: MeasuredSteps | None = None

    @property
    def per_chip(self) -> float:
        """Throughput over the number of chips."""
        return self.tokens_per_s / self.chips

    def document(self) -> dict[str, object]:
        """As JSON values."""
        return asdict(self)


def point_result(document: Mapping[str, object]) -> PointResult:
    """What `document` made a document of. Raises ValueError or TypeError for anything else."""
    values = dict(document)
    values["status"] = Status(str(values["status"]))
    if isinstance(own := values.get("measured"), dict):
        values["measured"] = MeasuredSteps(**own)
    return PointResult(**values)  # type: ignore[arg-type]


def points_of(sweep: SweepFile, cluster: Cluster, job: Job) -> tuple[Point, ...]:
    """All points, series by series, each from few chips to many. Raises ConfigError for a batch that is not whole."""
    return tuple(
        point
        for series, wished in _series(sweep, job)
        for point in _points(series, sorted(sweep.chips), cluster, wished)
    )


def _series(sweep: SweepFile, job: Job) -> Iterator[tuple[Series, Job]]:
    vary, fewest = sweep.vary, min(sweep.chips)
    for mode, model, batch, seq in product(
        sweep.modes, vary.model or [job.model], vary.batch or [job.global_batch], vary.seq or [job.seq]
    ):
        given = Fraction(batch)
        if mode is Scaling.WEAK:
            each = sweep.batch_per_chip
            given = given / fewest if each is None else Fraction(each).limit_denominator(1 << 20)
        actors_of: list[int | None] = [*vary.actors] or [None]
        for bandwidth, latency, plan, actors in product(
            vary.bandwidth or [1.0], vary.latency or [1.0], vary.plan or [AUTO], actors_of
        ):
            yield (
                Series(mode, model, given, seq, bandwidth, latency, plan, actors),
                _wished(job, model, seq, plan),
            )


def _wished(job: Job, model: str, seq: int, plan: str) -> Job:
    """The job with what a series asks for; what its plan names is fixed, as if the job had said it."""
    degrees = {name: int(value) for name, value in findall(r"([a-z]+)(\d+)", plan)}
    section = job.plan.model_copy(update=degrees)
    changed = {name: value for name, value in (("model", model), ("seq", seq)) if getattr(job, name) != value}
    return job.model_copy(update={**changed, "plan": section}) if changed or degrees else job


def _points(series: Series, chips: Sequence[int], cluster: Cluster, job: Job) -> Iterator[Point]:
    described = scaled(cluster, Factors(series.bandwidth, series.latency))
    for count in chips:
        batch = series.batch * (count if series.mode is Scaling.WEAK else 1)
        if batch.denominator != 1:
            problem = f"{series.batch_text} make {float(batch):.6g} samples on {count} chips"
            raise ConfigError(problem, "batch", "give a batch that is whole on every number of chips")
        taken = described.take(count)
        yield Point(series, replace(taken, actors=series.actors or taken.actors),
                    job.model_copy(update={"global_batch": int(batch)}))  # fmt: skip
