"""Claims about `orchestrate simulate --fidelity`: folded and full agree, conditions count, too many are refused."""

from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
import torch

from comms.collectives.schedule import Op
from comms.errors import ClusterError, ConfigError
from comms.networks.conditions import Background, ChipFault, Described, LinkFault, Reach
from comms.networks.groups import Lattice
from comms.networks.network import Network
from comms.selection.choice import choose
from comms.selection.question import Fidelity
from comms.simulation import full
from orchestrator.config.hardware.cluster_file import load_cluster
from orchestrator.config.job_file import load_job
from orchestrator.models import model_builder
from orchestrator.planning.preparation import Prepared
from orchestrator.runners.timing.prediction import CONDITIONS, UNEVEN, chosen_fidelity, simulate
from orchestrator.verbs.inputs.options import SimulateOptions
from orchestrator.verbs.simulate import answer
from orchestrator.views.console import Console
from partitioner.capture.graph_units import capture_graph
from partitioner.layout.parallel_plan import Plan
from partitioner.lowering.lower import StepShape, lower

CONFIGS = Path(__file__).parents[3] / "cluster_configs"
LAPTOP = load_cluster(CONFIGS / "laptop.yaml")
DGX = load_cluster(CONFIGS / "dgx-a100.yaml")
PLAN = Plan(dp=2, tp=2, pp=2, zero=1, microbatches=4, bucket_bytes=100_000)
SLOW_CHIP = replace(LAPTOP, conditions=Described(chips=(ChipFault((3,), 1.5),)))
SLOW_LINK = replace(LAPTOP, conditions=Described(links=(LinkFault(Reach((0,), "ethernet"), 0.25),)))


@pytest.fixture(scope="module")
def graph():
    built = model_builder.build("builtin:gpt-nano", {}, device="meta", dtype=torch.float32, seed=0)
    batch = built.example_batch(16, 32)
    return capture_graph(built.module, batch, dp=2, microbatches=4, tp_plan=built.tp_plan)


@pytest.fixture(scope="module")
def program(graph):
    return lower(graph, PLAN, StepShape(16, 32, "builtin:gpt-nano", "fp32", 2))


@pytest.mark.parametrize("cluster", [LAPTOP, DGX], ids=["laptop", "dgx-a100"])
@pytest.mark.parametrize(("dp", "tp", "pp"), [(1, 2, 4), (2, 1, 4), (4, 1, 2), (1, 4, 2)])
def test_transfers_between_stages_take_the_same_folded_and_full(graph, cluster, dp, tp, pp):
    plan = Plan(dp=dp, tp=tp, pp=pp, microbatches=4)
    split = lower(graph, plan, StepShape(16, 32, "builtin:gpt-nano", "fp32", 2))
    folded, full = (simulate(split, cluster, fidelity=each) for each in (Fidelity.FOLDED, Fidelity.FULL))
    assert full.step_time_s == pytest.approx(folded.step_time_s, rel=0.02)


def test_one_chip_sends_nothing_at_either_fidelity(graph):
    whole = lower(graph, Plan(microbatches=4), StepShape(16, 32, "builtin:gpt-nano", "fp32", 2))
    folded, full = (
        simulate(whole, LAPTOP.take(1), fidelity=each) for each in (Fidelity.FOLDED, Fidelity.FULL)
    )
    assert full.step_time_s == folded.step_time_s > 0


@pytest.mark.parametrize("fidelity", [Fidelity.FOLDED, Fidelity.FULL])
def test_transfers_between_stages_pay_for_being_issued_as_the_latency_tiers_say(graph, fidelity):
    plan = Plan(dp=1, tp=2, pp=4, microbatches=4)
    split = lower(graph, plan, StepShape(16, 32, "builtin:gpt-nano", "fp32", 2))
    tiers = DGX.network.tiers
    issue_s = next(tier.issue_s for tier in tiers if tier.name == "scale-up")
    assert issue_s == pytest.approx(2e-6 - 0.56e-6)  # a message by itself, less a stage of a collective
    quick = replace(DGX, network=Network(tuple(replace(tier, issue_s=0.0) for tier in tiers)))
    with_it, without = (simulate(split, each, fidelity=fidelity) for each in (DGX, quick))
    transfers = 2 * (4 - 1)  # on the way to the last stage and back, at least
    assert with_it.step_time_s - without.step_time_s >= 0.999 * transfers * issue_s


