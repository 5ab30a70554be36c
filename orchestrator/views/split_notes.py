"""What is said of a split before anything is timed or run: the rule for the loss, and what tensor parallelism cuts."""

from comms.units import format_percent
from orchestrator.planning.preparation import Prepared
from orchestrator.views.console import Console

CUT_SHARE = 0.9  # below it a model counts as copied rather than cut


def say_split(prepared: Prepared, console: Console) -> None:
    """How samples and parameters are split, and a warning where much is only copied."""
    facts, plan = prepared.program.facts, prepared.plan
    changed = (
        "" if facts["schedule"] == str(plan.schedule) else f"; schedule {facts['schedule']}, which that needs"
    )
    if plan.dp * plan.microbatches > 1:
        console.say(f"loss: {facts['loss']}{changed}")
    if "merged" in facts:
        console.warn(str(facts["merged"]))
    if plan.tp > 1:
        parameters, flops = float(facts["tp_cut_parameters"]), float(facts["tp_cut_flops"])
        said = f"tp {plan.tp} cuts {format_percent(parameters)} of the parameters, {format_percent(flops)} of the FLOPs"
        if min(parameters, flops) < CUT_SHARE:
            console.warn(f"{said}; on every chip: {facts['tp_copied'] or 'operators that are not cut'}")
        else:
            console.say(said)
