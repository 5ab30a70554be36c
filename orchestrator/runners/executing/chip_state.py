"""What of a chip goes into a checkpoint, and how it comes back.

Parameters are the same on all replicas, so the replica with dp = 0 saves them; optimizer state (and master copies)
likewise, unless ZeRO shards it, in which case every chip saves its own.
"""

from collections.abc import Callable, Mapping

import torch

from orchestrator.runners.executing.chip import ExecutingChip
from partitioner.program.program import Program, Role, TensorKind

State = Mapping[str, torch.Tensor]
Flat = Callable[[int, str], torch.Tensor]  # a buffer of a chip, by name
SCATTERED = ((0, "dp"),)  # a gradient that is another's shard


def saved_state(chip: ExecutingChip) -> dict[str, torch.Tensor]:
    """The tensors this chip is responsible for, by name; empty if another replica saves them all."""
    state: dict[str, torch.Tensor] = {}
    if chip.coordinates["dp"] == 0:
        state |= {
            t.name: _value(chip, t.id) for t in chip.tensors if t.kind is TensorKind.FLAT and t.base is None
        }
    if chip.coordinates["dp"] == 0 or chip.program.facts["zero"]:
        state |= {t.name: _value(chip, t.id) for t in chip.tensors if t.kind is TensorKind.MASTER}
        for param, optimizer in chip.optimizers.items():
            name = chip.tensors[param].name
            state |= {f"{name}.optimizer.{key}": value for key, value in optimizer.state().items()}
    return state


def restore_state(chip: ExecutingChip, state_of: Callable[[int], State]) -> None:
    """Put back what `saved_state` gave; `state_of(chip)` is the saved state of any chip. Optimizers must exist."""
    first = chip.program.chip_at(chip.coordinates | {"dp": 0})
    shared, own = state_of(first), state_of(chip.index if chip.program.facts["zero"] else first)
    with torch.no_grad():
        for tensor in chip.tensors:
            if tensor.kind is TensorKind.FLAT and tensor.base is None:
                _value(chip, tensor.id).copy_(shared[tensor.name])
            elif tensor.kind is TensorKind.MASTER:
                _value(chip, tensor.id).copy_(own[tensor.name])
        for param, optimizer in chip.optimizers.items():
            prefix = f"{chip.tensors[param].name}.optimizer."
            optimizer.load({k.removeprefix(prefix): v for k, v in own.items() if k.startswith(prefix)})


def whole_parameters(program: Program, state_of: Callable[[int], State]) -> dict[str, torch.Tensor]:
    """Parameters by their global name, from the chips' saved states."""
    return whole_tensors(program, TensorKind.PARAM, lambda chip, buffer: state_of(chip)[buffer])


def whole_tensors(program: Program, kind: TensorKind, flat: Flat) -> dict[str, torch.Tensor]:
    """Parameters or gradients by global name; `flat` gives the flat buffers that chips hold.

    They are put together from the shards of replica 0; a buffer that ZeRO scattered, from those of all replicas.
    """
    found: dict[str, torch.Tensor] = {}
    for role in program.roles:
        shards_of = {t.source: t.shards for t in role.tensors if t.kind is TensorKind.PARAM}
        buffers: dict[tuple[int, int], torch.Tensor] = {}
        for tensor in role.tensors:
            is_wanted = tensor.kind is kind and tensor.source in shards_of and tensor.shards != SCATTERED
            if not is_wanted or tensor.base is None or tensor.source in found:
                continue
            shards, pieces = shards_of[tensor.source], []
            for tp in range(program.size("tp") if shards else 1):
                key = (tensor.base, tp)
                if key not in buffers:
                    buffers[key] = _whole_buffer(program, role, role.tensors[tensor.base].name, tp, flat)
                piece = buffers[key].narrow(0, tensor.offset, tensor.spec.numel)
                pieces.append(piece.view(tensor.spec.shape))
            found[tensor.source] = torch.cat(pieces, shards[0][0]) if shards else pieces[0].clone()
    return found


def _whole_buffer(program: Program, role: Role, name: str, tp: int, flat: Flat) -> torch.Tensor:
    scattered = name.replace(".grads", ".grad_shard")
    if scattered == name or all(tensor.name != scattered for tensor in role.tensors):
        return flat(program.chip_at({"pp": role.stage, "dp": 0, "tp": tp}), name)
    replicas = range(program.size("dp"))
    chips = [program.chip_at({"pp": role.stage, "dp": dp, "tp": tp}) for dp in replicas]
    return torch.cat([flat(chip, scattered) for chip in chips])


def _value(chip: ExecutingChip, tensor: int) -> torch.Tensor:
    value = chip.fixed[tensor]
    assert value is not None
    return value
