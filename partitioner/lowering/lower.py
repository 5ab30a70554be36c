"""Lowering: (captured graph, plan) to a Program, one role per pipeline stage.

Tensor parallelism is inside the traced units already. Here the stages are cut, activations and their gradients get
their sends and receives, gradients their reduction over dp, the optimizer its (sharded) step, and every tensor its
lifetime. `Program.meta` gets the step's facts: `samples`, `tokens`, `model_flops` (forward + backward, no recompute),
`recomputed_flops` (what checkpoints compute a second time), `params`, `nominal_count`, `dtype`, `plan`, `model`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TypeAlias

from torch import nn

from comms.errors import CaptureError, PartitionError, located
from comms.selection.progress import Progress, quiet
from partitioner.capture.batch_inputs import Batch, tensors_of
from partitioner.capture.captured_graph import SHORT, Graph, Unit
from partitioner.capture.forwards.checkpoints import regions_of
from partitioner.capture.forwards.step_loss import LossFunction
from partitioner.capture.graph_units import capture_graph, noting_lines
from partitioner.capture.training_flops import forward_flops
from partitioner.layout.joint_trace import lines_of, trace_joint
from partitioner.layout.parallel_plan import BatchNorms, Plan, balance
from partitioner.layout.param_cuts import Cuts, param_cuts
from partitioner.layout.pipeline_schedules import PipelineSchedule, Task
from partitioner.lowering.buckets import Param
from partitioner.lowering.cut_share import CutShare, cut_share
from partitioner.lowering.flat_buffers import (
    FlatGroup,
    Kept,
    emit_stats,
    emit_update,
    make_groups,
    reduce_gradients,
)
from partitioner.lowering.pieces import TracedUnit, line_of_reader, split_joint
from partitioner.lowering.role_builder import RoleBuilder, SegmentPool
from partitioner.lowering.stage import Losses, emit_stage
from partitioner.lowering.stage_context import Cut, StageContext, cut_of
from partitioner.lowering.whole_batch import turns_in
from partitioner.program.instructions import named
from partitioner.program.program import Call, Free, Program, Role
from partitioner.program.static_check import require_valid

MATRIX = 2  # dims of a parameter that gets weight decay
STEP_DTYPES = {"f64": "fp64", "bf16": "bf16"}  # all others are taken for fp32
Groups: TypeAlias = Mapping[str, tuple[int, object]]
CALLED_ONCE = 0  # microbatch number of bodies that run once per step


@dataclass(frozen=True, slots=True)
class StepShape:
    """What one step processes: `samples` per step over all replicas, `tokens` per sample (1 if no sequence).

    `groups`: of each parameter, its group of optimizer settings and what it must share with those that it is stepped on
    together with; None = matrices in group 0, all others (biases and norms, which do not decay since GPT-2) in group 1.
    `whole_tensors`: the optimizer steps on one parameter at a time. `has_masters`: low-precision parameters have
    float32 copies for it, with states as wide; else it steps on them as they are, as torch does.
    """

    samples: int
    tokens: int
    model: str
    dtype: str
    optimizer_states: int
    groups: Mapping[str, tuple[int, object]] | None = None
    whole_tensors: bool = False
    has_masters: bool = True


def step_shape(module: nn.Module, batch: Batch, optimizer_states: int) -> StepShape:
    """What a step on `batch` (all its samples) processes; sequences are entries of whole numbers, [samples, tokens]."""
    tensors = tensors_of(batch).values()
    tokens = (v.shape[1] for v in tensors if v.dim() == 2 and not v.is_floating_point())
    dtypes = (SHORT[p.dtype] for p in module.parameters())
    samples = next((v.shape[0] for v in tensors if v.dim()), 1)
    return StepShape(
        samples, max(tokens, default=1), type(module).__name__, STEP_DTYPES.get(next(dtypes, ""), "fp32"),
        optimizer_states,
    )  # fmt: skip


def partition(
    module: nn.Module,
    batch: Batch,
    plan: Plan,
    *,
    loss_fn: LossFunction | None = None,
    optimizer_states: int = 2,
) -> Program:
    """The checked Program that trains `module` by `plan`. Raises PartitionError or CaptureError.

    `batch` holds the samples of a whole step, of all replicas and microbatches; only its shapes are used.
    `module(**batch)` returns the loss, or `loss_fn(output, **batch)` does. `optimizer_states`: tensors that the
    optimizer keeps for each parameter (2: AdamW).
    """

    def capture(microbatches: int) -> Graph:
        return capture_graph(
            module, batch, dp=plan.dp, microbatches=microbatches, loss_fn=loss_fn, min_units=plan.pp,
            norms_per_part=plan.batch_norm is BatchNorms.PER_PART,
        )  # fmt: skip

    return capture_and_lower(capture, plan, step_shape(module, batch, optimizer_states))


def capture_and_lower(
    capture: Callable[[int], Graph], plan: Plan, shape: StepShape, progress: Progress = quiet
) -> Program:
    """The Program of the model that `capture` gives for a number of microbatches: one, where the plan's cannot be.

    That trains the same, in more memory; `Program.facts["merged"]` says why. Raises PartitionError or CaptureError.
    """

    def made(plan: Plan) -> Program:
        parts = (
            f"{plan.dp} x {plan.microbatches} parts" if plan.dp * plan.microbatches > 1 else "the whole batch"
        )
        with located(shape.model, "simplify the model"), progress(f"capture for {parts}"):
            graph = capture(plan.microbatches)
        with located("plan", "see the plan"), progress("partition"):
            try:
                return lower(graph, plan, shape)
            except PartitionError as error:
                if error.where:
                    raise
            with noting_lines():  # which tell where it is
                return lower(capture(plan.microbatches), plan, shape)

    try:
        return made(plan)
    except CaptureError as refusal:
        if (
            plan.microbatches == 1 or plan.batch_norm is BatchNorms.PER_PART
        ):  # whose parts are what is trained
            raise
        program = made(replace(plan, microbatches=1))
        why = f"{refusal.problem} ({refusal.where})"
        other = "; or plan.batch_norm=per_part" * ("per_part" in refusal.hint)
        merged = ("merged", f"{plan.microbatches} microbatches run as one, in more memory: {why}{other}")
        return replace(program, meta=(*program.meta, merged))


def lower(graph: Graph, plan: Plan, shape: StepShape, *, check: bool = True) -> Program:
    """The Program of one training step (and of evaluation). Raises PartitionError.

    `check`: prove it free of errors, which what only the clock sees does not need.
    """
    context, share = staged(graph, plan, shape)
    pool, roles = _roles(context, shape)
    if context.abroad:  # now it is known who reads what others change
        pool, roles = _roles(context, shape)
    templates, parts = [graph.templates[u.template] for u in graph.units], plan.microbatches * plan.dp
    flops = sum(t.model_flops for t in templates) + forward_flops(graph.inputs.graph)
    sizes = [context.stage_of.count(stage) for stage in range(plan.pp)]
    meta: dict[str, str | int | float] = {
        "model": shape.model, "dtype": shape.dtype, "plan": str(plan), "samples": shape.samples,
        "tokens": shape.samples * shape.tokens, "params": graph.param_numel(), "units": len(graph.units),
        "samples_per_part": graph.samples, "model_flops": flops * parts + forward_flops(graph.constants.graph),
        "recomputed_flops": sum(_again_flops(graph, u) for u in graph.units) * parts,
        "nominal_count": context.nominal_count,
        "tp_cut_parameters": share.parameters, "tp_cut_flops": share.flops, "tp_copied": "; ".join(share.copied),
        "zero": plan.zero, "whole_tensors": int(shape.whole_tensors), "loss": graph.loss_rule,
        "schedule": str(schedule_of(plan, has_tail=graph.tail is not None)), "stages": "+".join(map(str, sizes)),
    }  # fmt: skip
    program = Program(plan.axes, plan.microbatches, tuple(pool.segments), roles, tuple(meta.items()))
    if check:
        require_valid(program)
    return program


def staged(graph: Graph, plan: Plan, shape: StepShape) -> tuple[StageContext, CutShare]:
    """What lowering knows of the model once its stages are cut and its units traced, and how much tp cuts of it."""
    sizes = plan.stages or balance([unit_cost(graph, i) for i in range(len(graph.units))], plan.pp)
    if sum(sizes) != len(graph.units):
        raise PartitionError(
            f"the plan places {sum(sizes)} units, the model has {len(graph.units)}", "plan: stages",
            f"make the counts add up to {len(graph.units)}",
        )  # fmt: skip
    wanted = param_cuts(graph, plan.tp) if plan.tp > 1 else dict.fromkeys(graph.params)
    stage_of = tuple(stage for stage, size in enumerate(sizes) for _ in range(size))
    # put into the gradients beforehand, as if all tokens of the step counted
    count = shape.samples * shape.tokens if graph.is_counted else 1
    traced, cuts = _traced(graph, plan, wanted)
    share = cut_share(graph, plan, cuts, wanted, traced)
    reached = frozenset(
        u.params[source]
        for u in graph.units for source, slot in traced[cut_of(u, cuts)].grads
        if slot is not None and source < len(u.params)
    )  # fmt: skip
    if not reached:
        problem = "no parameter is trained: the backwards of autograd functions give none a gradient"
        raise PartitionError(
            problem, line_of_reader(graph, graph.params[0]), "return gradients from backward"
        )
    return StageContext(graph, plan, traced, stage_of, cuts, count, reached, {}), share


def groups_of(graph: Graph, shape: StepShape) -> Groups:
    """Of each parameter, its group of optimizer settings and what it shares with those it is stepped on with."""
    if shape.groups is not None:
        return shape.groups
    return {name: (int(len(graph.specs[name].shape) < MATRIX), None) for name in graph.params}


def unit_cost(graph: Graph, index: int) -> float:
    """FLOPs of a unit, plus a byte-sized share so that units without matmuls still weigh something."""
    template = graph.templates[graph.units[index].template]
    return template.flops + sum(spec.nbytes for spec in template.outputs)


def _traced(graph: Graph, plan: Plan, wanted: Cuts) -> tuple[Mapping[Cut, TracedUnit], Cuts]:
    """Every template traced once for every way in which its parameters are cut, and how they are cut in the end.

    The parameters of a unit that cannot be traced on cut tensors are copied instead.
    """
    kept = dict(wanted)
    while True:
        traced: dict[Cut, TracedUnit] = {}
        for unit in graph.units:
            if (key := cut_of(unit, kept)) in traced:
                continue
            try:
                traced[key] = _traced_unit(graph, key, plan.tp)
            except PartitionError:
                if all(cut is None for cut in key[1]):
                    raise
                kept |= dict.fromkeys(unit.params)
                break
        else:
            return traced, kept


def _traced_unit(graph: Graph, key: Cut, tp: int) -> TracedUnit:
    if (known := (key, tp)) not in graph.traced:
        template = graph.templates[key[0]]
        try:
            graph.traced[known] = split_joint(trace_joint(template, key[1], tp))
        except PartitionError as error:
            error.where = error.where or lines_of(template, error.problem)
            raise
    made: TracedUnit = graph.traced[known]
    return made


def _again_flops(graph: Graph, unit: Unit) -> int:
    """FLOPs of what is checkpointed, when it is computed again: what one chip does beyond the model's own."""
    template = graph.templates[unit.template]
    if not any(map(regions_of, template.graph.graph.nodes)):
        return 0
    alone = _traced_unit(graph, cut_of(unit, dict.fromkeys(unit.params)), 1)
    return alone.training_flops - template.model_flops


