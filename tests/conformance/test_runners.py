"""The same claims about every runner: what is timed, run in one process and run by actors is one Program."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from comms.selection.progress import quiet
from kernels.optimizers import same_kind
from orchestrator.config.hardware.cluster_file import cluster_path, load_cluster
from orchestrator.config.job_file import load_job
from orchestrator.planning.job_parts import build_model, job_optimizer
from orchestrator.planning.preparation import Prepared
from orchestrator.runners.executing.chip_set import InlineLaunch
from orchestrator.runners.runner import Launch, Runner, Settings, StepRequest, TensorRunner
from orchestrator.runners.timing.fastest_plan import prepare
from orchestrator.runners.timing.prediction import SimulatedRunner
from orchestrator.runs.data import split_batch
from orchestrator.runs.timeline import Timeline
from partitioner.program.program import Free, Recv, Send, Wait

JOB = (
    "model=builtin:gpt-nano", "seq=16", "global_batch=16", "microbatches=2", "plan.dp=2", "plan.tp=2", "plan.pp=2",
    "plan.zero=1",
)  # fmt: skip
RUNNERS = ["simulated", "inline", pytest.param("ray", marks=pytest.mark.ray)]


@pytest.fixture(scope="module")
def ray_launch(request: pytest.FixtureRequest) -> Iterator[Launch | None]:
    """Ray comes up while the Program is made, as it does in training; None if no test asks for it."""
    if not any(item.get_closest_marker("ray") for item in request.session.items if item.path == request.path):
        yield None
        return
    from orchestrator.runners.on_ray.ray_launch import RayLaunch

    launch = RayLaunch(load_cluster(cluster_path("laptop")))
    yield launch
    launch.close()


@pytest.fixture(scope="module")
def prepared(ray_launch: Launch | None) -> Prepared:
    """A small job with every kind of parallelism on the eight chips of laptop.yaml."""
    return prepare(load_cluster(cluster_path("laptop")), load_job(None, JOB))


def loaded(launch: Launch, prepared: Prepared) -> TensorRunner:
    model = build_model(prepared.job, "cpu")
    settings = Settings(same_kind(job_optimizer(prepared.job, model.module)), prepared.job.clip_norm)
    runner = launch.connect(prepared.program, settings, quiet)
    values = {f"params:{k}": v.detach() for k, v in model.module.named_parameters()}
    values |= {f"buffer:{k}": v for k, v in model.module.named_buffers()}
    runner.load(values.__getitem__)
    return runner


@pytest.fixture(scope="module", params=RUNNERS)
def ran(
    request: pytest.FixtureRequest, prepared: Prepared, ray_launch: Launch | None
) -> Iterator[tuple[str, Timeline, float | None]]:
    """(runner, timeline of one step, loss of the step if there is one)."""
    name = request.param
    if name == "simulated":
        runner: Runner = SimulatedRunner(prepared.program, prepared.cluster)
    else:
        launch = ray_launch if name == "ray" else InlineLaunch(replace(prepared.cluster, actors=2))
        assert launch is not None
        runner = loaded(launch, prepared)
    try:
        batches = split_batch(batch_of(prepared), prepared.program)
        result = runner.run(StepRequest("step", 1e-3, batches, measure=True))
        timeline = result.timeline()
        assert timeline is not None and result.step_ns > 0
        assert (result.stats is None) == (name == "simulated")
        yield name, timeline, result.stats.loss if result.stats is not None else None
    finally:
        runner.close()


def batch_of(prepared: Prepared) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    shape = (prepared.job.global_batch, prepared.job.seq)
    return {name: torch.randint(0, 256, shape, generator=generator) for name in ("input_ids", "labels")}


def expected_instances(prepared: Prepared) -> Counter[tuple[int, int, int]]:
    """(chip, instruction, microbatch) of everything that takes time in one step."""
    program, found = prepared.program, Counter[tuple[int, int, int]]()
    for chip in range(program.num_chips):
        role = program.role_of(chip)
        for call in role.schedule["step"]:
            timed = [i for i in role.body[call.body].instructions if not isinstance(i, Wait | Free)]
            found.update((chip, i.id, call.microbatch) for i in timed)
    return found


def test_every_instruction_happens_exactly_once(ran, prepared):
    _, timeline, _ = ran
    work = [
        s for s in timeline.spans if str(s.lane) != "host"
    ]  # the host's span launches the same instruction
    seen = Counter((s.chip, s.instr, s.microbatch) for s in work)
    assert seen == expected_instances(prepared)


def test_no_two_things_happen_at_once_in_a_lane(ran, violations):
    name, timeline, _ = ran
    if name == "simulated":  # real chips share cores: a lane of theirs is not a resource
        assert violations(timeline) == ()


def test_computation_follows_the_order_of_the_program(ran, prepared):
    _, timeline, _ = ran
    program = prepared.program
    for chip in range(program.num_chips):
        role = program.role_of(chip)
        order = {}
        for position, call in enumerate(role.schedule["step"]):
            for index, ins in enumerate(role.body[call.body].instructions):
                order[ins.id, call.microbatch] = (position, index)
        compute = [s for s in timeline.spans if s.chip == chip and str(s.lane) in ("compute", "optimizer")]
        by_time = [
            order[s.instr, s.microbatch] for s in sorted(compute, key=lambda s: (s.start_ns, s.end_ns))
        ]
        assert by_time == sorted(by_time)


def test_nothing_is_received_before_it_was_sent(ran, prepared):
    _, timeline, _ = ran
    program = prepared.program
    ends: dict[tuple[str, int, int, int], int] = {}
    for span in timeline.spans:
        role = program.role_of(span.chip)
        ins = next(i for b in role.bodies for i in b.instructions if i.id == span.instr)
        if isinstance(ins, Send):
            kind = "forward" if ins.to > role.stage else "backward"
            ends[kind, span.chip, program.peer(span.chip, ins.to), span.microbatch] = span.start_ns
    checked = 0
    for span in timeline.spans:
        role = program.role_of(span.chip)
        ins = next(i for b in role.bodies for i in b.instructions if i.id == span.instr)
        if isinstance(ins, Recv):
            kind = "forward" if ins.source < role.stage else "backward"
            sent = ends[kind, program.peer(span.chip, ins.source), span.chip, span.microbatch]
            assert span.end_ns >= sent
            checked += 1
    assert checked == len(ends) > 0


def test_runners_with_tensors_agree_with_one_chip(ran, prepared):
    name, _, loss = ran
    if name == "simulated":
        return
    module = build_model(prepared.job, "cpu").module
    alone = float(module(**batch_of(prepared)).detach())
    assert loss == pytest.approx(alone, rel=1e-6)
