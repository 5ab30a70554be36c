"""Shipped clusters against the NCCL curves that their constants were fitted to, by their closed forms."""

from pathlib import Path

import pytest
import yaml

from comms.calibration.measured_tables import read_csv
from comms.collectives.schedule import Op
from comms.selection.choice import choose
from orchestrator.config.hardware.cluster_file import load_cluster

ROOT = Path(__file__).parents[4]
CURVES = yaml.safe_load((ROOT / "tests/comms/calibration/nccl_curves.yaml").read_text())["curves"]
LARGE = 2**20


@pytest.mark.parametrize(
    ("cluster", "name", "algorithm"),
    [("dgx-a100", "a100-8", "ring"), ("dgx-h100-superpod", "h100-8", "in-network")],
)
def test_all_reduce_on_eight_gpus_is_what_was_measured(cluster, name, algorithm):
    network = load_cluster(ROOT / f"cluster_configs/{cluster}.yaml").network.take(8)
    table = next(row["table"] for row in CURVES if row["name"] == name)
    errors = {}
    for point in read_csv(table, name, Op.ALL_REDUCE, 8).points:
        choice = choose(Op.ALL_REDUCE, point.nbytes, range(8), network)
        errors[point.nbytes] = abs(choice.seconds / point.seconds - 1)
        assert choice.algorithm == algorithm
    large = [error for nbytes, error in errors.items() if nbytes >= LARGE]
    small = [error for nbytes, error in errors.items() if nbytes < LARGE]
    assert sum(large) / len(large) < 0.10
    assert sum(small) / len(small) < 0.25
    assert errors[max(errors)] < 0.05


def test_an_automatic_choice_prefers_what_is_known_to_a_guess():
    """Over rails only hierarchical algorithms fold; flat ones are guessed, and here the guess is three times off."""
    network = load_cluster(ROOT / "cluster_configs/dgx-h100-superpod.yaml").take(32).network
    assert network.levels(range(32)) is None
    choice = choose(Op.ALL_TO_ALL, 2.0**20, range(32), network)
    assert choice.is_folded
    assert choice.algorithm == "hierarchical direct"
