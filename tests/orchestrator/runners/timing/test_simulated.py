"""The simulator against closed forms, lower bounds, and itself without reuse."""

from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from comms.errors import ProgramError
from orchestrator.config.hardware.cluster_file import load_cluster
from orchestrator.config.hardware.latency_tiers import latency_tiers
from orchestrator.runners.runner import Runner, StepRequest
from orchestrator.runners.timing.prediction import SimulatedRunner
from orchestrator.runners.timing.simulated import fold_mesh, simulate_step
from orchestrator.runners.timing.step_costs import ClusterCosts, WorkTime
from orchestrator.runners.timing.timed_segments import axis_name
from orchestrator.runs.timeline import Lane
from partitioner.layout.pipeline_schedules import PipelineSchedule
from partitioner.lowering.lower import with_transfers
from partitioner.program.program import (
    Accumulate,
    Body,
    Call,
    Collective,
    CollectiveOp,
    Compute,
    Free,
    Group,
    Operation,
    Program,
    Recv,
    Reduction,
    Role,
    Segment,
    Send,
    Tensor,
    TensorKind,
    TensorSpec,
    Update,
    Wait,
)

SPEC = TensorSpec((256, 256), "f32")
FORWARD, BACKWARD = 0, 1
ARRIVED, MADE, GRAD_ARRIVED, GRAD_MADE, PARTIAL, SUMMED = range(6)
BUCKETS = (6, 7, 8)
PARAM, STATE, MINE, STATS = 9, 10, 11, 12
ALL = Group(("pp", "dp", "tp"))
CONFIGS = Path(__file__).parents[4] / "cluster_configs"
DGX = load_cluster(CONFIGS / "dgx-a100.yaml")
FEW = settings(max_examples=40)


@dataclass(frozen=True)
class Tables:
    """Costs by table, in nanoseconds."""

    forward: int = 1000
    backward: int = 2000
    host: int = 0
    tp: int = 0
    dp: int = 0
    everyone: int = 0
    transfer: int = 0
    other: int = 0
    issue: int = 0

    def work(self, role, instruction):
        if isinstance(instruction, Compute):
            return WorkTime((self.forward, self.backward)[instruction.segment], self.host)
        return WorkTime(self.other)

    def collective_ns(self, role, instruction):
        return {"tp": self.tp, "dp": self.dp}.get(axis_name(instruction.group), self.everyone)

    def transfer_ns(self, role, instruction):
        return self.transfer

    def issue_ns(self, role, instruction):
        return self.issue


def toy(num_stages, num_microbatches, schedule=PipelineSchedule.ONE_F_ONE_B, dp=4, tp=2):
    """Stages of one segment each way, a tp all-reduce in each, three dp buckets in the last backward."""
    segments = tuple(
        Segment(
            i,
            name,
            (SPEC,),
            (Operation("aten.mm.default(v0, v0)", (SPEC,), False, 2**25, 2**19, 2**18),),
            (1,),
        )
        for i, name in enumerate(("forward", "backward"))
    )
    kinds = [*[TensorKind.ACTIVATION] * 6, *[TensorKind.GRAD] * 3, TensorKind.FLAT, TensorKind.STATE]
    kinds += [TensorKind.SCALAR] * 2
    tensors = tuple(Tensor(i, f"t{i}", kind, SPEC) for i, kind in enumerate(kinds))
    roles = tuple(
        toy_role(stage, num_stages, num_microbatches, schedule, tensors) for stage in range(num_stages)
    )
    axes = (("pp", num_stages), ("dp", dp), ("tp", tp))
    return Program(axes, num_microbatches, segments, roles, (("dtype", "fp32"),))


def toy_role(stage, num_stages, num_microbatches, schedule, tensors):
    def reduce(axis, read, write):
        return Collective(0, CollectiveOp.ALL_REDUCE, Reduction.SUM, axis, 0, (read,), (write,))

    tp, dp = Group(("tp",)), Group(("dp",))
    first, last = stage == 0, stage == num_stages - 1
    bodies = {} if first else {"recv_forward": [Recv(0, ARRIVED, stage - 1)]}
    bodies["forward"] = [] if first else [Wait(0, (ARRIVED,))]
    bodies["forward"] += [Compute(0, FORWARD, (ARRIVED,), (PARTIAL,)), reduce(tp, PARTIAL, MADE)]
    bodies["forward"] += [Wait(0, (MADE,)), Free(0, (PARTIAL,))]
    backward = [] if last else [Wait(0, (GRAD_ARRIVED,))]
    backward += [Compute(0, BACKWARD, (GRAD_ARRIVED,), (PARTIAL,)), reduce(tp, PARTIAL, GRAD_MADE)]
    backward += [Wait(0, (GRAD_MADE,)), Accumulate(0, (GRAD_MADE,), (BUCKETS[0],))]
    bodies["backward"] = backward
    starts = [reduce(dp, bucket, bucket) for bucket in BUCKETS]
    bodies["backward_last"] = [*starts[:2], *backward, starts[2]]
    if not last:
        bodies |= {
            "send_forward": [Send(0, MADE, stage + 1)],
            "recv_backward": [Recv(0, GRAD_ARRIVED, stage + 1)],
        }
    if not first:
        bodies["send_backward"] = [Send(0, GRAD_MADE, stage - 1)]
    update = Update(0, PARAM, BUCKETS[0], STATS, PARAM, True)
    bodies["update"] = [Wait(0, BUCKETS), reduce(ALL, MINE, STATS), Wait(0, (STATS,)), update]
    number, made = 0, []
    for name, instructions in bodies.items():
        made.append(Body(name, tuple(replace(ins, id=number + i) for i, ins in enumerate(instructions))))
        number += len(instructions)
    tasks = schedule.order(stage, num_stages, num_microbatches)
    calls = (*with_transfers(tasks, frozenset(bodies), "backward_last"), Call("update", 0))
    return Role(stage, tensors, tuple(made), (("step", calls),))


