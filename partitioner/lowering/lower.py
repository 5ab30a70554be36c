"""Lowering: (captured graph, plan) to a Program, one role per pipeline stage.

Tensor parallelism is inside the traced units already. Here the stages are cut, activations and their gradients get
their sends and receives, gradients their reduction over dp, the optimizer its (sharded) step, and every tensor its
lifetime. `Program.meta` gets the step's facts: `samples`, `tokens`, `model_flops` (forward + backward, no recompute),
`params`, `nominal_count`, `dtype`, `plan`, `model`.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from comms.errors import PartitionError
from partitioner.capture.captured_graph import SHORT, Graph
from partitioner.capture.graph_units import capture_graph
from partitioner.capture.tp_styles import unfuse
from partitioner.capture.tracing import LossFunction
from partitioner.layout.joint_trace import param_dims, tensor_parallel_mesh, trace_joint
from partitioner.layout.parallel_plan import Plan, balance
from partitioner.layout.pipeline_schedules import Task
from partitioner.lowering.flat_buffers import (
    FlatGroup,
    Param,
    emit_stats,
    emit_update,
    make_groups,
    reduce_gradients,
)
from partitioner.lowering.pieces import TracedUnit, split_joint
from partitioner.lowering.stage import Losses, RoleBuilder, SegmentPool, StageContext, emit_stage
from partitioner.program.instructions import named
from partitioner.program.program import Call, Free, Program, Role, TensorSpec
from partitioner.program.static_check import require_valid

BACKWARD_FLOPS = 3  # forward + backward, as multiples of forward: two matmuls per matmul
MATRIX = 2  # dims of a parameter that gets weight decay
STEP_DTYPES = {"f64": "fp64", "bf16": "bf16"}  # all others are taken for fp32
CALLED_ONCE = 0  # microbatch number of bodies that run once per step


@dataclass(frozen=True, slots=True)
class StepShape:
    """What one step processes: `samples` per step over all replicas, `tokens` per sample (1 if no sequence).

    `undecayed`: parameters without weight decay; None = all but matrices (biases and norms), the choice since GPT-2.
    """

    samples: int
    tokens: int
    model: str
    dtype: str
    optimizer_states: int
    undecayed: frozenset[str] | None = None


def step_shape(module: nn.Module, batch: Mapping[str, torch.Tensor], optimizer_states: int) -> StepShape:
    """What a step on `batch` (all its samples) processes; sequences are entries of whole numbers, [samples, tokens]."""
    tokens = (v.shape[1] for v in batch.values() if v.dim() > 1 and not v.is_floating_point())
    dtype = STEP_DTYPES.get(SHORT[next(module.parameters()).dtype], "fp32")
    samples = next(iter(batch.values())).shape[0]
    return StepShape(samples, max(tokens, default=1), type(module).__name__, dtype, optimizer_states)


def partition(
    module: nn.Module,
    batch: Mapping[str, torch.Tensor],
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
    shape, parts = step_shape(module, batch, optimizer_states), plan.dp * plan.microbatches
    if shape.samples % parts:
        raise PartitionError(f"{shape.samples} samples do not split into {parts} parts (dp x microbatches)",
                             "batch", f"use a multiple of {parts}")  # fmt: skip
    size = shape.samples // parts
    microbatch = {name: value[:size] for name, value in batch.items()}
    return lower(capture_graph(module, microbatch, size, loss_fn=loss_fn, min_units=plan.pp), plan, shape)


def lower(graph: Graph, plan: Plan, shape: StepShape) -> Program:
    """The Program of one training step (and of evaluation), checked. Raises PartitionError."""
    undecayed = shape.undecayed
    if undecayed is None:
        undecayed = frozenset(name for name in graph.params if len(graph.specs[name].shape) < MATRIX)
    graph = unfuse(graph) if plan.tp > 1 else graph
    sizes = plan.stages or balance([unit_cost(graph, i) for i in range(len(graph.units))], plan.pp)
    if sum(sizes) != len(graph.units):
        raise PartitionError(
            f"the plan places {sum(sizes)} units, the model has {len(graph.units)}", "plan: stages",
            f"make the counts add up to {len(graph.units)}",
        )  # fmt: skip
    dims = _param_dims(graph, plan)
    stage_of = tuple(stage for stage, size in enumerate(sizes) for _ in range(size))
    # put into the gradients beforehand, as if all tokens of the step counted
    count = shape.samples * shape.tokens
    context = StageContext(graph, plan, _trace_templates(graph, plan, dims), stage_of, dims, count)
    pool = SegmentPool()
    roles = tuple(_role(context, stage, pool, undecayed, shape.optimizer_states) for stage in range(plan.pp))
    flops = BACKWARD_FLOPS * sum(graph.templates[u.template].flops for u in graph.units)
    meta: dict[str, str | int | float] = {
        "model": shape.model, "dtype": shape.dtype, "plan": str(plan), "samples": shape.samples,
        "tokens": count, "params": graph.param_numel(), "units": len(graph.units),
        "model_flops": flops * plan.microbatches * plan.dp, "nominal_count": count,
        "zero": plan.zero, "loss": graph.loss_rule, "schedule": str(plan.schedule), "stages": "+".join(map(str, sizes)),
    }  # fmt: skip
    program = Program(plan.axes, plan.microbatches, tuple(pool.segments), roles, tuple(meta.items()))
    require_valid(program)
    return program


def unit_cost(graph: Graph, index: int) -> float:
    """FLOPs of a unit, plus a byte-sized share so that units without matmuls still weigh something."""
    template = graph.templates[graph.units[index].template]
    return template.flops + sum(spec.nbytes for spec in template.outputs)


def _param_dims(graph: Graph, plan: Plan) -> Mapping[str, int | None]:
    """Where tp cuts each parameter; replicated where its uses disagree or the size does not divide."""
    found: dict[str, set[int | None]] = {}
    for unit in graph.units:
        template = graph.templates[unit.template]
        for name, dim in zip(unit.params, param_dims(template), strict=True):
            found.setdefault(name, set()).add(dim)
    dims: dict[str, int | None] = {}
    for name, choices in found.items():
        dim = choices.pop() if len(choices) == 1 else None
        fits = plan.tp > 1 and dim is not None and graph.specs[name].shape[dim] % plan.tp == 0
        dims[name] = dim if fits else None
    return dims


def _trace_templates(
    graph: Graph, plan: Plan, dims: Mapping[str, int | None]
) -> Mapping[tuple[int, bool], TracedUnit]:
    """Trace every (template, is it first) once."""
    traced: dict[tuple[int, bool], TracedUnit] = {}
    with tensor_parallel_mesh(plan.tp) as mesh:
        for unit in graph.units:
            key = (unit.template, not unit.activations)
            if key not in traced:
                frozen = [name in graph.frozen for name in unit.params]
                cuts = [dims[name] for name in unit.params]
                joint = trace_joint(graph.templates[unit.template], cuts, mesh, frozen, first=key[1])
                traced[key] = split_joint(joint)
    return traced


def _role(
    context: StageContext, stage: int, pool: SegmentPool, undecayed: frozenset[str], states: int
) -> Role:
    plan = context.plan
    role = RoleBuilder(stage, pool)
    groups = make_groups(role, _params(context, stage, undecayed), plan, states)
    trained = tuple(g for g in groups if not g.params[0].is_frozen)
    losses, unit_ends = emit_stage(role, context)
    role.add_frees(("recv_forward", "forward", "send_forward", "recv_backward", "backward", "send_backward"))
    started = _emit_last_backward(role, trained, plan, unit_ends)
    emit_update(role, trained, plan, losses, started)
    _emit_evaluation(role, plan, losses)
    return Role(stage, tuple(role.tensors), role.finished_bodies(), _schedules(role, plan))


def _params(context: StageContext, stage: int, undecayed: frozenset[str]) -> list[Param]:
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
        dim = context.dims[name]
        shape = list(graph.specs[name].shape)
        if dim is not None:
            shape[dim] //= context.plan.tp
        tied = tuple(sorted(stages[name])) if len(stages[name]) > 1 else ()
        spec = TensorSpec(tuple(shape), graph.specs[name].dtype)
        params.append(Param(name, spec, dim, tied, first, name in graph.frozen, name not in undecayed))
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


def _schedules(role: RoleBuilder, plan: Plan) -> tuple[tuple[str, tuple[Call, ...]], ...]:
    bodies = frozenset(role.bodies)
    tasks = plan.schedule.order(role.stage, plan.pp, plan.microbatches)
    step = (*with_transfers(tasks, bodies, last="backward_last"), Call("update", CALLED_ONCE))
    evaluate = [
        call
        for microbatch in range(plan.microbatches)
        for call in (*with_transfers((("forward", microbatch),), bodies, last=""), Call("drop", microbatch))
    ]
    start = (Call("constants", CALLED_ONCE),) if "constants" in bodies else ()
    return (("start", start), ("step", step), ("evaluate", (*evaluate, Call("report", CALLED_ONCE))))


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
