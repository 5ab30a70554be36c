"""Whole tensors from what chips hold, and back: parameters, gradients and optimizer states by their global names.

A chip holds its shards end to end in flat buffers. Optimizer states of an entry lie like the parameter; others (step
counts, statistics of whole parameters) belong to every parameter that is stepped on together.
"""

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from comms.errors import PlanError
from orchestrator.runners.executing.chip import State
from orchestrator.runners.executing.slices import cut, joined
from orchestrator.runners.runner import States
from orchestrator.runs.checkpoints.checkpoint_folder import TrainingState
from partitioner.capture.captured_graph import TORCH
from partitioner.program.program import Program, Role, Tensor, TensorKind, Update

Flat = Callable[[int, str], torch.Tensor]  # a buffer of a chip, by name
OwnState = Mapping[str, Mapping[str, torch.Tensor]]  # of parameters, by name and key
STATES = ".optimizer."  # between the name of what is stepped on and that of a state of it
MASTER = "float32 copy"  # the name of a full-precision copy among the states of a parameter
SCATTERED = ((0, "dp"),)  # a gradient that is another's shard


def trained(program: Program, states: States) -> TrainingState:
    """All that chips have trained, from their saved states, in memory of its own."""
    own = whole_states(program, states)
    buffers = {name: value.clone() for name, value in whole_buffers(program, states).items()}
    return TrainingState(whole_parameters(program, states.__getitem__), buffers, own)


def completed(held: TrainingState, module: nn.Module) -> TrainingState:
    """The same with what the module holds besides, as parameters that are not trained."""
    params, buffers = dict(module.named_parameters()), dict(module.named_buffers())
    require_there(held, params)
    kept = {name: value.detach().clone() for name, value in params.items() if name not in held.parameters}
    taken = {name: value.view(params[name].shape) for name, value in held.parameters.items()}
    still = {name: value.detach().clone() for name, value in buffers.items() if name not in held.buffers}
    return TrainingState(taken | kept, {**held.buffers, **still}, held.states)


def require_there(held: TrainingState, names: Collection[str]) -> None:
    """Raise PlanError if a model has lost parameters that chips have trained."""
    if gone := sorted(held.parameters.keys() - set(names)):
        problem = f"the model has no {gone[0]} any more, which the chips have trained"
        raise PlanError(problem, "sync()", "call sync() before the model changes")


def shared_steps(program: Program, ages: Mapping[str, int]) -> bool:
    """Whether all that the Program steps on together has come equally far (see `situation.ages_of`)."""
    groups = [group for role in program.roles for group in step_groups(program, role) if not group.is_whole]
    return all(len({ages[param.source] for param in group.params}) < 2 for group in groups)


def whole_parameters(program: Program, state_of: Callable[[int], State]) -> dict[str, torch.Tensor]:
    """Parameters by their global name, from the chips' saved states."""
    return whole_tensors(program, TensorKind.PARAM, lambda chip, buffer: state_of(chip)[buffer])


def whole_tensors(program: Program, kind: TensorKind, flat: Flat) -> dict[str, torch.Tensor]:
    """Parameters or gradients by global name; `flat` gives the flat buffers that chips hold.

    They are put together from the shards of replica 0; a buffer that ZeRO scattered, from those of all replicas.
    """
    found: dict[str, torch.Tensor] = {}
    for role in program.roles:
        param_of = {t.source: t for t in role.tensors if t.kind is TensorKind.PARAM}
        buffers: dict[tuple[int, int], torch.Tensor] = {}
        for tensor in role.tensors:
            is_wanted = tensor.kind is kind and tensor.source in param_of and tensor.shards != SCATTERED
            if not is_wanted or tensor.base is None or tensor.source in found:
                continue
            param, pieces = param_of[tensor.source], []
            for tp in range(program.size("tp") if param.shards else 1):
                key = (tensor.base, tp)
                if key not in buffers:
                    buffers[key] = _whole_buffer(program, role, role.tensors[tensor.base].name, tp, flat)
                piece = buffers[key].narrow(0, tensor.offset, tensor.spec.numel)
                pieces.append(piece.view(tensor.spec.shape))
            found[tensor.source] = joined(param, pieces) if param.shards else pieces[0].clone()
    return found