shapes = st.tuples(st.integers(1, 5), st.integers(1, 7), st.sampled_from(list(PipelineSchedule)))
times = st.integers(0, 5000)
tables = st.builds(Tables, *[times] * 8)


@pytest.mark.parametrize("schedule", list(PipelineSchedule))
@pytest.mark.parametrize(("p", "m"), [(1, 4), (2, 2), (4, 8), (8, 3)])
def test_the_bubble_of_equal_stages_is_p_minus_1_over_m_plus_p_minus_1(schedule, p, m):
    step = simulate_step(toy(p, m, schedule), Tables())
    assert step.step_ns == (m + p - 1) * 3000
    assert all(tally.bubble_ns == (p - 1) * 3000 for tally in step.tallies)
    assert step.overall.bubble_ns / step.overall.total_ns == pytest.approx((p - 1) / (m + p - 1))


@FEW
@given(shapes, tables)
def test_a_step_is_at_least_its_critical_path_and_its_busiest_lane(shape, costs):
    p, m, _ = shape
    step = simulate_step(toy(*shape), costs)
    one_way = max(costs.forward, costs.host) + costs.tp
    other_way = max(costs.backward, costs.host) + costs.tp
    assert step.step_ns >= p * (one_way + other_way) + 2 * (p - 1) * costs.transfer
    assert step.step_ns >= m * (one_way + other_way) + costs.everyone
    busy = Counter()
    for span in step.timeline().spans:
        busy[span.chip, span.lane] += span.end_ns - span.start_ns
    assert step.step_ns >= max(busy.values())


@FEW
@given(shapes, tables)
def test_reusing_timed_segments_changes_nothing(timed_anew, shape, costs):
    program = toy(*shape)
    fast, slow = simulate_step(program, costs), timed_anew(program, costs)
    assert (fast.step_ns, fast.tallies) == (slow.step_ns, slow.tallies)
    assert fast.timeline() == slow.timeline()


@FEW
@given(shapes, tables)
def test_the_parts_of_every_stage_sum_to_the_step(shape, costs):
    step = simulate_step(toy(*shape), costs)
    assert all(tally.total_ns == step.step_ns and tally.bubble_ns >= 0 for tally in step.tallies)


@FEW
@given(shapes, tables, st.integers(2, 9))
def test_k_times_the_costs_take_k_times_as_long(shape, costs, k):
    scaled = Tables(*(k * getattr(costs, name) for name in Tables.__dataclass_fields__))
    assert simulate_step(toy(*shape), scaled).step_ns == k * simulate_step(toy(*shape), costs).step_ns


def with_rates(tree, factor):
    """A tree of switches with the rate of all its links times a factor."""

    def faster(link):
        return replace(link, bytes_per_s=link.bytes_per_s * factor)

    trunks = tuple(replace(trunk, link=faster(trunk.link)) for trunk in tree.trunks)
    return replace(tree, port=faster(tree.port), trunks=trunks)


@FEW
@given(st.integers(1, 4), st.integers(1, 6), st.sampled_from(list(PipelineSchedule)), st.floats(1, 20))
def test_more_bandwidth_is_never_slower(p, m, schedule, factor):
    program = toy(p, m, schedule)
    cluster = DGX.take(8 * p)
    tiers = tuple(replace(tier, shape=with_rates(tier.shape, factor)) for tier in cluster.network.tiers)
    better = replace(cluster, network=replace(cluster.network, tiers=tiers))
    slow, fast = (simulate_step(program, ClusterCosts(program, c)).step_ns for c in (cluster, better))
    assert fast <= slow


@FEW
@given(shapes, tables)
def test_timelines_are_sound_and_the_same_every_time(violations, shape, costs):
    first, second = (simulate_step(toy(*shape), costs).timeline(all_chips=False) for _ in range(2))
    assert violations(first) == ()
    assert first == second


