"""What is said of a split before anything is timed or run: keys without effect, the rule for the loss, what tp cuts."""

from comms.units import format_percent
from orchestrator.planning.idle_keys import idle_keys
from orchestrator.planning.preparation import Prepared
from orchestrator.views.console import Console
from partitioner.layout.parallel_plan import BatchNorms
from partitioner.program.program import Program

CUT_SHARE = 0.9  # below it a model counts as copied rather than cut
FACTS = ("tp_cut_parameters", "tp_cut_flops", "tp_copied")


def say_split(prepared: Prepared, console: Console, *, resumed: bool = False) -> None:
    """How samples and parameters are split, and a warning where much is only copied; `--json` has the shares too.

    `resumed`: the job is that of a run, which has all keys.
    """
    facts, plan = prepared.program.facts, prepared.plan
    for said in () if resumed else idle_keys(prepared.job, plan):
        console.warn(said)
    changed = (
        "" if facts["schedule"] == str(plan.schedule) else f"; schedule {facts['schedule']}, which that needs"
    )
    if said := _odd_batch(prepared):
        console.say(said)
    if plan.dp * plan.microbatches == 1:
        console.say(f"the batch is not split: loss {facts['loss']}{changed}")
    else:
        apart = "batch norm by parts, else " * (plan.batch_norm is BatchNorms.PER_PART)
        console.say(f"{apart}the split is exact: loss = {facts['loss']}{changed}")
    console.note({name: facts[name] for name in FACTS})
    for said in warnings_of(prepared.program):
        console.warn(said)
    if plan.tp > 1 and not _copied_by_tp(prepared.program):
        console.say(_share(prepared.program))


def _odd_batch(prepared: Prepared) -> str:
    """Why a plan that was left open has no more replicas, where that is the batch."""
    chips, batch, plan = prepared.cluster.num_chips, prepared.job.global_batch, prepared.plan
    if prepared.job.plan.dp is not None or plan.dp == chips or batch % chips == 0:
        return ""
    return f"plan: {plan}, as a batch of {batch} does not divide by dp {chips}"


def warnings_of(program: Program) -> list[str]:
    """What became of a plan otherwise than its maker may think."""
    return [said for said in (str(program.facts.get("merged", "")), _copied_by_tp(program)) if said]


def _copied_by_tp(program: Program) -> str:
    """What tensor parallelism does not cut and why, or nothing where it cuts nearly all."""
    facts = program.facts
    is_little = min(float(facts["tp_cut_parameters"]), float(facts["tp_cut_flops"])) < CUT_SHARE
    if program.size("tp") == 1 or not is_little:
        return ""
    return f"{_share(program)}; on every chip: {facts['tp_copied'] or 'operators that are not cut'}"


def _share(program: Program) -> str:
    parameters, flops = (format_percent(float(program.facts[name])) for name in FACTS[:2])
    return f"tp {program.size('tp')} cuts {parameters} of the parameters, {flops} of the FLOPs"
