"""simulate: how long is a step at any scale, where does the time go, what does it cost, does it fit?

What is predicted is made by `runners.timing.prediction`; here it is asked for, shown and kept. A plan that does not
fit is still timed, then ends with FitError.
"""

import json
from collections.abc import Mapping

from comms.errors import FitError
from comms.selection.progress import LOADING
from comms.selection.question import Fidelity
from comms.units import DASH, format_dollars, format_percent, format_scaled, format_seconds
from orchestrator.planning.preparation import Prepared
from orchestrator.runners.timing.prediction import (
    CONDITIONS,
    MIXED,
    UNEVEN,
    SimulationResult,
    chosen_fidelity,
    simulate,
)
from orchestrator.runs import run_dir
from orchestrator.runs.disk import write_whole
from orchestrator.runs.run_dir import RunDir
from orchestrator.verbs.inputs.options import SimulateOptions
from orchestrator.verbs.inputs.planned_inputs import prepare, write_prepared
from orchestrator.views.console import Console, Table
from orchestrator.views.perfetto import trace_gz
from orchestrator.views.plots import timeline_png
from orchestrator.views.split_notes import say_split
from partitioner.program.peak_memory import MemoryClass

ZERO, ALTERNATING = "set plan.zero to 1 (with dp > 1), ", "use the 1f1b schedule, "
# What to turn when a class of memory is the largest of a stage that does not fit.
KNOBS: Mapping[MemoryClass, str] = {
    MemoryClass.OPTIMIZER: f"{ZERO}raise tp or pp",
    MemoryClass.ACTIVATIONS: f"{ALTERNATING}raise microbatches, raise tp, or torch.utils.checkpoint blocks",
    MemoryClass.BACKWARD: "raise microbatches (smaller ones), or raise tp or pp",
    MemoryClass.TEMPORARY: "raise microbatches (smaller ones), or raise tp",
    MemoryClass.BATCH: "raise microbatches (smaller ones), or shorten --seq",
}
TURNED = {"zero1": ZERO, "dp1 ": ZERO, "1f1b": ALTERNATING}  # what a plan that says so has no use for
DEFAULT_KNOB = "raise tp or pp, or take more chips"


def knobs(largest: MemoryClass, plan: str) -> str:
    """What to turn in a plan (in words), of which this class of memory is the largest."""
    hint = KNOBS.get(largest, DEFAULT_KNOB)
    for said, knob in TURNED.items():
        hint = hint.replace(knob, "") if said in plan else hint
    return hint


def require_fit(result: SimulationResult) -> None:
    """Raises FitError if a stage does not fit."""
    if (short := memory_short(result)) is not None:
        raise short


def memory_short(result: SimulationResult) -> FitError | None:
    """The error for the fullest stage that does not fit: what is largest in it, and what to turn."""
    if result.fits:
        return None
    worst = max(result.memory, key=lambda role: role.peak_bytes - result.chip_of(role).memory_bytes)
    chip = result.chip_of(worst)
    largest, nbytes = max(worst.classes, key=lambda pair: pair[1])
    return FitError(
        f"does not fit: {format_scaled(worst.peak_bytes, 'B')} needed ({largest}: {format_scaled(nbytes, 'B')}), "
        f"{chip.name} has {format_scaled(chip.memory_bytes, 'B')}",
        f"plan {result.plan}, {worst.where}",
        knobs(largest, result.plan),
    )


def main(options: SimulateOptions, console: Console) -> int:
    """Prepare a Program as asked, predict it, answer. Raises UserError."""
    return answer(prepare(options, console.phase), options, console)


def answer(prepared: Prepared, options: SimulateOptions, console: Console) -> int:
    """Print the prediction; with --out, write it with plan, Program, timeline, picture and trace. Raises FitError."""
    say_split(prepared, console)
    asked = None if options.fidelity is None else Fidelity(options.fidelity)
    if chosen_fidelity(prepared.cluster, asked) is Fidelity.FULL:
        with console.phase(LOADING):
            from comms.selection.full_collective import load_loops  # not needed to fold

            load_loops()
    with console.phase("simulate"):
        result = simulate(prepared.program, prepared.cluster, fidelity=asked)
    for what in (CONDITIONS, UNEVEN, MIXED):
        if what in result.step.left_out:
            console.warn(f"folded fidelity leaves out {what}; --fidelity full has it")
    document = result.document()
    console.results(document, tables(result))
    if options.run_dir is not None:
        run = run_dir.create(options.run_dir)
        write_run(run, prepared, result)
        write_whole(run.result, (json.dumps(console.whole(document), indent=1) + "\n").encode())
        console.say(
            f"in {options.run_dir}: result.json, timeline.png, trace.json.gz (for https://ui.perfetto.dev), plan.yaml"
        )
    require_fit(result)
    return 0


