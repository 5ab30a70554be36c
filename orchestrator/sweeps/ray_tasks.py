"""Ray tasks: a pool whose points are worked out on the machines of a Ray cluster, a task for each series.

Results come back series by series and are remembered here as well. Models of the user's own code or files are worked
out on this machine: the others do not have them.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from comms.errors import ClusterError, RunError
from orchestrator.planning.preparation import remember
from orchestrator.runners.on_ray.ray_address import RayAddress
from orchestrator.runners.on_ray.ray_connection import RayConnection
from orchestrator.sweeps.point_pool import (
    Found,
    Group,
    Levers,
    Pool,
    SeriesRow,
    has_content,
    here,
    is_known,
    remember_point,
    worked_out,
)
from orchestrator.sweeps.points import Point

CORES = 1  # of a task: a point is worked out by one thread


def over_cluster(address: RayAddress) -> Pool:
    """As tasks of the Ray at `address`; what is remembered here is looked up without it.

    Raises ClusterError for a Ray that cannot be joined, RunError for tasks that were lost.
    """

    def run(groups: Sequence[Group]) -> Iterator[Found]:
        away, rest = list[SeriesRow](), list[Group]()
        for group in groups:
            travels = [_travels(row) for row in group]
            away += [row for row, does in zip(group, travels, strict=True) if does]
            rest.append(tuple(row for row, does in zip(group, travels, strict=True) if not does))
        if away:
            connection = RayConnection(address)
            try:
                _require_core(connection, address)
                yield from _results(away)
            finally:
                connection.close()
        yield from here()(rest)

    return run


def _travels(row: SeriesRow) -> bool:
    return all(map(has_content, row.points)) and not all(map(is_known, row.points))


def _require_core(connection: RayConnection, address: RayAddress) -> None:
    """Raise ClusterError where every core is held: Ray would wait for as long as that is so."""
    if connection.free().get("CPU", 0.0) < CORES:
        where = f"{address.text} ({address.said})"
        raise ClusterError("no core is free there", where, "see `ray status`; or leave out --address")


def _results(rows: Sequence[SeriesRow]) -> Iterator[Found]:
    import ray

    task: Any = ray.remote(num_cpus=CORES)(_worked_out)
    waiting = [task.remote(row) for row in rows]
    points = {number: point for row in rows for number, point in zip(row.numbers, row.points, strict=True)}
    try:
        while waiting:
            ready, waiting = ray.wait(waiting, num_returns=1)
            for found in ray.get(ready[0]):
                _remember(found, points)
                yield found
    except ray.exceptions.RayError as error:
        said = str(error).strip().splitlines()
        hint = "see that cluster's logs; what is done is kept: the same command goes on"
        raise RunError(
            f"tasks of the sweep were lost: {said[-1] if said else error}", "sweep", hint
        ) from error


def _worked_out(row: SeriesRow) -> list[Found]:
    return list(worked_out((row,)))


def _remember(found: Found, points: Mapping[int, Point]) -> None:
    if not isinstance(found, Levers):
        remember_point(points[found[0]], found[1])
    elif found.entry is not None:
        remember(found.entry, found.text.encode())
