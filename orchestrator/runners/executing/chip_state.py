"""What of a chip goes into a checkpoint, and how it comes back.

Parameters are the same on all replicas, so the replica with dp = 0 saves them; optimizer state (and master copies)
likewise, unless ZeRO shards it, in which case every chip saves its own.
"""

from collections.abc import Callable, Mapping

import torch

from orchestrator.runners.executing.chip import Chip
from partitioner.program.program import Program, TensorKind

State = Mapping[str, torch.Tensor]


def saved_state(chip: Chip) -> dict[str, torch.Tensor]:
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


def restore_state(chip: Chip, state_of: Callable[[int], State]) -> None:
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


def full_parameters(program: Program, state_of: Callable[[int], State]) -> dict[str, torch.Tensor]:
    """Whole parameters by their global name, put together from the chips' saved flat buffers."""
    found: dict[str, torch.Tensor] = {}
    for role in program.roles:
        for tensor in role.tensors:
            if tensor.kind is not TensorKind.PARAM or tensor.source in found or tensor.base is None:
                continue
            base = role.tensors[tensor.base].name
            pieces = []
            for tp in range(program.size("tp") if tensor.shards else 1):
                chip = program.chip_at({"pp": role.stage, "dp": 0, "tp": tp})
                flat = state_of(chip)[base]
                pieces.append(flat.narrow(0, tensor.offset, tensor.spec.numel).view(tensor.spec.shape))
            found[tensor.source] = (
                torch.cat(pieces, tensor.shards[0][0]) if tensor.shards else pieces[0].clone()
            )
    return found


def _value(chip: Chip, tensor: int) -> torch.Tensor:
    value = chip.fixed[tensor]
    assert value is not None
    return value
