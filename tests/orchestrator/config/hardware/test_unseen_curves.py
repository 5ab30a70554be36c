"""Shipped clusters against published curves over several hosts, to which nothing was fitted."""

from pathlib import Path

import pytest
import yaml

from comms.calibration.measured_tables import read_csv
from comms.collectives.schedule import Op
from comms.selection.choice import choose
from orchestrator.config.hardware.cluster_file import load_cluster

ROOT = Path(__file__).parents[4]
ROWS = yaml.safe_load((ROOT / "tests/comms/calibration/unseen_curves.yaml").read_text())["hosts"]
AS_SHIPPED = [row for row in ROWS if not {"nics", "scale_up"} & set(row)]


@pytest.mark.parametrize("row", AS_SHIPPED, ids=lambda row: row["name"])
def test_a_shipped_cluster_predicts_what_others_measured_over_several_hosts(row):
    chips, op = row["num_chips"], Op(row["op"])
    network = load_cluster(ROOT / f"cluster_configs/{row['cluster']}.yaml").take(chips).network
    points = [each for each in read_csv(row["table"], row["name"], op, chips).points if each.nbytes >= 2**20]
    ratios = [choose(op, each.nbytes, range(chips), network).seconds / each.seconds for each in points]
    assert sum(abs(ratio - 1) for ratio in ratios) / len(ratios) < 0.20
    assert ratios[-1] == pytest.approx(1, abs=0.15)


@pytest.mark.parametrize(
    ("chips", "algorithm"), [(16, "double tree"), (64, "double tree"), (512, "double tree")]
)
def test_small_sums_go_up_and_down_trees_between_hosts_as_nccl_has_it(chips, algorithm):
    for name in ("dgx-a100", "dgx-h100-superpod"):
        network = load_cluster(ROOT / f"cluster_configs/{name}.yaml").take(chips).network
        assert choose(Op.ALL_REDUCE, 1024.0, range(chips), network).algorithm.endswith(algorithm)


@pytest.mark.parametrize("op", [Op.BROADCAST, Op.REDUCE])
def test_nvls_serves_sums_and_gathers_only(op):
    network = load_cluster(ROOT / "cluster_configs/dgx-h100-superpod.yaml").take(8).network
    assert choose(op, 2.0**26, range(8), network).algorithm == "ring"
    assert choose(Op.ALL_REDUCE, 2.0**26, range(8), network).algorithm == "in-network"
