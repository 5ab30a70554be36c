"""scale: over numbers of chips, how long is a step, how efficient, where is the knee and what moves it?

`scale` is the Python entry; the command line takes a sweep file, or flags that say the same. Every point is re-planned
and predicted; with `--measure` those with few chips are trained as well, a few real steps on simulated chips of this
machine. What was worked out is remembered, so that a sweep that was interrupted goes on. A point that cannot be is a
row with its reason.
"""

import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import quantiles

from comms.errors import ConfigError, UserError
from comms.units import format_percent, format_seconds
from orchestrator.config.hardware.cluster import Cluster
from orchestrator.config.hardware.cluster_file import cluster_from, cluster_path, load_cluster
from orchestrator.config.job_file import Job, load_job
from orchestrator.config.schema import validate
from orchestrator.config.sweep_file import MeasureSection, Scaling, SweepFile
from orchestrator.config.yaml_file import Document, parse_scalar, read_yaml
from orchestrator.runs.metrics import read_metrics
from orchestrator.sweeps.point_pool import Levers, Pool, cores, groups_of, here, over_cores
from orchestrator.sweeps.point_prediction import plan_of
from orchestrator.sweeps.points import MeasuredSteps, Point, PointResult, Status, points_of
from orchestrator.sweeps.sweep_files import document, write_points, write_sweep
from orchestrator.sweeps.sweep_result import Sweep
from orchestrator.verbs.inputs.options import INTERRUPTED, ScaleOptions
from orchestrator.verbs.inputs.planned_inputs import SHORTCUTS
from orchestrator.views.console import Console

COMMAND = "the command line"
WARM_UP = 2  # steps of a measured run that are not counted
BESIDE_FILE = (
    "cluster", "job", "model", "data", "chips", "mode", "global_batch", "seq", "vary", "measure", "overrides",
)  # fmt: skip
Show = Callable[[Sweep, int], None]  # what is known so far, and the number of the point that came last


