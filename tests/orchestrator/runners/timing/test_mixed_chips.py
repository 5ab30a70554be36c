"""Chips of several kinds in one cluster: each has its own links, and its own share of busy and idle time."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from comms.selection.collective import simulate as move
from comms.selection.question import Fidelity
from orchestrator.config.hardware.cluster import Cluster
from orchestrator.config.hardware.cluster_file import load_cluster
from orchestrator.planning.preparation import prepare
from orchestrator.runners.timing.prediction import MIXED, SimulationResult, StepBreakdown, simulate
from partitioner.layout.parallel_plan import Plan

Make = Callable[..., Any]
FAST, SLOW = "{like: nvidia_h100_sxm, count: 2}", "{like: nvidia_a100_sxm_80gb, count: 2}"
NBYTES = 1e9
# Slow enough for the host not to matter.
QUICK, LATE = (
    f"{{like: nvidia_h100_sxm, count: 2, memory: {{bandwidth: {rate} MB/s}}}}" for rate in (80, 20)
)


@pytest.fixture
def cluster_of(tmp_path: Path) -> Callable[..., Cluster]:
    """A cluster of hosts with these chips; `rest` follows them in the file."""

    def make(*hosts: str, rest: str = "scale_up: {}", more: str = "") -> Cluster:
        text = "kind: cluster\nversion: 1\nname: mixed\ndevice: simulated\nhosts:\n"
        text += "".join(f"  - {{count: 1, chips: [{chips}]{more}}}\n" for chips in hosts)
        (tmp_path / "cluster.yaml").write_text(f"{text}{rest}\n")
        return load_cluster(tmp_path / "cluster.yaml")

    return make


def pair_s(cluster: Cluster, chips: int = 2) -> float:
    """What the first chips take to add up, message by message."""
    taken = cluster.take(chips)
    return move("all_reduce", NBYTES, taken.network, conditions=taken.conditions, algorithm="ring").seconds


def step(cluster: Cluster, job: Any, plan: Plan) -> SimulationResult:
    taken = cluster.take(plan.num_chips)
    return simulate(prepare(taken, job, plan).program, taken)


def total(parts: StepBreakdown) -> float:
    waiting = sum(seconds for _, seconds in parts.exposed_communication_s)
    return parts.compute_s + parts.optimizer_s + parts.host_s + waiting + parts.bubble_s


def test_chips_have_the_links_that_they_bring(cluster_of: Callable[..., Cluster]) -> None:
    alone = {chips: pair_s(cluster_of(chips)) for chips in (FAST, SLOW)}
    assert pair_s(cluster_of(f"{FAST}, {SLOW}")) == pytest.approx(alone[FAST])
    assert pair_s(cluster_of(f"{SLOW}, {FAST}")) == pytest.approx(alone[SLOW])
    assert alone[FAST] < 0.75 * alone[SLOW]
    every = pair_s(cluster_of(f"{FAST}, {SLOW}"), 4)
    assert every == pytest.approx(pair_s(cluster_of(f"{SLOW}, {SLOW}"), 4), rel=2e-3), (
        "a ring is as fast as its slowest"
    )


def test_rates_that_the_file_says_are_everyones(cluster_of: Callable[..., Cluster]) -> None:
    cluster = cluster_of(f"{FAST}, {SLOW}", rest="scale_up: {bandwidth: 100 GB/s}")
    assert cluster.conditions.is_healthy and cluster.is_mixed
    assert pair_s(cluster) == pytest.approx(
        pair_s(cluster_of(SLOW, rest="scale_up: {bandwidth: 100 GB/s}")), rel=0.1
    )


def test_hosts_have_the_cards_that_they_bring(tmp_path: Path) -> None:
    def cluster(*rates: int) -> Cluster:
        text = "kind: cluster\nversion: 1\nname: mixed\ndevice: simulated\nhosts:\n"
        for rate in rates:
            text += "  - {count: 2, chips: [{like: nvidia_h100_sxm, count: 1}], nics: "
            text += f"{{bandwidth: {rate} Gb/s, latency: 2 us}}}}\n"
        (tmp_path / "cards.yaml").write_text(text)
        return load_cluster(tmp_path / "cards.yaml")

    mixed = cluster(400, 100)
    assert pair_s(mixed) == pytest.approx(pair_s(cluster(400)))
    assert pair_s(mixed, 4) == pytest.approx(pair_s(cluster(100, 100), 4), rel=1e-3)


def test_a_faster_chip_works_for_less_of_the_step_and_waits_for_the_rest(
    cluster_of: Callable[..., Cluster], tiny_job: Make
) -> None:
    job, plan = tiny_job("global_batch=8", "dtype=bf16"), Plan(dp=4)
    found = step(cluster_of(f"{QUICK}, {LATE}"), job, plan)
    assert [count for _, count, _ in found.kinds] == [2, 2]
    for (_, _, parts), chips in zip(found.kinds, (QUICK, LATE), strict=True):
        alone = step(cluster_of(f"{chips}, {chips}"), job, plan).breakdown
        for own, right in (
            (parts.compute_s, alone.compute_s),
            (parts.optimizer_s, alone.optimizer_s),
            (parts.host_s, alone.host_s),
        ):
            assert own == pytest.approx(right, abs=1e-8)
        assert total(parts) == pytest.approx(found.step_time_s, abs=1e-8)
    (_, _, fast), (_, _, slow) = found.kinds
    busy = [each.compute_s + each.optimizer_s + each.host_s for each in (fast, slow)]
    idle = [total(each) - own for each, own in zip((fast, slow), busy, strict=True)]
    assert idle[0] - idle[1] == pytest.approx(busy[1] - busy[0], abs=2e-8) and busy[1] > 3 * busy[0]
    both = [
        (a + b) / 2
        for a, b in zip((fast.compute_s, fast.bubble_s), (slow.compute_s, slow.bubble_s), strict=True)
    ]
    assert both == pytest.approx([found.breakdown.compute_s, found.breakdown.bubble_s], abs=1e-8)
    kinds = found.document()["kinds"]
    assert isinstance(kinds, list) and [each["chips"] for each in kinds] == [2, 2]


def test_a_stage_of_each_kind_works_as_its_kind_does(
    cluster_of: Callable[..., Cluster], tiny_job: Make
) -> None:
    job, plan = tiny_job("global_batch=8"), Plan(pp=2, dp=2, microbatches=4)
    found = step(cluster_of(f"{FAST}, {SLOW}"), job, plan)
    for (_, _, parts), role in zip(found.kinds, found.roles, strict=True):
        assert parts == role


def test_folded_fidelity_says_that_it_takes_the_slowest(
    cluster_of: Callable[..., Cluster], tiny_job: Make
) -> None:
    job, plan = tiny_job("global_batch=8"), Plan(dp=4)
    mixed, slow = cluster_of(f"{FAST}, {SLOW}"), step(cluster_of(f"{SLOW}, {SLOW}"), job, plan)
    folded = simulate(prepare(mixed, job, plan).program, mixed, fidelity=Fidelity.FOLDED)
    assert MIXED in folded.step.left_out and not folded.kinds
    assert folded.breakdown.compute_s == pytest.approx(slow.breakdown.compute_s)
