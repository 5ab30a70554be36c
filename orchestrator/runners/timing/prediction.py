"""Prediction: how long one step takes, where the time goes, what it costs and whether it fits, in numbers.

Needs a Program and a cluster, no torch and no chip. Averages over chips: all stages have the same number of
chips, so the breakdown is the mean over stages and sums to the step time; `roles` gives each stage's own.
Peak memory is per chip of a stage. Chips times seconds is the common denominator: a figure per chip divides by all
chips of the job, whatever each of them does.
"""

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property

from comms.errors import ConfigError, located
from comms.selection.question import Fidelity
from kernels.chips import Chip
from orchestrator.config.hardware.cluster import Cluster
from orchestrator.runners.runner import StepRequest
from orchestrator.runners.timing.simulated import SimulatedStep, simulate_step
from orchestrator.runners.timing.step_costs import DEFAULT_DTYPE, NS_PER_S, ClusterCosts
from orchestrator.runners.timing.timed_segments import Tally
from orchestrator.runs.timeline import Timeline
from partitioner.program.peak_memory import RoleMemory, peak_memory
from partitioner.program.program import Program

AXES = ("tp", "dp", "pp", "all")  # always shown, zero or not; others only where a Program has them
EVERY_CHIP = 2048  # up to so many are driven one by one
CONDITIONS = "the conditions of the cluster file"
MIXED = "what chips of a stage do that are of a faster kind than its slowest"
UNEVEN = "how groups of chips sit that fill hosts or tiers unevenly"


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
        """Every token of the global batch (or sample of what has none) counts once, whatever the parallelism."""
        return int(self.program.facts["tokens"]) / self.step_time_s

    @property
    def rate_unit(self) -> str:
        """What `tokens_per_s` counts."""
        facts = self.program.facts
        return "tok/s" if int(facts["tokens"]) > int(facts["samples"]) else "samples/s"

    @property
    def model_flops(self) -> int:
        """What one step of the model needs, forward and backward, over the global batch."""
        return int(self.program.facts["model_flops"])

    @property
    def hardware_flops(self) -> int:
        """With what `torch.utils.checkpoint` computes a second time."""
        return self.model_flops + int(self.program.facts.get("recomputed_flops", 0))

    @property
    def mfu(self) -> float:
        """Model FLOPs utilisation, against the mean peak of the chips for the job's dtype.

        Without recompute and without what tensor parallelism repeats (Chowdhery et al. 2022, PaLM, appendix B).
        """
        dtype = str(self.program.facts.get("dtype", DEFAULT_DTYPE))
        peaks = [chip.peak(dtype) for host in self.cluster.unit for chip in host.chips]
        flops_per_s = sum(peaks) / len(peaks)
        return self.model_flops / (flops_per_s * self.step_time_s * self.num_chips)

    @property
    def cost_usd_per_step(self) -> float | None:
        """At the price of the whole cluster: idle chips are paid for as well."""
        hourly = self.cluster.usd_per_hour
        return None if hourly is None else hourly * self.step_time_s / 3600

    @property
    def energy_j_per_step(self) -> float | None:
        """At the rated power of the chips, without their hosts: a bound, as a chip that waits draws less."""
        watts = [chip.tdp_w for host in self.cluster.unit for chip in host.chips]
        known = [value for value in watts if value is not None]
        if len(known) < len(watts):
            return None
        return sum(known) / len(known) * self.num_chips * self.step_time_s

    @cached_property
    def breakdown(self) -> StepBreakdown:
        """The mean over all chips."""
        return _breakdown(self.step.overall, len(self.step.tallies))

    @cached_property
    def roles(self) -> tuple[StepBreakdown, ...]:
        """One per stage."""
        return tuple(_breakdown(tally, 1) for tally in self.step.tallies)

    @cached_property
    def kinds(self) -> tuple[tuple[str, int, StepBreakdown], ...]:
        """Of each kind of chip its name, how many there are, and their mean, where every chip was driven."""
        if not self.step.every_chip:
            return ()
        tallies, counts = dict[Chip, Tally](), Counter[Chip]()
        for number, tally in enumerate(self.step.of_chips):
            chip = self.cluster.chip(number)
            tallies.setdefault(chip, Tally()).add(tally)
            counts[chip] += 1
        means = ((chip, _breakdown(tally, counts[chip])) for chip, tally in tallies.items())
        return tuple((chip.name, counts[chip], mean) for chip, mean in means)

    @property
    def fits(self) -> bool:
        """Whether every stage's peak is within its chips' memory."""
        return all(role.peak_bytes <= self.chip_of(role).memory_bytes for role in self.memory)

    def chip_of(self, role: RoleMemory) -> Chip:
        """The chip with the least memory in a stage."""
        return smallest_chip(self.program, self.cluster, role.stage)

    def timeline(self, step: int = 0) -> Timeline:
        """The predicted step: every chip of a small mesh, one chip per stage of a large one."""
        return self.step.timeline(step)

    def document(self) -> dict[str, object]:
        """As JSON values: the answer of `simulate --json`."""
        return {
            "step_time_s": self.step_time_s,
            "tokens_per_s": self.tokens_per_s,
            "rate_unit": self.rate_unit,
            "mfu": self.mfu,
            "model_flops": self.model_flops,
            "hardware_flops": self.hardware_flops,
            "peak_memory_bytes": [role.peak_bytes for role in self.memory],
            "activation_bytes": [role.activation_bytes for role in self.memory],
            "fits": self.fits,
            "cost_usd_per_step": self.cost_usd_per_step,
            "energy_j_per_step": self.energy_j_per_step,
            "breakdown": self.breakdown.document(),
            "roles": [role.document() for role in self.roles],
            "kinds": [{"chip": n, "chips": count, **each.document()} for n, count, each in self.kinds],
            "num_chips": self.num_chips,
            "plan": self.plan,
            "fidelity": self.step.fidelity,
            "left_out": self.step.left_out,
            "elapsed_s": self.elapsed_s,
        }