def is_scattered(role: Role, buffer: str) -> bool:
    """Whether a buffer of gradients holds a replica's own ones, which ZeRO reduces into shards beside it."""
    scattered = buffer.replace(".grads", ".grad_shard")
    return scattered != buffer and any(tensor.name == scattered for tensor in role.tensors)


def _whole_buffer(program: Program, role: Role, name: str, tp: int, flat: Flat) -> torch.Tensor:
    if not is_scattered(role, name):
        return flat(program.chip_at({"pp": role.stage, "dp": 0, "tp": tp}), name)
    scattered = name.replace(".grads", ".grad_shard")
    replicas = range(program.size("dp"))
    chips = [program.chip_at({"pp": role.stage, "dp": dp, "tp": tp}) for dp in replicas]
    return torch.cat([flat(chip, scattered) for chip in chips])


@dataclass(frozen=True, slots=True)
class StepGroup:
    """What one Update steps on: its tensor's name, the flat buffer behind it, and the parameters in that.

    `is_whole`: every parameter is stepped on by itself, by the replica in whose shard it lies.
    """

    name: str
    flat: Tensor
    shard: int  # entries of it that a chip steps on
    is_sharded: bool
    is_whole: bool
    params: tuple[Tensor, ...]

    def owner(self, param: Tensor) -> int:
        """The replica that steps on a whole parameter."""
        return param.offset // self.shard if self.is_sharded else 0


def step_groups(program: Program, role: Role) -> Iterator[StepGroup]:
    """The groups of parameters that a role steps on."""
    for body in role.bodies:
        for instruction in body.instructions:
            if isinstance(instruction, Update):
                target = role.tensors[instruction.target]
                flat = target if target.base is None else role.tensors[target.base]
                params = tuple(t for t in role.tensors if t.kind is TensorKind.PARAM and t.base == flat.id)
                name = role.tensors[instruction.param].name
                is_sharded, is_whole = target.base is not None, bool(program.facts["whole_tensors"])
                yield StepGroup(name, flat, target.spec.numel, is_sharded, is_whole, params)


def whole_states(program: Program, states: States) -> dict[str, dict[str, torch.Tensor]]:
    """The optimizer's state of every parameter, as one chip would have it, and master copies.

    A state with the shape of what is stepped on has a number for every entry; others are as they are, and so are all
    of a parameter that is stepped on whole.
    """
    found: dict[str, dict[str, torch.Tensor]] = {}
    for role in program.roles:
        for group in step_groups(program, role):
            if group.is_whole:
                for param in group.params:
                    at = {"pp": role.stage, "dp": group.owner(param), "tp": 0}
                    found[param.source] = _own_states(group.name, states[program.chip_at(at)])
            first_chip = states[program.chip_at({"pp": role.stage, "dp": 0, "tp": 0})]
            for key in _keys(role, group, first_chip):
                name = group.name if key == MASTER else f"{group.name}{STATES}{key}"
                first = first_chip[name]
                is_cut = key == MASTER or tuple(first.shape) == (group.shard,)
                whole = partial(_whole_flat, program, role, group, name, states, is_cut=is_cut)
                flats = [whole(tp) for tp in range(program.size("tp"))]
                for param in group.params:
                    own = _own(param, flats) if is_cut else flats[0].clone()
                    found.setdefault(param.source, {})[key] = own
    return found


def _own_states(name: str, saved: State) -> dict[str, torch.Tensor]:
    """The states that a chip saved of a group, by their keys."""
    prefix = f"{name}{STATES}"
    return {key.removeprefix(prefix): value.clone() for key, value in saved.items() if key.startswith(prefix)}


def _keys(role: Role, group: StepGroup, saved: State) -> list[str]:
    """The keys of what lies in a group's shards, or belongs to all that it steps on together."""
    has_master = any(t.name == group.name and t.kind is TensorKind.MASTER for t in role.tensors)
    return [*([] if group.is_whole else _own_states(group.name, saved)), *[MASTER] * has_master]


def _whole_flat(
    program: Program, role: Role, group: StepGroup, name: str, states: States, tp: int, *, is_cut: bool
) -> torch.Tensor:
    """A state of a group, put together from the replicas' shards if it is cut."""
    replicas = range(program.size("dp") if group.is_sharded and is_cut else 1)
    parts = [states[program.chip_at({"pp": role.stage, "dp": dp, "tp": tp})][name] for dp in replicas]
    return torch.cat([part.reshape(-1) for part in parts]) if is_cut else parts[0]


