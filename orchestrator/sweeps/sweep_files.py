"""Sweep files: what a sweep leaves in its folder.

result.json (all there is), points.csv (a row for each point), scaling.png and scaling.svg, index.html (one page, no
network) and mllog.txt, lines of the MLPerf logging format (`:::MLLOG` and JSON) with its keys: global_batch_size and
tracked_stats (throughput, step_time) for each point. Columns of the CSV file have their unit in their name.
"""

import csv
import io
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from orchestrator.runs.disk import write_whole
from orchestrator.sweeps.curves import CurvePoint, knee
from orchestrator.sweeps.points import Point, PointResult
from orchestrator.sweeps.sweep_result import DEFINITIONS, Sweep

AXES = ("tp", "dp", "pp", "all")
FIGURES = (
    "step_time_s", "tokens_per_s", "mfu", "model_flops", "peak_memory_bytes", "memory_bytes", "compute_s",
    "optimizer_s", "host_s", "bubble_s", "cost_usd_per_step", "energy_j_per_step",
)  # fmt: skip
SERIES = ("mode", "model", "seq", "bandwidth", "latency", "actors")
MEASURED = ("runner", "workers", "steps", "p10_s", "p50_s", "p90_s", "tokens_per_s")
PREFIX = ":::MLLOG"


def rows(sweep: Sweep) -> list[dict[str, object]]:
    """One for each point that has a result, as flat values; None where there is none."""
    curves = {series: {p.chips: p for p in sweep.curve(series)} for series in sweep.series}
    return [
        _row(point, result, curves[point.series].get(point.chips))
        for point, result in zip(sweep.points, sweep.results, strict=True)
        if result is not None
    ]


def _row(point: Point, result: PointResult, at: CurvePoint | None) -> dict[str, object]:
    series, plain = point.series, result.document()
    return {
        **{name: getattr(series, name) for name in SERIES}, "asked_plan": series.plan,
        "batch": float(series.batch), "chips": result.chips, "global_batch": result.global_batch,
        "status": str(result.status), "reason": result.reason, "plan": result.plan,
        **{f"plan_{name}": result.degrees.get(name) for name in ("dp", "tp", "pp", "zero", "microbatches", "schedule")},
        **{name: plain[name] if at or name.endswith("memory_bytes") else None for name in FIGURES},
        "throughput_unit": result.rate_unit,
        "tokens_per_s_per_chip": result.per_chip if at else None,
        **{f"exposed_{axis}_s": result.exposed_communication_s.get(axis) for axis in AXES},
        "speed_up": at and at.speed_up, "efficiency": at and at.efficiency, "doubling_gain": at and at.gain,
        **{f"measured_{name}": getattr(result.measured, name, None) for name in MEASURED},
    }  # fmt: skip


def csv_text(sweep: Sweep) -> str:
    """The rows as a CSV file; empty where there is no value. Numbers read back equal."""
    found, file = rows(sweep), io.StringIO()
    writer = csv.DictWriter(file, list(found[0]) if found else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows({k: "" if v is None else repr(v) if isinstance(v, float) else v for k, v in row.items()}
                     for row in found)  # fmt: skip
    return file.getvalue()


def document(sweep: Sweep) -> dict[str, object]:
    """As JSON values."""
    curves = [
        {
            "series": sweep.names[series], **{name: getattr(series, name) for name in SERIES},
            "asked_plan": series.plan, "batch": float(series.batch), "knee_chips": knee(sweep.curve(series)),
            "curve": [asdict(point) for point in sweep.curve(series)],
        }
        for series in sweep.series
    ]  # fmt: skip
    levers = [
        {"series": sweep.names[each.row.points[0].series], "knee_chips": each.at, "chips": each.beyond,
         "efficiency": each.efficiencies}
        for each in sweep.levers
    ]  # fmt: skip
    return {
        "kind": "sweep_result", "version": 1, "title": sweep.title, "cluster": sweep.cluster,
        "complete": sweep.is_complete, "findings": sweep.findings, "definitions": list(DEFINITIONS),
        "points": rows(sweep), "series": curves, "levers": levers,
    }  # fmt: skip


def mllog_lines(sweep: Sweep, time_ms: int) -> Iterator[str]:
    """Lines of the MLPerf logging format; all have the same time, that of their writing."""

    def line(event: str, key: str, value: object, metadata: object) -> str:
        values = {"namespace": "", "time_ms": time_ms, "event_type": event, "key": key, "value": value}
        return f"{PREFIX} {json.dumps(values | {'metadata': metadata})}"

    yield line("POINT_IN_TIME", "submission_benchmark", sweep.title, {})
    yield line("POINT_IN_TIME", "submission_platform", sweep.cluster, {})
    for number, row in enumerate(rows(sweep)):
        if row["speed_up"] is None:
            continue
        said = {name: row[name] for name in ("mode", "model", "chips", "seq", "plan")}
        yield line("POINT_IN_TIME", "global_batch_size", row["global_batch"], said | {"point": number})
        for source, rate, step in (
            ("predicted", "tokens_per_s", "step_time_s"),
            ("measured", "measured_tokens_per_s", "measured_p50_s"),
        ):
            if row[rate] is not None:
                stats = {"throughput": row[rate], "step_time": row[step]}
                yield line(
                    "POINT_IN_TIME", "tracked_stats", stats, said | {"point": number, "source": source}
                )


def write_points(folder: Path, sweep: Sweep) -> None:
    """What is known so far, whole."""
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "points.csv", csv_text(sweep).encode())


def write_sweep(folder: Path, sweep: Sweep, time_ms: int) -> None:
    """All files of a sweep; those of an interrupted one as far as it came."""
    write_points(folder, sweep)
    write_whole(folder / "result.json", (json.dumps(document(sweep), indent=1) + "\n").encode())
    write_whole(folder / "mllog.txt", "".join(f"{line}\n" for line in mllog_lines(sweep, time_ms)).encode())
    write_whole(folder / "index.html", sweep.page().encode())
    if sweep.panels:
        sweep.plot(folder / "scaling.png")
        sweep.plot(folder / "scaling.svg")
