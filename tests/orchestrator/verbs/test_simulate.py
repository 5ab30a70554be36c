"""What `simulate` answers for a real Program, as values, JSON, tables and files."""

import json
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
import torch

from comms.errors import ClusterError, FitError, PlanError
from orchestrator.config.hardware.cluster_file import load_cluster
from orchestrator.config.job_file import load_job
from orchestrator.models import model_builder
from orchestrator.planning.preparation import Prepared
from orchestrator.runners.timing.prediction import simulate
from orchestrator.runners.timing.simulated import simulate_step
from orchestrator.runners.timing.step_costs import ClusterCosts
from orchestrator.runs.run_dir import RunDir
from orchestrator.runs.timeline import Origin
from orchestrator.verbs.inputs.options import SimulateOptions
from orchestrator.verbs.simulate import answer, knobs, require_fit, tables, work
from orchestrator.views.console import Console
from partitioner.capture.graph_units import capture_graph
from partitioner.layout.parallel_plan import Plan, plan_from_yaml
from partitioner.lowering.lower import StepShape, lower
from partitioner.program.peak_memory import MemoryClass

CONFIGS = Path(__file__).parents[3] / "cluster_configs"
LAPTOP, DGX = load_cluster(CONFIGS / "laptop.yaml"), load_cluster(CONFIGS / "dgx-a100.yaml")
PLAN = Plan(dp=2, tp=2, pp=2, zero=1, microbatches=4, bucket_bytes=100_000)


@pytest.fixture(scope="module")
def program():
    built = model_builder.build("builtin:gpt-nano", {}, device="meta", dtype=torch.float32, seed=0)
    batch = built.example_batch(16, 32)
    graph = capture_graph(built.module, batch, dp=2, microbatches=4, tp_plan=built.tp_plan)
    return lower(graph, PLAN, StepShape(16, 32, "builtin:gpt-nano", "fp32", 2))


@pytest.fixture(scope="module")
def result(program):
    return simulate(program, LAPTOP, clock=iter((1.0, 1.5)).__next__)


def test_the_breakdown_sums_to_the_step_for_the_mean_and_for_every_stage(result):
    for parts in (result.breakdown, *result.roles):
        exposed = sum(seconds for _, seconds in parts.exposed_communication_s)
        total = parts.compute_s + parts.optimizer_s + parts.host_s + exposed + parts.bubble_s
        assert total == pytest.approx(result.step_time_s)


def test_a_lowered_program_takes_the_same_nanoseconds_with_and_without_reuse(timed_anew, program):
    for cluster in (LAPTOP, DGX.take(8)):
        costs = ClusterCosts(program, cluster)
        fast, slow = simulate_step(program, costs), timed_anew(program, costs)
        assert (fast.step_ns, fast.tallies) == (slow.step_ns, slow.tallies)


def test_rates_prices_and_energy_follow_from_the_step_time(result, program):
    seconds = result.step_time_s
    assert result.tokens_per_s == pytest.approx(16 * 32 / seconds)
    peak = LAPTOP.chip(0).peak("fp32")
    assert result.mfu == pytest.approx(program.facts["model_flops"] / (seconds * 8 * peak))
    assert result.cost_usd_per_step == pytest.approx(LAPTOP.usd_per_hour * seconds / 3600)
    assert result.energy_j_per_step == pytest.approx(8 * LAPTOP.chip(0).tdp_w * seconds)
    assert result.elapsed_s == 0.5


def test_the_document_has_every_promised_key_and_is_json(result):
    document = result.document()
    promised = "step_time_s tokens_per_s rate_unit mfu peak_memory_bytes cost_usd_per_step energy_j_per_step breakdown"
    promised += " model_flops hardware_flops activation_bytes fidelity left_out elapsed_s num_chips plan fits"
    assert set(promised.split()) <= document.keys()
    parts = "compute_s exposed_communication_s bubble_s host_s optimizer_s"
    assert set(parts.split()) == document["breakdown"].keys()
    assert set(document["breakdown"]["exposed_communication_s"]) >= {"tp", "dp", "pp"}
    assert len(json.loads(json.dumps(document))["peak_memory_bytes"]) == 2


