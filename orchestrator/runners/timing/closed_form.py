"""Closed form: how long a step of any plan takes and what its fullest stage holds, from the prices of units.

The same instructions and the same costs as the folded simulation, added up instead of driven: a stage takes the sum of
its units (`unit_table`, each priced once), a pipeline what `pipeline_time` says, gradients are reduced in the buckets
and the order that lowering gives them. It ranks plans, thousands in the time of one simulation;
what it finds best is simulated before anybody believes it (`fastest_plan`).

Approximated: prices of collectives between powers of two of bytes, the peak of memory inside of a stage (the largest of
any unit), gathering of parameters for optimizers that need them whole, and communication of normalisation over the
whole batch.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from math import ceil

from comms.collectives.schedule import Op
from comms.networks.groups import Members, mesh_group
from comms.selection.choice import choose
from kernels.chips import Chip
from kernels.roofline import memory_seconds
from orchestrator.config.hardware.cluster import Cluster
from orchestrator.runners.timing import pipeline_time
from orchestrator.runners.timing.pipeline_time import StageTimes
from orchestrator.runners.timing.step_costs import NS_PER_S, ClusterCosts
from orchestrator.runners.timing.timed_segments import NOTHING, time_segment
from partitioner.layout.parallel_plan import Plan, balance
from partitioner.layout.pipeline_schedules import PipelineSchedule
from partitioner.lowering.buckets import buckets
from partitioner.program.peak_memory import PERSISTENT, peak_memory
from partitioner.program.program import DTYPE_BYTES, Compute, Role, TensorKind
from partitioner.program.unit_table import UnitParam, UnitTable

LOW_PRECISION = ("bf16", "f16")
STATS_BYTES = 24  # the one all-reduce over all chips: three float64
SCALAR_STEPS = 12  # kernels of the step's statistics besides two for each group of parameters
Tables = Callable[[int, int], UnitTable]  # from tp and samples; raises PartitionError


@dataclass(frozen=True, slots=True)
class Estimate:
    """A step of a plan: `peak_bytes` on the chips of the stage that needs most of what it has."""

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


@dataclass(frozen=True, slots=True)
class FlatBytes:
    """A group of parameters in one buffer, in bytes on one chip."""

    numel: int
    dtype: str
    tied: tuple[int, ...]
    ready: int  # units of the stage whose backward comes before its own is complete
    is_frozen: bool

    @property
    def wide(self) -> int:
        """Bytes of each entry of a gradient."""
        return 4 if self.dtype in LOW_PRECISION else DTYPE_BYTES[self.dtype]


@dataclass(frozen=True)
class StageUnits:
    """A stage: its units by role, and its groups of parameters."""

    roles: tuple[int, ...]
    groups: tuple[FlatBytes, ...]


class ClosedForm:
    """Estimates for the plans of one job on one cluster: what plans share is worked out once."""

    def __init__(self, tables: Tables, cluster: Cluster, global_batch: int) -> None:
        self.tables, self.cluster, self.global_batch = tables, cluster, global_batch
        self._prices: dict[tuple[int, int], tuple[UnitPrice, ...]] = {}
        self._stages: dict[tuple[int, int, int, int], tuple[StageUnits, ...]] = {}
        self._ends: dict[object, tuple[float, float, float]] = {}
        self._collectives: dict[tuple[str, Members, int], float] = {}

    def __call__(self, plan: Plan) -> Estimate:
        """A step of a plan. Raises PartitionError for what cannot be split so."""
        samples = self.global_batch // (plan.dp * plan.microbatches)
        table = self.tables(plan.tp, samples)
        step = _Step(self, plan, table, self.prices(plan.tp, samples), self.stages(plan, samples))
        return Estimate(step.seconds, *step.memory)

    @cached_property
    def slowest(self) -> Chip:
        """The chip type that a stage waits for."""
        return min(self.cluster.chip_types, key=lambda chip: chip.memory_bytes_per_s)

    @cached_property
    def least_memory(self) -> int:
        """Bytes of the chip type that has the least."""
        return min(chip.memory_bytes for chip in self.cluster.chip_types)

    def prices(self, tp: int, samples: int) -> tuple[UnitPrice, ...]:
        """By distinct unit."""
        if (tp, samples) not in self._prices:
            table = self.tables(tp, samples)
            program = replace(
                table.program, axes=(("pp", 1), ("dp", self.cluster.num_chips // tp), ("tp", tp))
            )
            costs = ClusterCosts(program, self.cluster)
            memory = peak_memory(program)
            made = (_price(table, role, costs, memory[role.stage].peak_bytes, memory[role.stage].activation_bytes)
                    for role in program.roles)  # fmt: skip
            self._prices[tp, samples] = tuple(made)
        return self._prices[tp, samples]

    def stages(self, plan: Plan, samples: int) -> tuple[StageUnits, ...]:
        """The stages of a plan."""
        table = self.tables(plan.tp, samples)
        shards = plan.dp if plan.zero else 1
        most = shards if table.whole else 0
        key = (plan.tp, plan.pp, samples, most)
        if key not in self._stages:
            sizes = plan.stages or balance(table.weights, plan.pp)
            self._stages[key] = _stages(table, sizes, plan.bucket_bytes, most or None)
        return self._stages[key]

    def collective_s(self, op: Op, nbytes: int, members: Members) -> float:
        """Seconds of the fastest algorithm, between those for the powers of two beside `nbytes`."""
        low = max(nbytes, 1).bit_length() - 1
        share = nbytes / (1 << low) - 1.0
        first = self._collective_s(op, low, members)
        return first + share * (self._collective_s(op, low + 1, members) - first) if share > 0 else first

    def _collective_s(self, op: Op, power: int, members: Members) -> float:
        key = (str(op), members, power)
        if key not in self._collectives:
            self._collectives[key] = choose(op, 1 << power, members, self.cluster.network).seconds
        return self._collectives[key]

    def end_of_step(
        self, stage: StageUnits, plan: Plan, backwards: tuple[float, ...]
    ) -> tuple[float, float, float]:
        """Seconds from the last backward to reduced gradients, of their norms, and from there to the end."""
        found = (backwards, stage, plan.dp, plan.tp, plan.pp, plan.zero)
        if found not in self._ends:
            self._ends[found] = self._end_of_step(stage, plan, backwards)
        return self._ends[found]

    def _end_of_step(
        self, stage: StageUnits, plan: Plan, backwards: tuple[float, ...]
    ) -> tuple[float, float, float]:
        op = Op("reduce_scatter") if plan.zero else Op("all_reduce")
        along = mesh_group(plan.axes, ("dp",))
        ends = [*accumulate(reversed(backwards))][::-1]  # by unit, since the backward began
        start = now = ends[0]
        lane = 0.0
        for group in sorted(stage.groups, key=lambda g: (bool(g.tied), -g.ready)):
            nbytes = group.numel * group.wide
            begin = max(lane, ends[group.ready])
            if group.tied:
                pair = mesh_group((("pp", 2), *plan.axes[1:]), ("pp",))
                now += self.collective_s(Op("all_reduce"), nbytes, pair)
                begin = max(lane, now)
            lane = begin + (
                self.collective_s(op, nbytes, along) if plan.dp > 1 and not group.is_frozen else 0.0
            )
        chip, shards = self.slowest, plan.dp if plan.zero else 1
        norms = sum(
            max(memory_seconds(ceil(g.numel / shards) * g.wide, chip), chip.launch_s) + 2 * chip.launch_s
            for g in stage.groups
        )
        after = sum(
            max(memory_seconds(self._update_bytes(g, shards), chip), chip.launch_s) for g in stage.groups
        )
        if shards > 1:
            after += sum(
                self.collective_s(Op("all_gather"), g.numel * DTYPE_BYTES[g.dtype], along)
                for g in stage.groups
            )
        return max(lane, now) - start, norms, after

    def _update_bytes(self, group: FlatBytes, shards: int) -> float:
        """As `ClusterCosts` has it: what is stepped on and its states read and written, the gradient read."""
        states, masters = self._optimizer
        own = group.wide if masters else DTYPE_BYTES[group.dtype]
        copied = DTYPE_BYTES[group.dtype] if masters and own != DTYPE_BYTES[group.dtype] else 0
        return ceil(group.numel / shards) * (2 * own * (1 + states) + group.wide + copied)

    @cached_property
    def _optimizer(self) -> tuple[int, bool]:
        tp, samples = next(iter(self._prices))
        table = self.tables(tp, samples)
        return table.states, table.masters

    def state_bytes(self, group: FlatBytes, shards: int) -> int:
        """What a group's parameters, gradients and optimizer states take on a chip."""
        states, masters = self._optimizer
        narrow, shard = DTYPE_BYTES[group.dtype], ceil(group.numel / shards)
        if group.is_frozen:
            return group.numel * narrow
        own = group.wide if masters else narrow
        scattered = shard * group.wide if shards > 1 else 0
        master = shard * own if own != narrow else 0
        return group.numel * (narrow + group.wide) + scattered + master + shard * own * states


