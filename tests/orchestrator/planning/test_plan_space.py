"""Plan space: degrees multiply to the chips, the batch divides, what is fixed stays; else the arithmetic is told."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from comms.errors import PlanError
from orchestrator.config.hardware.cluster_file import cluster_path, load_cluster
from orchestrator.config.job_file import Job, PlanSection, load_job
from orchestrator.planning.plan_space import open_plans, samples_of
from partitioner.layout.pipeline_schedules import PipelineSchedule

POD = load_cluster(cluster_path("dgx-h100-superpod"))
POWERS = st.sampled_from([1, 2, 4, 8, 16, 32, 64])
MANY = 128  # pieces of a model


def asking(global_batch: int, *, microbatches: int | None = None, **plan: Any) -> Job:
    """A job that asks for so much of its plan, and leaves the rest open."""
    asked = {"global_batch": global_batch, "microbatches": microbatches, "plan": PlanSection(**plan)}
    return load_job(None).model_copy(update=asked)


def brute_force(batch: int, chips: int, pieces: int) -> set[tuple[int, int, int, int]]:
    """(dp, tp, pp, microbatches) of all plans."""
    span = range(1, max(chips, batch) + 1)
    return {
        (dp, tp, chips // (dp * tp), m)
        for dp in span for tp in span if chips % (dp * tp) == 0 and tp <= POD.chips_per_host
        if chips // (dp * tp) <= pieces and batch % dp == 0
        for m in span if (batch // dp) % m == 0
    }  # fmt: skip


@given(st.sampled_from([1, 2, 4, 8, 16, 24]), st.integers(1, 24), st.integers(1, 12))
def test_every_plan_is_there_that_splits_chips_batch_and_pieces(chips: int, batch: int, pieces: int) -> None:
    wanted = brute_force(batch, chips, pieces)
    if not wanted:
        with pytest.raises(PlanError):
            open_plans(asking(batch), POD.take(chips), pieces)
        return
    plans = open_plans(asking(batch), POD.take(chips), pieces)
    assert {(p.dp, p.tp, p.pp, p.microbatches) for p in plans} == wanted
    assert len(set(plans)) == len(plans)
    assert {p.zero for p in plans if p.dp > 1} in ({0, 1}, set())
    assert samples_of(plans, batch) == sorted({batch // (dp * m) for dp, _, _, m in wanted})


@given(POWERS, POWERS, st.sampled_from([1, 2, 4, 8]))
def test_degrees_that_are_asked_for_are_kept(dp: int, tp: int, pp: int) -> None:
    if dp * tp * pp > 64:
        return
    wish = asking(64, dp=dp, tp=tp, pp=pp, schedule=PipelineSchedule.GPIPE, zero=0)
    for plan in open_plans(wish, POD.take(dp * tp * pp), MANY):
        assert (plan.dp, plan.tp, plan.pp, plan.zero) == (dp, tp, pp, 0)
        assert plan.schedule is PipelineSchedule.GPIPE


@pytest.mark.parametrize(
    ("wish", "chips", "said"),
    [
        (asking(64, dp=3), 8, "dp 3 does not multiply to 8 chips"),
        (asking(64, tp=2, pp=3), 8, "tp 2 x pp 3 does not multiply to 8 chips"),
        (asking(64, dp=2, tp=2, pp=4), 8, "dp 2 x tp 2 x pp 4 does not multiply to 8 chips"),
        (asking(6, tp=1, pp=1), 4, "global_batch 6 is not a multiple of dp 4"),
        (asking(8, dp=2, microbatches=3), 2, "do not split into 3 microbatches"),
        (asking(1), 1024, "the model cannot be split over 1024 chips: 4 pieces"),
    ],
)
def test_what_cannot_work_is_refused_with_the_arithmetic(wish: Job, chips: int, said: str) -> None:
    with pytest.raises(PlanError, match=said) as caught:
        open_plans(wish, POD.take(chips), 4)
    assert caught.value.hint


def test_the_hint_for_a_batch_names_one_that_works() -> None:
    with pytest.raises(PlanError) as caught:
        open_plans(asking(6, tp=1, pp=1), POD.take(4), MANY)
    assert "--global-batch 8" in caught.value.hint
    assert open_plans(asking(8, tp=1, pp=1), POD.take(4), MANY)[0].dp == 4
