"""Points: weak and strong scaling by construction; what varies reaches the job or the cluster."""

from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from comms.errors import ConfigError
from orchestrator.config.hardware.cluster_file import cluster_path, load_cluster
from orchestrator.config.job_file import load_job
from orchestrator.config.schema import validate
from orchestrator.config.sweep_file import Scaling, SweepFile
from orchestrator.config.yaml_file import Document
from orchestrator.sweeps.points import MeasuredSteps, PointResult, Status, point_result, points_of

DGX = load_cluster(cluster_path("dgx-a100"))


def sweep(**keys: Any) -> SweepFile:
    return validate(Document("here", {"kind": "sweep", "version": 1, **keys}, {}), SweepFile)


@given(st.sets(st.sampled_from([8, 16, 64, 512]), min_size=1), st.integers(1, 64))
def test_weak_scaling_keeps_the_batch_per_chip_and_strong_scaling_the_batch(
    chips: set[int], each: int
) -> None:
    batch = each * min(chips)
    job = load_job(None, (f"global_batch={batch}",))
    for point in points_of(sweep(chips=sorted(chips), modes=["weak", "strong"]), DGX, job):
        if point.series.mode is Scaling.WEAK:
            assert Fraction(point.job.global_batch, point.chips) == each
        else:
            assert point.job.global_batch == batch


def test_a_batch_that_is_not_whole_is_refused_with_the_arithmetic() -> None:
    with pytest.raises(ConfigError, match=r"0\.3 samples per chip make 2\.4 samples on 8 chips"):
        points_of(sweep(chips=[8, 80], batch_per_chip=0.3), DGX, load_job(None))


def test_what_varies_is_tried_each_with_each_and_reaches_job_and_network() -> None:
    vary = {"seq": [64, 128], "bandwidth": [1.0, 2.0], "plan": ["auto", "tp2-zero1"]}
    points = points_of(sweep(chips=[8, 16], vary=vary), DGX, load_job(None))
    assert len(points) == 2 * 2 * 2 * 2
    assert len({point.series for point in points}) == 8
    for point in points:
        asked = point.job.plan
        assert point.job.seq == point.series.seq
        assert (asked.tp, asked.zero, "zero" in asked.model_fields_set) == (
            (2, 1, True) if point.series.plan == "tp2-zero1" else (None, 0, False)
        )
        rate = point.cluster.network.tiers[0].link.bytes_per_s
        assert rate == point.series.bandwidth * DGX.take(8).network.tiers[0].link.bytes_per_s


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"chips": []}, "chips"),
        ({"chips": [8, 8]}, "a value twice"),
        ({"chips": [8], "modes": ["strong"], "batch_per_chip": 1.0}, "batch_per_chip is of weak scaling"),
        ({"chips": [8], "vary": {"actors": [1]}}, "nothing is"),
        ({"chips": [8], "vary": {"plan": ["tp0x"]}}, "plan"),
        ({"chips": [8], "vary": {"widht": [1]}}, "unknown key"),
    ],
)
def test_a_sweep_that_says_what_reaches_nobody_is_refused(keys: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        sweep(**keys)


def test_a_result_comes_back_from_its_document() -> None:
    measured = MeasuredSteps(6, 0.1, 0.2, 0.3, 100.0, "inline", 2)
    degrees = {"dp": 2, "schedule": "1f1b"}
    result = PointResult(Status.OK, 8, 16, plan="dp2", degrees=degrees, step_time_s=0.1, measured=measured)
    assert point_result(result.document()) == result
