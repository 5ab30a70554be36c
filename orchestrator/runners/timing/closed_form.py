"""Closed form: how long a step of any plan takes and what its fullest stage holds, from the prices of units.

The same instructions and the same costs as the folded simulation, added up instead of driven: a stage takes the sum of
its units (`unit_table`, each priced once), a pipeline what `pipeline_time` says, gradients are reduced in the buckets
and the order that lowering gives them. It ranks plans, many in the time of one simulation; what it finds best is
simulated before anybody believes it (`fastest_plan`). Memory comes first: what does not fit has no time.

Approximated: prices of collectives between powers of two of bytes, the peak of memory inside of a stage (the largest of
any unit), gathering of parameters for optimizers that need them whole, and communication of normalisation over the
whole batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate
from math import ceil, inf

from comms.collectives.schedule import Op
from comms.networks.groups import Members, mesh_group
from comms.networks.links import Link
from comms.selection.choice import choose
from kernels.chips import Chip
from kernels.roofline import memory_seconds
from orchestrator.config.hardware.cluster import Cluster
from orchestrator.runners.timing.pipeline_time import StageTimes, ends_of_stages
from orchestrator.runners.timing.stage_units import KeptStates, StageBook, StageUnits, Tables
from orchestrator.runners.timing.step_costs import NS_PER_S, ClusterCosts
from orchestrator.runners.timing.timed_segments import NOTHING, time_segment
from partitioner.layout.parallel_plan import Plan
from partitioner.layout.pipeline_schedules import PipelineSchedule
from partitioner.program.peak_memory import peak_memory
from partitioner.program.program import Compute, Program, Role, TensorKind
from partitioner.program.unit_table import UnitTable

STATS_BYTES = 24  # the one all-reduce over all chips: three float64
SCALAR_STEPS = 7  # kernels of the statistics besides two for each group: see `flat_buffers.emit_stats`


@dataclass(frozen=True, slots=True)
class Estimate:
    """A step of a plan, infinitely long where it does not fit; `peak_bytes` on the chips of its fullest stage."""

    seconds: float
    peak_bytes: int
    fits: bool


@dataclass(frozen=True, slots=True)
class UnitPrice:
    """A unit alone: seconds of one microbatch's forward and backward, bytes kept between them and needed besides."""

    forward_s: float
    backward_s: float
    inputs_s: float  # of `forward_s`, what a stage does once however many units it has
    kept: int
    extra: int
    constants: int
    sent: int  # to the next unit
    returned: int  # to the one before


@dataclass
class ClusterPrices:
    """What a cluster asks for collectives and messages, each asked for once."""

    cluster: Cluster
    _collectives: dict[tuple[str, Members, int], float] = field(default_factory=dict)
    _ways: dict[tuple[int, str], tuple[Link, float]] = field(default_factory=dict)

    @cached_property
    def slowest(self) -> Chip:
        """The chip type that others wait for when they step on parameters."""
        return min(self.cluster.chip_types, key=lambda chip: chip.memory_bytes_per_s)

    @cached_property
    def least_memory(self) -> int:
        """Bytes of the chip type that has the least."""
        return min(chip.memory_bytes for chip in self.cluster.chip_types)

    def collective_s(self, op: Op, nbytes: int, members: Members) -> float:
        """Seconds of the fastest algorithm, between those for the powers of two beside `nbytes`."""
        low = max(nbytes, 1).bit_length() - 1
        share = nbytes / (1 << low) - 1.0
        first = self._power_s(op, low, members)
        return first + share * (self._power_s(op, low + 1, members) - first) if share > 0 else first

    def _power_s(self, op: Op, power: int, members: Members) -> float:
        key = (str(op), members, power)
        if key not in self._collectives:
            self._collectives[key] = choose(op, 1 << power, members, self.cluster.network).seconds
        return self._collectives[key]

    def message_s(self, program: Program, per_stage: int, stage: int, nbytes: int) -> float:
        """Seconds from a stage of so many chips to the next, as between the first two that are joined by that tier."""
        tier = self.cluster.network.tier_for((stage * per_stage, (stage + 1) * per_stage))
        key = (per_stage, tier.name)
        if key not in self._ways:
            self._ways[key] = ClusterCosts(program, self.cluster).way(stage, stage + 1)
        link, issue_s = self._ways[key]
        return issue_s + link.seconds(nbytes)


