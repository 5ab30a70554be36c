"""How well published curves are met to which nothing was fitted: `tests/comms/calibration/unseen_curves.yaml`.

One host: how well three constants describe half of a curve and predict the rest, and what a100-8's constants say of
it by its sheet. Several hosts: what the nearest shipped cluster, with the cards of the published one, predicts by its
closed forms; nothing is fitted.   python benchmarks/unseen_curves.py
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from nccl_curves import CURVES, errors, run_of
from support.harness import report

from comms.calibration.calibration import FabricFit, Residual, fit_fabric, hold_out, residuals_of, transfer
from comms.collectives.schedule import Op
from comms.selection.choice import choose
from comms.units import Quantity, parse
from orchestrator.config.hardware.cluster import Cluster
from orchestrator.config.hardware.cluster_file import cluster_from
from orchestrator.config.yaml_file import parse_yaml

ROOT = Path(__file__).parent.parent
UNSEEN = ROOT / "tests" / "comms" / "calibration" / "unseen_curves.yaml"


def main() -> None:
    """Predict and report."""
    document = yaml.safe_load(UNSEEN.read_text())
    known = next(row for row in yaml.safe_load(CURVES.read_text())["curves"] if row["name"] == "a100-8")
    fit = fit_fabric([run_of(known)])
    rows = [row for each in document["alone"] for row in alone(each, fit)]
    rows += [between_hosts(each) for each in document["hosts"]]
    report("unseen_curves", [*rows, *means(rows)])


def alone(row: Mapping[str, Any], fit: FabricFit) -> Iterator[dict[str, object]]:
    """Two rows of one curve within a host."""
    run = run_of(row)
    left = [each for first in (0, 1) for each in hold_out([run], first=first)[0]]
    setup_us = fit_fabric([run]).constants.setup_s * 1e6
    yield {
        "check": "half of its own points",
        "curve": row["name"],
        **in_columns(left),
        "note": f"setup {setup_us:.1f} us",
    }
    moved = residuals_of(transfer(fit, run.sheet), run.curve)
    yield {"check": "from a100-8 by its sheet", "curve": row["name"], **in_columns(moved), "note": ""}


def between_hosts(row: Mapping[str, Any]) -> dict[str, object]:
    """One curve over several hosts, by a shipped cluster."""
    curve, cluster = run_of(row).curve, cluster_of(row)
    network = cluster.take(row["num_chips"]).network
    choices = [choose(Op(row["op"]), each.nbytes, range(row["num_chips"]), network) for each in curve.points]
    pairs = zip(curve.points, choices, strict=True)
    left = [Residual(point.nbytes, point.seconds, choice.seconds) for point, choice in pairs]
    return {"check": row["cluster"], "curve": row["name"], **in_columns(left), "note": choices[-1].algorithm}


def cluster_of(row: Mapping[str, Any]) -> Cluster:
    """The shipped cluster, with what differs; stages are as much later than a message as in the file."""
    file = yaml.safe_load((ROOT / "cluster_configs" / f"{row['cluster']}.yaml").read_text())
    nics = file["hosts"][0]["nics"]
    before = parse(nics["latency"], Quantity.TIME)
    nics.update(row.get("nics", {}))
    later = parse(nics["latency"], Quantity.TIME) - before
    for level in file["scale_out"]:
        for protocol in level["protocols"]:
            protocol["latency"] = f"{parse(protocol['latency'], Quantity.TIME) + later} s"
    file["scale_up"].update(row.get("scale_up", {}))
    return cluster_from(parse_yaml(yaml.safe_dump(file), row["name"]))


def in_columns(left: list[Residual] | tuple[Residual, ...]) -> dict[str, float | None]:
    """Mean relative errors, and that of the largest size with its sign."""
    large, small = errors(left)
    largest = max(left, key=lambda each: each.nbytes)
    return {"from_1MiB": large, "below_1MiB": small, "largest": largest.error}


def means(rows: list[dict[str, object]]) -> Iterator[dict[str, object]]:
    """One row per kind of check."""
    kinds = {
        "one host, half of its own points": "half",
        "one host, from a100-8": "from a100",
        "several hosts": "dgx",
    }
    for name, start in kinds.items():
        own = [row for row in rows if str(row["check"]).startswith(start)]
        columns = {
            key: sum(values) / len(values)
            for key in ("from_1MiB", "below_1MiB", "largest")
            if (values := [abs(float(str(row[key]))) for row in own if row[key] is not None])
        }
        yield {"check": f"mean of {len(own)}", "curve": name, **columns, "note": ""}


if __name__ == "__main__":
    main()