def _roles(context: StageContext, shape: StepShape) -> tuple[SegmentPool, tuple[Role, ...]]:
    pool = SegmentPool()
    return pool, tuple(role_of_stage(context, stage, pool, shape) for stage in range(context.plan.pp))


def role_of_stage(context: StageContext, stage: int, pool: SegmentPool, shape: StepShape) -> Role:
    """The role of one stage, its segments added to `pool`."""
    plan = context.plan
    role = RoleBuilder(stage, pool)
    kept = Kept(shape.optimizer_states, shape.has_masters, shape.whole_tensors)
    groups = make_groups(role, params_of(context, stage, groups_of(context.graph, shape)), plan, kept)
    trained = tuple(g for g in groups if not g.params[0].is_frozen)
    losses, unit_ends = emit_stage(role, context)
    role.add_frees(
        (
            *(body for turn in turns_in(role.bodies) for body in turn),
            "recv_forward",
            "forward",
            "send_forward",
            "recv_backward",
            "backward",
            "send_backward",
        )
    )
    started = _emit_last_backward(role, trained, plan, unit_ends)
    emit_update(role, trained, plan, losses, started)
    _emit_evaluation(role, plan, losses)
    return Role(
        stage,
        tuple(role.tensors),
        role.finished_bodies(),
        _schedules(role, plan, has_tail=context.graph.tail is not None),
    )