class ClosedForm:
    """Estimates for the plans of one job on one cluster; books and prices may be those of other jobs and batches.

    Of a plan that cannot be faster than one that was estimated before, it is known only that it is slower.
    """

    def __init__(self, book: StageBook, prices: ClusterPrices, global_batch: int) -> None:
        self.book, self.cluster, self.global_batch = book, prices, global_batch
        self._units: dict[tuple[int, int], tuple[UnitPrice, ...]] = {}
        self._ends: dict[object, tuple[float, float, float]] = {}
        self._held: dict[tuple[StageUnits, int], int] = {}
        self._drained: dict[object, list[float]] = {}
        self._fastest = inf

    def __call__(self, plan: Plan) -> Estimate:
        """A step of a plan. Raises PartitionError for what cannot be split so."""
        step, kept = self._step(plan)
        peak = step.peak_bytes(kept)
        if peak > self.cluster.least_memory:
            return Estimate(inf, peak, fits=False)
        if (least := step.at_least) >= self._fastest:
            return Estimate(least, peak, fits=True)
        self._fastest = min(self._fastest, seconds := step.seconds(kept))
        return Estimate(seconds, peak, fits=True)

    def seconds(self, plan: Plan) -> float:
        """A step of a plan, whether it fits or not."""
        step, kept = self._step(plan)
        return step.seconds(kept)

    def _step(self, plan: Plan) -> "tuple[_PlanStep, KeptStates]":
        samples = self.global_batch // (plan.dp * plan.microbatches)
        table = self.book.tables(plan.tp, samples)
        step = _PlanStep(self, plan, table, self.units(plan.tp, samples), self.book.stages(plan, samples))
        return step, self.book.kept(plan, samples)

    def units(self, tp: int, samples: int) -> tuple[UnitPrice, ...]:
        """Prices by distinct unit."""
        if (tp, samples) not in self._units:
            table, cluster = self.book.tables(tp, samples), self.cluster.cluster
            axes = (("pp", 1), ("dp", max(cluster.num_chips // tp, 1)), ("tp", tp))
            program = replace(table.program, axes=axes)
            costs, memory = ClusterCosts(program, cluster), peak_memory(program)
            made = (_price(table, role, costs, memory[role.stage].peak_bytes, memory[role.stage].activation_bytes)
                    for role in program.roles)  # fmt: skip
            self._units[tp, samples] = tuple(made)
        return self._units[tp, samples]

    def held_bytes(self, stage: StageUnits, shards: int, kept: KeptStates) -> int:
        """Parameters, gradients and states of a stage."""
        if (stage, shards) not in self._held:
            self._held[stage, shards] = sum(group.held_bytes(shards, kept) for group in stage.groups)
        return self._held[stage, shards]

    def drained(
        self, times: tuple[StageTimes, ...], microbatches: int, schedule: PipelineSchedule
    ) -> list[float]:
        """When each stage is through its backwards; plans that differ in ZeRO alone share it."""
        key = (times, microbatches, schedule)
        if key not in self._drained:
            self._drained[key] = ends_of_stages(times, microbatches, schedule)
        return self._drained[key]

    def end_of_step(
        self, stage: StageUnits, plan: Plan, backwards: tuple[float, ...], kept: KeptStates
    ) -> tuple[float, float, float]:
        """Seconds from the last backward to reduced gradients, of their norms, and from there to the end."""
        key = (stage, backwards, plan.dp, plan.tp, plan.pp, plan.zero)
        if key not in self._ends:
            shards = plan.dp if plan.zero else 1
            waits = self._reduction_s(stage, plan, backwards)
            self._ends[key] = (waits, *self._update_s(stage, plan, shards, kept))
        return self._ends[key]

    def _reduction_s(self, stage: StageUnits, plan: Plan, backwards: tuple[float, ...]) -> float:
        """How long a stage waits for its gradients after its last backward, in which reduction starts."""
        price, along = self.cluster.collective_s, mesh_group(plan.axes, ("dp",))
        op = Op("reduce_scatter") if plan.zero else Op("all_reduce")
        ends = [*accumulate(reversed(backwards))][::-1]  # by unit, since that backward began
        start = now = ends[0]
        lane = 0.0
        for group in sorted(stage.groups, key=lambda g: (bool(g.tied), -g.ready)):
            if group.is_frozen:
                continue
            nbytes, begin = group.numel * group.wide, max(lane, ends[group.ready])
            if group.tied:  # once all that began in the backward has
                pair = tuple(
                    shared * plan.dp * plan.tp for shared in group.tied
                )  # listed, as `ClusterCosts` has it
                now += price(Op("all_reduce"), nbytes, pair)
                begin = max(lane, now)
            lane = begin + price(op, nbytes, along) if plan.dp > 1 else lane
        return max(lane, now) - start

    def _update_s(self, stage: StageUnits, plan: Plan, shards: int, kept: KeptStates) -> tuple[float, float]:
        """The gradients' norms, and what follows the one all-reduce of statistics."""
        chip = self.cluster.slowest
        norms = after = 0.0
        for group in stage.groups:
            if group.is_frozen:
                continue
            norm = memory_seconds(ceil(group.numel / shards) * group.wide, chip)
            norms += max(norm, chip.launch_s) + 2 * chip.launch_s
            after += max(memory_seconds(group.update_bytes(shards, kept), chip), chip.launch_s)
            if shards > 1:
                along = mesh_group(plan.axes, ("dp",))
                after += self.cluster.collective_s(Op("all_gather"), group.numel * group.narrow, along)
        return norms, after


class _PlanStep:
    """One plan's step, added up."""

    def __init__(
        self, form: ClosedForm, plan: Plan, table: UnitTable, units: Sequence[UnitPrice], stages: Sequence[StageUnits]
    ) -> None:  # fmt: skip
        self.form, self.plan, self.table, self.units, self.stages = form, plan, table, units, stages
        self.schedule = PipelineSchedule.GPIPE if table.has_tail else plan.schedule

    def peak_bytes(self, kept: KeptStates) -> int:
        """The most that a stage needs."""
        plan, shards = self.plan, self.plan.dp if self.plan.zero else 1
        is_gpipe, most = self.schedule is PipelineSchedule.GPIPE, 0
        for number, stage in enumerate(self.stages):
            units = [self.units[role] for role in stage.roles]
            under_way = plan.microbatches if is_gpipe else min(plan.microbatches, plan.pp - number)
            held = self.form.held_bytes(stage, shards, kept)
            held += under_way * sum(unit.kept for unit in units) + max(unit.constants for unit in units)
            most = max(most, held + max(unit.extra for unit in units))
        return most

    @property
    def at_least(self) -> float:
        """What the slowest stage works, if it never waits."""
        slowest = max(times.forward_s + times.backward_s for times in self._times)
        return self.plan.microbatches * slowest

    def seconds(self, kept: KeptStates) -> float:
        """The whole step."""
        form, plan = self.form, self.plan
        reduced, tail = 0.0, 0.0
        ends = form.drained(self._times, plan.microbatches, self.schedule)
        for stage, end in zip(self.stages, ends, strict=True):
            own = tuple(self.units[role].backward_s for role in stage.roles)
            waits, norms, after = form.end_of_step(stage, plan, own, kept)
            reduced, tail = max(reduced, end + waits + norms), max(tail, after)
        everyone = mesh_group(plan.axes, ("pp", "dp", "tp"))
        stats = form.cluster.collective_s(Op("all_reduce"), STATS_BYTES, everyone)
        return reduced + stats + SCALAR_STEPS * form.cluster.slowest.launch_s + tail

    @cached_property
    def _times(self) -> tuple[StageTimes, ...]:
        """A microbatch in each stage and between them."""
        last, rows = len(self.stages) - 1, []
        program, per_stage = replace(self.table.program, axes=self.plan.axes), self.plan.dp * self.plan.tp

        def moved(stage: int, nbytes: int) -> float:
            return self.form.cluster.message_s(program, per_stage, stage, nbytes)

        for number, stage in enumerate(self.stages):
            units = [self.units[role] for role in stage.roles]
            once = [unit.inputs_s for unit in units]
            forward = sum(unit.forward_s for unit in units) - sum(once) + max(once)
            sends = moved(number, units[-1].sent) if number < last else 0.0
            returns = moved(number - 1, units[0].returned) if number > 0 else 0.0
            rows.append(StageTimes(forward, sum(unit.backward_s for unit in units), sends, returns))
        return tuple(rows)


def closed_form(tables: Tables, cluster: Cluster, global_batch: int) -> ClosedForm:
    """For one job by itself."""
    return ClosedForm(StageBook(tables), ClusterPrices(cluster), global_batch)


def _price(table: UnitTable, role: Role, costs: ClusterCosts, peak: int, kept: int) -> UnitPrice:
    seconds, inputs = {}, 0.0
    for name in ("forward", "backward"):
        timed = time_segment(role.body[name].instructions, 0, NOTHING, role, costs)
        seconds[name] = timed.duration_ns / NS_PER_S
    for ins in role.body["forward"].instructions:
        if isinstance(ins, Compute) and table.program.segments[ins.segment].name == "forward":
            inputs += costs.work(role, ins).duration_ns / NS_PER_S
    lasting = [t for t in role.tensors if t.base is None and not t.is_per_microbatch]
    constants = sum(t.spec.nbytes for t in lasting if t.kind in (TensorKind.CONSTANT, TensorKind.BUFFER))
    sent, back = (sum(t.spec.nbytes for t in table.sent(role.stage, f"send_{way}")) for way in seconds)
    kept = max(kept - sent, 0)  # what goes on is kept as the next unit's
    extra = max(peak - sum(t.spec.nbytes for t in lasting) - kept, 0)
    return UnitPrice(seconds["forward"], seconds["backward"], inputs, kept, extra, constants, sent, back)