def main(options: ScaleOptions, console: Console) -> int:
    """The `scale` verb."""
    file, cluster, job = _asked(options)
    pool = _pool(options.address, cores())
    folder = options.out
    if folder is not None and folder.exists() and not folder.is_dir():
        raise ConfigError("the results need a folder", f"--out {folder}", "name one that is new, or a folder")
    started = time.monotonic()

    def show(sweep: Sweep, number: int) -> None:
        console.say(_progress(sweep, number, time.monotonic() - started))
        if folder is not None:
            write_points(folder, sweep)

    with console.phase("work out the points"):
        sweep = swept(file, cluster, job, pool, show)
    console.results(document(sweep), sweep.tables())
    if folder is not None:
        with console.phase("draw"):
            write_sweep(folder, sweep, time.time_ns() // 1_000_000)
        console.say(f"all of it in {folder}: index.html, scaling.png, points.csv, result.json, mllog.txt")
    if not sweep.is_complete:
        console.say("interrupted: the same command goes on from here")
        return INTERRUPTED
    return _require_some(sweep)


def _pool(address: str | None, workers: int) -> Pool:
    """Who works the points out: so many processes of this machine, or the Ray that is named."""
    if address is None:
        return here() if workers == 1 else over_cores(workers)
    from orchestrator.runners.on_ray.ray_address import ray_address
    from orchestrator.sweeps.ray_tasks import over_cluster

    return over_cluster(ray_address(address, os.environ))


def scale(
    cluster: str | Path | Cluster, job: Job | None = None, *, chips: Sequence[int], mode: str = "weak",
    vary: Mapping[str, Sequence[object]] | None = None, measure: str | None = None, workers: int | None = None,
    address: str | None = None,
) -> Sweep:  # fmt: skip
    """The job (by default the built-in one) on so many chips of a cluster, as a `Sweep` that prints and draws.

    `vary`: as --vary does. `measure`: "inline" or "ray". `workers`: processes, by default one per core; or `address`:
    the Ray whose machines work the points out. Raises UserError for what cannot be read; a point that cannot be is a
    row of the sweep.
    """
    root: dict[str, object] = {
        "kind": "sweep", "version": 1, "chips": list(chips), "modes": _modes(mode),
        "vary": {name: list(values) for name, values in (vary or {}).items()},
    }  # fmt: skip
    if measure is not None:
        root["measure"] = {"runner": measure}
    file = validate(Document("scale", root, {}), SweepFile)
    found = cluster if isinstance(cluster, Cluster) else load_cluster(cluster_path(str(cluster)))
    return swept(file, found, job or load_job(None), _pool(address, workers or cores()))


def swept(file: SweepFile, cluster: Cluster, job: Job, pool: Pool, show: Show | None = None) -> Sweep:
    """All points predicted by `pool`, then those measured that are to be. Interrupted, as far as it came."""
    points = points_of(file, cluster, job)
    results: list[PointResult | None] = [None] * len(points)
    levers: list[Levers] = []

    def so_far(*left_out: str) -> Sweep:
        return Sweep(cluster.name, points, tuple(results), tuple(levers), left_out)

    try:
        for found in pool(groups_of(points, cores())):
            if isinstance(found, Levers):
                levers.append(found)
                continue
            number, results[number] = found
            if show is not None:
                show(so_far(), number)
        if file.measure is not None:
            _measure(points, results, file.measure, lambda number: show and show(so_far(), number))
    except KeyboardInterrupt:
        return so_far("interrupted: not all points are there")
    levers.sort(key=lambda each: each.row.numbers)
    return so_far()


def _measure(
    points: Sequence[Point], results: list[PointResult | None], asked: MeasureSection, show: Callable[[int], object]
) -> None:  # fmt: skip
    """Real steps of every point that fits and has few chips, in place of what was known of it."""
    for number, (point, result) in enumerate(zip(points, results, strict=True)):
        if result is None or result.status is not Status.OK or point.chips > asked.most_chips:
            continue
        try:
            results[number] = replace(result, measured=_measured(point, result, asked))
        except UserError as error:
            results[number] = replace(result, reason=f"not measured: {error.problem}")
        show(number)


def _measured(point: Point, result: PointResult, asked: MeasureSection) -> MeasuredSteps:
    from orchestrator.verbs.train import (
        run as train,  # with torch, which predictions that are remembered do not need
    )

    steps = asked.steps
    job = point.job.model_copy(update={"steps": steps})
    with (
        tempfile.TemporaryDirectory(prefix="orchestrate-scale-") as folder,
        Path(os.devnull).open("w") as nowhere,
    ):
        trained = train(point.cluster, job, plan=plan_of(result), runner=str(asked.runner),
                        folder=Path(folder) / "run", console=Console(out=nowhere, err=nowhere))  # fmt: skip
        seconds = [float(str(r["step_time_s"])) for r in read_metrics(trained.run_dir / "metrics.jsonl")]
    counted = sorted(seconds[WARM_UP:])
    p10, *_, p90 = quantiles(counted, n=10, method="inclusive")
    p50 = quantiles(counted, n=2, method="inclusive")[0]
    work = result.tokens_per_s * result.step_time_s
    return MeasuredSteps(
        len(counted), p10, p50, p90, work / p50, str(asked.runner), point.cluster.actors or cores()
    )


def _asked(options: ScaleOptions) -> tuple[SweepFile, Cluster, Job]:
    """What a sweep file says, or the flags. Raises ConfigError."""
    if options.file is not None:
        return _from_file(options)
    if options.chips is None:
        raise ConfigError("no numbers of chips are given", "scale", "--chips 8,64,512, or a sweep file")
    root: dict[str, object] = {
        "kind": "sweep", "version": 1, "chips": _values("--chips", options.chips),
        "modes": _modes(options.mode or Scaling.WEAK), "vary": _varied(options.vary),
    }  # fmt: skip
    if options.measure is not None:
        root["measure"] = {"runner": options.measure}
    file = validate(Document(COMMAND, root, {}), SweepFile)
    given = {name: getattr(options, name, None) for name in SHORTCUTS}
    shortcuts = [f"{name}={value}" for name, value in given.items() if value is not None]
    job = load_job(options.job, (*shortcuts, *options.overrides))
    return file, cluster_from(read_yaml(options.cluster or cluster_path(file.cluster))), job


def _from_file(options: ScaleOptions) -> tuple[SweepFile, Cluster, Job]:
    assert options.file is not None
    if given := [name for name in BESIDE_FILE if getattr(options, name)]:
        flag = "set" if given[0] == "overrides" else given[0].replace("_", "-")
        raise ConfigError(
            f"--{flag} beside a sweep file", str(options.file), "write it there, or leave one out"
        )
    file = validate(read_yaml(options.file), SweepFile)
    near = options.file.parent / file.cluster
    job = options.file.parent / file.job if file.job else None
    cluster = load_cluster(near if near.is_file() else cluster_path(file.cluster))
    return file, cluster, load_job(job, tuple(file.overrides))


def _modes(mode: str) -> list[str]:
    return [str(each) for each in Scaling] if mode == "both" else [mode]


def _varied(texts: Sequence[str]) -> dict[str, object]:
    """`seq=1024,2048` as a key and its values."""
    found: dict[str, object] = {}
    for text in texts:
        name, separator, values = text.partition("=")
        if not separator or name in found:
            problem = f"{name} is varied twice" if separator else f"cannot read {text!r}"
            raise ConfigError(problem, f"--vary {text}", "write it like --vary seq=1024,2048, once")
        found[name] = _values(f"--vary {name}", values)
    return found


def _values(flag: str, text: str) -> list[object]:
    values = [parse_scalar(value.strip(), flag) for value in text.split(",")]
    is_factor = flag.endswith(("bandwidth", "latency"))
    return [float(value) if is_factor and isinstance(value, int) else value for value in values]


def _progress(sweep: Sweep, number: int, seconds: float) -> str:
    """A line for a point that has just come."""
    point, result = sweep.points[number], sweep.results[number]
    assert result is not None
    done = sum(found is not None for found in sweep.results)
    said = f"{result.status}: {result.reason}"
    if result.status is Status.OK:
        said = f"{format_seconds(result.step_time_s)}, MFU {format_percent(result.mfu)}, {result.plan}"
    if result.reason and result.status is Status.OK:
        said = f"{result.reason}; predicted {said}"
    if result.measured is not None:
        said = f"measured {format_seconds(result.measured.p50_s)}, predicted {said}"
    name = sweep.names[point.series]
    return f"{done} of {len(sweep.points)} after {seconds:.0f} s: {name}, {point.chips:,} chips: {said}"


def _require_some(sweep: Sweep) -> int:
    """0, or the exit code that a single point would have had where none can be."""
    found = {result.status for result in sweep.results if result is not None}
    if Status.OK in found:
        return 0
    return 3 if Status.TOO_LARGE in found else UserError.exit_code
