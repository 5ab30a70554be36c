"""Copies: what further chips of a plan hold of the tensors that one chip would hold once.

Every replica has its own parameters, buffers, reduced gradients and, without ZeRO, states of the optimizer; over `tp`
so has every chip what is not cut, and so have stages that share a parameter. They are only looked at where their bytes
differ from those of the first chip that holds them. Not looked at: states of parameters that `tp` does not cut, beyond
the first chip of a row.
"""

from collections.abc import Mapping

import torch

from orchestrator.runners.executing.chip import ExecutingChip, optimizer_state
from orchestrator.runners.executing.slices import cut
from orchestrator.runners.executing.whole_state import SCATTERED, is_scattered, whole_states
from orchestrator.verbs.verification.outcome import Outcome, Tensors, named_states
from partitioner.program.program import Program, TensorKind

Chips = Mapping[int, ExecutingChip]


def differing_copies(program: Program, chips: Chips, whole: Outcome) -> dict[str, Outcome]:
    """By chip or replica: its tensors that differ from those of a step's `whole` outcome, as whole tensors."""
    found: dict[str, Outcome] = {}
    for index, chip in chips.items():
        gradients, values = (
            _others(chip, kind, own)
            for kind, own in ((TensorKind.GRAD, whole.gradients), (TensorKind.PARAM, whole.values))
        )
        values |= _other_buffers(chip, whole.values)
        if gradients or values:
            found[f"chip {index}"] = Outcome(whole.loss, gradients, values)
    for replica in range(1, 1 if program.facts["zero"] else program.size("dp")):
        held = {
            program.chip_at(chip.coordinates | {"dp": 0}): optimizer_state(chip)
            for chip in chips.values() if chip.coordinates["dp"] == replica
        }  # fmt: skip
        states = _differing(named_states(whole_states(program, held)), whole.states)
        if states:
            found[f"replica {replica}"] = Outcome(whole.loss, {}, {}, states)
    return found


def _others(chip: ExecutingChip, kind: TensorKind, whole: Tensors) -> dict[str, torch.Tensor]:
    params = {t.source: t for t in chip.tensors if t.kind is TensorKind.PARAM}
    found: dict[str, torch.Tensor] = {}
    for tensor in chip.tensors:
        is_own = tensor.kind is kind and tensor.source in params and tensor.shards != SCATTERED
        if not is_own or tensor.base is None or tensor.source not in whole:
            continue
        base, param = chip.tensors[tensor.base], params[tensor.source]
        if is_scattered(chip.role, base.name):
            continue
        own = chip.value(base.id).narrow(0, tensor.offset, tensor.spec.numel).view(param.spec.shape)
        made = whole[tensor.source].clone().contiguous()
        place = cut(chip.program, param, made, chip.coordinates)
        if not torch.equal(place, own):
            place.copy_(own)
            found[tensor.source] = made
    return found


def _other_buffers(chip: ExecutingChip, whole: Tensors) -> dict[str, torch.Tensor]:
    buffers = {
        t.source.partition(":")[2]: chip.value(t.id) for t in chip.tensors if t.kind is TensorKind.BUFFER
    }
    return _differing(buffers, whole)


def _differing(own: Tensors, whole: Tensors) -> dict[str, torch.Tensor]:
    return {name: v.clone() for name, v in own.items() if name in whole and not torch.equal(v, whole[name])}
