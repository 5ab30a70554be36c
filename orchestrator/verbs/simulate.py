"""simulate: how long is a step at any scale, where does the time go, what does it cost, does it fit?

Needs a Program and a cluster, no torch and no chip. Averages over chips: all stages have the same number of
chips, so the breakdown is the mean over stages and sums to the step time; `roles` gives each stage's own.
Peak memory is per chip of a stage. A plan that does not fit is still timed, then ends with FitError.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

from comms import wording
from comms.errors import ConfigError, FitError, located
from comms.selection.pricing import Fidelity
from comms.selection.progress import LOADING
from kernels.chips import Chip
from orchestrator.config.hardware.cluster import Cluster
from orchestrator.planning.preparation import Prepared
from orchestrator.runners.timing.simulated import SimulatedStep, simulate_step
from orchestrator.runners.timing.step_costs import DEFAULT_DTYPE, NS_PER_S, ClusterCosts
from orchestrator.runners.timing.timed_segments import Tally
from orchestrator.runs import metrics, run_dir
from orchestrator.runs.disk import write_whole
from orchestrator.runs.run_dir import RunDir
from orchestrator.runs.timeline import Timeline
from orchestrator.verbs.inputs.options import SimulateOptions
from orchestrator.verbs.inputs.planned_inputs import prepare
from orchestrator.views.console import Console, Table, pairs
from orchestrator.views.perfetto import trace_gz
from partitioner.layout.parallel_plan import plan_to_yaml
from partitioner.memory.peak_memory import MemoryClass, RoleMemory, peak_memory
from partitioner.program.program import Program
from partitioner.program.program_codec import encode
from partitioner.program.program_text import to_text

AXES = ("tp", "dp", "pp", "all")  # always shown, zero or not; others only where a Program has them

EVERY_CHIP = 2048  # up to so many are driven one by one
CONDITIONS = "the conditions of the cluster file"
UNEVEN = "how groups of chips sit that fill hosts or tiers unevenly"

# What to turn when a class of memory is the largest of a stage that does not fit.
KNOBS: Mapping[MemoryClass, str] = {
    MemoryClass.OPTIMIZER: "set plan.zero to 1 (with dp > 1), or raise tp or pp",
    MemoryClass.ACTIVATIONS: "raise microbatches (smaller ones), use the 1f1b schedule, or raise tp",
    MemoryClass.TEMPORARY: "raise microbatches (smaller ones), or raise tp",
    MemoryClass.BATCH: "raise microbatches (smaller ones), or shorten --seq",
}
DEFAULT_KNOB = "raise tp or pp, or take more chips"


@dataclass(frozen=True, slots=True)
class StepBreakdown:
    """Seconds of a chip's step; the parts sum to the step time."""

    compute_s: float
    optimizer_s: float
    host_s: float
    exposed_communication_s: tuple[tuple[str, float], ...]
    bubble_s: float

    def document(self) -> dict[str, object]:
        """As JSON values."""
        return {
            "compute_s": self.compute_s,
            "exposed_communication_s": dict(self.exposed_communication_s),
            "bubble_s": self.bubble_s,
            "host_s": self.host_s,
            "optimizer_s": self.optimizer_s,
        }


