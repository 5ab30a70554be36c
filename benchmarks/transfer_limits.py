"""How far constants of one fabric can be carried to another: two designs, and a bound for any three constants.

Three constants and five, fitted to one curve and carried to another by its sheet; and for each pair the best three
constants that still fit their source within 10 % (25 % below 1 MiB), found knowing the target.
    python benchmarks/transfer_limits.py
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import yaml
from nccl_curves import BRIDGE, CURVES, TARGETS, TOGETHER, errors, grouped, run_of
from scipy.optimize import minimize
from support.harness import report

from comms.calibration.calibration import (
    Constants,
    MeasuredRun,
    fit_fabric,
    mean_error,
    residuals_of,
    transfer,
)
from comms.errors import CommsError
from comms.networks.topology import FloatArray

PENALTY = 20.0  # for each part by which the source is fitted worse than asked for


def main() -> None:
    """Carry every fabric's constants to every other one."""
    document = yaml.safe_load(CURVES.read_text())
    runs = {
        row["name"]: run_of(row) for row in document["curves"] if "line_rate" in row and row["name"] != BRIDGE
    }
    found = [
        {"from": source, "to": other, **carried(group, runs[other])}
        for source, group in grouped(runs).items()
        for other in runs
        if other not in (source, *TOGETHER.get(source, ()))
    ]
    designs = ("three", "five", "bound")
    report("transfer_limits", [*found, *(summary(found, design) for design in designs)])


def carried(group: Sequence[MeasuredRun], other: MeasuredRun) -> dict[str, float | None]:
    """Mean errors on a curve: of constants fitted elsewhere, and of the best that fit there too."""
    three = fit_fabric(group)
    try:
        five = mean_error(residuals_of(transfer(fit_fabric(group, eager=True), other.sheet), other.curve))
    except CommsError:  # too few points
        five = None
    starts = (three.constants, fit_fabric([other]).constants)
    return {
        "three": mean_error(residuals_of(transfer(three, other.sheet), other.curve)),
        "five": five,
        "bound": min(best(group, other, start) for start in starts),
    }


def best(group: Sequence[MeasuredRun], other: MeasuredRun, start: Constants) -> float:
    """The least error on the other curve of three constants that fit the group as well as is asked for."""

    def cost(logs: FloatArray) -> float:
        constants = Constants(*np.exp(logs))
        own = [errors(residuals_of(constants.on(run.sheet), run.curve)) for run in group]
        worse = 0.0
        for column, target in ((0, TARGETS["from_1MiB"]), (1, TARGETS["below_1MiB"])):
            known = [each[column] for each in own if each[column] is not None]
            worse += max(0.0, math.fsum(known) / len(known) - target) if known else 0.0
        return mean_error(residuals_of(constants.on(other.sheet), other.curve)) + PENALTY * worse

    logs = np.log([start.setup_s, start.latency_s, start.share])
    options = {"maxiter": 600, "xatol": 1e-3, "fatol": 1e-4}
    return float(minimize(cost, logs, method="Nelder-Mead", options=options).fun)


def summary(rows: Sequence[Mapping[str, object]], design: str) -> dict[str, object]:
    """The mean over all pairs, and how many are above the target."""
    values = [float(str(row[design])) for row in rows if row[design] is not None]
    missed = sum(value > TARGETS["transfer"] for value in values)
    return {
        "from": "mean",
        "to": f"{missed} of {len(values)} missed",
        design: math.fsum(values) / len(values),
    }


if __name__ == "__main__":
    main()
