"""plan: how is the model split, does it fit, how long is a step?

`partition` is the Python entry. A plan that was made can be saved (`--run-dir`), edited and given back with `--plan`.
"""

from comms.units import format_percent, format_scaled, format_seconds
from orchestrator.config.hardware.cluster import Cluster
from orchestrator.config.job_file import Job
from orchestrator.planning import preparation
from orchestrator.planning.preparation import Prepared
from orchestrator.runners.timing import fastest_plan
from orchestrator.runners.timing.prediction import SimulationResult, simulate
from orchestrator.runs import run_dir
from orchestrator.verbs.inputs.options import PlanOptions
from orchestrator.verbs.inputs.planned_inputs import prepare
from orchestrator.verbs.simulate import require_fit, work, write_run
from orchestrator.views.console import Console, Table
from orchestrator.views.split_notes import say_split
from partitioner.layout.parallel_plan import Plan, plan_to_yaml
from partitioner.program.program import Program, Role, TensorKind

PREDICTED = (
    "step_time_s", "peak_memory_bytes", "activation_bytes", "fits", "mfu", "model_flops", "hardware_flops",
)  # fmt: skip


def partition(cluster: Cluster, job: Job, plan: Plan | None = None) -> Prepared:
    """Split `job`'s model over all chips of `cluster`, by `plan` or the fastest one that fits. Raises UserError."""
    preparation.require_same(job, plan)
    return fastest_plan.prepare(cluster, job, plan)


def main(options: PlanOptions, console: Console) -> int:
    """The `plan` verb."""
    prepared = prepare(options, console.phase)
    say_split(prepared, console)
    result = simulate(prepared.program, prepared.cluster)
    console.results(document(prepared, result), [stage_table(prepared.program), fit_table(result)])
    if options.run_dir is not None:
        write_run(run_dir.create(options.run_dir), prepared, result)
        console.say(f"edit {options.run_dir / 'plan.yaml'} and give it back with --plan")
    elif not options.as_json:
        console.say(plan_to_yaml(prepared.plan))
    require_fit(result)
    return 0


def parameter_bytes(role: Role) -> int:
    """Bytes of parameters that each chip of a stage holds."""
    return sum(t.spec.nbytes for t in role.tensors if t.kind is TensorKind.PARAM)


def step_flops(program: Program, role: Role) -> int:
    """FLOPs that each chip of a stage does in a step, optimizer left out."""
    bodies = {
        body.name: sum(
            program.segments[ins.segment].flops for ins in body.instructions if hasattr(ins, "segment")
        )
        for body in role.bodies
    }
    return sum(bodies[call.body] for call in role.schedule["step"])


def document(prepared: Prepared, result: SimulationResult) -> dict[str, object]:
    """As JSON values."""
    program = prepared.program
    stages = [
        {
            "stage": r.stage,
            "parameter_bytes_per_chip": parameter_bytes(r),
            "flops_per_chip": step_flops(program, r),
        }
        for r in program.roles
    ]
    plan = prepared.plan
    return {
        "plan": {"dp": plan.dp, "tp": plan.tp, "pp": plan.pp, "zero": plan.zero, "schedule": str(plan.schedule),
                 "microbatches": plan.microbatches, "batch_norm": str(plan.batch_norm)},
        "num_chips": plan.num_chips, "units": program.facts["units"],
        "units_per_stage": [int(number) for number in str(program.facts["stages"]).split("+")],
        "loss_rule": program.facts["loss"],
        "parameters": program.facts["params"], "stages": stages, "was_cached": prepared.was_cached,
        **{k: v for k, v in result.document().items() if k in PREDICTED},
    }  # fmt: skip


def stage_table(program: Program) -> Table:
    """What each stage holds and does."""
    rows = tuple(
        (
            f"stage {r.stage}",
            size,
            format_scaled(parameter_bytes(r), "B"),
            format_scaled(step_flops(program, r), "FLOP"),
        )
        for r, size in zip(program.roles, str(program.facts["stages"]).split("+"), strict=True)
    )
    title = f"{program.facts['model']}: {program.facts['plan']} on {program.num_chips} chips"
    return Table(title, rows, ("stage", "units", "parameters per chip", "work per chip and step"))


def fit_table(result: SimulationResult) -> Table:
    """Memory and time of the plan."""
    rows = [
        (f"stage {role.stage} peak memory", format_scaled(role.peak_bytes, "B"),
         format_percent(role.peak_bytes / result.chip_of(role).memory_bytes) + " of the chip")
        for role in result.memory
    ]  # fmt: skip
    rows.append(("step", format_seconds(result.step_time_s), f"MFU {format_percent(result.mfu)}"))
    rows += [(f"work ({what})", value, "of the step") for what, value in work(result)]
    return Table("does it fit, how fast is it", rows, ("what", "value", "share"))