@dataclass(frozen=True)
class SimulationResult:
    """What is predicted for one step. Prices and power are None where a chip's figures are not known."""

    program: Program = field(repr=False)
    cluster: Cluster = field(repr=False)
    step: SimulatedStep = field(repr=False)
    memory: tuple[RoleMemory, ...] = field(repr=False)
    elapsed_s: float

    @property
    def num_chips(self) -> int:
        return self.program.num_chips

    @property
    def plan(self) -> str:
        """The plan in words."""
        return str(self.program.facts.get("plan", ""))

    @property
    def step_time_s(self) -> float:
        return self.step.step_ns / NS_PER_S

    @property
    def tokens_per_s(self) -> float:
        return metrics.tokens_per_s(int(self.program.facts["tokens"]), self.step_time_s)

    @property
    def mfu(self) -> float:
        """Against the mean peak of the chips for the job's dtype."""
        dtype = str(self.program.facts.get("dtype", DEFAULT_DTYPE))
        peaks = [chip.peak(dtype) for host in self.cluster.unit for chip in host.chips]
        flops = float(self.program.facts["model_flops"])
        return metrics.mfu(flops, sum(peaks) / len(peaks), self.step_time_s, self.num_chips)

    @property
    def cost_usd_per_step(self) -> float | None:
        hourly = self.cluster.usd_per_hour
        return None if hourly is None else metrics.cost_usd_per_step(hourly, self.step_time_s)

    @property
    def energy_j_per_step(self) -> float | None:
        """Rated power of the chips alone, without their hosts."""
        watts = [chip.tdp_w for host in self.cluster.unit for chip in host.chips]
        known = [value for value in watts if value is not None]
        if len(known) < len(watts):
            return None
        return metrics.energy_j_per_step(sum(known) / len(known), self.num_chips, self.step_time_s)

    @cached_property
    def breakdown(self) -> StepBreakdown:
        """The mean over all chips."""
        return _breakdown(self.step.overall, len(self.step.tallies))

    @cached_property
    def roles(self) -> tuple[StepBreakdown, ...]:
        """One per stage."""
        return tuple(_breakdown(tally, 1) for tally in self.step.tallies)

    @property
    def fits(self) -> bool:
        """Whether every stage's peak is within its chips' memory."""
        return all(role.peak_bytes <= self.chip_of(role).memory_bytes for role in self.memory)

    def chip_of(self, role: RoleMemory) -> Chip:
        """The chip with the least memory in a stage; the unit repeats, so one unit is enough to look at."""
        per_stage = self.num_chips // self.program.size("pp")
        distinct = min(per_stage, self.cluster.chips_per_host * len(self.cluster.unit))
        chips = (self.cluster.chip(role.stage * per_stage + offset) for offset in range(distinct))
        return min(chips, key=lambda chip: chip.memory_bytes)

    def timeline(self, step: int = 0) -> Timeline:
        """The predicted step: every chip of a small mesh, one chip per stage of a large one."""
        return self.step.timeline(step)

    def document(self) -> dict[str, object]:
        """As JSON values: the answer of `simulate --json`."""
        return {
            "step_time_s": self.step_time_s,
            "tokens_per_s": self.tokens_per_s,
            "mfu": self.mfu,
            "peak_memory_bytes": [role.peak_bytes for role in self.memory],
            "fits": self.fits,
            "cost_usd_per_step": self.cost_usd_per_step,
            "energy_j_per_step": self.energy_j_per_step,
            "breakdown": self.breakdown.document(),
            "roles": [role.document() for role in self.roles],
            "num_chips": self.num_chips,
            "plan": self.plan,
            "fidelity": self.step.fidelity,
            "left_out": self.step.left_out,
            "elapsed_s": self.elapsed_s,
        }


