"""Point pool: who works out the points, and what is remembered of them.

Points are handed out in groups that share a model, so that each is captured in one place; within a group, series by
series. `here` does them one after the other, `over_cores` in processes, the largest models first. Both yield results as
they come; `ray_tasks` has a third one.

A point that was worked out before from the same content comes from the user's cache; a sweep that was interrupted goes
on from there. Models of the user's own code are worked out anew, as their content is not known.
"""

import json
import multiprocessing as mp
import os
import queue
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TypeAlias

from comms.errors import ModelError, RunError
from comms.selection.progress import Progress, quiet
from orchestrator.models.model_specs import SourceKind, gpt_options, parse_model
from orchestrator.planning.job_capture import JobCapture, model_content
from orchestrator.planning.preparation import key_of, recall, remember
from orchestrator.runners.timing.fastest_plan import ROOMS
from orchestrator.sweeps.curves import curve, knee
from orchestrator.sweeps.point_prediction import Predictor, plan_of
from orchestrator.sweeps.points import Point, PointResult, Status, point_result

PATIENCE_S = 1.0  # between looks at whether the processes are alive


@dataclass(frozen=True, slots=True)
class SeriesRow:
    """A series: its points, and where they stand in the sweep."""

    numbers: tuple[int, ...]
    points: tuple[Point, ...]


@dataclass(frozen=True, slots=True)
class Levers:
    """Of a series: chips beyond which a doubling gains little, and efficiencies there by what is twice as good."""

    row: SeriesRow
    at: int | None
    beyond: int
    efficiencies: dict[str, float]
    entry: str | None = None  # in the cache; None where content is not known

    @property
    def text(self) -> str:
        """What is remembered of it."""
        return json.dumps(self.efficiencies)


Group: TypeAlias = tuple[SeriesRow, ...]
Found: TypeAlias = tuple[int, PointResult] | Levers
Pool: TypeAlias = Callable[[Sequence[Group]], Iterator[Found]]


