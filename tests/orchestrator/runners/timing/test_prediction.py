"""Prediction: each formula against a number done by hand."""

import pytest

from orchestrator.runners.timing import prediction


def test_formulas_equal_hand_calculations() -> None:
    assert prediction.tokens_per_s(8192, 0.5) == 16384
    mfu = prediction.mfu(model_flops=3e15, peak_flops_per_s=312e12, seconds=2, num_chips=8)
    assert mfu == pytest.approx(0.600961538)
    assert prediction.cost_usd_per_step(cluster_usd_per_hour=36, seconds=2) == pytest.approx(0.02)
    assert prediction.energy_j_per_step(chip_watts=400, num_chips=8, seconds=2) == 6400
