"""How well a fabric's few constants describe published curves of nccl-tests, and carry over to other fabrics.

Held out: every second point is left out of the fit and then predicted; once the odd ones, once the even ones.
Transfer: one fabric from another's three constants and its own sheet. Large messages: bus bandwidths read from
slides, from the constants of a100-8 and the sheet.   python benchmarks/nccl_curves.py
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from support.harness import report

from comms.calibration.calibration import (
    LARGE_NBYTES,
    FabricFit,
    MeasuredRun,
    Residual,
    Sheet,
    fit_fabric,
    hold_out,
    mean_error,
    predict,
    residuals_of,
    transfer,
)
from comms.calibration.measured_tables import bus_factor, read_csv
from comms.collectives.schedule import Op
from comms.units import Quantity, parse

CURVES = Path(__file__).parent.parent / "tests" / "comms" / "calibration" / "nccl_curves.yaml"
TOGETHER = {"a100-2+4": ("a100-2", "a100-4"), "v100-2+4+8": ("v100-2", "v100-4", "v100-8")}
TARGETS = {"from_1MiB": 0.10, "below_1MiB": 0.25, "transfer": 0.20}
LARGE_MESSAGE = 2.0**34
BRIDGE = "rtx2080ti-2"


def main() -> None:
    """Fit, predict and report."""
    document = yaml.safe_load(CURVES.read_text())
    runs = {row["name"]: run_of(row) for row in document["curves"]}
    groups = grouped(runs)
    rows: list[dict[str, object]] = []
    for eager in (False, True):
        for name, group in groups.items():
            rows += held_out(name, group, eager)
    fits = {name: fit_fabric(group) for name, group in groups.items() if group[0].sheet.bytes_per_s}
    rows += [
        transferred(name, fit, other, run)
        for name, fit in fits.items()
        for other, run in runs.items()
        if other not in (name, *TOGETHER.get(name, ())) and run.sheet.bytes_per_s
    ]
    rows += [large_message(fits["a100-8"], row) for row in document["large_messages"]]
    report("nccl_curves", [*rows, summary(rows)])


def run_of(row: Mapping[str, Any]) -> MeasuredRun:
    """A row of the file: its curve, and its sheet."""
    return MeasuredRun(read_csv(row["table"], row["name"], Op(row["op"]), row["num_chips"]), sheet_of(row))


def grouped(runs: Mapping[str, MeasuredRun]) -> dict[str, list[MeasuredRun]]:
    """What is fitted together: every curve alone, and those of several numbers of chips."""
    alone = {name: [run] for name, run in runs.items()}
    return alone | {name: [runs[each] for each in names] for name, names in TOGETHER.items()}


def sheet_of(row: Mapping[str, Any]) -> Sheet:
    """The sheet of a row of the file."""
    rate = parse(row["line_rate"], Quantity.DATA_RATE) if "line_rate" in row else None
    return Sheet(rate, row.get("in_network_share"))


def held_out(name: str, group: Sequence[MeasuredRun], eager: bool) -> list[dict[str, object]]:
    """Two rows: without the odd and without the even points; none where too few are left to fit."""
    rows = []
    constants = fit_fabric(group, eager).constants
    for first, left_out in ((1, "odd"), (0, "even")):
        if sum(len(run.curve.points[1 - first :: 2]) for run in group) < (6 if eager else 4):
            continue
        left = [each for curve in hold_out(group, eager, first) for each in curve]
        large, small = errors(left)
        met = (large or 0.0) <= TARGETS["from_1MiB"] and (small or 0.0) <= TARGETS["below_1MiB"]
        rows.append({
            "check": f"held out, {left_out}", "fabric": name, "constants": constants.num_constants,
            "from_1MiB": large, "below_1MiB": small, "all": mean_error(left), "met": met,
            "setup_us": constants.setup_s * 1e6, "stage_us": constants.latency_s * 1e6, "share": constants.share,
            "eager_share": constants.eager_share, "handshake_us": constants.handshake_s * 1e6,
        })  # fmt: skip
    return rows


def transferred(name: str, fit: FabricFit, other: str, run: MeasuredRun) -> dict[str, object]:
    """One curve from another fabric's constants."""
    left = residuals_of(transfer(fit, run.sheet), run.curve)
    large, small = errors(left)
    return {
        "check": "transfer", "fabric": other, "from": name, "constants": fit.constants.num_constants,
        "from_1MiB": large, "below_1MiB": small, "all": mean_error(left),
        "met": mean_error(left) <= TARGETS["transfer"],
    }  # fmt: skip


def large_message(fit: FabricFit, row: Mapping[str, Any]) -> dict[str, object]:
    """One published bus bandwidth."""
    op, chips = Op(row["op"]), row["num_chips"]
    seconds = float(predict(transfer(fit, sheet_of(row)), op, chips, np.array([LARGE_MESSAGE]))[0])
    published = parse(row["busbw"], Quantity.DATA_RATE)
    predicted = LARGE_MESSAGE / seconds * bus_factor(op, chips)
    error = abs(published / predicted - 1)  # of time, as everywhere here
    return {
        "check": "large message", "fabric": row["name"], "from": "a100-8", "constants": 3, "all": error,
        "met": error <= TARGETS["transfer"], "published_GB_s": published / 1e9, "predicted_GB_s": predicted / 1e9,
    }  # fmt: skip


def errors(left: Sequence[Residual]) -> tuple[float | None, float | None]:
    """Mean errors from 1 MiB up and below; none where nothing was measured."""
    found = mean_error(left, LARGE_NBYTES), mean_error(left, below=LARGE_NBYTES)
    large, small = (None if math.isnan(error) else error for error in found)
    return large, small


def summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, object]:
    """All pairs but those with the bridge of the two RTX, whose curve reaches half of its sheet."""
    pairs = [row for row in rows if row["check"] == "transfer" and BRIDGE not in (row["fabric"], row["from"])]
    met = sum(bool(row["met"]) for row in pairs)
    return {"check": f"transfer, {met} of {len(pairs)} pairs met", "fabric": f"all but {BRIDGE}", "constants": 3,
            "all": math.fsum(row["all"] for row in pairs) / len(pairs), "met": met == len(pairs)}  # fmt: skip


if __name__ == "__main__":
    main()