def test_tables_carry_units(result):
    cells = [cell for table in tables(result) for row in table.rows for cell in row]
    assert any(cell.endswith("tok/s") for cell in cells)
    assert any("USD per step, " in cell and cell.endswith("USD per hour") for cell in cells)


def test_flops_of_what_is_computed_twice_are_shown_beside_the_models(result, program):
    assert "hardware FLOPs" not in dict(work(result))
    facts = dict(program.meta) | {"recomputed_flops": 10**9}
    again = simulate(replace(program, meta=tuple(facts.items())), LAPTOP)
    assert again.hardware_flops == again.model_flops + 10**9 == result.model_flops + 10**9
    assert again.mfu == result.mfu
    assert dict(work(again)).keys() == {"model FLOPs", "hardware FLOPs"}


def test_a_plan_that_does_not_fit_is_timed_and_then_refused_with_class_and_knob(result):
    chip = replace(LAPTOP.chip(0), memory_bytes=1_000_000)
    host = replace(LAPTOP.unit[0], chips=(chip,) * 4)
    small = simulate(result.program, replace(LAPTOP, unit=(host,) * len(LAPTOP.unit)))
    assert not small.fits
    assert small.step_time_s == result.step_time_s
    with pytest.raises(FitError) as caught:
        require_fit(small)
    largest = max(dict(small.memory[0].classes).items(), key=lambda pair: pair[1])[0]
    assert str(largest) in caught.value.problem
    assert "raise" in caught.value.hint
    require_fit(result)


@pytest.mark.parametrize(
    ("largest", "plan", "is_said"),
    [
        (MemoryClass.OPTIMIZER, "dp8 tp1 pp1 zero0 1f1b x1", True), (MemoryClass.OPTIMIZER, "dp8 zero1 1f1b", False),
        (MemoryClass.OPTIMIZER, "dp1 tp8 pp1 zero0 1f1b x1", False), (MemoryClass.ACTIVATIONS, "dp1 gpipe x4", True),
        (MemoryClass.ACTIVATIONS, "dp1 1f1b x4", False),
    ],
)  # fmt: skip
def test_what_a_plan_has_already_is_not_what_to_do(largest, plan, is_said):
    hint = knobs(largest, plan)
    assert ("zero" in hint or "1f1b" in hint) == is_said and "raise tp" in hint


def test_unknown_prices_and_power_are_none_not_a_partial_sum(result):
    chip = replace(LAPTOP.chip(0), tdp_w=None, usd_per_hour=None)
    host = replace(LAPTOP.unit[0], chips=(chip,) * 4)
    unpriced = simulate(result.program, replace(LAPTOP, unit=(host,) * len(LAPTOP.unit)))
    assert (unpriced.cost_usd_per_step, unpriced.energy_j_per_step) == (None, None)


def test_more_chips_than_the_cluster_has_is_an_error(program):
    with pytest.raises(ClusterError, match="16 chips"):
        simulate(replace(program, axes=(("pp", 2), ("dp", 4), ("tp", 2))), LAPTOP)


def test_a_program_that_hangs_is_a_plan_error(program):
    role = program.roles[1]
    calls = tuple(call for call in role.schedule["step"] if call.body != "recv_forward")
    broken = replace(program, roles=(program.roles[0], replace(role, schedules=(("step", calls),))))
    with pytest.raises(PlanError, match="wait for each other"):
        simulate(broken, LAPTOP)


def test_the_verb_prints_json_and_writes_a_run_directory(program, tmp_path):
    job_file = tmp_path / "job.yaml"
    job_file.write_text("kind: job\nversion: 1\nmodel: builtin:gpt-nano\n")
    prepared = Prepared(LAPTOP, load_job(job_file), PLAN, program, was_cached=True)
    out, err, root = StringIO(), StringIO(), tmp_path / "run"
    console = Console(as_json=True, out=out, err=err)
    assert answer(prepared, SimulateOptions(run_dir=root, as_json=True), console) == 0
    run, printed = RunDir(root), json.loads(out.getvalue())
    assert printed["num_chips"] == 8 and json.loads(run.result.read_text()) == printed
    assert run.timeline_plot.read_bytes().startswith(b"\x89PNG")
    assert plan_from_yaml(run.plan.read_text()) == PLAN
    assert run.read_timeline(Origin.PREDICTED) == simulate(program, LAPTOP).timeline()
    assert run.trace.exists()