def test_a_gradient_reduction_hides_behind_backward_until_it_is_longer():
    hidden = simulate_step(toy(1, 3), Tables(dp=900))
    assert (hidden.step_ns, hidden.overall.exposed_ns.get("dp", 0)) == (3 * 3000 + 900, 900)
    longer = simulate_step(toy(1, 3), Tables(dp=1500))
    assert longer.step_ns == 3 * 3000 - 2000 + 3 * 1500
    assert longer.overall.exposed_ns["dp"] == longer.step_ns - 3 * 3000


def test_slow_launches_show_as_host_time():
    step = simulate_step(toy(1, 2), Tables(host=2500))
    assert step.step_ns == 2 * 2 * 2500
    assert step.overall.host_ns == 2 * (1500 + 500)


def test_the_last_stage_waits_for_bytes_and_the_wait_is_split_at_the_senders_arrival():
    last = simulate_step(toy(2, 1), Tables(transfer=700)).tallies[1]
    assert last.bubble_ns - 1000 == 700 + 2000  # the first stage's forward, then the end of its backward
    assert last.exposed_ns["pp"] == 700


def test_a_small_mesh_shows_every_chip_and_a_large_one_its_representatives():
    program = toy(2, 2)
    step = simulate_step(program, Tables(transfer=10))
    assert len(step.timeline().chips) == 16
    assert [chip for chip, _ in step.timeline(all_chips=False).chips] == [0, 8]
    assert len(step.timeline().flows) == 8 * len(step.timeline(all_chips=False).flows)
    computed = [s.end_ns - s.start_ns for s in step.timeline().spans if s.lane is Lane.COMPUTE]
    assert sum(computed) == 8 * step.overall.compute_ns


def test_spans_carry_the_keys_of_the_program():
    program = toy(2, 3)
    timeline = simulate_step(program, Tables(tp=5, transfer=10)).timeline(7, all_chips=False)
    sends = [span for span in timeline.spans if span.lane is Lane.SEND and span.chip == 0]
    body = program.roles[0].body["send_forward"]
    assert [(s.step, s.instr, s.microbatch) for s in sends] == [
        (7, body.instructions[0].id, mb) for mb in range(3)
    ]


def test_the_number_of_chips_does_not_change_what_is_driven():
    small, large = toy(4, 8, dp=16, tp=8), toy(4, 8, dp=512, tp=8)
    assert simulate_step(small, Tables()).ran == simulate_step(large, Tables()).ran
    assert fold_mesh(large).num_chips == 4


def test_a_send_that_nobody_receives_is_a_clear_error():
    program = toy(2, 1)
    calls = tuple(call for call in program.roles[1].schedule["step"] if call.body != "recv_forward")
    broken = replace(program.roles[1], schedules=(("step", calls),))
    with pytest.raises(ProgramError, match="wait for each other"):
        simulate_step(replace(program, roles=(program.roles[0], broken)), Tables())


def test_the_optimizer_moves_parameter_states_and_gradient_once_each():
    program = toy(1, 1, dp=1, tp=1)
    cluster = DGX.take(1)
    chip = cluster.chip(0)
    rate = chip.memory_bytes_per_s * chip.memory_efficiency
    work = ClusterCosts(program, cluster).work(
        program.roles[0], Update(0, PARAM, BUCKETS[0], STATS, PARAM, True)
    )
    assert work.device_ns == round(5 * SPEC.nbytes / rate * 1e9)  # two parameters, one gradient, two states


@pytest.mark.parametrize(
    ("name", "num_chips", "latency_s"),
    [("dgx-a100", 8, 2e-6), ("dgx-a100", 16, 1.3e-6), ("pcie-workstation", 4, 2.6e-6), ("laptop", 8, 20e-6)],
)
def test_a_transfer_takes_what_the_latency_tiers_say_of_a_message_by_itself(name, num_chips, latency_s):
    cluster = load_cluster(CONFIGS / f"{name}.yaml").take(num_chips)
    program, send = toy(2, 1, dp=num_chips // 4, tp=2), Send(0, MADE, 1)
    row = latency_tiers(cluster.network, cluster.chip_types)[-1]
    moving_s = SPEC.nbytes / row.loaded_bytes_per_s
    costs = ClusterCosts(program, cluster)
    assert row.latency_s == pytest.approx(latency_s)
    assert costs.transfer_ns(program.roles[0], send) == pytest.approx((row.latency_s + moving_s) * 1e9, abs=1)
    assert costs.transfer_ns(program.roles[1], replace(send, to=0)) == costs.transfer_ns(
        program.roles[0], send
    )


def test_the_simulated_runner_is_a_runner_whose_steps_all_take_as_long():
    runner: Runner = SimulatedRunner(toy(2, 4), DGX.take(16))
    results = [runner.run(StepRequest()) for _ in range(2)]
    runner.close()
    assert results[0].step_ns == results[1].step_ns > 0
    timeline = results[1].timeline(2)
    assert timeline is not None
    assert timeline.steps == (2,)