class _Step:
    """One plan's step, added up."""

    def __init__(
        self, form: ClosedForm, plan: Plan, table: UnitTable, prices: Sequence[UnitPrice], stages: Sequence[StageUnits]
    ) -> None:  # fmt: skip
        self.form, self.plan, self.table, self.prices, self.stages = form, plan, table, prices, stages
        self.schedule = PipelineSchedule.GPIPE if table.has_tail else plan.schedule
        self.forwards = [sum(prices[r].forward_s for r in s.roles) - self._repeated(s) for s in stages]
        self.backwards = [sum(prices[r].backward_s for r in s.roles) for s in stages]

    def _repeated(self, stage: StageUnits) -> float:
        once = [self.prices[role].inputs_s for role in stage.roles]
        return sum(once) - max(once)

    @cached_property
    def times(self) -> list[StageTimes]:
        """A microbatch in each stage and between them."""
        plan, form = self.plan, self.form
        costs = ClusterCosts(replace(self.table.program, axes=plan.axes), form.cluster)
        per_stage, known = plan.dp * plan.tp, dict[str, tuple[int, int]]()
        sends, returns = [0.0] * len(self.stages), [0.0] * len(self.stages)
        for stage, (one, other) in enumerate(zip(self.stages, self.stages[1:], strict=False)):
            tier = form.cluster.network.tier_for((stage * per_stage, (stage + 1) * per_stage))
            pair = known.setdefault(tier.name, (stage, stage + 1))
            sends[stage] = costs.message_s(*pair, self.prices[one.roles[-1]].sent)
            returns[stage + 1] = costs.message_s(*pair, self.prices[other.roles[0]].returned)
        rows = zip(self.forwards, self.backwards, sends, returns, strict=True)
        return [StageTimes(*row) for row in rows]

    @property
    def seconds(self) -> float:
        """The whole step."""
        return self._with_end(pipeline_time.ends_of_stages(self.times, self.plan.microbatches, self.schedule))

    def _with_end(self, ends: Sequence[float]) -> float:
        """What follows when each stage is through its backwards."""
        reduced, tail = 0.0, 0.0
        for stage, end in zip(self.stages, ends, strict=True):
            own = tuple(self.prices[role].backward_s for role in stage.roles)
            waits, norms, after = self.form.end_of_step(stage, self.plan, own)
            reduced, tail = max(reduced, end + waits + norms), max(tail, after)
        everyone = mesh_group(self.plan.axes, ("pp", "dp", "tp"))
        stats = self.form.collective_s(Op("all_reduce"), STATS_BYTES, everyone)
        return reduced + stats + SCALAR_STEPS * self.form.slowest.launch_s + tail

    @property
    def memory(self) -> tuple[int, bool]:
        """The most that a stage needs, and whether each has that."""
        plan, shards = self.plan, self.plan.dp if self.plan.zero else 1
        most, is_gpipe = 0, self.schedule is PipelineSchedule.GPIPE
        for number, stage in enumerate(self.stages):
            prices = [self.prices[role] for role in stage.roles]
            under_way = plan.microbatches if is_gpipe else min(plan.microbatches, plan.pp - number)
            held = sum(self.form.state_bytes(group, shards) for group in stage.groups)
            held += under_way * sum(price.kept for price in prices) + max(price.constants for price in prices)
            most = max(most, held + max(price.extra for price in prices))
        return most, most <= self.form.least_memory


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
    held = sum(t.spec.nbytes for t in lasting if t.kind in PERSISTENT)
    sent, back = (sum(t.spec.nbytes for t in table.sent(role.stage, f"send_{way}")) for way in seconds)
    kept = max(kept - sent, 0)  # what goes on is kept as the next unit's
    extra = max(peak - held - kept, 0)
    return UnitPrice(seconds["forward"], seconds["backward"], inputs, kept, extra, constants, sent, back)