def test_folded_and_full_agree_on_a_symmetric_plan_and_the_document_is_the_same(program):
    folded, full = (simulate(program, LAPTOP, fidelity=each) for each in (Fidelity.FOLDED, Fidelity.FULL))
    assert full.step_time_s == pytest.approx(folded.step_time_s, rel=0.005)
    one, other = folded.document(), full.document()
    assert one.keys() == other.keys()
    assert (one["fidelity"], other["fidelity"]) == ("folded", "full")
    assert "contention" in str(one["left_out"])
    assert "contention" not in str(other["left_out"])


@pytest.mark.parametrize("cluster", [SLOW_CHIP, SLOW_LINK], ids=["chip", "link"])
def test_what_is_slow_makes_the_step_longer_without_being_asked(program, cluster):
    healthy, slow = simulate(program, LAPTOP), simulate(program, cluster)
    assert (healthy.step.fidelity, slow.step.fidelity) == ("folded", "full")
    assert slow.step_time_s > 1.02 * healthy.step_time_s


def test_folded_leaves_conditions_out_and_says_so(program):
    found = simulate(program, SLOW_LINK, fidelity=Fidelity.FOLDED)
    assert found.step_time_s == simulate(program, LAPTOP).step_time_s
    assert CONDITIONS in found.step.left_out


def test_jobs_in_the_background_make_a_step_longer(program):
    others = Described(background=(Background(Op.ALL_TO_ALL, tuple(range(8)), 2.0**24),))
    busy = simulate(program, replace(LAPTOP, conditions=others))
    alone = simulate(program, LAPTOP, fidelity=Fidelity.FULL)
    assert busy.step.fidelity == alone.step.fidelity == Fidelity.FULL
    assert busy.step_time_s > alone.step_time_s * 1.005


def test_too_many_chips_are_refused_and_not_taken_by_default(program):
    many = replace(program, axes=(("pp", 2), ("dp", 2048), ("tp", 2)))
    with pytest.raises(ConfigError, match="8192 chips are too many") as caught:
        simulate(many, DGX, fidelity=Fidelity.FULL)
    assert "folded" in caught.value.hint
    late = replace(DGX.take(8192), conditions=SLOW_CHIP.conditions)
    assert chosen_fidelity(late, None) is Fidelity.FOLDED
    assert chosen_fidelity(SLOW_CHIP, None) is Fidelity.FULL


def test_conditions_that_the_network_cannot_have_are_the_users_error(program):
    links = tuple(LinkFault(Reach((0,), tier), 0.0) for tier in ("pcie switch",))
    with pytest.raises(ClusterError, match="cut off"):
        simulate(program, replace(LAPTOP, conditions=Described(links=links)))


@pytest.mark.parametrize(("flag", "warned"), [("folded", True), ("full", False), (None, False)])
def test_the_verb_takes_the_flag_and_warns_where_conditions_are_left_out(program, tmp_path, flag, warned):
    job_file = tmp_path / "job.yaml"
    job_file.write_text("kind: job\nversion: 1\nmodel: builtin:gpt-nano\n")
    prepared = Prepared(SLOW_CHIP, load_job(job_file), PLAN, program, was_cached=True)
    out, err = StringIO(), StringIO()
    assert answer(prepared, SimulateOptions(fidelity=flag), Console(out=out, err=err)) == 0
    assert ("conditions" in err.getvalue()) == warned


def test_groups_astride_hosts_are_priced_by_what_joins_the_hosts():
    """Of groups of three in hosts of eight, some cross into the next host; of groups of four none does."""
    network = DGX.take(24).network
    even, uneven = (choose(Op.ALL_GATHER, 2.0**30, Lattice(((1, n),)), network) for n in (4, 3))
    assert (even.tier, uneven.tier) == ("scale-up", "infiniband")
    topology = network.topology()
    seconds = full.simulate(topology, [uneven.job(Lattice(((1, 3),)).copies(24), topology)]).seconds.max()
    assert uneven.transfer_s == pytest.approx(seconds, rel=0.1)


def test_a_step_says_where_groups_sit_unevenly():
    built = model_builder.build(
        "builtin:gpt-nano", {"heads": 3, "width": 96}, device="meta", dtype=torch.float32, seed=0
    )
    graph = capture_graph(built.module, built.example_batch(16, 32), dp=8, tp_plan=built.tp_plan)
    split = lower(graph, Plan(dp=8, tp=3, pp=1), StepShape(16, 32, "builtin:gpt-nano", "fp32", 2))
    folded, moved = (simulate(split, DGX, fidelity=each) for each in (Fidelity.FOLDED, Fidelity.FULL))
    assert UNEVEN in folded.step.left_out
    assert UNEVEN not in moved.step.left_out
    assert moved.step_time_s == pytest.approx(folded.step_time_s, rel=0.1)