def params_of(context: StageContext, stage: int, settings: Groups) -> list[Param]:
    """The parameters of a stage, each in its earliest unit there."""
    graph = context.graph
    stages: dict[str, set[int]] = {}
    earliest: dict[str, int] = {}
    for index, unit in enumerate(graph.units):
        for name in unit.params:
            stages.setdefault(name, set()).add(context.stage_of[index])
            if context.stage_of[index] == stage:
                earliest.setdefault(name, index)
    params = []
    for name, first in earliest.items():
        cut, tp = context.cuts[name], context.plan.tp
        spec = graph.specs[name] if cut is None else cut.local(graph.specs[name], tp)
        sections = () if cut is None or (cut.divides(tp) and len(cut.sections) == 1) else cut.sections
        tied = tuple(sorted(stages[name])) if len(stages[name]) > 1 else ()
        groups = settings.get(name, (0, None))
        params.append(
            Param(
                name,
                spec,
                cut,
                sections,
                tied,
                first,
                name in graph.frozen or name not in context.reached,
                *groups,
            )
        )
    return params


def _emit_last_backward(
    role: RoleBuilder, groups: tuple[FlatGroup, ...], plan: Plan, unit_ends: Mapping[int, int]
) -> set[int]:
    """`backward_last`: the backward of the last microbatch, starting each bucket's reduction when it is complete."""
    due: dict[int, list[int]] = {}
    for index, group in enumerate(groups):
        if plan.dp > 1 and not group.tied:
            due.setdefault(unit_ends[group.ready], []).append(index)
    body = "backward_last"
    role.body(body)
    for instruction in role.bodies["backward"]:
        role.emit(body, instruction)
        for index in due.get(instruction.id, ()):
            reduce_gradients(role, body, groups[index], plan)
    return {index for indices in due.values() for index in indices}