def groups_of(points: Sequence[Point], workers: int) -> list[Group]:
    """Series that share a model, the largest first; series of one model are dealt out where there are few models."""
    rows: dict[object, list[int]] = {}
    for number, point in enumerate(points):
        rows.setdefault(point.series, []).append(number)
    by_model: dict[object, list[SeriesRow]] = {}
    for numbers in rows.values():
        row = SeriesRow(tuple(numbers), tuple(points[number] for number in numbers))
        first = row.points[0]
        by_model.setdefault((first.series.model, first.series.seq), []).append(row)
    ordered = sorted(by_model.values(), key=lambda rows: -_layers(rows[0].points[0]))
    deals = -(-workers // max(len(ordered), 1))
    return [tuple(rows[deal::deals]) for rows in ordered for deal in range(deals) if rows[deal::deals]]


def _layers(point: Point) -> int:
    """How large a model is, roughly, where that is known before it is built."""
    spec = parse_model(point.job.model)
    if spec.kind is not SourceKind.BUILTIN:
        return 0
    with suppress(ModelError):
        options = gpt_options(spec.target, point.job.model_args)
        return options.layers * options.width
    return 0


def worked_out(group: Group, progress: Progress = quiet) -> Iterator[Found]:
    """The results of a group's points, then what moves the knee of each series."""
    predictor = Predictor(progress)
    for row in group:
        results: list[PointResult] = []
        for number, point in zip(row.numbers, row.points, strict=True):
            result = _recalled(point)
            if result is None:
                result = predictor.predict(point)
                remember_point(point, result)
            results.append(result)
            yield number, result
        if (found := _levers(row, results, predictor)) is not None:
            yield found


def _levers(row: SeriesRow, results: Sequence[PointResult], predictor: Predictor) -> Levers | None:
    """At the first point beyond the knee, else at the last."""
    fits = [at for at, result in enumerate(results) if result.status is Status.OK]
    if len(fits) < 2:
        return None
    at = knee(curve([(results[i].chips, results[i].tokens_per_s) for i in fits]))
    last = next((i for i in fits if at is not None and results[i].chips > at), fits[-1])
    keys = [_key(row.points[i]) for i in (fits[0], last)]
    entry = (
        None
        if None in keys
        else f"{key_of({'levers': keys, 'plans': [results[fits[0]].plan, results[last].plan]}, ROOMS)}.levers"
    )
    with suppress(OSError, ValueError):
        if entry is not None:
            return Levers(row, at, results[last].chips, json.loads(recall(entry)), entry)
    found = predictor.levers(
        row.points[fits[0]], plan_of(results[fits[0]]), row.points[last], plan_of(results[last])
    )
    levers = Levers(row, at, results[last].chips, found, entry)
    if entry is not None:
        remember(entry, levers.text.encode())
    return levers


def _key(point: Point) -> str | None:
    """Its entry in the cache; None where its content is not known."""
    if JobCapture(point.job).content is None:
        return None
    facts = {
        "point": model_content(point.job), "batch": point.job.global_batch, "asked": repr(point.job.plan),
        "set": sorted(point.job.plan.model_fields_set), "microbatches": point.job.microbatches,
        "cluster": repr(replace(point.cluster, origin="", actors=None)),
    }  # fmt: skip
    return f"{key_of(facts, ROOMS)}.point"


def _recalled(point: Point) -> PointResult | None:
    entry = _key(point)
    if entry is not None:
        with suppress(OSError, ValueError, TypeError, KeyError):
            return point_result(json.loads(recall(entry)))
    return None


def has_content(point: Point) -> bool:
    """Whether its name says what it is, on any machine: not so for the user's own code and files."""
    return _key(point) is not None


def is_known(point: Point) -> bool:
    """Whether it was worked out before."""
    return _recalled(point) is not None


def remember_point(point: Point, result: PointResult) -> None:
    """Keep a result in the user's cache, where the point's content is known."""
    if (entry := _key(point)) is not None:
        remember(entry, json.dumps(result.document()).encode())


def here(progress: Progress = quiet) -> Pool:
    """In this process, one after the other."""

    def run(groups: Sequence[Group]) -> Iterator[Found]:
        for group in groups:
            yield from worked_out(group, progress)

    return run


def over_cores(workers: int) -> Pool:
    """In processes of this machine; what is remembered is looked up without any."""

    def run(groups: Sequence[Group]) -> Iterator[Found]:
        if all(is_known(point) for group in groups for row in group for point in row.points):
            yield from here()(groups)
            return
        # fork is quick, but not where threads of these libraries run already
        is_bare = not {"torch", "ray"} & sys.modules.keys()
        context = mp.get_context("fork") if is_bare else mp.get_context("spawn")
        tasks, results = context.Queue(), context.Queue()
        for group in groups:
            tasks.put(group)
        count = min(workers, len(groups))
        for _ in range(count):
            tasks.put(None)
        processes = [context.Process(target=_work, args=(tasks, results), daemon=True) for _ in range(count)]
        for process in processes:
            process.start()
        try:
            yield from _results(results, processes)
        finally:
            for process in processes:
                process.terminate()
                process.join()

    return run


def _work(tasks: "mp.Queue[Group | None]", results: "mp.Queue[Found | BaseException | None]") -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever started it ends it
    try:
        while (group := tasks.get()) is not None:
            for found in worked_out(group):
                results.put(found)
    except Exception as error:  # not of a point, which would be its result
        results.put(error)
    results.put(None)


def _results(
    results: "mp.Queue[Found | BaseException | None]", processes: Sequence[mp.process.BaseProcess]
) -> Iterator[Found]:
    left = len(processes)
    while left:
        try:
            found = results.get(timeout=PATIENCE_S)
        except queue.Empty:
            if not any(process.is_alive() for process in processes) and results.empty():
                problem = f"{left} of {len(processes)} processes ended before their points"
                raise RunError(
                    problem, "sweep", "see if there is memory enough; what is done is kept"
                ) from None
            continue
        if isinstance(found, BaseException):
            raise found
        if found is None:
            left -= 1
        else:
            yield found


def cores() -> int:
    """Processes that this machine has cores for."""
    return len(os.sched_getaffinity(0))