def _stages(
    table: UnitTable, sizes: Sequence[int], bucket_bytes: int, most: int | None
) -> tuple[StageUnits, ...]:
    """The units of each stage and the groups of their parameters, as lowering makes them; equal ones made once."""
    bounds = [0, *accumulate(sizes)]
    of_stage: list[dict[str, UnitParam]] = []
    homes: dict[str, list[int]] = {}
    for stage, size in enumerate(sizes):
        held: dict[str, UnitParam] = {}
        for place, unit in enumerate(range(bounds[stage], bounds[stage] + size)):
            for param in table.params[unit]:
                held.setdefault(param.name, replace(param, unit=place))
        for name in held:
            homes.setdefault(name, []).append(stage)
        of_stage.append(held)
    made: dict[object, StageUnits] = {}
    stages = []
    for stage, size in enumerate(sizes):
        roles = table.role_of[bounds[stage] : bounds[stage] + size]
        shared = {name: tuple(homes[name]) for name in of_stage[stage] if len(homes[name]) > 1}
        key = (roles, tuple(shared.items()))
        if key not in made:
            params = [replace(p, tied=shared.get(p.name, ())) for p in of_stage[stage].values()]
            groups = tuple(_flat(members, bool(most)) for members in buckets(params, bucket_bytes, most))
            made[key] = StageUnits(roles, groups)
        stages.append(made[key])
    return tuple(stages)


def _flat(members: Sequence[UnitParam], is_whole: bool) -> FlatBytes:
    first, numels = members[0], [p.spec.numel for p in members]
    numel = max(numels) * len(numels) if is_whole else sum(numels)
    return FlatBytes(numel, first.spec.dtype, first.tied, min(p.unit for p in members), first.is_frozen)