def _own(param: Tensor, flats: list[torch.Tensor]) -> torch.Tensor:
    pieces = [f.narrow(0, param.offset, param.spec.numel).view(param.spec.shape) for f in flats]
    return joined(param, pieces) if param.shards else pieces[0].clone()


def whole_buffers(program: Program, states: States) -> dict[str, torch.Tensor]:
    """What buffers that the model changes hold, by their global names."""
    return {
        tensor.source.partition(":")[2]: states[program.chip_at({"pp": role.stage, "dp": 0, "tp": 0})][
            tensor.name
        ]
        for role in program.roles
        for tensor in role.tensors
        if tensor.kind is TensorKind.BUFFER
    }


def chip_states(
    program: Program,
    values: Callable[[str], torch.Tensor],
    own: OwnState,
    entries: frozenset[str] = frozenset(),
) -> States:
    """What a checkpoint of these parameters and states (see `whole_states`) would hold, by chip.

    `entries`: names of states with a number for every entry, for parameters of one, where shapes do not tell.
    """
    return {chip: _chip_state(program, chip, values, own, entries) for chip in range(program.num_chips)}


def _chip_state(
    program: Program, chip: int, values: Callable[[str], torch.Tensor], own: OwnState, entries: frozenset[str]
) -> State:
    role, at = program.role_of(chip), program.coordinates(chip)
    state: dict[str, torch.Tensor] = {}
    by_flat: dict[int, list[Tensor]] = {}
    for tensor in role.tensors:
        if tensor.kind is TensorKind.PARAM and tensor.base is not None:
            by_flat.setdefault(tensor.base, []).append(tensor)
    for base, params in by_flat.items():
        flat = role.tensors[base]
        state[flat.name] = _end_to_end(program, flat, params, at, lambda p: values(f"params:{p.source}"))
    state |= {t.name: values(t.source) for t in role.tensors if t.kind is TensorKind.BUFFER}
    masters = {t.name: t for t in role.tensors if t.kind is TensorKind.MASTER}
    for group in step_groups(program, role):
        shard = partial(_shard, program, group, at)
        if group.name in masters:
            wide = TORCH[masters[group.name].spec.dtype]
            state[group.name] = shard(
                lambda p: own.get(p.source, {}).get(MASTER, values(f"params:{p.source}")), wide
            )
        if group.is_whole:
            mine = next((p for p in group.params if group.owner(p) == at["dp"] * group.is_sharded), None)
            held = own.get(mine.source, {}) if mine else {}
            state |= {f"{group.name}{STATES}{k}": v.clone() for k, v in held.items() if k != MASTER}
            continue
        for key, value in own.get(group.params[0].source, {}).items():
            if key == MASTER:
                continue
            shapes = {tuple(values(f"params:{p.source}").shape) for p in group.params}
            like = tuple(values(f"params:{group.params[0].source}").shape)
            is_told = any(math.prod(shape) > 1 for shape in shapes) and value.numel() > 1
            lies = tuple(value.shape) == like and (is_told or key in entries)
            made = shard(partial(_state_of, own, key), value.dtype) if lies else value.clone()
            state[f"{group.name}{STATES}{key}"] = made
    return state


def _state_of(own: OwnState, key: str, param: Tensor) -> torch.Tensor:
    return own[param.source][key]


def _shard(
    program: Program,
    group: StepGroup,
    at: Mapping[str, int],
    whole: Callable[[Tensor], torch.Tensor],
    dtype: torch.dtype,
) -> torch.Tensor:
    flat = _end_to_end(program, group.flat, list(group.params), at, whole, dtype)
    return flat.narrow(0, at["dp"] * group.shard if group.is_sharded else 0, group.shard).clone()


def _end_to_end(
    program: Program,
    flat: Tensor,
    params: list[Tensor],
    at: Mapping[str, int],
    whole: Callable[[Tensor], torch.Tensor],
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """A chip's shards of whole tensors, at their places in a flat buffer."""
    filled = torch.zeros(flat.spec.numel, dtype=dtype or TORCH[flat.spec.dtype])
    for param in params:
        piece = cut(program, param, whole(param), at)
        filled.narrow(0, param.offset, param.spec.numel).copy_(piece.reshape(-1))
    return filled