def _emit_evaluation(role: RoleBuilder, plan: Plan, losses: Losses) -> None:
    """`drop` frees what forward kept for a backward that never comes; `report` sums loss and count."""
    alive: set[int] = set()
    for name in ("recv_forward", "forward", "send_forward"):
        for instruction in role.bodies.get(name, []):
            alive |= {t for t in named(instruction) if role.tensors[t].is_per_microbatch}
            if isinstance(instruction, Free):
                alive -= set(instruction.tensors)
    role.body("drop")
    if alive:
        role.emit("drop", Free(0, tuple(sorted(alive))))
    role.body("report")
    emit_stats(role, "report", [], losses, plan)


def schedule_of(plan: Plan, *, has_tail: bool) -> PipelineSchedule:
    """The plan's schedule, or the one that runs all forwards first where the loss needs them."""
    return PipelineSchedule.GPIPE if has_tail else plan.schedule


def _schedules(role: RoleBuilder, plan: Plan, *, has_tail: bool) -> tuple[tuple[str, tuple[Call, ...]], ...]:
    bodies = frozenset(role.bodies)
    schedule = schedule_of(plan, has_tail=has_tail)
    tasks = schedule.order(role.stage, plan.pp, plan.microbatches)
    before: list[Call] = []
    for totals, known in turns_in(bodies):
        before += [Call(totals, mb) for mb in range(plan.microbatches) if totals in bodies]
        before += [Call(known, CALLED_ONCE)] * (known in bodies)
    loss = [Call("loss", CALLED_ONCE)] * ("loss" in bodies)
    middle = with_transfers(tasks, bodies, last="backward_last")
    turn = next((i for i, call in enumerate(middle) if "backward" in call.body), len(middle)) if loss else 0
    step = (*before, *middle[:turn], *loss, *middle[turn:], Call("update", CALLED_ONCE),
            *[Call("commit", CALLED_ONCE)] * ("commit" in bodies))  # fmt: skip
    evaluate = [
        call
        for microbatch in range(plan.microbatches)
        for call in (*with_transfers((("forward", microbatch),), bodies, last=""), Call("drop", microbatch))
    ]
    start = (Call("constants", CALLED_ONCE),) if "constants" in bodies else ()
    return (
        ("start", start),
        ("step", step),
        ("evaluate", (*before, *evaluate, *loss, Call("report", CALLED_ONCE))),
    )


def with_transfers(tasks: tuple[Task, ...], bodies: frozenset[str], last: str) -> tuple[Call, ...]:
    """Calls of one stage: each task between its receives (posted one task ahead) and its sends.

    `bodies` are the bodies the role has (first and last stages lack some transfers); `last` replaces "backward" for
    the last microbatch, where gradient reduction starts.
    """
    final = next((i for i in reversed(range(len(tasks))) if tasks[i][0] == "backward"), None)
    calls: list[Call] = []
    for index, (kind, microbatch) in enumerate(tasks):
        awaited = tasks[:2] if index == 0 else tasks[index + 1 : index + 2]
        calls += [Call(f"recv_{k}", m) for k, m in awaited if f"recv_{k}" in bodies]
        calls.append(Call(last if index == final else kind, microbatch))
        calls += [Call(send, microbatch) for send in (f"send_{kind}",) if send in bodies]
    return tuple(calls)