def write_run(run: RunDir, prepared: Prepared, result: SimulationResult) -> None:
    """Everything about a prediction that is worth keeping."""
    timeline = result.timeline()
    run.write_config(
        {
            "cluster": prepared.cluster.name,
            "chips": result.num_chips,
            "model": prepared.job.model,
            "seq": prepared.job.seq,
            "global_batch": prepared.job.global_batch,
        }
    )
    write_prepared(run, prepared)
    run.write_timeline(timeline)
    write_whole(run.trace, trace_gz(timeline))
    write_whole(run.timeline_plot, timeline_png([timeline]))


def tables(result: SimulationResult) -> tuple[Table, ...]:
    """The prediction to read."""
    head = Table(
        f"{result.plan} on {result.num_chips} chips of {result.cluster.name}",
        (
            ("step", format_seconds(result.step_time_s)),
            ("throughput", format_scaled(result.tokens_per_s, result.rate_unit)),
            ("MFU", format_percent(result.mfu)),
            *work(result),
            ("cost", _cost(result)),
            ("energy", f"{format_scaled(result.energy_j_per_step, 'J')} per step"),
            ("fidelity", f"{result.step.fidelity}, made in {format_seconds(result.elapsed_s)}"),
            ("left out", "; ".join(result.step.left_out)),
        ),
    )
    own = [_kinds_table(result)] if len(result.kinds) > 1 else []
    return head, _time_table(result), *own, _memory_table(result)


def _cost(result: SimulationResult) -> str:
    step, hour = result.cost_usd_per_step, result.cluster.usd_per_hour
    return DASH if step is None else f"{format_dollars(step)} per step, {format_dollars(hour)} per hour"


def _kinds_table(result: SimulationResult) -> Table:
    """Chips of several kinds: how long each works, and waits."""
    rows = []
    for name, count, parts in result.kinds:
        busy = parts.compute_s + parts.optimizer_s + parts.host_s
        waits = sum(seconds for _, seconds in parts.exposed_communication_s)
        shares = (
            format_percent(seconds / (result.step_time_s or 1.0)) for seconds in (busy, waits, parts.bubble_s)
        )
        rows.append((f"{count} x {name}", *shares))
    return Table(
        "shares of the step by kind of chip", rows, ("chips", "works", "communicates", "waits for others")
    )


def work(result: SimulationResult) -> tuple[tuple[str, str], ...]:
    """FLOPs of a step, and those with what checkpoints compute again if that is more."""
    model, hardware = result.model_flops, result.hardware_flops
    rows = (
        ("model FLOPs", format_scaled(model, "FLOP")),
        ("hardware FLOPs", format_scaled(hardware, "FLOP")),
    )
    return rows[: 1 + (hardware > model)]


def _time_table(result: SimulationResult) -> Table:
    parts = result.breakdown
    rows = [
        ("compute", parts.compute_s),
        *((f"waiting for {axis}", seconds) for axis, seconds in parts.exposed_communication_s),
        ("bubble", parts.bubble_s),
        ("host", parts.host_s),
        ("optimizer", parts.optimizer_s),
    ]
    total = result.step_time_s or 1.0
    texts = tuple((name, format_seconds(value), format_percent(value / total)) for name, value in rows)
    return Table("where the time goes (mean over chips)", texts, ("part", "time", "share"))


def _memory_table(result: SimulationResult) -> Table:
    rows = []
    for role in result.memory:
        size = result.chip_of(role).memory_bytes
        share = format_percent(role.peak_bytes / size)
        kept = format_scaled(role.activation_bytes, "B")
        rows.append((f"stage {role.stage}", format_scaled(role.peak_bytes, "B"), share, kept))
    return Table("peak memory per chip", rows, ("stage", "peak", "of the chip", "activations kept"))