def simulate(
    program: Program,
    cluster: Cluster,
    *,
    fidelity: Fidelity | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> SimulationResult:
    """Predict one step of `program` on its number of chips of `cluster`. Raises ClusterError or PlanError.

    Folded unless `fidelity` says full, or the cluster is not in perfect order and has few enough chips for that.
    """
    started = clock()
    used = cluster.take(program.num_chips)
    if chosen_fidelity(used, fidelity) is Fidelity.FULL:
        step = _every_chip(program, used)
    else:
        costs = ClusterCosts(program, used)
        step = simulate_step(program, costs)
        found = ((CONDITIONS, not used.conditions.is_calm), (UNEVEN, costs.sits_unevenly))
        step = replace(step, left_out=(*step.left_out, *(what for what, is_so in found if is_so)))
    memory = peak_memory(program)
    return SimulationResult(program, used, step, memory, clock() - started)


def chosen_fidelity(cluster: Cluster, asked: Fidelity | None) -> Fidelity:
    """How a step over all chips of a cluster is timed."""
    if asked is not None:
        return asked
    few = cluster.num_chips <= EVERY_CHIP
    return Fidelity.FOLDED if cluster.conditions.is_calm or not few else Fidelity.FULL


def _every_chip(program: Program, cluster: Cluster) -> SimulatedStep:
    """Every chip driven and every message moved, on the network in the state that it is in."""
    if program.num_chips > EVERY_CHIP:
        raise ConfigError(
            f"{program.num_chips} chips are too many to drive one by one (up to {EVERY_CHIP})",
            "--fidelity full",
            "take --fidelity folded, or fewer chips",
        )
    # Imported here: with full fidelity comes its event loop.
    from comms.selection.full_collective import background_jobs
    from comms.selection.site import site_of
    from orchestrator.runners.timing.every_chip import simulate_every_chip
    from orchestrator.runners.timing.traffic import ProgramTraffic

    with located(cluster.origin):
        site = site_of(cluster.network, program.num_chips, cluster.conditions)
        others = tuple(background_jobs(site))
        traffic = ProgramTraffic(program, site.network, site.resolved.conditions, site.topology, others)
        costs = ClusterCosts(program, cluster)
        return simulate_every_chip(program, costs, traffic, slow=site.resolved.work_factors)


def require_fit(result: SimulationResult) -> None:
    """Raise FitError for the fullest stage that does not fit: what is largest in it, and what to turn."""
    if result.fits:
        return
    worst = max(result.memory, key=lambda role: role.peak_bytes - result.chip_of(role).memory_bytes)
    chip = result.chip_of(worst)
    largest, nbytes = max(worst.classes, key=lambda pair: pair[1])
    raise FitError(
        f"does not fit: {wording.scaled(worst.peak_bytes, 'B')} needed ({largest}: {wording.scaled(nbytes, 'B')}), "
        f"{chip.name} has {wording.scaled(chip.memory_bytes, 'B')}",
        f"plan {result.plan}, {worst.where}",
        KNOBS.get(largest, DEFAULT_KNOB),
    )


def main(options: SimulateOptions, console: Console) -> int:
    """Prepare a Program as asked, predict it, answer. Raises UserError."""
    return answer(prepare(options, console), options, console)


def answer(prepared: Prepared, options: SimulateOptions, console: Console) -> int:
    """Print the prediction and, with --run-dir, write plan, Program, timeline and trace. Raises FitError."""
    asked = None if options.fidelity is None else Fidelity(options.fidelity)
    if chosen_fidelity(prepared.cluster, asked) is Fidelity.FULL:
        with console.phase(LOADING):
            from comms.selection.full_collective import load_loops  # not needed to fold

            load_loops()
    with console.phase("simulate"):
        result = simulate(prepared.program, prepared.cluster, fidelity=asked)
    for what in (CONDITIONS, UNEVEN):
        if what in result.step.left_out:
            console.warn(f"folded fidelity leaves out {what}; --fidelity full has it")
    console.results(result.document(), tables(result))
    if options.run_dir is not None:
        write_run(run_dir.create(options.run_dir), prepared, result)
        console.say(f"trace for https://ui.perfetto.dev in {options.run_dir}")
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
    run.write_plan(plan_to_yaml(prepared.plan))
    run.write_program(to_text(prepared.program), encode(prepared.program))
    run.write_timeline(timeline)
    write_whole(run.trace, trace_gz(timeline))


def tables(result: SimulationResult) -> tuple[Table, ...]:
    """The prediction to read."""
    head = pairs(
        f"{result.plan} on {result.num_chips} chips of {result.cluster.name}",
        (
            ("step", wording.seconds(result.step_time_s)),
            ("throughput", wording.scaled(result.tokens_per_s, "tok/s")),
            ("MFU", wording.percent(result.mfu)),
            ("cost", f"{wording.dollars(result.cost_usd_per_step)} per step"),
            ("energy", f"{wording.scaled(result.energy_j_per_step, 'J')} per step"),
            ("fidelity", f"{result.step.fidelity}, made in {wording.seconds(result.elapsed_s)}"),
            ("left out", "; ".join(result.step.left_out)),
        ),
    )
    return head, _time_table(result), _memory_table(result)


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
    texts = tuple((name, wording.seconds(value), wording.percent(value / total)) for name, value in rows)
    return Table("where the time goes (mean over chips)", texts, ("part", "time", "share"))


def _memory_table(result: SimulationResult) -> Table:
    rows = []
    for role in result.memory:
        size = result.chip_of(role).memory_bytes
        share = wording.percent(role.peak_bytes / size)
        rows.append((f"stage {role.stage}", wording.scaled(role.peak_bytes, "B"), share))
    return Table("peak memory per chip", tuple(rows), ("stage", "peak", "of the chip"))


def _breakdown(tally: Tally, num_stages: int) -> StepBreakdown:
    unit = NS_PER_S * num_stages
    axes = dict.fromkeys((*AXES, *sorted(tally.exposed_ns)))
    return StepBreakdown(
        compute_s=tally.compute_ns / unit,
        optimizer_s=tally.optimizer_ns / unit,
        host_s=tally.host_ns / unit,
        exposed_communication_s=tuple((axis, tally.exposed_ns.get(axis, 0) / unit) for axis in axes),
        bubble_s=tally.bubble_ns / unit,
    )
