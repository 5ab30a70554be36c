"""Plan choice: the degrees always multiply to the chips, and what cannot work is refused with the arithmetic."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from orchestrator.planning.plan_choice import (
    STATE_BYTES,
    STATE_SHARE,
    Refusal,
    choose_plan,
)

from comms.errors import PlanError
from orchestrator.config.hardware.cluster_file import cluster_path, load_cluster
from orchestrator.config.job_file import Dtype, Job, PlanSection, load_job
from partitioner.layout.pipeline_schedules import PipelineSchedule

POD = load_cluster(cluster_path("dgx-h100-superpod"))
BILLION = 10**9
POWERS = st.sampled_from([1, 2, 4, 8, 16, 32, 64])


def asking(
    global_batch: int,
    *,
    seq: int = 1,
    dtype: Dtype = Dtype.FP32,
    microbatches: int | None = None,
    **plan: Any,
) -> Job:
    """A job that asks for so much of its plan, and leaves the rest open."""
    asked = {"global_batch": global_batch, "seq": seq, "dtype": dtype, "microbatches": microbatches}
    return load_job(None).model_copy(update={**asked, "plan": PlanSection(**plan)})


@given(POWERS, st.integers(1, 64), st.integers(1, 500), st.sampled_from([0, 1]), st.sampled_from(Dtype))
def test_every_plan_uses_all_chips_and_splits_the_batch(
    chips: int, factor: int, size: int, zero: int, dtype: Dtype
) -> None:
    wish = asking(chips * factor, zero=zero, dtype=dtype, seq=1024)
    plan = choose_plan(wish, POD.take(chips), size * BILLION // 10)
    assert plan.num_chips == chips
    assert wish.global_batch % (plan.dp * plan.microbatches) == 0
    assert plan.zero == zero


@given(POWERS, st.integers(1, 1000))
def test_model_parallelism_is_the_least_that_fits(chips: int, tenths: int) -> None:
    cluster, params = POD.take(chips), tenths * BILLION // 10
    plan = choose_plan(asking(64), cluster, params)
    limit = STATE_SHARE * min(c.memory_bytes for c in cluster.chip_types)
    cut, per_param = plan.tp * plan.pp, sum(STATE_BYTES[Dtype.FP32])
    if cut > 1:
        assert params / (cut // 2) * per_param > limit
    if plan.num_chips > cut:  # otherwise nothing is left to cut
        assert params / cut * per_param <= limit


def test_small_models_are_only_replicated() -> None:
    plan = choose_plan(asking(64), POD.take(8), 10**6)
    assert (plan.dp, plan.tp, plan.pp, plan.microbatches) == (8, 1, 1, 1)


def test_tensor_parallelism_stays_inside_a_host() -> None:
    plan = choose_plan(asking(64, zero=1, dtype=Dtype.BF16), POD.take(64), 175 * BILLION)
    assert plan.tp <= POD.chips_per_host
    assert plan.tp * plan.pp > POD.chips_per_host


def test_zero_needs_less_model_parallelism() -> None:
    whole, sharded = (choose_plan(asking(64, zero=zero), POD.take(64), 10 * BILLION) for zero in (0, 1))
    assert sharded.tp * sharded.pp < whole.tp * whole.pp


@given(POWERS, POWERS, st.sampled_from([1, 2, 4, 8]))
def test_degrees_that_are_asked_for_are_kept(dp: int, tp: int, pp: int) -> None:
    if dp * tp * pp > 64:
        return
    plan = choose_plan(
        asking(64, dp=dp, tp=tp, pp=pp, schedule=PipelineSchedule.GPIPE), POD.take(dp * tp * pp), BILLION
    )
    assert (plan.dp, plan.tp, plan.pp, plan.schedule) == (dp, tp, pp, PipelineSchedule.GPIPE)


@pytest.mark.parametrize(
    ("wish", "chips", "said"),
    [
        (asking(64, dp=3), 8, "dp 3 does not multiply to 8 chips"),
        (asking(64, tp=2, pp=3), 8, "tp 2 x pp 3 does not multiply to 8 chips"),
        (asking(64, dp=2, tp=2, pp=4), 8, "dp 2 x tp 2 x pp 4 does not multiply to 8 chips"),
        (asking(6, tp=1, pp=1), 4, "global_batch 6 is not a multiple of dp 4"),
        (asking(8, dp=2, microbatches=3), 2, "do not split into 3 microbatches"),
    ],
)
def test_what_cannot_work_is_refused_with_the_arithmetic(wish: Job, chips: int, said: str) -> None:
    with pytest.raises(PlanError, match=said) as caught:
        choose_plan(wish, POD.take(chips), 10**6)
    assert caught.value.hint


def test_the_hint_for_a_batch_names_one_that_works() -> None:
    with pytest.raises(PlanError) as caught:
        choose_plan(asking(6, tp=1, pp=1), POD.take(4), 10**6)
    assert "--global-batch 8" in caught.value.hint
    assert choose_plan(asking(8, tp=1, pp=1), POD.take(4), 10**6).dp == 4


def test_degrees_that_a_model_refused_are_not_chosen_again() -> None:
    cluster, wish = POD.take(1024), asking(32)
    first = choose_plan(wish, cluster, 10**6)
    assert (first.tp, first.pp) == (8, 4)
    second = choose_plan(wish, cluster, 10**6, [Refusal(8, 4, "4 heads do not divide by tp 8")])
    assert (second.dp, second.tp, second.pp) == (32, 4, 8)


@pytest.mark.parametrize(
    ("asked", "hint"), [(asking(32), "take fewer chips"), (asking(32, tp=8), "degrees that are")]
)
def test_where_every_split_was_refused_the_reasons_and_ways_out_are_told(asked: Job, hint: str) -> None:
    refused = [Refusal(8, 1, "4 heads do not divide by tp 8"), Refusal(1, 8, "4 pieces for 8 stages")]
    with pytest.raises(PlanError, match=r"over 1024 chips: .*4 heads do not divide by tp 8") as caught:
        choose_plan(asked, POD.take(1024), 10**6, refused)
    assert caught.value.where == "1024 chips"
    assert hint in caught.value.hint


def test_degrees_that_are_no_powers_of_two_are_taken_where_no_other_works() -> None:
    plan = choose_plan(asking(8), POD.take(3), 10**6)
    assert (plan.dp, plan.tp, plan.pp) == (1, 3, 1)
    plan = choose_plan(asking(8, dp=2), POD.take(6), 10**6)
    assert (plan.dp, plan.tp * plan.pp) == (2, 3)
    plan = choose_plan(asking(8), POD.take(6), 10**6)
    assert (plan.dp, plan.tp, plan.pp) == (2, 3, 1)


def test_a_batch_that_does_not_split_moves_chips_to_model_parallelism() -> None:
    plan = choose_plan(asking(2), POD.take(8), 10**6)
    assert plan.dp <= 2 and plan.num_chips == 8


@pytest.mark.parametrize(
    ("pp", "seq", "per_replica"), [(2, 128, 32), (4, 2048, 32), (8, 256, 24), (1, 8192, 8), (1, 64, 8)]
)
def test_microbatches_divide_the_batch_and_fill_the_pipeline(pp: int, seq: int, per_replica: int) -> None:
    plan = choose_plan(asking(per_replica, dp=1, tp=1, pp=pp, seq=seq), POD.take(pp), 10**6)
    assert per_replica % plan.microbatches == 0
    assert plan.microbatches >= (2 * pp if pp > 1 else 1)


def test_a_job_says_what_it_wants(laptop: Any) -> None:
    job = load_job(None, ("plan.tp=2", "plan.zero=1", "microbatches=2", "plan.schedule=gpipe"))
    plan = choose_plan(job, laptop.take(4), 10**6)
    assert (plan.dp, plan.tp, plan.zero, plan.microbatches, plan.schedule) == (
        2,
        2,
        1,
        2,
        PipelineSchedule.GPIPE,
    )
    assert choose_plan(job.model_copy(update={"microbatches": None}), laptop.take(4), 10**6).microbatches == 1
