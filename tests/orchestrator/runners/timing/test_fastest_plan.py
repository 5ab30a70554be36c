"""The fastest plan: within 1 % of the best, one that fits if there is one, and what is fixed stays."""

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from comms.errors import PlanError
from orchestrator.config.hardware.cluster import Cluster
from orchestrator.config.hardware.cluster_file import cluster_path, load_cluster
from orchestrator.config.job_file import Job, load_job
from orchestrator.planning import sketches as sketching
from orchestrator.planning.job_capture import JobCapture
from orchestrator.planning.plan_space import open_plans, ranked
from orchestrator.planning.sketches import Sketches
from orchestrator.runners.timing.closed_form import Estimate, closed_form
from orchestrator.runners.timing.fastest_plan import fastest_plan, search
from orchestrator.runners.timing.prediction import simulate
from partitioner.layout.parallel_plan import Plan

Make = Callable[..., Any]
DGX, LAPTOP = (load_cluster(cluster_path(name)) for name in ("dgx-a100", "laptop"))
TINY = (
    "model=builtin:gpt-nano",
    "model_args={layers: 2, width: 64, heads: 4, vocab: 256, max_seq: 64}",
    "seq=64",
)


def small(*more: str) -> Job:
    return load_job(None, (*TINY, "global_batch=8", *more))


@functools.cache
def sketched(*more: str) -> Sketches:
    return Sketches(JobCapture(small(*more)), (1, 2, 4, 8))


def every(job: Job, cluster: Cluster, sketches: Sketches) -> dict[Plan, tuple[float, int, bool]]:
    """All plans, simulated."""
    found = {}
    for plan in open_plans(job, cluster, sketches.num_units):
        result = simulate(sketches.program(plan, job.global_batch // (plan.dp * plan.microbatches)), cluster)
        found[plan] = result.step_time_s, max(role.peak_bytes for role in result.memory), result.fits
    return found


@pytest.mark.parametrize(
    ("more", "cluster"),
    [
        (("model_args.tied=true", "plan.dp=1"), LAPTOP),  # whose first and last stage are on two hosts
        (("dtype=bf16",), DGX.take(4)),
        (("plan.pp=2",), DGX.take(4)),
    ],
    ids=["tied", "dgx", "fixed pp"],
)
def test_the_plan_is_within_a_hundredth_of_the_best_and_the_closed_form_of_each(
    more: tuple[str, ...], cluster: Cluster
) -> None:
    job, sketches = small(*more), sketched(*more)
    found = every(job, cluster, sketches)
    form = closed_form(sketches.table, cluster, job.global_batch)
    for plan, (seconds, peak, _) in found.items():
        assert form.seconds(plan) == pytest.approx(seconds, rel=0.03), plan
        assert form(plan).peak_bytes == pytest.approx(peak, rel=0.2), plan
    taken = search(cluster, job, sketches)
    assert taken.result is not None
    assert taken.result.step_time_s <= 1.01 * min(seconds for seconds, _, fits in found.values() if fits)
    assert (taken.result.step_time_s, True) == (found[taken.plan][0], found[taken.plan][2])


def test_a_plan_that_does_not_fit_is_never_taken_where_another_fits(tiny_chips: Make) -> None:
    job, whole, sketches = small(), DGX.take(4), sketched()
    peaks = sorted({peak for _, peak, _ in every(job, whole, sketches).values()})
    for limit in (peaks[0], peaks[len(peaks) // 2], peaks[-1]):
        cluster = tiny_chips(whole, limit)
        taken = search(cluster, job, sketches)
        assert taken.result is not None and taken.result.fits
        assert taken.fullest.peak_bytes <= limit
    nothing = search(tiny_chips(whole, peaks[0] - 1), job, sketches)
    assert nothing.result is None and nothing.fullest.peak_bytes <= 1.05 * peaks[0]


@pytest.fixture
def tiny_chips() -> Make:
    """A cluster whose chips have so many bytes."""

    def make(cluster: Cluster, memory: int) -> Cluster:
        hosts = (replace(host, chips=tuple(replace(chip, memory_bytes=memory) for chip in host.chips))
                 for host in cluster.unit)  # fmt: skip
        return replace(cluster, unit=tuple(hosts))

    return make


@pytest.mark.parametrize(
    "asked", ["plan.tp=2", "plan.pp=2", "plan.dp=2", "plan.zero=1", "plan.schedule=gpipe", "microbatches=2"]
)
def test_what_the_user_fixed_stays_fixed(asked: str) -> None:
    key, _, value = asked.removeprefix("plan.").partition("=")
    for plan in open_plans(small(asked), DGX.take(4), 6):
        assert str(getattr(plan, key)) == value


def test_a_model_that_tp_cannot_cut_is_split_otherwise() -> None:
    more = ("model_args.heads=1", "model_args.width=7", "model_args.vocab=7", "plan.dp=1")
    taken = search(DGX.take(2), small(*more), sketched(*more))
    assert (taken.plan.tp, taken.plan.pp) == (1, 2)


def test_the_search_is_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    job = small("seq=32", "plan.tp=1")
    first = fastest_plan(DGX.take(2), JobCapture(job))
    monkeypatch.setattr(sketching.Sketches, "table", None)
    assert fastest_plan(DGX.take(2), JobCapture(job)) == first


def test_where_no_plan_splits_the_model_the_reasons_are_told() -> None:
    with pytest.raises(PlanError, match="cannot be split over 1024 chips") as caught:
        fastest_plan(DGX.take(1024), JobCapture(small()))
    assert caught.value.hint


def test_a_ranking_goes_by_the_score_alone() -> None:
    plans = [Plan(dp=2), Plan(tp=2), Plan(pp=2)]
    scores = {plans[0]: Estimate(3.0, 5, fits=True), plans[1]: Estimate(1.0, 9, fits=False),
              plans[2]: Estimate(2.0, 5, fits=True)}  # fmt: skip
    assert [scored.plan for scored in ranked(plans, scores.__getitem__).plans] == [
        plans[2],
        plans[0],
        plans[1],
    ]