def smallest_chip(program: Program, cluster: Cluster, stage: int) -> Chip:
    """The chip with the least memory in a stage; the unit repeats, so one unit is enough to look at."""
    per_stage = program.num_chips // program.size("pp")
    distinct = min(per_stage, cluster.chips_per_host * len(cluster.unit))
    chips = (cluster.chip(stage * per_stage + offset) for offset in range(distinct))
    return min(chips, key=lambda chip: chip.memory_bytes)


def simulate(
    program: Program,
    cluster: Cluster,
    *,
    fidelity: Fidelity | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> SimulationResult:
    """Predict one step of `program` on its number of chips of `cluster`. Raises ClusterError or PlanError."""
    started = clock()
    runner = SimulatedRunner(program, cluster.take(program.num_chips), fidelity)
    step = runner.run(StepRequest())
    return SimulationResult(program, runner.cluster, step, peak_memory(program), clock() - started)


@dataclass(frozen=True)
class SimulatedRunner:
    """The runner that only tells the time: as many chips as the Program has, no tensors, and so no loss.

    Folded unless `fidelity` says full, or the cluster is not in perfect order, or its chips are of several kinds, and
    there are few enough for that.
    """

    program: Program
    cluster: Cluster
    fidelity: Fidelity | None = None

    def run(self, request: StepRequest) -> SimulatedStep:
        """See `Runner`; of the request only the schedule matters. Raises ClusterError or PlanError."""
        is_full = chosen_fidelity(self.cluster, self.fidelity) is Fidelity.FULL
        return self._every_chip(request.schedule) if is_full else self._folded(request.schedule)

    def close(self) -> None:
        """Nothing to give back."""

    def _folded(self, schedule: str) -> SimulatedStep:
        costs = ClusterCosts(self.program, self.cluster)
        step = simulate_step(self.program, costs, schedule=schedule)
        found = (
            (CONDITIONS, not self.cluster.conditions.is_healthy),
            (UNEVEN, costs.sits_unevenly),
            (MIXED, self.cluster.is_mixed),
        )
        return replace(step, left_out=(*step.left_out, *(what for what, is_so in found if is_so)))

    def _every_chip(self, schedule: str) -> SimulatedStep:
        """Every chip driven and every message moved, on the network in the state that it is in."""
        program, cluster = self.program, self.cluster
        if program.num_chips > EVERY_CHIP:
            raise ConfigError(
                f"{program.num_chips} chips are too many to drive one by one (up to {EVERY_CHIP})",
                "--fidelity full",
                "take --fidelity folded, or fewer chips",
            )
        # Imported here: with full fidelity comes its event loop.
        from comms.selection.full_collective import background_jobs
        from comms.selection.site import site_of
        from orchestrator.runners.timing.every_chip import ProgramTraffic, simulate_every_chip

        with located(cluster.origin):
            site = site_of(cluster.network, program.num_chips, cluster.conditions)
            others, slow = tuple(background_jobs(site)), site.resolved.work_factors
            traffic = ProgramTraffic(program, site.network, site.resolved.conditions, site.topology, others)
            costs = ClusterCosts(program, cluster)
            by_type = {chip: ClusterCosts(program, cluster, chip) for chip in cluster.chip_types}
            own = [by_type[cluster.chip(i)] for i in range(program.num_chips)] if cluster.is_mixed else None
            return simulate_every_chip(program, costs, traffic, schedule=schedule, slow=slow, own_costs=own)


def chosen_fidelity(cluster: Cluster, asked: Fidelity | None) -> Fidelity:
    """How a step over all chips of a cluster is timed."""
    if asked is not None:
        return asked
    is_plain = cluster.conditions.is_healthy and not cluster.is_mixed
    return Fidelity.FOLDED if is_plain or cluster.num_chips > EVERY_CHIP else Fidelity.FULL


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
